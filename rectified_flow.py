"""Rectified flow: the mathematics of this project, on plain tensors. Needs torch and numpy alone.

Convention: **t = 0 is noise, t = 1 is data.**

    path         X_t = (1 - t) X0 + t X1                  X0 ~ N(0, I), X1 an image's latent
    velocity     dX_t / dt = X1 - X0                      what the network learns:
    reflow       min_v E ‖(X1 - X0) - v(X_t, t | T)‖²     t ~ U[0, 1], T the prompt
    sampling     dZ_t = v(Z_t, t | T) dt, from Z_0 = X0 to Z_1
    one step     Z_1 = X0 + v(X0, 0 | T)                  right once the paths are straight

The best v is an average, v(x, t) = E[X1 - X0 | X_t = x]. Where straight paths of a random pairing cross, the
average bends, so the flow's own paths do not cross; it sends each X0 to its own Z_1. Pair X0 with that Z_1 and
learn again (reflow): straight lines between these pairs hardly cross, so the new flow is nearly straight.

Everything that moves points is a *velocity*: a callable velocity(x, t, context) -> dx/dt with x (B, ...),
t (B,) in [0, 1] and context whatever the network takes. Flow networks are velocities (`flow_velocity`), a
diffusion network becomes one by a change of variables (`diffusion_velocity`), guidance turns one into another.
Guidance 1 is off; guidance 0 is unconditional.

Sources: Liu et al. 2022 (arXiv 2209.03003), Liu et al. 2023 (InstaFlow, 2309.06380). Diffusion: Ho et al. 2020
(2006.11239), Song et al. 2020 (DDIM, 2010.02502), Lu et al. 2022 (DPM-Solver++, 2211.01095).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# ---------------------------------------------------------------------------------------------------------------
# The path, its velocity, the losses


def noise_from_seeds(seeds: list[int] | Tensor, shape: tuple[int, ...]) -> Tensor:
    """X0 for a list of integer seeds: (len(seeds), *shape), float32, made on the CPU.

    One generator a sample, so that a seed gives the same noise on every device and at every batch size.
    """
    return torch.stack([noise_from_seed(int(seed), shape) for seed in seeds])


def noise_from_seed(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Below 2**32 the noise that torch, and so diffusers, gives for this seed; different noise for each larger one.

    torch's generator on the CPU looks at the last 32 bits of its seed alone. numpy's takes all, and its stream is frozen.
    """
    if seed < 2**32:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    generator = np.random.RandomState([seed % 2**32, seed // 2**32])
    return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))


def like(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) with dimensions added so that it multiplies x (B, ...), in x's dtype and on its device.

    The dtype first: not every device has the float64 of the schedule's tables.
    """
    return t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype).to(x.device)


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """X_t = (1 - t) X0 + t X1. x0 and x1 (B, ...), t (B,)."""
    return (1 - like(t, x0)) * x0 + like(t, x0) * x1


def reflow_error(velocity: Velocity, x0: Tensor, x1: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
    """(X1 - X0) - v(X_t, t), which reflow makes small: (B, ...)."""
    return (x1 - x0) - velocity(interpolate(x0, x1, t), t, context)


def reflow_loss(velocity: Velocity, x0: Tensor, x1: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
    """‖(X1 - X0) - v(X_t, t)‖² a number of the latent (the mean over dimensions): (B,). InstaFlow, text-conditioned reflow."""
    return reflow_error(velocity, x0, x1, t, context).square().flatten(1).mean(1)


HUBER = 0.00054  # c below is this times the number of dimensions


def pseudo_huber(error: Tensor) -> Tensor:
    """(√(‖e‖² + c²) - c) / d for errors (B, ...) of d dimensions: (B,). Lee et al. 2024 (2405.20320)."""
    error = error.flatten(1)
    c = HUBER * error.shape[1]
    return ((error.square().sum(1) + c**2).sqrt() - c) / error.shape[1]


def pseudo_huber_loss(velocity: Velocity, x0: Tensor, x1: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
    """Reflow's loss in which an error larger than c counts by its size and not by its square: (B,)."""
    return pseudo_huber(reflow_error(velocity, x0, x1, t, context))


def one_step(velocity: Velocity, x0: Tensor, context: Tensor | None = None) -> Tensor:
    """X0 + v(X0, 0): the whole of sampling for a distilled model."""
    return x0 + velocity(x0, torch.zeros(len(x0), device=x0.device), context)


def distill_loss(velocity: Velocity, x0: Tensor, x1: Tensor, context: Tensor | None = None) -> Tensor:
    """‖X1 - (X0 + v(X0, 0))‖² a number of the latent: (B,). InstaFlow's distillation, with D the squared L2."""
    return (x1 - one_step(velocity, x0, context)).square().flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------------------------
# Guidance, Euler's method, straightness


def guided(network: Velocity, null_context: Tensor, scale: float) -> Velocity:
    """Classifier-free guidance: out(null) + scale * (out(text) - out(null)), both in one forward pass.

    Works on velocities and on noise predictions alike. null_context (1, ...) or (B, ...): the empty prompt's, or
    a negative prompt's. Scale 1 is the network itself, 0 the unconditional one. Combined in x's dtype, which is fp32
    also where the network is not: the difference is multiplied by `scale`, and its rounding with it. Ho & Salimans 2022
    (2207.12598).
    """
    if scale == 1:
        return network

    def guided_network(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        null = null_context.expand_as(context)
        if scale == 0:
            return network(x, t, null)
        both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, context])).to(x.dtype)
        without_text, with_text = both.chunk(2)
        return without_text + scale * (with_text - without_text)

    return guided_network


def euler(
    velocity: Velocity, x: Tensor, steps: int, context: Tensor | None = None, times: Tensor | None = None
) -> Iterator[Tensor]:
    """Euler's method from noise to data, yielding all steps + 1 states: the start, ..., the end.

    times (steps + 1,): where the states lie; by default evenly from 0 to 1. Only the end: `*_, x1 = euler(...)`.
    """
    if times is None:
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    yield x
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
        x = x + (t_next - t) * velocity(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), context)
        yield x


@dataclass
class Straightness:
    """S of a flow and what it is measured against, each with its standard error over the samples."""

    value: float  # S = ∫ E‖(Z1 - Z0) - v(Z_t, t)‖² dt
    standard_error: float
    relative: float  # S / E‖Z1 - Z0‖²: 0 is straight, and the size of the latent drops out
    relative_standard_error: float
    transport_cost: float  # E‖Z1 - Z0‖²; reflow must not raise it
    profile: list[tuple[float, float]]  # (t, E‖(Z1 - Z0) - v(Z_t, t)‖² / E‖Z1 - Z0‖²) at every step


def straightness(
    velocity: Velocity, x: Tensor, steps: int, context: Tensor | None = None, times: Tensor | None = None
) -> Straightness:
    """S = ∫ E‖(Z1 - Z0) - v(Z_t, t)‖² dt along the flow's own Euler path from x. Liu et al. 2022, section 2.2.

    It is 0 exactly when the velocity never changes along a path, so it needs at least 2 steps (else ValueError).
    For a flow that lives on part of [0, 1] only (a diffusion teacher, `diffusion_times`), Z1 - Z0 is divided by
    the length of that part and the integral is the mean over it.
    """
    if steps < 2:
        raise ValueError("straightness needs at least 2 steps: one step is always straight")
    if times is None:
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    lengths = times.diff()
    weights = (lengths / lengths.sum()).tolist()
    states = list(euler(velocity, x, steps, context, times))
    velocities = [(b - a) / length for a, b, length in zip(states, states[1:], lengths.tolist())]
    mean_velocity = (states[-1] - states[0]) / lengths.sum().item()
    # Means over samples are taken in float64, on the CPU, since not every device has it.
    bends = [(mean_velocity - v).square().flatten(1).sum(1).cpu().double() for v in velocities]  # (B,) at every step
    bend = sum(weight * at_step for weight, at_step in zip(weights, bends))
    cost = mean_velocity.square().flatten(1).sum(1).cpu().double()  # (B,)
    ratio, count = bend.mean() / cost.mean(), len(bend)
    # The standard error of a ratio of means, to first order.
    relative_error = (bend - ratio * cost).square().mean().sqrt() / cost.mean() / max(count - 1, 1) ** 0.5
    return Straightness(
        value=bend.mean().item(),
        standard_error=bend.std(correction=0).item() / max(count - 1, 1) ** 0.5,
        relative=ratio.item(),
        relative_standard_error=relative_error.item(),
        transport_cost=cost.mean().item(),
        profile=[(t, (at_step.mean() / cost.mean()).item()) for t, at_step in zip(times.tolist(), bends)],
    )


def flow_velocity(unet) -> Velocity:
    """A flow's U-Net as a velocity: it wants the timestep 1000 (1 - t), as InstaFlow's published weights do."""

    def velocity(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return unet(x, 1000 * (1 - t), context).to(x.dtype)

    return velocity


# ---------------------------------------------------------------------------------------------------------------
# Diffusion: Stable Diffusion's schedule, its loss, its samplers, and its view as a flow


def interpolate_table(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """The piecewise linear function through (xs, ys), xs rising, constant beyond the ends, at x."""
    x = x.clamp(xs[0], xs[-1])
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    weight = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + weight * (ys[right] - ys[right - 1])


class NoiseSchedule:
    """Stable Diffusion's noise: x_s = α_s x1 + σ_s ε, α_s² + σ_s² = 1, for timesteps s = 0 (data) ... 999 (noise).

    β runs from 0.00085 to 0.012, linear in its root; α_s² is the product of (1 - β) up to s. Between whole
    timesteps log(α/σ) is linear. All tables are float64 on the CPU.
    """

    def __init__(self, timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012):
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64) ** 2
        self.timesteps = timesteps
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.log_ratio = 0.5 * torch.log(self.alphas_cumprod / (1 - self.alphas_cumprod))  # log(α/σ), falling in s

    def alpha_sigma(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at the timesteps s (any shape, floats allowed), float64."""
        log_ratio = interpolate_table(s.cpu().double(), torch.arange(self.timesteps).double(), self.log_ratio)
        return torch.sigmoid(2 * log_ratio).sqrt(), torch.sigmoid(-2 * log_ratio).sqrt()

    def time(self, s: Tensor) -> Tensor:
        """The flow time with the signal-to-noise ratio of timestep s: t = α / (α + σ), in [0.064, 0.972]."""
        alpha, sigma = self.alpha_sigma(s)
        return alpha / (alpha + sigma)

    def timestep(self, t: Tensor) -> Tensor:
        """The inverse: s with α_s / σ_s = t / (1 - t), clamped to [0, 999] outside the schedule's range."""
        log_ratio = torch.logit(t.cpu().double())
        s_rising = torch.arange(self.timesteps).double().flip(0)
        return interpolate_table(log_ratio, self.log_ratio.flip(0), s_rising)

    def sampling_timesteps(self, steps: int) -> Tensor:
        """`steps` whole timesteps from 999 down, evenly spaced ("trailing": the last step ends at clean data)."""
        return (torch.arange(self.timesteps, 0, -self.timesteps / steps).round() - 1)[:steps]

    def sampling_times(self, steps: int) -> Tensor:
        """The same grid in flow time, with the end 1: (steps + 1,), from 0.064."""
        return torch.cat([self.time(self.sampling_timesteps(steps)), torch.ones(1, dtype=torch.float64)])


def noise_loss(unet, schedule: NoiseSchedule, x1: Tensor, noise: Tensor, s: Tensor, context: Tensor | None) -> Tensor:
    """‖ε - ε_θ(α x1 + σ ε, s)‖² a number of the latent: (B,). How diffusion teachers are trained. DDPM, equation 14."""
    alpha, sigma = schedule.alpha_sigma(s)
    x_s = like(alpha, x1) * x1 + like(sigma, x1) * noise
    return (noise - unet(x_s, s, context)).square().flatten(1).mean(1)


def diffusion_velocity(unet, schedule: NoiseSchedule) -> Velocity:
    """A noise-predicting network as the velocity of a rectified flow. Exact: only the variables change.

    With t = α / (α + σ), the point X_t = x_s / (α + σ) lies on the straight path (1 - t) ε + t x1, and
    α + σ = 1 / √(t² + (1-t)²). The noise predicted there gives the data (X_t - (1-t) ε̂) / t, so

        v(X_t, t) = (X_t - ε̂) / t

    DDIM is Euler's method in these coordinates. t must lie in the schedule's range, [0.064, 0.972] for Stable
    Diffusion; towards t = 0 the form is 0/0, which is why a one-step student predicts v itself.
    """

    def velocity(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        s = schedule.timestep(t).to(x.dtype).to(x.device)
        noise = unet(x / like((t**2 + (1 - t) ** 2).sqrt(), x), s, context).to(x.dtype)
        return (x - noise) / like(t, x)

    return velocity


def diffusion_start(noise: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Where a diffusion sampler starts, in flow coordinates: x_999 = ε, so X = ε / (α + σ) = ε / 1.066."""
    alpha, sigma = schedule.alpha_sigma(torch.tensor(schedule.timesteps - 1.0))
    return noise / float(alpha + sigma)


def sampling_grid(schedule: NoiseSchedule, steps: int) -> list[tuple[float, float, float]]:
    """(s, α, σ) at every sampling timestep, then clean data (0, 1, 0)."""
    timesteps = schedule.sampling_timesteps(steps)
    alphas, sigmas = schedule.alpha_sigma(timesteps)
    return list(zip(timesteps.tolist(), alphas.tolist(), sigmas.tolist())) + [(0.0, 1.0, 0.0)]


def ddim(predict_noise, x: Tensor, steps: int, schedule: NoiseSchedule, context: Tensor | None = None) -> Iterator:
    """Deterministic DDIM from x = ε, yielding all steps + 1 states. DDIM, equation 12 with η = 0."""
    grid = sampling_grid(schedule, steps)
    yield x
    for (s, alpha, sigma), (_, alpha_next, sigma_next) in zip(grid, grid[1:]):
        noise = predict_noise(x, torch.full((len(x),), s, dtype=x.dtype, device=x.device), context).to(x.dtype)
        data = (x - sigma * noise) / alpha
        x = alpha_next * data + sigma_next * noise
        yield x


def dpm_solver(predict_noise, x: Tensor, steps: int, schedule: NoiseSchedule, context: Tensor | None = None) -> Iterator:
    """DPM-Solver++(2M) from x = ε, yielding all steps + 1 states. DPM-Solver++, algorithm 2.

    The data prediction is extrapolated in λ = log(α/σ) from the last two; first and last step are first order.
    """
    grid = sampling_grid(schedule, steps)
    last_data, last_h = None, None
    yield x
    for (s, alpha, sigma), (_, alpha_next, sigma_next) in zip(grid, grid[1:]):
        noise = predict_noise(x, torch.full((len(x),), s, dtype=x.dtype, device=x.device), context).to(x.dtype)
        data = (x - sigma * noise) / alpha
        if sigma_next == 0:  # the step to clean data: h is infinite and the data prediction is the answer
            x = data
        else:
            ratio = torch.tensor([alpha_next * sigma / (sigma_next * alpha)], dtype=torch.float64)  # e^h
            h = ratio.log().item()
            direction = data
            if last_data is not None:
                direction = data + (0.5 * h / last_h) * (data - last_data)
            x = (sigma_next / sigma) * x + alpha_next * (1 - 1 / ratio.item()) * direction
            last_data, last_h = data, h
        yield x


# ---------------------------------------------------------------------------------------------------------------
# Sampling from any model


def sample_path(
    unet, kind: str, x0: Tensor, steps: int, context: Tensor, null_context: Tensor, guidance: float = 1.0,
    solver: str = "dpm",
) -> Iterator[Tensor]:  # fmt: skip
    """From noise x0 (B, C, h, w) to latents, for a model of any kind, yielding every state.

    kind "flow" and "one-step": Euler on the velocity; "diffusion": `solver` "dpm" or "ddim". The kinds of
    checkpoint.py. context (B, L, D), null_context (1, L, D) of the empty or the negative prompt.
    """
    network = guided(unet if kind == "diffusion" else flow_velocity(unet), null_context, guidance)
    if kind == "diffusion":
        return {"dpm": dpm_solver, "ddim": ddim}[solver](network, x0, steps, NoiseSchedule(), context)
    return euler(network, x0, steps, context)


def as_flow(
    unet, kind: str, x0: Tensor, steps: int, null_context: Tensor, guidance: float = 1.0
) -> tuple[Velocity, Tensor, Tensor]:
    """A model of any kind seen as a flow: its velocity, where it starts from the noise x0, and the times of `steps` steps.

    `euler(velocity, start, steps, context, times)` then moves the points. A flow lives on all of [0, 1]; a diffusion on
    the part that its schedule covers, where Euler's method is DDIM.
    """
    if kind != "diffusion":
        return guided(flow_velocity(unet), null_context, guidance), x0, torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    schedule = NoiseSchedule()
    velocity = diffusion_velocity(guided(unet, null_context, guidance), schedule)
    return velocity, diffusion_start(x0, schedule), schedule.sampling_times(steps)
