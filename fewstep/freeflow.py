"""FreeFlow's predictor: learn where a path leads from its noise alone, without any picture.

    x = X0 + d u(X0, 0, d)                the student's own place at time d
    y = the teacher's step from x, at d, to e = d + 0.05
    min_u  E ‖u(X0, 0, e) - (y - X0) / e‖²          e ~ U[0.064, 1]

u(X0, 0, d) is the mean velocity of the first stretch of the path, up to time d. The student walks
ahead, the teacher says how to go on from there, and the student learns to have been there: dF/dt =
v(F, t), the path's own equation. It needs prompts and noise, so no pairs and no data. Its errors
grow along the path, which the paper's second half, a corrector, undoes; that is not made here.

Differs from the paper: Stable Diffusion has no velocity before t = 0.064, so its path is taken up
there, as samplers do, and a step to e < 0.114 starts there from the noise.

FreeFlow, arXiv 2511.19428.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.steps import FIRST, onto_schedule, step
from rectified_flow import Velocity, like, squared

STRIDE = 0.05


def draw(count: int, generator: torch.Generator) -> tuple[Tensor]:
    """The times e, (count,), where the teacher's step ends: none before its schedule begins."""
    return (1 - (1 - FIRST) * torch.rand(count, generator=generator),)


def loss(
    student: Callable, x0: Tensor, x1: Tensor, context, e: Tensor, *, teacher: Velocity,
    target: Callable, diffusion: bool = True,
) -> Tensor:
    """(B,). x1 is not asked; student and target: u(x, t, until, context).

    diffusion: the teacher is one, whose path begins at t = 0.064.
    """
    start = torch.zeros_like(e)
    d = torch.where(e - STRIDE > FIRST, e - STRIDE, 0.0)
    with torch.no_grad():
        x = x0 + like(d, x0) * target(x0, start, d, context)
        x, since = onto_schedule(x, d) if diffusion else (x, d)
        y = step(teacher, x, since, e, context)
    return squared(student(x0, start, e, context), (y - x0) / like(e, x0))
