"""InstaFlow and the methods beside it: one teacher, one set of pairs, one student, one cost.

    python fewstep/compare.py                                   3 seeds; hours, 14 GB; resumes
    python fewstep/compare.py --num-seeds 1 --rows lcm perflow  some rows; others are kept

A cost counts passes of a sample through the U-Net, measured on a few iterations of each training:

    1    without gradients
    2    with guidance; with a forward derivative; with gradients of the input alone
    3    with gradients; also through HiPA's frozen U-Net, whose decoder and LPIPS are not counted

A row may spend --passes on its training and on pairs of its own flow. Text encoders and SCott's
heads are not counted. All rows share the teacher's pairs, 16 passes each: 8 guided steps of
DPM-Solver++, which also samples the teacher's row. The column "with pairs" adds their cost to the
rows that need them. Teachers inside losses take DDIM's steps, as published. All teachers run in
fp32, because their prediction is divided by t, which is small near the noise.

    2-RF                    reflow.py, sampled as in sample.py: with guidance
    2-RF, unguided          the same model, without guidance
    2-RF + distill          a quarter goes into 2-RF's pairs, 3/8 into reflow, 3/8 into distill.py,
                            in L2
    teacher + distill       without reflow
    perflow ... freeflow    fewstep/train.py
    rectified-diffusion, guided     that row's model, sampled with the guidance of 2-RF

two rows without training, for LCM's sampler,

    exact consistency               the teacher's 48 steps to the end, in the student's place
    exact consistency, guidance 1   with a teacher without guidance

and ablations of the methods, which take the learning rate of their method (but for OWN_RATE):

    velocity, image loss      Rectified Diffusion's loss on a network that predicts v, from t = 0
    velocity, squared           with the squared error of images: 2-RF's times (1 - t)^2
    noise prediction, squared   Rectified Diffusion with that error
    perflow, guided             with the published guidance: of the student, not of the teacher
    perflow, on path            windows that start on the teacher's path (FlowSteer)
    perflow, halving            8, 4, then 2 windows, and the angle in the loss (ProReflow)
    progressive, velocity       students that predict v, from t = 0
    mlcm, edges alone           MLCM's second part, with all iterations and a rate of its own
    hipa, convolutions          HiPA's LoRA on all convolutions and linear maps
    scott, no critic            SCott without its adversarial loss
    scott, no noise             also without its noise: η = 0, still three solver steps
    re-meanflow, difference     a difference for du/dt first, the exact derivative after
    meanflow, fresh noise       Re-MeanFlow on all pairs' images, with fresh noise

Each row has the best of three learning rates (or one more, where the best lies at the edge), by the
Fréchet distance at the method's own number of steps on a seed that no result uses. In every
training the learning rate warms up over the same fraction and decays over the last part. The
captions and noises of the evaluation are held out from all pairs. For progressive distillation,
each number of steps is its own round's model, which has cost what all rounds so far have spent.

A row's rank counts the rows that are better at the same passes per image and at no higher cost. The
cost is of training alone, or with pairs; for progressive distillation it includes all rounds. Rows
share a rank unless the 95 % interval of their difference, seed by seed, excludes 0. Ablations have
no rank. After a change of a loss or of its options, delete its rows and its folders in
OUT/seed-*-rate-*: a run continues their states.

Writes compare.json (a row for each seed), compare.md (means with 95 % intervals over seeds),
compare.png (Fréchet distance against the passes of an image, where guided steps count 2),
compare-losses.png and compare-images-SEED.png.
"""

import argparse
import copy
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.autograd.forward_ad as forward_mode
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import distill
import reflow
from command import pick_device, positive, run, unlock_folder, write_atomically, write_text
from evaluate import evaluate
from evaluation.figures import GRADES, minutes_of, with_interval, with_intervals
from evaluation.perceptual import perceptual_distance
from evaluation.plots import grouped, markdown_table, steps_label
from evaluation.study import (
    TUNING_SEED, WARMUP, Study, add_pairs_option, add_table_options, best_rate, footer,
    one_seed_less, open_table, reported_seeds, save_images, study_of, study_parser,
)
from fewstep import consistency, meanflow, perflow, progressive, rectified_diffusion
from fewstep.methods import METHODS, Part, halvings, rounds_of
from fewstep.steps import SCHEDULE, euler_steps, guided_velocity, schedule_time
from fewstep.train import Prompts, finished, loss_inputs, next_inputs, student_of
from fewstep.train import batch as method_batch
from fewstep.train import loss as method_loss
from pairs import Pairs
from rectified_flow import broadcast_over, guided, squared
from stable_diffusion import FAMILIES, FewStep, StableDiffusion
from training import TrainingOptions, ema_copy, read_metrics, train
from unet import UNet

STEPS = [1, 2, 4, 8]
SAME_COST = 1.1  # costs that differ by less are equal: iterations are whole numbers
UNGUIDED = "2-RF, unguided"
SAME_MODEL = {UNGUIDED: "2-RF", "rectified-diffusion, guided": "rectified-diffusion"}
GUIDED = {"rectified-diffusion, guided": "flow", "perflow, guided": "diffusion"}  # as this kind
EXACT = {"exact consistency": None, "exact consistency, guidance 1": 1.0}  # None: the teacher's
INSTAFLOW = ("2-RF", UNGUIDED, "2-RF + distill", "teacher + distill")
VARIANTS = {
    "velocity, image loss": replace(
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
                                         steps=8 if n == 8 else 2), teaches=n > 2)
            for n in (8, 4, 2))),  # later teachers take one step in each of two old windows
    "progressive, velocity": replace(
        METHODS["progressive"], kind="flow",
        rounds=halvings(partial(progressive.loss, times=lambda fraction: fraction))),
    "mlcm, edges alone": replace(METHODS["mlcm"], rounds=(Part("edges", consistency.mlcm_edges),)),
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
OWN_RATE = ("mlcm, edges alone",)  # MLCM's rate is mostly of its other part
RANKED = ("teacher", *INSTAFLOW, *METHODS, "rectified-diffusion, guided")
ROWS = (*RANKED, *EXACT, *VARIANTS)
ORDER = ("real", *ROWS)
PANELS = {  # of the figure, by the kind of loss; the last four are ablations
    "InstaFlow": INSTAFLOW,
    "regression": ("perflow", "rectified-diffusion", "hipa", "hipa, convolutions"),
    "compositional": ("progressive", "lcm", "mlcm", "scott"),
    "Eulerian; Lagrangian": ("re-meanflow", "freeflow"),
    "form and loss": (UNGUIDED, "velocity, image loss", "velocity, squared",
                      "rectified-diffusion", "noise prediction, squared"),
    "of PeRFlow": ("perflow", "perflow, guided", "perflow, on path", "perflow, halving"),
    "of SCott and MLCM": ("scott", "scott, no critic", "scott, no noise", "mlcm",
                          "mlcm, edges alone"),
    "of MeanFlow, progressive": ("re-meanflow", "re-meanflow, difference", "meanflow, fresh noise",
                                 "progressive", "progressive, velocity"),
}
FLOW_SHARE, PAIRS_SHARE = 3 / 8, 1 / 4  # of the passes, for 2-RF and its pairs in distillation
FLOW_STEPS = 4  # of 2-RF, in those pairs and where its learning rate is chosen
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
    """As many as the passes pay for, but enough for each round of progressive distillation."""
    fewest = sum(part.share for part in METHODS["progressive"].rounds)
    return max(fewest, round(passes / per_sample / study.args.batch_size))


def folder_of(row: str) -> str:
    return row.replace(" + ", "+").replace(", ", "-").replace(" ", "-")


def options_for(study: Study, network: nn.Module, iterations: int, name: str) -> TrainingOptions:
    return study.options(network, iterations, name, study.args.learning_rate, WARMUP)


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
    """A model for use: a step from t = 0.064 multiplies the rounding of its noise by 15."""
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
    kind = "flow" if row == "2-RF" else "one-step"
    if row != "2-RF + distill":
        return [trained_for(study, passes, teacher, pairs, kind, folder_of(row))]
    flow = trained_for(study, passes * FLOW_SHARE, teacher, pairs, "flow", "2rf")
    per_pair = FLOW_STEPS * passes_of_a_step(flow.model.guidance)
    count = max(1, round(passes * PAIRS_SHARE / per_pair))
    args = vars(study.args) | {"num_pairs": count, "teacher_steps": FLOW_STEPS}
    few = replace(study, args=argparse.Namespace(**args))
    pairs = few.pairs_of(in_fp32(study, flow.model.path))
    spent = flow.passes + count * per_pair
    end = trained_for(study, passes - spent, flow.model, pairs, kind, folder_of(row))
    return [Trained(end.model, flow.iterations + end.iterations, spent + end.passes,
                    flow.minutes + end.minutes)]


def passes_of_a_step(guidance: float) -> int:
    return 1 if guidance == 1 else 2


class Guided(nn.Module):
    """A U-Net with guidance, in the U-Net's place: few-step models are sampled without."""

    def __init__(self, unet: UNet, null_context: Tensor, scale: float):
        super().__init__()
        self.unet, self.config = unet, unet.config
        self.forward = guided(unet, null_context, scale)


class ExactConsistency(nn.Module):
    """The teacher's fine walk to the data, in the U-Net's place.

    It returns the noise from which the data prediction is the end of the walk.
    """

    def __init__(self, teacher: StableDiffusion, guidance: float):
        super().__init__()
        self.unet, self.config = teacher.unet, teacher.unet.config
        self.velocity = guided_velocity(teacher, guidance)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        done = 1 - (timestep.cpu().double() + 1) / SCHEDULE.timesteps  # of the schedule
        alpha, sigma = SCHEDULE.alpha_sigma(timestep)
        x, t = x / broadcast_over(alpha + sigma, x), schedule_time(done)
        steps = (consistency.GRID * (1 - done)).round().clamp(min=1)
        end = euler_steps(self.velocity, x, done, torch.ones_like(done), steps, context)
        return x - broadcast_over(t / (1 - t), x) * (end - x)


def models_of(study: Study, row: str, teacher: StableDiffusion) -> list[Trained]:
    """What a row measures: one model, or one for each number of steps."""
    if row == "teacher":
        return [Trained(teacher, 0, 0.0, 0.0)]
    if row in EXACT:
        scale = teacher.guidance if EXACT[row] is None else EXACT[row]
        few_step = FewStep("renoise", 4, (1, 2, 4))
        exact = replace(teacher, unet=ExactConsistency(teacher, scale), few_step=few_step)
        return [Trained(exact, 0, 0.0, 0.0)]
    name = SAME_MODEL.get(row, row)
    trained = (by_instaflow if name in INSTAFLOW else by_method)(study, name, teacher)
    for each in trained if row in GUIDED else ():
        scale = FAMILIES[teacher.family].guidance[GUIDED[row]]
        each.model.unet = Guided(each.model.unet, each.model.encode_prompts([""]), scale)
    return trained


def pairs_cost(args: argparse.Namespace, row: str, guidance: float) -> int:
    """The passes of the pairs that a row needs. guidance: of their teacher."""
    method = VARIANTS.get(row) or METHODS.get(row)
    if row == "teacher" or row in EXACT or method and method.data == "prompts":
        return 0
    return args.num_pairs * args.teacher_steps * passes_of_a_step(guidance)


def measure_cell(study: Study, row: str, rate: float | None, steps: list[int]) -> None:
    """Train and measure one row of one seed at one learning rate, unless the table has it."""
    key = {"row": row, "seed": study.seed, "learning_rate": rate}
    if study.rows_with(key):
        return
    teacher = in_fp32(study, study.load_teacher().path)
    args = argparse.Namespace(**vars(study.args) | {"learning_rate": rate})
    folder = study.folder.with_name(f"{study.folder.name}-rate-{rate or 0:g}")  # beside the pairs
    measured, of_pairs = [], pairs_cost(args, row, teacher.guidance)
    for trained in models_of(replace(study, args=args, folder=folder), row, teacher):
        model, passes = trained.model, round(trained.passes)
        is_own = rate and row not in SAME_MODEL
        file = f"{folder.name}/{Path(model.path).name}" if is_own else None
        guidance = 1.0 if row == UNGUIDED else model.guidance
        per_step = None if row in EXACT else 2 if row in GUIDED else passes_of_a_step(guidance)
        for figures, _ in evaluate(model, [study.evaluation_set], steps, guidance):
            number = figures["steps"]
            measured.append(
                key | {"steps": number, "nfe": per_step and number * per_step}
                | {name: figures[name] for name in GRADES}
                | {"iterations": trained.iterations, "minutes": trained.minutes, "passes": passes,
                   "with_pairs": passes + of_pairs, "file": file}
            )
    study.rows.extend(measured)
    study.write()


def tuned_rate(study: Study, row: str) -> float:
    """The learning rate with the least Fréchet distance at the row's own steps."""
    method = VARIANTS.get(row) or METHODS.get(row)
    steps = method.few_step.steps if method else FLOW_STEPS if row == "2-RF" else 1

    def frechet(rate: float) -> float:
        measure_cell(study, row, rate, [steps])
        key = {"row": row, "seed": study.seed, "learning_rate": rate, "steps": steps}
        return study.rows_with(key)[0]["frechet"]

    return best_rate(frechet)


def measure_seed(study: Study, rate_of: Callable) -> None:
    """Measure every row of one seed that the table lacks. rate_of(row): its learning rate."""
    key = {"row": "real", "seed": study.seed, "learning_rate": None}
    if not study.rows_with(key):
        empty = ("iterations", "minutes", "passes", "with_pairs", "file")
        study.rows.append(key | dict.fromkeys(("steps", "nfe"))
                          | study.evaluation_set.real_grades | dict.fromkeys(empty))
    for row in study.args.rows:
        with one_seed_less(f"{row}, seed {study.seed}"):
            measure_cell(study, row, rate_of(row), STEPS)
    if "teacher" in study.args.rows:
        teacher = in_fp32(study, study.load_teacher().path)
        study.shown += [(f"teacher\n{steps_label(n)}", teacher, n) for n in (1, 4)]
    for row in sorted(study.rows, key=lambda row: ORDER.index(row["row"])):
        if row["seed"] == study.seed and row["steps"] in (1, 4) and row["file"] and (
                row["row"] not in GUIDED):
            path = Path(study.args.out, row["file"])
            label = f"{row['row']}\n{steps_label(row['steps'])}"
            if path.exists():
                study.shown.append((label, in_fp32(study, path), row["steps"]))


# --------------------------------------------------------------------------------------------------
# What is written


def is_better(one: dict[int, float], other: dict[int, float]) -> bool:
    """Is a distance lower, by more than the 95 % interval of the difference? Both by seed."""
    differences = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
    mean, width = with_interval(differences) if differences else (0.0, None)  # None: one seed
    return width is not None and mean < -width


def summary_of(rows: list[dict]) -> list[dict]:
    """A line for each row and number of steps: means with 95 % intervals over seeds, and ranks."""
    summary, by_seed = [], {}
    for (row, steps), group in grouped(rows, ("row", "steps")).items():
        line = {"row": row, "steps": steps, "nfe": group[0]["nfe"]}
        line |= with_intervals(group) | {name: with_interval([one[name] for one in group])[0]
                 for name in ("iterations", "passes", "with_pairs", "minutes")}
        for name in ("passes", "with_pairs"):
            line[name] = None if line[name] is None else round(line[name])
        summary.append(line | {"learning_rate": group[0]["learning_rate"], "seeds": len(group)})
        by_seed[row, steps] = {one["seed"]: one["frechet"] for one in group}
    ranked = [line for line in summary if line["row"] in RANKED]
    for line in summary:
        for name in ("passes", "with_pairs"):
            spent = max(one[name] for one in summary if one["row"] == line["row"])  # all rounds
            rivals = [one for one in ranked if one["nfe"] == line["nfe"]
                      and one[name] <= SAME_COST * spent] if line in ranked else []
            line[f"rank_by_{name}"] = 1 + sum(
                is_better(by_seed[one["row"], one["steps"]], by_seed[line["row"], line["steps"]])
                for one in rivals) if rivals else None
    return sorted(summary, key=lambda line: (ORDER.index(line["row"]), line["steps"] or 0))


def save_curves(path: Path, rows: list[dict]) -> None:
    """Fréchet distance against the passes of an image: points for seeds, lines through means."""
    figure = Figure(figsize=(17, 8), layout="constrained")
    axes = figure.subplots(2, len(PANELS) // 2, sharex=True, sharey=True)
    means = {(line["row"], line["steps"]): line["frechet"] for line in summary_of(rows)}
    by_row = grouped(rows, ("row",))
    for axis, (title, shown) in zip(axes.flat, PANELS.items()):
        axis.axhline(means["real", None], color="0.8", lw=1, label="real images")
        for k, row in enumerate(("teacher", *shown)):
            points = by_row.get((row,), [])
            if not points:
                continue
            look = {"color": "0.5" if row == "teacher" else f"C{k - 1}", "marker": "xosv^D"[k]}
            axis.scatter([one["nfe"] for one in points], [one["frechet"] for one in points],
                         s=12, alpha=0.5, **look)
            line = {one["nfe"]: means[row, one["steps"]] for one in points}
            axis.plot(*zip(*sorted(line.items())), label=row, **look)
        axis.set(title=title, xscale="log", yscale="log")
        axis.set_xticks([*STEPS, 16], [*STEPS, 16])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.legend(fontsize=9, loc="upper right")
    figure.supxlabel("U-Net passes per image")
    figure.supylabel("Fréchet distance")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))


def save_losses(path: Path, rows: list[dict]) -> None:
    """The loss against iterations: a panel for each trained row, a colour for each seed."""
    lines = {}  # row -> (iterations, losses, colour) of each round
    for (row, seed), (first, *_) in grouped(rows, ("row", "seed")).items():
        if not first["file"]:
            continue
        method, done = VARIANTS.get(row) or METHODS.get(row), 0
        for part in method and method.rounds or (Part("", None),):
            cell = (path.parent / first["file"]).parent
            logged = read_metrics(cell / folder_of(row) / part.name)
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
    args = parser.parse_args()
    folder, device = Path(args.out), pick_device(args.device)
    rows, write = open_table(folder / "compare.json", args)
    tuning = study_of(TUNING_SEED, args, device, rows, write)

    @cache
    def rate_of(row: str) -> float | None:
        if row == "teacher" or row in EXACT:
            return None
        base = SAME_MODEL.get(row, row)
        if row in VARIANTS and row not in OWN_RATE:
            base = VARIANTS[row].name
        return rate_of(base) if base != row else tuned_rate(tuning, row)

    for seed in reported_seeds(args):
        study = study_of(seed, args, device, rows, write)
        measure_seed(study, rate_of)
        if study.shown:
            save_images(folder / f"compare-images-{seed}.png", study)
        reported = [row for row in rows if row["seed"] != TUNING_SEED]
        table = markdown_table(summary_of(reported)) + footer("fewstep/compare.py", args, device,
                                                              reported)
        write_text(folder / "compare.md", table)
        save_curves(folder / "compare.png", reported)
        save_losses(folder / "compare-losses.png", reported)
    print(table + f"{folder}: compare.json, compare.md and figures")


if __name__ == "__main__":
    run(main)
