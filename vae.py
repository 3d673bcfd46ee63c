"""The KL autoencoder of Stable Diffusion. Images become latents of 1/8 the resolution, and back.

The diffusion and the flow run in its latent space, where a 512 x 512 image is a (4, 64, 64) latent:

    encode   images (B, 3, H, W) in [-1, 1]  ->  normal distribution over (B, 4, H/8, W/8)
    decode   latents (B, 4, H/8, W/8)        ->  (B, 3, H, W) in [-1, 1], with slight overshoot

Stable Diffusion multiplies latents by 0.18215, which gives them about unit variance. `encode`
returns the distribution before this scaling. `encode_latents` and `decode` use SD-scaled latents,
like the rest of the project. Encoder and decoder are residual blocks, with one self-attention at
the lowest resolution:

             SD's decoder      resolution (of 512)
    mid      512 -> 512         64     residual block, attention, residual block
    up       512 -> 512         64     3 residual blocks, double
             512 -> 512        128     3 residual blocks, double
             512 -> 256        256     3 residual blocks, double
             256 -> 128        512     3 residual blocks

The encoder mirrors the decoder, with 2 residual blocks a level. Attributes have diffusers' names.
Sources: Rombach et al. 2022 (arXiv 2112.10752), Esser et al. 2021 (2012.09841).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder; the defaults are Stable Diffusion 1.x."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def downsampling(self) -> int:
        """Image height / latent height: each level but the last halves, so 8 for SD."""
        return 2 ** (len(self.block_out_channels) - 1)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


class SelfAttention(nn.Module):
    """Single-head attention over all pixels."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)[:, None]  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        h = self.to_out[0](h[:, 0]).unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)  # (B, C, H, W)
        return x + h


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([SelfAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """A convolution of stride 2. As in the original, only the bottom and right are padded."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution. `resample`: "down" then halves it, "up" doubles it."""

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, resample: str | None,
    ):
        super().__init__()
        inputs = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(n, out_channels, groups) for n in inputs)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] * (resample == "down"))
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] * (resample == "up"))

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block, groups,
                  "down" if i < last else None)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.gradient_checkpointing = False
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups,
                  "up" if i < last else None)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """`encode`, `encode_latents` and `decode`, with shapes and units as at the top of this file."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and logvar of unscaled (B, 4, H/8, W/8)."""
        moments = self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # as in the original: finite exp

    def encode_latents(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] -> SD-scaled latents, the mean of their distribution."""
        return self.config.scaling_factor * self.encode(images)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """SD-scaled latents (B, 4, h, w) -> images (B, 3, 8h, 8w) in [-1, 1]."""
        latents = latents.to(self.post_quant_conv.weight.dtype) / self.config.scaling_factor
        return self.decoder(self.post_quant_conv(latents))
