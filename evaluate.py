"""Evaluation: models side by side, by caption accuracy, image quality, straightness and speed.

    python evaluate.py                      the teacher, 2-RF and the one-step model
    python evaluate.py --model runs/2rf.safetensors --steps 1,4,25 --guidance 1,1.5,2.5 --repeats 5

All models get the same captions and the same noises. Nothing was trained on either: noises have a
seed range of their own (sample.seed_range), and captions are in no list that pairs are made from.
(Only the shapes' teacher was trained on all captions.) Writes

    evaluate.json          a row for each model, guidance scale and number of steps
    evaluate.md            the same as a table
    evaluate.png           the images
    evaluate-curves.png    the metrics against the number of steps

caption_accuracy   fraction of images that show what their caption says, as a classifier reads them
frechet            Fréchet distance between the classifier's features of real and generated images;
                   the row "real" compares two sets of real images: about the lowest possible
precision, recall  fraction of generated images that fall among real ones, and of real images that
                   fall among generated ones; recall falls when a model loses variety
straightness       S of rectified_flow.py along the model's own path in 25 steps, if any of --steps
                   exceeds 1; relative: S / E‖Z1 - Z0‖²
fid, clip_score    against real images, with --coco or --images: evaluation/real_images.py

± is the 95 % confidence interval of a mean: over --repeats sets of captions and noises, for
straightness over samples. evaluate.json calls it <metric>_interval; null: does not apply.

Captions, real images and the classifier come from a judge (evaluation/judge.py). Stable Diffusion
has no judge: it gets straightness, seconds and images, and with real images the paper's metrics:

    python evaluate.py --model sd14.safetensors runs/instaflow.safetensors --coco coco --steps 25
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
from command import (
    TINY_TEACHER, BadInput, Parser, add_machine_options, check_output, non_negative, pick_device,
    pick_dtype, positive, run, solver_steps, write_json, write_text,
)
from evaluation.figures import GRADES, STRAIGHT, straightness_figures, with_intervals
from evaluation.judge import EvaluationSet, check_same_dataset, make_evaluation_set, mean_grades
from evaluation.plots import label_of, markdown_table, save_comparison, save_curves, steps_label
from evaluation.real_images import add_real_image_options, check_real_image_options, load_gallery
from formats.hub import is_hub_name, local_path, name_of
from sample import check_no_guidance, max_batch_size, run_seed, sample_images, seed_range
from stable_diffusion import FAMILIES, KINDS

STRAIGHTNESS_SAMPLES = 256  # at most; 16 at 512 px, since whole paths are kept in memory
NUM_SHOWN = 8  # captions in the comparison image
ON_REAL_IMAGES = ("fid", "clip_score")


# --------------------------------------------------------------------------------------------------
# One model


def load_models(args: argparse.Namespace, device: torch.device) -> Iterator[tuple]:
    """(model, guidance scale) for each of --model and --guidance."""
    for path, kind in zip(args.model, args.kind or ["auto"] * len(args.model)):
        kind = None if kind == "auto" else kind
        dtype = pick_dtype(args.dtype, device)
        model = checkpoint.load(path, device, dtype, kind, args.tokenizer, args.decoder)
        if args.compile:
            model.compile()
        if args.guidance:
            check_no_guidance(model)
        for guidance in map(model.guidance_for, args.guidance or [None]):
            yield model, guidance


def evaluate(
    model, sets: list[EvaluationSet], steps: list[int], guidance: float,
) -> Iterator[tuple[dict, Tensor]]:
    """A row, and the first images of the first set, for each number of steps that is allowed."""
    straight = straightness_of(model, sets[0].prompts, sets[0].seeds, steps, guidance)
    count = sum(len(each.prompts) for each in sets)
    for number in model.allowed_steps(steps):
        started, name = time.perf_counter(), f"{name_of(model.path)}, {steps_label(number)}"
        with tqdm(total=count, desc=name, unit="image", leave=False, dynamic_ncols=True) as bar:
            images = [sample_images(model, each.prompts, each.seeds, number, guidance, bar=bar)
                      for each in sets]
        seconds = (time.perf_counter() - started) / count
        metrics = mean_grades(sets, images) | straight | {"seconds_per_image": seconds}
        shown = images[0][:NUM_SHOWN].clone()  # a view would keep all images in memory
        yield row_of(model, number, guidance, metrics, sets), shown


def straightness_of(
    model, prompts: list[str], seeds: range, steps: list[int], guidance: float,
) -> dict:
    """Straightness metrics; {} for models that follow no velocity or are sampled in one step."""
    if not model.has_path or max(steps) == 1:
        return {}
    count = max_batch_size(model.latent_shape(), STRAIGHTNESS_SAMPLES)
    return straightness_figures(model, prompts[:count], seeds[:count], guidance)


def row_of(
    model, steps: int | None, guidance: float | None, metrics: dict, sets: list[EvaluationSet],
) -> dict:
    """A row of evaluate.json: None where a metric does not apply. Model "real": real images."""
    label, kind = (model, None) if model == "real" else (name_of(model.path), model.kind)
    row = {"model": label, "kind": kind, "steps": steps, "guidance": guidance}
    for name in (*GRADES, *ON_REAL_IMAGES, *STRAIGHT):
        row |= {name: metrics.get(name), f"{name}_interval": metrics.get(f"{name}_interval")}
    row |= {name: metrics.get(name) for name in ("straightness_profile", "seconds_per_image")}
    return row | {"samples": len(sets[0].prompts), "repeats": len(sets), "seed": sets[0].seed}


# --------------------------------------------------------------------------------------------------
# All models, by a judge or against real images: (rows, labelled images, captions of the images)


def evaluate_by_judge(args: argparse.Namespace, device: torch.device) -> tuple[list, list, list]:
    """All models on the captions of a judge; without --judge the first model's dataset has it."""
    rows, images, sets = [], [], []
    for model, guidance in load_models(args, device):
        if not sets:
            judge = args.judge or FAMILIES[model.family].judge
            sets = [make_evaluation_set(judge, args.num_samples, args.seed, repeat)
                    for repeat in range(args.repeats)]
            if sets[0].real_grades:
                grades = with_intervals([each.real_grades for each in sets])
                rows.append(row_of("real", None, None, grades, sets))
            if sets[0].real_images is not None:
                images.append(("real", sets[0].real_images[:NUM_SHOWN]))
        for row, generated in evaluate(model, sets, args.steps, guidance):
            rows.append(row)
            images.append((label_of(row, guidance=args.guidance is not None), generated))
    return rows, images, sets[0].prompts


def evaluate_on_real_images(
    args: argparse.Namespace, device: torch.device,
) -> tuple[list, list, list]:
    """All models on the captions that belong to real images; what is on disk is not made again."""
    rows, images, gallery = [], [], load_gallery(args, device)
    prompts, seeds = gallery.prompts, seed_range("evaluation", args.seed, len(gallery.prompts))
    sets = [EvaluationSet(prompts, seeds, args.seed)]
    for model, guidance in load_models(args, device):
        straight = straightness_of(model, prompts, seeds, args.steps, guidance)
        weights_hash = "".join(checkpoint.fingerprint(p) for p in (model.path, args.decoder) if p)
        for number in model.allowed_steps(args.steps):
            folder = gallery.generate(model, weights_hash, number, guidance, seeds)
            row = row_of(model, number, guidance, gallery.score(folder) | straight, sets)
            rows.append(row)
            images.append((label_of(row, guidance=args.guidance is not None),
                           gallery.first_images(folder, NUM_SHOWN)))
    return rows, images, prompts


# --------------------------------------------------------------------------------------------------
# The command


def list_of(number: Callable) -> Callable[[str], list]:
    """argparse type: numbers of this argparse type, separated by commas."""
    return lambda text: [number(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = Parser("Measure models and compare them side by side.")
    add = parser.add_argument
    ours = [TINY_TEACHER, "runs/2rf.safetensors", "runs/instaflow.safetensors"]
    add("--model", nargs="+", default=ours, help="one or more checkpoints, or org/name on the hub")
    add("--steps", type=list_of(solver_steps), default="25,8,4,2,1", help="one-step models take 1")
    add("--guidance", type=list_of(non_negative), help="e.g. 1,1.5,2.5; default: each model's own")
    add("--num-samples", type=positive, help="images a row; default: 1000 with a judge, else 8")
    add("--repeats", type=positive, default=1, help="sets of captions and noises, for intervals")
    add("--judge", help="Python file that makes captions and grades images; default: the model's")
    add("--tokenizer", help="folder with vocab.json and merges.txt, for models without their own")
    add("--kind", choices=["auto", *KINDS], nargs="+", help="of each --model; auto: as it says")
    add("--decoder", help="a small decoder in place of each model's, by small_decoder.py or TAESD")
    add("--compile", action="store_true",
        help="torch.compile: minutes a new size, which count in seconds_per_image; then faster")
    add("--out", default="runs/evaluate.json", help="the rows; table and images go beside it")
    add_real_image_options(parser)
    add_machine_options(parser, run_seed)
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """BadInput, before the work, for flags that do not fit each other, the models or the disk.

    Models of the hub are fetched here, and are paths in args.model from then on.
    """
    missing = [path for path in args.model if not (Path(path).exists() or is_hub_name(path))]
    if missing:
        raise BadInput(f"{missing[0]}: no such checkpoint; make it with reflow.py and distill.py, "
                       "or name others with --model")
    if args.kind and len(args.kind) != len(args.model):
        raise BadInput(f"--kind: {len(args.kind)} given for {len(args.model)} models; give one for "
                       "each, in order (auto: as its file says)")
    check_real_image_options(args)
    check_output(args.out)
    args.model = [str(local_path(path)) for path in args.model]
    names = [name_of(path) for path in args.model]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise BadInput(f"--model: two are named {twice}, so their rows would look alike; rename "
                       "one, or link to it by another name")
    if not (args.coco or args.images):
        check_same_dataset(args.model)


def main():
    args = arguments()
    check(args)
    device = pick_device(args.device)
    measure = evaluate_on_real_images if args.coco or args.images else evaluate_by_judge
    rows, images, captions = measure(args, device)
    if args.decoder:
        rows = [row | {"decoder": row["kind"] and Path(args.decoder).name} for row in rows]

    stem = args.out.removesuffix(".json")
    write_json(f"{stem}.json", rows)
    write_text(f"{stem}.md", markdown_table(rows))
    save_comparison(f"{stem}.png", images, captions[:NUM_SHOWN])
    save_curves(f"{stem}-curves.png", rows)
    print(markdown_table(rows), end="")
    print(f"comparison image: {stem}.png")


if __name__ == "__main__":
    run(main)
