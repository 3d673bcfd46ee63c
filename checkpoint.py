"""Checkpoints: a Stable Diffusion 1.x file or folder in, the three networks out, and back.

    model = checkpoint.load("sd14.safetensors", "cuda", torch.bfloat16)      a StableDiffusion
    checkpoint.save(model, "2rf.safetensors")                                one file, original layout
    checkpoint.export(model, "2rf/")                                         a diffusers folder
    python checkpoint.py sd14.safetensors sd14/                              the same from a shell, either way

Our modules carry the names of the diffusers layout, so a folder needs no renaming. A single file has the names of
the original code under three prefixes; `original_names` is the table between the two, used in both directions.

Loading is strict: a missing or wrongly shaped tensor is an error, and what a file holds beyond the model is passed
over and named. Tensors go through the memory map, one by one, into their final dtype and device.

kind says what the U-Net predicts: "diffusion" noise (Stable Diffusion itself), "flow" a velocity, at many steps,
"one-step" a velocity that is right at t = 0 alone. It lies in the metadata of files written here.
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from command import KINDS, STARTS, BadInput, Parser, note, pick_dtype, run, write_text, write_whole
from text_encoder import TextEncoder, TextEncoderConfig
from unet import StackedUNet, UNet, UNetConfig, build_unet, started_from
from vae import AutoencoderKL, VAEConfig

METADATA = "instaflow"  # one entry that holds all: safetensors writes several in any order, and runs would differ
HUB_TOKENIZER = "openai/clip-vit-large-patch14"  # the one that Stable Diffusion 1.x was trained with
UNET_PREFIX, EMA_PREFIX = "model.diffusion_model.", "model_ema."
VAE_PREFIX, TEXT_PREFIX = "first_stage_model.", "cond_stage_model.transformer."
WIDE = 128  # channels from which bf16 convolutions are faster with channels last: SD's decoder 2.2 x on a CPU; in fp32 all are
OPEN_AT_ONCE = 50  # tensors read per opening of a file: closing it gives its mapped pages back


# ---------------------------------------------------------------------------------------------------------------
# The model


@dataclass
class StableDiffusion:
    """Everything a prompt needs to become a picture."""

    unet: UNet | StackedUNet
    vae: AutoencoderKL
    text_encoder: TextEncoder
    tokenizer: CLIPTokenizer | None  # None: from the hub, when the first prompt is encoded
    kind: str
    captions: str | None = None  # text file of prompts the model was made for, relative to this project; None for SD
    path: str = ""  # where it was loaded from

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def fingerprint(self) -> str:
        """Of the weights' files, so that data can say what made it."""
        return fingerprint(self.path)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(channels, h, w) of a latent, for a picture of that size in pixels or of the model's own."""
        side, factor = self.unet.config.sample_size, self.vae.config.downsampling
        return (
            self.unet.config.in_channels,
            side if height is None else height // factor,
            side if width is None else width // factor,
        )

    def compile(self, backend: str = "inductor") -> None:
        """Have torch compile U-Net and decoder when they are first called, in place."""
        for network in (self.unet, self.vae.decoder):
            network.compile(backend=backend)

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """The context (B, L, D) that the U-Net reads, without gradients."""
        if self.tokenizer is None:
            self.tokenizer = hub_tokenizer(self.text_encoder.config.vocab_size)
        token_ids = tokenize(self.tokenizer, prompts, self.text_encoder.config.max_position_embeddings)
        with torch.no_grad():
            return self.text_encoder(token_ids.to(self.device))


def fingerprint(path: str | Path) -> str:
    """SHA-256 over the weights in a single file or a folder."""
    path, digest = Path(path), hashlib.sha256()
    for file in sorted(path.glob("*/*.safetensors")) if path.is_dir() else [path]:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str], length: int) -> Tensor:
    """(B, length) int64, padded with the end token. Longer prompts are cut so that their end token stays."""
    rows = []
    for ids in tokenizer(list(prompts))["input_ids"]:
        if len(ids) > length:
            ids = ids[: length - 1] + [tokenizer.eos_token_id]
            note(f"prompts are cut to {length} tokens; what a longer one says at its end is not seen")
        rows.append(ids + [tokenizer.pad_token_id] * (length - len(ids)))
    return torch.tensor(rows)


def tokenizer_from(vocabulary: dict[str, int], merges: Iterable[str]) -> CLIPTokenizer:
    """A tokenizer from its vocabulary and its merges, each "left right"."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(folder, "merges.txt").write_text(merges_text(merges), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder)


def merges_text(merges: Iterable[str]) -> str:
    return "".join(line + "\n" for line in ["#version: 0.2", *merges])


def tokenizer_parts(tokenizer: CLIPTokenizer) -> tuple[dict[str, int], list[str]]:
    """The inverse: (vocabulary in the order of its numbers, merges)."""
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return vocabulary, [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]


def tokenizer_in(folder: str | Path) -> CLIPTokenizer:
    if not any(Path(folder, name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise BadInput(f"{folder}: holds no tokenizer (vocab.json and merges.txt); give a folder that does with --tokenizer")
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def hub_tokenizer(vocab_size: int) -> CLIPTokenizer:
    try:
        tokenizer = CLIPTokenizer.from_pretrained(HUB_TOKENIZER)
    except Exception:  # what is raised offline differs between causes
        tokenizer = None
    # Where it finds no file, transformers may also return a tokenizer without vocabulary.
    if tokenizer is None or len(tokenizer.get_vocab()) != vocab_size:
        raise BadInput(
            f"the checkpoint has no tokenizer and {HUB_TOKENIZER} could not be fetched; give --tokenizer DIR, "
            "a folder with vocab.json and merges.txt"
        )
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------
# The original names


IN_UNET_RESNET = [
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
]  # fmt: skip
IN_VAE = [
    (".mid_block.resnets.0.", ".mid.block_1."), (".mid_block.resnets.1.", ".mid.block_2."),
    (".mid_block.attentions.0.", ".mid.attn_1."), (".group_norm.", ".norm."), (".to_q.", ".q."), (".to_k.", ".k."),
    (".to_v.", ".v."), (".to_out.0.", ".proj_out."), (".conv_norm_out.", ".norm_out."),
    (".conv_shortcut.", ".nin_shortcut."), (".resnets.", ".block."), (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."), ("encoder.down_blocks.", "encoder.down."),
]  # fmt: skip


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
        table.append((f"down_blocks.{i}.downsamplers.0.conv.", f"input_blocks.{(i + 1) * (layers + 1)}.0.op."))
        # Going up, doubling is the last part of a level's last block, behind its attention if it has one.
        for j in range(layers + 1):
            block = i * (layers + 1) + j
            resnets.append((f"up_blocks.{i}.resnets.{j}", f"output_blocks.{block}.0"))
            table.append((f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{block}.1."))
        part = 2 if unet.attention_levels[levels - 1 - i] else 1
        table.append((f"up_blocks.{i}.upsamplers.0.conv.", f"output_blocks.{i * (layers + 1) + layers}.{part}.conv."))
    table += [(f"{ours}.{a}.", f"{theirs}.{b}.") for ours, theirs in resnets for a, b in IN_UNET_RESNET]

    last = len(vae.block_out_channels) - 1  # the original counts the decoder's levels from the full resolution
    up = [(f"decoder.up_blocks.{i}.", f"decoder.up.{last - i}.") for i in range(last + 1)]
    return {"unet": table, "vae": IN_VAE + up, "text_encoder": []}


def single_file_names(part: str, names: Iterable[str], table: list[tuple[str, str]]) -> dict[str, str]:
    """Our names of one network -> names in a single file."""
    prefix = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text_encoder": TEXT_PREFIX}[part]
    renamed = {}
    for name in names:
        renamed[name] = name
        for ours, theirs in table:
            renamed[name] = renamed[name].replace(ours, theirs)
    return {name: prefix + original for name, original in renamed.items()}


def is_pixel_linear(part: str, name: str) -> bool:
    """The autoencoder's attention: linear maps here, 1 x 1 convolutions (two dimensions more) in single files."""
    return part == "vae" and ".attentions." in name and name.endswith(".weight") and ".to_" in name


# ---------------------------------------------------------------------------------------------------------------
# Reading


def opened(path: Path):
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as problem:
        raise BadInput(f"{path}: not a whole safetensors file ({problem}); get or make it again") from None


def index_of(files: list[Path]) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    found = {}
    for path in files:
        with opened(path) as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def by_file(names: Iterable[str], file_of: Callable[[str], Path]) -> Iterator[tuple[Path, list[str]]]:
    """The names in groups that are read in one opening of their file."""
    for path, group in itertools.groupby(sorted(names, key=file_of), file_of):
        together = list(group)
        for start in range(0, len(together), OPEN_AT_ONCE):
            yield path, together[start : start + OPEN_AT_ONCE]


def fill(module: nn.Module, part: str, names: dict[str, str], index: dict[str, Path], where: str, device, dtype) -> None:
    """Give a module on the meta device its tensors, in its order in memory: our name -> names[our name] in index's files."""
    wanted = module.state_dict()
    missing = [names[name] for name in wanted if names[name] not in index]
    if missing:
        raise BadInput(
            f"{where}: {len(missing)} tensors are missing, first {', '.join(missing[:3])}; not a whole SD 1.x {part}"
        )
    tensors, wrong = {}, []
    for path, group in by_file(wanted, lambda name: index[names[name]]):
        with opened(path) as file:
            for name in group:
                shape, expected = tuple(file.get_slice(names[name]).get_shape()), tuple(wanted[name].shape)
                if shape != expected and not (is_pixel_linear(part, name) and shape == (*expected, 1, 1)):
                    wrong.append(f"{names[name]} is {list(shape)} and should be {list(expected)}")
                elif not wrong:
                    new = torch.empty_strided(expected, wanted[name].stride(), dtype=dtype, device=device)
                    tensors[name] = new.copy_(file.get_tensor(names[name]).reshape(expected))
    if wrong:
        raise BadInput(f"{where}: {len(wrong)} tensors have the wrong shape: {'; '.join(wrong[:3])}; not an SD 1.x {part}")
    module.load_state_dict(tensors, assign=True)


def empty_networks(unet: UNetConfig, vae: VAEConfig, text: TextEncoderConfig, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The networks without weights, with the order in memory in which `fill` is to lay them down."""
    with torch.device("meta"):
        networks = {"unet": build_unet(unet), "vae": AutoencoderKL(vae), "text_encoder": TextEncoder(text)}
    arrange(networks["unet"], networks["vae"], dtype)
    return networks


def arrange(unet: UNet | StackedUNet, vae: AutoencoderKL, dtype: torch.dtype) -> None:
    """Give the convolutions the order in memory that is fastest in this dtype, in place."""
    if dtype == torch.float32 or unet.config.block_out_channels[0] >= WIDE:
        unet.to(memory_format=torch.channels_last)
        if dtype != torch.float32:  # where the autoencoder's norms would round four times as coarsely on a CPU
            vae.to(memory_format=torch.channels_last)


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
    kind: str | None = None, tokenizer: str | Path | None = None, use_ema: bool = False,
) -> StableDiffusion:  # fmt: skip
    """Load a single file or a diffusers folder, in evaluation mode.

    kind overrides what the file says; tokenizer is a folder with vocab.json and merges.txt; use_ema reads the
    averaged U-Net of a full training checkpoint. BadInput with one line for whatever is wrong with the files.
    """
    path = Path(path)
    if path.is_dir():
        model = load_folder(path, device, dtype)
        if use_ema:
            raise BadInput(f"{path}: --use-ema reads full single-file checkpoints; a diffusers folder holds one U-Net")
    elif not path.is_file():
        raise BadInput(f"{path}: no such file or folder; give an SD 1.x .safetensors or a diffusers folder")
    elif path.suffix != ".safetensors":
        raise BadInput(
            f"{path}: only .safetensors is read, since pickles can run code; convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(file)['state_dict'], 'out.safetensors')"
        )
    else:
        model = load_single_file(path, device, dtype, use_ema)
    model.path, model.kind = str(path), kind or model.kind
    if tokenizer is not None:
        model.tokenizer = tokenizer_in(tokenizer)
    expected = model.text_encoder.config.vocab_size
    if model.tokenizer is not None and len(model.tokenizer.get_vocab()) != expected:
        found = len(model.tokenizer.get_vocab())
        raise BadInput(f"{tokenizer or path}: the tokenizer has {found} tokens and the text encoder {expected}; give its own")
    for network in (model.unet, model.vae, model.text_encoder):
        network.eval()
    return model


def load_as_asked(path: str, args: argparse.Namespace, device: torch.device) -> StableDiffusion:
    """`load` with a command's own options (command.py)."""
    model = load(path, device, pick_dtype(args.dtype, device), args.kind, args.tokenizer, args.use_ema)
    if args.compile:
        model.compile()
    return model


def start_of(args: argparse.Namespace) -> str:
    """What --init stands for: its name, or the hash of the checkpoint that it names."""
    return args.init if args.init in STARTS else fingerprint(args.init)


def load_student(args: argparse.Namespace, device: torch.device) -> StableDiffusion:
    """What a command trains: the teacher's networks, with the U-Net that --init says.

    In fp32, since bf16 would round the weights that training starts from.
    """
    student = load(args.teacher, device, torch.float32, args.kind, args.tokenizer, args.use_ema)
    if args.init in STARTS:
        student.unet = started_from(student.unet, args.init, student.kind, args.seed)
        return student
    begun = load(args.init, device, torch.float32)
    if begun.unet.config != student.unet.config:
        raise BadInput(f"--init {args.init}: its U-Net is not built like the teacher's; give one that was made from that")
    student.unet = begun.unet
    return student


def load_single_file(path: Path, device, dtype, use_ema: bool) -> StableDiffusion:
    index = index_of([path])
    with opened(path) as file:
        about = json.loads((file.metadata() or {}).get(METADATA, "{}"))  # empty for files that others wrote
    refuse_other_models(path, index)
    if about:
        config = about["config"]
        configs = (
            UNetConfig(**tuples(config["unet"])),
            VAEConfig(**tuples(config["vae"])),
            TextEncoderConfig(**config["text_encoder"]),
        )
    else:
        configs = UNetConfig(), VAEConfig(), TextEncoderConfig()
    networks = empty_networks(*configs, dtype)
    table = original_names(configs[0], configs[1])
    used = set()
    for part, network in networks.items():
        names = single_file_names(part, network.state_dict(), table[part])
        if part == "unet" and use_ema:
            used |= set(names.values())
            if not any(key.startswith(EMA_PREFIX + "diffusion_model") for key in index):
                raise BadInput(f"{path}: holds no averaged weights ({EMA_PREFIX}*); leave --use-ema away")
            names = {ours: EMA_PREFIX + theirs.removeprefix("model.").replace(".", "") for ours, theirs in names.items()}
        if part == "text_encoder" and not any(key.startswith(TEXT_PREFIX + "text_model.") for key in index):
            names = {ours: theirs.replace("text_model.", "", 1) for ours, theirs in names.items()}  # some community files
        fill(network, part, names, index, str(path), device, dtype)
        used |= set(names.values())
    tell_unused(path, set(index) - used)
    tokenizer = tokenizer_from(**about["tokenizer"]) if about.get("tokenizer") else None
    return StableDiffusion(**networks, tokenizer=tokenizer, kind=about.get("kind", "diffusion"), captions=about.get("captions"))


def refuse_other_models(path: Path, index: dict[str, Path]) -> None:
    """BadInput that names what the file is, where it is not Stable Diffusion 1.x."""
    first = {key.split(".")[0] for key in index}
    if "conditioner" in first:
        raise BadInput(f"{path}: a Stable Diffusion XL file; this project reads SD 1.4, 1.5 and fine-tunes of them")
    if any(key.startswith("cond_stage_model.model.") for key in index):
        raise BadInput(f"{path}: a Stable Diffusion 2.x file; this project reads SD 1.4, 1.5 and fine-tunes of them")
    for part, prefix in (("U-Net", UNET_PREFIX), ("autoencoder", VAE_PREFIX), ("text encoder", TEXT_PREFIX)):
        if not any(key.startswith(prefix) for key in index):
            raise BadInput(f"{path}: holds no {part} ({prefix}*); give a whole SD 1.x checkpoint")


# What real files hold beside the three networks: the averaged U-Net, the schedule's buffers, CLIP's position numbers.
KNOWN_EXTRAS = (
    EMA_PREFIX, "betas", "alphas_cumprod", "sqrt_", "posterior_", "log_one_minus", "logvar", "lvlb_weights", "model_ema_decay",
    "scale_factor", "cond_stage_model.logit_scale", "cond_stage_model.text_projection",
)  # fmt: skip


def tell_unused(path: Path, extras: set[str]) -> None:
    unknown = sorted(k for k in extras if not k.startswith(KNOWN_EXTRAS) and not k.endswith("position_ids"))
    if unknown:
        note(f"{path}: {len(unknown)} unknown tensors are not used, first {', '.join(unknown[:3])}")


def tuples(config: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


# ---------------------------------------------------------------------------------------------------------------
# Diffusers folders

OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # of SD 1.4's and 1.5's folders


def load_folder(path: Path, device, dtype) -> StableDiffusion:
    if (path / "text_encoder_2").exists():
        raise BadInput(f"{path}: a Stable Diffusion XL folder; this project reads SD 1.4, 1.5 and fine-tunes of them")
    config = {part: read_config(path, part) for part in ("unet", "vae", "text_encoder")}
    if config["unet"].get("use_linear_projection") or config["unet"].get("cross_attention_dim") == 1024:
        raise BadInput(f"{path}: a Stable Diffusion 2.x folder; this project reads SD 1.4, 1.5 and fine-tunes of them")
    networks = empty_networks(
        unet_from_diffusers(config["unet"]), vae_from_diffusers(config["vae"]), text_from_transformers(config["text_encoder"]),
        dtype,
    )  # fmt: skip
    for part, network in networks.items():
        index = index_of(weight_files(path / part))
        names = {name: name for name in network.state_dict()}
        if part == "vae" and any(".query." in key for key in index):
            for name in names:
                if ".attentions." in name:
                    for new, old in OLD_ATTENTION.items():
                        names[name] = names[name].replace(f".{new}.", f".{old}.")
        if part == "text_encoder" and not any(key.startswith("text_model.") for key in index):
            names = {name: name.removeprefix("text_model.") for name in names}  # as transformers 5 writes them
        fill(network, part, names, index, str(path / part), device, dtype)
        tell_unused(path / part, set(index) - set(names.values()))
    pipeline = json.loads((path / "model_index.json").read_text()) if (path / "model_index.json").exists() else {}
    is_flow = pipeline.get("_class_name") == "RectifiedFlowPipeline"
    tokenizer = tokenizer_in(path / "tokenizer") if (path / "tokenizer").is_dir() else None
    return StableDiffusion(
        **networks, tokenizer=tokenizer, kind=pipeline.get("kind", "flow" if is_flow else "diffusion"),
        captions=pipeline.get("captions"),
    )  # fmt: skip


def read_config(path: Path, part: str) -> dict:
    try:
        return json.loads((path / part / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise BadInput(f"{path}: has no {part}/config.json; give a whole diffusers folder of an SD 1.x model") from None
    except ValueError as problem:
        raise BadInput(f"{path / part / 'config.json'}: not JSON ({problem}); get the folder again") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of one network: whole, fp16 variant, or the parts that an index names."""
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            whole = folder / f"{stem}{variant}.safetensors"
            if whole.is_file():
                return [whole]
            for index in (
                folder / f"{stem}.safetensors.index{variant}.json",
                folder / f"{stem}{variant}.safetensors.index.json",
            ):
                if index.is_file():
                    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                    missing = [name for name in files if not (folder / name).is_file()]
                    if missing:
                        raise BadInput(f"{folder}: {index.name} names {missing[0]}, which is not there; get it again")
                    return [folder / name for name in files]
    raise BadInput(f"{folder}: holds no .safetensors weights; pickles (.bin) are not read, save them as safetensors first")


def unet_from_diffusers(config: dict) -> UNetConfig:
    return UNetConfig(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        block_out_channels=tuple(config["block_out_channels"]),
        attention_levels=tuple(name.startswith("CrossAttn") for name in config["down_block_types"]),
        layers_per_block=config["layers_per_block"],
        attention_heads=config["attention_head_dim"],
        cross_attention_dim=config["cross_attention_dim"],
        norm_num_groups=config["norm_num_groups"],
        sample_size=config["sample_size"],
    )


def unet_to_diffusers(config: UNetConfig) -> dict:
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in config.attention_levels]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(config.attention_levels)]
    result = asdict(config) | {"_class_name": "UNet2DConditionModel", "down_block_types": down, "up_block_types": up}
    del result["attention_levels"], result["stacked"]
    result["attention_head_dim"] = result.pop("attention_heads")
    return result


def vae_from_diffusers(config: dict) -> VAEConfig:
    names = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups", "scaling_factor")
    known = {name: config[name] for name in names if name in config}  # old folders have no scaling_factor
    return VAEConfig(block_out_channels=tuple(config["block_out_channels"]), **known)


def vae_to_diffusers(config: VAEConfig) -> dict:
    levels = len(config.block_out_channels)
    types = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return asdict(config) | types | {"_class_name": "AutoencoderKL", "sample_size": 512}


def text_from_transformers(config: dict) -> TextEncoderConfig:
    return TextEncoderConfig(**{name: config[name] for name in asdict(TextEncoderConfig()) if name in config})


def text_to_transformers(config: TextEncoderConfig) -> dict:
    ends = {"bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1, "pad_token_id": config.vocab_size - 1}
    return asdict(config) | ends | {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5, "projection_dim": config.hidden_size,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Writing


def save(model: StableDiffusion, path: str | Path, dtype: torch.dtype | None = torch.float16) -> None:
    """Write one .safetensors file in the original layout, config, kind and vocabulary in its metadata.

    dtype None keeps each tensor's own. The file appears whole or not at all.
    """
    configs = {"unet": model.unet.config, "vae": model.vae.config, "text_encoder": model.text_encoder.config}
    about = {"kind": model.kind, "captions": model.captions, "config": {part: asdict(c) for part, c in configs.items()}}
    if model.tokenizer is not None:
        vocabulary, merges = tokenizer_parts(model.tokenizer)
        about["tokenizer"] = {"vocabulary": vocabulary, "merges": merges}
    table = original_names(model.unet.config, model.vae.config)
    tensors = {}
    for part in configs:
        state = getattr(model, part).state_dict()
        names = single_file_names(part, state, table[part])
        for name, tensor in state.items():
            if is_pixel_linear(part, name):
                tensor = tensor[:, :, None, None]
            tensors[names[name]] = tensor.detach().to("cpu", dtype or tensor.dtype, memory_format=torch.contiguous_format)
    write_whole(path, lambda temporary: save_file(tensors, temporary, {METADATA: json.dumps(about)}))


def export(model: StableDiffusion, folder: str | Path, dtype: torch.dtype | None = torch.float16) -> None:
    """Write a diffusers folder. It appears whole or not at all; BadInput where the folder already exists."""
    folder = Path(folder)
    if folder.exists():
        raise BadInput(f"{folder}: exists already; name a new folder")
    if model.unet.config.stacked:
        raise BadInput(f"{model.path}: diffusers has no class for a stacked U-Net; keep the .safetensors file")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        networks = {
            "unet": ("UNet2DConditionModel", unet_to_diffusers(model.unet.config), "diffusion_pytorch_model"),
            "vae": ("AutoencoderKL", vae_to_diffusers(model.vae.config), "diffusion_pytorch_model"),
            "text_encoder": ("CLIPTextModel", text_to_transformers(model.text_encoder.config), "model"),
        }
        index = {
            "_class_name": "StableDiffusionPipeline" if model.kind == "diffusion" else "RectifiedFlowPipeline",
            "kind": model.kind, "requires_safety_checker": False,
            "safety_checker": [None, None], "feature_extractor": [None, None],
            "scheduler": ["diffusers", "DPMSolverMultistepScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"],
        }  # fmt: skip
        if model.captions is not None:
            index["captions"] = model.captions
        for part, (name, config, stem) in networks.items():
            index[part] = ["transformers" if part == "text_encoder" else "diffusers", name]
            (temporary / part).mkdir()
            (temporary / part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            tensors = {
                key: tensor.detach().to("cpu", dtype or tensor.dtype, memory_format=torch.contiguous_format)
                for key, tensor in getattr(model, part).state_dict().items()
            }
            save_file(tensors, temporary / part / f"{stem}.safetensors", {"format": "pt"})
        scheduler = {
            "_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085,
            "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing",
        }  # fmt: skip
        (temporary / "scheduler").mkdir()
        (temporary / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
        if model.tokenizer is not None:
            vocabulary, merges = tokenizer_parts(model.tokenizer)
            (temporary / "tokenizer").mkdir()
            write_text(temporary / "tokenizer" / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
            write_text(temporary / "tokenizer" / "merges.txt", merges_text(merges))
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main():
    parser = Parser("Convert a checkpoint between the single-file layout and a diffusers folder.")
    parser.add_argument("source", help="an SD 1.x .safetensors file or a diffusers folder")
    parser.add_argument("target", help="a name ending in .safetensors for a single file, any other for a folder")
    parser.add_argument("--kind", choices=KINDS, help="what the U-Net predicts, where the source does not say")
    parser.add_argument("--tokenizer", help="folder with vocab.json and merges.txt, to store along")
    parser.add_argument("--use-ema", action="store_true", help="take the averaged U-Net of a full training checkpoint")
    args = parser.parse_args()
    model = load(args.source, kind=args.kind, tokenizer=args.tokenizer, use_ema=args.use_ema)
    (save if args.target.endswith(".safetensors") else export)(model, args.target)
    print(f"{args.target}: a {model.kind} model")


if __name__ == "__main__":
    run(main)
