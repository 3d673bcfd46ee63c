"""A single .safetensors file in the original Stable Diffusion layout, in and out.

Our modules carry diffusers' names; the single file carries the original code's names under three
prefixes. `original_names` is the table between the two, used in both directions. Loading is strict;
metadata is data: it is checked, and never names a file to open.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from command import BadInput, first_line, write_atomically
from diffusion import NoiseSchedule
from formats.tokenizers import added_tokens, tokenizer_from, tokenizer_parts
from formats.weights import (
    OURS, check_metadata, check_unused_tensors, empty_networks, identity_of, in_dtype, kind_by_name,
    load_weights, metadata_of, open_safetensors,
)
from stable_diffusion import StableDiffusion
from text_encoder import TextEncoderConfig
from unet import UNetConfig
from vae import VAEConfig

METADATA = "instaflow"  # one entry: safetensors writes several in any order
UNET_PREFIX, EMA_PREFIX = "model.diffusion_model.", "model_ema."
VAE_PREFIX, TEXT_PREFIX = "first_stage_model.", "cond_stage_model.transformer."


# --------------------------------------------------------------------------------------------------
# In


def load_single_file(
    path: Path, device, dtype, kind: str | None = None, use_ema: bool = False,
) -> StableDiffusion:
    """The model in a file. kind overrides what it says. BadInput: whatever is wrong with it."""
    files = open_safetensors([path])
    about = read_metadata(path, files)
    if use_ema and not any(key.startswith(EMA_PREFIX + "diffusion_model") for key in files):
        raise BadInput(f"{path}: holds no averaged weights ({EMA_PREFIX}*); leave --use-ema away")
    check_architecture(path, files, EMA_PREFIX if use_ema else UNET_PREFIX)
    networks = empty_networks(str(path), lambda: configs_in(about), dtype)
    table = original_names(networks["unet"].config, networks["vae"].config)
    used = set()
    for part, network in networks.items():
        keys = single_file_names(part, network.state_dict(), table[part])
        if part == "unet" and use_ema:
            used |= set(keys.values())
            dotless = lambda key: key.removeprefix("model.").replace(".", "")
            keys = {name: EMA_PREFIX + dotless(key) for name, key in keys.items()}
        if part == "vae" and any(".attn_1.to_q." in key for key in files):  # diffusers 0.17's names
            for old, new in ((".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."),
                             (".proj_out.", ".to_out.0.")):
                keys = {name: key.replace(f".attn_1{old}", f".attn_1{new}")
                        for name, key in keys.items()}
        if part == "text_encoder" and not any(
            k.startswith(TEXT_PREFIX + "text_model.") for k in files
        ):
            keys = {name: key.replace("text_model.", "", 1) for name, key in keys.items()}
        load_weights(network, part, keys, files, str(path), device, dtype)
        used |= set(keys.values())
    unused = {key for key in set(files) - used if not key.startswith(KNOWN_EXTRAS)}
    check_unused_tensors(path, unused, (UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX))
    return StableDiffusion(
        **networks, tokenizer=stored_tokenizer(path, about),
        kind=kind or about.get("kind") or kind_by_name(path, (path.stem,)),
        **identity_of(path, about, networks["unet"]),
    )


# --------------------------------------------------------------------------------------------------
# The name table


IN_UNET_RESNET = [
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
]
IN_VAE = [
    (".mid_block.resnets.0.", ".mid.block_1."), (".mid_block.resnets.1.", ".mid.block_2."),
    (".mid_block.attentions.0.", ".mid.attn_1."), (".group_norm.", ".norm."), (".to_q.", ".q."),
    (".to_k.", ".k."), (".to_v.", ".v."), (".to_out.0.", ".proj_out."),
    (".conv_norm_out.", ".norm_out."), (".conv_shortcut.", ".nin_shortcut."),
    (".resnets.", ".block."), (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."), ("encoder.down_blocks.", "encoder.down."),
]


def original_names(unet: UNetConfig, vae: VAEConfig) -> dict[str, list[tuple[str, str]]]:
    """For each network the (part of our name, part of the original name) that differ."""
    levels, layers = len(unet.block_out_channels), unet.layers_per_block
    table = [
        ("conv_in.", "input_blocks.0.0."),
        ("time_embedding.linear_1.", "time_embed.0."),
        ("time_embedding.linear_2.", "time_embed.2."),
        ("mid_block.attentions.0.", "middle_block.1."),
        ("conv_norm_out.", "out.0."),
        ("conv_out.", "out.2."),
    ]
    resnets = [("mid_block.resnets.0", "middle_block.0"), ("mid_block.resnets.1", "middle_block.2")]
    for i in range(levels):
        # Going down, blocks are counted from 1 (0 is conv_in), and halving is a block of its own.
        for j in range(layers):
            block = i * (layers + 1) + j + 1
            resnets.append((f"down_blocks.{i}.resnets.{j}", f"input_blocks.{block}.0"))
            table.append((f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{block}.1."))
        halving = (i + 1) * (layers + 1)
        table.append((f"down_blocks.{i}.downsamplers.0.conv.", f"input_blocks.{halving}.0.op."))
        # Going up, doubling is the last part of a level's last block, behind its attention if any.
        for j in range(layers + 1):
            block = i * (layers + 1) + j
            resnets.append((f"up_blocks.{i}.resnets.{j}", f"output_blocks.{block}.0"))
            table.append((f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{block}.1."))
        part = 2 if unet.attention_levels[levels - 1 - i] else 1
        table.append((f"up_blocks.{i}.upsamplers.0.conv.", f"output_blocks.{block}.{part}.conv."))
    table += [(f"{our}.{a}.", f"{their}.{b}.") for our, their in resnets for a, b in IN_UNET_RESNET]

    last = len(vae.block_out_channels) - 1  # the original counts the decoder's levels from the top
    up = [(f"decoder.up_blocks.{i}.", f"decoder.up.{last - i}.") for i in range(last + 1)]
    return {"unet": table, "vae": IN_VAE + up, "text_encoder": []}


def single_file_names(part: str, names: Iterable[str], table: list) -> dict[str, str]:
    """Our names of one network -> names in a single file."""
    prefix = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text_encoder": TEXT_PREFIX}[part]
    renamed = {}
    for name in names:
        original = name
        for ours, theirs in table:
            original = original.replace(ours, theirs)
        renamed[name] = prefix + original
    return renamed


# --------------------------------------------------------------------------------------------------
# What a single file says of itself


def read_metadata(path: Path, files: dict) -> dict:
    """The metadata of a file of ours; empty for those that others wrote."""
    metadata = (next(iter(files.values())).metadata() or {}) if files else {}
    text, predicts = metadata.get(METADATA), metadata.get("modelspec.prediction_type", "epsilon")
    architecture = metadata.get("modelspec.architecture", "stable-diffusion-v1")
    if predicts.lower() not in ("epsilon", "eps"):
        raise BadInput(f"{path}: predicts {predicts!r} (modelspec.prediction_type); this project "
                       "reads models that predict the noise, as SD 1.4 and 1.5 do")
    if not re.fullmatch("stable-diffusion-v1[^/]*", architecture):
        raise BadInput(f"{path}: its architecture is {architecture!r} (modelspec.architecture); "
                       f"{OURS}")
    try:
        return check_metadata(path, {} if text is None else json.loads(text))
    except ValueError as problem:
        why = first_line(problem)
        raise BadInput(f"{path}: its metadata is malformed ({why}); get it again") from None


def configs_in(about: dict) -> tuple[UNetConfig, VAEConfig, TextEncoderConfig]:
    """The sizes of the networks: those in the metadata, else Stable Diffusion's."""
    if "config" not in about:
        return UNetConfig(), VAEConfig(), TextEncoderConfig()

    def read(config_class, part: str):
        values = about["config"][part].items()
        return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values})

    return read(UNetConfig, "unet"), read(VAEConfig, "vae"), read(TextEncoderConfig, "text_encoder")


def stored_tokenizer(path: Path, about: dict):
    if not about.get("tokenizer"):
        return None
    try:
        return tokenizer_from(**about["tokenizer"])
    except Exception as problem:  # the tokenizers library raises its own, without a class for them
        if isinstance(problem, OSError) and problem.errno:  # such as a full disk for its copy
            raise
        raise BadInput(f"{path}: the tokenizer in its metadata is malformed "
                       f"({first_line(problem)}); get it again") from None


def check_architecture(path: Path, files: dict, unet_prefix: str = UNET_PREFIX) -> None:
    """BadInput that names what the file is, where it is not Stable Diffusion 1.x."""
    if any(key.startswith("conditioner.") for key in files):
        raise BadInput(f"{path}: a Stable Diffusion XL file; {OURS}")
    if any(key.startswith("cond_stage_model.model.") for key in files):
        raise BadInput(f"{path}: a Stable Diffusion 2.x file; {OURS}")
    for what, prefix in (("U-Net", unet_prefix), ("autoencoder", VAE_PREFIX),
                         ("text encoder", TEXT_PREFIX)):
        if not any(key.startswith(prefix) for key in files):
            raise BadInput(f"{path}: holds no {what} ({prefix}*); give a whole SD 1.x checkpoint")
    alphas_squared = torch.sigmoid(2 * NoiseSchedule().log_ratio)
    betas = 1 - alphas_squared / nn.functional.pad(alphas_squared[:-1], (1, 0), value=1.0)
    # Rounding to bf16 changes them by up to 2e-5 and 2e-3.
    for key, wanted, error in (("betas", betas, 1e-4), ("alphas_cumprod", alphas_squared, 4e-3)):
        stored = files[key].get_tensor(key).double() if key in files else wanted
        if stored.shape != wanted.shape or not torch.allclose(stored, wanted, atol=error):
            raise BadInput(f"{path}: its noise schedule ({key}) is not Stable Diffusion 1.x's")
    if "v_pred" in files:
        raise BadInput(f"{path}: a v-prediction model; this project reads those that predict the "
                       "noise, as SD 1.4 and 1.5 do")
    entrance = UNET_PREFIX + "input_blocks.0.0.weight"
    if entrance in files and files[entrance].get_slice(entrance).get_shape()[1:2] == [9]:
        raise BadInput(
            f"{path}: an inpainting model (9 channels in); give one that draws from a prompt alone"
        )


# What real files hold beside the networks: the averaged U-Net, the schedule's buffers, CLIP's.
KNOWN_EXTRAS = (
    EMA_PREFIX, "betas", "alphas_cumprod", "sqrt_", "posterior_", "log_one_minus", "logvar",
    "lvlb_weights", "model_ema_decay", "scale_factor", "cond_stage_model.logit_scale",
    "cond_stage_model.text_projection", "first_stage_model.loss.",
)


# --------------------------------------------------------------------------------------------------
# Out


def save(
    model: StableDiffusion, path: str | Path, dtype: torch.dtype | None = torch.float16,
) -> None:
    """Write one .safetensors file; configurations, kind, family and vocabulary in its metadata.

    dtype None keeps each tensor's.
    """
    parts = ("unet", "vae", "text_encoder")
    about = metadata_of(model)
    about["config"] = {part: asdict(getattr(model, part).config) for part in parts}
    if model.tokenizer is not None:
        vocabulary, merges = tokenizer_parts(model.tokenizer)
        about["tokenizer"] = {"vocabulary": vocabulary, "merges": merges,
                              "added": list(added_tokens(model.tokenizer).values()),
                              "pad_token": model.tokenizer.pad_token}
    table = original_names(model.unet.config, model.vae.config)
    tensors = {}
    for part in parts:
        state = getattr(model, part).state_dict()
        keys = single_file_names(part, state, table[part])
        for name, tensor in state.items():
            if part == "vae" and ".to_" in name and tensor.ndim == 2:
                # The original's attention is made of 1 x 1 convolutions.
                tensor = tensor[:, :, None, None]
            tensors[keys[name]] = in_dtype(keys[name], tensor, dtype or tensor.dtype)
    metadata = {METADATA: json.dumps(about)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# Classes of other packages (pytorch_lightning's) become empty ones: they need not be installed.
ADVICE = (
    "only .safetensors is read, since a pickle can run code when it is opened. Where you trust the "
    "file, this converts it, and may run its code: import torch, safetensors.torch; file = 'NAME'; "
    "safetensors.torch.save_file((lambda w: {k: v.clone().contiguous() for k, v in "
    "w.get('state_dict', w).items() if hasattr(v, 'clone')})(torch.load(file, 'cpu', "
    "weights_only=False, pickle_module=(lambda p: type('M', (), {'load': p.load, 'Unpickler': "
    "type('U', (p.Unpickler,), {'find_class': lambda s, m, n: p.Unpickler.find_class(s, m, n) if "
    "m.split('.')[0] in ('torch', 'collections', 'numpy', '_codecs') else type(n, (dict,), "
    "{'__init__': lambda *a, **k: None})})}))(__import__('pickle')))), 'out.safetensors')"
)


def unread(path: Path) -> str:
    """Why a file of this ending is not read, and what to do."""
    if path.suffix.lower() in PICKLES:
        return ADVICE
    if path.suffix.lower() == ".gguf":
        return "GGUF holds quantized weights; get the model as .safetensors in fp16, bf16 or fp32"
    return "not a .safetensors file; give one, or a diffusers folder"
