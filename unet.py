"""The U-Net of Stable Diffusion 1.x. It predicts noise; after reflow it predicts velocity.

The down path halves the resolution at each level and stores every feature map as a skip. The up
path concatenates the skips in reverse order. At Stable Diffusion's sizes, for a 64 x 64 latent:

            channels       resolution   a layer is
    in         4 ->  320     64         3 x 3 convolution
    down     320 ->  320     64         2 x (residual block, attention), halve
             320 ->  640     32         2 x (residual block, attention), halve
             640 -> 1280     16         2 x (residual block, attention), halve
            1280 -> 1280      8         2 x (residual block)
    mid     1280 -> 1280      8         residual block, attention, residual block
    up      1280 -> 1280      8         3 x (residual block), double
            1280 -> 1280     16         3 x (residual block, attention), double
            1280 ->  640     32         3 x (residual block, attention), double
             640 ->  320     64         3 x (residual block, attention)
    out      320 ->    4     64         norm, SiLU, 3 x 3 convolution

"Attention" is a transformer block: self-attention over the pixels, cross-attention to the prompt's
tokens, a gated feed-forward layer. Attributes have diffusers' names, so diffusers folders load
without renaming.

Sources: Rombach et al. 2022 (arXiv 2112.10752), U-Net and cross-attention; Ho et al. 2020
(2006.11239), residual blocks and timestep embedding.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """Sizes; the defaults are Stable Diffusion 1.x's, the tiny models of toy/ have their own."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    attention_heads: int = 8  # diffusers' config.json calls it attention_head_dim
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    sample_size: int = 64  # height and width of the training latents
    stacked: bool = False  # two U-Nets in series (stacked_unet.py)
    second_time: bool = False  # a second timestep, for mean velocities (fewstep/meanflow.py)


def timestep_embedding(timestep: Tensor, channels: int) -> Tensor:
    """(B,) float -> (B, channels) float32: cosines, then sines; frequencies 1 down to 1/10000."""
    half = channels // 2
    k = torch.arange(half, device=timestep.device, dtype=torch.float32)
    angles = timestep.float()[:, None] * torch.exp(-math.log(10000) * k / half)  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    def __init__(self, channels: int, time_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; the time embedding is added between them."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.conv_shortcut(x)


LONG = 1024  # queries from which `attention_by_parts` pays
PART = 512  # queries: their scores for 4096 keys take 4 MB in bf16 and stay in a CPU's cache


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v of (B, heads, tokens, d)."""
    long_in_bf16 = q.is_cpu and q.dtype == torch.bfloat16 and q.shape[2] >= LONG
    if long_in_bf16 and not torch.is_grad_enabled():
        return attention_by_parts(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


# On a CPU PyTorch's attention is no faster in bf16 than in fp32; plain products are. An operator of
# its own, since torch.compile would unroll the loop; it has no backward pass.
@torch.library.custom_op("instaflow::attention_by_parts", mutates_args=())
def attention_by_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` of one head and PART queries at a time.

    q kᵀ is rounded to bf16: a score between 16 and 32 changes by up to 0.06.
    """
    k = k.transpose(2, 3) / math.sqrt(q.shape[3])
    by_head = zip(*(tensor.flatten(0, 1) for tensor in (q, k, v)))
    return torch.stack([torch.cat([(part @ k).softmax(-1) @ v for part in q.split(PART)])
                        for q, k, v in by_head]).view(q.shape)


attention_by_parts.register_fake(lambda q, k, v: q.new_empty(q.shape))


class Attention(nn.Module):
    """Multi-head attention from x to `context`; self-attention without a context."""

    def __init__(self, channels: int, context_channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        # (B, tokens, C) -> (B, heads, tokens, C / heads)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        h = attention(q, k, v)  # softmax(q kᵀ / √d) v
        return self.to_out[0](h.transpose(1, 2).flatten(2))  # (B, tokens, C)


class GatedGELU(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, channels: int, context_channels: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_channels, heads)
        self.norm3 = nn.LayerNorm(channels)
        gelu, linear = GatedGELU(channels, 4 * channels), nn.Linear(4 * channels, channels)
        # Identity replaces the original's dropout (rate 0), so that the last layer is named net.2.
        self.ff = nn.ModuleDict({"net": nn.Sequential(gelu, nn.Identity(), linear)})

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))  # self-attention
        x = x + self.attn2(self.norm2(x), context)  # cross-attention
        return x + self.ff["net"](self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map, between two 1 x 1 convolutions."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = TransformerBlock(channels, config.cross_attention_dim, config.attention_heads)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, C)
        h = self.transformer_blocks[0](h, context)
        h = h.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)  # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to the next skip's size: 2 H, or 2 H - 1 if that size is odd."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Row(NamedTuple):
    """One row of the table above, which is one level of the U-Net."""

    inputs: list[int]  # input channels of each residual block, the up path's with the skip
    channels: int  # output channels
    attentions: int  # number of transformers, one after each of the first residual blocks
    resample: bool  # whether the level ends by halving or doubling the resolution


def rows_of(config: UNetConfig) -> tuple[list[Row], Row, list[Row]]:
    """The down, mid and up rows of the table at the top of this file, for any config."""
    widths, attends = config.block_out_channels, config.attention_levels
    layers, last = config.layers_per_block, len(widths) - 1
    down, up, before, skips = [], [], widths[0], [widths[0]]  # skips: channels of every skip
    for level, width in enumerate(widths):
        inputs = [before] + [width] * (layers - 1)
        down.append(Row(inputs, width, layers * attends[level], level < last))
        skips += [width] * (layers + (level < last))  # the halved feature map is a skip too
        before = width
    mid = Row([before, before], before, 1, False)
    for level, width in reversed(list(enumerate(widths))):
        inputs = [channels + skips.pop() for channels in [before] + [width] * layers]
        up.append(Row(inputs, width, (layers + 1) * attends[level], level > 0))
        before = width
    return down, mid, up


class Level(nn.Module):
    """Residual blocks at one resolution, each with or without a transformer after it."""

    def __init__(self, row: Row, config: UNetConfig):
        super().__init__()
        out, time, groups = row.channels, 4 * config.block_out_channels[0], config.norm_num_groups
        self.resnets = nn.ModuleList(ResnetBlock(n, out, time, groups) for n in row.inputs)
        transformers = (SpatialTransformer(out, config) for _ in range(row.attentions))
        self.attentions = nn.ModuleList(transformers)

    def layer(self, index: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[index](x, time)
        return self.attentions[index](x, context) if index < len(self.attentions) else x

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        for index in range(len(self.resnets)):
            x = self.layer(index, x, time, context)
        return x


class DownLevel(Level):
    def __init__(self, row: Row, config: UNetConfig):
        super().__init__(row, config)
        self.downsamplers = nn.ModuleList([Downsample(row.channels)] * row.resample)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> list[Tensor]:
        """The skips of this level; the last one is its output."""
        skips = [x]
        for index in range(len(self.resnets)):
            skips.append(self.layer(index, skips[-1], time, context))
        return skips[1:] + [halve(skips[-1]) for halve in self.downsamplers]


class UpLevel(Level):
    def __init__(self, row: Row, config: UNetConfig):
        super().__init__(row, config)
        self.upsamplers = nn.ModuleList([Upsample(row.channels)] * row.resample)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, skips: list, size: torch.Size):
        """skips: one for each layer, in order. size: height and width of the next level."""
        for index, skip in enumerate(skips):
            x = self.layer(index, torch.cat([x, skip], dim=1), time, context)
        return self.upsamplers[0](x, size) if self.upsamplers else x


class UNet(nn.Module):
    """unet(x, timestep, context) predicts noise or velocity at a timestep in [0, 1000].

    x (B, in_channels, H, W), timestep (B,) float, context (B, L, cross_attention_dim)
    -> (B, out_channels, H, W) in the dtype of the weights, or of autocast; H, W >= 2^(levels - 1).
    With config.second_time: mean velocity from `timestep` to `until` (B,), by default `timestep`.
    residuals: added to the skips, the last to the mid block's output (controlnet.py).
    `gradient_checkpointing = True`: the backward pass recomputes each level, a third more time.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        first = config.block_out_channels[0]
        down, mid, up = rows_of(config)
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = TimestepEmbedding(first, 4 * first)
        if config.second_time:
            self.until_embedding = TimestepEmbedding(first, 4 * first)
        self.down_blocks = nn.ModuleList(DownLevel(row, config) for row in down)
        self.mid_block = Level(mid, config)
        self.up_blocks = nn.ModuleList(UpLevel(row, config) for row in up)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, until: Tensor | None = None,
        residuals: list[Tensor] | None = None,
    ) -> Tensor:
        return self.read_out(self.body(self.read_in(x), timestep, context, until, residuals))

    def read_in(self, x: Tensor) -> Tensor:
        return self.conv_in(x.to(self.conv_in.weight.dtype))

    def read_out(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def body(
        self, x: Tensor, timestep: Tensor, context: Tensor, until: Tensor | None = None,
        residuals: list[Tensor] | None = None,
    ) -> Tensor:
        """All between the outer convolutions: (B, block_out_channels[0], H, W) -> same shape."""
        first, dtype = self.config.block_out_channels[0], self.time_embedding.linear_1.weight.dtype
        context = context.to(dtype)
        time = self.time_embedding(timestep_embedding(timestep, first).to(dtype))
        if self.config.second_time:
            until = timestep if until is None else until
            time = time + self.until_embedding(timestep_embedding(until, first).to(dtype))
        skips = [x]
        for block in self.down_blocks:
            skips += self._run(block, skips[-1], time, context)
        x = self._run(self.mid_block, skips[-1], time, context)
        if residuals is not None:
            skips = [skip + more for skip, more in zip(skips, residuals[:-1], strict=True)]
            x = x + residuals[-1]
        for block in self.up_blocks:
            taken = [skips.pop() for _ in block.resnets]
            size = skips[-1].shape[-2:] if skips else x.shape[-2:]
            x = self._run(block, x, time, context, taken, size)
        return x

    def _run(self, block: Level, *inputs):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
