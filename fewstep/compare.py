"""InstaFlow and the methods beside it: one teacher, one set of pairs, one student, one cost.

    python fewstep/compare.py                                   seeds 0, 1 and 2; hours on 2 cores
    python fewstep/compare.py --num-seeds 1 --rows lcm perflow  some rows; others are kept

Cost is counted where it is paid, in passes of a sample through the U-Net: 1 without gradients, 3
with, 2 with a forward derivative; a guided pass of the teacher is 2. Every row may spend --passes
on its training, and on pairs of its own flow. The teacher's pairs, which all share, come before
(16 passes each, in 8 guided steps), though mlcm and freeflow ask for prompts alone.

    2-RF                    reflow                               reflow.py
    2-RF + distill          half of the passes each, in L2       distill.py
    teacher + distill       without reflow
    perflow ... freeflow    fewstep/train.py

and to tell apart what a method is made of:

    velocity, picture loss              Rectified Diffusion's loss, of a network that predicts v
    noise prediction, squared           its form, with the squared error of pictures
    meanflow, fresh noise               Re-MeanFlow without the coupling of the pairs

The rate of every training falls over its last part, and starts at the same. Captions and noises
that figures are taken on are in none of the pairs. Writes compare.json (a row for each seed),
compare.md (means with 95 % intervals over seeds), compare.png (quality against steps) and
study-pictures-SEED.png.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.autograd.forward_ad as forward_mode
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "toy"))
sys.path.insert(2, str(Path(__file__).resolve().parent.parent / "experiments"))

import checkpoint
from command import pick_device, positive, run, write_text, write_whole
from distill import distill
from evaluate import evaluate
from evaluation.figures import GRADES, with_interval
from evaluation.plots import grouped, in_steps, markdown_table
from fewstep import meanflow, progressive, rectified_diffusion
from fewstep.train import (
    METHODS, Round, finished, guide, next_teacher, of_shorter_pairs, rounds_of, student_of,
    train_round,
)
from pairs import Pairs
from paper_table import Study, footer, open_table, save_pictures, study_of, study_parser, world_of
from rectified_flow import squared
from reflow import reflow
from stable_diffusion import StableDiffusion
from train_teacher import minutes_of
from training import TrainingOptions, autocast_dtype, generator_for
from unet import UNet, started_from

STEPS = [1, 2, 4, 8]
INSTAFLOW = ("2-RF", "2-RF + distill", "teacher + distill")
# Row -> the method that it is drawn by, what it needs, and its loss.
VARIANTS = {
    "velocity, picture loss": (
        "rectified-diffusion", replace(METHODS["rectified-diffusion"], kind="flow"),
        lambda v, target, teacher, *batch: rectified_diffusion.loss(v, *batch)),
    "noise prediction, squared": (
        "rectified-diffusion", METHODS["rectified-diffusion"],
        lambda v, target, teacher, *batch: rectified_diffusion.loss(v, *batch, distance=squared)),
    "meanflow, fresh noise": (
        "re-meanflow", replace(METHODS["re-meanflow"], data="pictures"),
        lambda v, target, teacher, *batch: meanflow.loss(v, target, *batch)),
}
ROWS = ("teacher", *INSTAFLOW, *METHODS, *VARIANTS)
FLOW_PAIRS, FLOW_STEPS = 4000, 4  # of 2-RF, for its distillation: they are paid for
TRIALS = 4  # batches on which the passes of a sample are counted


# --------------------------------------------------------------------------------------------------
# Counting


@contextmanager
def counted_passes() -> Iterator[list[int]]:
    """The passes of samples through any UNet meanwhile, [so many]."""
    passes, forward = [0], UNet.forward

    def counting(self, x, *inputs):
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        derives = forward_mode.unpack_dual(x).tangent is not None
        passes[0] += len(x) * (3 if learns else 2 if derives else 1)
        return forward(self, x, *inputs)

    UNet.forward = counting
    try:
        yield passes
    finally:
        UNet.forward = forward


def passes_of(training: Callable) -> float:
    """Passes of a sample. training(train=...): a training with this in place of training.train."""
    each = []

    def trial(network, draw, loss, options, *rest, **more):
        samples = torch.arange(options.batch_size)
        with counted_passes() as passes:
            for k in range(TRIALS):
                loss(network, *draw(samples, slice(None), generator_for(options.seed, k)))
        each.append(passes[0] / TRIALS / options.batch_size)

    training(train=trial)
    return each[0]


# --------------------------------------------------------------------------------------------------
# The rows


def kept_options(study: Study, passes: float, a_sample: float) -> TrainingOptions:
    """As many updates as the passes pay for."""
    return study.options(max(1, round(passes / a_sample / study.args.batch_size)))


def by_method(
    study: Study, row: str, teacher: StableDiffusion, dtype: torch.dtype,
) -> tuple[list[tuple[StableDiffusion, list[int]]], dict]:
    """(models and the numbers of steps that each is drawn in, costs) of a method or a variant."""
    method, needs, loss = VARIANTS.get(row, (row, METHODS.get(row), None))
    pairs, velocity = study.pairs_of(teacher), guide(teacher, teacher.guidance)
    folder = study.folder / row.replace(", ", "-").replace(" ", "-")

    def begun() -> StableDiffusion:
        start = checkpoint.load(teacher.path, study.device)
        init = "negated" if needs.kind == "flow" else "teacher"
        return student_of(start, method, needs, init, study.seed)

    def rounds(options: TrainingOptions, student: StableDiffusion) -> list[Round]:
        made = rounds_of(method, options, student, "random")
        if method == "re-meanflow" and loss is None:
            made[0].loss = of_shorter_pairs(pairs)
        return [replace(made[0], loss=loss)] if loss else made

    student, costs, teach = begun(), [], velocity
    for one in rounds(study.options(len(progressive.ROUNDS)), student):
        costs.append(passes_of(partial(
            train_round, student, teach, one, needs, pairs, folder, {}, dtype)))
        teach = next_teacher(method, student, velocity)
    options = kept_options(study, study.args.passes, sum(costs) / len(costs))

    student, teach, drawn = begun(), velocity, []
    stages = rounds(options, student)
    for one in stages:
        part = folder if len(stages) == 1 else folder / one.name.replace(" ", "-")
        train_round(student, teach, one, needs, pairs, part, {}, dtype)
        teach = next_teacher(method, student, teach)
        if method == "progressive":
            steps = progressive.ROUNDS[len(drawn)]
            drawn.append((saved(study, f"{row}-{steps}", student), [steps]))
    if not drawn:
        model = saved(study, folder.name, student)
        drawn = [(model, [steps for steps in STEPS if model.takes(steps)])]
    spent = sum(one.options.iterations * cost for one, cost in zip(stages, costs))
    minutes = sum(minutes_of(path.parent) for path in folder.rglob("metrics.jsonl"))
    return drawn, {"updates": options.iterations, "minutes": minutes,
                   "passes": round(spent * study.args.batch_size)}


def saved(study: Study, name: str, model: StableDiffusion) -> StableDiffusion:
    """The model from its file, to draw with."""
    path = study.folder / f"{name}.safetensors"
    checkpoint.save(finished(model), path, None)
    return study.load(path)


def by_instaflow(
    study: Study, row: str, teacher: StableDiffusion, dtype: torch.dtype,
) -> tuple[list[tuple[StableDiffusion, list[int]]], dict]:
    """The same for reflow and distillation."""
    batch, passes, spent = study.args.batch_size, study.args.passes, 0

    def begun(start: StableDiffusion) -> StableDiffusion:
        model = checkpoint.load(start.path, study.device)
        model.unet = started_from(model.unet, "negated", model.kind, study.seed)
        return model

    def trained(start: StableDiffusion, pairs: Pairs, passes: float, step: Callable, name: str):
        """The model, its updates and its passes."""
        whole = partial(step, folder=study.folder / name, settings={}, dtype=dtype)
        cost = passes_of(partial(whole, begun(start), pairs, options=study.options(1)))
        options, model = kept_options(study, passes, cost), begun(start)
        whole(model, pairs, options=options)
        return saved(study, name, model), options.iterations, cost * options.iterations * batch

    distilled = partial(distill, distance=squared, name="L2")
    folders = [row.replace(" ", "")]
    if row == "teacher + distill":
        pairs = study.pairs_of(teacher)
        model, updates, spent = trained(teacher, pairs, passes, distilled, folders[0])
    elif row == "2-RF":
        model, updates, spent = trained(teacher, study.pairs_of(teacher), passes, reflow, "2-RF")
    else:
        folders.append("2rf")
        flow, updates, spent = trained(teacher, study.pairs_of(teacher), passes / 2, reflow, "2rf")
        few = argparse.Namespace(
            **vars(study.args) | {"num_pairs": FLOW_PAIRS, "teacher_steps": FLOW_STEPS})
        pairs = replace(study, args=few).pairs_of(flow)
        spent += FLOW_PAIRS * FLOW_STEPS * (1 if flow.guidance == 1 else 2)
        model, more, cost = trained(flow, pairs, passes - spent, distilled, folders[0])
        updates, spent = updates + more, spent + cost
    minutes = sum(minutes_of(study.folder / name) for name in folders)
    steps = [steps for steps in STEPS if model.takes(steps)]
    return [(model, steps)], {"updates": updates, "minutes": minutes, "passes": round(spent)}


def measure_seed(study: Study) -> None:
    """Every row of one seed that the table lacks."""
    teacher = study.load(world_of(study.args.captions)[1])
    dtype = autocast_dtype(study.args.dtype, study.device, teacher.unet)
    key = {"row": "drawn", "seed": study.seed}
    if not any(key.items() <= each.items() for each in study.rows):
        study.rows.append(key | {"steps": None} | study.questions.real
                          | dict.fromkeys(("updates", "minutes", "passes")))
    for row in study.args.rows:
        key = {"row": row, "seed": study.seed}
        if any(key.items() <= each.items() for each in study.rows):
            continue
        if row == "teacher":
            drawn, about = [(teacher, STEPS)], {"updates": 0, "minutes": 0.0, "passes": 0}
        else:
            how = by_instaflow if row in INSTAFLOW else by_method
            drawn, about = how(study, row, teacher, dtype)
        measured = []
        for model, steps in drawn:
            for figures, _ in evaluate(model, [study.questions], steps, model.guidance):
                grades = {name: figures[name] for name in GRADES}
                measured.append(key | {"steps": figures["steps"]} | grades | about)
                if figures["steps"] in (1, 4):
                    label = f"{row}\n{in_steps(figures['steps'])}"
                    study.shown.append((label, model, figures["steps"]))
        study.rows.extend(measured)
        study.write()


# --------------------------------------------------------------------------------------------------
# What is written


def summary_of(rows: list[dict]) -> list[dict]:
    """One line for the rows that differ in their seed alone: means with 95 % intervals."""
    summary = []
    for (row, steps), group in grouped(rows, ("row", "steps")).items():
        line = {"row": row, "steps": steps}
        for name in GRADES:
            line[name], line[f"{name}_interval"] = with_interval([one[name] for one in group])
        line |= {name: with_interval([one[name] for one in group])[0]
                 for name in ("updates", "passes", "minutes")}
        summary.append(line | {"seeds": len(group)})
    order = ("drawn", *ROWS)
    return sorted(summary, key=lambda line: (order.index(line["row"]), line["steps"] or 0))


def save_curves(path: Path, summary: list[dict]) -> None:
    """Fréchet distance and captions right against steps, a line for each row."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    lines = grouped([line for line in summary if line["steps"]], ("row",))
    for axis, name in zip(axes, ("frechet", "caption_accuracy")):
        for k, ((row,), mine) in enumerate(lines.items()):
            # A little apart, so that the intervals of one number of steps do not cover each other.
            steps = [line["steps"] * 1.015 ** (k - len(lines) / 2) for line in mine]
            axis.errorbar(
                steps, [line[name] for line in mine],
                [line[f"{name}_interval"] or 0 for line in mine], capsize=2,
                label=row, color=f"C{k % 10}", marker="osv^DPX*"[k // 2 % 8],
                ls="-" if row not in VARIANTS else ":",
            )
        axis.set(xscale="log", xlabel="steps", title=name.replace("_", " "))
        axis.set_xticks(STEPS, STEPS)
        axis.minorticks_off()
    axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=110))


def main():
    parser = study_parser("The methods beside InstaFlow, at one cost.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="rows to measure")
    parser.add_argument("--passes", type=positive, default=300_000,
                        help="of samples through the U-Net, for each row")
    parser.set_defaults(out="runs/fewstep", captions="mixed")
    args = parser.parse_args()
    folder, device = Path(args.out), pick_device(args.device)
    rows, write = open_table(folder / "compare.json", args)
    for seed in range(args.seed, args.seed + args.num_seeds):
        study = study_of(seed, args, device, rows, write)
        measure_seed(study)
        if study.shown:
            save_pictures(folder / f"compare-pictures-{seed}.png", study)
    summary = summary_of(rows)
    table = markdown_table(summary) + footer(
        "python fewstep/compare.py", args, device, rows)
    write_text(folder / "compare.md", table)
    save_curves(folder / "compare.png", summary)
    print(table + f"{folder}: compare.json, compare.md, compare.png and pictures")


if __name__ == "__main__":
    run(main)
