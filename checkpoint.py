"""Checkpoints: a Stable Diffusion 1.x file or folder in, our model out, and back.

    model = checkpoint.load("sd14.safetensors", "cuda", torch.bfloat16)      a StableDiffusion
    checkpoint.save(model, "2rf.safetensors")                                one file
    python checkpoint.py sd14.safetensors sd14/                              to a folder, or back

This file picks the format; formats/ reads and writes it.
"""

import argparse
from pathlib import Path

import torch

from command import BadInput, Parser, check_not_overwriting, run
from formats.diffusers_folder import export, fingerprint, load_folder
from formats.hub import local_path
from formats.lora import add_lora_options, apply_lora_options, lora_inputs
from formats.single_file import PICKLES, load_single_file, save, unread
from formats.small_decoder import load_decoder
from formats.tokenizers import tokenizer_in
from stable_diffusion import INITS, KINDS, StableDiffusion, initial_student
from stacked_unet import stack


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
    kind: str | None = None, tokenizer: str | Path | None = None,
    decoder: str | Path | None = None, use_ema: bool = False,
) -> StableDiffusion:
    """Load a single file, a diffusers folder or a hub model (org/name), in evaluation mode.

    kind overrides the file's own; tokenizer: a folder with vocab.json and merges.txt; decoder: a
    small decoder; use_ema: a training checkpoint's averaged U-Net. BadInput, one line, if wrong.
    """
    path = local_path(path)
    if path.is_dir():
        if use_ema:
            raise BadInput(f"{path}: a diffusers folder holds one U-Net; leave out --use-ema")
        model = load_folder(path, device, dtype, kind, tokenizer is None)
    elif not path.is_file():
        raise BadInput(f"{path}: no such file or folder; `make demo`, or reflow.py and distill.py, "
                       "make those in runs/; else give an SD 1.x .safetensors or diffusers folder")
    elif path.suffix.lower() != ".safetensors":
        raise BadInput(f"{path}: {unread(path)}")
    else:
        model = load_single_file(path, device, dtype, kind, use_ema)
    model.path = str(path)
    if tokenizer is not None:
        model.tokenizer = tokenizer_in(tokenizer)
    expected = model.text_encoder.config.vocab_size
    found = expected if model.tokenizer is None else len(model.tokenizer.get_vocab())
    if found != expected:
        raise BadInput(f"{tokenizer or path}: the tokenizer has {found} tokens and the text "
                       f"encoder {expected}; give the text encoder's own")
    if decoder is not None:
        model.vae = load_decoder(decoder, model)
    for network in (model.unet, model.vae, model.text_encoder):
        network.eval()
    return model


def load_student(
    args: argparse.Namespace, device: torch.device, teacher_hash: str, init: str,
) -> StableDiffusion:
    """What training starts from, in fp32: --teacher, with the U-Net that --init names.

    teacher_hash, init: as the run's settings have them. BadInput: a file has changed meanwhile.
    """
    for path, known in ((args.teacher, teacher_hash), (args.init, init)):
        if path not in INITS and fingerprint(local_path(path)) != known:
            raise BadInput(f"{path}: has changed since this command started; run it again")
    student = load(args.teacher, device, torch.float32, args.kind, args.tokenizer)
    student.get_tokenizer()  # to be saved with the model
    init = args.init if args.init in INITS else load(args.init, device).unet
    student.unet = initial_student(student.unet, init, student.kind, args.seed)
    if getattr(args, "student", None) == "stacked":  # of distill.py
        student.unet = stack(student.unet)
    for module in (*student.unet.modules(), student.vae.decoder):  # of others it changes nothing
        module.gradient_checkpointing = args.gradient_checkpointing
    return student


def check_init(init: str, teacher: StableDiffusion) -> str:
    """--init in a run's settings. BadInput: a checkpoint with another U-Net than the teacher's."""
    if init in INITS:
        return init
    path = local_path(init)
    if not path.exists():
        raise BadInput(f"--init: must be {', '.join(INITS)} or a checkpoint that exists, got "
                       f"{init!r}")
    if load(path, "meta").unet.config != teacher.unet.config:
        raise BadInput(f"--init {init}: its U-Net is not built like the teacher's; give one that "
                       "was made from that teacher")
    return fingerprint(path)


def main():
    parser = Parser("Convert a checkpoint between the single-file layout and a diffusers folder.")
    parser.add_argument("source", help="an SD 1.x .safetensors, a diffusers folder, or org/name "
                                       "on the hub")
    parser.add_argument("target", help="ending in .safetensors for a single file, else a folder")
    parser.add_argument("--kind", choices=KINDS, help="override what the U-Net predicts")
    parser.add_argument("--tokenizer", help="folder with vocab.json and merges.txt, to store too")
    parser.add_argument("--use-ema", action="store_true", help="of a full training checkpoint")
    add_lora_options(parser)
    args = parser.parse_args()
    if Path(args.target).suffix.lower() in PICKLES:
        raise BadInput(f"{args.target}: pickles are not written; name a .safetensors or a folder")
    inside = Path(args.source).resolve() in Path(args.target).resolve().parents
    check_not_overwriting(args.source if inside else args.target,
                          {"the source": args.source} | lora_inputs(args))
    model = load(args.source, kind=args.kind, tokenizer=args.tokenizer, use_ema=args.use_ema)
    apply_lora_options(model, args, *map(load, args.add_difference or ()))
    dtype = None if args.use_ema else torch.float16  # averages are not rounded
    write = save if args.target.lower().endswith(".safetensors") else export
    write(model, args.target, dtype)
    print(f"{args.target}: a {model.kind} model")


if __name__ == "__main__":
    run(main)
