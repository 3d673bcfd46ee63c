"""The U-Net of Stable Diffusion 1.x: the network that predicts noise, and after reflow, velocity.

It sees a latent x (B, 4, H, W), a timestep (B,) and the text as context (B, L, 768), and answers
with something of x's shape. A down path halves the resolution level by level and remembers every
state; an up path takes those states back in reverse order. At Stable Diffusion's sizes, for a
64 x 64 latent:

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

"Attention" is a transformer block: the pixels look at each other, then at the words of the prompt,
then pass a gated feed-forward layer. Sizes come from `UNetConfig`, so the tiny model of `toy/` is
the same class. Attributes carry the names of the diffusers layout: a diffusers folder loads without
renaming.

Sources: Rombach et al. 2022 (arXiv 2112.10752), U-Net and cross-attention; Ho et al. 2020
(2006.11239), residual blocks and timestep embedding.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the U-Net; the defaults are Stable Diffusion 1.x."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    attention_heads: int = 8  # in diffusers' config.json this number is called attention_head_dim
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    sample_size: int = 64  # height and width of the latent the model was trained at
    stacked: bool = False  # two in series: StackedUNet
    second_time: bool = False  # until when? It then answers with a mean velocity


def timestep_embedding(timestep: Tensor, channels: int) -> Tensor:
    """Cosines and sines of the timestep at `channels / 2` frequencies from 1 down to 1/10000.

    timestep (B,) float -> (B, channels) float32. The Transformer's position code, cosines first.
    """
    half = channels // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, device=timestep.device, dtype=torch.float32) / half
    )
    angles = timestep.float()[:, None] * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    def __init__(self, channels: int, time_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def unheeded_embedding(config: UNetConfig) -> TimestepEmbedding:
    """That of a second time, which begins at zero: as a network of one time."""
    first = config.block_out_channels[0]
    embedding = TimestepEmbedding(first, 4 * first)
    for weight in embedding.linear_2.parameters():
        nn.init.zeros_(weight)
    return embedding


class ResnetBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut; the time enters as a shift between them."""

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


class Attention(nn.Module):
    """Multi-head attention from x to `context`, or to x itself where no context is given."""

    def __init__(self, channels: int, context_channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            # (B, tokens, C) -> (B, heads, tokens, C / heads)
            project(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](h.transpose(1, 2).flatten(2))  # (B, tokens, C)


class GatedGELU(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        # The middle is dropout in the original (rate 0); it stays so that the last is named net.2.
        self.net = nn.Sequential(
            GatedGELU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, channels: int, context_channels: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, heads)  # pixels to pixels
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_channels, heads)  # pixels to words
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


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
        height, width = x.shape[-2:]
        # (B, C, H, W) -> (B, HW, C)
        h = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2)
        h = self.transformer_blocks[0](h, context)
        h = h.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement to the next skip's size (twice, or one less if it was odd)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Row(NamedTuple):
    """A row of the table above: a level's residual blocks, and what stands between them."""

    inputs: list[int]  # channels into each residual block; on the way up with those of the skip
    channels: int  # out of each
    attentions: int  # transformers, one after each of the first residual blocks
    resample: bool  # is the resolution changed at its end?


def rows_of(config: UNetConfig) -> tuple[list[Row], Row, list[Row]]:
    """The rows of the table at the top of this file, down, mid and up, for any config."""
    widths, layers = config.block_out_channels, config.layers_per_block
    last = len(widths) - 1
    down, before, skips = [], widths[0], [widths[0]]  # skips: channels of every remembered state
    for level, width in enumerate(widths):
        attentions = layers * config.attention_levels[level]
        down.append(Row([before] + [width] * (layers - 1), width, attentions, level < last))
        skips += [width] * (layers + (level < last))  # the halved state is remembered too
        before = width
    mid = Row([before, before], before, 1, False)
    up = []
    for level, width in reversed(list(enumerate(widths))):
        inputs = [channels + skips.pop() for channels in [before] + [width] * layers]
        attentions = (layers + 1) * config.attention_levels[level]
        up.append(Row(inputs, width, attentions, level > 0))
        before = width
    return down, mid, up


class Level(nn.Module):
    """Residual blocks at one resolution, each maybe with a transformer. Base of the three paths."""

    def __init__(self, row: Row, config: UNetConfig):
        super().__init__()
        time_channels, groups = 4 * config.block_out_channels[0], config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, row.channels, time_channels, groups) for channels in row.inputs
        )
        self.attentions = nn.ModuleList(
            SpatialTransformer(row.channels, config) for _ in range(row.attentions)
        )

    def layer(self, index: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[index](x, time)
        return self.attentions[index](x, context) if index < len(self.attentions) else x


class DownLevel(Level):
    def __init__(self, row: Row, config: UNetConfig):
        super().__init__(row, config)
        self.downsamplers = nn.ModuleList([Downsample(row.channels)] * row.resample)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> list[Tensor]:
        """Every state on the way; the last is the level's output."""
        states = []
        for index in range(len(self.resnets)):
            x = self.layer(index, x, time, context)
            states.append(x)
        return states + [halve(x) for halve in self.downsamplers]


class MidLevel(Level):
    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        for index in range(len(self.resnets)):
            x = self.layer(index, x, time, context)
        return x


class UpLevel(Level):
    def __init__(self, row: Row, config: UNetConfig):
        super().__init__(row, config)
        self.upsamplers = nn.ModuleList([Upsample(row.channels)] * row.resample)

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor, skips: list[Tensor], size: torch.Size,
    ) -> Tensor:
        """skips: a state of the down path for each layer, as used; size: of the next level."""
        for index, skip in enumerate(skips):
            x = self.layer(index, torch.cat([x, skip], dim=1), time, context)
        for double in self.upsamplers:
            x = double(x, size)
        return x


class UNet(nn.Module):
    """unet(x, timestep, context): noise or velocity at a timestep in [0, 1000), given the text.

    With config.second_time it takes a second timestep, `until`, and answers with the mean velocity
    between the two (fewstep/meanflow.py); by default both are one.

    x (B, in_channels, H, W), timestep (B,) float, context (B, L, cross_attention_dim)
    -> (B, out_channels, H, W) in the dtype of the weights' computation. H and W may be any size of
    at least 2 ** (levels - 1). `gradient_checkpointing = True` recomputes each level in the
    backward pass: less memory, a third more time.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        first, groups = config.block_out_channels[0], config.norm_num_groups
        down, mid, up = rows_of(config)
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = TimestepEmbedding(first, 4 * first)
        if config.second_time:
            self.until_embedding = unheeded_embedding(config)
        self.down_blocks = nn.ModuleList(DownLevel(row, config) for row in down)
        self.mid_block = MidLevel(mid, config)
        self.up_blocks = nn.ModuleList(UpLevel(row, config) for row in up)
        self.conv_norm_out = nn.GroupNorm(groups, first)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, until: Tensor | None = None,
    ) -> Tensor:
        return self.read_out(self.body(self.read_in(x), timestep, context, until))

    def read_in(self, x: Tensor) -> Tensor:
        return self.conv_in(x.to(self.conv_in.weight.dtype))

    def read_out(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def body(
        self, x: Tensor, timestep: Tensor, context: Tensor, until: Tensor | None = None,
    ) -> Tensor:
        """Between the outer convolutions: (B, block_out_channels[0], H, W) to the same shape."""
        dtype = self.time_embedding.linear_1.weight.dtype
        context = context.to(dtype)
        first = self.config.block_out_channels[0]
        time = self.time_embedding(timestep_embedding(timestep, first).to(dtype))
        if self.config.second_time:
            until = timestep if until is None else until
            time = time + self.until_embedding(timestep_embedding(until, first).to(dtype))

        skips = [x]
        for block in self.down_blocks:
            skips += self._run(block, x, time, context)
            x = skips[-1]

        x = self._run(self.mid_block, x, time, context)

        for block in self.up_blocks:
            taken = [skips.pop() for _ in block.resnets]
            size = skips[-1].shape[-2:] if skips else x.shape[-2:]
            x = self._run(block, x, time, context, taken, size)
        return x

    def _run(self, block: Level, *inputs):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class StackedUNet(nn.Module):
    """Two U-Nets in series that share no weights: the student of InstaFlow-1.7B.

    Called like a UNet. The joint is thinned: the first's output block (norm, SiLU, convolution to 4
    channels) and the second's input block (convolution from 4 channels) are left out, and what the
    first has computed passes on in all its channels. At Stable Diffusion's sizes 1,719,017,924
    parameters. InstaFlow (arXiv 2309.06380) thins it too; accounts of it do not agree on how much.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.first, self.second = UNet(config), UNet(config)
        del self.first.conv_norm_out, self.first.conv_out, self.second.conv_in

    @property
    def gradient_checkpointing(self) -> bool:
        return self.first.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.first.gradient_checkpointing = self.second.gradient_checkpointing = value

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        features = self.first.body(self.first.read_in(x), timestep, context)
        return self.second.read_out(self.second.body(features, timestep, context))


def build_unet(config: UNetConfig) -> UNet | StackedUNet:
    return StackedUNet(config) if config.stacked else UNet(config)


def stack(unet: UNet) -> StackedUNet:
    """A stacked U-Net, both halves with this U-Net's weights."""
    with torch.device("meta"):
        stacked = StackedUNet(replace(unet.config, stacked=True))
    weights = unet.state_dict()
    for half in (stacked.first, stacked.second):
        state = {name: weights[name].clone() for name in half.state_dict()}
        half.load_state_dict(state, assign=True)
    return stacked


def started_from(unet: UNet, start: str | UNet, kind: str, seed: int) -> UNet:
    """What training starts from: the "teacher"'s weights, "negated" or "random", or another U-Net.

    "negated" changes the sign of what a diffusion predicts, in place. The velocity X1 - X0 contains
    -X0, and at t = 0 the noise prediction is X0 itself: the paper's start points away from its
    target, and this one half way towards it. On the tiny model the loss of reflow after 300 updates
    of 64 is 0.06, where the paper's start has 0.95 and after 1400 updates 0.07 (seed 0). A flow is
    left as it is.
    """
    like = next(unet.parameters())
    if isinstance(start, nn.Module):
        return start.to(like.device)
    if start == "random":
        torch.manual_seed(seed)
        return build_unet(unet.config).to(like)
    if start == "negated" and kind == "diffusion":
        with torch.no_grad():
            unet.conv_out.weight.neg_()
            unet.conv_out.bias.neg_()
    return unet
