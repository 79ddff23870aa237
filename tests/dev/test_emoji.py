"""The data of the emoji model: scenes come from their seed, masks show what is drawn, captions are as ComfyUI reads them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from emoji import atlas, captions, concepts, sets, sprites
from emoji.compose import Batch, Composer
from emoji.grounds import Grounds
from emoji.layout import HERE, layout
from emoji.scene import ITEMS, ground_counts

pytestmark = pytest.mark.newest

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer(CPU)


def composed(composer: Composer, seed: int, count: int, **options: Any) -> Batch:
    composer.chance.restart(seed)
    return composer(count, **options)


def test_scenes_come_from_their_seed_and_from_nothing_else(composer):
    first = composed(composer, 5, 4, masks=True)
    torch.manual_seed(1)  # what others draw does not matter
    composer(2, clutter=True)
    again, other = composed(composer, 5, 4, masks=True), composed(composer, 6, 4)
    assert torch.equal(first.images, again.images) and torch.equal(first.rows, again.rows)
    assert torch.equal(first.masks, again.masks) and torch.equal(first.colour, again.colour)
    assert not torch.equal(first.images, other.images) and not torch.equal(first.rows, other.rows)
    assert first.images.shape == (4, 3, layout.IMAGE, layout.IMAGE)
    assert 0 <= first.images.min() and first.images.max() <= 1


def test_masks_are_what_hides_the_ground(composer, monkeypatch):
    images = []
    for level in (0.0, 1.0):
        ground = torch.full((12, 3, layout.IMAGE, layout.IMAGE), level)
        monkeypatch.setattr(Grounds, "__call__", lambda self, counts, base, ground=ground: ground)
        batch = composed(composer, 3, 12, styles=False, masks=True)
        images.append(batch.images)
    clear = batch.scenes.shadow == 0
    assert 2 <= clear.sum() < 12
    shown = 1 - (images[1] - images[0])[clear].mean(1)
    assert torch.allclose(batch.masks[clear].sum(1), shown, atol=1e-4)
    assert (batch.masks.sum((2, 3)) > 0).equal(batch.scenes.active)


def test_masks_are_where_their_items_are(composer):
    batch = composed(composer, 4, 12, masks=True)
    axis = torch.arange(layout.IMAGE) + 0.5
    for mask, centre, size, count in zip(batch.masks, batch.scenes.centre, batch.scenes.size, batch.scenes.count, strict=True):
        for item in range(int(count)):
            weight = mask[item].sum()
            middle = torch.stack([(mask[item].sum(0) * axis).sum(), (mask[item].sum(1) * axis).sum()]) / weight
            assert (middle - centre[item]).abs().max() < size[item] / 3
            assert (mask[item] > 0.5).any(0).sum() <= size[item] * 1.3
    shown = batch.concept_masks(16)
    assert shown.shape == (12, len(concepts.CONCEPTS), 16, 16)
    assert ((shown.amax((2, 3)) > 0.2).float()).equal(batch.present)
    assert torch.allclose(shown.sum((1, 2, 3)), batch.masks.sum((1, 2, 3)) / 256, rtol=1e-3)


def test_cut_items_of_clutter_do_not_count(composer):
    batch = composed(composer, 2, 20, clutter=True, masks=True)
    cut = batch.scenes.active & ~batch.counted
    assert cut.any()
    assert (batch.present.sum(1) == batch.counted.sum(1)).all()
    assert batch.concept_masks(8).sum((1, 2, 3)).sum() < batch.masks.sum() / 1024


def test_shares_of_grounds_items_and_styles_are_those_of_the_table(composer):
    counts = ground_counts(200)
    assert sum(counts) == 200 and counts[4] == 12
    scenes = composer.sample(4000)
    assert (scenes.count == 2).float().mean().item() == pytest.approx(0.55, abs=0.03)
    for number, share in enumerate(concepts.STYLES.values()):
        assert (scenes.style == number).float().mean().item() == pytest.approx(share, abs=0.03)
    assert all(len(set(row.tolist())) == ITEMS for row in scenes.concept[:200])


def spoken(caption: str, words: list[str]) -> list[str]:
    return [word for word in caption.replace(",", " ").split() if word in words]


def test_captions_name_what_is_drawn(composer):
    composer.chance.restart(7)
    scenes = composer.sample(400)
    rows, colours = composer.captions(scenes), list(concepts.COLOURS)
    for number in range(len(rows)):
        caption = composer.vocabulary.text(rows[number])
        there = int(scenes.count[number])
        named = [concepts.CONCEPTS[concept] for concept in scenes.concept[number, :there]]
        assert spoken(caption, concepts.CONCEPTS) == named, caption
        before_ground = re.split(r" on a | in | at | by |, \w+ style", caption)[0]
        painted = [colours[scenes.colour[number, item]] for item in range(there) if scenes.named[number, item]]
        assert spoken(before_ground, colours) == painted, caption
    assert {row[0] for row in rows.tolist()} == {composer.vocabulary.start}
    empty = composer.captions(scenes, dropout=1.0)
    assert torch.equal(empty, composer.vocabulary([""]).expand(len(empty), -1))


def test_words_and_captions_are_what_the_hosts_tokenizer_reads(composer):
    from comfy import sd1_clip

    tokenizer, vocabulary = sd1_clip.SD1Tokenizer(), composer.vocabulary

    def host_ids(text: str) -> list[int]:
        return [pair[0] for pair in tokenizer.tokenize_with_weights(text)["l"][0]]

    assert list(vocabulary.words) == captions.WORDS
    for word, tokens in vocabulary.words.items():
        assert host_ids(word)[1 : 1 + len(tokens) + 1] == [*tokens, layout.END_TOKEN], word
    assert {word for word, tokens in vocabulary.words.items() if len(tokens) > 1} == {"checkered"}
    composer.chance.restart(9)
    rows = composer.captions(composer.sample(24))
    for row in rows:
        assert host_ids(vocabulary.text(row)) == [vocabulary.ids[number] for number in row]
    for kind in sets.SETS:
        text = sets.some(kind, 1)[0].text
        assert host_ids(text) == [vocabulary.ids[number] for number in vocabulary([text])[0]]


def test_unknown_words_are_refused_by_name(composer):
    with pytest.raises(ValueError, match="does not know the word 'zebra'"):
        composer.vocabulary(["a cat and a zebra"])


def test_every_concept_is_there_in_every_look(composer):
    assert composer.atlas.count.shape == (len(atlas.LOOKS), len(concepts.CONCEPTS))
    assert composer.atlas.count.min() >= 1
    assert composer.atlas.planes.dtype == torch.uint8


def test_artwork_is_named_with_its_licence_and_none_is_share_alike():
    about = json.loads((HERE / "sprites.json").read_text(encoding="utf-8"))
    assert about["sets"] == {name: f"{package}@{version}" for name, (package, version) in concepts.PACKAGES.items()}
    notice = (HERE / "NOTICE.md").read_text(encoding="utf-8")
    for package, version in concepts.PACKAGES.values():
        assert f"{package} {version}" in notice
    assert not any("SA" in licence for licence in concepts.LICENCES)
    assert {one["look"] for one in about["sprites"]} == set(concepts.PACKAGES)
    for text in ("Permission is hereby granted, free of charge", "LICENSE-APACHE.txt", "CC BY 4.0"):
        assert text in notice
    assert "Version 2.0, January 2004" in (HERE / "LICENSE-APACHE.txt").read_text(encoding="utf-8")
    assert (HERE / "sprites.xz").stat().st_size < 2_500_000


def test_atlas_can_be_packed_again(monkeypatch, tmp_path):
    planes, about = atlas.load_sprites()
    some = planes[:3].transpose(0, 2, 3, 1)
    (tmp_path / "sprites.xz").write_bytes(sprites.pack(some))
    (tmp_path / "sprites.json").write_text(json.dumps({"shape": [3, 4, 128, 128], "sprites": about[:3]}))
    monkeypatch.setattr(atlas, "HERE", tmp_path)
    assert (atlas.load_sprites()[0] == planes[:3]).all()


def test_packages_of_another_version_or_licence_are_refused(tmp_path):
    for package, version in concepts.PACKAGES.values():
        inside = tmp_path / "node_modules" / package
        inside.mkdir(parents=True)
        icons = {"icons": {"cat": {"body": '<path fill="currentColor"/>'}}, "aliases": {"kitten": {"parent": "cat"}}, "width": 32}
        (inside / "package.json").write_text(json.dumps({"version": version}))
        (inside / "info.json").write_text(json.dumps({"license": {"spdx": "MIT"}}))
        (inside / "icons.json").write_text(json.dumps(icons))
    icons = sprites.load_packages(tmp_path)["flat"]
    assert sprites.svg_of(icons, "kitten") == sprites.svg_of(icons, "cat")
    assert 'viewBox="0 0 32 16"' in sprites.svg_of(icons, "cat") and sprites.svg_of(icons, "dog") is None
    (inside / "info.json").write_text(json.dumps({"license": {"spdx": "CC-BY-SA-4.0"}}))
    with pytest.raises(SystemExit, match="CC-BY-SA-4.0"):
        sprites.load_packages(tmp_path)


def test_the_three_sets_have_every_pair_once():
    sizes = {kind: len(sets.pairs(kind)) for kind in sets.SETS}
    assert sizes == {"animal-animal": 66, "animal-object": 12 * 16, "object-object": 16 * 15 // 2}
    for kind in sets.SETS:
        whole = sets.pairs(kind)
        assert len({frozenset(concept for concept, _ in pair.subjects) for pair in whole}) == len(whole)
        assert sets.pairs(kind) == whole and set(sets.some(kind, None)) == set(whole)
    with pytest.raises(ValueError, match="no set 'fruit'"):
        sets.pairs("fruit")


def test_marked_prompts_are_the_same_prompts(pack):
    from fovea_attention.attention.prompts import parse_subjects

    pair = sets.Pair("animal-object", (("elephant", None), ("car", "orange")))
    assert (pair.text, pair.marked) == ("an elephant and an orange car", "an [elephant] and an orange [car]")
    for kind in sets.SETS:
        for pair in sets.some(kind, 5):
            plain, subjects = parse_subjects(pair.marked)
            assert plain == pair.text and len(subjects) == 2
