"""Progressive distillation: one step learns what two steps do, then again, until one is left.

    y = the teacher's two steps of 1 / 2N from X_t      X_t = (1 - t) X0 + t X1, t = i / N
    min_v  E max(t², (1 - t)²) ‖v(X_t, t) - (y - X_t) N‖²

with N = 8, 4, 2, 1; the student of a round is the teacher of the next. The target velocity is the
mean of two velocities of the teacher, so a round costs two of its passes; guidance is learned in
the first. The weight is the paper's truncated signal-to-noise ratio, in this form.

Differs from the paper: X1 are the teacher's own pictures and not data; the student predicts a
velocity, as all students of this project that shall step from t = 0; a round ends with averaged
weights, which the falling rate brings close to the last ones.

Salimans & Ho 2022 (arXiv 2202.00512), algorithm 2; on Stable Diffusion Meng et al. 2022
(2210.03142).
"""

import torch
from torch import Tensor

from fewstep.steps import onto_schedule, step
from rectified_flow import Velocity, interpolate, like, squared

ROUNDS = (8, 4, 2, 1)


def draw(count: int, generator: torch.Generator) -> tuple[Tensor]:
    """A place among the steps, in [0, 1): that of a round of N is its Nth part that it falls in."""
    return (torch.rand(count, generator=generator),)


def two_steps(teacher: Velocity, x: Tensor, t: Tensor, m: Tensor, u: Tensor, context) -> Tensor:
    """Where the teacher leads from t to m to u, (B,) each."""
    return step(teacher, step(teacher, x, t, m, context), m, u, context)


def loss(
    student: Velocity, x0: Tensor, x1: Tensor, context, place: Tensor, *, teacher: Velocity,
    steps: int, diffusion: bool,
) -> Tensor:
    """(B,). x0: noise that is not x1's own; steps: N.

    diffusion: the teacher is one, whose path begins at t = 0.064.
    """
    t = (place * steps).floor() / steps
    u = t + 1 / steps
    x = interpolate(x0, x1, t)
    with torch.no_grad():
        begun, since = onto_schedule(x, t) if diffusion else (x, t)
        middle = (since + u.to(since)) / 2
        y = two_steps(teacher, begun, since, middle, u, context)
    weight = torch.maximum(t.square(), (1 - t).square())
    return weight * squared(student(x, t, context), (y - x) / like(u - t, x))
