"""Two noises A, B and two targets P, Q with an exact velocity: the second tab of app.py.

The points are the centres of Gaussians of standard deviation s. For X0 ~ N(a, s² I) and
X1 ~ N(b, s² I), independent, and r = (1-t)² + t²,

    X_t ~ N((1-t) a + t b, s² r)
    E[X1 - X0 | X_t = x] = b - a + (2t - 1) / r · (x - (1-t) a - t b)

With several equally likely pairs (a, b), the best velocity weighs these expectations by how likely
each pair is at x. A → P, A → Q, B → P, B → Q are the random pairs; reflow keeps the two pairs that
the flow of this velocity makes. toy/first.py explains the same example step by step.
"""

import functools

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rectified_flow import Velocity, euler

NOISES, TARGETS = torch.tensor([[[-1.0, 1], [-1, -1]], [[1, 1], [1, -1]]])  # A, B and P, Q
STD = 0.15
COLORS = ("#2563eb", "#ea580c")  # of A and B
COUPLINGS = ("random pairs", "after reflow")
EXPLANATION = """Noise is at A or B, data at P or Q. **Random pairs** send each noise to each target
half of the time, so their lines cross. A network learns the *average* velocity of the lines through
a point. One step from A follows the average of A → P and A → Q, and lands between the targets: a
blur. Many steps bend towards P or Q. **Reflow** pairs each noise with the end of its own path.
These lines do not cross, so nothing is averaged, and one step lands where many steps do."""


def mixture_velocity(starts: Tensor, ends: Tensor) -> Velocity:
    """The best velocity of equally likely pairs of Gaussians: centres (P, 2) at t = 0 and t = 1."""

    def velocity(x: Tensor, t: Tensor, context=None) -> Tensor:
        t = t[:, None, None]  # against pairs and coordinates
        ratio = (1 - t) ** 2 + t**2
        offset = x[:, None] - torch.lerp(starts, ends, t)  # (B, P, 2)
        likelihood = (offset.square() / (-2 * STD**2 * ratio)).sum(2, keepdim=True).softmax(1)
        expected = ends - starts + (2 * t - 1) / ratio * offset
        return (likelihood * expected).sum(1)

    return velocity


@functools.cache
def centres(coupling: str) -> tuple[Tensor, Tensor]:
    """Centres of the pairs at t = 0 and t = 1: (4, 2) each for random pairs, (2, 2) reflowed."""
    if coupling == "random pairs":
        return NOISES.repeat_interleave(2, dim=0), TARGETS.repeat(2, 1)
    *_, ends = euler(mixture_velocity(*centres("random pairs")), NOISES, 1000)
    return NOISES, ends


def describe_landing(coupling: str, steps: int) -> str:
    """Where Euler steps lead from A and from B, as Markdown."""
    *_, ends = euler(mixture_velocity(*centres(coupling)), NOISES, steps)
    places = []
    for start, end in zip("AB", ends):
        distance = (TARGETS - end).norm(dim=1).min().item()
        verdict = "on a target" if distance < STD else f"{distance:.2f} from the nearest target"
        places.append(f"From {start} to ({end[0]:+.2f}, {end[1]:+.2f}): **{verdict}**.")
    return " ".join(places)


def two_points_figure(coupling: str, steps: int) -> Figure:
    """Left: the pairs' lines and their average velocity. Right: Euler's paths, and their ends."""
    starts, ends = centres(coupling)
    velocity = mixture_velocity(starts, ends)
    figure = Figure(figsize=(10.5, 5.6), dpi=110, layout="constrained")
    field, flow = figure.subplots(1, 2)
    for axis in (field, flow):
        axis.set(xlim=(-1.75, 1.75), ylim=(-1.7, 1.7), aspect="equal", xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_color("0.8")
        axis.scatter(*torch.cat([NOISES, TARGETS]).T, s=900, color="0.91", zorder=0)
        for (x, y), letter in zip([*NOISES.tolist(), *TARGETS.tolist()], "ABPQ"):
            axis.text(x + (0.4 if x > 0 else -0.4), y, letter, size=15, ha="center", va="center")

    field.set_title("lines of the pairs, and the average velocity (arrows)")
    for start, end in zip(starts, ends):
        color = COLORS[int(start[1] < 0)]
        field.plot(*torch.stack([start, end]).T, color=color, linewidth=6, alpha=0.25)
    x, y = torch.meshgrid(torch.linspace(-1, 1, 9), torch.linspace(-1.25, 1.25, 11), indexing="ij")
    points = torch.stack([x, y], dim=2).flatten(0, 1)
    arrows = velocity(points, (points[:, 0] + 1) / 2)  # every line reaches x at t = (x + 1) / 2
    field.quiver(*points.T, *arrows.T, color="0.25", angles="xy", scale=34, width=0.004)

    flow.set_title(f"{steps} Euler step{'s' * (steps > 1)} from noise to data (✖: of A and B)")
    noises = NOISES.repeat(40, 1) + STD * torch.randn(80, 2, generator=torch.manual_seed(0))
    for clouds, width, alpha in ((noises, 0.7, 0.35), (NOISES, 2.2, 1.0)):
        states = torch.stack(list(euler(velocity, clouds, steps)))  # (steps + 1, B, 2)
        for k, path in enumerate(states.unbind(1)):
            flow.plot(*path.T, color=COLORS[k % 2], linewidth=width, alpha=alpha)
            flow.scatter(*path[-1:].T, color=COLORS[k % 2], s=10, alpha=alpha, zorder=3)
    for path, color in zip(states.unbind(1), COLORS):  # of A and B themselves
        flow.scatter(*path[:-1].T, color=color, s=22, zorder=4)
        flow.scatter(*path[-1:].T, color="black", marker="X", s=110, zorder=5)
    return figure
