"""A diffusers folder, in and out.

    sd14/model_index.json                        the pipeline's class and its parts
    sd14/unet/config.json, diffusion_pytorch_model.safetensors       vae/, text_encoder/ likewise
    sd14/tokenizer/vocab.json, merges.txt

Our modules carry this layout's names, so only configurations are renamed. Folders written here open
in diffusers' StableDiffusionPipeline (a diffusion) and in InstaFlow's RectifiedFlowPipeline (a flow
or a one-step model).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from command import BadInput, first_line, flush_to_disk, note, write_json
from formats.hub import name_of
from formats.tokenizers import added_tokens, merges_text, tokenizer_in, tokenizer_parts
from formats.weights import (
    MALFORMED, OURS, check_metadata, check_unused_tensors, empty_networks, identity_of, in_dtype,
    kind_by_name, load_weights, open_safetensors,
)
from stable_diffusion import StableDiffusion
from text_encoder import TextEncoderConfig
from unet import UNetConfig
from vae import VAEConfig

# What decides the noise or a network, with the value that is implemented (of several, the first is
# the default).
PIPELINE = {"_class_name": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline",
                            "StableDiffusionPipelineSafe", "RectifiedFlowPipeline")}
SCHEDULER = {
    "prediction_type": "epsilon", "num_train_timesteps": 1000, "beta_start": 0.00085,
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "trained_betas": None,
    "rescale_betas_zero_snr": (False, None), "original_inference_steps": None,
}
DIFFUSERS_DEFAULTS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
NETWORKS = {
    "unet": {
        "act_fn": "silu", "addition_embed_type": None, "center_input_sample": False,
        "class_embed_type": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
        "dual_cross_attention": False, "encoder_hid_dim": None, "flip_sin_to_cos": True,
        "freq_shift": 0, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5, "num_attention_heads": None, "num_class_embeds": None,
        "only_cross_attention": False, "resnet_time_scale_shift": "default",
        "reverse_transformer_layers_per_block": None, "time_cond_proj_dim": None,
        "time_embedding_type": "positional", "transformer_layers_per_block": 1,
    },
    "vae": {"act_fn": "silu", "mid_block_add_attention": True, "shift_factor": None,
            "use_post_quant_conv": True, "use_quant_conv": True},
    "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


# --------------------------------------------------------------------------------------------------
# In


def load_folder(
    path: Path, device, dtype, kind: str | None = None, with_tokenizer: bool = True,
) -> StableDiffusion:
    """The model in a folder. kind overrides what it says. BadInput: whatever is wrong with it."""
    if (path / "text_encoder_2").exists():
        raise BadInput(f"{path}: a Stable Diffusion XL folder; {OURS}")
    config = {part: read_config(path, part) for part in ("unet", "vae", "text_encoder")}
    unet = config["unet"]
    if unet.get("use_linear_projection") or unet.get("cross_attention_dim") == 1024:
        raise BadInput(f"{path}: a Stable Diffusion 2.x folder; {OURS}")
    about, scheduler = read_index(path), path / "scheduler" / "scheduler_config.json"
    noise = read_json(scheduler) if scheduler.exists() else {}
    noise = DIFFUSERS_DEFAULTS | noise if "_class_name" in noise else noise
    scheduler_class = str(noise.get("_class_name"))
    if re.match("LCM|TCD|FlowMatch", scheduler_class):
        if not kind:
            raise BadInput(f"{scheduler}: a {scheduler_class}, so no plain diffusion; --kind "
                           "overrides it")
        noise.pop("original_inference_steps", None)  # of LCM's and TCD's own steps
    # Flows have no noise schedule.
    is_flow = about.get("_class_name") == "RectifiedFlowPipeline" or "Flow" in scheduler_class
    for where, found, known in ((path, about, PIPELINE), (scheduler, noise, SCHEDULER),
                                *((path / part, config[part], NETWORKS[part]) for part in config)):
        check_values(where, {} if found is noise and is_flow else found, known)
    networks = empty_networks(str(path), lambda: (
        unet_from_diffusers(config["unet"]),
        vae_from_diffusers(config["vae"]),
        text_from_transformers(config["text_encoder"]),
    ), dtype)
    for part, network in networks.items():
        files = open_safetensors(weight_files(path / part))
        names = list(network.state_dict())
        keys = vae_keys(names, files) if part == "vae" else {name: name for name in names}
        if part == "text_encoder" and not any(key.startswith("text_model.") for key in files):
            keys = {name: name.removeprefix("text_model.") for name in keys}  # transformers 5's
        load_weights(network, part, keys, files, str(path / part), device, dtype)
        check_unused_tensors(path / part, set(files) - set(keys.values()), ("",))
    with_tokenizer = with_tokenizer and (path / "tokenizer").is_dir()
    tokenizer = tokenizer_in(path / "tokenizer") if with_tokenizer else None
    return StableDiffusion(
        **networks, tokenizer=tokenizer,
        kind=kind or about.get("kind") or guessed_kind(path, about, config["unet"]),
        **identity_of(path, about, networks["unet"]),
    )


def vae_keys(names: list[str], files: dict) -> dict[str, str]:
    """Our names of the autoencoder -> a folder's, of today or as in SD 1.4's and 1.5's."""
    keys = {name: name for name in names}
    if any(".query." in key for key in files):
        for name in (name for name in keys if ".attentions." in name):
            for new, old in OLD_ATTENTION.items():
                keys[name] = keys[name].replace(f".{new}.", f".{old}.")
    return keys


def check_values(where: Path, found: dict, known: dict) -> None:
    """BadInput where a configuration has a value that this project does not implement."""
    for name, values in known.items():
        values = values if isinstance(values, tuple) else (values,)
        value = same_value(found.get(name, values[0]))
        if value not in values:
            raise BadInput(f"{where}: its {name} is {value!r}, and this project implements "
                           f"{' or '.join(map(repr, values))} (SD 1.4, 1.5, fine-tunes of them)")


def same_value(value):
    """A list of equal values is that value."""
    is_same = isinstance(value, list) and value and value == value[:1] * len(value)
    return value[0] if is_same else value


def read_index(path: Path) -> dict:
    """The checked model_index.json; {} where there is none."""
    index = path / "model_index.json"
    about = read_json(index) if index.exists() else {}
    few_step = about.get("few_step")
    return check_metadata(index, about | (few_step if isinstance(few_step, dict) else {}))


def guessed_kind(path: Path, pipeline: dict, unet: dict) -> str:
    """The kind of a folder that does not store it. InstaFlow's do not say whether one-step."""
    if pipeline.get("_class_name") != "RectifiedFlowPipeline":
        return "diffusion"
    names = (name_of(path.resolve()), str(pipeline.get("_name_or_path")),
             str(unet.get("_name_or_path")))
    return kind_by_name(path, names, flow=True)


def read_json(path: Path) -> dict:
    """A JSON object; BadInput where the file holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise BadInput(f"{path}: not JSON ({first_line(problem)}); get the folder again") from None
    if not isinstance(found, dict):
        what = type(found).__name__
        raise BadInput(f"{path}: holds a {what} and not an object; get the folder again")
    return found


def read_config(path: Path, part: str) -> dict:
    try:
        return read_json(path / part / "config.json")
    except OSError:
        raise BadInput(
            f"{path}: has no {part}/config.json; give a whole diffusers folder of an SD 1.x model"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of one network: plain, fp16, or the only variant; a file or an index."""
    found = {}  # variant -> its file, or the index of its shards
    for path in sorted(folder.glob("*.safetensors*")):
        match = re.fullmatch(r"(?:diffusion_pytorch_model|model)(\.\w+)?\.safetensors"
                             r"(?:\.index(\.\w+)?\.json)?", path.name)
        if match:
            found.setdefault(match[1] or match[2] or "", path)
    if not found:
        raise BadInput(f"{folder}: holds no .safetensors weights; pickles (.bin) are not read, "
                       "save them as safetensors first")
    variant = next((variant for variant in ("", ".fp16") if variant in found), None)
    if variant is None and len(found) > 1:
        raise BadInput(f"{folder}: holds the variants {', '.join(v[1:] for v in found)}; leave one "
                       "of them there")
    path = found[min(found) if variant is None else variant]
    return [path] if path.suffix == ".safetensors" else files_named_in(path)


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a single file, or of the files that are read of a folder."""
    path, files, digest = Path(path), [Path(path)], hashlib.sha256()
    if path.is_dir():
        parts = [path / part for part in sorted(NETWORKS) if (path / part).is_dir()] or [path]
        files = [file for part in parts for file in weight_files(part)]
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def files_named_in(index: Path) -> list[Path]:
    """The files, beside the index, that hold a network's tensors."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        if not all(Path(name).name == name for name in names):  # beside it, and nowhere else
            raise ValueError
    except MALFORMED:
        raise BadInput(f"{index}: not an index of weight files; get the folder again") from None
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise BadInput(
            f"{index.parent}: {index.name} names {missing[0]}, which is not there; get it again"
        )
    return [index.parent / name for name in names]


# --------------------------------------------------------------------------------------------------
# Configurations


def unet_from_diffusers(config: dict) -> UNetConfig:
    same = ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim",
            "norm_num_groups", "sample_size")
    config = config | {name: same_value(config[name]) for name in (*same, "attention_head_dim")}
    version = re.match(r"0\.(\d+)", str(config.get("_diffusers_version")))
    if config["sample_size"] == 32 and version and int(version[1]) < 9:
        note("unet/config.json: sample_size 32 was the default before diffusers 0.9; read as 64")
        config["sample_size"] = 64
    return UNetConfig(
        **{name: config[name] for name in same},
        block_out_channels=tuple(config["block_out_channels"]),
        attention_levels=tuple(name.startswith("CrossAttn") for name in config["down_block_types"]),
        attention_heads=config["attention_head_dim"],
    )


def unet_to_diffusers(config: UNetConfig) -> dict:
    levels = config.attention_levels
    result = asdict(config) | {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in levels],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(levels)],
        "attention_head_dim": config.attention_heads,
    }
    for ours in ("attention_levels", "attention_heads", "stacked", "second_time"):
        del result[ours]
    return result


def vae_from_diffusers(config: dict) -> VAEConfig:
    names = ("in_channels", "out_channels", "latent_channels", "layers_per_block",
             "norm_num_groups", "scaling_factor")
    known = {name: config[name] for name in names if name in config}  # old ones lack the last
    return VAEConfig(block_out_channels=tuple(config["block_out_channels"]), **known)


def vae_to_diffusers(config: VAEConfig) -> dict:
    levels = len(config.block_out_channels)
    return asdict(config) | {
        "_class_name": "AutoencoderKL", "sample_size": 512,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_from_transformers(config: dict) -> TextEncoderConfig:
    names = asdict(TextEncoderConfig())
    return TextEncoderConfig(**{name: config[name] for name in names if name in config})


def text_to_transformers(config: TextEncoderConfig) -> dict:
    end = config.vocab_size - 1
    return asdict(config) | {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": config.hidden_size,
        "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end,
    }


# --------------------------------------------------------------------------------------------------
# Out


def export(model: StableDiffusion, folder: str | Path, dtype=torch.float16) -> None:
    """Write a folder, whole or not at all; dtype None keeps the model's. BadInput: it exists."""
    folder = Path(folder)
    if folder.exists():
        raise BadInput(f"{folder}: exists already; name a new folder")
    unet = model.unet.config
    if unet.stacked or unet.second_time:
        what = "a stacked U-Net" if unet.stacked else "a U-Net with a second time"
        raise BadInput(f"{model.path}: diffusers has no class for {what}; keep the .safetensors "
                       "file")
    if model.few_step:
        note(f"{folder}: a few-step model, which diffusers' pipelines cannot sample as trained")
    if model.tokenizer is None:
        note(f"{folder}: without a tokenizer, which other programs need; give --tokenizer")
    write_folder_atomically(folder, lambda temporary: write_folder(model, temporary, dtype))


def write_folder(model: StableDiffusion, folder: Path, dtype) -> None:
    """The files of `export`, into an empty folder."""
    dtype = dtype or model.dtype
    text = text_to_transformers(model.text_encoder.config)
    parts = {  # its library, class, configuration and the stem of its file
        "unet": ("diffusers", "UNet2DConditionModel", unet_to_diffusers(model.unet.config),
                 "diffusion_pytorch_model"),
        "vae": ("diffusers", "AutoencoderKL", vae_to_diffusers(model.vae.config),
                "diffusion_pytorch_model"),
        "text_encoder": ("transformers", "CLIPTextModel",
                         text | {"torch_dtype": str(dtype).removeprefix("torch.")}, "model"),
    }
    diffusion = model.kind == "diffusion"
    index = {
        "_class_name": "StableDiffusionPipeline" if diffusion else "RectifiedFlowPipeline",
        "kind": model.kind, "family": model.family, "requires_safety_checker": False,
        # nested: diffusers takes lists at the top for components
        **({"few_step": model.few_step._asdict()} if model.few_step else {}),
        "safety_checker": [None, None], "feature_extractor": [None, None],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    for part, (library, name, config, stem) in parts.items():
        index[part] = [library, name]
        write_json(folder / part / "config.json", config)
        tensors = {key: in_dtype(f"{part}: {key}", tensor, dtype)
                   for key, tensor in getattr(model, part).state_dict().items()}
        save_file(tensors, folder / part / f"{stem}.safetensors", {"format": "pt"})
    # The steps of `sampling_timesteps`; an offset of 1 is what pipelines made for SD 1.x ask for,
    # and has no effect on these.
    write_json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 1000,
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "timestep_spacing": "trailing", "prediction_type": "epsilon", "steps_offset": 1,
    })
    if model.tokenizer is not None:
        write_tokenizer(model, folder / "tokenizer")
    write_json(folder / "model_index.json", index)


def write_tokenizer(model: StableDiffusion, folder: Path) -> None:
    vocabulary, merges = tokenizer_parts(model.tokenizer)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: getattr(model.tokenizer, name) for name in names}
    length = model.text_encoder.config.max_position_embeddings
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text(merges_text(merges), encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": length,
        "added_tokens_decoder": added_tokens(model.tokenizer)})


def write_folder_atomically(folder: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Call write(temporary folder), flush its files, rename it. The folder must be new."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                flush_to_disk(path)
        os.replace(temporary, folder)
    except SafetensorError as problem:  # wraps the system's error
        raise BadInput(f"{folder}: could not be written ({first_line(problem)}); free some space "
                       "and run again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
