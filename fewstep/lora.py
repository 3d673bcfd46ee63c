"""LoRA: train a product of two thin matrices beside a frozen one.

    W x  ->  W x + B A x        A (rank, in) random, B (out, rank) zero, so that it starts as W

Only A and B train. Afterwards W + B A is merged into one matrix. Hu et al. 2021 (arXiv 2106.09685).
"""

import copy

from torch import Tensor, nn

from unet import Attention, UNet

RANK = 16  # 3.2 million parameters on Stable Diffusion 1.x, as in HiPA


class LoRA(nn.Module):
    """A frozen linear map or convolution with a low-rank addition."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int):
        super().__init__()
        self.base = base
        if isinstance(base, nn.Conv2d):  # the kernel, then 1 x 1
            same = {"stride": base.stride, "padding": base.padding, "bias": False}
            self.down = nn.Conv2d(base.in_channels, rank, base.kernel_size, **same)
            self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(base.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base.out_features, bias=False)
        self.to(base.weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def merged(self) -> nn.Module:
        weight, change = self.base.weight, self.up.weight.flatten(1) @ self.down.weight.flatten(1)
        layer = copy.deepcopy(self.base)
        layer.weight.data.copy_((weight + change.reshape(weight.shape)).detach())
        return layer


def add_lora(unet: UNet, rank: int = RANK, everywhere: bool = False) -> None:
    """Freeze the network and add LoRA to every attention's q, k, v and output, in place.

    everywhere: to every linear map and convolution but the outer two, as most LoRA files do. A
    student of the negated start has the opposite sign in the last one.
    """
    unet.requires_grad_(False)
    wanted, outer = ("to_q", "to_k", "to_v", "to_out"), (unet.conv_in, unet.conv_out)
    for module in list(unet.modules()):
        inside = isinstance(module, Attention)
        for name, child in list(module.named_children()):
            if child in outer:
                continue
            if inside and name == "to_out" and not everywhere:
                child[0] = LoRA(child[0], rank)
            elif isinstance(child, (nn.Linear, nn.Conv2d)) and (
                    everywhere or inside and name in wanted):
                setattr(module, name, LoRA(child, rank))


def has_lora(unet: nn.Module) -> bool:
    return any(isinstance(module, LoRA) for module in unet.modules())


def merged(unet: UNet) -> UNet:
    """A copy with each LoRA merged into its linear map."""
    unet = copy.deepcopy(unet)
    for module in list(unet.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRA):
                setattr(module, name, child.merged())
    return unet
