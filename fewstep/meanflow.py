"""Re-MeanFlow: learn the mean velocity of a whole step, on pairs that are nearly straight.

    u(x, t, r)  the mean velocity from t to r along the path through x, so that x + (r - t) u is a
                step of any length without error
    u = v + (r - t) du/dt         its derivative along the path: MeanFlow's identity
    min_u  E w ‖u(X_t, t, r) - (v + (r - t) du/dt)‖²,      v = X1 - X0,  w = 1 / √(‖·‖² + 0.01)

The target needs du/dt along (X_t, t) -> (v, 1), without gradient. On random pairings v is one of
many, and u learns slowly from noise; on a reflow's pairs it is nearly the path's own. The network
takes a second time, whose embedding begins at zero: u(x, t, t) = v.

Stable Diffusion tells its network the time in waves, the fastest of which turn by 1000 radians from
noise to data. The exact derivative (`along_path`, the papers' way for networks with slower waves)
is that of their jitter, and the loss rises over the first hundred updates; in a difference over
0.02 of time (`difference`) a wave counts 100 at most, however fast it is, and the loss falls.

Differs from the paper: this difference; half of the steps that begin near the noise, and not all,
go the whole way, so that two and four steps are learned too; it starts from the teacher with the
sign of its output changed, as reflow does here; the tenth of the pairs that is longest is told from
the others by the first thousand. To our knowledge no other text-to-image model was trained so.

Geng et al. 2025 (MeanFlow, arXiv 2505.13447); Re-MeanFlow, 2511.23342.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rectified_flow import interpolate, like, squared
from unet import UNet, unheeded_embedding

AT_ONE_TIME = 0.75  # share of samples with r = t, where u is the velocity
WHOLE = 0.5  # of those near the noise, share whose step is the whole way
FLAT = 0.01  # of the weight
NEAR = 0.02  # of time, over which `difference` looks: a wave changes it by 2 / NEAR at most


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """t and r with t <= r, (count,) each; t near the ends more often, and from noise to the end."""
    t = torch.sin(torch.pi / 2 * torch.rand(count, generator=generator)).square()  # U-shaped
    r = t + (1 - t) * torch.rand(count, generator=generator)
    whole = (t < 0.1) & (torch.rand(count, generator=generator) < WHOLE)
    r = torch.where(whole, 1.0, r)
    same = torch.rand(count, generator=generator) < AT_ONE_TIME
    return t, torch.where(same, t, r)


@torch.no_grad()
def difference(u: Callable, x: Tensor, v: Tensor, t: Tensor, r: Tensor, context) -> Tensor:
    """du/dt of u(x, t, r) where x moves with velocity v, over NEAR or up to r: (B, ...)."""
    ahead = (r - t).clamp(max=NEAR)
    with torch.autocast(x.device.type, enabled=False):  # rounding would be divided by NEAR
        later = u(x + like(ahead, x) * v, t + ahead, r, context)
        return (later - u(x, t, r, context)) / like(ahead, x)


@torch.no_grad()
def along_path(u: Callable, x: Tensor, v: Tensor, t: Tensor, r: Tensor, context) -> Tensor:
    """The same as NEAR goes to 0."""
    # Fast attention has no forward derivative, and autocast does not know of derivatives.
    with (sdpa_kernel(SDPBackend.MATH), forward_mode.dual_level(),
          torch.autocast(x.device.type, enabled=False)):
        moving = forward_mode.make_dual(x, v), forward_mode.make_dual(t, torch.ones_like(t))
        return forward_mode.unpack_dual(u(*moving, r, context)).tangent


def loss(
    student: Callable, x0: Tensor, x1: Tensor, context, t: Tensor, r: Tensor, *,
    target: Callable, longest: float = float("inf"), derivative: Callable = difference,
) -> Tensor:
    """(B,). x0 and x1 of a pair; student and target: u(x, t, r, context), the second to derive.

    longest: pairs whose squared length, a number of the latent, is above it count 0. derivative:
    `along_path` in place of `difference`; it takes no compiled network.
    """
    x, v = interpolate(x0, x1, t), x1 - x0
    wanted, longer = v.clone(), (r > t).nonzero()[:, 0]
    if len(longer):  # the others need no derivative
        du = derivative(target, *(c[longer] for c in (x, v, t, r, context)))
        wanted[longer] += like(r - t, x)[longer] * du
    error = squared(student(x, t, r, context), wanted)
    return error / (error.detach() + FLAT).sqrt() * (squared(x0, x1) <= longest)


def with_second_time(unet: UNet) -> UNet:
    """A copy of the network with a second time, which it does not heed yet."""
    other = copy.deepcopy(unet)
    other.config = replace(unet.config, second_time=True)
    other.until_embedding = unheeded_embedding(unet.config).to(next(unet.parameters()))
    return other
