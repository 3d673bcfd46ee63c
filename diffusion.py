"""Stable Diffusion: its noise schedule, its loss, a sampler, and how it is a rectified flow.

    noising      x_s = α_s x1 + σ_s ε, α_s² + σ_s² = 1,  timesteps s = 0 (data) ... 999 (noise)
    training     min E ‖ε - ε_θ(x_s, s)‖²                                        DDPM, equation 14

A noise-predicting network is already a velocity, in other variables. With t = α / (α + σ),

    X_t = x_s / (α + σ) = (1 - t) ε + t x1     lies on the straight path, α + σ = 1 / √(t² + (1-t)²)
    x1  = (X_t - (1 - t) ε̂) / t                is the data prediction, from the predicted noise ε̂
    v   = x1 - ε̂ = (X_t - ε̂) / t

In these variables DDIM is Euler's method. t lies in the schedule's range, [0.064, 0.972] for Stable
Diffusion. Towards t = 0, (X_t - ε̂) / t becomes 0/0, so a one-step student predicts v itself.

Sources: Ho et al. 2020 (DDPM, 2006.11239), Song et al. 2020 (DDIM, 2010.02502), Lu et al. 2022
(DPM-Solver++, 2211.01095), Liu et al. 2022 (2209.03003), section 2.3.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rectified_flow import (
    Velocity, broadcast_over, even_times, flow_velocity, guided, interpolate, squared,
)


class NoiseSchedule:
    """√β rises linearly from √0.00085 to √0.012; α_s² is the product of (1 - β) up to s."""

    def __init__(self, timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012):
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64)
        alphas_squared = torch.cumprod(1 - roots**2, dim=0)
        self.timesteps = timesteps
        self.log_ratio = 0.5 * torch.logit(alphas_squared)  # log(α/σ), falling in s; float64, CPU

    def alpha_sigma(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at timesteps s of any shape, float64. Between whole s, log(α/σ) is linear."""
        whole = np.arange(self.timesteps)
        log_ratio = torch.as_tensor(np.interp(s.cpu().double(), whole, self.log_ratio))
        return torch.sigmoid(2 * log_ratio).sqrt(), torch.sigmoid(-2 * log_ratio).sqrt()

    def time(self, s: Tensor) -> Tensor:
        """The flow time with the signal-to-noise ratio of timestep s: t = α / (α + σ)."""
        alpha, sigma = self.alpha_sigma(s)
        return alpha / (alpha + sigma)

    def timestep(self, t: Tensor) -> Tensor:
        """The inverse of `time`: s with α_s / σ_s = t / (1 - t), clamped to [0, 999]."""
        log_ratio, falling = torch.logit(t.cpu().double()), np.arange(self.timesteps)[::-1]
        return torch.as_tensor(np.interp(log_ratio, self.log_ratio.flip(0), falling))

    def sampling_timesteps(self, steps: int, t: float = 0.0) -> Tensor:
        """`steps` evenly spaced whole timesteps from that of t down ("trailing" in diffusers)."""
        count = int((self.log_ratio > torch.logit(torch.tensor(t))).sum())  # t = 0: all 1000
        return (torch.arange(count, 0, -max(1.0, count / steps)).round() - 1)[:steps]

    def sampling_times(self, steps: int, t: float = 0.0) -> Tensor:
        """The same timesteps as flow times, and the end 1: (steps + 1,), from 0.064 at t = 0."""
        end = torch.ones(1, dtype=torch.float64)
        return torch.cat([self.time(self.sampling_timesteps(steps, t)), end])


def noise_loss(unet, schedule: NoiseSchedule, x1: Tensor, noise: Tensor, s: Tensor, context):
    """Mean of (ε - ε_θ(α x1 + σ ε, s))² over the latent: (B,). The training loss of diffusions."""
    alpha, sigma = schedule.alpha_sigma(s)
    x_s = broadcast_over(alpha, x1) * x1 + broadcast_over(sigma, x1) * noise
    return squared(noise, unet(x_s, s, context))


# --------------------------------------------------------------------------------------------------
# A diffusion as a flow


def diffusion_velocity(predict_noise, schedule: NoiseSchedule) -> Velocity:
    """A noise-predicting network as the velocity of a rectified flow: v = (X_t - ε̂) / t, exact."""

    def velocity(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        s = schedule.timestep(t).to(x.dtype).to(x.device)
        x_s = x / broadcast_over((t**2 + (1 - t) ** 2).sqrt(), x)
        return (x - predict_noise(x_s, s, context).to(x.dtype)) / broadcast_over(t, x)

    return velocity


def diffusion_start(noise: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Where a diffusion starts, in flow coordinates: x_999 = ε, so X = ε / (α + σ) = ε / 1.066."""
    alpha, sigma = schedule.alpha_sigma(torch.tensor(schedule.timesteps - 1.0))
    return noise / float(alpha + sigma)


def as_flow(
    unet, kind: str, x0: Tensor, steps: int, null_context: Tensor, guidance: float = 1.0,
    x1: Tensor | None = None, t: float = 0.0,
) -> tuple[Velocity, Tensor, Tensor]:
    """A model of any kind as a flow from the noise x0, for `euler`: (velocity, start, times).

    The times (steps + 1,) of a flow cover [t, 1], those of a diffusion its schedule's part of it,
    in fewer steps where it has fewer timesteps. At t > 0 the start is on the line to latents x1.
    """
    if kind != "diffusion":
        velocity = guided(flow_velocity(unet), null_context, guidance)
        start, times = x0, t + (1 - t) * even_times(steps)
    else:
        schedule = NoiseSchedule()
        velocity = diffusion_velocity(guided(unet, null_context, guidance), schedule)
        start, times = diffusion_start(x0, schedule), schedule.sampling_times(steps, t)
    if t > 0:
        start = interpolate(x0, x1, times[:1])
    return velocity, start, times


# --------------------------------------------------------------------------------------------------
# A faster sampler than Euler


def dpm_solver(
    predict_noise, x: Tensor, steps: int, schedule: NoiseSchedule, context: Tensor | None = None,
    x1: Tensor | None = None, t: float = 0.0,
) -> Iterator[Tensor]:
    """DPM-Solver++(2M) from x = ε; yields all steps + 1 states. DPM-Solver++, algorithm 2.

    Each step extrapolates two data predictions in λ = log(α/σ); the first and last use one. From
    time t > 0 it starts between ε and the latents x1.
    """
    timesteps = schedule.sampling_timesteps(steps, t)
    alphas, sigmas = schedule.alpha_sigma(timesteps)
    alphas, sigmas = [*alphas.tolist(), 1.0], [*sigmas.tolist(), 0.0]
    last_data, last_h = None, None
    if t > 0:
        x = alphas[0] * x1 + sigmas[0] * x
    yield x
    for k, s in enumerate(timesteps.tolist()):
        alpha, sigma, alpha_next, sigma_next = alphas[k], sigmas[k], alphas[k + 1], sigmas[k + 1]
        noise = predict_noise(x, torch.full((len(x),), s, device=x.device), context).to(x.dtype)
        data = (x - sigma * noise) / alpha
        if sigma_next == 0:  # clean data: h is infinite; the data prediction is the result
            x = data
        else:
            ratio = alpha_next * sigma / (sigma_next * alpha)  # e^h
            h = math.log(ratio)
            direction = data if k == 0 else data + (0.5 * h / last_h) * (data - last_data)
            x = (sigma_next / sigma) * x + alpha_next * (1 - 1 / ratio) * direction
            last_data, last_h = data, h
        yield x
