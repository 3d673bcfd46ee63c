"""Rectified flow: the method, on plain tensors. Needs torch alone.

Convention: **t = 0 is noise, t = 1 is data.**

    path         X_t = (1 - t) X0 + t X1                  X0 ~ N(0, I), X1 the latent of an image
    velocity     dX_t / dt = X1 - X0, which the network learns
    reflow       min_v E ‖(X1 - X0) - v(X_t, t | T)‖²     t ~ U[0, 1], T the prompt
    sampling     dZ_t = v(Z_t, t | T) dt, from Z_0 = X0 to Z_1
    one step     Z_1 = X0 + v(X0, 0 | T)                  exact once the paths are straight

The best v is an average, v(x, t) = E[X1 - X0 | X_t = x]. If X0 and X1 are paired at random,
straight paths cross; there v averages, so the flow's own paths bend and never cross. The flow sends
each X0 to its own Z_1. Take Z_1 as the new X1 and learn again (reflow): the straight paths of these
pairs hardly cross, so the new flow is nearly straight. A diffusion serves as the first flow.

A *velocity* is a callable velocity(x, t, context) -> dx/dt with x (B, ...), t (B,) in [0, 1] and
any context that the network takes. `flow_velocity` makes a velocity from a flow's U-Net,
diffusion.py from a diffusion's, and `guided` from another velocity. Guidance scale 1 is off; 0 is
unconditional.

Sources: Liu et al. 2022 (arXiv 2209.03003), Liu et al. 2023 (InstaFlow, 2309.06380).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Distance = Callable[[Tensor, Tensor], Tensor]  # of two (B, ...): (B,)


# --------------------------------------------------------------------------------------------------
# The method


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """X_t = (1 - t) X0 + t X1. x0 and x1 (B, ...), t (B,)."""
    t = broadcast_over(t, x0)
    return (1 - t) * x0 + t * x1


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error over all dimensions but the first: (B, ...) -> (B,)."""
    return (a - b).square().flatten(1).mean(1)


def reflow_loss(
    velocity: Velocity, x0: Tensor, x1: Tensor, t: Tensor, context=None,
    distance: Distance = squared,
) -> Tensor:
    """D(v(X_t, t), X1 - X0): (B,). InstaFlow, text-conditioned reflow."""
    return distance(velocity(interpolate(x0, x1, t), t, context), x1 - x0)


def one_step(velocity: Velocity, x0: Tensor, context=None) -> Tensor:
    """X0 + v(X0, 0): all of sampling, for a distilled model."""
    return x0 + velocity(x0, torch.zeros(len(x0), device=x0.device), context)


def distill_loss(
    velocity: Velocity, x0: Tensor, x1: Tensor, context=None, distance: Distance = squared,
) -> Tensor:
    """D(X0 + v(X0, 0), X1): (B,). D is squared L2 first, then LPIPS. InstaFlow, distillation."""
    return distance(one_step(velocity, x0, context), x1)


def euler(
    velocity: Velocity, x: Tensor, steps: int, context=None, times: Tensor | None = None,
) -> Iterator[Tensor]:
    """Euler's method from noise to data; yields all steps + 1 states. Last: `*_, x1 = euler(...)`.

    times (steps + 1,): of the states; by default evenly from 0 to 1.
    """
    times = even_times(steps) if times is None else times
    yield x
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
        x = x + (t_next - t) * velocity(x, torch.full((len(x),), t, device=x.device), context)
        yield x


def guided(network: Velocity, null_context: Tensor, scale: float) -> Velocity:
    """Classifier-free guidance: out(null) + scale (out(text) - out(null)), in one forward pass.

    network: predicts velocity or noise. null_context (1, ...) or (B, ...): of the empty or the
    negative prompt. The difference is taken in x's dtype, fp32, even if the network runs in bf16:
    `scale` multiplies its rounding too. Ho & Salimans 2022 (2207.12598).
    """
    if scale == 1:
        return network

    def guided_network(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        null = null_context.expand_as(context)
        if scale == 0:
            return network(x, t, null)
        both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, context]))
        without_text, with_text = both.to(x.dtype).chunk(2)
        return without_text + scale * (with_text - without_text)

    return guided_network


def flow_velocity(unet) -> Velocity:
    """A flow's U-Net as a velocity: its timestep is 1000 (1 - t), as in InstaFlow's weights."""
    return lambda x, t, context: unet(x, 1000 * (1 - t), context).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Straightness, and helpers


def straightness(
    velocity: Velocity, x: Tensor, steps: int, context=None, times: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """S = ∫ ‖(Z1 - Z0) - v(Z_t, t)‖² dt along the flow's own Euler path from each x (B, ...).

    Returns S (B,), its integrand (steps, B) and ‖Z1 - Z0‖² (B,), float64 on the CPU. A velocity
    that is constant along the path has S = 0. For a flow on a part of [0, 1] (a diffusion),
    Z1 - Z0 is divided by the length of that part. Liu et al. 2022, section 2.2.
    """
    assert steps > 1, "one step is always straight"
    times = even_times(steps) if times is None else times
    states, lengths = list(euler(velocity, x, steps, context, times)), times.diff()
    mean_velocity = (states[-1] - states[0]) / lengths.sum().item()
    norms = lambda v: v.square().flatten(1).sum(1).cpu().double()  # (B,)
    velocities = ((b - a) / length for a, b, length in zip(states, states[1:], lengths.tolist()))
    deviations = torch.stack([norms(mean_velocity - v) for v in velocities])
    return lengths / lengths.sum() @ deviations, deviations, norms(mean_velocity)


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """(√(‖a - b‖² + c²) - c) / d, d dimensions: (B, ...) -> (B,). Lee et al. 2024 (2405.20320)."""
    error = (a - b).flatten(1)
    c = 0.00054 * error.shape[1]  # the loss is linear beyond c, so that outliers weigh less
    return ((error.square().sum(1) + c**2).sqrt() - c) / error.shape[1]


def even_times(steps: int) -> Tensor:
    """(steps + 1,) times from 0 to 1, float64, on the CPU."""
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def broadcast_over(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) shaped to multiply x (B, ...), cast to x's dtype, then moved: mps has no float64."""
    return t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype).to(x.device)
