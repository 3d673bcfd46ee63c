"""InstaFlow and the methods beside it: one teacher, one set of pairs, one student, one cost.

    python fewstep/compare.py                                   seeds 0, 1 and 2; over 2 hours
    python fewstep/compare.py --num-seeds 1 --rows lcm perflow  some rows; others are kept
    python fewstep/compare.py --learning-rate 5e-3 --rows hipa --out runs/hipa    another study

The cost is counted in passes of a sample through the U-Net: 1 without gradients, 3 with gradients,
2 with a forward derivative or with gradients of the input alone. A guided pass of the teacher is 2.
It is measured on a few training iterations of each row. A row may spend --passes on its training
and on pairs of its own flow; hipa's decoder and LPIPS are not counted. All rows share the teacher's
pairs, which come on top (16 passes each, in 8 guided steps); mlcm and freeflow do not use them.

    2-RF                    reflow.py, sampled as in sample.py: with guidance
    2-RF, unguided          the same model, without guidance
    2-RF + distill          a quarter goes into 2-RF's pairs, 3/8 into reflow, 3/8 into distill.py,
                            in L2
    teacher + distill       without reflow
    perflow ... freeflow    fewstep/train.py

and ablations of the methods:

    velocity, picture loss      Rectified Diffusion's loss on a network that predicts v, from t = 0
    velocity, squared           with the squared error of images: 2-RF's times (1 - t)^2
    noise prediction, squared   Rectified Diffusion with that error
    perflow, guided             with the published guidance: of the student, not of the teacher
    perflow, on path            windows that start on the teacher's path (FlowSteer)
    perflow, halving            8, 4, then 2 windows, and the angle in the loss (ProReflow)
    progressive, velocity       students that predict v, from t = 0
    hipa, convolutions          HiPA's LoRA on all convolutions and linear maps
    scott, no critic            SCott without its adversarial loss
    scott, no noise             also without its noise: η = 0, still three solver steps
    re-meanflow, difference     a difference for du/dt first, the exact derivative after
    meanflow, fresh noise       Re-MeanFlow on all pairs' images, with fresh noise

In every training the learning rate warms up to the same value over the same fraction, and decays
over the last part. Captions and noises of the measurements are in no pairs. For progressive
distillation, each number of steps is its own round's model, which has cost what all rounds so far
have spent. Writes compare.json (a row for each seed), compare.md (means with 95 % intervals over
seeds), compare.png (Fréchet distance against the passes of an image, where guided steps count 2),
compare-losses.png and compare-pictures-SEED.png.
"""

import argparse
import copy
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.autograd.forward_ad as forward_mode
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import distill
import reflow
from command import (
    non_negative, pick_device, positive, run, unlock_folder, write_atomically, write_text,
)
from evaluate import evaluate
from evaluation.figures import GRADES, minutes_of, with_interval
from evaluation.perceptual import perceptual_distance
from evaluation.plots import grouped, markdown_table, steps_label
from evaluation.study import (
    Study, add_pairs_option, add_table_options, footer, open_table, save_images, study_of,
    study_parser,
)
from fewstep import consistency, meanflow, perflow, progressive, rectified_diffusion
from fewstep.methods import METHODS, Part, halvings, rounds_of
from fewstep.train import Prompts, finished, loss_inputs, next_inputs, student_of
from fewstep.train import batch as method_batch
from fewstep.train import loss as method_loss
from pairs import Pairs
from rectified_flow import squared
from stable_diffusion import FewStep, StableDiffusion
from training import TrainingOptions, ema_copy, read_metrics, train
from unet import UNet

STEPS = [1, 2, 4, 8]
UNGUIDED = "2-RF, unguided"
INSTAFLOW = ("2-RF", UNGUIDED, "2-RF + distill", "teacher + distill")
VARIANTS = {
    "velocity, picture loss": replace(
        METHODS["rectified-diffusion"], kind="flow",
        loss=partial(rectified_diffusion.loss, times=lambda fraction: fraction)),
    "velocity, squared": replace(
        METHODS["rectified-diffusion"], kind="flow",
        loss=partial(rectified_diffusion.loss, distance=squared, times=lambda fraction: fraction)),
    "noise prediction, squared": replace(
        METHODS["rectified-diffusion"], loss=partial(rectified_diffusion.loss, distance=squared)),
    "perflow, guided": replace(METHODS["perflow"], guidance=1.0, dropout=perflow.DROPOUT),
    "perflow, on path": replace(
        METHODS["perflow"], data="prompts", loss=partial(perflow.loss, on_path=True)),
    "perflow, halving": replace(
        METHODS["perflow"], few_step=FewStep("euler", 4, tuple(range(2, 101, 2))),
        rounds=tuple(
            Part(f"{n}-windows", partial(perflow.loss, windows=n, cosine=perflow.COSINE_WEIGHT,
                                         **({} if n == 8 else {"steps": 2})), teaches=True)
            for n in (8, 4, 2))),
    "progressive, velocity": replace(
        METHODS["progressive"], kind="flow",
        rounds=halvings(partial(progressive.loss, times=lambda fraction: fraction))),
    "hipa, convolutions": replace(METHODS["hipa"], lora="everywhere"),
    "scott, no critic": replace(METHODS["scott"], critic=False),
    "scott, no noise": replace(
        METHODS["scott"], critic=False, loss=partial(consistency.scott, eta=0.0)),
    "re-meanflow, difference": replace(
        METHODS["re-meanflow"], rounds=(
            Part("difference", partial(meanflow.loss, derivative=meanflow.finite_difference)),
            Part("exact", meanflow.loss))),
    "meanflow, fresh noise": replace(METHODS["re-meanflow"], data="images"),
}
ROWS = ("teacher", *INSTAFLOW, *METHODS, *VARIANTS)
ORDER = ("drawn", *ROWS)
PANELS = {  # of the figure, by the kind of loss; the last two are ablations
    "InstaFlow": INSTAFLOW,
    "regression": ("perflow", "rectified-diffusion", "hipa"),
    "compositional": ("progressive", "lcm", "mlcm", "scott"),
    "Eulerian; Lagrangian": ("re-meanflow", "freeflow"),
    "form and loss": (UNGUIDED, "velocity, picture loss", "velocity, squared",
                      "rectified-diffusion", "noise prediction, squared"),
    "of MeanFlow": ("re-meanflow", "re-meanflow, difference", "meanflow, fresh noise"),
}
FLOW_SHARE, PAIRS_SHARE = 3 / 8, 1 / 4  # of the passes, for 2-RF and its pairs in distillation
FLOW_STEPS = 4  # of those pairs
WARMUP = 0.06  # fraction of a training; rows with few iterations are not at a disadvantage
TRIAL_ITERATIONS = 4  # to count the passes of a sample


# --------------------------------------------------------------------------------------------------
# Counting


@contextmanager
def counted_passes() -> Iterator[list[int]]:
    """Counts the passes of samples through any UNet, in a list of one number."""
    passes, body = [0], UNet.body

    def counting(self, x, *inputs):
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        leads_on = torch.is_grad_enabled() and x.requires_grad  # a gradient, through frozen weights
        derives = forward_mode.unpack_dual(x).tangent is not None
        passes[0] += len(x) * (3 if learns else 2 if derives or leads_on else 1)
        return body(self, x, *inputs)

    UNet.body = counting
    try:
        yield passes
    finally:
        UNet.body = body


def passes_of(
    network: nn.Module, batch: Callable, loss: Callable, options: TrainingOptions,
) -> float:
    """Passes of a sample in this training, measured on a copy of the network."""
    options = replace(options, iterations=TRIAL_ITERATIONS, save_every=TRIAL_ITERATIONS,
                      name="counting passes")
    network = copy.deepcopy(network)
    with tempfile.TemporaryDirectory() as folder, counted_passes() as passes:
        train(network, ema_copy(network), batch, loss, options, folder, {})
        unlock_folder(folder)
    return passes[0] / TRIAL_ITERATIONS / options.batch_size


# --------------------------------------------------------------------------------------------------
# The rows


@dataclass
class Trained:
    """A model to sample from, and what was spent on it."""

    model: StableDiffusion
    iterations: int
    passes: float
    minutes: float


def iterations_for(study: Study, passes: float, per_sample: float) -> int:
    """As many as the passes pay for, but at least one for each round."""
    return max(len(progressive.ROUNDS), round(passes / per_sample / study.args.batch_size))


def folder_of(row: str) -> str:
    return row.replace(" + ", "+").replace(", ", "-").replace(" ", "-")


def options_for(study: Study, network: nn.Module, iterations: int, name: str) -> TrainingOptions:
    """The study's, with a warm-up that depends on the length."""
    options = study.options(network, iterations, name, study.args.learning_rate)
    return replace(options, warmup_samples=round(WARMUP * iterations) * study.args.batch_size)


def by_method(study: Study, row: str, teacher: StableDiffusion) -> list[Trained]:
    """The models of a method or a variant: one for each round that has its own steps."""
    method = VARIANTS.get(row) or METHODS[row]
    pairs, name = study.pairs_of(teacher), folder_of(row)
    if method.data == "prompts":
        pairs = Prompts([prompt for shard in pairs.prompts for prompt in shard])
    student = study.new_student(teacher, method.init)
    student = student_of(student, method, method.init, study.seed)
    ema, unet, encode_prompts = ema_copy(student.unet), student.unet, student.encode_prompts
    lpips = perceptual_distance("random", study.device) if method.name == "hipa" else None
    first_inputs = loss_inputs(method, student, teacher, teacher.guidance, pairs, lpips)
    batch_of = lambda round_: partial(method_batch, round_, pairs, student.latent_shape())
    loss_of = lambda round_, inputs: partial(
        method_loss, round_.method, encode_prompts, ema, inputs
    )

    costs, inputs, per_sample, length = [], first_inputs, 0.0, 1000  # length: any long one
    for round_ in rounds_of(method, options_for(study, unet, length, name)):
        costs.append(passes_of(unet, batch_of(round_), loss_of(round_, inputs), round_.options))
        per_sample += costs[-1] * round_.options.iterations / length
        inputs = next_inputs(inputs, student, round_)
    iterations = iterations_for(study, study.args.passes, per_sample)

    trained, inputs, done, spent, minutes = [], first_inputs, 0, 0.0, 0.0
    rounds = rounds_of(method, options_for(study, unet, iterations, name))
    for round_, cost in zip(rounds, costs):
        student, folder = replace(student, few_step=round_.method.few_step), study.folder / name
        train(unet, ema, batch_of(round_), loss_of(round_, inputs), round_.options,
              folder / round_.folder, {"before": round_.before})
        inputs = next_inputs(inputs, student, round_)
        done += round_.options.iterations
        spent += round_.options.iterations * cost * study.args.batch_size
        minutes += minutes_of(folder / round_.folder)
        if round_.suffix or round_ is rounds[-1]:
            model = saved(study, f"{name}{round_.suffix}", student)
            trained.append(Trained(model, done, spent, minutes))
    return trained


def saved(study: Study, name: str, model: StableDiffusion) -> StableDiffusion:
    """The model from its file, to measure."""
    path = study.folder / f"{name}.safetensors"
    checkpoint.save(finished(model), path, None)
    return in_fp32(study, path)


def in_fp32(study: Study, path: str | Path) -> StableDiffusion:
    """A model to measure: a single step from t = 0.064 multiplies the noise's rounding by 15."""
    return checkpoint.load(path, study.device)


def trained_for(
    study: Study, passes: float, teacher: StableDiffusion, pairs: Pairs, kind: str, name: str,
) -> Trained:
    """What so many passes train on the pairs: by reflow a "flow", by distillation a "one-step"."""
    model = replace(study.new_student(teacher), kind=kind)
    unet, encode_prompts = model.unet, model.encode_prompts
    if kind == "flow":
        batch = partial(reflow.batch, pairs, study.seed)
        loss = partial(reflow.loss, encode_prompts, squared)
    else:
        batch = partial(distill.batch, pairs, study.seed, 0)
        loss = partial(distill.loss, encode_prompts, squared)
    cost = passes_of(unet, batch, loss, options_for(study, unet, 1, name))
    iterations = iterations_for(study, passes, cost)
    train(unet, ema_copy(unet), batch, loss, options_for(study, unet, iterations, name),
          study.folder / name, {})
    spent = iterations * cost * study.args.batch_size
    return Trained(saved(study, name, model), iterations, spent, minutes_of(study.folder / name))


def by_instaflow(study: Study, row: str, teacher: StableDiffusion) -> list[Trained]:
    """The model of a row that reflow or distillation makes."""
    passes, pairs = study.args.passes, study.pairs_of(teacher)
    if row in ("2-RF", UNGUIDED):
        return [trained_for(study, passes, teacher, pairs, "flow", folder_of("2-RF"))]
    if row == "teacher + distill":
        return [trained_for(study, passes, teacher, pairs, "one-step", folder_of(row))]
    flow = trained_for(study, passes * FLOW_SHARE, teacher, pairs, "flow", "2rf")
    per_pair = FLOW_STEPS * passes_of_a_step(flow.model.guidance)
    count = max(1, round(passes * PAIRS_SHARE / per_pair))
    args = vars(study.args) | {"num_pairs": count, "teacher_steps": FLOW_STEPS}
    few = replace(study, args=argparse.Namespace(**args))
    pairs = few.pairs_of(study.load(flow.model.path))
    spent = flow.passes + count * per_pair
    end = trained_for(study, passes - spent, flow.model, pairs, "one-step", folder_of(row))
    return [Trained(end.model, flow.iterations + end.iterations, spent + end.passes,
                    flow.minutes + end.minutes)]


def passes_of_a_step(guidance: float) -> int:
    return 1 if guidance == 1 else 2


def measure_seed(study: Study) -> None:
    """Measure every row of one seed that the table lacks."""
    teacher = study.load_teacher()
    key = {"row": "drawn", "seed": study.seed}
    if not study.rows_with(key):
        study.rows.append(key | dict.fromkeys(("steps", "a_picture"))
                          | study.evaluation_set.real_grades
                          | dict.fromkeys(("updates", "minutes", "passes", "file")))
    for row in study.args.rows:
        key = {"row": row, "seed": study.seed}
        if study.rows_with(key):
            continue
        if row == "teacher":
            models = [Trained(in_fp32(study, teacher.path), 0, 0.0, 0.0)]
        else:
            models = (by_instaflow if row in INSTAFLOW else by_method)(study, row, teacher)
        measured = []
        for trained in models:
            model = trained.model
            guidance = 1.0 if row == UNGUIDED else model.guidance
            steps = [number for number in STEPS if model.allows(number)]
            for figures, _ in evaluate(model, [study.evaluation_set], steps, guidance):
                number = figures["steps"]
                measured.append(
                    key | {"steps": number, "a_picture": number * passes_of_a_step(guidance)}
                    | {name: figures[name] for name in GRADES}
                    | {"updates": trained.iterations, "minutes": trained.minutes,
                       "passes": round(trained.passes), "file": Path(model.path).name}
                )
        study.rows.extend(measured)
        study.write()
    for row in sorted(study.rows, key=lambda row: ORDER.index(row["row"])):
        if row["seed"] == study.seed and row["steps"] in (1, 4) and row["row"] != UNGUIDED:
            path = teacher.path if row["row"] == "teacher" else study.folder / row["file"]
            label = f"{row['row']}\n{steps_label(row['steps'])}"
            if Path(path).exists():
                study.shown.append((label, in_fp32(study, path), row["steps"]))


# --------------------------------------------------------------------------------------------------
# What is written


def summary_of(rows: list[dict]) -> list[dict]:
    """A line for each row and number of steps: means with 95 % intervals over seeds."""
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
    """Fréchet distance against the passes of an image: points for seeds, lines through means."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, len(PANELS) // 2, sharex=True, sharey=True)
    means = {(line["row"], line["steps"]): line["frechet"] for line in summary_of(rows)}
    by_row = grouped(rows, ("row",))
    for axis, (title, shown) in zip(axes.flat, PANELS.items()):
        axis.axhline(means["drawn", None], color="0.8", lw=1, label="real images")
        for k, row in enumerate(("teacher", *shown)):
            points = by_row.get((row,), [])
            if not points:
                continue
            look = {"color": "0.5" if row == "teacher" else f"C{k - 1}", "marker": "xosv^D"[k]}
            axis.scatter([one["a_picture"] for one in points], [one["frechet"] for one in points],
                         s=12, alpha=0.5, **look)
            line = {one["a_picture"]: means[row, one["steps"]] for one in points}
            axis.plot(*zip(*sorted(line.items())), label=row, **look)
        axis.set(title=title, xscale="log", yscale="log")
        axis.set_xticks([*STEPS, 16], [*STEPS, 16])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.legend(fontsize=9, loc="upper right")
    figure.supxlabel("U-Net passes per image")
    figure.supylabel("Fréchet distance")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))


def save_losses(path: Path, seeds: range) -> None:
    """The loss against iterations: a panel for each trained row, a colour for each seed."""
    lines = {}  # row -> (iterations, losses, colour) of each round
    for row in ROWS:
        folders = [""]
        if row in METHODS:
            shortest = TrainingOptions(len(progressive.ROUNDS), 1)
            folders = [round_.folder for round_ in rounds_of(METHODS[row], shortest)]
        for seed in seeds:
            done = 0
            for folder in folders:
                logged = read_metrics(path.parent / f"seed-{seed}" / folder_of(row) / folder)
                if logged:
                    iterations = [done + one["step"] for one in logged]
                    losses = [one["loss"] for one in logged]
                    lines.setdefault(row, []).append((iterations, losses, f"C{seed % 10}"))
                    done = iterations[-1]
    if not lines:
        return
    columns = min(4, len(lines))
    height = math.ceil(len(lines) / columns)
    figure = Figure(figsize=(3.25 * columns, 2.7 * height), layout="constrained")
    for k, (row, pieces) in enumerate(lines.items()):
        axis = figure.add_subplot(height, columns, k + 1)
        for iterations, losses, color in pieces:
            axis.plot(iterations, losses, color=color, marker=".", lw=1, ms=3)
        axis.set(title=row, yscale="log")
    figure.supxlabel("iterations")
    figure.supylabel("each method's own loss")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=90))


def main():
    parser = study_parser("InstaFlow and the methods beside it, at one cost.", "mixed",
                          "runs/fewstep")
    add_table_options(parser)
    add_pairs_option(parser)
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=ROWS, help="rows to measure")
    add("--passes", type=positive, default=80_000,
        help="of samples through the U-Net, for each row")
    add("--learning-rate", type=non_negative, default=5e-4, help="of each row")
    args = parser.parse_args()
    folder, device = Path(args.out), pick_device(args.device)
    rows, write = open_table(folder / "compare.json", args)
    for seed in range(args.seed, args.seed + args.num_seeds):
        study = study_of(seed, args, device, rows, write)
        measure_seed(study)
        if study.shown:
            save_images(folder / f"compare-pictures-{seed}.png", study)
        table = markdown_table(summary_of(rows)) + footer("fewstep/compare.py", args, device, rows)
        write_text(folder / "compare.md", table)
        save_curves(folder / "compare.png", rows)
        save_losses(folder / "compare-losses.png", range(args.seed, seed + 1))
    print(table + f"{folder}: compare.json, compare.md and figures")


if __name__ == "__main__":
    run(main)
