"""Images from images: the flags of sample.py that begin at an image, invert it, or interpolate.

    python sample.py --model sd14.safetensors --init-image dog.png --prompt "a fox" --strength 0.6
    python sample.py --model runs/2rf.safetensors --invert dog.png --prompt "a dog"
    python sample.py --invert dog.png --invert-model runs/2rf.safetensors --prompt "a dog"
    python sample.py --prompt "a dog" --prompt "a fox" --interpolate 8

All of them work on the path X_t = (1 - t) X0 + t X1 from noise to latents:

    --init-image     begins at X_t, X0 the seed's noise, X1 the image's latents, t = 1 - strength;
                     SDEdit, Meng et al. 2021 (2108.01073)
    --invert         follows the ODE backwards, from the latents at t = 1 to their noise at t = 0;
                     Liu et al. 2022 (2209.03003); for a diffusion, DDIM inversion (2010.02502)
    --interpolate    moves between two noises on a sphere, or between two contexts on a line

sample.py imports this file, so `edit` gets the noise and the sampler as arguments.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
from command import BadInput, Parser, at_least, check_not_overwriting, check_output, non_negative
from diffusion import as_flow
from formats.images import decode_finite, enlarged, read_image, save_gif
from rectified_flow import euler, interpolate, squared

STRENGTH = 0.6
FLAGS = ("init_image", "strength", "invert", "invert_model", "interpolate")


def add_editing_options(parser: Parser) -> None:
    group = parser.add_argument_group("images from images")
    mode, add = group.add_mutually_exclusive_group(), group.add_argument
    mode.add_argument("--init-image", metavar="IMAGE", help="begin between noise and this image")
    add("--strength", type=non_negative,
        help=f"of --init-image, from 0, the image, to 1, all noise; default: {STRENGTH}")
    mode.add_argument("--invert", metavar="IMAGE",
                      help="find the noise of this image and generate from it: image | "
                      "reconstruction; guidance is off by default, a diffusion uses ddim")
    add("--invert-model", metavar="MODEL",
        help="the diffusion or flow that finds the noise of --invert; default: --model")
    mode.add_argument("--interpolate", type=at_least(2), metavar="N",
                      help="N images between seeds SEED and SEED + 1, or between two prompts; also "
                      "as a GIF beside --out")


def resolve_editing(args, num_images: int):
    """args with what these flags imply. BadInput: flags that do not go together.

    num_images: the default of --num-images.
    """
    if args.strength is not None and not (args.init_image and args.strength <= 1):
        raise BadInput(f"--strength {args.strength:g}: is for --init-image, and from 0 to 1")
    if args.invert_model and not args.invert:
        raise BadInput("--invert-model: is for --invert")
    if args.init_image and args.strength is None:
        args.strength = STRENGTH
    if args.invert:
        args.solver, args.guidance = "ddim", 1.0 if args.guidance is None else args.guidance
    if args.invert or args.interpolate:
        if args.num_images != num_images:
            raise BadInput("--num-images: has no effect with --invert or --interpolate; drop it")
        args.num_images = 1
    if args.out.endswith("/") and editing_flags(args):
        raise BadInput(f"--out {args.out}: a folder; give one image file with these flags")
    if args.interpolate:
        gif = Path(args.out).with_suffix(".gif")
        check_output(gif)
        for image in args.control_image:
            check_not_overwriting(gif, {"--control-image": image})
    check_not_overwriting(args.out, {"--init-image": args.init_image, "--invert": args.invert})
    return args


def editing_flags(args) -> dict:
    """The editing flags that were given; {}: none."""
    return {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}


def starts_anywhere(model) -> bool:
    """Can sampling begin between noise and data? A one-step model knows t = 0 alone."""
    return model.few_step.sampler == "renoise" if model.few_step else model.kind != "one-step"


def limits(model) -> str:
    """What a few-step or one-step model is, for an error line."""
    few, one = "few-step model, trained for its own steps", "one-step model, trained at t = 0"
    return f"{model.path} is a {few if model.few_step else one} alone"


@torch.inference_mode()
def encode_image(model, images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] to latents (N, 4, h, w), fp32: the mean. BadInput: overflow"""
    latents = model.vae.encode_latents(images.to(model.device)).float()
    if not latents.isfinite().all():
        raise BadInput("the autoencoder overflows on this image; try --dtype fp32 or bf16")
    return latents


@torch.inference_mode()
def invert(
    model, latents: Tensor, prompts: list[str], steps: int, guidance: float = 1.0, negative="",
) -> Tensor:
    """The noises (N, 4, h, w) that a diffusion or flow sends to these latents: Euler from 1 to 0.

    Exact in one step where paths are straight. Else the error is of order 1 / steps: each step
    takes the velocity at its end nearer the data, and sampling takes that at the other end.
    """
    null_context, ones = model.encode_prompts([negative]), torch.ones_like(latents)
    flow, scale, times = as_flow(model.unet, model.kind, ones, steps, null_context, guidance)
    *_, x = euler(flow, latents, steps, model.encode_prompts(prompts), times.flip(0))
    return x / scale  # a diffusion starts at noise / 1.066


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation (N, ...) from noise a (...) to b, weights (N,) from 0 to 1.

        (sin((1-w) θ) a + sin(w θ) b) / sin θ        θ: the angle between a and b, not 0

    Noise of d numbers lies near the sphere of radius √d, and models are trained on nothing else.
    Two noises are nearly orthogonal, so their mean has norm √(d/2): too little noise, hence blur.
    """
    angle = (torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())).clamp(-1, 1).acos()
    near, far = (w.view(-1, *[1] * a.ndim) for w in (1 - weights, weights))
    return ((near * angle).sin() * a + (far * angle).sin() * b) / angle.sin()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (N, 3, H, W), clamped to [-1, 1]: (N,)."""
    return 10 * torch.log10(4 / squared(a.clamp(-1, 1), b.clamp(-1, 1)))


@torch.inference_mode()
def edit(
    args, model, prompts: list[str], seeds: list[int], noise: Tensor, generate: Callable,
) -> tuple[Tensor, int]:
    """The images (N, 3, H, W) that an editing flag asks for, and how many stand in a row.

    noise: of seeds SEED and SEED + 1, (2, K, 4, h, w), K > 1 for a model that adds noise again.
    generate: sample_latents(model, prompts, seeds, start=None) with the other arguments set.
    BadInput: a model or an image that cannot be used.
    """
    if args.interpolate:
        return interpolated(args, model, prompts, seeds, noise, generate)
    height, width = (side * model.vae.config.downsampling for side in noise.shape[-2:])
    path = args.invert if args.init_image is None else args.init_image
    image = read_image(path, height, width)[None] / 127.5 - 1
    if args.invert:
        return inverted(args, model, prompts, image, noise, generate)
    if not starts_anywhere(model):
        raise BadInput(f"--init-image: {limits(model)}; it needs the noise of the image, by "
                       "--invert IMAGE --invert-model FLOW")
    latents = encode_image(model, image).expand(len(prompts), -1, -1, -1)
    latents = generate(prompts, seeds, start=(latents, 1 - args.strength))
    return decode(args, model, latents, prompts), args.num_images


def inverted(args, model, prompts, image, noise, generate) -> tuple[Tensor, int]:
    """--invert: the image (1, 3, H, W) and its reconstruction; prints the round-trip error."""
    if len(prompts) > 1:
        raise BadInput(f"--invert: {len(prompts)} prompts given; give the image's own")
    source, steps = model, args.steps or model.steps
    if args.invert_model:
        source = checkpoint.load(args.invert_model, model.device, model.dtype, None, args.tokenizer)
        if not model.has_path:  # --steps are the other model's
            steps = source.steps
    if not source.has_path:
        raise BadInput(f"--invert: {limits(source)}, so it has no ODE that runs backwards; give a "
                       "diffusion or a flow as --invert-model")
    if (source.family, source.latent_shape()) != (model.family, model.latent_shape()):
        raise BadInput(f"--invert-model: {source.path} has other latents than {args.model}")
    latents = encode_image(model, image)
    guidance = model.guidance_for(args.guidance)
    x0 = invert(source, latents, prompts, steps, guidance, args.negative_prompt)
    again = generate(prompts, torch.cat([x0.cpu()[:, None], noise[:1, 1:]], 1))
    images = decode(args, model, torch.cat([again, latents]), prompts)
    now, best = psnr(images, image.expand_as(images)).tolist()
    print(f"round trip: RMS {squared(again, latents).sqrt().item():.3f} of latents, PSNR "
          f"{now:.1f} dB of images, {best:.1f} dB by the autoencoder alone")
    return torch.cat([image, images[:1]]), 2


def interpolated(args, model, prompts, seeds, noise, generate) -> tuple[Tensor, int]:
    """--interpolate: N images in a row, and the same as a GIF."""
    if len(prompts) > 2:
        raise BadInput(f"--interpolate: {len(prompts)} prompts given; give one or two")
    count, weights = args.interpolate, torch.linspace(0, 1, args.interpolate)
    if len(prompts) == 2:
        a, b = model.encode_prompts(prompts).expand(count, -1, -1, -1).unbind(1)
        latents = generate(interpolate(a, b, weights), seeds[:1] * count)
    else:
        noises = [slerp(a, b, weights) for a, b in zip(*noise)]  # K of (N, 4, h, w)
        latents = generate(prompts * count, torch.stack(noises, 1))
    images = decode(args, model, latents, prompts)
    save_gif(Path(args.out).with_suffix(".gif"), enlarged(images))
    return images, count


def decode(args, model, latents: Tensor, prompts: list[str]) -> Tensor:
    return torch.cat([decode_finite(model, x, prompts) for x in latents.split(args.batch_size)])
