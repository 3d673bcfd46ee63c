"""Evaluation: how well models draw what captions say, at how many steps, and how straight their paths are.

    python evaluate.py                                  teacher, 2-RF and the one-step model, side by side
    python evaluate.py --model runs/2rf.safetensors --steps 1,4,25 --guidance 1

All models draw the same captions from the same noises. Writes beside each other

    evaluate.json     a row for each model and number of steps (a figure that does not apply is null)
    evaluate.md       the same as a table
    evaluate.png      the pictures, a row for each, and  evaluate-curves.png  the figures against steps

caption_accuracy   share of pictures that show everything their caption says, as the reader reads them
frechet            Fréchet distance between the reader's features of drawn and of generated pictures:
                   ‖m1 - m2‖² + tr(C1 + C2 - 2 (C1 C2)^½)   (Heusel et al. 2017, 1706.08500); the row "drawn" is
                   its floor, two sets of drawn pictures against each other
straightness       S of rectified_flow.py along the model's own path at 25 steps; relative: S / E‖Z1 - Z0‖²

Captions, drawn pictures and the reader come from a judge, a Python file such as toy/shapes.py. Models without one
(Stable Diffusion) get straightness, seconds and pictures.
"""

import importlib.util
import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import checkpoint
from command import (
    HERE,
    TINY_TEACHER,
    BadInput,
    Parser,
    add_machine_options,
    add_model_options,
    check_output,
    not_below_zero,
    pick_device,
    positive,
    run,
    write_text,
    write_whole,
)  # fmt: skip
from pairs import NUMBERS_PER_BATCH, built_in_prompts, default_guidance, draw_latents
from rectified_flow import as_flow, noise_from_seeds, straightness

TINY_JUDGE = str(HERE / "toy" / "shapes.py")
STRAIGHTNESS_STEPS = 25
PICTURED = 8  # captions in the comparison picture
GRADES = ("caption_accuracy", "frechet")
FIGURES = ("guidance", *GRADES, "straightness", "relative_straightness", "seconds_per_image")


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between normal distributions fitted to two sets of features (N, D) and (M, D)."""
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr (C1 C2)^½ is the sum of the roots of C1 C2's eigenvalues, which are those of C1^½ C2 C1^½, a symmetric matrix.
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * product).item()


def load_judge(path: str):
    """The judge: a module with random_captions(n, seed), drawn(captions, seed), load_reader() and
    right(reader, pictures, captions), whose reader has .features(pictures)."""
    if not Path(path).is_file():
        raise BadInput(f"--judge {path}: no such file; give a Python file such as toy/shapes.py")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    judge = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = judge  # dataclasses look their module up
    spec.loader.exec_module(judge)
    return judge


@torch.inference_mode()
def draw_pictures(model, prompts: list[str], seeds: list[int], steps: int, guidance: float, batch: int, bar) -> Tensor:
    """Pictures (N, 3, H, W), fp32 on the CPU."""
    null_context, pictures = model.encode_prompts([""]), []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        context = model.encode_prompts(prompts[part])
        latents = draw_latents(model, context, seeds[part], steps, guidance, "dpm", null_context)
        pictures.append(model.vae.decode(latents).float().cpu())
        bar.update(len(latents))
    return torch.cat(pictures)


@torch.inference_mode()
def measure_straightness(model, prompts: list[str], seeds: list[int], guidance: float):
    """S along the model's own path. A diffusion is looked at as a flow, on the part of [0, 1] that it covers."""
    x = noise_from_seeds(seeds, model.latent_shape()).to(model.device)
    context, null_context = model.encode_prompts(prompts), model.encode_prompts([""])
    velocity, start, times = as_flow(model.unet, model.kind, x, STRAIGHTNESS_STEPS, null_context, guidance)
    return straightness(velocity, start, STRAIGHTNESS_STEPS, context, times)


# ---------------------------------------------------------------------------------------------------------------
# What is written


def rounded(value) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown_table(rows: list[dict]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(rounded(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def label_of(row: dict) -> str:
    steps = "" if row["steps"] is None else f"\n{row['steps']} step{'s' * (row['steps'] > 1)}"
    return row["model"].replace(".safetensors", "") + steps


def save_comparison(path: str, rows: list[tuple[str, Tensor]], captions: list[str]) -> None:
    """A picture with a row for each (label, pictures) and a column for each caption."""
    figure = Figure(figsize=(1.25 * len(captions) + 1.2, 1.25 * len(rows) + 0.6))
    axes = figure.subplots(len(rows), len(captions), squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    for line, (label, pictures) in zip(axes, rows):
        for axis, picture in zip(line, pictures):
            axis.imshow(((picture.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for axis, caption in zip(axes[0], captions):
        axis.set_title(textwrap.fill(caption, 17), fontsize=7.5)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=150, bbox_inches="tight"))


def save_curves(path: str, rows: list[dict]) -> None:
    """Caption accuracy and Fréchet distance against the number of steps, a line for each model."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    drawn = next(row for row in rows if row["kind"] is None)
    markers = iter("osD^v<>P")
    for name in dict.fromkeys(row["model"] for row in rows if row["kind"]):
        mine = [row for row in rows if row["model"] == name]
        marker = next(markers, "o")
        for axis, figure_name in zip(axes, GRADES):
            axis.plot(
                [r["steps"] for r in mine],
                [r[figure_name] for r in mine],
                marker=marker,
                label=name.replace(".safetensors", ""),
            )
    for axis, figure_name in zip(axes, GRADES):
        axis.axhline(drawn[figure_name], color="gray", linestyle=":", label="drawn pictures")
        steps = sorted({row["steps"] for row in rows if row["steps"]})
        axis.set(xscale="log", xlabel="steps", ylabel=figure_name.replace("_", " "), xticks=steps, xticklabels=steps)
        axis.minorticks_off()
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=8)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=150))


# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Questions:
    """What every model is asked: prompts and seeds, and how its pictures are graded."""

    prompts: list[str]
    seeds: list[int]
    grade: Callable[[Tensor], dict]  # pictures -> {"caption_accuracy", "frechet"}
    drawn: list[Tensor]  # two sets of drawn pictures where a judge can draw; empty where none can


def questions_of(judge_path: str | None, count: int | None, seed: int) -> Questions:
    """A judge's captions, or built-in prompts and no grades where there is no judge."""
    if judge_path is None:
        count, source = count or 8, built_in_prompts()
        prompts = [source[k % len(source)] for k in range(count)]
        return Questions(prompts, list(range(seed, seed + count)), lambda pictures: dict.fromkeys(GRADES), [])
    count, judge = count or 1000, load_judge(judge_path)
    reader, captions = judge.load_reader(), judge.random_captions(count, seed)
    drawn = [judge.drawn(captions, seed), judge.drawn(captions, seed + 1)]
    with torch.no_grad():
        real = reader.features(drawn[0])

    @torch.no_grad()
    def grade(pictures: Tensor) -> dict:
        accuracy = sum(judge.right(reader, pictures, captions)) / count
        return {"caption_accuracy": accuracy, "frechet": frechet_distance(real, reader.features(pictures))}

    return Questions([str(caption) for caption in captions], list(range(seed, seed + count)), grade, drawn)


def evaluate(model, questions: Questions, steps: list[int], guidance: float) -> Iterator[tuple[dict, Tensor]]:
    """A row and its pictures for each number of steps; a one-step model takes one."""
    batch = max(1, NUMBERS_PER_BATCH // torch.Size(model.latent_shape()).numel())
    straight, count = None, len(questions.prompts)
    if model.kind != "one-step":
        straight = measure_straightness(model, questions.prompts[:batch], questions.seeds[:batch], guidance)
    for number in steps if model.kind != "one-step" else [1]:
        name = f"{Path(model.path).stem}, {number} step{'s' * (number > 1)}"
        started = time.perf_counter()
        with tqdm(total=count, desc=name, unit="picture", leave=False, dynamic_ncols=True) as bar:
            pictures = draw_pictures(model, questions.prompts, questions.seeds, number, guidance, batch, bar)
        seconds = (time.perf_counter() - started) / count
        yield row_of(
            Path(model.path).name, model.kind, number, questions, guidance=guidance, **questions.grade(pictures),
            straightness=straight and straight.value, relative_straightness=straight and straight.relative,
            seconds_per_image=seconds,
        ), pictures  # fmt: skip


def row_of(model: str, kind: str | None, steps: int | None, questions: Questions, **figures) -> dict:
    """A row of evaluate.json: every figure by name, null where it does not apply."""
    row = {"model": model, "kind": kind, "steps": steps} | dict.fromkeys(FIGURES) | figures
    return row | {"samples": len(questions.prompts), "seed": questions.seeds[0]}


def number_list(text: str) -> list[int]:
    """argparse type: whole numbers of at least 1, with commas."""
    return [positive(part) for part in text.split(",")]


def main():
    parser = Parser("Measure models and set them side by side.")
    parser.add_argument(
        "--model", nargs="+", default=[TINY_TEACHER, "runs/2rf.safetensors", "runs/instaflow.safetensors"],
        help="one or more checkpoints",
    )  # fmt: skip
    parser.add_argument("--steps", type=number_list, default="25,8,4,2,1", help="numbers of steps; a one-step model takes 1")
    parser.add_argument("--guidance", type=not_below_zero, help="for all; default: each kind's own, as for sample.py")
    parser.add_argument("--num-samples", type=positive, help="pictures for each row; default: 1000 with a judge, else 8")
    parser.add_argument("--judge", help="Python file that draws and reads captions; default: toy/shapes.py for the tiny model")
    parser.add_argument("--out", default="runs/evaluate.json", help="the rows; table and pictures land beside it")
    add_model_options(parser)
    add_machine_options(parser)
    args = parser.parse_args()

    missing = [path for path in args.model if not Path(path).exists()]
    if missing:
        raise BadInput(f"{missing[0]}: no such checkpoint; make it with reflow.py and distill.py, or name others with --model")
    check_output(args.out)
    device = pick_device(args.device)
    rows, pictures, questions = [], [], None
    for path in args.model:
        model = checkpoint.load_as_asked(path, args, device)
        if questions is None:  # the first model decides what all are asked
            judge = args.judge or (TINY_JUDGE if model.captions is not None else None)
            questions = questions_of(judge, args.num_samples, args.seed)
            if questions.drawn:
                rows.append(row_of("drawn", None, None, questions, **questions.grade(questions.drawn[1])))
                pictures.append(("drawn", questions.drawn[0][:PICTURED]))
        guidance = default_guidance(model) if args.guidance is None else args.guidance
        for row, drawn in evaluate(model, questions, args.steps, guidance):
            rows.append(row)
            pictures.append((label_of(row), drawn[:PICTURED]))

    stem = args.out.removesuffix(".json")
    write_text(f"{stem}.json", json.dumps(rows, indent=2) + "\n")
    write_text(f"{stem}.md", markdown_table(rows))
    save_comparison(f"{stem}.png", pictures, questions.prompts[:PICTURED])
    if questions.drawn:
        save_curves(f"{stem}-curves.png", rows)
    print(markdown_table(rows), end="")
    print(f"comparison picture: {stem}.png")


if __name__ == "__main__":
    run(main)
