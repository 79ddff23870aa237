"""Sample with diffusers, plainly and under ``daam``, in a process of its own for ``bench.maps``.

Runs in any Python that has diffusers and daam. A line of its input is a wish, ``plain`` or ``daam``; one run is made for
it, and the answer is a line of JSON: the bytes of the maps. The weights are random ones in SD1.5's shape.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import nullcontext
from typing import Any

import torch

from bench.models import DTYPES, SD15, TINY, TOKENS, Shape, Target, diffusers_unet, random_tensor, randomise

_KNOWN_SIDE = 64  # of the latent that daam assumes for every image of SD1.x


def build(shape: Shape, target: Target) -> Any:
    """Build a pipeline of a network and a scheduler alone."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    unet = diffusers_unet(shape).to(target.dtype).to_empty(device=target.device)
    with torch.no_grad():
        randomise(unet)
    unet.register_to_config(sample_size=_KNOWN_SIDE)
    pipe: Any = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tracer(pipe: Any, folder: str) -> Any:
    """Return daam's hooks on the cross-attentions. Those on the pipeline want a prompt in words and do not touch the maps."""
    from daam import trace

    made = trace(pipe, data_dir=folder)
    made.module = [hook for hook in made.module if hook.module is not pipe]
    return made


def run(pipe: Any, shape: Shape, size: int, steps: int, target: Target, made: Any = None) -> int:
    positive, negative = (target.put(random_tensor(seed, 1, TOKENS, shape.context)) for seed in (1, 2))
    latent = target.put(random_tensor(0, 1, 4, size // 8, size // 8))
    if made is not None:
        made.all_heat_maps.clear()
    with made or nullcontext():
        pipe(
            height=size, width=size, num_inference_steps=steps, guidance_scale=7.5, prompt_embeds=positive,
            negative_prompt_embeds=negative, latents=latent, output_type="latent",
        )  # fmt: skip
    if target.on_gpu:
        torch.cuda.synchronize()
    return 0 if made is None else sum(heat.numel() * heat.element_size() for _, heat in made.all_heat_maps)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape, target = TINY if args.tiny else SD15, Target(torch.device(args.device), getattr(torch, args.dtype))
    pipe = build(shape, target)
    with tempfile.TemporaryDirectory() as folder:
        made = tracer(pipe, folder)
        for wish in sys.stdin:
            found = run(pipe, shape, args.size, args.steps, target, made if wish.strip() == "daam" else None)
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
