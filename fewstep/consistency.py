"""Consistency: from every point of a path, one look at its end must see the same picture.

    X_t  a picture X1 with fresh noise       y  a little later on the teacher's path, at time u
    LCM      min_v  E H(end(X_t, t), end'(y, u))         end(X_t, t) = X_t + (1 - t) v(X_t, t)

The later point sees better, so it is the target: `end'` is the averaged network, without gradient;
at the data it is the picture itself. y is one guided step of the teacher, 1 / 48 of its schedule,
so what was learned at the data flows back to the noise. H is pseudo-Huber. To draw in several
steps: look at the end, mix new noise in up to the next time, look again.

    MLCM     first within 8 segments of the path, to the segment's end e, the jump from t to e
             being X_t + (e - t) v(X_t, t):    min_v  E ‖jump(X_t, t → e) - jump'(y, u → e)‖²
             then with X_t on the segments' edges alone, y a whole segment on, and e = 1

X_t comes there from noise by the teacher's own steps, so no pictures are asked for, and the target
is the network itself.

    SCott    LCM whose y comes from three steps with some noise renewed, over 24 of 1000 timesteps:
             X_u = u x1 + (1 - u) (√(1 - ρ²) x0 + ρ z),  x1 and x0 the ends that v sees from X_t,
             ρ = η √(1 - (r_t / r_u)²),  r = t / (1 - t),  η = 0.2

Differs from the papers: pictures are the teacher's own; guidance is fixed (LCM-LoRA's way; LCM
feeds a random one to the network); the averaged network is the loop's own average; SCott's second
half, a critic, is left out, so here it asks whether the noise helps.

Luo et al. 2023 (LCM, arXiv 2310.04378); Xie et al. 2024 (MLCM, 2406.05768); Liu et al. 2024
(SCott, 2403.01505).
"""

import torch
from torch import Tensor

from diffusion import diffusion_start
from fewstep.steps import SCHEDULE, at, end, huber_each, noisy_step, step, walk
from rectified_flow import Distance, Velocity, interpolate, squared

# Steps of the teacher from noise to data: the paper's 50, but such that 2, 4 and 8 steps of the
# student begin at times that were trained.
GRID = 48
SEGMENTS = 8
GAP = 1 / GRID
ETA, NOISY_STEPS, NOISY_GAP = 0.2, 3, 0.024


def same_end(
    student: Velocity, target: Velocity, x: Tensor, t: Tensor, y: Tensor, u: Tensor, context,
    distance: Distance = huber_each,
) -> Tensor:
    """D(end(x, t), end'(y, u)): (B,). At the data, u = 1, the second is y itself."""
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
    """(B,). x0: noise that is not x1's own; target: the averaged student."""
    t, u = at(index / GRID), at((index + 1) / GRID)
    x = interpolate(x0, x1, t)
    with torch.no_grad():
        y = step(teacher, x, t, u, context)
    return same_end(student, target, x, t, y, u, context)


def draw_mlcm(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A segment, and a place in it, (count,) each."""
    segment = torch.randint(SEGMENTS, (count,), generator=generator)
    return segment, torch.rand(count, generator=generator)


def mlcm_segments(
    student: Velocity, x0: Tensor, x1: Tensor, context, segment: Tensor, place: Tensor, *,
    teacher: Velocity, target: Velocity,
) -> Tensor:
    """(B,), of the first half of MLCM. x1 is not asked; target: the student."""
    last = (segment + 1) / SEGMENTS
    here = segment / SEGMENTS + place * (1 / SEGMENTS - GAP)
    t, u, e = at(here), at(here + GAP), at(last)
    with torch.no_grad():
        x = walk(teacher, diffusion_start(x0, SCHEDULE), here * 0, here, segment + 1, context)
        y = step(teacher, x, t, u, context)
        goal = step(target, y, u, e, context)
    return squared(step(student, x, t, e, context), goal)


def mlcm_edges(
    student: Velocity, x0: Tensor, x1: Tensor, context, segment: Tensor, place: Tensor, *,
    teacher: Velocity, target: Velocity,
) -> Tensor:
    """(B,), of the second half: from the segments' edges, three teacher's steps on, to the end."""
    here, later = segment / SEGMENTS, (segment + 1) / SEGMENTS
    t, u = at(here), at(later)
    with torch.no_grad():
        x = walk(teacher, diffusion_start(x0, SCHEDULE), here * 0, here, segment, context)
        y = walk(teacher, x, here, later, 3, context)
    return same_end(student, target, x, t, y, u, context, squared)


def draw_scott(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A place on the schedule (count,), and a seed of the noise for each sample, (count,)."""
    place = torch.rand(count, generator=generator)
    return place, torch.randint(2**62, (count,), generator=generator)


def scott(
    student: Velocity, x0: Tensor, x1: Tensor, context, place: Tensor, seeds: Tensor, *,
    teacher: Velocity, target: Velocity, eta: float = ETA, steps: int = NOISY_STEPS,
) -> Tensor:
    """(B,). As `lcm`; with eta 0 and one step it is LCM on a grid of its own."""
    t = at(place)
    x = interpolate(x0, x1, t)
    noises = torch.stack([
        torch.randn(steps, *x.shape[1:], generator=torch.Generator().manual_seed(seed))
        for seed in seeds.tolist()
    ]).to(x.device)
    with torch.no_grad():
        y, u = x, t
        for k in range(steps):
            now, u = u, at(place + NOISY_GAP * (k + 1) / steps)  # the data for what is beyond
            y = noisy_step(teacher, y, now, u, context, eta, noises[:, k])
    return same_end(student, target, x, t, y, u, context)
