"""FreeFlow's predictor: learn where a path leads from its noise alone, without any image.

    x = X0 + d u(X0, 0, d)                the student's own prediction of the point at time d
    y = the teacher's step from x, at d, to e = d + 0.05
    min_u  E ‖u(X0, 0, e) - (y - X0) / e‖²          e ~ U[0.064, 1]

u(X0, 0, d) is the path's mean velocity up to time d. The student predicts a point, the teacher
takes one step from there, and the student learns to predict where that step ends. This is the
path's own equation, dF/dt = v(F, t). It needs prompts and noise, but no pairs and no data. Its
errors accumulate along the path; the paper's second half, a corrector, undoes them and is not
implemented.

Differs from the paper: Stable Diffusion has no velocity before t = 0.064. Like a sampler, the
teacher starts there from the noise, in each step to e < 0.114.

FreeFlow, arXiv 2511.19428.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.steps import FIRST_TIME, onto_schedule, step
from rectified_flow import Velocity, broadcast_over, squared

STRIDE = 0.05  # of the teacher's step, in time


def draw(count: int, generator: torch.Generator) -> tuple[Tensor]:
    """The times e, (count,), at which the teacher's step ends; none before its schedule begins."""
    return (1 - (1 - FIRST_TIME) * torch.rand(count, generator=generator),)


def loss(
    student: Callable, x0: Tensor, x1: Tensor, context, e: Tensor, *, teacher: Velocity,
    target: Callable, diffusion: bool = True,
) -> Tensor:
    """(B,). x1 is not used; student and target: u(x, t, until, context).

    diffusion: whether the teacher is a diffusion, whose path begins at t = 0.064.
    """
    start = torch.zeros_like(e)
    d = torch.where(e - STRIDE > FIRST_TIME, e - STRIDE, 0.0)
    with torch.no_grad():
        x = x0 + broadcast_over(d, x0) * target(x0, start, d, context)
        x, since = onto_schedule(x, d) if diffusion else (x, d)
        y = step(teacher, x, since, e, context)
    return squared(student(x0, start, e, context), (y - x0) / broadcast_over(e, x0))
