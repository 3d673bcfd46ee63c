"""Perceptual distances of images, for distillation and for training the tiny autoencoders.

LPIPS (Zhang et al. 2018, arXiv 1801.03924) compares the features that a backbone sees in two
images, from the lpips package, whose trained backbones are downloaded at first use. "random" needs
no download: the same distance on a SqueezeNet with random weights, which already orders distortions
better than L2 (same paper). "efficientnet" is the same distance on a trained network that pip
installs (efficientnet.py); its layers are not calibrated.
"""

import pickle
import warnings

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from command import BadInput, first_line, is_out_of_memory
from evaluation.efficientnet import load_efficientnet
from rectified_flow import Distance

NETS = ("vgg", "alex", "squeeze", "random", "efficientnet")
RANDOM_NET_SEED = 1
# What torch, transformers and safetensors raise for a damaged file.
UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError)


def perceptual_distance(net: str, device: torch.device) -> Distance:
    """The distance of images (B, 3, H, W) in [-1, 1]: (B,); fp32, frozen. net: one of NETS.

    BadInput: the backbone is missing or damaged, and cannot be downloaded.
    """
    if net == "efficientnet":
        return efficientnet_distance(device)
    import lpips  # takes seconds, and most commands do not need it

    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")  # torchvision renamed an argument that lpips still uses
            torch.manual_seed(RANDOM_NET_SEED)
            if net == "random":
                # lpips=False: no trained calibration, all layers weigh the same.
                network = lpips.LPIPS(net="squeeze", pnet_rand=True, lpips=False, verbose=False)
            else:
                network = lpips.LPIPS(net=net, verbose=False)
    except UNREADABLE as problem:
        if is_out_of_memory(problem):
            raise
        raise BadInput(f"--lpips-net {net}: its backbone could not be downloaded or read "
                       f"({first_line(problem)}); put the file into torch's hub cache, or take "
                       "--lpips-net random") from None
    network.requires_grad_(False).eval().to(device)

    def distance(images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):  # lpips gives NaN in half precision
            return network(images.float(), targets.float()).flatten()

    return distance


def efficientnet_distance(device: torch.device) -> Distance:
    """The same on EfficientNet's stages, all weighed the same."""
    network = load_efficientnet("--lpips-net efficientnet").to(device)

    def distance(images: Tensor, targets: Tensor) -> Tensor:
        total = 0
        with torch.autocast(device.type, enabled=False):
            maps = zip(network.maps(images.float()), network.maps(targets.float()))
            for found, wanted in maps:  # (B, C, h, w)
                apart = F.normalize(found, dim=1, eps=1e-6) - F.normalize(wanted, dim=1, eps=1e-6)
                total = total + apart.square().sum(1).mean((1, 2))
        return total

    return distance
