"""The method in a hundred lines: two noises, two targets, crossing lines, reflow, one step.

    python toy/first.py          seconds; prints where one step lands, and saves runs/first.png

Noise is t = 0, data is t = 1. Two noises A, B and two targets P, Q, paired at random:

    A ──────── P      Each noise meets each target half of the time, so four lines are equally
      ╲      ╱        likely: A→P and B→Q with velocity (2, 0), A→Q with (2, -2), B→P with (2, 2).
        ╲  ╱          The best velocity at a point is the average over the lines through it:
        ╱  ╲          at A, t = 0:        ½ (2, 0) + ½ (2, -2) = (2, -1)
      ╱      ╲        at (0, 0), t = ½:   ½ (2, -2) + ½ (2, 2) = (2, 0), the crossing
    B ──────── Q      One Euler step from A ends at (1, 0), neither P nor Q: a blur.

Many small steps follow paths that bend and do not cross: A ends at P, and B at Q, a new pairing.
Learn again on the new pairs (reflow): two parallel lines, one velocity (2, 0), and one step from A
lands on P.

Points are narrow Gaussians here, so the best velocity E[X1 - X0 | X_t] has a closed form and
nothing is trained. Liu et al. 2022 (arXiv 2209.03003), Liu et al. 2023 (InstaFlow, 2309.06380).
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

NOISES = torch.tensor([[-1.0, 1.0], [-1.0, -1.0]])  # A, B
TARGETS = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # P, Q
WIDTH = 0.15  # standard deviation of the Gaussians around them


def best_velocity(pairs):
    """The average velocity E[X1 - X0 | X_t = x] of equally likely pairs of Gaussians."""
    def velocity(x, t):  # x (B, 2), t a number
        spread = (1 - t) ** 2 + t**2  # variance of X_t around the line, in WIDTH²
        velocities, weights = [], []
        for x0, x1 in pairs:
            offset = x - ((1 - t) * x0 + t * x1)  # (B, 2)
            velocities.append(x1 - x0 + (2 * t - 1) / spread * offset)  # on this line
            weights.append(-offset.square().sum(1) / (2 * WIDTH**2 * spread))  # its log-likelihood
        weights = torch.stack(weights).softmax(0)[..., None]  # (pairs, B, 1)
        return (weights * torch.stack(velocities)).sum(0)

    return velocity


def euler(velocity, x, steps):
    """All states from noise to data: (steps + 1, B, 2)."""
    states = [x]
    for k in range(steps):
        states.append(states[-1] + velocity(states[-1], k / steps) / steps)
    return torch.stack(states)


square_length = lambda pairs: sum((b - a).square().sum().item() for a, b in pairs) / len(pairs)
# Random pairs and their best velocity; the pairs of its flow, and their best velocity: reflow.
first_pairs = [(x0, x1) for x0 in NOISES for x1 in TARGETS]
first = best_velocity(first_pairs)
ends = euler(first, NOISES, 1000)[-1]
second_pairs = list(zip(NOISES, ends))
second = best_velocity(second_pairs)

blur, sharp = euler(first, NOISES, 1)[-1], euler(second, NOISES, 1)[-1]
show = lambda points: "  ".join(f"({x:+.2f}, {y:+.2f})" for x, y in points.tolist())
print(f"                                        from A          from B\n"
      f"random pairs, one Euler step:       {show(blur)}\n"
      f"random pairs, 1000 Euler steps:     {show(ends)}\n"
      f"after reflow, one Euler step:       {show(sharp)}\n"
      f"mean squared length of a pair:      {square_length(first_pairs):.2f} at random, "
      f"{square_length(second_pairs):.2f} after reflow")

# The figure.
torch.manual_seed(0)
noises = NOISES.repeat(30, 1) + WIDTH * torch.randn(60, 2)
figure = Figure(figsize=(13, 3.5), layout="constrained")
lines, field, *flows = figure.subplots(1, 4)
for axis in (lines, field, *flows):
    axis.set(xlim=(-1.8, 1.8), ylim=(-1.8, 1.8), aspect="equal", xticks=[], yticks=[])
    for points, letters, shift in ((NOISES, "AB", -0.5), (TARGETS, "PQ", 0.35)):
        axis.scatter(*points.T, s=300, color="0.85")
        for (x, y), letter in zip(points.tolist(), letters):
            axis.text(x + shift, y, letter, fontsize=13, va="center")
lines.set_title("random pairs: lines cross")
for x0, x1 in first_pairs:
    lines.annotate("", x1, x0, arrowprops={"arrowstyle": "->", "color": "tab:blue"})
field.set_title("their average, and one step: blur")
for t in torch.linspace(0, 1, 9).tolist():  # where the lines are at that time
    x = torch.stack([torch.full((13,), 2 * t - 1), torch.linspace(-1.2, 1.2, 13)], dim=1)
    field.quiver(*x.T, *first(x, t).T, color="tab:blue", angles="xy", scale=36, width=0.004)
for axis, velocity in zip(flows, (first, second)):
    axis.set_title("its flow: bent" if velocity is first else "after reflow: straight")
    for k, path in enumerate(euler(velocity, noises, 200).unbind(1)):  # from A and B in turn
        axis.plot(*path.T, color=("tab:orange", "tab:brown")[k % 2], linewidth=0.6)
for axis, step in zip((field, *flows), (blur, blur, sharp)):
    for start, end in zip(NOISES, step):
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "black"})
figure.supxlabel("orange: from around A; brown: from around B; black: one step", fontsize=9)
Path("runs").mkdir(exist_ok=True)
figure.savefig("runs/first.png", dpi=150)
print("runs/first.png")
