"""Another autoencoder for a model, such as sd-vae-ft-mse: a diffusers folder or a single file."""

import re
from pathlib import Path

import torch

from command import BadInput
from formats.diffusers_folder import (
    NETWORKS, check_values, read_json, vae_from_diffusers, vae_keys, weight_files,
)
from formats.single_file import VAE_PREFIX, original_names, single_file_names, unread
from formats.weights import (
    MALFORMED, check_unused_tensors, load_weights, open_safetensors, set_memory_format,
)
from stable_diffusion import StableDiffusion
from vae import AutoencoderKL

TRAINING = ("loss.", "model_ema.")  # beside the autoencoder in the original's files


def replace_vae(model: StableDiffusion, path: str | Path) -> None:
    """Put the autoencoder of a file or folder into the model. BadInput: it is none, or another."""
    path, config = Path(path), model.vae.config
    if path.is_dir():
        found = read_json(path / "config.json")
        check_values(path / "config.json", found, NETWORKS["vae"])
        try:
            theirs = vae_from_diffusers(found)
        except MALFORMED as problem:
            raise BadInput(f"{path}: its configuration is not that of an SD 1.x autoencoder "
                           f"({problem!r}); give an AutoencoderKL") from None
        if theirs != config:
            raise BadInput(f"{path}: an autoencoder of other sizes or another scaling_factor than "
                           "the model's; give one made for it")
    elif path.suffix.lower() != ".safetensors" or not path.is_file():
        raise BadInput(f"{path}: " + (unread(path) if path.exists() else
                                      "no such file or folder; give an autoencoder of SD 1.x"))
    files = open_safetensors(weight_files(path) if path.is_dir() else [path])
    # Stable Diffusion XL's has the same sizes. A folder's config tells them apart.
    generic = path.name.startswith("diffusion_pytorch_model")
    name = path.absolute().parent.name if generic else path.name
    is_xl = path.is_file() and re.search("sd[-_]?xl", name.lower())
    if is_xl or any(key.startswith("conditioner.") for key in files):
        raise BadInput(f"{path}: an autoencoder of Stable Diffusion XL; give one of SD 1.x")
    with torch.device("meta"):
        vae = AutoencoderKL(config)
    set_memory_format(model.unet, vae, model.dtype)
    if any(key.startswith(VAE_PREFIX) for key in files):  # of a whole model
        files = {key: file for key, file in files.items() if key.startswith(VAE_PREFIX)}
    keys = names_in(files, list(vae.state_dict()), model)
    load_weights(vae, "autoencoder", keys, files, str(path), model.device, model.dtype)
    unknown = {key for key in files if not key.removeprefix(VAE_PREFIX).startswith(TRAINING)}
    check_unused_tensors(path, unknown - set(keys.values()), ("",))
    model.vae = vae.eval()


def names_in(files: dict, names: list[str], model: StableDiffusion) -> dict[str, str]:
    """Our names -> the file's: diffusers', of today or of 2022, or the original code's."""
    if any(key.startswith("encoder.down_blocks.") for key in files):
        return vae_keys(names, files)
    table = original_names(model.unet.config, model.vae.config)["vae"]
    keys = single_file_names("vae", names, table)
    if any(key.startswith(VAE_PREFIX) for key in files):
        return keys
    return {name: key.removeprefix(VAE_PREFIX) for name, key in keys.items()}
