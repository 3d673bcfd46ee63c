"""What sample.py adds to a model: another autoencoder, LoRA, ControlNets. The flags, in one place.

    python sample.py --vae ft-mse.safetensors --lora style.safetensors:0.8 \\
        --controlnet canny.safetensors --control-image photo.png --canny --prompt "a house"
"""

import hashlib
from argparse import ArgumentParser, Namespace
from pathlib import Path

import checkpoint
from command import BadInput, dtype_name
from controlnet import add_control_options, control
from formats.hub import local_path
from formats.lora import add_lora_options, apply_lora_options
from formats.vae_file import replace_vae
from stable_diffusion import StableDiffusion


def add_additions(parser: ArgumentParser) -> None:
    add_lora_options(parser)
    add_control_options(parser)
    parser.add_argument("--vae", help="another autoencoder of SD 1.x: a file or diffusers folder")


def apply_additions(model: StableDiffusion, args: Namespace, size: tuple[int, int]) -> dict:
    """Change the model in place as the flags say; {flag: value} for an image's metadata.

    size: (height, width) of the images. BadInput: a file or flag that does not fit the model.
    """
    if args.vae and args.decoder:
        raise BadInput("--vae, --decoder: both decode; give one of them")
    if args.vae:
        replace_vae(model, args.vae)
    apply_lora_options(model, args, *map(checkpoint.load, args.add_difference or ()))
    lora = [f"{Path(path).name}:{scale:g}" for path, scale in args.lora or ()]
    given = {"lora": lora, "difference": args.add_difference,
             "vae": args.vae and Path(args.vae).name,
             "decoder": args.decoder and Path(args.decoder).name}
    return {name: value for name, value in given.items() if value} | control(model, args, size)


def identity(model: StableDiffusion, args: Namespace, size: tuple[int, int]) -> dict:
    """What decides images beside their metadata: size, dtype and the contents of all files."""
    files = [model.path, args.vae, args.decoder, *(path for path, _ in args.lora or ()),
             *map(local_path, args.add_difference or ()), *args.controlnet]
    images = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in args.control_image]
    return {"size": size, "dtype": dtype_name(model.dtype), "control_images": images,
            "files": [checkpoint.fingerprint(path) for path in files if path]}
