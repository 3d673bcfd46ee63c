"""How well do teacher, 2-RF and one-step model reconstruct an image from its inverted noise?

    python experiments/inversion.py        shapes, after reflow.py and distill.py with defaults
    python experiments/inversion.py --teacher toy/tiny_emoji.safetensors \\
        --flow runs/emoji/2rf.safetensors --one-step runs/emoji/instaflow.safetensors

Images of held-out captions are encoded, inverted (editing.py) and generated again, in as many
steps: real images, or the teacher's where none are on disk. The one-step model starts from 2-RF's
noise, and as a control from new noise. Writes inversion.json (95 % intervals over sets) and .png.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from command import (
    TINY_TEACHER, BadInput, Parser, add_machine_options, check_output, non_negative, pick_device,
    pick_dtype, positive, run, solver_steps, write_atomically, write_json,
)
from editing import encode_image, invert, psnr
from evaluation.figures import with_intervals
from evaluation.judge import check_same_dataset, load_judge
from evaluation.plots import COLOURS, grouped, markdown_table
from evaluation.study import check_one_process
from formats.images import decode_finite, image_grid
from rectified_flow import squared
from sample import run_seed, sample_images, sample_latents, seed_range
from stable_diffusion import FAMILIES
from training import seed_of

FIGURES = {"latents_rms": "RMS error of latents", "psnr": "PSNR in dB", "noise_std": "noise std"}
COLOUR_OF = dict(zip(("teacher", "2-RF", "one step, 2-RF's noise"), COLOURS.values()))
NUM_SHOWN = 8


@torch.inference_mode()
def measure_set(teacher, flow, one_step, judge, seeds: range, args) -> tuple[list, dict, list]:
    """A row for each model and number of steps, the first images of each row, and captions."""
    captions = judge.measuring_captions(len(seeds), seeds[0])
    prompts, images = list(map(str, captions)), judge.real_images(captions, seed_of(seeds[0], 0))
    images = sample_images(teacher, prompts, seeds) if images is None else images
    latents, rows, shown = encode_image(teacher, images), [], {"image": images[:NUM_SHOWN]}

    def add(model: str, steps: int | None, again, noise_std: float | None = None) -> None:
        decoded, error = decode_finite(teacher, again, prompts), squared(again, latents).sqrt()
        rows.append({"model": model, "steps": steps, "latents_rms": error.mean().item(),
                     "psnr": psnr(decoded, images).mean().item(), "noise_std": noise_std})
        if steps in (None, max(args.steps)):
            shown[model if steps is None else f"{model}\n{steps} steps"] = decoded[:NUM_SHOWN]

    add("autoencoder", None, latents)
    for steps in sorted(set(args.steps)):
        for name, model in (("teacher", teacher), ("2-RF", flow)):
            x0 = invert(model, latents, prompts, steps, args.guidance)
            again = sample_latents(model, prompts, x0, steps, args.guidance, solver="ddim")
            add(name, steps, again, x0.std().item())
        add("one step, 2-RF's noise", steps, sample_latents(one_step, prompts, x0, 1))
    add("one step, new noise", None, sample_latents(one_step, prompts, [*seeds[1:], seeds[0]], 1))
    return rows, shown, prompts[:NUM_SHOWN]


def save_figure(path: Path, rows: list[dict], shown: dict, prompts: list[str]) -> None:
    """Each figure against steps, and below the images of one set at the most steps."""
    figure = Figure(figsize=(13, 4 + 1.5 * len(shown)), layout="constrained")
    axes = figure.subplot_mosaic([[*FIGURES], ["strip"] * 3], height_ratios=[4, 1.5 * len(shown)])
    for name, title in FIGURES.items():
        for (model,), group in grouped(rows, ("model",)).items():
            x, y, bars = zip(*((r["steps"], r[name], r[f"{name}_interval"] or 0) for r in group))
            if model in COLOUR_OF and None not in y:
                axes[name].errorbar(x, y, bars, marker="o", color=COLOUR_OF[model], label=model)
            elif None not in y:
                dashes = ":" if model == "autoencoder" else "--"
                axes[name].axhline(y[0], color="gray", linestyle=dashes, label=model)
        axes[name].set(xscale="log", xlabel="steps in each direction", title=title)
        axes[name].legend(fontsize=7)
    strip, grid = axes["strip"], image_grid(torch.cat(list(shown.values())), len(prompts))
    strip.imshow(grid, interpolation="nearest", extent=(0, len(prompts), len(shown), 0))
    strip.set_xticks([k + 0.5 for k in range(len(prompts))], prompts, fontsize=6)
    strip.set_yticks([k + 0.5 for k in range(len(shown))], [*shown], fontsize=7)
    write_atomically(path, lambda file: figure.savefig(file, dpi=130, bbox_inches="tight"))


def main():
    parser = Parser("Round-trip error of inversion against steps, for teacher, 2-RF and one step.")
    add = parser.add_argument
    add("--teacher", default=TINY_TEACHER, help="a tiny model, whose captions have a judge")
    add("--flow", default="runs/2rf.safetensors", help="2-RF")
    add("--one-step", default="runs/instaflow.safetensors", help="distilled from 2-RF")
    add("--steps", type=solver_steps, nargs="+", default=[1, 2, 4, 8, 25], help="each way")
    add("--guidance", type=non_negative, default=1.0, help="of teacher and 2-RF; 1 is off")
    add("--num-samples", type=positive, default=100, help="images of a set")
    add("--num-sets", type=positive, default=3, help="each with captions of its own")
    add("--out", default="runs/inversion", help="folder")
    add_machine_options(parser, run_seed)
    args = parser.parse_args()
    check_one_process()
    path, paths = Path(args.out) / "inversion.json", [args.teacher, args.flow, args.one_step]
    check_output(path)
    check_same_dataset(paths)
    device = pick_device(args.device)
    models = [checkpoint.load(each, device, pick_dtype(args.dtype, device)) for each in paths]
    if not models[0].is_tiny:
        raise BadInput(f"{args.teacher}: has no captions with a judge; give tiny models")
    judge, rows, summary = load_judge(str(FAMILIES[models[0].family].judge)), [], []
    for k in range(args.num_sets):
        seeds = seed_range("evaluation", args.seed, args.num_samples, start=k * args.num_samples)
        measured, *example = measure_set(*models, judge, seeds, args)
        rows += measured
    for (model, steps), group in grouped(rows, ("model", "steps")).items():
        summary.append({"model": model, "steps": steps} | with_intervals(group, FIGURES))
    write_json(path, summary)
    save_figure(path.with_suffix(".png"), summary, *example)
    print(markdown_table(summary) + f"{path} and .png")


if __name__ == "__main__":
    run(main)
