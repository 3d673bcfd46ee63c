"""Progressive distillation: one step learns what two steps do, again and again, down to one step.

    y = the teacher's two steps of 1 / 2N from X_t      X_t = (1 - t) X0 + t X1, t = i / N
    min_v  E max(t², (1 - t)²) ‖v(X_t, t) - (y - X_t) N‖²

with N = 8, 4, 2, 1. The student of a round is the teacher of the next. The target velocity is the
mean of two teacher velocities, so a sample costs two teacher passes. The first round distills the
guidance too. The weight is the paper's truncated signal-to-noise ratio in these coordinates.

Differs from the paper: X1 are the teacher's own images, not data; the student predicts velocity,
like every student here that steps from t = 0; a round ends with the averaged weights, which the
decaying learning rate brings close to the last ones.

Salimans & Ho 2022 (arXiv 2202.00512), algorithm 2; on Stable Diffusion, Meng et al. 2022
(2210.03142).
"""

import torch
from torch import Tensor

from fewstep.steps import onto_schedule, step
from rectified_flow import Velocity, broadcast_over, interpolate, squared

ROUNDS = (8, 4, 2, 1)  # steps of each round's student


def draw(count: int, generator: torch.Generator) -> tuple[Tensor]:
    """A position in [0, 1), (count,). The loss rounds it down to a multiple of 1 / N."""
    return (torch.rand(count, generator=generator),)


def two_steps(teacher: Velocity, x: Tensor, t: Tensor, m: Tensor, u: Tensor, context) -> Tensor:
    """The teacher's steps from times t to m to u, (B,) each."""
    return step(teacher, step(teacher, x, t, m, context), m, u, context)


def loss(
    student: Velocity, x0: Tensor, x1: Tensor, context, position: Tensor, *, teacher: Velocity,
    steps: int, diffusion: bool,
) -> Tensor:
    """(B,). x0: fresh noise, not x1's own; steps: N.

    diffusion: whether the teacher is a diffusion, whose path begins at t = 0.064.
    """
    t = (position * steps).floor() / steps
    u = t + 1 / steps
    x = interpolate(x0, x1, t)
    with torch.no_grad():
        start, since = onto_schedule(x, t) if diffusion else (x, t)
        middle = (since + u.to(since)) / 2
        y = two_steps(teacher, start, since, middle, u, context)
    weight = torch.maximum(t.square(), (1 - t).square())
    return weight * squared(student(x, t, context), (y - x) / broadcast_over(u - t, x))
