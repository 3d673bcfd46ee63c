"""Stable Diffusion 1.x as one object: three networks, a tokenizer, and what they are made for.

    prompt ──tokenizer, text_encoder──▶ context (B, 77, 768) ──▶ unet(x, timestep, context)
    picture (B, 3, 512, 512) ◀──vae.decode── latent (B, 4, 64, 64)

kind says what the U-Net predicts, and with it where its path starts: "diffusion" the noise, from
t = 0.064 on; "flow" a velocity, from t = 0, in many steps; "one-step" a velocity that is right at
t = 0 alone.
"""

import copy
import hashlib
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer

from command import HERE, BadInput, note
from text_encoder import TextEncoder, hub_tokenizer, tokenize
from unet import StackedUNet, UNet, build_unet
from vae import AutoencoderKL

KINDS = ("diffusion", "flow", "one-step")
# Channels from which bf16 convolutions are faster with channels last: SD's decoder 2.2 times on a
# CPU. In fp32 all are.
WIDE = 128


@dataclass(frozen=True)
class Family:
    """What models are made for.

    captions: those that they know, if not all; judge: who grades their pictures (evaluation/);
    example: a prompt that shows them; guidance: that they are drawn with, by kind; 1 is off.
    """

    captions: Path | None
    judge: Path | None
    example: str
    guidance: dict[str, float]


TOY = HERE / "toy"
# A flow's 1.5 and SD 1.4's 6 are the paper's, which takes 5 for SD 1.5.
FAMILIES = {
    "sd": Family(
        None, None, "a photo of a small house on a beach",
        {"diffusion": 6.0, "flow": 1.5, "one-step": 1.0},
    ),
    "shapes": Family(
        TOY / "captions.txt", TOY / "shapes.py", "a red circle above a blue square",
        {"diffusion": 2.5, "flow": 1.5, "one-step": 1.0},
    ),
    "emoji": Family(
        TOY / "emoji_captions.txt", TOY / "emoji.py", "red apple",
        {"diffusion": 2.5, "flow": 1.5, "one-step": 1.0},
    ),
}


@dataclass(frozen=True)
class Method:
    """How the models of a method of fewstep/ are drawn: without guidance, in a few steps.

    way: from one time to the next. "euler" follows the velocity; "re-noise" goes on to the end and
    mixes new noise in; "mean" asks for the mean velocity of the whole step. steps: that it is drawn
    with when none are asked for. numbers: of steps that it takes; none: any.
    """

    way: str
    steps: int
    numbers: tuple[int, ...] = ()


METHODS = {
    "perflow": Method("euler", 4, tuple(range(4, 101, 4))),  # its windows are four
    # Each round's model takes the steps of its round.
    "progressive-8": Method("euler", 8, (8,)),
    "progressive-4": Method("euler", 4, (4,)),
    "progressive-2": Method("euler", 2, (2,)),
    "progressive": Method("euler", 1, (1,)),
    "lcm": Method("re-noise", 4),
    "mlcm": Method("re-noise", 4, (1, 2, 4, 8)),  # between the edges of its eight segments
    "scott": Method("re-noise", 4),
    "rectified-diffusion": Method("euler", 4),
    "re-meanflow": Method("mean", 1),
    "hipa": Method("euler", 1, (1,)),
    "freeflow": Method("mean", 1, (1,)),
}


@dataclass
class StableDiffusion:
    """Everything a prompt needs to become a picture (sample.py)."""

    unet: UNet | StackedUNet
    vae: AutoencoderKL
    text_encoder: TextEncoder
    tokenizer: CLIPTokenizer | None  # None: the hub's, when the first prompt is encoded
    kind: str  # one of KINDS
    family: str = "sd"  # one of FAMILIES
    path: str = ""  # where it was loaded from
    method: str = ""  # one of METHODS, of fewstep/; others have none

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def is_tiny(self) -> bool:
        return self.family != "sd"

    @property
    def guidance(self) -> float:
        """The guidance it is drawn with when none is asked for."""
        return 1.0 if self.method else FAMILIES[self.family].guidance[self.kind]

    @property
    def steps(self) -> int:
        """The number of steps it is drawn with when none is asked for."""
        if self.method:
            return METHODS[self.method].steps
        return 1 if self.kind == "one-step" else 25

    def takes(self, steps: int) -> bool:
        """Can it be drawn with in this number of steps?"""
        if self.method:
            numbers = METHODS[self.method].numbers
            return not numbers or steps in numbers
        return self.kind != "one-step" or steps == 1

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(channels, h, w) of a latent, for pictures of `size` (height, width) in pixels."""
        side, factor = self.unet.config.sample_size, self.vae.config.downsampling
        h, w = (side, side) if size is None else (pixels // factor for pixels in size)
        return self.unet.config.in_channels, h, w

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """The context (B, L, D) that the U-Net reads, without gradients."""
        length = self.text_encoder.config.max_position_embeddings
        token_ids = tokenize(self.found_tokenizer(), prompts, length)
        with torch.no_grad():
            return self.text_encoder(token_ids.to(self.device))

    def found_tokenizer(self) -> CLIPTokenizer:
        """The checkpoint's own tokenizer, or the hub's from now on."""
        if self.tokenizer is None:
            self.tokenizer = hub_tokenizer(self.text_encoder.config.vocab_size)
        return self.tokenizer

    def in_dtype(self, dtype: torch.dtype) -> "StableDiffusion":
        """The same model to draw with in another dtype: a copy, or itself where it has it."""
        if dtype == self.dtype:
            return self
        parts = ("unet", "vae", "text_encoder")
        other = replace(
            self, **{part: copy.deepcopy(getattr(self, part)).to(dtype) for part in parts}
        )
        arrange(other.unet, other.vae, dtype)
        return other

    def compile(self, backend: str = "inductor") -> None:
        """Have torch compile U-Net and decoder when they are first called, in place."""
        for network in (self.unet, self.vae.decoder):
            network.compile(backend=backend)


def fingerprint(path: str | Path) -> str:
    """SHA-256 over a single file or the weights in a folder: so that data can say what made it."""
    path, digest = Path(path), hashlib.sha256()
    for file in sorted(path.glob("*/*.safetensors")) if path.is_dir() else [path]:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Building and filling the networks: for checkpoint.py and diffusers_folder.py, which say from where


# What a configuration that somebody else wrote may do to the code that reads it.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError,
             RuntimeError)


def tensors_in(paths: list[Path]) -> dict:
    """Tensor name -> the open safetensors file that holds it."""
    found = {}
    for path in paths:
        try:
            file = safe_open(path, "pt")
        except (SafetensorError, OSError) as problem:
            raise BadInput(
                f"{path}: not a whole safetensors file ({problem}); get or make it again"
            ) from None
        found |= dict.fromkeys(file.keys(), file)
    return found


def empty_networks(where: str, configs, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The networks without weights, with the order in memory in which `fill` lays them down.

    configs() reads the sizes of U-Net, autoencoder and text encoder. BadInput where they make no
    network, or one that is not Stable Diffusion's.
    """
    try:
        unet, vae, text = configs()
        for name, value in itertools.chain(*(vars(config).items() for config in (unet, vae, text))):
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(n, (int, float)) and n >= 0 for n in numbers):
                raise ValueError(f"{name} is {value!r}")
        if unet.in_channels != vae.latent_channels:
            what = "an inpainting model" if unet.in_channels == 9 else "another model"
            raise BadInput(f"{where}: {what} ({unet.in_channels} channels in, not "
                           f"{vae.latent_channels}); give one that draws from a prompt alone")
        with torch.device("meta"):
            networks = {"unet": build_unet(unet), "vae": AutoencoderKL(vae),
                        "text_encoder": TextEncoder(text)}
    except MALFORMED as problem:
        raise BadInput(
            f"{where}: its configuration is not that of an SD 1.x model ({problem!r}); get it again"
        ) from None
    arrange(networks["unet"], networks["vae"], dtype)
    return networks


def arrange(unet: UNet | StackedUNet, vae: AutoencoderKL, dtype: torch.dtype) -> None:
    """Give the convolutions the order in memory that is fastest in this dtype, in place."""
    fast = dtype == torch.float32 or unet.config.block_out_channels[0] >= WIDE
    unet.to(memory_format=torch.channels_last if fast else torch.contiguous_format)
    # In fp32 its norms would round four times as coarsely on a CPU.
    if fast and dtype != torch.float32:
        vae.to(memory_format=torch.channels_last)


def fill(
    module: nn.Module, what: str, keys: dict[str, str], files: dict, where: str, device, dtype,
) -> None:
    """Give a module on the meta device its tensors: our name -> keys[our name] -> its open file.

    One by one through the memory map into their final dtype and device. Strict: BadInput names what
    is missing and what has the wrong shape.
    """
    wanted = module.state_dict()
    missing = [keys[name] for name in wanted if keys[name] not in files]
    if missing:
        raise BadInput(f"{where}: {len(missing)} tensors are missing, first "
                       f"{', '.join(missing[:3])}; not a whole SD 1.x {what}")
    tensors, wrong = {}, []
    for name, like in wanted.items():
        file, expected = files[keys[name]], list(like.shape)
        shape = list(file.get_slice(keys[name]).get_shape())
        # Linear maps of the autoencoder's attention are 1 x 1 convolutions in single files.
        if shape != expected and shape != [*expected, 1, 1]:
            wrong.append(f"{keys[name]} is {shape} and should be {expected}")
        elif not wrong:
            new = torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=device)
            tensors[name] = new.copy_(file.get_tensor(keys[name]).reshape(like.shape))
    if wrong:
        raise BadInput(f"{where}: {len(wrong)} tensors have the wrong shape: "
                       f"{'; '.join(wrong[:3])}; not an SD 1.x {what}")
    module.load_state_dict(tensors, assign=True)


def tell_unused(where: Path, names: set[str]) -> None:
    """Name what a file holds beyond the model; CLIP's position numbers are known not to matter."""
    unknown = sorted(name for name in names if not name.endswith("position_ids"))
    if unknown:
        first = ", ".join(unknown[:3])
        note(f"{where}: {len(unknown)} unknown tensors are not used, first {first}")


def checked_about(path: Path, about) -> dict:
    """What a file or folder says of itself, with a kind and a family that are known here."""
    if not isinstance(about, dict):
        what = type(about).__name__
        raise BadInput(f"{path}: its metadata is malformed (a {what}, not an object); get it again")
    if "captions" in about and "family" not in about:
        raise BadInput(f"{path}: written by an earlier version, of tiny models; make it again")
    for name, known in (("kind", KINDS), ("family", tuple(FAMILIES)), ("method", ("", *METHODS))):
        if about.get(name) is not None and about[name] not in known:
            raise BadInput(f"{path}: its metadata names the {name} {about[name]!r}; known are "
                           f"{', '.join(known)}")
    return about
