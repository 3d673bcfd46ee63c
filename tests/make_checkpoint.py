"""Write checkpoints with random weights in the layouts of published ones.

For tests, and for anyone without the published weights:

    python tests/make_checkpoint.py sd14.safetensors                       like SD 1.4's file, fp16
    python tests/make_checkpoint.py sd14/ --layout folder --old-attention  like SD 1.4's folder
    python tests/make_checkpoint.py small.safetensors --size small         takes a second

Published files differ from what today's libraries write; each difference is an option here. The
single-file names come from formats/single_file.py. tests/test_checkpoint.py compares these names
with those of diffusers' own converter.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion import NoiseSchedule
from formats import diffusers_folder, single_file
from formats.single_file import EMA_PREFIX, TEXT_PREFIX, UNET_PREFIX
from formats.tokenizers import tokenizer_from
from stable_diffusion import StableDiffusion
from text_encoder import TextEncoder, TextEncoderConfig
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SMALL_UNET = UNetConfig(
    block_out_channels=(32, 64, 64), attention_levels=(True, True, False), attention_heads=4,
    cross_attention_dim=32, norm_num_groups=16, sample_size=8,
)
SMALL_VAE = VAEConfig(block_out_channels=(16, 32, 32, 32), layers_per_block=2, norm_num_groups=8)
SMALL_TEXT = TextEncoderConfig(
    vocab_size=514, max_position_embeddings=16, hidden_size=32, intermediate_size=64,
    num_hidden_layers=2, num_attention_heads=4,
)


def letters_tokenizer():
    """CLIP's tokenizer with an empty list of merges: a token for each letter."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [
        chr(256 + n) for n in range(256 - len(printable))
    ]
    tokens = letters + [letter + "</w>" for letter in letters] + [
        "<|startoftext|>", "<|endoftext|>"
    ]
    return tokenizer_from({token: number for number, token in enumerate(tokens)}, [])


def make_model(size: str = "small", seed: int = 0, kind: str = "diffusion") -> StableDiffusion:
    """A model with seeded random weights, in fp32.

    size: "small" (with a tokenizer), "full" (Stable Diffusion 1.x) or "half" of its channels.
    """
    torch.manual_seed(seed)
    if size != "small":
        scale = 2 if size == "half" else 1
        unet, vae = (
            replace(config, block_out_channels=tuple(n // scale for n in config.block_out_channels))
            for config in (UNetConfig(), VAEConfig())
        )
        return StableDiffusion(
            UNet(unet), AutoencoderKL(vae), TextEncoder(TextEncoderConfig()), None, kind
        )
    networks = UNet(SMALL_UNET), AutoencoderKL(SMALL_VAE), TextEncoder(SMALL_TEXT)
    return StableDiffusion(*(network.eval() for network in networks), letters_tokenizer(), kind)


def single_file_tensors(
    model: StableDiffusion, dtype: torch.dtype, ema: bool = False, text_level: bool = True,
    position_ids: torch.dtype | None = torch.int64, buffers: bool = True,
) -> dict[str, torch.Tensor]:
    """The tensors by name in a single file of the original Stable Diffusion code.

    text_level: the text encoder's names start with text_model., as in most files.
    """
    tensors, table = {}, single_file.original_names(model.unet.config, model.vae.config)
    for part in ("unet", "vae", "text_encoder"):
        state = getattr(model, part).state_dict()
        names = single_file.single_file_names(part, state, table[part])
        for name, tensor in state.items():
            tensor = (
                tensor[:, :, None, None]
                if part == "vae" and ".to_" in name and tensor.ndim == 2 else tensor
            )
            tensors[names[name]] = tensor.to(dtype).contiguous()
    if ema:  # averaged weights = trained weights + 1
        for name in [name for name in tensors if name.startswith(UNET_PREFIX)]:
            tensors[EMA_PREFIX + name.removeprefix("model.").replace(".", "")] = tensors[name] + 1
    if position_ids is not None:
        length = model.text_encoder.config.max_position_embeddings
        ids = torch.arange(length)[None].to(position_ids)
        tensors[TEXT_PREFIX + "text_model.embeddings.position_ids"] = ids
    if not text_level:
        old, new = TEXT_PREFIX + "text_model.", TEXT_PREFIX
        tensors = {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}
    if buffers:
        cumprod = torch.sigmoid(2 * NoiseSchedule().log_ratio).float()
        # Converters to bf16 convert them too; published fp16 files keep them in fp32.
        exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        tensors |= {
            "betas": (1 - cumprod / torch.cat([torch.ones(1), cumprod[:-1]])).to(exact),
            "alphas_cumprod": cumprod.to(exact, copy=True),
            "sqrt_alphas_cumprod": cumprod.sqrt().to(exact),
            "posterior_variance": torch.zeros(1000),
            "model_ema.num_updates": torch.tensor(1),
        }
    return tensors


def write_single_file(
    model: StableDiffusion, path: str | Path, dtype: torch.dtype = torch.float16, **variants
) -> None:
    """Write a single file: at full size without our metadata, as published.

    Other sizes have their config in the metadata.
    """
    metadata = {"format": "pt"}
    if model.unet.config != UNetConfig():
        parts = ("unet", "vae", "text_encoder")
        config = {part: asdict(getattr(model, part).config) for part in parts}
        metadata = {single_file.METADATA: json.dumps({"config": config})}
    save_file(single_file_tensors(model, dtype, **variants), path, metadata)


def write_folder(
    model: StableDiffusion, folder: str | Path, dtype: torch.dtype = torch.float16,
    old_attention: bool = False, text_level: bool = True, fp16_names: bool = False,
    shards: bool = False, scaling_factor: bool = True,
) -> None:
    """Write a diffusers folder as published.

    old_attention: the old names of the autoencoder's attention, as in SD 1.4 and 1.5.
    """
    folder = Path(folder)
    diffusers_folder.export(model, folder, dtype)
    for part, stem in (
        ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        path = folder / part / f"{stem}.safetensors"
        tensors = {
            name: tensor.to(dtype).contiguous()
            for name, tensor in getattr(model, part).state_dict().items()
        }
        if part == "vae" and old_attention:
            for new, old in diffusers_folder.OLD_ATTENTION.items():
                tensors = {
                    n.replace(f".{new}.", f".{old}.") if ".attentions." in n else n: t
                    for n, t in tensors.items()
                }
        if part == "text_encoder" and not text_level:
            tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        path.unlink()
        if shards:
            names = sorted(tensors)
            halves = {f"{stem}-{k + 1:05d}-of-00002.safetensors": names[k::2] for k in range(2)}
            for file, part_names in halves.items():
                save_file({name: tensors[name] for name in part_names}, folder / part / file)
            weight_map = {name: file for file, part_names in halves.items() for name in part_names}
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        else:
            save_file(tensors, folder / part / f"{stem}{'.fp16' * fp16_names}.safetensors")
    if not scaling_factor:
        config = json.loads((folder / "vae" / "config.json").read_text())
        del config["scaling_factor"]
        (folder / "vae" / "config.json").write_text(json.dumps(config))
    for extra in ("safety_checker", "feature_extractor"):
        (folder / extra).mkdir()
        (folder / extra / "config.json").write_text("{}")


def main():
    parser = argparse.ArgumentParser(description="Write a checkpoint with seeded random weights.")
    parser.add_argument("out")
    parser.add_argument("--size", choices=["full", "half", "small"], default="full")
    parser.add_argument("--layout", choices=["file", "folder"], default="file")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ema", action="store_true", help="file: add model_ema.*")
    parser.add_argument("--no-text-level", action="store_true",
                        help="text encoder's names without text_model.")
    parser.add_argument("--float-position-ids", action="store_true",
                        help="file: position_ids as floats")
    parser.add_argument("--old-attention", action="store_true",
                        help="folder: the autoencoder's old attention names")
    parser.add_argument("--fp16-names", action="store_true",
                        help="folder: files named ....fp16.safetensors")
    parser.add_argument("--shards", action="store_true",
                        help="folder: weights in two files and an index")
    args = parser.parse_args()
    model, dtype = make_model(args.size, args.seed), DTYPES[args.dtype]
    if args.layout == "file":
        ids = torch.float32 if args.float_position_ids else torch.int64
        write_single_file(model, args.out, dtype, ema=args.ema, text_level=not args.no_text_level,
                          position_ids=ids)
    else:
        write_folder(model, args.out, dtype, old_attention=args.old_attention,
                     text_level=not args.no_text_level, fp16_names=args.fp16_names,
                     shards=args.shards)


if __name__ == "__main__":
    main()
