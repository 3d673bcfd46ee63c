"""PeRFlow: straighten the path window by window, from images, without whole paths.

    windows  the schedule in K = 4 equal parts, [a, b] is one of them
    X_a = (1 - a) X0 + a X1      X1 an image's latent, X0 fresh noise
    X_b = the teacher's 8 steps from X_a
    min_v  E ‖v(X_t, t) - (X_b - X_a) / (b - a)‖²      X_t on the line between, t ~ U[a, b]

A diffusion's path is bent as a whole but nearly straight within a window. Reflow needs a whole path
for each pair, 50 forward passes; PeRFlow needs one window from a noised image. The student then
takes one step per window. With one window of a flow from t = 0, this is reflow on the teacher's X1.
Four windows have no one-step mode.

Differs from the paper: the images are the teacher's own (X1 of the pairs), not a dataset's; the
official code draws the line in Stable Diffusion's x_s, not in X; the teacher's guidance is
distilled without caption dropout.

Yan et al. 2024 (arXiv 2405.07510), sections 3.1 and 3.2.
"""

import torch
from torch import Tensor

from fewstep.steps import euler_steps, schedule_time
from rectified_flow import Velocity, broadcast_over, interpolate, squared

WINDOWS = 4
TEACHER_STEPS = 8  # within a window, as in the official code


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A window and a position in it in [0, 1), (count,) each."""
    window = torch.randint(WINDOWS, (count,), generator=generator)
    return window, torch.rand(count, generator=generator)


def loss(
    student: Velocity, x0: Tensor, x1: Tensor, context, window: Tensor, position: Tensor, *,
    teacher: Velocity, windows: int = WINDOWS,
) -> Tensor:
    """(B,), of the velocity in a window. x0: fresh noise, not x1's own."""
    start, stop = window / windows, (window + 1) / windows
    a, b, position = schedule_time(start), schedule_time(stop), position.cpu().double()
    xa = interpolate(x0, x1, a)
    with torch.no_grad():
        xb = euler_steps(teacher, xa, start, stop, TEACHER_STEPS, context)
    x = interpolate(xa, xb, position)
    t = torch.lerp(a, b, position).to(x.dtype).to(x.device)
    return squared(student(x, t, context), (xb - xa) / broadcast_over(b - a, x))
