"""The whole method in the plane: points for latents, a label for the prompt, an MLP for the U-Net.

    python toy/demo.py                        rings: a minute or two on 2 CPU cores
    python toy/demo.py --dataset spirals

The file reads from top to bottom and uses the pipeline's own losses, solvers and guidance:

    data -> teacher          an MLP that predicts noise, on Stable Diffusion's schedule
    teacher -> pairs         25 steps of DPM-Solver++ with guidance
    pairs -> 2-RF -> 3-RF    reflow, each on the pairs of the model before
    pairs -> one step        distilled from the teacher (direct), and from 2-RF

Writes table.json, table.md, lines.png, ddim.png, paths.png, straight.png, steps.png, one-step.png
and flow.gif to runs/toy/ (or runs/toy-DATASET/). Columns of the table, measured on held-out noise:

    times_floor             Wasserstein-2 distance to fresh data / that of fresh data to fresh data
    on_mode                 fraction of points within 3 standard deviations of a centre of the label
    endpoint_error          E‖Z1 - exact end‖²; exact: 250 steps (for a student: its teacher's 25)
    relative_straightness   S / E‖Z1 - Z0‖², both on the same paths
"""

import copy
import math
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command import (
    Parser, at_least, check_output, non_negative, positive, run, write_json, write_text,
)
from diffusion import NoiseSchedule, as_flow, dpm_solver, noise_loss
from evaluation.plots import markdown_table
from rectified_flow import (
    distill_loss, euler, flow_velocity, guided, reflow_loss, straightness,
)
from sample import run_seed
from toy import plots
from training import generator_for
from unet import timestep_embedding

TEACHER_STEPS, FINE_STEPS = 25, 250  # of pairs; of the path that counts as exact
TABLE_STEPS = (1, 2, 4, 8, 25)
DDIM_STEPS = 12  # of the figure that compares DDIM with Euler's method
LEARNING_RATE = 4e-3
EMA_HALF_LIFE = 20  # iterations: short, as the runs are
LABEL_DROPOUT = 0.1  # as in classifier-free guidance (Ho & Salimans 2022)
SCHEDULE = NoiseSchedule()
# Each purpose has its own generator, so no two share noise.
TRAINING, PAIRS_FOR_REFLOW, PAIRS_FOR_DISTILLATION, MEASURING = range(4)


# --------------------------------------------------------------------------------------------------
# Data: two labels, each an equal mixture of Gaussians


def on_circle(radius, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)


def rings() -> tuple[Tensor, float]:
    """Two rings of 6 centres, the outer one turned by half a gap: a ring for each label."""
    angles = torch.arange(6) * math.pi / 3
    return torch.stack([on_circle(1.0, angles), on_circle(2.0, angles + math.pi / 6)]), 0.06


def spirals() -> tuple[Tensor, float]:
    """Two arms, one and a half turns each."""
    turn = torch.linspace(0.15, 1, 200).sqrt()
    arms = [on_circle(2 * turn, 3 * math.pi * turn + shift) for shift in (0, math.pi)]
    return torch.stack(arms), 0.05


DATASETS = {"rings": rings, "spirals": spirals}


def sample_data(data: tuple[Tensor, float], labels: Tensor, generator: torch.Generator) -> Tensor:
    """A point for each label: (N,) -> (N, 2). data: centres (labels, centres, 2) and spread."""
    centres, spread = data
    which = torch.randint(centres.shape[1], labels.shape, generator=generator)
    return centres[labels, which] + spread * torch.randn(len(labels), 2, generator=generator)


def weighted_lines(data, x: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """P(centre | X_t = x) (B, centres, 1) and E[X1 - X0 | X_t = x, centre] (B, centres, 2).

    For random pairs: X0 is normal, and X1 a Gaussian around one of the label's centres.
    """
    centres, spread = data
    t = t.reshape(-1, 1, 1)
    variance = (1 - t) ** 2 + (t * spread) ** 2  # of X_t around t times the centre
    offset = x[:, None] - t * centres[labels]
    weights = (-offset.square().sum(2, keepdim=True) / (2 * variance)).softmax(1)
    return weights, centres[labels] + (t * spread**2 - (1 - t)) / variance * offset


def exact_flow(data):
    """The best velocity of random pairs, E[X1 - X0 | X_t]: nothing is trained."""
    def velocity(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        weights, velocities = weighted_lines(data, x, t, context.argmax(1))
        return (weights * velocities).sum(1)

    return velocity


def context_of(labels: Tensor) -> Tensor:
    """One-hot (N, 2); zeros, the empty prompt, for label -1."""
    return torch.eye(3)[labels][:, :2]


NULL = context_of(torch.tensor([-1]))


# --------------------------------------------------------------------------------------------------
# The network and its training


class MLP(nn.Module):
    """(points (B, 2), timesteps (B,) in [0, 1000], context (B, 2)) -> (B, 2)."""

    def __init__(self, width: int, time_channels: int = 16):
        super().__init__()
        self.time_channels = time_channels
        sizes = [2 + time_channels + 2, width, width, width]
        hidden = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        # Without / 100, the highest frequency has a period of 6 timesteps: paths jitter with it.
        time = timestep_embedding(timestep / 100, self.time_channels)
        return self.layers(torch.cat([x, time, context], dim=1))


def train(network: MLP, loss_of, iterations: int, seed: int, name: str, cooldown=0.5) -> MLP:
    """A trained copy with averaged weights. loss_of(network, generator): losses (B,) of a batch."""
    network, ema = copy.deepcopy(network), copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.0)
    generator = generator_for(seed, TRAINING)
    bar = tqdm(range(iterations), desc=name, unit="it", leave=False)
    for step in bar:
        # The learning rate falls to 0 in the last fraction `cooldown` of the run.
        left = (1 - step / iterations) / cooldown if cooldown else 1.0
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, left)
        loss = loss_of(network, generator).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        half_life = min(EMA_HALF_LIFE, 0.05 * step)
        for average, weight in zip(ema.parameters(), network.parameters()):
            average.data.lerp_(weight.data, 1 - 0.5 ** (1 / max(1.0, half_life)))
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return ema


def with_dropout(labels: Tensor, generator: torch.Generator) -> Tensor:
    """The labels' context, some of it replaced by the empty one."""
    keep = torch.rand(len(labels), generator=generator) >= LABEL_DROPOUT
    return context_of(torch.where(keep, labels, -1))


# --------------------------------------------------------------------------------------------------
# The method


@dataclass
class Model:
    name: str
    network: MLP
    kind: str  # as in stable_diffusion.py
    guidance: float = 1.0  # guidance scale for sampling

    def as_flow(self, noise: Tensor, steps: int) -> tuple:
        """(velocity, start, times) for `euler`."""
        return as_flow(self.network, self.kind, noise, steps, NULL, self.guidance)


def make_teacher(data, args: Namespace) -> Model:
    """A diffusion, trained as Stable Diffusion is: predict the noise."""

    def loss(network: MLP, generator: torch.Generator) -> Tensor:
        labels = torch.randint(2, (args.batch_size,), generator=generator)
        x1 = sample_data(data, labels, generator)
        noise = torch.randn(len(labels), 2, generator=generator)
        s = torch.randint(SCHEDULE.timesteps, (len(labels),), generator=generator).float()
        return noise_loss(network, SCHEDULE, x1, noise, s, with_dropout(labels, generator))

    torch.manual_seed(args.seed)
    network = train(MLP(args.width), loss, args.iterations, args.seed, "teacher")
    return Model("teacher", network, "diffusion", args.teacher_guidance)


@torch.no_grad()
def sample_points(model: Model, noise: Tensor, labels: Tensor, steps: int, solver="euler"):
    """Z1 (N, 2) from the noise in `steps` steps. solver: "dpm" is for a diffusion."""
    context = context_of(labels)
    if solver == "dpm":
        predict_noise = guided(model.network, NULL, model.guidance)
        *_, x1 = dpm_solver(predict_noise, noise, steps, SCHEDULE, context)
    else:
        velocity, start, times = model.as_flow(noise, steps)
        *_, x1 = euler(velocity, start, steps, context, times)
    return x1


def exact_ends(model: Model, noise: Tensor, labels: Tensor) -> Tensor:
    """X1 of the model's pairs: where its own ODE ends."""
    solver = "dpm" if model.kind == "diffusion" else "euler"
    return sample_points(model, noise, labels, TEACHER_STEPS, solver)


def make_pairs(model: Model, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """(labels, noise X0, ends X1)."""
    labels, noise = torch.arange(count) % 2, torch.randn(count, 2, generator=generator)
    return labels, noise, exact_ends(model, noise, labels)


def batch_of(pairs: tuple, size: int, generator: torch.Generator) -> tuple:
    index = torch.randint(len(pairs[0]), (size,), generator=generator)
    return tuple(column[index] for column in pairs)


def reflow(model: Model, pairs: tuple, args: Namespace, name: str) -> Model:
    """A flow that learns the straight lines between the pairs, initialised from the model."""

    def loss(network: MLP, generator: torch.Generator) -> Tensor:
        labels, x0, x1 = batch_of(pairs, args.batch_size, generator)
        t = torch.rand(len(labels), generator=generator)
        return reflow_loss(flow_velocity(network), x0, x1, t, with_dropout(labels, generator))

    return Model(name, train(model.network, loss, args.iterations, args.seed, name), "flow")


def distill(model: Model, pairs: tuple, args: Namespace, iterations: int, name: str) -> Model:
    """A one-step student: one Euler step from X0 must land on X1."""

    def loss(network: MLP, generator: torch.Generator) -> Tensor:
        labels, x0, x1 = batch_of(pairs, args.batch_size, generator)
        return distill_loss(flow_velocity(network), x0, x1, context_of(labels))

    network = train(model.network, loss, iterations, args.seed, name, cooldown=0.0)
    return Model(name, network, "one-step")


# --------------------------------------------------------------------------------------------------
# Measurements and paths


class Probe:
    """Held-out noise, its labels, and fresh data to compare with."""

    def __init__(self, data, count: int, seed: int):
        self.data, self.labels = data, torch.arange(count) % 2
        generator = generator_for(seed, MEASURING)
        self.noise = torch.randn(count, 2, generator=generator)
        self.fresh, *others = (sample_data(data, self.labels, generator) for _ in range(5))
        self.floor = sum(self.distance(points) for points in others) / len(others)

    def distance(self, points: Tensor) -> float:
        """Wasserstein-2 to fresh data: the RMS distance of points under the best assignment."""
        squares = []
        # Points are assigned within each label, as prompts are, and in two halves, to save time.
        for half in torch.arange(len(points)).chunk(2):
            for label in (0, 1):
                mine = half[self.labels[half] == label]
                distances = torch.cdist(points[mine].double(), self.fresh[mine].double())
                cost = distances.square().numpy()
                squares.append(cost[linear_sum_assignment(cost)].mean())
        return math.sqrt(sum(squares) / len(squares))

    def on_mode(self, points: Tensor) -> float:
        centres, spread = self.data
        near = (points[:, None] - centres[self.labels]).norm(dim=2) <= 3 * spread
        return near.any(1).float().mean().item()

    def row(self, model: str, points: Tensor, **figures) -> dict:
        """A row of the table; None where a figure does not apply."""
        return {
            "model": model, "solver": None, "steps": None,
            "times_floor": self.distance(points) / self.floor, "on_mode": self.on_mode(points),
            "endpoint_error": None, "relative_straightness": None,
            "transport_cost": squared_distance(points, self.noise), "samples": len(points),
        } | figures


def squared_distance(a: Tensor, b: Tensor) -> float:
    """E‖a - b‖²."""
    return (a - b).square().sum(1).mean().item()


@torch.no_grad()
def rows_of(model: Model, probe: Probe) -> list[dict]:
    """A row for each number of Euler steps; for a diffusion also one for DPM-Solver++."""
    steps, context = TEACHER_STEPS, context_of(probe.labels)
    velocity, start, times = model.as_flow(probe.noise, steps)
    each, _, cost = straightness(velocity, start, steps, context, times)
    straight = (each.mean() / cost.mean()).item()
    exact = sample_points(model, probe.noise, probe.labels, FINE_STEPS)
    solvers, rows = [("euler", steps) for steps in TABLE_STEPS], []
    for solver, steps in solvers + [("dpm", TEACHER_STEPS)] * (model.kind == "diffusion"):
        points = sample_points(model, probe.noise, probe.labels, steps, solver)
        rows.append(probe.row(
            model.name, points, solver=solver, steps=steps,
            endpoint_error=squared_distance(points, exact), relative_straightness=straight,
        ))
    return rows


def student_row(student: Model, teacher: Model, probe: Probe) -> dict:
    """The row of a one-step student; endpoint_error is to its own teacher."""
    points = sample_points(student, probe.noise, probe.labels, 1)
    error = squared_distance(points, exact_ends(teacher, probe.noise, probe.labels))
    return probe.row(student.name, points, solver="euler", steps=1, endpoint_error=error)


@torch.no_grad()
def track(name: str, model: Model, noise: Tensor, labels: Tensor, steps: int = 64) -> plots.Track:
    """The points' paths by Euler's method; those of a one-step model are straight lines."""
    velocity, start, times = model.as_flow(noise, steps)
    shown_times = torch.linspace(times[0].item(), 1, steps + 1)
    if model.kind == "one-step":
        jump = sample_points(model, noise, labels, 1) - start
        states = start + shown_times.reshape(-1, 1, 1) * jump
    else:
        states = torch.stack(list(euler(velocity, start, steps, context_of(labels), times)))
    return plots.Track(name, shown_times, states)


@torch.no_grad()
def ddim(model: Model, noise: Tensor, labels: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """DDIM as published: its states x_s and their α + σ. Song et al. 2020, equation 12."""
    predict_noise = guided(model.network, NULL, model.guidance)
    timesteps = SCHEDULE.sampling_timesteps(steps)
    alphas, sigmas = (table.tolist() for table in SCHEDULE.alpha_sigma(timesteps))
    alphas, sigmas = [*alphas, 1.0], [*sigmas, 0.0]
    x, states = noise, [noise]
    for k, s in enumerate(timesteps.tolist()):
        predicted = predict_noise(x, torch.full((len(x),), s), context_of(labels))
        data = (x - sigmas[k] * predicted) / alphas[k]
        x = alphas[k + 1] * data + sigmas[k + 1] * predicted
        states.append(x)
    return torch.stack(states), torch.tensor(alphas) + torch.tensor(sigmas)


# --------------------------------------------------------------------------------------------------
# The command


def add_options(parser: Parser) -> None:
    """The flags that experiments/plane_students.py has too."""
    add = parser.add_argument
    add("--width", type=positive, default=128, help="of the hidden layers of teacher and 2-RF")
    add("--iterations", type=positive, default=3000, help="of the teacher and of each reflow")
    add("--batch-size", type=positive, default=256)
    add("--num-pairs", type=positive, default=20_000)
    add("--teacher-guidance", type=non_negative, default=1.5, help="guidance scale; 1 is off")
    add("--num-samples", type=at_least(4), default=4000, help="points that a row is measured on")
    add("--seed", type=run_seed, default=0, help="fixes everything random")


def up_to_second_flow(data, args: Namespace) -> tuple:
    """(teacher, its pairs, 2-RF, its pairs): what every one-step student is made from."""
    teacher = make_teacher(data, args)
    pairs = make_pairs(teacher, args.num_pairs, generator_for(args.seed, PAIRS_FOR_REFLOW))
    flow = reflow(teacher, pairs, args, "2-RF")
    # New noise, as in distill.py, not the noise that 2-RF was trained on.
    generator = generator_for(args.seed, PAIRS_FOR_DISTILLATION)
    return teacher, pairs, flow, make_pairs(flow, args.num_pairs, generator)


def main():
    parser = Parser("The whole method in the plane.")
    parser.add_argument("--dataset", choices=list(DATASETS), default="rings")
    add_options(parser)
    parser.add_argument("--distill-iterations", type=positive, default=250, help="of each student")
    parser.add_argument("--out", help="folder; default: runs/toy, or runs/toy-DATASET")
    args, started = parser.parse_args(), time.perf_counter()
    folder = Path(args.out or "runs/toy" + ("" if args.dataset == "rings" else f"-{args.dataset}"))
    check_output(folder / "table.json")
    data = DATASETS[args.dataset]()

    teacher, pairs, flow2, flow2_pairs = up_to_second_flow(data, args)
    flow3 = reflow(flow2, flow2_pairs, args, "3-RF")
    direct = distill(teacher, pairs, args, args.distill_iterations, "teacher + distill")
    student = distill(flow2, flow2_pairs, args, args.distill_iterations, "2-RF + distill")

    probe = Probe(data, args.num_samples, args.seed)
    again = sample_data(data, probe.labels, generator_for(args.seed, MEASURING, 1))
    rows = [probe.row("data", again)]
    for model in (teacher, flow2, flow3):
        rows += rows_of(model, probe)
    rows += [student_row(direct, teacher, probe), student_row(student, flow2, probe)]
    write_json(folder / "table.json", [row | {"seed": args.seed} for row in rows])
    write_text(folder / "table.md", markdown_table(rows))

    few, few_labels = probe.noise[:plots.TRACES], probe.labels[:plots.TRACES]
    by_euler = track("Euler", teacher, few, few_labels, DDIM_STEPS).states
    by_ddim = ddim(teacher, few, few_labels, DDIM_STEPS)
    plots.save_ddim(folder / "ddim.png", *by_ddim, by_euler, few_labels)
    noise, labels = probe.noise[:600], probe.labels[:600]
    names = {"teacher (1-RF)": teacher, "2-RF": flow2, "3-RF": flow3,
             "2-RF + distill, one step": student}
    tracks = [track(name, model, noise, labels) for name, model in names.items()]
    exact = torch.stack(list(euler(exact_flow(data), noise, 64, context_of(labels))))
    first = plots.Track("random pairs, exact average", tracks[0].times, exact)
    plots.save_paths(folder / "paths.png", [first, *tracks[1:]], labels, probe.fresh)
    point, times = torch.tensor([[0.7, 0.25]]), torch.tensor(plots.LINE_TIMES)
    of_purple = torch.zeros(len(times), dtype=torch.long)
    crossing = weighted_lines(data, point.expand(len(times), 2), times, of_purple)
    plots.save_lines(folder / "lines.png", point[0], data[0][0], *crossing)
    plots.save_straight(folder / "straight.png", tracks[:3], labels)
    plots.save_gif(folder / "flow.gif", [tracks[0], tracks[1], tracks[3]], labels)
    plots.save_steps(folder / "steps.png", rows)
    names = {"teacher, one Euler step": teacher, "teacher + distill": direct,
             "2-RF, one Euler step": flow2, "2-RF + distill": student}
    clouds = {"data": again} | {name: sample_points(model, probe.noise, probe.labels, 1)
                                for name, model in names.items()}
    plots.save_clouds(folder / "one-step.png", clouds, probe.labels)
    seconds = time.perf_counter() - started
    print(markdown_table(rows) + f"{folder}: table and figures, {seconds:.0f} s")


if __name__ == "__main__":
    run(main)
