"""ControlNet: a second network steers the U-Net by an image, such as edges, depth or a pose.

    residuals = zero convolutions(a copy of the U-Net's down path and middle(x, embedding(image)))
    skips of the U-Net += scale · residuals,   output of its middle += scale · the last residual

Zero convolutions start at zero: training begins at the U-Net as it was. The U-Net stays frozen, so
ControlNets of Stable Diffusion 1.x also steer its fine-tunes, flows and one-step models.

    python sample.py --model sd15.safetensors --prompt "a house in the snow" \\
        --controlnet canny.safetensors --control-image photo.png --canny

Source: Zhang et al. 2023 (arXiv 2302.05543).
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command import BadInput, check_not_overwriting, non_negative
from formats.controlnet import CONDITION_CHANNELS, fill_controlnet, open_controlnet
from formats.images import read_condition
from unet import DownLevel, Level, TimestepEmbedding, UNet, UNetConfig, rows_of, timestep_embedding


def zero_convolution(inputs: int, outputs: int, kernel: int = 1) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    for weight in convolution.parameters():
        nn.init.zeros_(weight)
    return convolution


class ConditionEmbedding(nn.Module):
    """The condition at the size of a latent: (B, 3, 8 h, 8 w) -> (B, out_channels, h, w)."""

    def __init__(self, out_channels: int, channels: tuple[int, ...]):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for before, after in zip(channels, channels[1:]):
            self.blocks.append(nn.Conv2d(before, before, 3, padding=1))
            self.blocks.append(nn.Conv2d(before, after, 3, stride=2, padding=1))
        self.conv_out = zero_convolution(channels[-1], out_channels, kernel=3)

    def forward(self, condition: Tensor) -> Tensor:
        h = F.silu(self.conv_in(condition))
        for block in self.blocks:
            h = F.silu(block(h))
        return self.conv_out(h)


class ControlNet(nn.Module):
    """Residuals for a U-Net of this config. 361,279,120 parameters at Stable Diffusion's sizes."""

    def __init__(self, config: UNetConfig, channels: tuple[int, ...] = CONDITION_CHANNELS):
        super().__init__()
        self.config = config
        self.downsampling = 2 ** (len(channels) - 1)  # condition height / latent height
        first = config.block_out_channels[0]
        down, mid, _ = rows_of(config)
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = TimestepEmbedding(first, 4 * first)
        self.controlnet_cond_embedding = ConditionEmbedding(first, channels)
        self.down_blocks = nn.ModuleList(DownLevel(row, config) for row in down)
        self.mid_block = Level(mid, config)
        skips = [n for row in down for n in [row.channels] * (len(row.inputs) + row.resample)]
        self.controlnet_down_blocks = nn.ModuleList(zero_convolution(n, n) for n in [first, *skips])
        self.controlnet_mid_block = zero_convolution(mid.channels, mid.channels)

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, condition: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        """(a residual for each skip, the residual of the middle), shaped like what they add to.

        x, timestep, context: as of the U-Net. condition (1 or B, 3, H, W) in [0, 1]; H, W are
        `downsampling` times those of x; one condition serves the whole batch.
        """
        dtype = self.conv_in.weight.dtype
        time = timestep_embedding(timestep, self.config.block_out_channels[0])
        time, context = self.time_embedding(time.to(dtype)), context.to(dtype)
        skips = [self.conv_in(x.to(dtype)) + self.controlnet_cond_embedding(condition.to(dtype))]
        for block in self.down_blocks:
            skips += block(skips[-1], time, context)
        mid = self.controlnet_mid_block(self.mid_block(skips[-1], time, context))
        return [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips)], mid


class ControlledUNet(nn.Module):
    """A U-Net with ControlNets, called like the U-Net."""

    def __init__(self, unet: UNet, controls: list[tuple[ControlNet, Tensor, float]]):
        super().__init__()
        self.unet, self.config = unet, unet.config
        controlnets, self.conditions, self.scales = zip(*controls)
        self.controlnets = nn.ModuleList(controlnets)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, until: Tensor | None = None):
        residuals = []
        for controlnet, condition, scale in zip(self.controlnets, self.conditions, self.scales):
            down, mid = controlnet(x, timestep, context, condition)
            residuals.append([scale * residual for residual in (*down, mid)])
        return self.unet(x, timestep, context, until, [sum(parts) for parts in zip(*residuals)])


def controlled(unet: UNet, controls: list[tuple[ControlNet, Tensor, float]]) -> nn.Module:
    """The U-Net with each (ControlNet, condition (1, 3, H, W) in [0, 1], scale), summed."""
    return ControlledUNet(unet, controls) if controls else unet


def load(path: str | Path, unet: UNet) -> ControlNet:
    """The ControlNet in a file or folder, for this U-Net and in its dtype. BadInput: not one."""
    files, channels = open_controlnet(Path(path), unet.config)
    with torch.device("meta"):
        controlnet = ControlNet(unet.config, channels)
    fill_controlnet(controlnet, Path(path), files, unet)
    return controlnet.eval()


def add_control_options(parser: ArgumentParser) -> None:
    """The flags that `control` reads."""
    title = "ControlNet; repeat the flags for several, the first image and scale go to the first"
    add = parser.add_argument_group(title).add_argument
    add("--controlnet", action="append", default=[], help="of SD 1.x: a file or diffusers folder")
    add("--control-image", action="append", default=[], help="resized and cropped to the output")
    add("--control-scale", action="append", type=non_negative, default=[], help="default: 1.0 each")
    add("--canny", action="store_true", help="use the edges of every control image")


def control(model, args: Namespace, size: tuple[int, int]) -> dict:
    """Put the ControlNets of the flags around model.unet, in place; {flag: value} for metadata.

    model: a StableDiffusion. size: (height, width) of its images in pixels. BadInput: bad flags.
    """
    nets, images, scales = map(len, (args.controlnet, args.control_image, args.control_scale))
    if images != nets or scales not in (0, nets) or (args.canny and not nets):
        raise BadInput(f"--controlnet, --control-image, --control-scale: given {nets}, {images} "
                       f"and {scales} times; give each ControlNet an image and at most one scale; "
                       "--canny needs a ControlNet")
    if not nets:
        return {}
    scales, controls = args.control_scale or [1.0] * nets, []
    for path, image, scale in zip(args.controlnet, args.control_image, scales):
        check_not_overwriting(args.out, {"--control-image": image})
        controlnet = load(path, model.unet)
        factor = controlnet.downsampling / model.vae.config.downsampling  # 1 in SD
        height, width = (round(side * factor) for side in size)
        condition = read_condition(image, height, width, args.canny).to(model.device)
        controls.append((controlnet, condition, scale))
    model.unet = controlled(model.unet, controls)
    names = [Path(path).name for path in args.controlnet]
    return {"controlnet": names, "control_scale": scales, "canny": args.canny}
