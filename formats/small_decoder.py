"""The small decoder: its network, TAESD's decoder, and the files that hold one.

    ours, a .safetensors         decoder.layers.N...   sizes in the metadata; TAESD's without
    taesd_decoder.safetensors    N + 1 ...             module 0 is the tanh, which has no weights
    an AutoencoderTiny folder    decoder.layers.N...   sizes in config.json; the encoder is not read

small_decoder.py trains the network. The network is defined here because checkpoint.py loads it for
sample.py and evaluate.py. Its attributes have diffusers' names:

                     TAESD           resolution (of 512)
    3 tanh(z / 3)      4              64
    convolution        4 -> 64        64     ReLU
    thrice            64 -> 64        64     3 blocks, double, convolution without bias
    block             64 -> 64       512
    convolution       64 -> 3        512

All convolutions are 3 x 3; there are no norms and no attention. At 512 px that is 0.141 TFLOP, the
full decoder's 2.515. Source: TAESD (Ollin Boer Bohan, github.com/madebyollin/taesd).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from command import BadInput, write_atomically
from formats.diffusers_folder import check_values, read_json, same_value, weight_files
from formats.single_file import METADATA, read_metadata, unread
from formats.weights import (
    MALFORMED, check_unused_tensors, in_dtype, load_weights, open_safetensors,
)

BLOCKS = 3  # at each resolution but the last
PREFIX = "decoder.layers."
READS = "small_decoder.py makes one, and taesd_decoder.safetensors or AutoencoderTiny folders work"
# What decides AutoencoderTiny's decoder, with the value that is implemented.
AUTOENCODER_TINY = {"_class_name": "AutoencoderTiny", "act_fn": "relu", "out_channels": 3,
                    "scaling_factor": 1, "shift_factor": (0, None), "upsample_fn": "nearest",
                    "upsampling_scaling_factor": 2}


@dataclass(frozen=True)
class SmallDecoderConfig:
    """Sizes, and whose latents are decoded; the defaults are TAESD's, for Stable Diffusion 1.x."""

    family: str = "sd"  # one of stable_diffusion.FAMILIES
    latent_channels: int = 4
    width: int = 64
    doublings: int = 3

    @property
    def downsampling(self) -> int:
        """Image height / latent height."""
        return 2**self.doublings


# --------------------------------------------------------------------------------------------------
# The network


def convolution(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        first, second, third = (convolution(width, width) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv(x))


class Layers(nn.Module):
    def __init__(self, config: SmallDecoderConfig):
        super().__init__()
        self.gradient_checkpointing = False
        width = config.width
        rows = [convolution(config.latent_channels, width), nn.ReLU()]
        for _ in range(config.doublings):
            rows += [Block(width) for _ in range(BLOCKS)]
            rows += [nn.Upsample(scale_factor=2), convolution(width, width, bias=False)]
        self.layers = nn.Sequential(*rows, Block(width), convolution(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = 3 * torch.tanh(x / 3)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return 2 * x - 1  # TAESD's own images are in [0, 1]


class SmallDecoder(nn.Module):
    """Takes the place of `vae.AutoencoderKL` where images are decoded."""

    def __init__(self, config: SmallDecoderConfig):
        super().__init__()
        self.config = config
        self.decoder = Layers(config)

    def decode(self, latents: Tensor) -> Tensor:
        """SD-scaled latents (B, 4, h, w) -> images (B, 3, 8h, 8w) in [-1, 1], with overshoot."""
        return self.decoder(latents.to(self.decoder.layers[0].weight.dtype))

    forward = decode

    def encode(self, *images):
        """BadInput, always."""
        raise BadInput("a small decoder has no encoder; load the model without --decoder")

    encode_latents = encode


# --------------------------------------------------------------------------------------------------
# In


def load_decoder(path: str | Path, model, dtype: torch.dtype | None = None) -> SmallDecoder:
    """The small decoder in a file or folder, on the model's device. model: a StableDiffusion.

    dtype: None is the model's. BadInput, one line: no small decoder, or one of other latents.
    """
    path = Path(path)
    if path.is_dir():
        config = folder_config(path)
        files = open_safetensors(weight_files(path))
    elif not path.is_file():
        raise BadInput(f"{path}: no such file or folder; {READS}")
    elif path.suffix.lower() != ".safetensors":
        raise BadInput(f"{path}: {unread(path)}")
    else:
        files = open_safetensors([path])
        config = file_config(path, files)
    check_fits(path, config, model)
    with torch.device("meta"):
        decoder = SmallDecoder(config)
    keys = {name: name for name in decoder.state_dict()}
    if f"{PREFIX}0.weight" not in files:
        keys = {name: taesd_name(name) for name in keys}
    load_weights(decoder, "small decoder", keys, files, str(path), model.device,
                 dtype or model.dtype)
    unused = {name for name in set(files) - set(keys.values()) if not name.startswith("encoder.")}
    check_unused_tensors(path, unused, ("",))
    # In bf16 on a CPU a third faster than contiguous weights (benchmarks/results/notes.md).
    return decoder.to(memory_format=torch.channels_last).eval()


def taesd_name(name: str) -> str:
    """Our name of a tensor -> TAESD's."""
    number, rest = name.removeprefix(PREFIX).split(".", 1)
    return f"{int(number) + 1}.{rest}"


def file_config(path: Path, files: dict) -> SmallDecoderConfig:
    if not files.keys() & {f"{PREFIX}0.weight", "1.weight"}:
        raise BadInput(f"{path}: not a small decoder (holds neither {PREFIX}0.weight nor TAESD's "
                       f"1.weight); {READS}")
    about = read_metadata(path, files)
    if "small_decoder" not in about:
        check_not_sdxl(path)
    return checked(path, lambda: SmallDecoderConfig(**about.get("small_decoder", {})))


def folder_config(path: Path) -> SmallDecoderConfig:
    if not (path / "config.json").is_file():
        raise BadInput(f"{path}: holds no config.json; {READS}")
    found = read_json(path / "config.json")
    check_values(path, found, AUTOENCODER_TINY)
    check_not_sdxl(path, str(found.get("_name_or_path")))

    def config() -> SmallDecoderConfig:
        *blocks, last = found["num_decoder_blocks"]
        if {*blocks, last + BLOCKS - 1} != {BLOCKS}:
            raise ValueError(f"num_decoder_blocks is {found['num_decoder_blocks']}")
        width = same_value(found["decoder_block_out_channels"])
        return SmallDecoderConfig("sd", found["latent_channels"], width, len(blocks))

    return checked(path, config)


def checked(path: Path, read) -> SmallDecoderConfig:
    """read(): a configuration. BadInput: it is none, or of impossible sizes."""
    try:
        config = read()
        family, *sizes = vars(config).values()
        if not (isinstance(family, str) and all(type(n) is int and 1 <= n < 2**12 for n in sizes)):
            raise ValueError(f"its sizes are {vars(config)}")
    except MALFORMED as problem:
        raise BadInput(f"{path}: its configuration is not a small decoder's ({problem!r}); get it "
                       "again") from None
    return config


def check_not_sdxl(path: Path, name: str = "") -> None:
    """BadInput, by name: SDXL's TAESD has the sizes of Stable Diffusion 1.x's."""
    if any("taesdxl" in part.lower() for part in (*path.resolve().parts[-3:], name)):
        raise BadInput(f"{path}: by its name TAESDXL, for Stable Diffusion XL; get TAESD, for 1.x")


def check_fits(path: Path, config: SmallDecoderConfig, model) -> None:
    """BadInput: a decoder of other latents than the model's."""
    says = "latents of {} with {} channels and {} pixels to a side".format
    found = says(config.family, config.latent_channels, config.downsampling)
    wanted = says(model.family, model.unet.config.in_channels, model.vae.config.downsampling)
    if found != wanted:
        raise BadInput(f"{path}: decodes {found}; {model.path} has {wanted}")


# --------------------------------------------------------------------------------------------------
# Out


def save_decoder(decoder: SmallDecoder, path: str | Path) -> None:
    """Write one .safetensors file in fp16, with the configuration in its metadata."""
    tensors = {name: in_dtype(name, tensor, torch.float16)
               for name, tensor in decoder.state_dict().items()}
    metadata = {METADATA: json.dumps({"small_decoder": asdict(decoder.config)})}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
