"""Progressive distillation: one step learns what two steps do, again and again, down to one step.

    y = the teacher's two steps from X_t to time u      X_t = (1 - t) X0 + t X1
    min_v  E max(t², (1 - t)²) ‖v(X_t, t) - (y - X_t) / (u - t)‖²

with t and u the neighbours among the times of a sampler of N steps, for N = 8, 4, 2, 1. The student
of a round is the teacher of the next. As published, it begins as a copy of its teacher, and so it
predicts noise, v = (X_t - ε̂) / t; the paper's teachers predict the data or a velocity. A sample
costs two teacher passes. The first round distills the guidance too. The weight is the paper's
truncated signal-to-noise ratio in these coordinates.

With `times` for a flow, the student predicts a velocity from t = 0; compare.py has this as a row.
The first round then converts noise prediction to velocity prediction, besides distilling.

Differs from the paper: X1 are the teacher's own images, not data; a round ends with the averaged
weights, which the decaying learning rate brings close to the last ones.

Salimans & Ho 2022 (arXiv 2202.00512), algorithm 2; on Stable Diffusion, Meng et al. 2022
(2210.03142).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.steps import onto_schedule, schedule_time, step
from rectified_flow import Velocity, broadcast_over, interpolate, squared

ROUNDS = (8, 4, 2, 1)  # steps of each round's student


def draw(count: int, generator: torch.Generator) -> tuple[Tensor]:
    """A position in [0, 1), (count,). The loss rounds it down to the start of one of N steps."""
    return (torch.rand(count, generator=generator),)


def two_steps(teacher: Velocity, x: Tensor, t: Tensor, m: Tensor, u: Tensor, context) -> Tensor:
    """The teacher's steps from times t to m to u, (B,) each."""
    return step(teacher, step(teacher, x, t, m, context), m, u, context)


def loss(
    student: Velocity, x0: Tensor, x1: Tensor, context, position: Tensor, *, teacher: Velocity,
    steps: int, diffusion: bool, times: Callable = schedule_time,
) -> Tensor:
    """(B,). x0: fresh noise, not x1's own; steps: N; times(fraction): t; of a flow, the fraction.

    diffusion: whether the teacher is a diffusion, whose path begins at t = 0.064.
    """
    index = (position * steps).floor()
    t, middle, u = (times((index + part) / steps).cpu().double() for part in (0, 0.5, 1))
    x = interpolate(x0, x1, t)
    with torch.no_grad():
        start, since = onto_schedule(x, t) if diffusion else (x, t)
        # A flow's first step contains the whole of t < 0.064.
        y = two_steps(teacher, start, since, torch.maximum(middle, since), u, context)
    weight = torch.maximum(t.square(), (1 - t).square()).to(x.dtype).to(x.device)
    v = student(x, t.to(x.dtype).to(x.device), context)
    return weight * squared(v, (y - x) / broadcast_over(u - t, x))
