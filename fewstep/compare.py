"""InstaFlow and the methods beside it: one teacher, one set of pairs, one student, one cost.

    python fewstep/compare.py                                   seeds 0, 1 and 2; over 2 hours
    python fewstep/compare.py --num-seeds 1 --rows lcm perflow  some rows; others are kept
    python fewstep/compare.py --learning-rate 5e-3 --rows hipa --out runs/hipa    another study

Cost is counted where it is paid, on four batches, in passes of a sample through the U-Net: 1
without gradients, 3 with, 2 with a forward derivative; a guided pass of the teacher is 2. Every row
may spend --passes on its training, and on pairs of its own flow; hipa's decoder and LPIPS are not
counted. The teacher's pairs come before and are shared (16 passes each, in 8 guided steps), though
mlcm and freeflow do without.

    2-RF                    reflow, drawn as sample.py does,     reflow.py
                            guided, or else "unguided"
    2-RF + distill          a quarter goes into 2-RF's pairs,    distill.py, in L2
                            the rest half into each training
    teacher + distill       without reflow
    perflow ... freeflow    fewstep/train.py

and to tell apart what a method is made of:

    velocity, picture loss      Rectified Diffusion's loss, of a network that predicts v, from t = 0
    velocity, squared           the same with the squared error of pictures: 2-RF's times (1 - t)^2
    noise prediction, squared   Rectified Diffusion's form with that error
    re-meanflow, exact          with the derivative in place of the difference
    meanflow, fresh noise       Re-MeanFlow without the coupling of the pairs; none is left out

Every training's rate rises to the same over the same share of it, and falls over its last part.
Captions and noises that figures are taken on are in none of the pairs. Of progressive distillation
each number of steps is its own round's model, which has cost what was spent until then. Writes
compare.json (a row for each seed), compare.md (means with 95 % intervals over seeds), compare.png
(quality against the passes that a picture takes: guided steps count 2), compare-losses.png and
compare-pictures-SEED.png.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.autograd.forward_ad as forward_mode
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "toy"))
sys.path.insert(2, str(Path(__file__).resolve().parent.parent / "experiments"))

import checkpoint
from command import not_below_zero, pick_device, positive, run, write_text, write_whole
from distill import distill
from evaluate import evaluate
from evaluation.figures import GRADES, with_interval
from evaluation.plots import grouped, in_steps, markdown_table
from fewstep import meanflow, progressive, rectified_diffusion
from fewstep.train import (
    NEEDS, Needs, Prompts, Round, finished, guide, next_teacher, of_pictures, of_shorter_pairs,
    rounds_of, student_of, train_round,
)
from pairs import Pairs
from paper_table import Study, footer, open_table, save_pictures, study_of, study_parser, world_of
from rectified_flow import squared
from reflow import reflow
from stable_diffusion import StableDiffusion
from train_teacher import minutes_of
from training import TrainingOptions, autocast_dtype, generator_for, read_metrics, to_device
from unet import UNet, started_from

STEPS = [1, 2, 4, 8]
UNGUIDED = "2-RF, unguided"
INSTAFLOW = ("2-RF", UNGUIDED, "2-RF + distill", "teacher + distill")
# Row -> the method that it is drawn by, and what it needs.
VARIANTS = {
    "velocity, picture loss": ("rectified-diffusion", replace(
        NEEDS["rectified-diffusion"], kind="flow",
        loss=partial(rectified_diffusion.loss, times=lambda place: place))),
    "velocity, squared": ("rectified-diffusion", replace(
        NEEDS["rectified-diffusion"], kind="flow",
        loss=partial(rectified_diffusion.loss, distance=squared, times=lambda place: place))),
    "noise prediction, squared": ("rectified-diffusion", replace(
        NEEDS["rectified-diffusion"], loss=partial(rectified_diffusion.loss, distance=squared))),
    "re-meanflow, exact": ("re-meanflow", replace(
        NEEDS["re-meanflow"], loss=partial(meanflow.loss, derivative=meanflow.along_path))),
    "meanflow, fresh noise": ("re-meanflow", replace(NEEDS["re-meanflow"], data="pictures")),
}
ROWS = ("teacher", *INSTAFLOW, *NEEDS, *VARIANTS)
ORDER = ("drawn", *ROWS)
PANELS = {  # of the figure, by the rule that is learned; then what a method is made of
    "InstaFlow": INSTAFLOW,
    "regression": ("perflow", "rectified-diffusion", "hipa"),
    "compositional": ("progressive", "lcm", "mlcm", "scott"),
    "Eulerian; Lagrangian": ("re-meanflow", "freeflow"),
    "form and loss": (UNGUIDED, "velocity, picture loss", "velocity, squared",
                      "rectified-diffusion", "noise prediction, squared"),
    "of MeanFlow": ("re-meanflow", "re-meanflow, exact", "meanflow, fresh noise"),
}
FLOW_SHARE, PAIRS_SHARE = 3 / 8, 1 / 4  # of the passes, on 2-RF and its pairs for distillation
FLOW_STEPS = 4  # of those pairs
WARMUP = 0.06  # share of a training over which the rate rises: few updates are no handicap
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
        samples, device = torch.arange(options.batch_size), next(network.parameters()).device
        with counted_passes() as passes:
            for k in range(TRIALS):
                batch = draw(samples, slice(None), generator_for(options.seed, k))
                loss(network, *to_device(batch, device))
        each.append(passes[0] / TRIALS / options.batch_size)

    training(train=trial)
    return each[0]


# --------------------------------------------------------------------------------------------------
# The rows


@dataclass
class Made:
    """A model to draw with, and what was spent until it was there."""

    model: StableDiffusion
    updates: int
    passes: float
    minutes: float


def updates_for(study: Study, passes: float, a_sample: float) -> int:
    """As many as the passes pay for; one of each round at least."""
    return max(len(progressive.ROUNDS), round(passes / a_sample / study.args.batch_size))


def folder_of(row: str) -> str:
    return row.replace(" + ", "+").replace(", ", "-").replace(" ", "-")


def options_for(study: Study, iterations: int) -> TrainingOptions:
    """Those of paper_table.py, but for the warm-up."""
    warmup = round(WARMUP * iterations) * study.args.batch_size
    options = study.options(iterations, study.args.learning_rate)
    return replace(options, warmup_samples=warmup)


def by_method(study: Study, row: str, teacher: StableDiffusion, dtype: torch.dtype) -> list[Made]:
    """Of a method or a variant: its models, as many as it has rounds for steps of their own."""
    method, needs = VARIANTS.get(row) or (row, NEEDS[row])
    pairs, velocity = study.pairs_of(teacher), guide(teacher, teacher.guidance)
    folder = study.folder / folder_of(row)
    texts = [text for shard in pairs.prompts for text in shard]
    data = Prompts(texts) if needs.data == "prompts" else pairs

    def begun() -> tuple[StableDiffusion, Needs]:
        start = checkpoint.load(teacher.path, study.device)
        student = student_of(start, method, needs, seed=study.seed)
        if method == "hipa":
            return student, replace(needs, loss=of_pictures(student, "random"))
        if method == "re-meanflow" and needs.data == "pairs":
            return student, replace(needs, loss=of_shorter_pairs(needs.loss, pairs))
        return student, needs

    def rounds(iterations: int, needs: Needs) -> list[Round]:
        return rounds_of(method, options_for(study, iterations), needs)

    (student, own), costs, teach = begun(), [], velocity
    for one in rounds(len(progressive.ROUNDS), own):
        costs.append(passes_of(partial(train_round, student, teach, one, own, data, folder, {},
                                       dtype)))
        teach = next_teacher(student, velocity)
    iterations = updates_for(study, study.args.passes, sum(costs) / len(costs))

    (student, own), teach, made, spent, updates, minutes = begun(), velocity, [], 0.0, 0, 0.0
    stages = rounds(iterations, own)
    for one, cost in zip(stages, costs):
        train_round(student, teach, one, own, data, folder / one.part, {}, dtype)
        teach = next_teacher(student, teach)
        updates += one.options.iterations
        spent += one.options.iterations * cost * study.args.batch_size
        minutes += minutes_of(folder / one.part)
        if one.end or one is stages[-1]:
            model = saved(study, f"{folder.name}{one.end}", student)
            made.append(Made(model, updates, spent, minutes))
    return made


def saved(study: Study, name: str, model: StableDiffusion) -> StableDiffusion:
    """The model from its file, to draw with."""
    path = study.folder / f"{name}.safetensors"
    checkpoint.save(finished(model), path, None)
    return in_fp32(study, path)


def in_fp32(study: Study, path: str | Path) -> StableDiffusion:
    """To measure: a single step from t = 0.064 multiplies the rounding of a noise by 15."""
    return checkpoint.load(path, study.device)


def by_instaflow(
    study: Study, row: str, teacher: StableDiffusion, dtype: torch.dtype,
) -> list[Made]:
    """Of reflow and distillation."""
    batch, passes = study.args.batch_size, study.args.passes

    def begun(start: StableDiffusion) -> StableDiffusion:
        model = checkpoint.load(start.path, study.device)
        model.unet = started_from(model.unet, "negated", model.kind, study.seed)
        return model

    def trained(start: StableDiffusion, pairs: Pairs, passes: float, step: Callable, name: str):
        whole = partial(step, folder=study.folder / name, settings={}, dtype=dtype)
        cost = passes_of(partial(whole, begun(start), pairs, options=options_for(study, 1)))
        updates, model = updates_for(study, passes, cost), begun(start)
        whole(model, pairs, options=options_for(study, updates))
        spent = updates * cost * batch
        return Made(saved(study, name, model), updates, spent, minutes_of(study.folder / name))

    distilled, pairs = partial(distill, distance=squared, name="L2"), study.pairs_of(teacher)
    if row in ("2-RF", UNGUIDED):
        return [trained(teacher, pairs, passes, reflow, folder_of("2-RF"))]
    if row == "teacher + distill":
        return [trained(teacher, pairs, passes, distilled, folder_of(row))]
    flow = trained(teacher, pairs, passes * FLOW_SHARE, reflow, "2rf")
    a_pair = FLOW_STEPS * passes_of_a_step(flow.model.guidance)
    drawn = max(1, round(passes * PAIRS_SHARE / a_pair))
    few = vars(study.args) | {"num_pairs": drawn, "teacher_steps": FLOW_STEPS}
    own = replace(study, args=argparse.Namespace(**few)).pairs_of(study.load(flow.model.path))
    spent = flow.passes + drawn * a_pair
    end = trained(flow.model, own, passes - spent, distilled, folder_of(row))
    return [replace(end, updates=flow.updates + end.updates, passes=spent + end.passes,
                    minutes=flow.minutes + end.minutes)]


def passes_of_a_step(guidance: float) -> int:
    return 1 if guidance == 1 else 2


def measure_seed(study: Study) -> None:
    """Every row of one seed that the table lacks."""
    teacher = study.load(world_of(study.args.captions)[1])
    dtype = autocast_dtype(study.args.dtype, study.device, teacher.unet)
    key = {"row": "drawn", "seed": study.seed}
    if not any(key.items() <= each.items() for each in study.rows):
        study.rows.append(key | dict.fromkeys(("steps", "a_picture")) | study.questions.real
                          | dict.fromkeys(("updates", "minutes", "passes", "file")))
    for row in study.args.rows:
        key = {"row": row, "seed": study.seed}
        if any(key.items() <= each.items() for each in study.rows):
            continue
        if row == "teacher":
            every = [Made(in_fp32(study, teacher.path), 0, 0.0, 0.0)]
        else:
            every = (by_instaflow if row in INSTAFLOW else by_method)(study, row, teacher, dtype)
        measured = []
        for made in every:
            model = made.model
            guidance = 1.0 if row == UNGUIDED else model.guidance
            steps = [number for number in STEPS if model.takes(number)]
            for figures, _ in evaluate(model, [study.questions], steps, guidance):
                number = figures["steps"]
                measured.append(
                    key | {"steps": number, "a_picture": number * passes_of_a_step(guidance)}
                    | {name: figures[name] for name in GRADES}
                    | {"updates": made.updates, "minutes": made.minutes,
                       "passes": round(made.passes), "file": Path(model.path).name}
                )
        study.rows.extend(measured)
        study.write()
    for one in sorted(study.rows, key=lambda one: ORDER.index(one["row"])):
        if one["seed"] == study.seed and one["steps"] in (1, 4) and one["row"] != UNGUIDED:
            path = teacher.path if one["row"] == "teacher" else study.folder / one["file"]
            label = f"{one['row']}\n{in_steps(one['steps'])}"
            if Path(path).exists():
                study.shown.append((label, in_fp32(study, path), one["steps"]))


# --------------------------------------------------------------------------------------------------
# What is written


def summary_of(rows: list[dict]) -> list[dict]:
    """One line for the rows that differ in their seed alone: means with 95 % intervals."""
    summary = []
    for (row, steps), group in grouped(rows, ("row", "steps")).items():
        line = {"row": row, "steps": steps, "a_picture": group[0]["a_picture"]}
        for name in GRADES:
            line[name], line[f"{name}_interval"] = with_interval([one[name] for one in group])
        line |= {name: with_interval([one[name] for one in group])[0]
                 for name in ("updates", "passes", "minutes")}
        line["passes"] = None if line["passes"] is None else round(line["passes"])
        summary.append(line | {"seeds": len(group)})
    return sorted(summary, key=lambda line: (ORDER.index(line["row"]), line["steps"] or 0))


def save_curves(path: Path, rows: list[dict]) -> None:
    """Fréchet distance against the passes of a picture: a point for each seed, lines by means."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, len(PANELS) // 2, sharex=True, sharey=True)
    means = {(line["row"], line["steps"]): line["frechet"] for line in summary_of(rows)}
    lines = grouped(rows, ("row",))
    for axis, (title, shown) in zip(axes.flat, PANELS.items()):
        axis.axhline(means["drawn", None], color="0.8", lw=1, label="drawn")
        for k, row in enumerate(("teacher", *shown)):
            if not (mine := lines.get((row,))):
                continue
            look = {"color": "0.5" if row == "teacher" else f"C{k - 1}", "marker": "xosv^D"[k]}
            axis.scatter([one["a_picture"] for one in mine], [one["frechet"] for one in mine],
                         s=12, alpha=0.5, **look)
            passes = {one["a_picture"]: means[row, one["steps"]] for one in mine}
            axis.plot(*zip(*sorted(passes.items())), label=row, **look)
        axis.set(title=title, xscale="log", yscale="log")
        axis.set_xticks([*STEPS, 16], [*STEPS, 16])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.legend(fontsize=9, loc="upper right")
    figure.supxlabel("passes of the U-Net a picture")
    figure.supylabel("Fréchet distance")
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=110))


def save_losses(path: Path, seeds: range) -> None:
    """The loss against updates: a panel for each row trained, a line a seed, pieces for rounds."""
    lines = {}  # of each row: (updates, losses, color)
    for row in ROWS:
        parts = [""]
        if row in NEEDS:
            options = TrainingOptions(len(progressive.ROUNDS), 1)
            parts = [one.part for one in rounds_of(row, options, NEEDS[row])]
        for seed in seeds:
            done = 0
            for part in parts:
                logged = read_metrics(path.parent / f"seed-{seed}" / folder_of(row) / part)
                if logged:
                    updates = [done + one["step"] for one in logged]
                    losses = [one["loss"] for one in logged]
                    lines.setdefault(row, []).append((updates, losses, f"C{seed % 10}"))
                    done = updates[-1]
    if not lines:
        return
    columns = min(4, len(lines))
    height = math.ceil(len(lines) / columns)
    figure = Figure(figsize=(3.25 * columns, 2.7 * height), layout="constrained")
    for k, (row, pieces) in enumerate(lines.items()):
        axis = figure.add_subplot(height, columns, k + 1)
        for updates, losses, color in pieces:
            axis.plot(updates, losses, color=color, marker=".", lw=1, ms=3)
        axis.set(title=row, yscale="log")
    figure.supxlabel("updates")
    figure.supylabel("loss, each method's own")
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=90))


def main():
    parser = study_parser("The methods beside InstaFlow, at one cost.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="rows to measure")
    parser.add_argument("--passes", type=positive, default=80_000,
                        help="of samples through the U-Net, for each row")
    parser.add_argument("--learning-rate", type=not_below_zero, default=5e-4, help="of each row")
    parser.set_defaults(out="runs/fewstep", captions="mixed")
    args = parser.parse_args()
    folder, device = Path(args.out), pick_device(args.device)
    rows, write = open_table(folder / "compare.json", args)
    for seed in range(args.seed, args.seed + args.num_seeds):
        study = study_of(seed, args, device, rows, write)
        measure_seed(study)
        if study.shown:
            save_pictures(folder / f"compare-pictures-{seed}.png", study)
        table = markdown_table(summary_of(rows)) + footer("fewstep/compare.py", args, device, rows)
        write_text(folder / "compare.md", table)
        save_curves(folder / "compare.png", rows)
        save_losses(folder / "compare-losses.png", range(args.seed, seed + 1))
    print(table + f"{folder}: compare.json, compare.md and pictures")


if __name__ == "__main__":
    run(main)
