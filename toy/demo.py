"""The whole method in the plane: points instead of latents, a label instead of a prompt, an MLP instead of the U-Net.

    python toy/demo.py                        rings: a minute on 2 CPU cores, then runs/toy/ holds table and figures
    python toy/demo.py --dataset spirals      or checkerboard
    python toy/demo.py --study                where direct distillation falls behind: 5 seeds, minutes

Every step is the full pipeline's own function, in the same order:

    data -> teacher          a noise-predicting MLP on Stable Diffusion's schedule      rectified_flow.noise_loss
    teacher -> pairs         25 steps of DPM-Solver with guidance                       pairs.make_pairs
    pairs -> 2-RF -> 3-RF    reflow, each on the pairs of the one before                reflow.reflow
    pairs -> one step        from the teacher (direct), and from 2-RF                   distill.distill_l2

**By hand.** Two noises A = (-1, 1) and B = (-1, -1), two targets P = (1, 1) and Q = (1, -1), paired at random:

    A ──────── P      Each noise meets each target half of the time, so four straight lines are equally likely:
      ╲      ╱        A→P and B→Q with velocity (2, 0), A→Q with (2, -2), B→P with (2, 2).
        ╲  ╱          The network answers with the average of what passes through a point.
        ╱  ╲          At A, t = 0:        ½ (2, 0) + ½ (2, -2) = (2, -1)
      ╱      ╲        At (0, 0), t = ½:   ½ (2, -2) + ½ (2, 2) = (2, 0): the crossing lines cancel
    B ──────── Q      One Euler step from A: (-1, 1) + (2, -1) = (1, 0), which is neither P nor Q. That is blur.

Follow the flow in small steps instead. By symmetry the average never points across the middle line, so what starts
above stays above: A ends at P, B at Q, on paths that dip towards the middle and come back. They are bent, but they
do not cross, and they have paired A with P and B with Q. Learn again on these pairs (reflow): two parallel lines, one
velocity (2, 0) everywhere, and one Euler step from A lands on (-1, 1) + (2, 0) = P. The mean squared length of the
lines fell from ½ 4 + ½ 8 = 6 to 4; that reflow never raises it is a theorem (Liu et al. 2022, 2209.03003).

The students of the demo start from their teacher's weights, as in InstaFlow, and get 250 updates: there reflow first is
clearly ahead. The study shows what becomes of that with more updates, from random weights and at other widths.
"""

import argparse
import copy
import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import figures
from command import Parser, check_output, not_below_zero, positive, run, run_seed, seeds_in, write_text
from distill import distill_l2
from evaluate import grouped, markdown_table, measure_straightness
from pairs import Pairs, describe_pairs, draw_latents, make_pairs
from rectified_flow import NoiseSchedule, as_flow, euler, noise_from_seeds, noise_loss, one_step
from reflow import CAPTION_DROPOUT, reflow
from training import TrainingOptions, generator_for, train
from unet import timestep_embedding

TEACHER_STEPS = 25
FINE_STEPS = 250  # of what counts as a model's exact path
TABLE_STEPS = (1, 2, 4, 8, 25)
LEARNING_RATE = 4e-3
COOLDOWN = 0.5
EMA_UPDATES = 20  # half-life: short, as the runs are
WORLDS = {
    "teacher": "reflow",
    "2-RF": "distillation",
}  # of the noises of their pairs: a flow sees others than it was trained on
GROUPS = 2  # distances are means over this many groups of points
FLOOR_DRAWS = 4
STUDY_KEYS = ("teacher", "start", "width", "updates")
STUDY_FIGURES = ("endpoint_error", "times_floor", "on_mode")
STUDY_SAMPLES = 2000

# ---------------------------------------------------------------------------------------------------------------
# Data: points around the centres of each label


@dataclass
class Dataset:
    """Labels and, for each, equally likely centres with noise about them."""

    labels: list[str]
    centres: Tensor  # (labels, centres, 2)
    spread: float  # standard deviation, or half the side of a square
    square: bool = False

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """A point for each label: (N,) -> (N, 2)."""
        which = torch.randint(self.centres.shape[1], labels.shape, generator=generator)
        if self.square:
            noise = 2 * torch.rand(len(labels), 2, generator=generator) - 1
        else:
            noise = torch.randn(len(labels), 2, generator=generator)
        return self.centres[labels, which] + self.spread * noise

    def on_mode(self, points: Tensor, labels: Tensor) -> float:
        """Share of points within 3 standard deviations of a centre of their label, or within its square (and a tenth)."""
        offsets = (points[:, None] - self.centres[labels]).abs()  # (N, centres, 2)
        if self.square:
            near = offsets.amax(2) <= 1.1 * self.spread
        else:
            near = offsets.norm(dim=2) <= 3 * self.spread
        return near.any(1).float().mean().item()


def on_circle(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)


def rings() -> Dataset:
    """Two rings of 6 modes, the outer one turned by half a gap: each label leaves 6 places open."""
    angles = torch.arange(6) * 2 * math.pi / 6
    inner, outer = on_circle(torch.ones(6), angles), on_circle(2 * torch.ones(6), angles + math.pi / 6)
    return Dataset(["inner", "outer"], torch.stack([inner, outer]), 0.06)


def checkerboard() -> Dataset:
    """The dark squares of a 4 x 4 board, its upper and its lower half."""
    squares = [(x, y) for y in range(4) for x in range(4) if (x + y) % 2 == 0]
    centres = torch.tensor(squares, dtype=torch.float32) - 1.5
    return Dataset(["lower", "upper"], centres.reshape(2, 4, 2), 0.5, square=True)


def spirals() -> Dataset:
    """Two arms, one and a half turns each."""
    turn = torch.linspace(0.15, 1, 200).sqrt()
    angle = 3 * math.pi * turn
    return Dataset(["first", "second"], torch.stack([on_circle(2 * turn, angle), on_circle(2 * turn, angle + math.pi)]), 0.05)


DATASETS = {"rings": rings, "checkerboard": checkerboard, "spirals": spirals}

# ---------------------------------------------------------------------------------------------------------------
# The network, and a model that the pipeline's functions take for a Stable Diffusion


class MLP(nn.Module):
    """What the U-Net is to latents: (points (B, 2), timesteps (B,) in [0, 1000], context (B, labels)) -> (B, 2).

    Timesteps are divided by 100: the U-Net's fastest waves turn once in 6 timesteps, and paths of an MLP shake with them.
    """

    def __init__(self, labels: int, width: int, time_channels: int = 16):
        super().__init__()
        self.time_channels = time_channels
        self.layers = nn.Sequential(
            nn.Linear(2 + time_channels + labels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.layers(torch.cat([x, timestep_embedding(timestep / 100, self.time_channels), context], dim=1))


@dataclass
class PointModel:
    """What checkpoint.StableDiffusion is to pictures. A prompt is a label's name; "" is no label."""

    unet: MLP
    kind: str
    labels: list[str]
    path: str  # a name: nothing lies there
    guidance: float = 1.0  # with which it is sampled
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    def latent_shape(self) -> tuple[int]:
        return (2,)

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """One-hot (B, labels); zeros for the empty prompt."""
        numbers = {label: k for k, label in enumerate(self.labels)} | {"": len(self.labels)}
        return torch.eye(len(self.labels) + 1)[[numbers[prompt] for prompt in prompts], :-1]

    def fingerprint(self) -> str:
        weights = b"".join(weight.numpy().tobytes() for weight in self.unet.state_dict().values())
        return hashlib.sha256(weights).hexdigest()

    def copy(self, name: str) -> "PointModel":
        """The same weights under another name, to be trained on without guidance."""
        return PointModel(copy.deepcopy(self.unet), self.kind, self.labels, name)


class PairsInMemory:
    """Pairs with every noise made beforehand: in the plane that costs nothing, and a batch is an index."""

    def __init__(self, pairs: Pairs):
        self.description = pairs.description
        self.x0, self.x1, self.prompts = pairs.batch(torch.arange(len(pairs)))

    def __len__(self) -> int:
        return len(self.x0)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        return self.x0[indices], self.x1[indices], [self.prompts[i] for i in indices.tolist()]


# ---------------------------------------------------------------------------------------------------------------
# The method, step by step


@dataclass
class Method:
    """The steps of one run. Each keeps its state in a folder of its own, where a second call finds it finished."""

    data: Dataset
    folder: Path
    args: argparse.Namespace
    seed: int

    def train_options(self, iterations: int, cooldown: float) -> TrainingOptions:
        batch = self.args.batch_size
        return TrainingOptions(
            iterations, batch, learning_rate=LEARNING_RATE, cooldown=cooldown, ema_half_life=EMA_UPDATES * batch, ema_ramp=0.05,
            log_every=100, seed=self.seed,
        )  # fmt: skip

    def fresh(self, width: int, kind: str, name: str, guidance: float = 1.0) -> PointModel:
        """A model with random weights."""
        torch.manual_seed(self.seed)
        return PointModel(MLP(len(self.data.labels), width), kind, self.data.labels, name, guidance)

    def teacher(self) -> PointModel:
        """A diffusion, trained as Stable Diffusion is: predict the noise, without the label in a tenth of the cases."""
        args, names, schedule = self.args, self.data.labels, NoiseSchedule()
        model = self.fresh(args.width, "diffusion", "teacher", args.teacher_guidance)

        def draw(samples, generator):
            labels = torch.randint(len(names), samples.shape, generator=generator)
            x1, noise = self.data.draw(labels, generator), torch.randn(len(samples), 2, generator=generator)
            s = torch.randint(schedule.timesteps, samples.shape, generator=generator).float()
            kept = torch.rand(len(samples), generator=generator) >= CAPTION_DROPOUT
            prompts = [names[k] if keep else "" for k, keep in zip(labels.tolist(), kept.tolist())]
            return x1, noise, s, model.encode_prompts(prompts)

        def loss(x1, noise, s, context):
            return noise_loss(model.unet, schedule, x1, noise, s, context), None

        settings = {"dataset": args.dataset, "width": args.width, "iterations": args.iterations}
        options = self.train_options(args.iterations, COOLDOWN)
        train(model.unet, draw, loss, options, self.folder / model.path, settings, model.path)
        return model

    def pairs_of(self, model: PointModel) -> PairsInMemory:
        first_seed = seeds_in(WORLDS[model.path], self.seed, self.args.num_pairs)[0]
        description = describe_pairs(
            model, model.labels, self.args.dataset, self.args.num_pairs, TEACHER_STEPS, model.guidance, first_seed
        )
        folder = self.folder / f"pairs-{model.path}"
        return PairsInMemory(make_pairs(model, model.labels, description, folder, batch_size=1000))

    def straightened(self, model: PointModel, pairs: PairsInMemory, name: str) -> PointModel:
        """Reflow, started from the weights of the model that made the pairs."""
        flow, iterations = model.copy(name), self.args.iterations
        settings = {"pairs": pairs.description, "iterations": iterations}
        reflow(flow, pairs, self.train_options(iterations, COOLDOWN), self.folder / name, settings, torch.float32)
        return flow

    def up_to_second_flow(self) -> tuple[PointModel, PairsInMemory, PointModel, PairsInMemory]:
        """The teacher, its pairs, 2-RF and its pairs: what every one-step student is made from."""
        teacher = self.teacher()
        teacher_pairs = self.pairs_of(teacher)
        flow2 = self.straightened(teacher, teacher_pairs, "2-RF")
        return teacher, teacher_pairs, flow2, self.pairs_of(flow2)

    def distilled(self, student: PointModel, pairs: PairsInMemory, iterations: int) -> PointModel:
        """One step, trained in place; called again with more iterations, it goes on where it was."""
        folder, options = self.folder / student.path.replace(" ", ""), self.train_options(iterations, cooldown=0.0)
        distill_l2(student, pairs, options, folder, {"pairs": pairs.description}, torch.float32)
        return student


# ---------------------------------------------------------------------------------------------------------------
# Measures


@dataclass
class Probe:
    """Noises that no training pair has, a label for each, and fresh data to compare with."""

    data: Dataset
    labels: Tensor  # (N,)
    seeds: list[int]  # of the noises
    noise: Tensor  # (N, 2)
    fresh: Tensor  # (N, 2)
    floor: float = 1.0  # distance of fresh data to fresh data

    @property
    def prompts(self) -> list[str]:
        return [self.data.labels[k] for k in self.labels.tolist()]

    def wasserstein(self, points: Tensor) -> float:
        """Wasserstein-2 distance to the fresh data: √ of the mean squared way to them under the best assignment.

        Within each label, since that is what a prompt asks for; squares are averaged over labels and groups.
        """
        squares = []
        for group in torch.arange(len(points)).chunk(GROUPS):
            for k in range(len(self.data.labels)):
                mine = group[self.labels[group] == k]
                cost = torch.cdist(points[mine].double(), self.fresh[mine].double()).square().numpy()
                squares.append(cost[linear_sum_assignment(cost)].mean())
        return math.sqrt(sum(squares) / len(squares))


def make_probe(data: Dataset, count: int, seed: int) -> tuple[Probe, Tensor]:
    """The probe, and data drawn once more. The floor is a mean over several such draws."""
    seeds = list(seeds_in("evaluation", seed, count))
    labels, generator = torch.arange(count) % len(data.labels), generator_for(seeds[0])
    probe = Probe(data, labels, seeds, noise_from_seeds(seeds, (2,)), data.draw(labels, generator))
    draws = [data.draw(labels, generator) for _ in range(FLOOR_DRAWS)]
    probe.floor = sum(probe.wasserstein(again) for again in draws) / FLOOR_DRAWS
    return probe, draws[0]


@torch.inference_mode()
def endpoints(model: PointModel, probe: Probe, steps: int, solver: str = "ddim") -> Tensor:
    """Where `steps` steps lead, (N, 2). solver is for a diffusion: "ddim" is Euler's method, which flows always take."""
    context, null_context = model.encode_prompts(probe.prompts), model.encode_prompts([""])
    return draw_latents(model, context, probe.seeds, steps, model.guidance, solver, null_context)


def squared_distance(a: Tensor, b: Tensor) -> float:
    """E‖a - b‖²."""
    return (a - b).square().sum(1).mean().item()


def row_of(name: str, points: Tensor, probe: Probe, **figures) -> dict:
    """A row of the table: what is measured on points, and what is known of the model; null where nothing is."""
    distance = probe.wasserstein(points)
    row = {"model": name} | dict.fromkeys(("solver", "steps", "guidance")) | {"wasserstein": distance}
    row |= {"times_floor": distance / probe.floor, "on_mode": probe.data.on_mode(points, probe.labels)}
    row |= dict.fromkeys(("endpoint_error", "straightness", "relative_straightness", "transport_cost", "seconds"))
    return row | figures | {"samples": len(points)}


def rows_of(model: PointModel, probe: Probe) -> list[dict]:
    """A row for each number of Euler steps; for a diffusion one more, of the solver that its pairs are made with."""
    straight = measure_straightness(model, probe.prompts, probe.seeds, model.guidance)
    exact = endpoints(model, probe, FINE_STEPS)
    cost = squared_distance(endpoints(model, probe, TEACHER_STEPS, "dpm"), probe.noise)  # as in the pairs
    rows, ways = [], [("euler", steps) for steps in TABLE_STEPS]
    if model.kind == "diffusion":
        ways.append(("dpm", TEACHER_STEPS))
    for solver, steps in ways:
        started = time.perf_counter()
        points = endpoints(model, probe, steps, "dpm" if solver == "dpm" else "ddim")
        rows.append(row_of(
            model.path, points, probe, solver=solver, steps=steps, guidance=model.guidance,
            seconds=time.perf_counter() - started, endpoint_error=squared_distance(points, exact),
            straightness=straight.value, relative_straightness=straight.relative,
            transport_cost=cost,
        ))  # fmt: skip
    return rows


def student_row(student: PointModel, exact: Tensor, probe: Probe) -> dict:
    """The row of a one-step student. exact (N, 2): what its pairs would hold for these noises."""
    started = time.perf_counter()
    points = endpoints(student, probe, 1)
    return row_of(
        student.path, points, probe, solver="euler", steps=1, guidance=1.0, seconds=time.perf_counter() - started,
        endpoint_error=squared_distance(points, exact),
        transport_cost=squared_distance(points, probe.noise),
    )  # fmt: skip


@dataclass
class Track:
    """The way of some points, for the figures."""

    name: str
    times: Tensor  # (steps + 1,)
    states: Tensor  # (steps + 1, N, 2)
    velocities: Tensor  # (steps, N, 2)


@torch.inference_mode()
def track_of(model: PointModel, probe: Probe, name: str, count: int, steps: int = 64) -> Track:
    """The first `count` noises of the probe on their way; those of a one-step model go straight to where they land."""
    context, null_context, noise = model.encode_prompts(probe.prompts[:count]), model.encode_prompts([""]), probe.noise[:count]
    velocity, start, times = as_flow(model.unet, model.kind, noise, steps, null_context, model.guidance)
    times = torch.linspace(times[0].item(), 1, steps + 1)  # even, for the eye
    if model.kind == "one-step":
        jump = one_step(velocity, start, context) - start
        return Track(name, times, start + times.reshape(-1, 1, 1) * jump, jump.expand(steps, -1, -1))
    states = torch.stack(list(euler(velocity, start, steps, context, times)))
    return Track(name, times, states, states.diff(dim=0) / times.diff().reshape(-1, 1, 1))


# ---------------------------------------------------------------------------------------------------------------
# The demo and the study


def demo(data: Dataset, folder: Path, args: argparse.Namespace) -> None:
    """Every stage, the table, the figures."""
    method = Method(data, folder / "state", args, args.seed)
    teacher, teacher_pairs, flow2, flow2_pairs = method.up_to_second_flow()
    flow3 = method.straightened(flow2, flow2_pairs, "3-RF")
    direct = method.distilled(teacher.copy("teacher + distill"), teacher_pairs, args.distill_iterations)
    student = method.distilled(flow2.copy("2-RF + distill"), flow2_pairs, args.distill_iterations)

    probe, again = make_probe(data, args.num_samples, args.seed)
    random_pairing = squared_distance(again, probe.noise)
    rows = [row_of("data", again, probe, wasserstein=probe.floor, times_floor=1.0, transport_cost=random_pairing)]
    rows += rows_of(teacher, probe) + rows_of(flow2, probe) + rows_of(flow3, probe)
    for one, its_teacher in ((direct, teacher), (student, flow2)):
        rows.append(student_row(one, endpoints(its_teacher, probe, TEACHER_STEPS, "dpm"), probe))
    rows = [row | {"seed": args.seed} for row in rows]
    write_text(folder / "table.json", json.dumps(rows, indent=2) + "\n")
    write_text(folder / "table.md", markdown_table(rows))
    print(markdown_table(rows), end="")

    drawn = min(600, len(probe.labels))
    tracks = [track_of(teacher, probe, "teacher (1-RF)", drawn), track_of(flow2, probe, "2-RF", drawn),
              track_of(flow3, probe, "3-RF", drawn), track_of(student, probe, "2-RF + distill, one step", drawn)]  # fmt: skip
    landings = [("data", probe.fresh), ("teacher, one Euler step", endpoints(teacher, probe, 1)),
                ("teacher + distill", endpoints(direct, probe, 1)), ("2-RF, one Euler step", endpoints(flow2, probe, 1)),
                ("2-RF + distill", endpoints(student, probe, 1))]  # fmt: skip
    figures.save_paths(folder / "paths.png", tracks, probe.labels[:drawn], probe.fresh)
    figures.save_traces(folder / "straight.png", tracks[:3], probe.labels[:drawn])
    figures.save_landings(folder / "one-step.png", landings, probe.labels)
    figures.save_animation(folder / "flow.gif", [tracks[0], tracks[1], tracks[3]], probe.labels[:drawn])


def study(data: Dataset, folder: Path, args: argparse.Namespace) -> None:
    """One-step students of the teacher and of 2-RF, over widths, updates, starts and seeds. Each seed is a whole run.

    Students start from random weights, the same for both teachers, so that only what they are to learn differs; at
    the width of the teacher also from its weights, as in the paper. There, direct distillation goes on for as many
    updates as reflow took.
    """
    path, rows = folder / "study.json", []
    if path.exists():
        rows = json.loads(path.read_text())
    for seed in range(args.seed, args.seed + args.study_seeds):
        method = Method(data, folder / "state" / f"study-{seed}", args, seed)
        teacher, teacher_pairs, flow2, flow2_pairs = method.up_to_second_flow()
        probe, _ = make_probe(data, STUDY_SAMPLES, seed)
        for source, pairs in ((teacher, teacher_pairs), (flow2, flow2_pairs)):
            exact = endpoints(source, probe, TEACHER_STEPS, "dpm")
            students = [(source.copy(f"{source.path} + distill"), args.width, "teacher")]
            for width in args.study_widths:
                students.append((method.fresh(width, "flow", f"{source.path} + distill {width}"), width, "random"))
            for student, width, start in students:
                more = [args.study_updates[-1] + args.iterations] * (source is teacher and width == args.width)
                for updates in args.study_updates + more:
                    key = dict(zip(STUDY_KEYS, (source.path, start, width, updates))) | {"seed": seed}
                    if not any(key.items() <= row.items() for row in rows):  # else a stopped run got so far
                        row = student_row(method.distilled(student, pairs, updates), exact, probe)
                        rows.append(key | {name: row[name] for name in STUDY_FIGURES} | {"samples": STUDY_SAMPLES})
                        write_text(path, json.dumps(rows, indent=2) + "\n")
    summary = summary_of(rows)
    write_text(folder / "study.md", markdown_table(summary))
    print(markdown_table(summary), end="")
    # Width is compared where the demo stops, or at the next number of updates that was measured.
    at = min((n for n in args.study_updates if n >= args.distill_iterations), default=args.study_updates[-1])
    figures.save_study(folder / "study.png", summary, args.width, at)


def summary_of(rows: list[dict]) -> list[dict]:
    """Rows of the study that differ in their seed alone, as mean, least and greatest of each figure."""
    summary = []
    for key, group in grouped(rows, STUDY_KEYS).items():
        line = dict(zip(STUDY_KEYS, key)) | {"seeds": len(group)}
        for name in STUDY_FIGURES:
            values = [row[name] for row in group]
            line |= {name: sum(values) / len(values), f"{name}_min": min(values), f"{name}_max": max(values)}
        summary.append(line)
    return summary


def number_list(text: str) -> list[int]:
    """argparse type: whole numbers of at least 1, with commas."""
    return [positive(part) for part in text.split(",")]


def main():
    parser = Parser("The whole method in the plane.")
    parser.add_argument("--dataset", choices=list(DATASETS), default="rings")
    parser.add_argument("--width", type=positive, default=128, help="of the MLP's hidden layers")
    parser.add_argument("--iterations", type=positive, default=3000, help="updates of the teacher and of each reflow")
    parser.add_argument("--distill-iterations", type=positive, default=250, help="updates of each student")
    parser.add_argument("--batch-size", type=positive, default=256, help="samples of one update")
    parser.add_argument("--num-pairs", type=positive, default=20_000)
    parser.add_argument("--teacher-guidance", type=not_below_zero, default=1.5, help="1 is off")
    parser.add_argument("--num-samples", type=positive, default=4000, help="points that a row of the table is measured on")
    parser.add_argument("--seed", type=run_seed, default=0, help="the run is a function of it")
    parser.add_argument("--out", help="folder; default: runs/toy, or runs/toy-DATASET")
    group = parser.add_argument_group("study")
    group.add_argument("--study", action="store_true", help="distill the teacher and 2-RF into students of many sizes")
    group.add_argument("--study-seeds", type=positive, default=5, help="whole runs, from --seed on")
    group.add_argument("--study-widths", type=number_list, default="8,16,32,64,128,256", help="of the students")
    group.add_argument("--study-updates", type=number_list, default="125,250,500,1000,2000", help="of distillation, rising")
    args = parser.parse_args()
    folder = Path(args.out or ("runs/toy" if args.dataset == "rings" else f"runs/toy-{args.dataset}"))
    check_output(folder / "table.json")
    started = time.perf_counter()
    (study if args.study else demo)(DATASETS[args.dataset](), folder, args)
    print(f"{folder}: table and figures, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    run(main)
