"""Stable Diffusion's noise: its schedule, its loss, its samplers, and how it is a rectified flow.

    noising      x_s = α_s x1 + σ_s ε, α_s² + σ_s² = 1,  timesteps s = 0 (data) ... 999 (noise)
    training     min E ‖ε - ε_θ(x_s, s)‖²                                        DDPM, equation 14

A noise-predicting network is a velocity already; only the variables change. With t = α / (α + σ),

    X_t = x_s / (α + σ) = (1 - t) ε + t x1     lies on the straight path, α + σ = 1 / √(t² + (1-t)²)
    x1  = (X_t - (1 - t) ε̂) / t                is the data that the predicted noise leads to, so
    v   = x1 - ε̂ = (X_t - ε̂) / t

and DDIM is Euler's method in these coordinates. t lies in the schedule's range, [0.064, 0.972] for
Stable Diffusion; towards t = 0 the form is 0/0, which is why a one-step student predicts v itself.

Sources: Ho et al. 2020 (DDPM, 2006.11239), Song et al. 2020 (DDIM, 2010.02502), Lu et al. 2022
(DPM-Solver++, 2211.01095), Liu et al. 2022 (2209.03003), section 2.3.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rectified_flow import Velocity, even_times, flow_velocity, guided, like


class NoiseSchedule:
    """β runs from 0.00085 to 0.012, linear in its root; α_s² is the product of (1 - β) up to s.

    Between whole timesteps log(α/σ) is linear. All tables are float64 on the CPU.
    """

    def __init__(self, timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012):
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64)
        alphas_squared = torch.cumprod(1 - roots**2, dim=0)
        self.timesteps = timesteps
        self.log_ratio = 0.5 * torch.logit(alphas_squared)  # log(α/σ), falling in s

    def alpha_sigma(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at the timesteps s (any shape, floats allowed), float64."""
        whole = np.arange(self.timesteps)
        log_ratio = torch.as_tensor(np.interp(s.cpu().double(), whole, self.log_ratio))
        return torch.sigmoid(2 * log_ratio).sqrt(), torch.sigmoid(-2 * log_ratio).sqrt()

    def time(self, s: Tensor) -> Tensor:
        """The flow time with the signal-to-noise ratio of timestep s: t = α / (α + σ)."""
        alpha, sigma = self.alpha_sigma(s)
        return alpha / (alpha + sigma)

    def timestep(self, t: Tensor) -> Tensor:
        """The inverse: s with α_s / σ_s = t / (1 - t), clamped to [0, 999] outside the range."""
        log_ratio, falling = torch.logit(t.cpu().double()), np.arange(self.timesteps)[::-1]
        return torch.as_tensor(np.interp(log_ratio, self.log_ratio.flip(0), falling))

    def sampling_timesteps(self, steps: int) -> Tensor:
        """`steps` whole timesteps from 999 down, evenly ("trailing": they end at clean data)."""
        return (torch.arange(self.timesteps, 0, -self.timesteps / steps).round() - 1)[:steps]

    def sampling_times(self, steps: int) -> Tensor:
        """The same grid in flow time, with the end 1: (steps + 1,), from 0.064."""
        end = torch.ones(1, dtype=torch.float64)
        return torch.cat([self.time(self.sampling_timesteps(steps)), end])


def noise_loss(unet, schedule: NoiseSchedule, x1: Tensor, noise: Tensor, s: Tensor, context):
    """‖ε - ε_θ(α x1 + σ ε, s)‖² a number of the latent: (B,). How diffusions are trained."""
    alpha, sigma = schedule.alpha_sigma(s)
    x_s = like(alpha, x1) * x1 + like(sigma, x1) * noise
    return (noise - unet(x_s, s, context)).square().flatten(1).mean(1)


# --------------------------------------------------------------------------------------------------
# Seen as a flow


def diffusion_velocity(predict_noise, schedule: NoiseSchedule) -> Velocity:
    """A noise-predicting network as the velocity of a rectified flow: v = (X_t - ε̂) / t, exact."""

    def velocity(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        s = schedule.timestep(t).to(x.dtype).to(x.device)
        x_s = x / like((t**2 + (1 - t) ** 2).sqrt(), x)
        return (x - predict_noise(x_s, s, context).to(x.dtype)) / like(t, x)

    return velocity


def diffusion_start(noise: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Where a diffusion starts, in flow coordinates: x_999 = ε, so X = ε / (α + σ) = ε / 1.066."""
    alpha, sigma = schedule.alpha_sigma(torch.tensor(schedule.timesteps - 1.0))
    return noise / float(alpha + sigma)


def as_flow(
    unet, kind: str, x0: Tensor, steps: int, null_context: Tensor, guidance: float = 1.0,
) -> tuple[Velocity, Tensor, Tensor]:
    """A model of any kind as a flow: its velocity, where it starts from the noise, when it steps.

    `euler(velocity, start, steps, context, times)` then moves the points. A flow lives on all of
    [0, 1]; a diffusion on the part that its schedule covers.
    """
    if kind != "diffusion":
        return guided(flow_velocity(unet), null_context, guidance), x0, even_times(steps)
    schedule = NoiseSchedule()
    velocity = diffusion_velocity(guided(unet, null_context, guidance), schedule)
    return velocity, diffusion_start(x0, schedule), schedule.sampling_times(steps)


# --------------------------------------------------------------------------------------------------
# A faster sampler


def dpm_solver(
    predict_noise, x: Tensor, steps: int, schedule: NoiseSchedule, context: Tensor | None = None,
) -> Iterator[Tensor]:
    """DPM-Solver++(2M) from x = ε, yielding all steps + 1 states. DPM-Solver++, algorithm 2.

    The data prediction is extrapolated in λ = log(α/σ) from the last two; the first and the last
    step are of first order.
    """
    timesteps = schedule.sampling_timesteps(steps)
    alphas, sigmas = schedule.alpha_sigma(timesteps)
    alphas, sigmas = [*alphas.tolist(), 1.0], [*sigmas.tolist(), 0.0]
    last_data, last_h = None, None
    yield x
    for k, s in enumerate(timesteps.tolist()):
        alpha, sigma, alpha_next, sigma_next = alphas[k], sigmas[k], alphas[k + 1], sigmas[k + 1]
        noise = predict_noise(x, torch.full((len(x),), s, device=x.device), context).to(x.dtype)
        data = (x - sigma * noise) / alpha
        if sigma_next == 0:  # clean data: h is infinite, and the data prediction is the answer
            x = data
        else:
            ratio = alpha_next * sigma / (sigma_next * alpha)  # e^h
            h = math.log(ratio)
            direction = data
            if last_data is not None:
                direction = data + (0.5 * h / last_h) * (data - last_data)
            x = (sigma_next / sigma) * x + alpha_next * (1 - 1 / ratio) * direction
            last_data, last_h = data, h
        yield x
