"""After HiPA: a small addition to a frozen Stable Diffusion, trained for a single step.

    y = end(X0 / 1.066, 0.064)      the network's one-step image
    x                               the pair's image
    min  D(y, x) + λ ( ‖high(y) - high(x)‖₁ + D(edges(y), edges(x)) )

One step of a diffusion gives the coarse image but misses its high frequencies. So the loss asks for
them directly, through a high-pass filter and through edges, beside a perceptual distance D (LPIPS).
The network learns them in a LoRA (lora.py) on attention, 0.4 % of its size. In our terms it is
InstaFlow's distillation straight from the teacher, with few weights and another distance.

Differs from the paper: we could not find its exact distances, λ and data. Here λ is 1, the filter
removes what a blur keeps, and edges are Sobel's; hence "after". The tiny model has attention at
4 x 4 resolution only, so there the published LoRA does little for fine detail; compare.py has a row
with LoRA on convolutions too.

Zhang et al. 2023 (HiPA, arXiv 2311.18158).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import diffusion_start
from fewstep.steps import FIRST_TIME, SCHEDULE, end
from rectified_flow import Distance, Velocity

WEIGHT = 1.0  # λ
BLUR = 4  # side in pixels of the boxes whose mean the high-pass filter removes
SOBEL = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]]) / 4


def high_pass(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) minus their blur over boxes of BLUR pixels."""
    low = F.avg_pool2d(images, BLUR)
    return images - F.interpolate(low, size=images.shape[-2:], mode="bilinear")


def edges(images: Tensor) -> Tensor:
    """The gradient's magnitude in each channel, as images (B, 3, H, W) in [-1, 1]."""
    kernels = torch.stack([SOBEL, SOBEL.T])[:, None].to(images)  # (2, 1, 3, 3)
    flat = F.pad(images.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    gradients = F.conv2d(flat, kernels)  # (3 B, 2, H, W)
    magnitude = (gradients.square().sum(1) + 1e-6).sqrt()  # at most √8 for images in [-1, 1]
    return (2 / 8**0.5 * magnitude - 1).unflatten(0, images.shape[:2])


def one_step(student: Velocity, x0: Tensor, context) -> Tensor:
    """The latent that a diffusion generates in a single step."""
    t = torch.full((len(x0),), FIRST_TIME)
    return end(student, diffusion_start(x0, SCHEDULE), t, context)


def loss(
    student: Velocity, x0: Tensor, x1: Tensor, context, *, decode: Callable, distance: Distance,
) -> Tensor:
    """(B,). x0 and x1 of a pair; decode: latents to images; distance: of images."""
    latents = one_step(student, x0, context)
    with torch.autocast(x0.device.type, enabled=False):  # bf16 would round the edges away
        y = decode(latents)
        with torch.no_grad():
            x = decode(x1)
        fine = (high_pass(y) - high_pass(x)).abs().flatten(1).mean(1)
        return distance(y, x) + WEIGHT * (fine + distance(edges(y), edges(x)))
