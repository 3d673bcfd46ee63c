"""After HiPA: a small addition to a frozen Stable Diffusion, trained for its single step.

    y = end(X0 / 1.066, 0.064)      what one step of the network draws, decoded
    x                               the pair's picture
    min  D(y, x) + λ ( ‖high(y) - high(x)‖₁ + D(edges(y), edges(x)) )

One step of a diffusion has the coarse picture and lacks the fine one: its high frequencies. So the
loss asks for those by name, through a high-pass filter and through edges, beside a perceptual
distance D (LPIPS) of the pictures; and the network learns them in a LoRA (lora.py) of 0.4 % of its
size. In this frame it is InstaFlow's distillation straight from the teacher, with few weights and
another distance.

Differs from the paper: its exact distances, λ and data are not published where we could read; λ
here is 1, the filter takes away what a blur keeps, edges are Sobel's. Hence "after". The tiny model
has attention among 4 x 4 places alone, so its LoRA can do little for fine detail there.

Zhang et al. 2023 (HiPA, arXiv 2311.18158).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import diffusion_start
from fewstep.steps import FIRST, SCHEDULE, end
from rectified_flow import Distance, Velocity

WEIGHT = 1.0  # λ
BLUR = 4  # pixels of the box that a high-pass filter takes away
SOBEL = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]]) / 4


def high_pass(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) without what is left of it in boxes of BLUR pixels."""
    low = F.avg_pool2d(pictures, BLUR)
    return pictures - F.interpolate(low, size=pictures.shape[-2:], mode="bilinear")


def edges(pictures: Tensor) -> Tensor:
    """The size of the gradient in each channel, as pictures (B, 3, H, W) in [-1, 1]."""
    kernels = torch.stack([SOBEL, SOBEL.T])[:, None].to(pictures)  # (2, 1, 3, 3)
    flat = F.pad(pictures.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    across = F.conv2d(flat, kernels)  # (3 B, 2, H, W)
    sizes = (across.square().sum(1) + 1e-6).sqrt()  # of pictures in [-1, 1] at most √8
    return (2 / 8**0.5 * sizes - 1).unflatten(0, pictures.shape[:2])


def one_step(student: Velocity, x0: Tensor, context) -> Tensor:
    """The latent that a diffusion draws in a single step."""
    t = torch.full((len(x0),), FIRST)
    return end(student, diffusion_start(x0, SCHEDULE), t, context)


def loss(
    student: Velocity, x0: Tensor, x1: Tensor, context, *, decode: Callable, distance: Distance,
) -> Tensor:
    """(B,). x0 and x1 of a pair; decode: latents to pictures; distance: of pictures."""
    latents = one_step(student, x0, context)
    with torch.autocast(x0.device.type, enabled=False):  # in bf16 edges would be lost to rounding
        y = decode(latents)
        with torch.no_grad():
            x = decode(x1)
        fine = (high_pass(y) - high_pass(x)).abs().flatten(1).mean(1)
        return distance(y, x) + WEIGHT * (fine + distance(edges(y), edges(x)))
