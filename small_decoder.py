"""A small decoder: TAESD's network, distilled from a model's own decoder.

    python small_decoder.py                              the tiny model, minutes on a laptop
    python small_decoder.py --model sd14.safetensors --pairs runs/pairs
    python sample.py --model runs/instaflow.safetensors --decoder runs/small_decoder.safetensors

A one-step image at 512 px takes 0.803 TFLOP in the U-Net and 2.515 in the decoder. So distil the
decoder as the U-Net was distilled: one network's output is the other's target.

    min E |s(z) - d(z)| + LPIPS(s(z), d(z))    d the model's decoder, s the small one of 0.141 TFLOP

z are the latents X1 of existing pairs; no real image is needed. d has attention and group norms
over the whole latent, so its image of a crop is not the crop of its image. Therefore d decodes the
whole latent, and training crops z and d(z) at the same place: --crop 32 is 256 px.

L1 + LPIPS cannot invent detail: they prefer a compromise between several plausible details, so
faces and text stay soft. TAESD (github.com/madebyollin/taesd) trains against a discriminator to get
sharp detail. Its published taesd_decoder.safetensors works with --decoder and as --init too.

The last hundredth of the pairs is held out: OUT.state/metrics.jsonl has l1 and psnr (dB) against
the full decoder, OUT.state/samples/ images, full | small. Network: formats/small_decoder.py.
"""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
from command import (
    TINY_TEACHER, BadInput, DefaultByModel, Parser, add_machine_options, barrier,
    check_not_overwriting, dtype_name, first_line, is_out_of_memory, non_negative_int, note,
    pick_device, pick_dtype, positive, rank, read_our_json, resolve_defaults, run,
)
from editing import psnr
from evaluation.perceptual import NETS, perceptual_distance
from evaluation.plan import check_request
from evaluation.plots import plot_loss
from formats.images import enlarged, image_grid, save_image
from formats.small_decoder import SmallDecoder, SmallDecoderConfig, load_decoder, save_decoder
from pairs import PAIRS_PER_SHARD, Pairs, shard_is_complete, shuffled
from rectified_flow import Distance
from sample import run_seed
from training import (
    TrainingOptions, add_training_options, append_metrics, autocast_dtype, ema_copy, read_metrics,
    train, training_options,
)
from validation import on_device

FITS = 16  # samples at 512 px that 80 GB hold: an estimate
MEASURED, NUM_SHOWN, AT_ONCE = 64, 8, 8  # held-out latents, at most; AT_ONCE: in one pass


# --------------------------------------------------------------------------------------------------
# Data and loss: training.train calls loss(network, *batch(samples, share, generator))


def read_pairs(folder: str, model) -> Pairs:
    """The pairs in a folder. BadInput: none, incomplete, damaged, or other latents."""
    spec = read_our_json(Path(folder, "pairs.json"), {})
    if not spec:
        teacher = model.path if model.has_path else "ITS-TEACHER"
        raise BadInput(f"{folder}: holds no pairs; make them: python reflow.py --teacher {teacher} "
                       f"--pairs {folder}")
    count, shape = spec["count"], tuple(spec["latent_shape"])
    if shape[0] != model.unet.config.in_channels or count < 2:
        raise BadInput(f"{folder}: holds {count} latents of {shape[0]} channels; give two or more "
                       f"of {model.unet.config.in_channels}")
    for i, start in enumerate(range(0, count, PAIRS_PER_SHARD)):
        length = min(PAIRS_PER_SHARD, count - start)
        if not shard_is_complete(Path(folder), i, length, shape, repair=False):
            raise BadInput(f"{folder}: shard {i} is missing; let reflow.py finish these pairs")
    return Pairs(folder)


def batch(
    pairs: Pairs, count: int, crop: int, seed: int, samples: Tensor, share: slice, generator,
) -> tuple[Tensor, Tensor]:
    """Of the first `count` latents a batch (B, 4, h, w), and corners (row, column) for crops."""
    _, latents, _ = pairs[shuffled(samples[share], count, seed)]
    corners = [torch.randint(side - crop + 1, (len(samples),), generator=generator)[share]
               for side in latents.shape[2:]]
    return latents, torch.stack(corners, 1)


def loss(
    full: nn.Module, lpips: Distance, crop: int, network, latents: Tensor, corners: Tensor,
) -> tuple[Tensor, None]:
    """L1 + LPIPS of the small decoder's images (B,). crop: its side in latents; 0: no crop."""
    wanted = target(full, latents)
    if crop:
        scale = full.config.downsampling
        latents = cropped(latents, corners, crop)
        wanted = cropped(wanted, scale * corners, scale * crop)
    images = network(latents)
    return (images.float() - wanted).abs().flatten(1).mean(1) + lpips(images, wanted), None


@torch.no_grad()
def target(full: nn.Module, latents: Tensor) -> Tensor:
    """The full decoder's images of whole latents, clamped to [-1, 1] as when saved; fp32."""
    with torch.autocast(latents.device.type, enabled=False):
        return full.decode(latents).float().clamp(-1, 1)


def cropped(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, C, side, side)."""
    return torch.stack([image[:, y : y + side, x : x + side]
                        for image, (y, x) in zip(images, corners.tolist())])


@torch.no_grad()
def validate(
    ema: SmallDecoder, latents: Tensor, wanted: Tensor, options: TrainingOptions, folder: Path,
    step: int, loss,
) -> None:
    """Compare the averaged weights' images of whole latents with `wanted`, the full decoder's."""
    seen = any(row["step"] == step for row in read_metrics(folder, "psnr"))  # by a killed run
    if rank() == 0 and not seen:
        network = on_device(ema, latents.device)
        images = torch.cat([network.decode(part).float() for part in latents.split(AT_ONCE)])
        l1 = (images.clamp(-1, 1) - wanted).abs().mean().item()
        sides = torch.stack([wanted[:NUM_SHOWN], images[:NUM_SHOWN]], 1).flatten(0, 1)
        save_image(str(folder / "samples" / f"{step:07d}.png"), image_grid(enlarged(sides), 4),
                   {"columns": "full, small, full, small", "iterations": step})
        append_metrics(folder, {"step": step, "samples": step * options.batch_size, "l1": l1,
                                "psnr": psnr(images, wanted).mean().item()})
        plot_loss(folder)
    barrier()


# --------------------------------------------------------------------------------------------------
# The command


def arguments() -> argparse.Namespace:
    parser = Parser("Distill the decoder of a model into a small one.")
    add, either = parser.add_argument_group("small decoder").add_argument, DefaultByModel
    add("--model", default=TINY_TEACHER, help="whose decoder to distill: a file or a folder")
    add("--pairs", default="runs/pairs", help="folder of pairs by reflow.py, for their latents")
    add("--iterations", type=positive, default=either(50_000, 1_000), help="of --batch-size")
    add("--width", type=positive, help="channels; default: 64 for SD, 32 for the tiny model")
    add("--crop", type=non_negative_int, default=either(32, 0),
        help="side in latents of the squares to train on; 0: whole latents")
    add("--lpips-net", choices=NETS, default=either("vgg", "random"), help="the backbone of LPIPS")
    add_training_options(parser, "runs/small_decoder.safetensors", either(16, 64),
                         "random, or a small decoder's file")
    add_machine_options(parser, run_seed)
    # TAESD's learning rate. 2e-3: best PSNR of 3e-4, 2e-3, 4e-3 and 8e-3 (shapes, seed 0).
    parser.set_defaults(init="random", learning_rate=either(3e-4, 2e-3), teacher=None)
    return parser.parse_args()


def initial_decoder(args: argparse.Namespace, model) -> SmallDecoder:
    """The network that training starts from, in fp32: random weights, or those of --init."""
    if args.init != "random":
        small = load_decoder(args.init, model, torch.float32)
        if args.width not in (None, small.config.width):
            raise BadInput(f"--width {args.width}: --init has {small.config.width}; drop --width")
        return small
    width = args.width or (32 if model.is_tiny else 64)
    doublings = model.vae.config.downsampling.bit_length() - 1
    config = SmallDecoderConfig(model.family, model.unet.config.in_channels, width, doublings)
    torch.manual_seed(args.seed)
    return SmallDecoder(config).to(model.device)


def check_crop(args: argparse.Namespace, model, pairs: Pairs, lpips: Distance) -> None:
    """BadInput: larger than the latents, or so small that the pools of LPIPS leave nothing."""
    if args.crop > min(pairs.spec["latent_shape"][1:]):
        raise BadInput(f"--crop {args.crop}: larger than the latents; 0 takes them whole")
    side = args.crop * model.vae.config.downsampling
    try:
        lpips(*torch.zeros(2, 1, 3, side, side, device=model.device))
    except RuntimeError as problem:
        if is_out_of_memory(problem):
            raise
        raise BadInput(f"--crop {args.crop}: too small for --lpips-net {args.lpips_net} "
                       f"({first_line(problem)})") from None


def settings_for(args: argparse.Namespace, model, pairs: Pairs, small: SmallDecoder) -> dict:
    """What decides the result, beside the options; a note if the pairs are another model's."""
    model_hash = checkpoint.fingerprint(model.path)
    if pairs.spec["teacher_hash"] != model_hash:
        note(f"{args.pairs}: made by {pairs.spec['teacher']}, which must have the autoencoder of "
             f"{args.model}")
    init = args.init if args.init == "random" else checkpoint.fingerprint(args.init)
    return {"model": model_hash, "target": dtype_name(model.dtype), "pairs": pairs.spec,
            "init": init, "crop": args.crop, "net": args.lpips_net, "config": asdict(small.config)}


def main():
    args = arguments()
    device = pick_device(args.device)
    model = checkpoint.load(args.model, device, pick_dtype(args.dtype, device))
    resolve_defaults(args, model.is_tiny)
    pairs = read_pairs(args.pairs, model)
    lpips = perceptual_distance(args.lpips_net, device)
    if args.crop:
        check_crop(args, model, pairs, lpips)
    small, state = initial_decoder(args, model), Path(args.out + ".state")
    options = training_options(
        args, "small decoder", args.iterations, args.batch_size, args.learning_rate,
        args.accumulate, FITS, autocast_dtype(args.dtype, device, small))
    settings = settings_for(args, model, pairs, small)
    check_not_overwriting(args.out, {"--model": args.model})
    finished = check_request(args, pairs.spec, [(state, options, settings)])
    count = len(pairs) - max(1, len(pairs) // 100)  # to train on; the rest is held out
    print(f"plan: {count:,} latents of {args.pairs}, {options.iterations:,} iterations of "
          f"{options.batch_size}, {options.iterations * options.batch_size / count:.3g} epochs; "
          f"{sum(p.numel() for p in small.parameters()):,} parameters")
    if finished:
        print(f"{args.out}: finished already, {options.iterations:,} iterations")
        return

    full = model.vae
    del model
    ema = ema_copy(small, args.ema_device)
    small.decoder.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        small.decoder.compile()
        full.decoder.compile()
    held_out = pairs[torch.arange(count, len(pairs))[:MEASURED]][1].to(device)
    wanted = torch.cat([target(full, part) for part in held_out.split(AT_ONCE)])
    train(small, ema, partial(batch, pairs, count, args.crop, args.seed),
          partial(loss, full, lpips, args.crop), options, state, settings,
          partial(validate, ema, held_out, wanted, options, state))
    save_decoder(small, args.out)
    print(f"{args.out}: a small decoder for --decoder; its loss is in {state / 'loss.png'}")


if __name__ == "__main__":
    run(main)
