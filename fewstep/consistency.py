"""Consistency: from every point of a path, one step to its end must give the same image.

    X_t  an image X1 with fresh noise        y  a little later on the teacher's path, at time u
    LCM      min_v  E H(end(X_t, t), end'(y, u))         end(X_t, t) = X_t + (1 - t) v(X_t, t)

The later point predicts the end better, so it is the target. end' is the EMA network, without
gradients; at the data it is the image itself. y is one guided step of the teacher, 1 / 48 of its
schedule, so what is learned at the data propagates to the noise. H is pseudo-Huber. Sampling in
several steps: predict the end, add new noise up to the next time, predict again.

    MLCM     first within 8 segments of the path, to the segment's end e. The jump from t to e is
             X_t + (e - t) v(X_t, t):    min_v  E ‖jump(X_t, t → e) - jump'(y, u → e)‖²
             then with X_t on the segments' edges alone, y a whole segment later, and e = 1

The teacher's own steps lead from noise to X_t. In the second part, X_t is the student's own sample
in four steps, with new noise up to the edge. So MLCM needs no images. Its target is the network
itself.

    SCott    LCM, with y after three steps that renew some noise, over 24 of 1000 timesteps:
             X_u = u x1 + (1 - u) (√(1 - ρ²) x0 + ρ z),  x1 and x0 as v predicts them at X_t,
             ρ = η √(1 - (r_t / r_u)²),  r = t / (1 - t),  η = 0.2

SCott adds a critic's loss (critic.py).

Differs from the papers: the images are the teacher's own; the guidance scale is fixed, as in
LCM-LoRA (LCM gives the network a random one); the EMA network is the training loop's own; MLCM
trains all weights, not a LoRA, without the paper's losses by latent LPIPS, preferences,
distribution matching (DMD) and a GAN.

Luo et al. 2023 (LCM, arXiv 2310.04378); Xie et al. 2024 (MLCM, 2406.05768); Liu et al. 2024
(SCott, 2403.01505).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion import diffusion_start
from fewstep.steps import (
    SCHEDULE, elementwise_huber, end, euler_steps, noisy_step, schedule_time, step,
)
from rectified_flow import Distance, Velocity, interpolate, squared

# Teacher steps from noise to data. The paper's 50, but divisible: 2, 4 and 8 steps of the student
# begin at trained times.
GRID = 48
SEGMENTS = 8
GAP = 1 / GRID
SAMPLE_STEPS, EDGE_STEPS = 4, 3  # TLCM, algorithm 2: of a sample, and of the teacher in a segment
ETA, NOISY_STEPS, NOISY_GAP = 0.2, 3, 0.024


def same_end(
    student: Velocity, target: Velocity, x: Tensor, t: Tensor, y: Tensor, u: Tensor, context,
    distance: Distance = elementwise_huber,
) -> Tensor:
    """D(end(x, t), end'(y, u)): (B,). At the data, u = 1, the second end is y itself."""
    with torch.no_grad():
        goal = end(target, y, u, context)
    return distance(end(student, x, t, context), goal)


def draw_lcm(count: int, generator: torch.Generator) -> tuple[Tensor]:
    """A step of the grid, (count,)."""
    return (torch.randint(GRID, (count,), generator=generator),)


def lcm(
    student: Velocity, x0: Tensor, x1: Tensor, context, index: Tensor, *, teacher: Velocity,
    target: Velocity,
) -> Tensor:
    """(B,). x0: fresh noise, not x1's own; target: the EMA of the student."""
    t, u = schedule_time(index / GRID), schedule_time((index + 1) / GRID)
    x = interpolate(x0, x1, t)
    with torch.no_grad():
        y = step(teacher, x, t, u, context)
    return same_end(student, target, x, t, y, u, context)


def noises_of(seeds: Tensor, count: int, x: Tensor) -> Tensor:
    """(B, count, ...): for each seed as many noises of the shape of x's samples."""
    return torch.stack([
        torch.randn(count, *x.shape[1:], generator=torch.Generator().manual_seed(seed))
        for seed in seeds.tolist()
    ]).to(x)


def draw_mlcm(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A segment, a position in it in [0, 1) and a seed of the new noises, (count,) each."""
    segment = torch.randint(SEGMENTS, (count,), generator=generator)
    position = torch.rand(count, generator=generator)
    return segment, position, torch.randint(2**62, (count,), generator=generator)


def mlcm_segments(
    student: Velocity, x0: Tensor, x1: Tensor, context, segment: Tensor, position: Tensor,
    seeds: Tensor, *, teacher: Velocity, target: Velocity,
) -> Tensor:
    """(B,), the first part of MLCM. x1 and seeds are not used; target: the student.

    The weight makes it the published error of x_s = (α + σ) X, since α + σ = 1 / √(e² + (1 - e)²).
    """
    last = (segment + 1) / SEGMENTS
    here = segment / SEGMENTS + position * (1 / SEGMENTS - GAP)
    t, u, e = schedule_time(here), schedule_time(here + GAP), schedule_time(last)
    with torch.no_grad():
        noise = diffusion_start(x0, SCHEDULE)
        x = euler_steps(teacher, noise, here * 0, here, segment + 1, context)
        y = step(teacher, x, t, u, context)
        goal = step(target, y, u, e, context)
    scale = (e**2 + (1 - e) ** 2).to(x)
    return squared(step(student, x, t, e, context), goal) / scale


def sample_in_steps(velocity: Velocity, x0: Tensor, context, noises: Tensor) -> Tensor:
    """A sample in four steps, (B, ...): predict the end, add new noise up to the next time, repeat.

    noises (B, 3 or more, ...): the new ones.
    """
    x = diffusion_start(x0, SCHEDULE)
    for k in range(SAMPLE_STEPS):
        t = schedule_time(torch.full((len(x),), k / SAMPLE_STEPS))
        x = end(velocity, interpolate(noises[:, k - 1], x, t) if k else x, t, context)
    return x


def mlcm_edges(
    student: Velocity, x0: Tensor, x1: Tensor, context, segment: Tensor, position: Tensor,
    seeds: Tensor, *, teacher: Velocity, target: Velocity,
) -> Tensor:
    """(B,), the second part: from a segment's edge, y three teacher steps later, both to the end.

    x1 and position are not used. TLCM, algorithm 2.
    """
    here, later = segment / SEGMENTS, (segment + 1) / SEGMENTS
    t, u = schedule_time(here), schedule_time(later)
    with torch.no_grad():
        noises = noises_of(seeds, SAMPLE_STEPS, x0)
        x = interpolate(noises[:, -1], sample_in_steps(target, x0, context, noises), t)
        y = euler_steps(teacher, x, here, later, EDGE_STEPS, context)
    return same_end(student, target, x, t, y, u, context, squared)


def draw_scott(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A fraction of the schedule, a seed of noises, a fraction for the critic, (count,) each."""
    fraction = torch.rand(count, generator=generator)
    seeds = torch.randint(2**62, (count,), generator=generator)
    return fraction, seeds, torch.rand(count, generator=generator)


def scott(
    student: Velocity, x0: Tensor, x1: Tensor, context, fraction: Tensor, seeds: Tensor,
    place: Tensor, *, teacher: Velocity, target: Velocity, eta: float = ETA,
    steps: int = NOISY_STEPS, critic: Callable | None = None,
) -> Tensor:
    """(B,). As `lcm`; with eta 0, one step and no critic it is LCM without the grid.

    critic(fake, real, context, place, noise): (B,), `critic.adversarial_loss` of given networks.
    """
    t = schedule_time(fraction)
    x = interpolate(x0, x1, t)
    noises = noises_of(seeds, steps + 1, x)
    with torch.no_grad():
        y, u = x, t
        for k in range(steps):
            now, u = u, schedule_time(fraction + NOISY_GAP * (k + 1) / steps)  # 1 beyond the end
            y = noisy_step(teacher, y, now, u, context, eta, noises[:, k])
        goal = end(target, y, u, context)
    predicted = end(student, x, t, context)
    loss = elementwise_huber(predicted, goal)
    return loss + critic(predicted, x1, context, place, noises[:, -1]) if critic else loss
