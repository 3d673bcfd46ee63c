"""PeRFlow: straighten the path window by window, from pictures, without whole paths.

    windows  the schedule in K = 4 parts, [a, b] one of them
    X_a = (1 - a) X0 + a X1      X1 a picture, X0 fresh noise
    X_b = the teacher's 8 steps from X_a
    min_v  E ‖v(X_t, t) - (X_b - X_a) / (b - a)‖²      X_t on the line between, t ~ U[a, b]

The path of a diffusion is bent as a whole, and little of it within a window. So the student needs
no path from noise to data, at 50 passes a pair as reflow does, but only a window of a noised
picture; a step a window then draws. One window of a flow from t = 0 is reflow, whose X1 the teacher
makes. Four windows have no one-step mode.

Differs from the paper: pictures are the teacher's own (the pairs' X1), not a data set's; official
code draws the line in Stable Diffusion's x_s and not in X; and the teacher's guidance is learned
into the student, without dropped prompts.

Yan et al. 2024 (arXiv 2405.07510), sections 3.1 and 3.2.
"""

import torch
from torch import Tensor

from fewstep.steps import at, walk
from rectified_flow import Velocity, interpolate, like, squared

WINDOWS = 4
TEACHER_STEPS = 8  # within a window, as in official code


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A window and a place in it, (count,) each."""
    window = torch.randint(WINDOWS, (count,), generator=generator)
    return window, torch.rand(count, generator=generator)


def loss(
    student: Velocity, x0: Tensor, x1: Tensor, context, window: Tensor, place: Tensor, *,
    teacher: Velocity, windows: int = WINDOWS,
) -> Tensor:
    """(B,), of the velocity in a window. x0: noise that is not x1's own."""
    start, stop = window / windows, (window + 1) / windows
    a, b, place = at(start), at(stop), place.cpu().double()
    xa = interpolate(x0, x1, a)
    with torch.no_grad():
        xb = walk(teacher, xa, start, stop, TEACHER_STEPS, context)
    x = interpolate(xa, xb, place)
    t = torch.lerp(a, b, place).to(x.dtype).to(x.device)
    return squared(student(x, t, context), (xb - xa) / like(b - a, x))
