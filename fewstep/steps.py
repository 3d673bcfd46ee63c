"""What the methods share: steps of a velocity, each sample from a time of its own to another.

Every method of this folder is a loss on one of three points, for a velocity v (rectified_flow.py):

    step    x + (u - t) v(x, t)         where a step from time t leads by time u
    end     x + (1 - t) v(x, t)         the picture that v sees from here: at once a prediction of
                                        the data and a consistency function, as end(x, 1) = x
    walk    many steps                  what a student is to do in one

and a target point y at time u is a target velocity (y - x) / (u - t), so that losses on points,
pictures and noise are weights on one squared error: ‖end - target‖² = (1 - t)² ‖v - v*‖².

A diffusion has no velocity before t = 0.064, where its schedule begins. Times of methods that keep
its form come from `at`, which counts as its samplers do: evenly in timesteps.
"""

import torch
from torch import Tensor

from diffusion import NoiseSchedule
from rectified_flow import Velocity, interpolate, like

SCHEDULE = NoiseSchedule()
FIRST = float(SCHEDULE.sampling_times(1)[0])  # 0.064
HUBER = 1e-3  # c of LCM's and Rectified Diffusion's code


def at(share: Tensor) -> Tensor:
    """The time after this share of the schedule: 0 is FIRST, 1 the data. (B,) -> (B,) on the CPU.

    at(k / N) for k = 0 ... N are the times of a sampler of N steps.
    """
    share = share.cpu().double()
    return torch.where(share < 1, SCHEDULE.time(SCHEDULE.timesteps * (1 - share) - 1), 1.0)


def step(velocity: Velocity, x: Tensor, t: Tensor, u: Tensor, context) -> Tensor:
    """Euler's method from times t to times u, both (B,). Of a diffusion it is DDIM."""
    t, u = (time.to(x.dtype).to(x.device) for time in (t, u))
    return x + like(u - t, x) * velocity(x, t, context)


def end(velocity: Velocity, x: Tensor, t: Tensor, context) -> Tensor:
    return step(velocity, x, t, torch.ones_like(t), context)


def walk(
    velocity: Velocity, x: Tensor, start: Tensor, stop: Tensor, steps: int | Tensor, context,
) -> Tensor:
    """Euler steps between two shares of the schedule (`at`), (B,).

    steps: how many, for all or for each (B,).
    """
    start, stop = start.cpu(), stop.cpu()
    counts = steps.cpu() if isinstance(steps, Tensor) else torch.full((len(x),), steps)
    x = x.clone()
    for k in range(int(counts.max())):
        rows = (counts > k).nonzero()[:, 0]  # who walks on
        here, there = (at(start[rows] + (stop - start)[rows] * n / counts[rows])
                       for n in (k, k + 1))
        x[rows] = step(velocity, x[rows], here, there, context[rows])
    return x


def onto_schedule(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Points before FIRST moved to where the diffusion takes them up; others as they are.

    A sampler takes noise for x_999, so a point keeps its signal and its noise: at t = 0,
    x0 / 1.066. x (B, ...), t (B,).
    """
    size = lambda t: (t**2 + (1 - t) ** 2).sqrt()
    t = t.cpu().double()
    later = t.clamp(min=FIRST)
    return x * like(size(later) / size(t), x), later


def noisy_step(
    velocity: Velocity, x: Tensor, t: Tensor, u: Tensor, context, eta: float, noise: Tensor,
) -> Tensor:
    """From times t to u >= t, part of the noise renewed. eta 0 is Euler, 1 ancestral sampling.

    DDIM's family of samplers (Song et al. 2020, 2010.02502, equation 16) in flow coordinates, where
    r = t / (1 - t) is the ratio of signal to noise.
    """
    v = velocity(x, t.to(x.dtype).to(x.device), context)
    x1, x0 = x + like(1 - t, x) * v, x - like(t, x) * v
    kept = t * (1 - u) / (u * (1 - t)).clamp(min=1e-12)  # r_t / r_u, 0 at the data
    rho = eta * (1 - kept.square()).clamp(min=0).sqrt()
    mixed = like((1 - rho.square()).sqrt(), x) * x0 + like(rho, x) * noise
    return interpolate(mixed, x1, u)


def huber_each(a: Tensor, b: Tensor) -> Tensor:
    """√(e² + c²) - c of each number of e = a - b, their mean: (B, ...) -> (B,)."""
    return (((a - b).square() + HUBER**2).sqrt() - HUBER).flatten(1).mean(1)
