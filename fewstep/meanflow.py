"""Re-MeanFlow: learn the mean velocity of a whole step, on pairs whose paths are nearly straight.

    u(x, t, r)  the mean velocity from t to r along the path through x. A step of any length,
                x + (r - t) u, is then exact
    u = v + (r - t) du/dt         its derivative along the path: MeanFlow's identity
    min_u  E w ‖u(X_t, t, r) - (v + (r - t) du/dt)‖²,      v = X1 - X0,  w = 1 / √(‖·‖² + 0.01)

The target needs du/dt along (X_t, t) -> (v, 1), without gradients. On random pairings v is one of
many velocities through X_t, a noisy target. On the pairs of an ODE it is nearly the path's own. The
network takes a second time, whose embedding is zero-initialised: at first u(x, t, r) = v(x, t).

Stable Diffusion embeds the time in waves; the fastest turn by 1000 radians from noise to data. The
exact derivative (`exact_derivative`, the papers' choice for networks with slower waves) is
dominated by these waves, and the loss rises over the first hundred iterations. In a difference over
0.02 of time (`finite_difference`) a wave contributes at most 100, however fast, and the loss falls.

Differs from the paper: the finite difference; half of the steps that begin near the noise, not all
of them, go the whole way, so that two and four steps are learned too; training starts from the
teacher with its output negated, as in reflow; the longest tenth of the pairs is estimated from the
first thousand. We know of no other text-to-image model trained like this.

Geng et al. 2025 (MeanFlow, arXiv 2505.13447); Re-MeanFlow, 2511.23342.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rectified_flow import broadcast_over, interpolate, squared
from unet import TimestepEmbedding, UNet

SAME_TIME = 0.75  # fraction of the samples with r = t, where u is the velocity
WHOLE_STEP = 0.5  # fraction of the steps near the noise that go the whole way
WEIGHT_OFFSET = 0.01  # under the root of w
SHORTEST, MEASURED_PAIRS = 0.9, 1000  # fraction of the pairs to train on, and how many tell
DELTA_T = 0.02  # of `finite_difference`, to which a wave contributes at most 2 / DELTA_T


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """t <= r, (count,) each. t is more often near the ends; near the noise r is often 1."""
    t = torch.sin(torch.pi / 2 * torch.rand(count, generator=generator)).square()  # U-shaped
    r = t + (1 - t) * torch.rand(count, generator=generator)
    whole = (t < 0.1) & (torch.rand(count, generator=generator) < WHOLE_STEP)
    r = torch.where(whole, 1.0, r)
    same = torch.rand(count, generator=generator) < SAME_TIME
    return t, torch.where(same, t, r)


@torch.no_grad()
def finite_difference(u: Callable, x: Tensor, v: Tensor, t: Tensor, r: Tensor, context) -> Tensor:
    """du/dt of u(x, t, r) as x moves with velocity v, over DELTA_T or up to r: (B, ...)."""
    ahead = (r - t).clamp(max=DELTA_T)
    with torch.autocast(x.device.type, enabled=False):  # DELTA_T would divide the rounding
        later = u(x + broadcast_over(ahead, x) * v, t + ahead, r, context)
        return (later - u(x, t, r, context)) / broadcast_over(ahead, x)


@torch.no_grad()
def exact_derivative(u: Callable, x: Tensor, v: Tensor, t: Tensor, r: Tensor, context) -> Tensor:
    """The limit of `finite_difference` as DELTA_T goes to 0, by forward-mode differentiation."""
    # Fused attention has no forward derivative, and autocast does not pass derivatives on.
    with (sdpa_kernel(SDPBackend.MATH), forward_mode.dual_level(),
          torch.autocast(x.device.type, enabled=False)):
        moving = forward_mode.make_dual(x, v), forward_mode.make_dual(t, torch.ones_like(t))
        return forward_mode.unpack_dual(u(*moving, r, context)).tangent


def loss(
    student: Callable, x0: Tensor, x1: Tensor, context, t: Tensor, r: Tensor, *,
    target: Callable, longest: float = float("inf"), derivative: Callable = finite_difference,
) -> Tensor:
    """(B,). x0 and x1 of a pair; student and target: u(x, t, r, context), target for du/dt.

    longest: pairs with a mean squared X1 - X0 above it get loss 0. derivative: `finite_difference`
    or `exact_derivative`, which takes no compiled network.
    """
    x, v = interpolate(x0, x1, t), x1 - x0
    wanted, longer = v.clone(), (r > t).nonzero()[:, 0]
    if len(longer):  # where r = t, the target needs no derivative
        du = derivative(target, *(each[longer] for each in (x, v, t, r, context)))
        wanted[longer] += broadcast_over(r - t, x)[longer] * du
    error = squared(student(x, t, r, context), wanted)
    return error / (error.detach() + WEIGHT_OFFSET).sqrt() * (squared(x0, x1) <= longest)


def longest_length(pairs) -> float:
    """The mean squared X1 - X0 that a tenth of the pairs exceeds, by the first thousand."""
    x0, x1, _ = pairs[torch.arange(min(MEASURED_PAIRS, len(pairs)))]
    return squared(x0, x1).quantile(SHORTEST).item()


def mean_velocity(unet: UNet) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A U-Net with a second time as u(x, t, until, context)."""

    def velocity(x: Tensor, t: Tensor, until: Tensor, context: Tensor) -> Tensor:
        return unet(x, 1000 * (1 - t), context, 1000 * (1 - until)).to(x.dtype)

    return velocity


def with_second_time(unet: UNet) -> UNet:
    """A copy of the network with a second time, zero-initialised: the output stays the same."""
    first = unet.config.block_out_channels[0]
    embedding = TimestepEmbedding(first, 4 * first)
    for weight in embedding.linear_2.parameters():
        nn.init.zeros_(weight)
    other = copy.deepcopy(unet)
    other.config = replace(unet.config, second_time=True)
    other.until_embedding = embedding.to(next(unet.parameters()))
    return other
