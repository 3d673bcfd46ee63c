"""What the methods share: Euler steps in which each sample has its own times.

Each method is a loss on one of three points. For a velocity v (rectified_flow.py):

    step           x + (u - t) v(x, t)     one step from time t to time u
    end            x + (1 - t) v(x, t)     the data prediction from (x, t); also a consistency
                                           function, because end(x, 1) = x
    euler_steps    several steps           what a student learns to do in one

A target point y at time u is the target velocity (y - x) / (u - t). So losses on points, images and
noise are the same squared error with different weights: ‖end - target‖² = (1 - t)² ‖v - v*‖².

A diffusion has no velocity before t = 0.064, where its schedule begins. Methods that keep its
parametrisation take their times from `schedule_time`, spaced evenly in timesteps as in samplers.
"""

import torch
from torch import Tensor

from diffusion import NoiseSchedule, diffusion_velocity
from rectified_flow import Velocity, broadcast_over, guided, interpolate

SCHEDULE = NoiseSchedule()
FIRST_TIME = float(SCHEDULE.sampling_times(1)[0])  # 0.064
HUBER = 1e-3  # c in the code of LCM and Rectified Diffusion


def schedule_time(fraction: Tensor) -> Tensor:
    """The time after this fraction of the schedule: 0 is FIRST_TIME, 1 the data. (B,), on the CPU.

    schedule_time(k / N) for k = 0 ... N are the times of a sampler of N steps.
    """
    fraction = fraction.cpu().double()
    return torch.where(fraction < 1, SCHEDULE.time(SCHEDULE.timesteps * (1 - fraction) - 1), 1.0)


def guided_velocity(teacher, guidance: float) -> Velocity:
    """A diffusion (a StableDiffusion) with guidance as a velocity: the losses' frozen teacher."""
    null_context = teacher.encode_prompts([""])
    return diffusion_velocity(guided(teacher.unet, null_context, guidance), SCHEDULE)


def step(velocity: Velocity, x: Tensor, t: Tensor, u: Tensor, context) -> Tensor:
    """One Euler step from times t to times u, both (B,). For a diffusion it is DDIM."""
    t, u = (time.to(x.dtype).to(x.device) for time in (t, u))
    return x + broadcast_over(u - t, x) * velocity(x, t, context)


def end(velocity: Velocity, x: Tensor, t: Tensor, context) -> Tensor:
    """The data prediction from (x, t): one step to time 1."""
    return step(velocity, x, t, torch.ones_like(t), context)


def euler_steps(
    velocity: Velocity, x: Tensor, start: Tensor, stop: Tensor, steps: int | Tensor, context,
) -> Tensor:
    """Euler steps between two fractions of the schedule, (B,) each. steps: an int or (B,)."""
    start, stop = start.cpu(), stop.cpu()
    counts = steps.cpu() if isinstance(steps, Tensor) else torch.full((len(x),), steps)
    x = x.clone()
    for k in range(int(counts.max())):
        rows = (counts > k).nonzero()[:, 0]  # samples that have steps left
        t, u = (schedule_time(start[rows] + (stop - start)[rows] * n / counts[rows])
                for n in (k, k + 1))
        x[rows] = step(velocity, x[rows], t, u, context[rows])
    return x


def onto_schedule(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Move points from before FIRST_TIME to FIRST_TIME; leave the others. x (B, ...), t (B,).

    Samplers use noise as x_999. So a point keeps its signal and noise and changes its scale only:
    from t = 0 it becomes x0 / 1.066.
    """
    norm = lambda t: (t**2 + (1 - t) ** 2).sqrt()
    t = t.cpu().double()
    later = t.clamp(min=FIRST_TIME)
    return x * broadcast_over(norm(later) / norm(t), x), later


def noisy_step(
    velocity: Velocity, x: Tensor, t: Tensor, u: Tensor, context, eta: float, noise: Tensor,
) -> Tensor:
    """From times t to u >= t with part of the noise renewed: eta 0 is Euler, 1 ancestral sampling.

    DDIM's samplers (Song et al. 2020, 2010.02502, equation 16) in flow coordinates, where
    r = t / (1 - t) is the ratio of signal to noise.
    """
    v = velocity(x, t.to(x.dtype).to(x.device), context)
    x1, x0 = x + broadcast_over(1 - t, x) * v, x - broadcast_over(t, x) * v
    ratio = t * (1 - u) / (u * (1 - t)).clamp(min=1e-12)  # r_t / r_u, 0 at the data
    rho = eta * (1 - ratio.square()).clamp(min=0).sqrt()
    mixed = broadcast_over((1 - rho.square()).sqrt(), x) * x0 + broadcast_over(rho, x) * noise
    return interpolate(mixed, x1, u)


def elementwise_huber(a: Tensor, b: Tensor) -> Tensor:
    """The mean of √(e² + c²) - c over the elements of e = a - b: (B, ...) -> (B,)."""
    return (((a - b).square() + HUBER**2).sqrt() - HUBER).flatten(1).mean(1)
