"""LoRA: train a product of two thin matrices beside a frozen one.

    W x  ->  W x + B A x        A (rank, in) random, B (out, rank) zero, so that it starts as W

Only A and B train. Afterwards W + B A is merged into one matrix. Hu et al. 2021 (arXiv 2106.09685).
"""

import copy

from torch import Tensor, nn

from unet import Attention, UNet

RANK = 16  # 3.2 million parameters on Stable Diffusion 1.x, as in HiPA


class LoRA(nn.Module):
    """A frozen linear map with a low-rank addition."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False).to(base.weight)
        self.up = nn.Linear(rank, base.out_features, bias=False).to(base.weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        weight = self.base.weight + self.up.weight @ self.down.weight
        linear = copy.deepcopy(self.base)
        linear.weight.data.copy_(weight.detach())
        return linear


def add_lora(unet: UNet, rank: int = RANK) -> None:
    """Freeze the network and add LoRA to every attention's q, k, v and output, in place."""
    unet.requires_grad_(False)
    for attention in [m for m in unet.modules() if isinstance(m, Attention)]:
        attention.to_q, attention.to_k, attention.to_v = (
            LoRA(linear, rank) for linear in (attention.to_q, attention.to_k, attention.to_v)
        )
        attention.to_out[0] = LoRA(attention.to_out[0], rank)


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
