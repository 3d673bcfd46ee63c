"""What app.py shows: the list of models, checked settings, images as files, paths as strips.

Nothing here depends on the page. Errors that the user can fix raise BadInput.
"""

import argparse
import functools
import os
import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
from command import HERE, BadInput, non_negative, solver_steps
from diffusion import as_flow
from formats.hub import name_of
from formats.images import decode_finite, enlarged, image_grid, save_image
from rectified_flow import broadcast_over, euler
from sample import check, noise_from_seeds, pixels, sample_images, sampler_of, user_seed
from stable_diffusion import FAMILIES, StableDiffusion

LARGEST = 4  # times the side of the images that a model was trained on
PROMPTS = {  # beside the data set's example
    "emoji": ["cat twitter", "penguin", "castle", "pear google", "elephant", "cactus", "rainbow"],
    "shapes": ["a red circle", "a white square right of a triangle", "a yellow triangle"],
}
MAKE = {  # commands, by kind
    "diffusion": "python app.py --model \\\n  {chosen} \\\n  TEACHER.safetensors",
    "flow": "python reflow.py \\\n  --teacher {teacher} \\\n  --pairs runs/{family}/pairs \\\n"
            "  --out runs/{family}/2rf.safetensors",
    "one-step": "python distill.py \\\n  --teacher {flow} \\\n"
                "  --pairs runs/{family}/pairs-2rf \\\n  --out runs/{family}/instaflow.safetensors",
}
STRIP_COLUMNS, STRIP_PIXELS = 13, 128


# --------------------------------------------------------------------------------------------------
# Models


def find_models(
    given: list[str], tokenizer: str | None = None,
) -> dict[str, StableDiffusion | None]:
    """Path -> the model without its weights; None: it cannot be read.

    given: paths, listed first, whose tokenizer this is. Then runs/ and the folders in it, then the
    tiny models of toy/.
    """
    found = []
    for folder, pattern in ((Path.cwd(), "runs/*"), (Path.cwd(), "runs/*/*"), (HERE, "toy/tiny_*")):
        files = folder.glob(f"{pattern}.safetensors")
        found += sorted(files, key=lambda path: (path.parent, path.stem))
    models = [str(path) for path in found if path.parent.suffix != ".state"
              and not path.stem.startswith(("shard-", "."))  # "." of a file that is being written
              and not path.stem.endswith("-reader")]
    return {path: outline(path, last_change(path), tokenizer if path in given else None)
            for path in [*given, *models]}


@functools.lru_cache(maxsize=1000)
def outline(path: str, changed: float, tokenizer: str | None) -> StableDiffusion | None:
    try:
        return checkpoint.load(path, "meta", tokenizer=tokenizer)
    except (BadInput, OSError):
        return None


@functools.lru_cache(maxsize=3)  # as many as "Compare" needs
def load(path: str, changed: float, device, dtype, tokenizer: str | None) -> StableDiffusion:
    """The model, kept in memory until the file changes or three others are loaded."""
    model = checkpoint.load(path, device, dtype, tokenizer=tokenizer)
    if model.is_tiny:
        sample_images(model, [""], [0], 1)  # the first forward pass is slower than the next
    return model


def last_change(path: str | Path) -> float:
    return os.path.getmtime(path) if os.path.exists(path) else 0


def short_name(path: str) -> str:
    return path.removeprefix(f"{os.getcwd()}{os.sep}").removeprefix(f"{HERE}{os.sep}")


def label(path: str, model: StableDiffusion | None) -> str:
    if model is None:
        return f"{short_name(path)} (not readable)"
    return f"{short_name(path)} ({model.family}, {'few-step' if model.few_step else model.kind})"


def model_to_compare(models: dict, chosen: str, kind: str) -> str | None:
    """Path of a model of this kind and of the chosen model's family; the chosen one if it is one.

    A few-step model counts as one-step, if chosen.
    """
    model = models[chosen]
    if kind == ("one-step" if model.few_step else model.kind):
        return chosen
    return next((path for path, other in models.items() if other and not other.few_step
                 and (other.family, other.kind) == (model.family, kind)), None)


def command_to_make(models: dict, chosen: str, kind: str) -> str:
    """The command that makes, or names, the model of this kind that "Compare" lacks."""
    teacher = model_to_compare(models, chosen, "diffusion") or "TEACHER.safetensors"
    family = models[chosen].family
    flow = model_to_compare(models, chosen, "flow") or f"runs/{family}/2rf.safetensors"
    return MAKE[kind].format(chosen=short_name(chosen), teacher=short_name(teacher),
                             flow=short_name(flow), family=family)


def known_prompts(family: str) -> list[str]:
    """Prompts that the models of this data set know."""
    return [FAMILIES[family].example, *PROMPTS.get(family, [])]


# --------------------------------------------------------------------------------------------------
# Settings


class Settings(NamedTuple):
    """Checked arguments of sampling."""

    seed: int
    steps: int
    guidance: float
    size: tuple[int, int]  # (height, width) in pixels


def read_settings(model: StableDiffusion, seed, steps, guidance, size) -> Settings:
    """Settings from the page's fields. BadInput: out of range, or not for this model."""
    parsers = {"seed": user_seed, "steps": solver_steps, "guidance": non_negative, "size": pixels}
    values = {}
    for (name, parse), value in zip(parsers.items(), (seed, steps, guidance, size)):
        try:
            values[name] = parse("" if value is None else str(value))
        except argparse.ArgumentTypeError as problem:
            raise BadInput(f"{name}: {problem}") from None
    side, largest = values["size"], LARGEST * model.image_side
    if side > largest:
        raise BadInput(f"size {side}: must be at most {largest}, {LARGEST} times the side of the "
                       "images that this model was trained on")
    check(argparse.Namespace(**values, model=short_name(model.path), negative_prompt=""), model)
    return Settings(values["seed"], values["steps"], model.guidance_for(values["guidance"]),
                    (side, side))


def evaluations(settings: Settings) -> int:
    """NFE, the number of function evaluations: a guided step is two."""
    return settings.steps * (1 if settings.guidance in (0, 1) else 2)


def prompt_remark(model: StableDiffusion, prompt: str) -> str:
    """What the user should know of this prompt; "" for most."""
    limit = model.text_encoder.config.max_position_embeddings
    tokens = len(model.get_tokenizer()(prompt)["input_ids"])
    if tokens > limit:
        return f"the prompt is cut: it has {tokens} tokens, this model reads {limit}"
    return "" if prompt.strip() else "an empty prompt: an unconditional image"


# --------------------------------------------------------------------------------------------------
# Images


def sample_files(
    model: StableDiffusion, prompt: str, settings: Settings, folder: str, count: int = 1,
) -> tuple[list[str], float]:
    """PNG files of `count` seeds, with how they were made as metadata, and the seconds it took."""
    seeds, started = range(settings.seed, settings.seed + count), time.perf_counter()
    images = sample_images(model, [prompt] * count, seeds, settings.steps, settings.guidance,
                           size=settings.size)
    seconds, files = time.perf_counter() - started, []
    name = re.sub(r"\W+", "-", prompt).strip("-")[:40] or "unconditional"
    for seed, image in zip(seeds, enlarged(images)):
        files.append(str(Path(tempfile.mkdtemp(dir=folder), f"{name}-seed-{seed}.png")))
        about = {"prompt": prompt, "negative_prompt": "", "seed": seed, "steps": settings.steps,
                 "guidance": settings.guidance, "solver": sampler_of(model, "dpm"),
                 "model": name_of(model.path), "kind": model.kind}
        save_image(files[-1], image_grid(image[None], 1), about)
    return files, seconds


@torch.inference_mode()
def path_strip(model: StableDiffusion, prompt: str, settings: Settings) -> np.ndarray:
    """The end-point estimate x_t + (1 - t) v of each Euler step, decoded: rows of images."""
    noise = noise_from_seeds([settings.seed], model.latent_shape(settings.size)).to(model.device)
    null, context = model.encode_prompts(["", prompt]).split(1)
    velocity, start, times = as_flow(
        model.unet, model.kind, noise, settings.steps, null, settings.guidance)
    states = torch.cat([*euler(velocity, start, settings.steps, context, times)])
    remaining = (1 - times[:-1]) / times.diff()  # in steps of this length
    ends = states[:-1] + broadcast_over(remaining, states) * states.diff(dim=0)
    images = enlarged(torch.cat([decode_finite(model, end[None], [prompt]) for end in ends]))
    if images.shape[2] > STRIP_PIXELS:
        images = F.interpolate(images, scale_factor=STRIP_PIXELS / images.shape[2], mode="area")
    return image_grid(images, STRIP_COLUMNS)
