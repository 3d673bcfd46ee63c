"""Rectified flow: the method, on plain tensors. Needs torch alone.

Convention: **t = 0 is noise, t = 1 is data.**

    path         X_t = (1 - t) X0 + t X1                  X0 ~ N(0, I), X1 an image's latent
    velocity     dX_t / dt = X1 - X0                      what the network learns:
    reflow       min_v E ‖(X1 - X0) - v(X_t, t | T)‖²     t ~ U[0, 1], T the prompt
    sampling     dZ_t = v(Z_t, t | T) dt, from Z_0 = X0 to Z_1
    one step     Z_1 = X0 + v(X0, 0 | T)                  right once the paths are straight

The best v is an average, v(x, t) = E[X1 - X0 | X_t = x]. Where straight paths of a random pairing
cross, the average bends, so the flow's own paths do not cross; it sends each X0 to its own Z_1.
Pair X0 with that Z_1 and learn again (reflow): straight lines between these pairs hardly cross, so
the new flow is nearly straight.

Everything that moves points is a *velocity*: a callable velocity(x, t, context) -> dx/dt with
x (B, ...), t (B,) in [0, 1] and context whatever the network takes. A flow's network is one
(`flow_velocity`), a diffusion becomes one by a change of variables (diffusion.py), and guidance
turns one into another. Guidance 1 is off; guidance 0 is unconditional.

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
    return (1 - like(t, x0)) * x0 + like(t, x0) * x1


def squared(a: Tensor, b: Tensor) -> Tensor:
    """‖a - b‖² a number of the latent, the mean over all dimensions: (B, ...) -> (B,)."""
    return (a - b).square().flatten(1).mean(1)


def reflow_loss(
    velocity: Velocity, x0: Tensor, x1: Tensor, t: Tensor, context=None,
    distance: Distance = squared,
) -> Tensor:
    """D(v(X_t, t), X1 - X0), what reflow makes small: (B,). InstaFlow, text-conditioned reflow."""
    return distance(velocity(interpolate(x0, x1, t), t, context), x1 - x0)


def one_step(velocity: Velocity, x0: Tensor, context=None) -> Tensor:
    """X0 + v(X0, 0): the whole of sampling for a distilled model."""
    return x0 + velocity(x0, torch.zeros(len(x0), device=x0.device), context)


def distill_loss(
    velocity: Velocity, x0: Tensor, x1: Tensor, context=None, distance: Distance = squared,
) -> Tensor:
    """D(X0 + v(X0, 0), X1), what distillation makes small: (B,). D: squared L2, then LPIPS."""
    return distance(one_step(velocity, x0, context), x1)


def euler(
    velocity: Velocity, x: Tensor, steps: int, context=None, times: Tensor | None = None,
) -> Iterator[Tensor]:
    """Euler's method from noise to data, yielding all steps + 1 states: the start, ..., the end.

    times (steps + 1,): where the states lie; by default evenly from 0 to 1. Only the end:
    `*_, x1 = euler(...)`.
    """
    times = even_times(steps) if times is None else times
    yield x
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
        x = x + (t_next - t) * velocity(x, torch.full((len(x),), t, device=x.device), context)
        yield x


def guided(network: Velocity, null_context: Tensor, scale: float) -> Velocity:
    """Classifier-free guidance: out(null) + scale (out(text) - out(null)), in one forward pass.

    Works on velocities and on noise predictions alike. null_context (1, ...) or (B, ...): of the
    empty prompt, or of a negative one. Scale 1 is the network itself, 0 the unconditional one.
    Combined in x's dtype, which is fp32 also where the network is not: the difference is multiplied
    by `scale`, and its rounding with it. Ho & Salimans 2022 (2207.12598).
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
    """A flow's U-Net as a velocity: it wants the timestep 1000 (1 - t), as InstaFlow's weights."""

    def velocity(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return unet(x, 1000 * (1 - t), context).to(x.dtype)

    return velocity


def mean_velocity(unet) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """A U-Net with a second time as u(x, t, until, context): the mean velocity between the two.

    One step of any length is then x + (until - t) u. MeanFlow (Geng et al. 2025, 2505.13447).
    """

    def velocity(x: Tensor, t: Tensor, until: Tensor, context: Tensor | None) -> Tensor:
        return unet(x, 1000 * (1 - t), context, 1000 * (1 - until)).to(x.dtype)

    return velocity


def straightness(
    velocity: Velocity, x: Tensor, steps: int, context=None, times: Tensor | None = None,
) -> float:
    """S = ∫ E‖(Z1 - Z0) - v(Z_t, t)‖² dt along the flow's own Euler path from x.

    0 exactly when the velocity never changes along a path. Liu et al. 2022, section 2.2.
    """
    times = even_times(steps) if times is None else times
    bends, _ = path_bends(velocity, x, steps, context, times)
    return (times.diff() / (times[-1] - times[0]) @ bends.mean(1)).item()


# --------------------------------------------------------------------------------------------------
# What these stand on


def even_times(steps: int) -> Tensor:
    """(steps + 1,) times from 0 to 1, float64, on the CPU."""
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def like(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) with dimensions added so that it multiplies x (B, ...), in x's dtype, on its device.

    The dtype first: not every device has the float64 of diffusion.py's tables.
    """
    return t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype).to(x.device)


HUBER = 0.00054  # c below is this times the number of dimensions


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """(√(‖e‖² + c²) - c) / d for the error e = a - b of d dimensions: (B, ...) -> (B,).

    A distance for `reflow_loss` in which an error above c counts by its size and not by its square.
    Lee et al. 2024 (2405.20320).
    """
    error = (a - b).flatten(1)
    c = HUBER * error.shape[1]
    return ((error.square().sum(1) + c**2).sqrt() - c) / error.shape[1]


def path_bends(
    velocity: Velocity, x: Tensor, steps: int, context, times: Tensor,
) -> tuple[Tensor, Tensor]:
    """‖(Z1 - Z0) - v(Z_t, t)‖² at every step of every path, (steps, B), and ‖Z1 - Z0‖², (B,).

    Both float64 on the CPU, since not every device has it. For a flow that lives on a part of
    [0, 1] alone (a diffusion), Z1 - Z0 is divided by the length of that part. ValueError: one step,
    which is always straight.
    """
    if steps < 2:
        raise ValueError("straightness needs at least 2 steps: one step is always straight")
    states = list(euler(velocity, x, steps, context, times))
    mean_velocity = (states[-1] - states[0]) / (times[-1] - times[0]).item()
    norms = lambda v: v.square().flatten(1).sum(1).cpu().double()  # (B,)
    lengths = times.diff().tolist()
    velocities = ((b - a) / length for a, b, length in zip(states, states[1:], lengths))
    return torch.stack([norms(mean_velocity - v) for v in velocities]), norms(mean_velocity)
