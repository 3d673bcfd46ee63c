"""ControlNets of Stable Diffusion 1.x in, for controlnet.py: three layouts of the same tensors.

    canny/config.json, diffusion_pytorch_model.safetensors      a diffusers folder, our own names
    canny.safetensors    control_model.zero_convs.0.0.weight    the original file, ...
    canny.safetensors    zero_convs.0.0.weight                  ... and without the prefix

The weight file of a diffusers folder is also read by itself. A file has no config, so its sizes are
taken from the U-Net that it controls.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from command import BadInput
from formats.diffusers_folder import (
    NETWORKS, check_values, read_json, unet_from_diffusers, weight_files,
)
from formats.single_file import UNET_PREFIX, original_names, single_file_names, unread
from formats.weights import MALFORMED, check_unused_tensors, load_weights, open_safetensors
from unet import UNet, UNetConfig
from vae import VAEConfig

CONFIG = NETWORKS["unet"] | {  # with the values that are implemented
    "_class_name": "ControlNetModel", "conditioning_channels": 3,
    "controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False,
}
CONDITION_CHANNELS = (16, 32, 96, 256)  # of every original file
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
PREFIX = "control_model."


def open_controlnet(path: Path, unet: UNetConfig) -> tuple[dict, tuple[int, ...]]:
    """(tensor name -> the open file that holds it, channels of the condition's embedding).

    unet: of the U-Net to control. BadInput: no ControlNet that is read here, or of another U-Net.
    """
    if unet.stacked:
        raise BadInput(f"{path}: a ControlNet steers one U-Net, and --model is a stacked student; "
                       "give a model with one U-Net")
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder; give a ControlNet of SD 1.x")
    if not path.is_dir() and path.suffix.lower() != ".safetensors":
        raise BadInput(f"{path}: {unread(path)}")
    files = open_safetensors(weight_files(path) if path.is_dir() else [path])
    for key in (key for key in files if key.endswith(".attn2.to_k.weight")):
        *_, found = 0, *files[key].get_slice(key).get_shape()
        if found != unet.cross_attention_dim:
            raise BadInput(f"{path}: a ControlNet for {FAMILIES.get(found, 'another model')}: its "
                           f"cross_attention_dim is {found}, and that of --model is "
                           f"{unet.cross_attention_dim}; give a ControlNet made for this model")
    if not path.is_dir():
        # The weights do not say so: the name of the file or, if it is no original one, the folder.
        parts = path.absolute().parts[-1 if path.name.startswith("control_v") else -2 :]
        if "shuffle" in "/".join(parts).lower():
            raise BadInput(f"{path}: by its name a ControlNet that averages its residuals over the "
                           "image (shuffle), which this project does not implement")
        return files, CONDITION_CHANNELS
    config = read_json(path / "config.json")
    check_values(path / "config.json", config, CONFIG)
    try:
        own = {"out_channels": unet.out_channels, "sample_size": unet.sample_size}
        built, expected = asdict(unet_from_diffusers(config | own)), asdict(unet)
        channels = tuple(config.get("conditioning_embedding_out_channels", CONDITION_CHANNELS))
        if not channels or not all(type(n) is int and n > 0 for n in channels):
            raise ValueError(f"conditioning_embedding_out_channels is {list(channels)}")
    except MALFORMED as problem:
        raise BadInput(f"{path}: its configuration is not that of an SD 1.x ControlNet "
                       f"({problem!r}); get it again") from None
    for name in built:
        if built[name] != expected[name] and name != "second_time":
            raise BadInput(f"{path}: its {name} is {built[name]}, and that of --model is "
                           f"{expected[name]}; give a ControlNet made for this model")
    return files, channels


def fill_controlnet(controlnet: nn.Module, path: Path, files: dict, unet: UNet) -> None:
    """Fill a ControlNet on the meta device; device, dtype and memory format are the U-Net's.

    files: from `open_controlnet`. BadInput: tensors are missing, unknown or of the wrong shape.
    """
    weight, names = unet.conv_in.weight, list(controlnet.state_dict())
    if weight.is_contiguous(memory_format=torch.channels_last):
        controlnet.to(memory_format=torch.channels_last)
    keys = {name: name for name in names}
    if not any(key.startswith("controlnet_") for key in files):
        prefix = PREFIX if any(key.startswith(PREFIX) for key in files) else ""
        originals = original_controlnet_names(names, unet.config)
        keys = {name: prefix + key for name, key in originals.items()}
    load_weights(controlnet, "ControlNet", keys, files, str(path), weight.device, weight.dtype)
    check_unused_tensors(path, set(files) - set(keys.values()), ("",))


def original_controlnet_names(names: Iterable[str], unet: UNetConfig) -> dict[str, str]:
    """Our names -> the original code's, without a prefix; the U-Net's part by its own table."""
    own = [name for name in names if name.startswith("controlnet_")]
    shared = [name for name in names if not name.startswith("controlnet_")]
    table = original_names(unet, VAEConfig())["unet"]
    renamed = {name: key.removeprefix(UNET_PREFIX)
               for name, key in single_file_names("unet", shared, table).items()}
    # Every second layer of the original's embedding is a SiLU.
    convolutions = ["conv_in", *(f"blocks.{k}" for k in range(6)), "conv_out"]
    hints = {f"controlnet_cond_embedding.{our}": f"input_hint_block.{2 * k}"
             for k, our in enumerate(convolutions)}
    for name in own:
        module, _, weight = name.rpartition(".")  # weight or bias
        zero = module.replace("controlnet_down_blocks.", "zero_convs.").replace(
            "controlnet_mid_block", "middle_block_out") + ".0"
        renamed[name] = f"{hints.get(module, zero)}.{weight}"
    return renamed
