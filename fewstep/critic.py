"""SCott's critic: it tells images from the student's predictions; the student learns to fool it.

    D(x) = heads(features of x)      x noised to a random time, seen by the frozen teacher's U-Net
    critic   min_D  E max(0, 1 - D(X1)) + max(0, 1 + D(end(X_t, t)))         hinge loss
    student  min_v  E consistency - 0.4 D(end(X_t, t))

The features are the U-Net's last before its output block, so they depend on caption and time. Both
losses need them, so both are minimised in one step. No gradient of one loss reaches the other's
weights, and Adam scales each weight separately. Except for clipping, this equals two optimisers
with one learning rate. The heads train beside the student, in the same loop and state, and are not
part of its file.

Differs from the paper: there a LoRA in the U-Net learns too, and the critic has its own learning
rate, 2.5 times the student's; here both gradients are clipped together.

Liu et al. 2024 (SCott, arXiv 2403.01505).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.steps import SCHEDULE, schedule_time
from rectified_flow import broadcast_over, interpolate
from unet import UNet, UNetConfig

WEIGHT = 0.4  # of the student's part, as in the paper


def make_heads(config: UNetConfig) -> nn.Module:
    """From the U-Net's features (B, C, h, w) to a score of each place (B, 1, h, w)."""
    channels = config.block_out_channels[0]
    return nn.Sequential(nn.GroupNorm(config.norm_num_groups, channels), nn.SiLU(),
                         nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(),
                         nn.Conv2d(channels, 1, 1))


def features(unet: UNet, x: Tensor, noise: Tensor, t: Tensor, context) -> Tensor:
    """Of latents x, noised to times t (B,): (B, C, h, w)."""
    alpha, sigma = SCHEDULE.alpha_sigma(SCHEDULE.timestep(t))
    noised = interpolate(noise, x, t) * broadcast_over(alpha + sigma, x)
    s = SCHEDULE.timestep(t).to(x.dtype).to(x.device)
    return unet.body(unet.read_in(noised), s, context).to(x.dtype)


def adversarial_loss(
    unet: UNet, heads: nn.Module, fake: Tensor, real: Tensor, context, fraction: Tensor,
    noise: Tensor,
) -> Tensor:
    """The sum of both losses, (B,). unet: frozen; fraction (B,): of the schedule, where to look."""
    t = schedule_time(fraction)
    of_fake = features(unet, fake, noise, t, context)
    with torch.no_grad():
        of_real = features(unet, real, noise, t, context)
    frozen = {name: weight.detach() for name, weight in heads.named_parameters()}
    fooled = functional_call(heads, frozen, of_fake)
    hinge = F.relu(1 - heads(of_real)) + F.relu(1 + heads(of_fake.detach()))
    return (hinge - WEIGHT * fooled).flatten(1).mean(1)
