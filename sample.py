"""Sampling: prompts and seeds to latents to pictures, with any checkpoint this project reads.

    python sample.py                                    the one-step model of distill.py, or the
                                                        one that lies in toy/
    python sample.py --prompt "a red circle above a blue square" --num-images 8
    python sample.py --model sd14.safetensors --prompt "a lighthouse" --steps 25 --guidance 6

    model = checkpoint.load("runs/instaflow.safetensors")                     or from Python:
    pictures = draw_pictures(model, ["a red circle"] * 4, seeds=range(4))   (4, 3, H, W) in [-1, 1]

The checkpoint says what its U-Net predicts, and that decides how it is drawn from: a diffusion by
DPM-Solver++, a flow by Euler steps, a one-step model by a single one, x1 = x0 + v(x0, 0), those
of fewstep/ by the way of their method. Pairs and evaluation draw through `draw_latents` too.
"""

import csv
import io
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

import checkpoint
from command import (
    TINY_ONE_STEP, BadInput, Parser, add_machine_options, at_least, check_output, not_below_zero,
    note, pick_device, pick_dtype, positive, run, solver_steps, write_whole,
)
from diffusion import NoiseSchedule, as_flow, dpm_solver
from rectified_flow import Velocity, euler, guided, interpolate, mean_velocity
from stable_diffusion import FAMILIES, KINDS, METHODS

NUMBERS_PER_BATCH = 2**18  # of latents that are drawn at once: 16 at 512 px
# At most, for the tiny model: with guidance 256 pass the U-Net, and more are slower on a CPU.
LATENTS_PER_BATCH = 128
OWN_ONE_STEP = "runs/instaflow.safetensors"  # of distill.py
GRID_SIDE = 128  # pixels that a picture takes up in the grid at least; smaller ones are enlarged


# --------------------------------------------------------------------------------------------------
# The one way to draw


@torch.inference_mode()
def draw_latents(
    model, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None,
    guidance: float | None = None, negative: str = "", solver: str = "dpm",
    size: tuple[int, int] | None = None, *, batch_size: int | None = None, bar: tqdm | None = None,
) -> Tensor:
    """Latents (N, 4, h, w), fp32, one for each prompt and the noise of its seed.

    model: a StableDiffusion of any kind. steps, guidance (1 is off) and size (height, width in
    pixels): None is the model's own. negative: the prompt that guidance leads away from. solver:
    "dpm" or "ddim", for a diffusion; the others take Euler steps. Models of fewstep/ are drawn by
    their method's way, without guidance. batch_size: how many at once; bar: told of each batch.
    """
    shape = model.latent_shape(size)
    null_context = model.encode_prompts([negative])  # (1, L, D)
    latents = []
    for part in parts(len(prompts), batch_size or drawn_at_once(shape)):
        noise = noise_from_seeds(seeds[part], shape).to(model.device)
        context = model.encode_prompts(prompts[part])
        if model.method:
            again = partial(noise_from_seeds, seeds[part])
            last = draw_in_few_steps(model, noise, steps or model.steps, context, again)
        else:
            *_, last = sample_path(model, noise, steps, context, null_context, guidance, solver)
        latents.append(last)
        if bar is not None:
            bar.update(len(noise))
    return torch.cat(latents)


@torch.inference_mode()
def draw_pictures(
    model, prompts, seeds, *how, batch_size: int | None = None, bar: tqdm | None = None, **more,
) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1], fp32 on the CPU. Arguments as those of `draw_latents`."""
    pictures = []
    at_once = batch_size or drawn_at_once(model.latent_shape(more.get("size")))
    for part in parts(len(prompts), at_once):
        latents = draw_latents(model, prompts[part], seeds[part], *how, batch_size=at_once, **more)
        pictures.append(model.vae.decode(latents).float().cpu())
        if bar is not None:
            bar.update(len(latents))
    return torch.cat(pictures)


def sample_path(
    model, noise: Tensor, steps: int | None, context: Tensor, null_context: Tensor,
    guidance: float | None = None, solver: str = "dpm",
) -> Iterator[Tensor]:
    """From noise to latents, yielding every state."""
    steps, guidance = steps or model.steps, model.guidance if guidance is None else guidance
    if model.kind == "diffusion" and solver == "dpm":
        predict_noise = guided(model.unet, null_context, guidance)
        return dpm_solver(predict_noise, noise, steps, NoiseSchedule(), context)
    velocity, x, times = as_flow(model.unet, model.kind, noise, steps, null_context, guidance)
    return euler(velocity, x, steps, context, times)  # of a diffusion this is DDIM


def draw_in_few_steps(
    model, noise: Tensor, steps: int, context: Tensor, noises: Callable,
) -> Tensor:
    """From noise to latents with a model of fewstep/, by its method's way.

    noises((steps, C, h, w)): new noise for each sample and step, (B, steps, C, h, w).
    """
    way = METHODS[model.method].way
    velocity, x, times = as_flow(model.unet, model.kind, noise, steps, context[:1])
    if way == "euler":
        *_, x = euler(velocity, x, steps, context, times)
        return x
    mean, again = mean_velocity(model.unet), None
    if way == "re-noise" and steps > 1:
        again = noises((steps, *noise.shape[1:])).to(noise.device)
    for k, (t, u) in enumerate(zip(times[:-1].tolist(), times[1:].tolist())):
        now, then = (torch.full((len(x),), time, device=x.device) for time in (t, u))
        if way == "mean":
            x = x + (u - t) * mean(x, now, then, context)
        else:
            x = x + (1 - t) * velocity(x, now, context)  # the end that it sees from here
            if u < 1:  # the first of a seed's noises is its start
                x = interpolate(again[:, k + 1], x, then)
    return x


def refuse_guidance(model) -> None:
    """BadInput where the model is of fewstep/: it is drawn as its teacher was guided."""
    if model.method:
        raise BadInput(f"--guidance: {model.path} was trained with its teacher's guidance "
                       f"({model.method}); leave it away")


def as_path(
    model, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float,
) -> tuple[Velocity, Tensor, Tensor, Tensor]:
    """The model as a flow on these prompts and noises: velocity, start, times and context."""
    noise = noise_from_seeds(seeds, model.latent_shape()).to(model.device)
    null_context = model.encode_prompts([""])
    velocity, start, times = as_flow(model.unet, model.kind, noise, steps, null_context, guidance)
    return velocity, start, times, model.encode_prompts(prompts)


def parts(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def drawn_at_once(shape: tuple[int, ...]) -> int:
    """How many latents of this shape to draw in one batch."""
    return max(1, min(LATENTS_PER_BATCH, NUMBERS_PER_BATCH // torch.Size(shape).numel()))


# --------------------------------------------------------------------------------------------------
# Seeds and their noise


def noise_from_seeds(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """X0 for integer seeds: (len(seeds), *shape), float32, made on the CPU.

    One generator a sample, so that a seed gives the same noise on every device and at every batch
    size. Below 2**32 it is the noise that torch, and so diffusers, gives for the seed. torch's
    generator looks at the last 32 bits alone; larger seeds are drawn by numpy's, whose stream is
    frozen.
    """

    def noise(seed: int) -> Tensor:
        if seed < 2**32:
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        generator = np.random.RandomState([seed % 2**32, seed // 2**32])
        return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))

    return torch.stack([noise(int(seed)) for seed in seeds])


WORLDS = {"reflow": 1, "distillation": 2, "validation": 3, "evaluation": 4, "second reflow": 5}
WORLD, RUN = 2**48, 2**24  # seeds in a world, and in what one --seed has of it
run_seed = at_least(0, below=RUN)  # argparse types: the --seed of a run,
noise_seed = at_least(0, below=WORLD - RUN)  # and that of a noise which a user asks for


def seeds_in(world: str, seed: int, count: int, start: int = 0) -> range:
    """Seeds of the noises `start` to `start + count` of this --seed: of no other world or --seed.

    A model is measured on noises that nothing was trained on, and a teacher is never sampled where
    it was trained; so pairs for reflow (from a diffusion; "second reflow" from a flow), pairs for
    distillation, validation and evaluation each have a world. Below the first world lie the seeds
    that users ask for. The pairs of every flow share "second reflow", so a fourth flow wants
    another --seed. BadInput: more noises than a --seed has.
    """
    if seed >= RUN:
        raise BadInput(f"--seed {seed}: there are {RUN:,}; take a smaller one")
    if start + count > RUN:
        raise BadInput(f"{start + count:,} noises: one --seed has {RUN:,}; ask for fewer, or give "
                       "the rest another --seed")
    first = WORLDS[world] * WORLD + seed * RUN + start
    return range(first, first + count)


# --------------------------------------------------------------------------------------------------
# Prompts


def read_prompts(path: str | Path, column: str = "Prompt") -> list[str]:
    """A prompt a line, or the named column of a .tsv or .csv with a header. Blanks are skipped."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not UTF-8 text; save it as UTF-8, a prompt a line") from None
    except OSError as problem:
        raise BadInput(
            f"{path}: cannot be read ({problem.strerror}); give a text file with a prompt a line"
        ) from None
    if path.suffix in (".tsv", ".csv"):
        lines = column_of(path, text, column)
    else:  # a line ends at a line feed alone: captions hold what else Python would split them at
        lines = text.split("\n")[: -1 if text.endswith("\n") else None]
    breaks = str.maketrans("\n\r", "  ")
    prompts = [line.translate(breaks).strip() for line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"{path}: holds no prompt; write one a line")
    if len(prompts) < len(lines):
        note(f"{path}: {len(lines) - len(prompts)} blank lines are skipped")
    return prompts


def column_of(path: Path, text: str, column: str) -> list[str]:
    """The fields of one column of a table with a header."""
    if path.suffix == ".tsv":  # a caption may well begin with a quote that is never closed
        rows = [[unquoted(field) for field in line.split("\t")]
                for line in text.split("\n") if line]
    else:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            rows = [row for row in reader if row]
        except csv.Error as problem:
            raise BadInput(f"{path}: not a .csv table up to line {reader.line_num} ({problem}); "
                           "mend its quotes") from None
    header = rows[0] if rows else []
    if column not in header:
        raise BadInput(
            f"{path}: has no column {column!r} but {header}; name one with --prompt-column"
        )
    number = header.index(column)
    return [row[number] if number < len(row) else "" for row in rows[1:]]


def unquoted(field: str) -> str:
    """A .tsv field without the quotes that some programs put around it."""
    inner = field[1:-1]
    whole = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else field


def prompts_of(model) -> list[str]:
    """The captions that the model was made for; of Stable Diffusion, which knows all, none."""
    captions = FAMILIES[model.family].captions
    return [] if captions is None else read_prompts(captions)


# --------------------------------------------------------------------------------------------------
# The command


def main():
    parser = Parser("Draw pictures for prompts.")
    add = parser.add_argument
    add("--model",
        help=f"an SD 1.x .safetensors, one of ours, or a folder; default: {OWN_ONE_STEP}, before "
             "there is one the tiny model that is shipped")
    add("--prompt", action="append", help="what to draw; may be repeated")
    add("--prompts", help="text file with a prompt a line, or .tsv/.csv")
    add("--prompt-column", default="Prompt", help="column of a .tsv or .csv that holds the prompts")
    add("--num-images", type=positive, default=4, help="for each prompt, seeds SEED, SEED + 1, ...")
    add("--steps", type=solver_steps,
        help="default: 1 for a one-step model, for those of fewstep/ their own, else 25")
    add("--guidance", type=not_below_zero,
        help="1 is off; default: 6 for SD, 1.5 for a flow, 1 for one step")
    add("--solver", choices=["dpm", "ddim"], default="dpm", help="for a diffusion; flows use Euler")
    add("--negative-prompt", default="", help="what guidance leads away from")
    add("--height", type=positive, help="pixels, a multiple of 8; default: the model's own")
    add("--width", type=positive, help="pixels, a multiple of 8; default: the model's own")
    add("--batch-size", type=positive, default=4, help="pictures drawn at once")
    add("--tokenizer", help="folder with vocab.json and merges.txt, for a model without its own")
    add("--kind", choices=KINDS, help="what the U-Net predicts; default: as the file says")
    add("--compile", action="store_true", help="torch.compile: minutes at first, faster after them")
    add("--out", default="out.png", help="the grid of pictures, how they were made in its metadata")
    add_machine_options(parser, noise_seed)
    args = parser.parse_args()

    for flag, pixels in (("--height", args.height), ("--width", args.width)):
        if pixels is not None and pixels % 8:
            near = max(8, round(pixels / 8) * 8)
            raise BadInput(f"{flag} {pixels}: must be a multiple of 8, such as {near}")
    check_output(args.out)
    if args.model is None:
        args.model = OWN_ONE_STEP if Path(OWN_ONE_STEP).exists() else TINY_ONE_STEP
        if args.model == TINY_ONE_STEP:
            note(f"no {OWN_ONE_STEP} yet, which `make demo` makes; drawing with the shipped "
                 "one-step model of emoji (toy/emoji_captions.txt)")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model = checkpoint.load(args.model, device, dtype, args.kind, args.tokenizer)
    if args.compile:
        model.compile()
    if args.steps and not model.takes(args.steps):
        what = f"a {model.method} model, which takes no such number" if model.method else (
            "a one-step model, trained at t = 0 alone; more steps make its pictures worse"
        )
        raise BadInput(f"--steps {args.steps}: {args.model} is {what}. Take --steps {model.steps}")
    if args.guidance not in (None, 1):
        refuse_guidance(model)
    guidance = model.guidance if args.guidance is None else args.guidance
    if args.negative_prompt and guidance == 1:
        raise BadInput("--negative-prompt: has no effect at guidance 1; give --guidance above 1")
    prompts = (args.prompt or []) + (
        read_prompts(args.prompts, args.prompt_column) if args.prompts else []
    )
    if not prompts:
        prompts = [FAMILIES[model.family].example]
        note(f"no --prompt given; drawing {prompts[0]!r}")

    size = None
    if args.height or args.width:
        size = tuple(
            (given or own * model.vae.config.downsampling)
            for given, own in zip((args.height, args.width), model.latent_shape()[1:])
        )
    count, steps = len(prompts) * args.num_images, args.steps or model.steps
    started = time.perf_counter()
    with tqdm(total=count, desc="pictures", unit="picture", dynamic_ncols=True, leave=False) as bar:
        pictures = draw_pictures(
            model, [prompt for prompt in prompts for _ in range(args.num_images)],
            [args.seed + k for _ in prompts for k in range(args.num_images)], steps, guidance,
            args.negative_prompt, args.solver, size, batch_size=args.batch_size, bar=bar,
        )
    seconds = (time.perf_counter() - started) / count

    info = PngInfo()
    for key, value in {
        "prompt": "\n".join(prompts), "negative_prompt": args.negative_prompt, "seed": args.seed,
        "steps": steps, "guidance": guidance, "model": Path(args.model).name, "kind": model.kind,
    }.items():
        info.add_text(key, str(value))
    sheet = to_pil_image(grid(pictures, args.num_images))
    write_whole(args.out, lambda path: sheet.save(path, pnginfo=info))
    print(f"{args.out}: {count} pictures, {steps} step{'s' * (steps > 1)}, seed {args.seed}, "
          f"guidance {guidance:g}, {seconds:.3f} seconds each")


def grid(pictures: Tensor, columns: int) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] as one uint8 (3, H', W'), with thin white lines between."""
    enlarge = -(-GRID_SIDE // pictures.shape[2])
    large = pictures.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    sheet = make_grid((large.clamp(-1, 1) + 1) / 2, columns, padding=2, pad_value=1.0)
    return (sheet * 255).round().byte()


if __name__ == "__main__":
    run(main)
