"""The whole method in the plane: points for latents, a label for the prompt, an MLP for the U-Net.

    python toy/demo.py                        rings: a minute or two on 2 CPU cores
    python toy/demo.py --dataset spirals

Reads from top to bottom, and stands on the pipeline's own losses, solvers and guidance:

    data -> teacher          an MLP that predicts noise, on Stable Diffusion's schedule
    teacher -> pairs         25 steps of DPM-Solver++ with guidance
    pairs -> 2-RF -> 3-RF    reflow, each on the pairs of the one before
    pairs -> one step        distilled from the teacher (direct), and from 2-RF

Writes into runs/toy/ (or runs/toy-DATASET/) table.json, table.md, ddim.png, paths.png,
straight.png, steps.png, one-step.png and flow.gif. Columns of the table, on noises that nothing was
trained on:

    times_floor             Wasserstein-2 distance to fresh data / that of fresh data to fresh data
    on_mode                 share of points within 3 standard deviations of a centre of their label
    endpoint_error          E‖Z1 - exact end‖², by 250 steps (of a student: its teacher's, by 25)
    relative_straightness   S / E‖Z1 - Z0‖², and the latter is  transport_cost
"""

import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plots
from command import Parser, check_output, not_below_zero, positive, run, write_json, write_text
from diffusion import NoiseSchedule, as_flow, dpm_solver, noise_loss
from evaluation.plots import markdown_table
from rectified_flow import distill_loss, euler, flow_velocity, guided, path_bends, reflow_loss
from sample import run_seed
from training import generator_for
from unet import timestep_embedding

TEACHER_STEPS, FINE_STEPS = 25, 250  # of pairs; of what counts as a model's exact path
TABLE_STEPS = (1, 2, 4, 8, 25)
DDIM_STEPS = 12  # of the figure in which it is Euler's method
LEARNING_RATE = 4e-3
EMA_UPDATES = 20  # half-life: short, as the runs are
LABEL_DROPOUT = 0.1  # share of labels left out, so that guidance works (Ho & Salimans 2022)
SCHEDULE = NoiseSchedule()
# Purposes that randomness has; each has a generator of its own, so that they share no noise.
TRAINING, PAIRS_FOR_REFLOW, PAIRS_FOR_DISTILLATION, MEASURING = range(4)


# --------------------------------------------------------------------------------------------------
# Data: two labels, each with equally likely centres and noise about them


def on_circle(radius, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)


def rings() -> tuple[Tensor, float]:
    """Two rings of 6, the outer one turned by half a gap: each label leaves 6 places open."""
    angles = torch.arange(6) * math.pi / 3
    return torch.stack([on_circle(1.0, angles), on_circle(2.0, angles + math.pi / 6)]), 0.06


def spirals() -> tuple[Tensor, float]:
    """Two arms, one and a half turns each."""
    turn = torch.linspace(0.15, 1, 200).sqrt()
    arms = [on_circle(2 * turn, 3 * math.pi * turn + shift) for shift in (0, math.pi)]
    return torch.stack(arms), 0.05


DATASETS = {"rings": rings, "spirals": spirals}


def draw_data(data: tuple[Tensor, float], labels: Tensor, generator: torch.Generator) -> Tensor:
    """A point for each label: (N,) -> (N, 2). data: centres (labels, centres, 2) and spread."""
    centres, spread = data
    which = torch.randint(centres.shape[1], labels.shape, generator=generator)
    return centres[labels, which] + spread * torch.randn(len(labels), 2, generator=generator)


def context_of(labels: Tensor) -> Tensor:
    """One-hot (N, 2); zeros, the empty prompt, for label -1."""
    return torch.eye(3)[labels][:, :2]


NULL = context_of(torch.tensor([-1]))


# --------------------------------------------------------------------------------------------------
# The network and its training


class MLP(nn.Module):
    """(points (B, 2), timesteps (B,) in [0, 1000], context (B, 2)) -> (B, 2).

    Timesteps are divided by 100: the U-Net's fastest waves turn once in 6, and paths shake with
    them.
    """

    def __init__(self, width: int, time_channels: int = 16):
        super().__init__()
        self.time_channels = time_channels
        sizes = [2 + time_channels + 2, width, width, width]
        hidden = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        time = timestep_embedding(timestep / 100, self.time_channels)
        return self.layers(torch.cat([x, time, context], dim=1))


def train(network: MLP, loss_of, updates: int, seed: int, name: str, cooldown: float = 0.5) -> MLP:
    """A trained copy, its weights averaged. loss_of(network, generator) is a batch's loss (B,).

    cooldown: the share of the run, at its end, over which the rate falls to 0.
    """
    network, average = copy.deepcopy(network), copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.0)
    generator = generator_for(seed, TRAINING)
    bar = tqdm(range(updates), desc=name, unit="it", leave=False)
    for step in bar:
        falling = (1 - step / updates) / cooldown if cooldown else 1.0
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, falling)
        loss = loss_of(network, generator).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        half_life = min(EMA_UPDATES, 0.05 * step)
        for kept, now in zip(average.parameters(), network.parameters()):
            kept.data.lerp_(now.data, 1 - 0.5 ** (1 / max(1.0, half_life)))
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return average


def dropped(labels: Tensor, generator: torch.Generator) -> Tensor:
    """The labels' context, of a tenth the empty one."""
    kept = torch.rand(len(labels), generator=generator) >= LABEL_DROPOUT
    return context_of(torch.where(kept, labels, -1))


# --------------------------------------------------------------------------------------------------
# The method


@dataclass
class Model:
    name: str
    network: MLP
    kind: str  # as in stable_diffusion.py
    guidance: float = 1.0  # with which it is drawn from


def make_teacher(data, args) -> Model:
    """A diffusion, trained as Stable Diffusion is: predict the noise."""

    def loss(network: MLP, generator: torch.Generator) -> Tensor:
        labels = torch.randint(2, (args.batch_size,), generator=generator)
        x1 = draw_data(data, labels, generator)
        noise = torch.randn(len(labels), 2, generator=generator)
        s = torch.randint(SCHEDULE.timesteps, (len(labels),), generator=generator).float()
        return noise_loss(network, SCHEDULE, x1, noise, s, dropped(labels, generator))

    torch.manual_seed(args.seed)
    network = train(MLP(args.width), loss, args.iterations, args.seed, "teacher")
    return Model("teacher", network, "diffusion", args.teacher_guidance)


@torch.no_grad()
def ends(model: Model, noise: Tensor, labels: Tensor, steps: int, solver: str = "euler") -> Tensor:
    """Where `steps` steps lead from the noise: (N, 2). solver "dpm" is for a diffusion."""
    if solver == "dpm":
        predict_noise = guided(model.network, NULL, model.guidance)
        *_, last = dpm_solver(predict_noise, noise, steps, SCHEDULE, context_of(labels))
    else:
        velocity, start, times = as_flow(
            model.network, model.kind, noise, steps, NULL, model.guidance
        )
        *_, last = euler(velocity, start, steps, context_of(labels), times)
    return last


def exact_ends(model: Model, noise: Tensor, labels: Tensor) -> Tensor:
    """What pairs hold: where the model's own ODE leads."""
    return ends(
        model, noise, labels, TEACHER_STEPS, "dpm" if model.kind == "diffusion" else "euler"
    )


def make_pairs(
    model: Model, count: int, generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """(labels, noises X0, ends X1)."""
    labels, noise = torch.arange(count) % 2, torch.randn(count, 2, generator=generator)
    return labels, noise, exact_ends(model, noise, labels)


def reflow(model: Model, pairs: tuple, args, name: str) -> Model:
    """The flow that learns the straight lines between the model's pairs, from its weights on."""

    def loss(network: MLP, generator: torch.Generator) -> Tensor:
        labels, x0, x1 = batch_of(pairs, args.batch_size, generator)
        t = torch.rand(len(labels), generator=generator)
        return reflow_loss(flow_velocity(network), x0, x1, t, dropped(labels, generator))

    return Model(name, train(model.network, loss, args.iterations, args.seed, name), "flow")


def distill(model: Model, pairs: tuple, args, updates: int, name: str) -> Model:
    """The one-step student: one Euler step from the noise must land where the pairs end."""

    def loss(network: MLP, generator: torch.Generator) -> Tensor:
        labels, x0, x1 = batch_of(pairs, args.batch_size, generator)
        return distill_loss(flow_velocity(network), x0, x1, context_of(labels))

    return Model(
        name, train(model.network, loss, updates, args.seed, name, cooldown=0.0), "one-step"
    )


def batch_of(pairs: tuple, size: int, generator: torch.Generator) -> tuple:
    index = torch.randint(len(pairs[0]), (size,), generator=generator)
    return tuple(column[index] for column in pairs)


# --------------------------------------------------------------------------------------------------
# Measures


class Probe:
    """Noises that no training pair has, their labels, and fresh data to compare with."""

    def __init__(self, data, count: int, seed: int):
        self.data, self.labels = data, torch.arange(count) % 2
        generator = generator_for(seed, MEASURING)
        self.noise = torch.randn(count, 2, generator=generator)
        self.fresh, *others = (draw_data(data, self.labels, generator) for _ in range(5))
        self.floor = sum(self.distance(points) for points in others) / len(others)

    def distance(self, points: Tensor) -> float:
        """Wasserstein-2 to fresh data: √ of the mean squared way under the best assignment.

        Within each label, since that is what a prompt asks for, and in two halves, for time.
        """
        squares = []
        for half in torch.arange(len(points)).chunk(2):
            for label in (0, 1):
                mine = half[self.labels[half] == label]
                ways = torch.cdist(points[mine].double(), self.fresh[mine].double())
                cost = ways.square().numpy()
                squares.append(cost[linear_sum_assignment(cost)].mean())
        return math.sqrt(sum(squares) / len(squares))

    def on_mode(self, points: Tensor) -> float:
        centres, spread = self.data
        near = (points[:, None] - centres[self.labels]).norm(dim=2) <= 3 * spread
        return near.any(1).float().mean().item()

    def row(self, model: str, points: Tensor, **figures) -> dict:
        """A row of the table; null where a figure does not apply."""
        row = {
            "model": model, "solver": None, "steps": None,
            "times_floor": self.distance(points) / self.floor, "on_mode": self.on_mode(points),
            "endpoint_error": None, "relative_straightness": None,
            "transport_cost": squared_way(points, self.noise), "samples": len(points),
        }
        return row | figures


def squared_way(a: Tensor, b: Tensor) -> float:
    """E‖a - b‖²."""
    return (a - b).square().sum(1).mean().item()


@torch.no_grad()
def rows_of(model: Model, probe: Probe) -> list[dict]:
    """A row for each number of Euler steps; of a diffusion one more, of the solver of its pairs."""
    velocity, start, times = as_flow(
        model.network, model.kind, probe.noise, TEACHER_STEPS, NULL, model.guidance
    )
    bends, cost = path_bends(velocity, start, TEACHER_STEPS, context_of(probe.labels), times)
    straight = (times.diff() / (1 - times[0]) @ bends.mean(1) / cost.mean()).item()
    exact = ends(model, probe.noise, probe.labels, FINE_STEPS)
    ways, rows = [("euler", steps) for steps in TABLE_STEPS], []
    for solver, steps in ways + [("dpm", TEACHER_STEPS)] * (model.kind == "diffusion"):
        points = ends(model, probe.noise, probe.labels, steps, solver)
        rows.append(probe.row(
            model.name, points, solver=solver, steps=steps,
            endpoint_error=squared_way(points, exact), relative_straightness=straight,
        ))
    return rows


def student_row(student: Model, teacher: Model, probe: Probe) -> dict:
    """The row of a one-step student: how far from where its own teacher leads?"""
    points = ends(student, probe.noise, probe.labels, 1)
    error = squared_way(points, exact_ends(teacher, probe.noise, probe.labels))
    return probe.row(student.name, points, solver="euler", steps=1, endpoint_error=error)


@torch.no_grad()
def ddim(model: Model, noise: Tensor, labels: Tensor, steps: int) -> list[tuple[Tensor, float]]:
    """DDIM as published, for ddim.png: its states x_s and their α + σ. Song et al. 2020, eq. 12."""
    predict_noise = guided(model.network, NULL, model.guidance)
    timesteps = SCHEDULE.sampling_timesteps(steps)
    alphas, sigmas = (table.tolist() for table in SCHEDULE.alpha_sigma(timesteps))
    alphas, sigmas = [*alphas, 1.0], [*sigmas, 0.0]
    x, states = noise, [(noise, alphas[0] + sigmas[0])]
    for k, s in enumerate(timesteps.tolist()):
        predicted = predict_noise(x, torch.full((len(x),), s), context_of(labels))
        data = (x - sigmas[k] * predicted) / alphas[k]
        x = alphas[k + 1] * data + sigmas[k + 1] * predicted
        states.append((x, alphas[k + 1] + sigmas[k + 1]))
    return states


# --------------------------------------------------------------------------------------------------
# All of it, in order


def up_to_second_flow(data, args) -> tuple:
    """(teacher, its pairs, 2-RF, its pairs): what every one-step student is made from."""
    noise = lambda purpose: generator_for(args.seed, purpose)
    teacher = make_teacher(data, args)
    pairs = make_pairs(teacher, args.num_pairs, noise(PAIRS_FOR_REFLOW))
    flow = reflow(teacher, pairs, args, "2-RF")
    # Other noises than 2-RF was trained on, as distill.py takes.
    return teacher, pairs, flow, make_pairs(flow, args.num_pairs, noise(PAIRS_FOR_DISTILLATION))


def main():
    parser = Parser("The whole method in the plane.")
    add = parser.add_argument
    add("--dataset", choices=list(DATASETS), default="rings")
    add("--width", type=positive, default=128, help="of the MLP's hidden layers")
    add("--iterations", type=positive, default=3000,
        help="updates of the teacher and of each reflow")
    add("--distill-iterations", type=positive, default=250, help="updates of each student")
    add("--batch-size", type=positive, default=256, help="samples of one update")
    add("--num-pairs", type=positive, default=20_000)
    add("--teacher-guidance", type=not_below_zero, default=1.5, help="1 is off")
    add("--num-samples", type=positive, default=4000, help="points that a row is measured on")
    add("--seed", type=run_seed, default=0, help="the run is a function of it")
    add("--out", help="folder; default: runs/toy, or runs/toy-DATASET")
    args, started = parser.parse_args(), time.perf_counter()
    folder = Path(
        args.out or ("runs/toy" if args.dataset == "rings" else f"runs/toy-{args.dataset}")
    )
    check_output(folder / "table.json")
    data = DATASETS[args.dataset]()

    teacher, pairs, flow2, flow2_pairs = up_to_second_flow(data, args)
    flow3 = reflow(flow2, flow2_pairs, args, "3-RF")
    direct = distill(teacher, pairs, args, args.distill_iterations, "teacher + distill")
    student = distill(flow2, flow2_pairs, args, args.distill_iterations, "2-RF + distill")

    probe = Probe(data, args.num_samples, args.seed)
    again = draw_data(data, probe.labels, generator_for(args.seed, MEASURING, 1))
    rows = [probe.row("data", again)]
    for model in (teacher, flow2, flow3):
        rows += rows_of(model, probe)
    rows += [student_row(direct, teacher, probe), student_row(student, flow2, probe)]
    write_json(folder / "table.json", [row | {"seed": args.seed} for row in rows])
    write_text(folder / "table.md", markdown_table(rows))

    landings = {"data": again} | {
        title: ends(model, probe.noise, probe.labels, 1)
        for title, model in (("teacher, one Euler step", teacher), ("teacher + distill", direct),
                             ("2-RF, one Euler step", flow2), ("2-RF + distill", student))
    }
    tracks = [
        plots.track(
            title, model.kind,
            *as_flow(model.network, model.kind, probe.noise[:600], 64, NULL, model.guidance),
            context_of(probe.labels[:600]),
        )
        for title, model in (("teacher (1-RF)", teacher), ("2-RF", flow2), ("3-RF", flow3),
                             ("2-RF + distill, one step", student))
    ]
    few, labels = probe.noise[:plots.TRACES], probe.labels[:plots.TRACES]
    velocity, start, times = as_flow(
        teacher.network, teacher.kind, few, DDIM_STEPS, NULL, teacher.guidance
    )
    with torch.no_grad():
        states = list(euler(velocity, start, DDIM_STEPS, context_of(labels), times))
    plots.save_ddim(folder / "ddim.png", ddim(teacher, few, labels, DDIM_STEPS), states, labels)
    plots.save_paths(folder / "paths.png", tracks, probe.labels[:600], probe.fresh)
    plots.save_steps(folder / "steps.png", rows)
    plots.save_straight(folder / "straight.png", tracks[:3], probe.labels[:600])
    plots.save_landings(folder / "one-step.png", landings, probe.labels)
    plots.save_film(folder / "flow.gif", [tracks[0], tracks[1], tracks[3]], probe.labels[:600])
    print(
        markdown_table(rows) + f"{folder}: table and figures, {time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    run(main)
