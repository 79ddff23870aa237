"""What people type and paste as classes, blends of classes, and a SiT whose sampling another node has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_dit import bare, dit_labels, labels, latent, load_dit, sample, tiny, write

import nodes

pytestmark = pytest.mark.newest

NULL = 10
SAME = 2e-5  # float32, relative to the largest value of a latent


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("labels") / "DiT.safetensors", bare(tiny(depth=2, classes=NULL)))


@pytest.fixture(scope="module")
def model(path: str) -> Any:
    return load_dit(path)


# --- text -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("281: tabby, tabby cat", [281]),
        ("281: tabby, tabby cat, 207", [281, 207]),
        ("2: great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias", [2]),
        ("great white shark, white shark; hen", [2, 8]),
        ("7: cock, hen", [7, 8]),
        ("3: my own class", [3]),
        ("[207, 360, 387, 974]", [207, 360, 387, 974]),
        ("tensor([207, 360])", [207, 360]),
        ("['tabby', \"hen\"]", [281, 8]),
        ("(207, 360)", [207, 360]),
        ("207; 360\n387\r\n974", [207, 360, 387, 974]),
        ("207，360、387；974", [207, 360, 387, 974]),
        ("２０７", [207]),
        ("207 360 387", [207, 360, 387]),
        ("207 golden retriever", [207]),
        ("207 - golden retriever", [207]),
        ("class 207, #360, labels: 3", [207, 360, 3]),
        ("golden_retriever, Golden-Retriever", [207, 207]),
        ("n02099601, N02123045", [207, 281]),
        ("n02099601 golden retriever", [207]),
        ("penguin", [145]),
        ("crane (bird)", [134]),
        ("{0: 'tench, Tinca tinca', 1: \"goldfish, Carassius auratus\"}", [0, 1]),
        ("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus", [0, 1]),
        ("n02123045,tabby,tabby cat\nn02123159_tiger_cat", [281, 282]),
        ('207,"golden retriever"\n517,crane\n638,"maillot"', [207, 517, 638]),
        ("n02123045, n02123045: my cat, 207, 207, tench, tench", [281, 281, 207, 207, 0, 0]),
        ("1234, tench", [1234, 0]),
        ('"207": ["n02099601", "golden_retriever"],\n"281": ["n02123045", "tabby"],', [207, 281]),
        ('{"0": ["n01440764", "tench"]}', [0]),
        ("207: n02099601, golden_retriever, 281: n02123045", [207, 281]),
        ("{'tench': 0, 'goldfish': 1}", [0, 1]),
        ("golden retriever: 207; my own class: 3", [207, 3]),
        ("207=golden retriever, label = 5", [207, 5]),
    ],
    ids=str,
)
def test_lists_as_people_paste_them(text: str, indices: list[int]) -> None:
    assert dit_labels.parse_labels(text) == indices


def test_every_entry_of_the_nodes_own_list_is_one_class(node_classes: dict[str, Any]) -> None:
    for index, option in enumerate(dit_labels.label_options()):
        assert dit_labels.parse_labels(option) == [index], option
    pasted = dit_labels.label_options()[2].split(": ", 1)[1]
    conditioning = node_classes["DiTClassLabel"].execute("0: tench, Tinca tinca", pasted)[0]
    assert conditioning[0][1][dit_labels.LABELS].tolist() == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat", r"'cat', which is a word in the names of several classes: 281 \(tabby\).*284 \(Siamese cat\).*Write the number"),
        ("retrievers", r"205 \(flat-coated retriever\).*207 \(golden retriever\)"),
        ("n00000001", "'n00000001', which is the WordNet id of none"),
        ("99999999999999999999", "labels has '99999999999999999999', which is not a class number"),
        ("40000", "labels has '40000', which is not a class number"),
        ("207 xyzzy", "neither a class number nor"),
        ("207: n01440764", r"n01440764 is class 0 \(tench\). Write one of them"),
        ("207: n00000001", "which is the WordNet id of none"),
    ],
    ids=str,
)
def test_what_is_no_class_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dit_labels.parse_labels(text)


def test_wordnet_ids_are_imagenets_in_its_order() -> None:
    ids = list(dit_labels.imagenet_ids())
    assert len(ids) == 1000 and ids == sorted(ids)
    known = {"n01440764": 0, "n02123045": 281, "n02099601": 207, "n09472597": 980, "n15075141": 999}
    assert {name: dit_labels.imagenet_ids()[name] for name in known} == known


# --- blends ---------------------------------------------------------------------------------------------------------------


def average(to: Any, other: Any, strength: float) -> Any:
    return nodes.ConditioningAverage().addWeighted(to, other, strength)[0]


def blended(path: str, shares: dict[int, float]) -> torch.Tensor:
    """Sample a model that has a blend of classes in the place of class 0."""
    model = load_dit(path)
    table = model.model.diffusion_model.y_embedder.embedding_table.weight
    with torch.no_grad():
        table[0] = sum(share * table[label].clone() for label, share in shares.items())
    return sample(model, labels(0))


def test_an_average_of_classes_is_an_average_of_their_embeddings(path: str, model: Any) -> None:
    blend = average(labels(1), labels(2), 0.25)
    assert difference(sample(model, blend), blended(path, {1: 0.25, 2: 0.75})) < SAME
    three = average(blend, labels(3), 0.5)
    assert difference(sample(model, three), blended(path, {1: 0.125, 2: 0.375, 3: 0.5})) < SAME
    with_null = average(labels(1), labels(-1), 0.6)
    assert difference(sample(model, with_null), blended(path, {1: 0.6, NULL: 0.4})) < SAME
    for same in (average(labels(1), labels(1), 0.3), average(labels(1), labels(2), 1.0), average(labels(2), labels(1), 0.0)):
        assert torch.equal(sample(model, same), sample(model, labels(1)))


def test_a_batch_is_blended_image_by_image(model: Any) -> None:
    blend = average(labels(1, 3), labels(2, 3), 0.5)
    mixed, plain = (sample(model, chosen, start=latent(batch=2)) for chosen in (blend, labels(1, 3)))
    assert difference(mixed[1], plain[1]) < SAME < 1e-2 < difference(mixed[0], plain[0])


def test_blends_that_cannot_be_are_refused_before_sampling(model: Any) -> None:
    joined = nodes.ConditioningConcat().concat(labels(1), labels(2))[0]
    for positive, message in (
        (joined, "ConditioningConcat.*ConditioningAverage"),
        (average(labels(1), labels(2, 3), 0.5), "lists of labels of different lengths"),
        (average(labels(1, 2), labels(3), 0.5), "lists of labels of different lengths"),
    ):
        steps: list[int] = []
        with pytest.raises(ValueError, match=message):
            sample(model, positive, start=latent(batch=2), callback=lambda step, *_, steps=steps: steps.append(step))
        assert steps == []


def test_a_blend_samples_in_half_precision(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management

    expected = sample(load_dit(path), average(labels(1), labels(2), 0.3))
    monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda **kwargs: torch.bfloat16)
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *args: None)
    result = sample(load_dit(path), average(labels(1), labels(2), 0.3))
    assert difference(result, expected) < 0.1


# --- shift ----------------------------------------------------------------------------------------------------------------


def shifted(model: Any, name: str, *arguments: Any) -> Any:
    from comfy_extras import nodes_model_advanced

    node = getattr(nodes_model_advanced, name)()
    return getattr(node, node.FUNCTION)(model, *arguments)[0]


class Times:
    """The times that the network is asked for."""

    def __init__(self, model: Any) -> None:
        self.seen: list[float] = []
        self.handle = model.model.diffusion_model.t_embedder.register_forward_pre_hook(
            lambda module, args: self.seen.append(float(args[0][0]))
        )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("ModelSamplingSD3", (3.0,)), ("ModelSamplingAuraFlow", (3.0,)), ("ModelSamplingFlux", (1.15, 0.5, 1024, 1024))],
)
def test_a_shift_node_on_sit_shifts_the_time_and_nothing_else(path: str, name: str, arguments: tuple[Any, ...]) -> None:
    import comfy.samplers

    model = load_dit(path, "velocity")
    changed = shifted(model, name, *arguments)
    sigmas = comfy.samplers.calculate_sigmas(changed.get_model_object("model_sampling"), "simple", 4)
    times = Times(model)
    result = sample(changed, labels(1), cfg=1.0, scheduler="simple")
    assert times.seen == pytest.approx([1 - float(sigma) for sigma in sigmas[:-1]], abs=1e-5)
    times.handle.remove()
    same = sample(model, labels(1), cfg=1.0, sigmas=sigmas)
    torch.testing.assert_close(result, same, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(result, sample(model, labels(1), cfg=1.0, scheduler="simple"))


def test_sampling_that_the_network_was_not_trained_for_is_refused(path: str, model: Any) -> None:
    for wrong, message in (
        (shifted(model, "ModelSamplingSD3", 3.0), "predicts noise, so there is no shift"),
        (
            shifted(load_dit(path, "velocity"), "ModelSamplingDiscrete", "v_prediction", False),
            "predicts velocity.*remove that node",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sample(wrong, labels(1))
