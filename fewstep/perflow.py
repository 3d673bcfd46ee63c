"""PeRFlow: straighten the path window by window, from images, without whole paths.

    windows  the schedule in K = 4 equal parts, [a, b] is one of them
    X_a = (1 - a) X0 + a X1      X1 an image's latent, X0 fresh noise
    X_b = the teacher's 8 steps from X_a
    min_v  E t² ‖v(X_t, t) - (X_b - X_a) / (b - a)‖²      X_t on the line between, t ~ U[a, b]

A diffusion's path is bent as a whole but nearly straight within a window. Reflow needs a whole path
for each pair, 50 forward passes; PeRFlow needs one window from a noised image. The student then
takes one step per window. With one window of a flow from t = 0, this is reflow on the teacher's X1.
Four windows have no one-step mode.

t² makes this the squared error of the noise ε̂ = X_t - t v, as published; without it, an error at
t = 0.064 would count 244 times. Two later ideas are options of the loss. FlowSteer starts a window
on the teacher's own path from noise, where a sampler arrives. ProReflow halves the windows in
rounds, each with the last round's student as teacher, and adds the angle between v and its target.

Differs from the paper: the images are the teacher's own (X1 of the pairs), not a dataset's; the
official code draws the line in Stable Diffusion's x_s, not in X, and predicts the window's own
noise, x_a = γ x_b + √(1 - γ²) ε; the teacher's guidance is distilled without caption dropout.
compare.py has a row with the published guidance.

Yan et al. 2024 (arXiv 2405.07510), sections 3.1 and 3.2; FlowSteer, 2511.18834; Ke et al. 2025
(ProReflow, 2503.04824).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import diffusion_start
from fewstep.steps import SCHEDULE, euler_steps, schedule_time
from rectified_flow import Velocity, broadcast_over, interpolate, squared

WINDOWS = 4
TEACHER_STEPS = 8  # within a window, as in the official code
LEAD_STEPS = 2  # for each window before a FlowSteer start: 8 in all, as for the pairs
DROPOUT = 0.1  # of captions, in the official code's --support_cfg
COSINE_WEIGHT = 0.1  # a, ours: ProReflow's could not be read


def draw(count: int, generator: torch.Generator) -> tuple[Tensor]:
    """A fraction of the schedule, (count,): it says which window, and where in it."""
    return (torch.rand(count, generator=generator),)


def loss(
    student: Velocity, x0: Tensor, x1: Tensor, context, fraction: Tensor, *, teacher: Velocity,
    windows: int = WINDOWS, steps: int = TEACHER_STEPS, on_path: bool = False, cosine: float = 0.0,
) -> Tensor:
    """(B,), of the noise in a window. x0: fresh noise, not x1's own; x1 is not used with on_path.

    on_path: start on the teacher's path. cosine: the weight a of the angle.
    """
    window = (fraction * windows).floor()
    start, stop = window / windows, (window + 1) / windows
    a, b, position = schedule_time(start), schedule_time(stop), (fraction * windows - window).cpu()
    with torch.no_grad():
        if on_path:
            xa = diffusion_start(x0, SCHEDULE)
            xa = euler_steps(teacher, xa, start * 0, start, LEAD_STEPS * window, context)
        else:
            xa = interpolate(x0, x1, a)
        xb = euler_steps(teacher, xa, start, stop, steps, context)
    x = interpolate(xa, xb, position)
    t = torch.lerp(a, b, position.double()).to(x.dtype).to(x.device)
    v, wanted = student(x, t, context), (xb - xa) / broadcast_over(b - a, x)
    angle = 1 - F.cosine_similarity(v.flatten(1), wanted.flatten(1))
    return t.square() * squared(v, wanted) + cosine * angle
