"""The ``DiTLoader``, ``DiTClassLabel`` and ``DiTSampler`` nodes: class-conditional diffusion transformers."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..attention.dit import dit_sampler, load_dit
from ..attention.dit.blends import NULL
from ..attention.dit.labels import described_labels, label_conditioning, label_options, parse_labels
from ..attention.dit.model import AUTO, LATENT_FORMATS
from ..attention.dit.reading import is_dit_config
from ..attention.host import NodeText
from ._schema import advanced, node_schema

_FOLDERS = "diffusion_models", "checkpoints"
_PREDICTIONS = ["auto", "epsilon", "velocity"]
_CFG_CHANNELS = {"3 (as published)": 3, "4": 4}
_DEFAULT_LABEL = 207  # golden retriever, the paper's favourite


def _files() -> list[str]:
    """Return the names of the files in all folders, each once, and of DiTs in models/diffusers."""
    files = (name for folder in _FOLDERS for name in folder_paths.get_filename_list(folder))
    return list(dict.fromkeys([*files, *_diffusers_folders()]))


def _diffusers_folders() -> dict[str, str]:
    """Return the folders in models/diffusers that hold a DiT, by name."""
    return {
        f"{config.parents[1].relative_to(root).as_posix()}/": str(config.parents[1])
        for root in map(Path, folder_paths.get_folder_paths("diffusers"))
        for config in sorted(root.glob("*/transformer/config.json"))
        if is_dit_config(config)
    }


def _path(name: str) -> str:
    """Return the path of a file in the first folder that has it."""
    if name.endswith("/") and (folder := _diffusers_folders().get(name)):
        return folder
    found = (folder_paths.get_full_path(folder, name) for folder in _FOLDERS)
    return next(filter(None, found), None) or folder_paths.get_full_path_or_raise(_FOLDERS[0], name)


class DiTLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "DiTLoader",
            display_name="Load DiT",
            description=(
                "Loads a class-conditional DiT or SiT (Scalable Diffusion Models with Transformers), in the format of its "
                "authors, of their training script or of diffusers. It generates images of classes and takes no prompt."
            ),
            search_aliases=["dit", "sit", "diffusion transformer", "scalable diffusion", "imagenet", "class-conditional"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=_files(),
                    tooltip="A DiT file in models/diffusion_models or models/checkpoints, such as DiT-XL-2-256x256.pt. Code "
                    "inside a file is never run.",
                ),
                io.Combo.Input(
                    "prediction",
                    options=_PREDICTIONS,
                    default="auto",
                    tooltip="What the model predicts. DiT: epsilon, SiT: velocity; their weights look the same. auto reads it "
                    "from the training settings in the file or from a file name that starts with SiT, and otherwise uses "
                    "epsilon.",
                ),
                advanced(
                    io.Combo.Input(
                        "cfg_channels",
                        options=list(_CFG_CHANNELS),
                        default=next(iter(_CFG_CHANNELS)),
                        tooltip="How many of the 4 latent channels CFG is applied to. The published results use 3; with 4, as in "
                        "diffusers, the same cfg is slightly stronger. Models with other latents use all channels.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "latent_format",
                        options=list(LATENT_FORMATS),
                        default=AUTO,
                        optional=True,
                        tooltip="The VAE that the model was trained with, which sets the scale of its latents. auto: SD1.5 for 4 "
                        "channels, otherwise unscaled. Decode with the same VAE.",
                    )
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model. The latent sets the image size; 256 or 512 pixels, as trained, works best.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model_name: str,
        prediction: str = "auto",
        cfg_channels: str = "3 (as published)",
        latent_format: str = AUTO,
    ) -> io.NodeOutput:
        channels = _CFG_CHANNELS[cfg_channels]
        return io.NodeOutput(load_dit(_path(model_name), prediction, channels, latent_format, tell=NodeText().tell))


class DiTClassLabel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        options = label_options()
        return node_schema(
            "DiTClassLabel",
            display_name="DiT Class Label",
            description="Chooses what a DiT generates: one of ImageNet's 1000 classes, or one class for each image of the batch.",
            search_aliases=["imagenet", "class", "label", "dit prompt", "class-conditional"],
            inputs=[
                io.Combo.Input(
                    "label",
                    options=options,
                    default=options[_DEFAULT_LABEL],
                    tooltip="The class. Click and type to search the 1000 names and their synonyms.",
                ),
                io.String.Input(
                    "labels",
                    default="",
                    tooltip="Several classes, one for each image of the batch: numbers, names or WordNet ids separated by "
                    "commas, for example 207, tabby, n09472597. Overrides label. Set the same batch_size in the latent; a "
                    "shorter list repeats.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The class or classes, for the sampler's positive input."
                ),
                io.Conditioning.Output(
                    display_name="null class",
                    tooltip="The null class, which means no class, for the sampler's negative input. CFG needs it.",
                ),
            ],
        )

    @classmethod
    def execute(cls, label: str, labels: str = "") -> io.NodeOutput:
        chosen = parse_labels(labels)
        if chosen:
            NodeText().tell(f"DiT Class Label: 'labels' is used, not 'label': {described_labels(labels)}")
        else:
            NodeText().nothing()
            chosen = parse_labels(label.split(":")[0])
        return io.NodeOutput(label_conditioning(chosen), label_conditioning([NULL]))


class DiTSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "DiTSampler",
            display_name="DiT Sampler (ddpm)",
            description=(
                "The sampler of the DiT paper: DDPM with the variance that the model has learned. For SamplerCustom and "
                "SamplerCustomAdvanced, with a model from Load DiT. Published with 250 steps of the normal scheduler."
            ),
            search_aliases=["ddpm", "learned variance", "dit ddpm", "ancestral"],
            inputs=[],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="The sampler, for a custom sampler node.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(dit_sampler())
