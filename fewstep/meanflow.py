"""Re-MeanFlow: learn the mean velocity of a whole step, on pairs whose paths are nearly straight.

    u(x, t, r)  the mean velocity from t to r along the path through x. A step of any length,
                x + (r - t) u, is then exact
    u = v + (r - t) du/dt         its derivative along the path: MeanFlow's identity
    min_u  E w ‖u(X_t, t, r) - (v + (r - t) du/dt)‖²,      v = X1 - X0,  w = 1 / √(‖·‖² + 0.01)

The target needs du/dt along (X_t, t) -> (v, 1), without gradients. On random pairings v is one of
many velocities through X_t, a noisy target. On an ODE's pairs, v is close to the path's velocity.
The network takes a second time, whose embedding is zero-initialised: at first u(x, t, r) = v(x, t).

Stable Diffusion embeds the time in waves; the fastest turn by 1000 radians from noise to data and
would dominate du/dt. So the time embedding is refitted first (`match_times`), as the authors do:
without its fast waves, and as a function of the flow's time. Then the exact derivative serves
(`exact_derivative`). In a difference over 0.02 of time (`finite_difference`) a wave contributes at
most 100, however fast; compare.py has a row that trains with the difference first, as reported for
large models (2605.17834).

Differs from the paper: the refit keeps Stable Diffusion's waves below 20 radians and the embedding
of r starts at zero, where the authors train two new embeddings together; training starts from the
teacher with its output negated, as in reflow; t is not kept 1/81 away from the noise; the longest
tenth of the pairs, by the first thousand, has the weight 0, where the authors leave it out before
its passes; the second half's guidance within the target is left out, because the pairs are already
guided. We know of no other text-to-image model trained like this.

Geng et al. 2025 (MeanFlow, arXiv 2505.13447); Re-MeanFlow, 2511.23342.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.autograd.forward_ad as forward_mode
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion import NoiseSchedule
from rectified_flow import broadcast_over, interpolate, squared
from unet import TimestepEmbedding, UNet, timestep_embedding

# The authors' settings: t as in Lee et al. 2024 (2405.20320); r - t logit-normal; a long step that
# begins near the noise goes the whole way.
SAME_TIME = 0.75  # fraction of the samples with r = t, where u is the velocity
U_SHAPE = 4.0  # p(t) ∝ cosh(4 (t - 1/2))
INTERVAL_MEAN, INTERVAL_STD = -0.8, 1.0
NEAR_NOISE, LONG = 0.2, 0.6  # t below, r above
DROPOUT = 0.1  # of captions; theirs are classes
WEIGHT_OFFSET = 0.01  # under the root of w
SHORTEST, MEASURED_PAIRS = 0.9, 1000  # fraction of the pairs to train on, and how many tell
DELTA_T = 0.02  # of `finite_difference`, to which a wave contributes at most 2 / DELTA_T
RIDGE = 1e-2  # keeps the refitted weights small
# In radians a timestep, 20 from noise to data: three standard deviations of the authors' waves.
SLOW = 0.02


def u_shaped(uniform: Tensor) -> Tensor:
    """t ~ U[0, 1] to the density ∝ cosh(a (t - 1/2)), by the inverse distribution function."""
    return 0.5 + torch.asinh((2 * uniform - 1) * math.sinh(U_SHAPE / 2)) / U_SHAPE


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """t <= r <= 1, (count,) each. t is more often near the ends; near the noise r is often 1."""
    t = u_shaped(torch.rand(count, generator=generator))
    length = INTERVAL_MEAN + INTERVAL_STD * torch.randn(count, generator=generator)
    r = (t + length.sigmoid()).clamp(max=1)
    r = torch.where((t < NEAR_NOISE) & (r > LONG), 1.0, r)
    same = torch.rand(count, generator=generator) < SAME_TIME
    return t, torch.where(same, t, r)


def match_times(
    unet: UNet, schedule: NoiseSchedule | None, fastest: float = math.inf,
) -> None:
    """Make the U-Net answer at 1000 (1 - t) as it did at the timestep of t's signal-to-noise ratio.

    In place: the second linear layer of the time embedding is refitted, by least squares over all
    whole timesteps. schedule None: the U-Net is a flow's, whose times are right. fastest: waves of
    more radians a timestep are left out, and stay out.
    """
    embedding, channels = unet.time_embedding, unet.config.block_out_channels[0]
    waves = lambda s: timestep_embedding(s, channels).to(embedding.linear_1.weight)
    given = torch.arange(1001, dtype=torch.float64)
    meant = schedule.timestep(1 - given / 1000) if schedule else given
    with torch.no_grad():
        wanted = embedding(waves(meant)).cpu().double()
        frequencies = 10_000 ** -(torch.arange(channels) % (channels // 2) / (channels // 2))
        slow = (frequencies <= fastest).to(embedding.linear_1.weight)
        embedding.linear_1.weight *= slow
        hidden = F.silu(embedding.linear_1(waves(given))).cpu().double()
        inputs = torch.cat([hidden, torch.ones(len(hidden), 1, dtype=hidden.dtype)], dim=1)
        penalty = RIDGE * torch.eye(inputs.shape[1], dtype=inputs.dtype)
        fitted = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ wanted)  # (in + 1, out)
        embedding.linear_2.weight.copy_(fitted[:-1].T)
        embedding.linear_2.bias.copy_(fitted[-1])
    if fastest < math.inf:  # Adam would bring the waves back in a few steps
        embedding.linear_1.weight.register_hook(lambda gradient: gradient * slow)


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
    target: Callable, longest: float = float("inf"), derivative: Callable = exact_derivative,
) -> Tensor:
    """(B,). x0 and x1 of a pair; student and target: u(x, t, r, context), target for du/dt.

    longest: pairs with a mean squared X1 - X0 above it get loss 0. derivative: `exact_derivative`,
    which takes no compiled network, or `finite_difference`.
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
