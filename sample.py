"""Sampling: prompts and seeds to latents to images, with any checkpoint this project reads.

    python sample.py                      the one-step model of distill.py, or the shipped one
    python sample.py --prompt "a red circle above a blue square" --num-images 8
    python sample.py --model sd14.safetensors --prompt "a lighthouse" --steps 25 --guidance 6

    model = checkpoint.load("runs/instaflow.safetensors")                     or from Python:
    images = sample_images(model, ["a red circle"] * 4, seeds=range(4))    (4, 3, H, W) in [-1, 1]

The checkpoint's kind decides the solver: DPM-Solver++ for a diffusion, Euler steps for a flow, one
Euler step x1 = x0 + v(x0, 0) for a one-step model, and its own sampler for a few-step model.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
from additions import add_additions, apply_additions, identity
from command import (
    TINY_ONE_STEP, BadInput, Parser, add_machine_options, at_least, check_output, non_negative,
    note, pick_device, pick_dtype, positive, run, solver_steps,
)
from diffusion import NoiseSchedule, as_flow, dpm_solver
from editing import add_editing_options, edit, editing_flags, resolve_editing, starts_anywhere
from formats.hub import name_of
from formats.images import (
    check_grid_size, check_image_ending, decode_finite, enlarged, image_grid, save_each, save_image,
)
from formats.prompts import read_prompts
from rectified_flow import euler, guided, interpolate
from stable_diffusion import FAMILIES, KINDS

MAX_NUMBERS = 2**18  # of the latents of one batch: 16 latents at 512 px
MAX_LATENTS = 128  # of the tiny models; more are slower on a CPU
OWN_ONE_STEP = "runs/instaflow.safetensors"  # of distill.py


# --------------------------------------------------------------------------------------------------
# The one way to generate


@torch.inference_mode()
def sample_latents(
    model, prompts: Sequence[str] | Tensor, seeds: Sequence[int] | Tensor, steps: int | None = None,
    guidance: float | None = None, negative: str = "", solver: str = "dpm",
    size: tuple[int, int] | None = None, *, start: tuple[Tensor, float] | None = None,
    batch_size: int | None = None, bar: tqdm | None = None, decode: bool = False,
) -> Tensor:
    """Latents (N, 4, h, w), fp32, one for each prompt and seed. model: a StableDiffusion.

    None means the model's own. guidance: 1 is off. negative: the prompt that guidance leads away
    from. solver: "dpm" or "ddim", for a diffusion. size: (height, width) in pixels. Few-step models
    are sampled without guidance. bar: updated after each batch. decode: as `sample_images` does.
    For editing.py, prompts may also be contexts (N, L, D), and seeds noises (N, 4, h, w). start:
    (latents (N, 4, h, w), t) begins at X_t = (1 - t) X0 + t latents and spreads `steps` over
    [t, 1], so that t does not set the cost.
    """
    assert start is None or starts_anywhere(model)
    steps, guidance = steps or model.steps, model.guidance_for(guidance)
    shape, samples = model.latent_shape(size), []
    null_context = model.encode_prompts([negative])  # (1, L, D)
    sampler = sampler_of(model, solver)
    for part in batch_slices(len(prompts), batch_size or max_batch_size(shape)):
        noise = noise_from_seeds(seeds[part], shape).to(model.device)
        context = model.encode_prompts(prompts[part])
        begin = () if start is None else (start[0][part].to(noise), start[1])
        if sampler in ("renoise", "mean"):
            x1 = few_step_sample(model, noise, steps, context, seeds[part], *begin)
        elif sampler == "dpm":
            predict_noise = guided(model.unet, null_context, guidance)
            *_, x1 = dpm_solver(predict_noise, noise, steps, NoiseSchedule(), context, *begin)
        else:  # Euler; of a diffusion it is DDIM
            flow, x, times = as_flow(model.unet, model.kind, noise, steps, null_context, guidance,
                                     *begin)
            *_, x1 = euler(flow, x, steps, context, times)
        samples.append(decode_finite(model, x1, prompts[part]) if decode else x1)
        if bar is not None:
            bar.update(len(noise))
    return torch.cat(samples)


def sample_images(model, prompts, seeds, *how, **more) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1], fp32 on the CPU. Arguments as of `sample_latents`."""
    return sample_latents(model, prompts, seeds, *how, **more, decode=True)


def sampler_of(model, solver: str) -> str:
    """What samples: a few-step model's own, of a diffusion the solver, else "euler"."""
    if model.few_step:
        return model.few_step.sampler
    return solver if model.kind == "diffusion" else "euler"


def few_step_sample(
    model, noise: Tensor, steps: int, context: Tensor, seeds: Sequence[int], *begin,
) -> Tensor:
    """Noise to latents with a few-step model: "renoise" predicts the end and adds new noise;
    "mean" asks a network of two times for the step's mean velocity.
    """
    velocity, x, times = as_flow(model.unet, model.kind, noise, steps, context[:1], 1.0, *begin)
    renoise = model.few_step.sampler == "renoise"
    if renoise and steps > 1:  # the first noise of each seed is its start
        noises = noise_from_seeds(seeds, (steps, *noise.shape[1:])).to(noise.device)
    for k, (t, t_next) in enumerate(zip(times[:-1].tolist(), times[1:].tolist())):
        now, then = (torch.full((len(x),), time, device=x.device) for time in (t, t_next))
        if renoise:
            x = x + (1 - t) * velocity(x, now, context)
            if t_next < 1:
                x = interpolate(noises[:, k + 1], x, then)
        else:
            mean = model.unet(x, 1000 * (1 - now), context, 1000 * (1 - then)).to(x.dtype)
            x = x + (t_next - t) * mean
    return x


def batch_slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def max_batch_size(shape: tuple[int, ...], limit: int = MAX_LATENTS) -> int:
    """How many latents of this shape to sample in one batch."""
    return max(1, min(limit, MAX_NUMBERS // torch.Size(shape).numel()))


def check_no_guidance(model) -> None:
    """BadInput for a few-step model: its teacher's guidance is trained into it."""
    if model.few_step:
        raise BadInput(f"--guidance: {model.path} is a few-step model, trained with its teacher's "
                       "guidance; drop it")


# --------------------------------------------------------------------------------------------------
# Seeds and noise


def noise_from_seeds(seeds: Sequence[int] | Tensor, shape: tuple[int, ...]) -> Tensor:
    """X0 for integer seeds: (len(seeds), *shape), fp32, made on the CPU.

    One generator a sample: a seed gives the same noise on every device and at every batch size.
    Below 2**32 the noise is torch's for that seed, hence diffusers'. torch's generator reads the
    last 32 bits only; larger seeds go to numpy's RandomState, whose stream is frozen.
    """
    if isinstance(seeds, Tensor) and seeds.is_floating_point():  # noises already
        return seeds.flatten(1)[:, : torch.Size(shape).numel()].unflatten(1, shape)

    def noise(seed: int) -> Tensor:
        if seed < 2**32:
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        generator = np.random.RandomState([seed % 2**32, seed // 2**32])
        return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))

    return torch.stack([noise(int(seed)) for seed in seeds])


PURPOSES = {"reflow": 1, "distillation": 2, "validation": 3, "evaluation": 4, "second reflow": 5}
PURPOSE_SEEDS, RUN_SEEDS = 2**48, 2**24  # seeds of a purpose, and those of one --seed
# argparse types of --seed
run_seed = at_least(0, below=RUN_SEEDS)  # of training and evaluation
user_seed = at_least(0, below=PURPOSE_SEEDS - RUN_SEEDS)  # of sample.py and app.py


def seed_range(purpose: str, seed: int, count: int, start: int = 0) -> range:
    """Noise seeds `start` to `start + count` of this purpose and --seed; ranges never overlap.

    So no model is measured on noises of its training. Users' seeds lie below the first purpose.
    "second reflow": the pairs of 2-RF; for 4-RF give another --seed. BadInput: too many.
    """
    if seed >= RUN_SEEDS:
        raise BadInput(f"--seed {seed}: there are {RUN_SEEDS:,}; take a smaller one")
    if start + count > RUN_SEEDS:
        raise BadInput(f"{start + count:,} noises: one --seed has {RUN_SEEDS:,}; ask for fewer, or "
                       "give the rest another --seed")
    first = PURPOSES[purpose] * PURPOSE_SEEDS + seed * RUN_SEEDS + start
    return range(first, first + count)


# --------------------------------------------------------------------------------------------------
# The command


def arguments():
    parser = Parser("Generate images for prompts.")
    add = parser.add_argument
    add("--model", help=f"a checkpoint, or org/name on the hub; default: {OWN_ONE_STEP}, else the "
                        "shipped tiny model")
    add("--prompt", action="extend", nargs="+", default=[], help="one or several")
    add("--prompts", help="a file with a prompt a line, or .tsv, .csv, .json, .jsonl")
    add("--prompt-column", default="Prompt", help="column or key of the prompts in it")
    add("--num-images", type=positive, default=4, help="for each prompt, seeds SEED, SEED + 1, ...")
    add("--steps", type=solver_steps, help="default: 1, the few-step model's own, else 25")
    add("--guidance", type=non_negative, help="scale, 1 is off; default: the model's own")
    add("--solver", choices=["dpm", "ddim"], default="dpm", help="for a diffusion; flows use Euler")
    add("--negative-prompt", default="", help="what guidance leads away from")
    add("--height", type=pixels, help="pixels, a multiple of 8; default: the model's own")
    add("--width", type=pixels, help="pixels, a multiple of 8; default: the model's own")
    add("--batch-size", type=positive, default=4, help="images generated at once")
    add("--tokenizer", help="folder with vocab.json and merges.txt, for a model without its own")
    add("--kind", choices=KINDS, help="what the U-Net predicts; default: as the file says")
    add("--decoder", help="a small decoder in place of the model's, by small_decoder.py or TAESD")
    add("--compile", action="store_true", help="torch.compile: minutes at the start, then faster")
    add("--out", default="out.png", help="the grid of images; its metadata says how they are made. "
                                         "DIR/: a PNG for each image, continued if interrupted")
    add_additions(parser)
    add_editing_options(parser)
    add_machine_options(parser, user_seed)
    args = parser.parse_args()
    check_image_ending(args.out)
    return resolve_editing(args, parser.get_default("num_images"))


def pixels(text: str) -> int:
    """argparse type: a positive multiple of 8."""
    number = positive(text)
    if number % 8:
        near = max(8, round(number / 8) * 8)
        raise argparse.ArgumentTypeError(f"must be a multiple of 8, such as {near}, got {text!r}")
    return number


def check(args, model) -> None:
    """BadInput for flags that the model cannot honour."""
    if args.steps and not model.allows(args.steps):
        what = "a few-step model that was not trained for this number" if model.few_step else (
            "a one-step model, trained at t = 0 alone; more steps make its images worse")
        raise BadInput(f"--steps {args.steps}: {args.model} is {what}. Take --steps {model.steps}")
    if args.guidance not in (None, 1):
        check_no_guidance(model)
    if args.negative_prompt and model.guidance_for(args.guidance) == 1:
        raise BadInput("--negative-prompt: has no effect at guidance 1; give --guidance above 1")


def main():
    args = arguments()
    check_output(args.out + "0.png" * args.out.endswith("/"))
    if args.model is None:
        args.model = OWN_ONE_STEP if Path(OWN_ONE_STEP).exists() else TINY_ONE_STEP
        if args.model == TINY_ONE_STEP:
            note(f"no {OWN_ONE_STEP} yet, which `make demo` makes; using the shipped one-step "
                 "model of emoji (toy/emoji_captions.txt)")
    prompts = args.prompt + (read_prompts(args.prompts, args.prompt_column) if args.prompts else [])
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model = checkpoint.load(args.model, device, dtype, args.kind, args.tokenizer, args.decoder)
    check(args, model)
    size = args.height or model.image_side, args.width or model.image_side
    added = apply_additions(model, args, size)
    if args.compile:
        model.compile()
    if not prompts:
        prompts = [FAMILIES[model.family].example]
        note(f"no --prompt given; using {prompts[0]!r}")

    steps, guidance = args.steps or model.steps, model.guidance_for(args.guidance)
    texts = [prompt for prompt in prompts for _ in range(args.num_images)]
    seeds = [args.seed + k for _ in prompts for k in range(args.num_images)]
    check_grid_size(args.out, size, len(prompts), args.interpolate or args.num_images)
    count, started = args.interpolate or len(texts), time.perf_counter()
    how = {"steps": steps, "guidance": guidance, "negative": args.negative_prompt,
           "solver": args.solver, "size": size, "batch_size": args.batch_size}
    about = {"prompt": "\n".join(prompts), "negative_prompt": args.negative_prompt,
             "seed": args.seed, "steps": steps, "guidance": guidance,
             "solver": sampler_of(model, args.solver), "model": name_of(model.path),
             "kind": model.kind, **added, **editing_flags(args)}
    with tqdm(total=count, desc="images", unit="image", dynamic_ncols=True, leave=False) as bar:
        if args.out.endswith("/"):
            generate = partial(sample_images, model, **how, bar=bar)
            new = save_each(Path(args.out), texts, seeds, about, identity(model, args, size),
                            args.batch_size, generate)
            print(f"{args.out}: {count} images, {new} of them new")
            return
        if editing_flags(args):
            each = steps if model.few_step else 1  # X0, and the noises that renoising adds
            noise = noise_from_seeds([args.seed, args.seed + 1], (each, *model.latent_shape(size)))
            generate = partial(sample_latents, model, **how, bar=bar)
            images, columns = edit(args, model, texts, seeds, noise, generate)
        else:
            images, columns = sample_images(model, texts, seeds, **how, bar=bar), args.num_images
    seconds = (time.perf_counter() - started) / count

    save_image(args.out, image_grid(enlarged(images), columns), about)
    print(f"{args.out}: {count} images, {steps} step{'s' * (steps > 1)}, seed {args.seed}, "
          f"guidance {guidance:g}, {seconds:.3f} seconds each")


if __name__ == "__main__":
    run(main)
