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
"one-step" a velocity that is right at t = 0 alone. It lies in the metadata of files written here. What metadata says is
data: it is checked, and it never names a file to open.
"""

import argparse
import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from command import (
    KINDS,
    KNOWN_CAPTIONS,
    STARTS,
    BadInput,
    Parser,
    note,
    pick_dtype,
    run,
    write_folder_whole,
    write_whole,
)
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
    captions: str | None = None  # name of the prompts the model was made for, one of KNOWN_CAPTIONS; None for SD
    path: str = ""  # where it was loaded from

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

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

    def found_tokenizer(self) -> CLIPTokenizer:
        """The checkpoint's own tokenizer, or the hub's from now on."""
        if self.tokenizer is None:
            self.tokenizer = hub_tokenizer(self.text_encoder.config.vocab_size)
        return self.tokenizer

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """The context (B, L, D) that the U-Net reads, without gradients."""
        token_ids = tokenize(self.found_tokenizer(), prompts, self.text_encoder.config.max_position_embeddings)
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
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as problem:  # the tokenizers library raises its own, without a class for them
        raise BadInput(f"{folder}: not a CLIP tokenizer ({first_line(problem)}); get the folder again") from None


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


# What a configuration or a description that somebody else wrote may do to the code that reads it.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, RuntimeError)


def first_line(problem: Exception) -> str:
    return (str(problem).strip() or repr(problem)).splitlines()[0]


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


def empty_networks(
    where: str, configs: Callable[[], tuple[UNetConfig, VAEConfig, TextEncoderConfig]], dtype: torch.dtype
) -> dict[str, nn.Module]:
    """The networks without weights, with the order in memory in which `fill` is to lay them down.

    configs() reads their sizes. BadInput where they make no network, or one that is not Stable Diffusion's.
    """
    try:
        unet, vae, text = configs()
        for name, value in itertools.chain(*(vars(config).items() for config in (unet, vae, text))):
            numbers = value if isinstance(value, tuple) else (value,)
            if name != "stacked" and not all(isinstance(n, (int, float)) and n >= 0 for n in numbers):
                raise ValueError(f"{name} is {value!r}")
        if unet.in_channels != vae.latent_channels:
            what = "an inpainting model" if unet.in_channels == 9 else "another model"
            raise BadInput(
                f"{where}: {what} ({unet.in_channels} channels in, not {vae.latent_channels}); give one that draws from a "
                "prompt alone"
            )
        with torch.device("meta"):
            networks = {"unet": build_unet(unet), "vae": AutoencoderKL(vae), "text_encoder": TextEncoder(text)}
    except MALFORMED as problem:
        raise BadInput(f"{where}: its configuration is not that of an SD 1.x model ({problem!r}); get it again") from None
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
        model = load_folder(path, device, dtype, kind)
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


def load_as_asked(path: str, args: argparse.Namespace, device: torch.device, kind: str | None) -> StableDiffusion:
    """`load` with a command's own options (command.py). kind: of this one, since --kind may be of several."""
    model = load(path, device, pick_dtype(args.dtype, device), kind, args.tokenizer, args.use_ema)
    if args.compile:
        model.compile()
    return model


def start_of(args: argparse.Namespace) -> str:
    """What --init stands for: its name, or the hash of the checkpoint that it names."""
    return args.init if args.init in STARTS else fingerprint(args.init)


def check_start(args: argparse.Namespace, teacher: StableDiffusion) -> None:
    """BadInput where --init names a U-Net that is not built like the teacher's."""
    if args.init not in STARTS and load(args.init).unet.config != teacher.unet.config:
        raise BadInput(f"--init {args.init}: its U-Net is not built like the teacher's; give one that was made from that")


def load_student(args: argparse.Namespace, device: torch.device) -> StableDiffusion:
    """What a command trains: the teacher's networks, with the U-Net that --init says, which `check_start` has seen.

    In fp32, since bf16 would round the weights that training starts from. With a tokenizer, which is saved along.
    """
    student = load(args.teacher, device, torch.float32, args.kind, args.tokenizer, args.use_ema)
    student.found_tokenizer()
    if args.init in STARTS:
        student.unet = started_from(student.unet, args.init, student.kind, args.seed)
    else:
        student.unet = load(args.init, device, torch.float32).unet
    return student


def load_single_file(path: Path, device, dtype, use_ema: bool) -> StableDiffusion:
    index = index_of([path])
    with opened(path) as file:
        about = read_about(path, (file.metadata() or {}).get(METADATA))
        refuse_other_models(path, index, file)
    configs = lambda: (UNetConfig(), VAEConfig(), TextEncoderConfig())
    if "config" in about:
        config = about["config"]
        configs = lambda: (
            UNetConfig(**tuples(config["unet"])),
            VAEConfig(**tuples(config["vae"])),
            TextEncoderConfig(**config["text_encoder"]),
        )
    networks = empty_networks(str(path), configs, dtype)
    table = original_names(networks["unet"].config, networks["vae"].config)
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
    tokenizer = None
    if about.get("tokenizer"):
        try:
            tokenizer = tokenizer_from(**about["tokenizer"])
        except Exception as problem:  # the tokenizers library raises its own, without a class for them
            raise BadInput(
                f"{path}: the tokenizer in its metadata is malformed ({first_line(problem)}); get it again"
            ) from None
    kind = about.get("kind") or "diffusion"
    return StableDiffusion(**networks, tokenizer=tokenizer, kind=kind, captions=about.get("captions"))


def read_about(path: Path, text: str | None) -> dict:
    """What a file of ours says of itself; empty for those that others wrote. BadInput where it is malformed."""
    if text is None:
        return {}
    try:
        return checked_about(path, json.loads(text))
    except ValueError as problem:
        raise BadInput(f"{path}: its metadata is malformed ({first_line(problem)}); get it again") from None


def checked_about(path: Path, about: dict) -> dict:
    """The same, with kind and captions ones that are known here."""
    if not isinstance(about, dict):
        raise BadInput(f"{path}: its metadata is malformed (a {type(about).__name__}, not an object); get it again")
    for name, known in (("kind", KINDS), ("captions", tuple(KNOWN_CAPTIONS))):
        if about.get(name) is not None and about[name] not in known:
            raise BadInput(f"{path}: its metadata names the {name} {about[name]!r}; known are {', '.join(known)}")
    return about


def refuse_other_models(path: Path, index: dict[str, Path], file) -> None:
    """BadInput that names what the opened file is, where it is not Stable Diffusion 1.x."""
    first = {key.split(".")[0] for key in index}
    if "conditioner" in first:
        raise BadInput(f"{path}: a Stable Diffusion XL file; this project reads SD 1.4, 1.5 and fine-tunes of them")
    if any(key.startswith("cond_stage_model.model.") for key in index):
        raise BadInput(f"{path}: a Stable Diffusion 2.x file; this project reads SD 1.4, 1.5 and fine-tunes of them")
    for part, prefix in (("U-Net", UNET_PREFIX), ("autoencoder", VAE_PREFIX), ("text encoder", TEXT_PREFIX)):
        if not any(key.startswith(prefix) for key in index):
            raise BadInput(f"{path}: holds no {part} ({prefix}*); give a whole SD 1.x checkpoint")
    if "v_pred" in index:
        raise BadInput(f"{path}: a v-prediction model; this project reads those that predict the noise, as SD 1.4 and 1.5 do")
    entrance = UNET_PREFIX + "input_blocks.0.0.weight"
    if entrance in index and file.get_slice(entrance).get_shape()[1:2] == [9]:
        raise BadInput(f"{path}: an inpainting model (9 channels in); give one that draws from a prompt alone")


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


def load_folder(path: Path, device, dtype, kind: str | None) -> StableDiffusion:
    if (path / "text_encoder_2").exists():
        raise BadInput(f"{path}: a Stable Diffusion XL folder; this project reads SD 1.4, 1.5 and fine-tunes of them")
    config = {part: read_config(path, part) for part in ("unet", "vae", "text_encoder")}
    if config["unet"].get("use_linear_projection") or config["unet"].get("cross_attention_dim") == 1024:
        raise BadInput(f"{path}: a Stable Diffusion 2.x folder; this project reads SD 1.4, 1.5 and fine-tunes of them")
    scheduler = path / "scheduler" / "scheduler_config.json"
    predicts = read_json(scheduler).get("prediction_type", "epsilon") if scheduler.exists() else "epsilon"
    if predicts != "epsilon":
        raise BadInput(
            f"{path}: a {predicts} model (scheduler/); this project reads those that predict the noise, as SD 1.4 does"
        )
    configs = lambda: (
        unet_from_diffusers(config["unet"]),
        vae_from_diffusers(config["vae"]),
        text_from_transformers(config["text_encoder"]),
    )
    networks = empty_networks(str(path), configs, dtype)
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
    pipeline = read_json(path / "model_index.json") if (path / "model_index.json").exists() else {}
    pipeline = checked_about(path / "model_index.json", pipeline)
    kind = kind or pipeline.get("kind") or guessed_kind(path, pipeline, config["unet"])
    tokenizer = tokenizer_in(path / "tokenizer") if (path / "tokenizer").is_dir() else None
    return StableDiffusion(**networks, tokenizer=tokenizer, kind=kind, captions=pipeline.get("captions"))


def guessed_kind(path: Path, pipeline: dict, unet: dict) -> str:
    """The kind of a folder that does not say it. InstaFlow's folders say that they are flows and not whether one-step."""
    if pipeline.get("_class_name") != "RectifiedFlowPipeline":
        return "diffusion"
    folder = path.resolve()
    if folder.parent.name == "snapshots":  # of the hub's cache, where the folder above has the name
        folder = folder.parent.parent
    names = (folder.name, str(pipeline.get("_name_or_path")), str(unet.get("_name_or_path")))
    kind = "one-step" if any("instaflow" in name.lower() for name in names) else "flow"
    note(f"{path}: a RectifiedFlowPipeline, by its name taken for a model of kind {kind}; --kind says otherwise")
    return kind


def read_json(path: Path) -> dict:
    """A JSON object; BadInput where the file holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise BadInput(f"{path}: not JSON ({first_line(problem)}); get the folder again") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path}: holds a {type(found).__name__} and not an object; get the folder again")
    return found


def read_config(path: Path, part: str) -> dict:
    try:
        return read_json(path / part / "config.json")
    except OSError:
        raise BadInput(f"{path}: has no {part}/config.json; give a whole diffusers folder of an SD 1.x model") from None


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
                    files = files_named_in(index)
                    missing = [name for name in files if not (folder / name).is_file()]
                    if missing:
                        raise BadInput(f"{folder}: {index.name} names {missing[0]}, which is not there; get it again")
                    return [folder / name for name in files]
    raise BadInput(f"{folder}: holds no .safetensors weights; pickles (.bin) are not read, save them as safetensors first")


def files_named_in(index: Path) -> list[str]:
    """Names of the files, beside it, that hold a network's tensors."""
    try:
        files = sorted(set(read_json(index)["weight_map"].values()))
        if all(Path(name).name == name for name in files):
            return files
    except MALFORMED:
        pass
    raise BadInput(f"{index}: not an index of weight files; get the folder again")


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
    """Write a diffusers folder. It appears whole or not at all; BadInput where the folder already exists.

    diffusers' StableDiffusionPipeline opens that of a diffusion, InstaFlow's own RectifiedFlowPipeline that of a flow or
    a one-step model.
    """
    folder = Path(folder)
    if folder.exists():
        raise BadInput(f"{folder}: exists already; name a new folder")
    if model.unet.config.stacked:
        raise BadInput(f"{model.path}: diffusers has no class for a stacked U-Net; keep the .safetensors file")
    if model.tokenizer is None:
        note(f"{folder}: without a tokenizer, which other programs need; give one with --tokenizer")
    write_folder_whole(folder, lambda temporary: write_folder(model, temporary, dtype))


def write_folder(model: StableDiffusion, folder: Path, dtype: torch.dtype | None) -> None:
    """The files of `export`, into an empty folder."""
    written = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}[dtype or model.dtype]
    networks = {
        "unet": ("UNet2DConditionModel", unet_to_diffusers(model.unet.config), "diffusion_pytorch_model"),
        "vae": ("AutoencoderKL", vae_to_diffusers(model.vae.config), "diffusion_pytorch_model"),
        "text_encoder": ("CLIPTextModel", text_to_transformers(model.text_encoder.config) | {"torch_dtype": written}, "model"),
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
        write_json(folder / part / "config.json", config)
        tensors = {
            key: tensor.detach().to("cpu", dtype or tensor.dtype, memory_format=torch.contiguous_format)
            for key, tensor in getattr(model, part).state_dict().items()
        }
        save_file(tensors, folder / part / f"{stem}.safetensors", {"format": "pt"})
    # The steps of `sampling_timesteps`; an offset of 1 is what pipelines made for SD 1.x ask for, and has no effect on these.
    write_json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "timestep_spacing": "trailing", "prediction_type": "epsilon", "steps_offset": 1,
    })  # fmt: skip
    if model.tokenizer is not None:
        vocabulary, merges = tokenizer_parts(model.tokenizer)
        special = {"bos_token": model.tokenizer.bos_token, "eos_token": model.tokenizer.eos_token,
                   "unk_token": model.tokenizer.unk_token, "pad_token": model.tokenizer.pad_token}  # fmt: skip
        length = model.text_encoder.config.max_position_embeddings
        write_json(folder / "tokenizer" / "vocab.json", vocabulary)
        (folder / "tokenizer" / "merges.txt").write_text(merges_text(merges), encoding="utf-8")
        write_json(folder / "tokenizer" / "special_tokens_map.json", special)
        write_json(folder / "tokenizer" / "tokenizer_config.json",
                   special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": length})  # fmt: skip
    write_json(folder / "model_index.json", index)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
