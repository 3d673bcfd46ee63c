"""InstaFlow-1.7B's student: two U-Nets in series, for distill.py --student stacked."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from unet import UNet, UNetConfig


class StackedUNet(nn.Module):
    """Two U-Nets in series that share no weights: InstaFlow-1.7B's student. Called like a UNet.

    1,719,017,924 parameters at Stable Diffusion's sizes. The first has no output block, the second
    no input convolution, so all 320 channels pass on. InstaFlow (arXiv 2309.06380) removes layers
    there too; accounts differ on how many.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.first, self.second = UNet(config), UNet(config)
        del self.first.conv_norm_out, self.first.conv_out, self.second.conv_in

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        features = self.first.body(self.first.read_in(x), timestep, context)
        return self.second.read_out(self.second.body(features, timestep, context))


def build_unet(config: UNetConfig) -> UNet | StackedUNet:
    return StackedUNet(config) if config.stacked else UNet(config)


def stack(unet: UNet) -> StackedUNet:
    """A StackedUNet; each half gets its own copy of this U-Net's weights."""
    with torch.device("meta"):
        stacked = StackedUNet(replace(unet.config, stacked=True))
    weights = unet.state_dict()
    for half in (stacked.first, stacked.second):
        half.load_state_dict({k: weights[k].clone() for k in half.state_dict()}, assign=True)
    return stacked
