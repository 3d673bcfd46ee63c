"""Sampling: prompts to pictures, with any checkpoint this project reads.

    python sample.py                                    the tiny one-step model
    python sample.py --model runs/instaflow.safetensors --prompt "a red circle above a blue square" --num-images 8
    python sample.py --model sd14.safetensors --prompt "a lighthouse in a storm" --steps 25 --guidance 6

The checkpoint says what its U-Net predicts, and that decides how it is sampled: a diffusion by DPM-Solver++, a flow
by Euler steps, a one-step model by a single one, x1 = x0 + v(x0, 0). Pictures go into one PNG, a row for each prompt.
"""

import time
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import checkpoint
from command import (
    BadInput,
    Parser,
    add_machine_options,
    add_model_options,
    check_output,
    noise_seed,
    not_below_zero,
    pick_device,
    positive,
    run,
    solver_steps,
    write_whole,
)  # fmt: skip
from pairs import default_guidance, draw_latents, prompts_for, read_prompts
from vae import to_bytes

GRID_SIDE = 128  # pixels that a picture takes up in the grid at least; smaller ones are enlarged


def check_steps(model, steps: int | None) -> int:
    """The number of steps to take; BadInput where a one-step model is asked for more."""
    if model.kind == "one-step" and steps not in (None, 1):
        raise BadInput(
            f"--steps {steps}: {model.path} is a one-step model, trained at t = 0 alone; more steps make its pictures "
            "worse. Take --steps 1, or a flow for more"
        )
    return steps or (1 if model.kind == "one-step" else 25)


def grid(images: Tensor, columns: int) -> Image.Image:
    """Pictures (B, H, W, 3) uint8, row by row, as one image with thin white lines between."""
    enlarge = -(-GRID_SIDE // images.shape[1])
    images = images.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
    count, height, width, _ = images.shape
    rows, gap = -(-count // columns), 2
    sheet = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    for k, image in enumerate(images):
        top, left = (k // columns) * (height + gap), (k % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet.numpy())


def main():
    parser = Parser("Draw pictures for prompts.")
    parser.add_argument(
        "--model", default="runs/instaflow.safetensors", help="an SD 1.x .safetensors, one of ours, or a folder"
    )
    parser.add_argument("--prompt", action="append", help="what to draw; may be repeated")
    parser.add_argument("--prompts", help="text file with a prompt a line, or .tsv/.csv")
    parser.add_argument("--prompt-column", default="Prompt", help="column of a .tsv or .csv that holds the prompts")
    parser.add_argument("--num-images", type=positive, default=4, help="for each prompt, with seeds SEED, SEED + 1, ...")
    parser.add_argument("--steps", type=solver_steps, help="network evaluations; default: 1 for a one-step model, else 25")
    parser.add_argument("--guidance", type=not_below_zero, help="1 is off; default: 6 for SD, 1.5 for a flow, 1 for one step")
    parser.add_argument("--solver", choices=["dpm", "ddim"], default="dpm", help="for a diffusion; flows use Euler")
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    parser.add_argument("--height", type=positive, help="pixels, a multiple of 8; default: the model's own")
    parser.add_argument("--width", type=positive, help="pixels, a multiple of 8; default: the model's own")
    parser.add_argument("--batch-size", type=positive, default=4, help="pictures drawn at once")
    parser.add_argument("--out", default="out.png", help="the grid of pictures, how they were made in its metadata")
    add_model_options(parser)
    add_machine_options(parser, seed=noise_seed)
    args = parser.parse_args()

    for flag, size in (("--height", args.height), ("--width", args.width)):
        if size is not None and size % 8:
            raise BadInput(f"{flag} {size}: must be a multiple of 8, such as {max(8, round(size / 8) * 8)}")
    check_output(args.out)
    device = pick_device(args.device)
    model = checkpoint.load_as_asked(args.model, args, device, args.kind)
    steps = check_steps(model, args.steps)
    guidance = default_guidance(model) if args.guidance is None else args.guidance
    if args.negative_prompt and guidance == 1:
        raise BadInput("--negative-prompt: has no effect at guidance 1; give --guidance above 1")
    prompts = (args.prompt or []) + (read_prompts(args.prompts, args.prompt_column) if args.prompts else [])
    prompts = prompts or prompts_for(model.captions, None)[0][:1]

    seconds = dict.fromkeys(("text", "U-Net", "decoder"), 0.0)

    def timed(part, work):
        started = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[part] += time.perf_counter() - started
        return result

    todo = [(prompt, args.seed + k) for prompt in prompts for k in range(args.num_images)]
    shape = model.latent_shape(args.height, args.width)
    images = []
    with torch.inference_mode():
        null_context = timed("text", lambda: model.encode_prompts([args.negative_prompt]))
        for start in range(0, len(todo), args.batch_size):
            texts, seeds = zip(*todo[start : start + args.batch_size])
            context = timed("text", lambda: model.encode_prompts(texts))
            latents = timed("U-Net", lambda: draw_latents(
                model, context, seeds, steps, guidance, args.solver, null_context, shape
            ))  # fmt: skip
            images.append(to_bytes(timed("decoder", lambda: model.vae.decode(latents))))

    info = PngInfo()
    for key, value in {
        "prompt": "\n".join(prompts), "negative_prompt": args.negative_prompt, "seed": args.seed, "steps": steps,
        "guidance": guidance, "model": Path(args.model).name, "kind": model.kind,
    }.items():  # fmt: skip
        info.add_text(key, str(value))
    sheet = grid(torch.cat(images), args.num_images)
    write_whole(args.out, lambda path: sheet.save(path, pnginfo=info))
    each = {part: value / len(todo) for part, value in seconds.items()}
    parts = ", ".join(f"{part} {value:.3f}" for part, value in each.items())
    print(f"{args.out}: {len(todo)} pictures, {steps} step{'s' * (steps > 1)}, seed {args.seed}, guidance {guidance:g}, "
          f"{sum(each.values()):.3f} seconds each ({parts})")  # fmt: skip


if __name__ == "__main__":
    run(main)
