"""Distillation: one Euler step from the noise must land where the teacher lands.

    python distill.py                                   the tiny model, minutes on a laptop
    python distill.py --teacher runs/2rf.safetensors --lpips-net vgg

    min E D(X1, X0 + v(X0, 0 | T))     (X0, X1, T) pairs of the teacher, guidance 1.5

After L2 the model is written too, as OUT with -l2 before its suffix. Each stage has its own batch, parts of a batch and
learning rate. The paper's batch is 1024 in both; the parts are what one GPU of 80 GB holds.

t stays at 0 and the student makes a single conditional pass, so that guidance is learned into it. D is the squared
L2 distance of latents first, then a perceptual distance (LPIPS) of the decoded pictures: L2 gets the student close,
but where it is unsure L2 is content with a blur, and LPIPS is not. InstaFlow (arXiv 2309.06380).

A diffusion model as --teacher is distilled directly; the paper reports that this fails and that reflow first helps.
--student stacked puts two U-Nets in series, both started from the teacher's weights: InstaFlow-1.7B.

The perceptual distance is that of the lpips package (Zhang et al. 2018, 1801.03924) with a trained backbone, which
it downloads when first used. "random" needs no download: the same distance on a SqueezeNet with random weights, of
which Zhang et al. show that it already orders distortions better than L2. It is what the tiny model uses.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
from command import (
    BadInput,
    ByModel,
    Parser,
    add_machine_options,
    add_model_options,
    check_output,
    keep_others_out,
    not_below_zero,
    not_negative,
    pick_device,
    positive,
    run,
    settle,
)  # fmt: skip
from pairs import Pairs, add_pairs_options, make_pairs, pairs_asked
from rectified_flow import distill_loss, flow_velocity, one_step
from training import (
    TrainingOptions,
    add_training_options,
    autocast_dtype,
    check_stage,
    options_from,
    plot_loss,
    shuffled,
    train,
)
from unet import stack

RANDOM_NET_SEED = 1


def perceptual_distance(net: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """distance(images, images) -> (B,), for images (B, 3, H, W) in [-1, 1]; always computed in fp32, frozen.

    net: "vgg", "alex" or "squeeze" for lpips with its trained backbone, or "random".
    BadInput where the backbone's weights are neither cached nor to be had.
    """
    import lpips

    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")  # torchvision renamed an argument that lpips still uses
            torch.manual_seed(RANDOM_NET_SEED)
            if net == "random":
                # Without the trained weights that calibrate the layers, they count alike.
                network = lpips.LPIPS(net="squeeze", pnet_rand=True, lpips=False, verbose=False)
            else:
                network = lpips.LPIPS(net=net, verbose=False)
    except OSError as problem:
        raise BadInput(
            f"--lpips-net {net}: its backbone could not be downloaded ({problem}); put the file into torch's hub cache, "
            "or take --lpips-net random"
        ) from None
    network.requires_grad_(False).eval().to(device)

    def distance(images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):  # lpips is not a number in half precision
            return network(images.float(), targets.float()).flatten()

    return distance


def distill_l2(model, pairs: Pairs, options: TrainingOptions, folder: Path, settings: dict, dtype: torch.dtype) -> None:
    """Stage 1, in place: latents close in L2."""
    velocity = flow_velocity(model.unet)

    def loss(x0, x1, prompts):
        return distill_loss(velocity, x0.to(model.device), x1.to(model.device), model.encode_prompts(prompts)), None

    train(model.unet, draw_from(pairs, options.seed), loss, options, folder, settings, "distill, L2", dtype)
    model.kind = "one-step"


def distill_perceptual(
    model, pairs: Pairs, distance: Callable, options: TrainingOptions, folder: Path, settings: dict, dtype: torch.dtype,
    seen: int = 0,
) -> None:  # fmt: skip
    """Stage 2, in place: decoded pictures close to the eye. The decoder is frozen and runs in fp32.

    seen: samples of stage 1; the order of the pairs goes on behind them, and does not begin anew.
    """
    velocity, decode = flow_velocity(model.unet), model.vae.requires_grad_(False).decode

    def loss(x0, x1, prompts):
        latents = one_step(velocity, x0.to(model.device), model.encode_prompts(prompts))
        with torch.autocast(model.device.type, enabled=False):
            with torch.no_grad():
                target = decode(x1.to(model.device))
            return distance(decode(latents.float()), target), None

    train(model.unet, draw_from(pairs, options.seed, seen), loss, options, folder, settings, "distill, LPIPS", dtype)
    model.kind = "one-step"


def draw_from(pairs: Pairs, seed: int, seen: int = 0) -> Callable:
    return lambda samples, generator: pairs.batch(shuffled(samples + seen, len(pairs), seed))


TINY_PAIRS = 10_000
# Samples at 512 px that a GPU of 80 GB holds, by the table of benchmarks/README.md: 40 and 51 GB, stacked 59 and 68 GB.
FITS, FITS_LPIPS = 64, 8
LPIPS_SLOWER = 5  # times: at L2's rate the LPIPS of the tiny model's training pairs rose from the first updates on


def main():
    parser = Parser("Distill a flow (or a diffusion) into a one-step model.")
    add_pairs_options(parser, teacher="runs/2rf.safetensors", folder="runs/pairs-2rf", tiny_count=TINY_PAIRS)
    # InstaFlow-0.9B: 21,500 updates of 1024 in L2, then 18,000 in LPIPS. Its learning rate is published nowhere that we
    # could read; that of its reflow stands in.
    group = add_training_options(parser, ByModel(1024, 64), "1e-06 (the paper does not say), tiny model 0.0005")
    group.add_argument("--student", choices=["unet", "stacked"], default="unet", help="stacked: two in series, InstaFlow-1.7B")
    group.add_argument("--l2-iterations", type=not_negative, default=ByModel(21_500, 700))
    group.add_argument("--lpips-iterations", type=not_negative, default=ByModel(18_000, 150))
    group.add_argument("--lpips-batch-size", type=positive, help="of the second stage; default: --batch-size")
    group.add_argument("--lpips-accumulate", type=positive, help="as --accumulate, of the second stage")
    group.add_argument("--lpips-learning-rate", type=not_below_zero, help=f"default: --learning-rate / {LPIPS_SLOWER}")
    group.add_argument("--lpips-net", choices=["vgg", "alex", "squeeze", "random"], default=ByModel("vgg", "random"))
    group.add_argument("--out", default="runs/instaflow.safetensors", help="the one-step model; its state lies in OUT.state")
    add_model_options(parser)
    add_machine_options(parser)
    args = parser.parse_args()

    device = pick_device(args.device)
    teacher = checkpoint.load_as_asked(args.teacher, args, device, args.kind)
    tiny = teacher.captions is not None
    settle(args, tiny)
    if args.learning_rate is None:
        args.learning_rate = 5e-4 if tiny else 1e-6
    if args.lpips_learning_rate is None:
        args.lpips_learning_rate = args.learning_rate / LPIPS_SLOWER
    args.lpips_batch_size = args.lpips_batch_size or args.batch_size
    if teacher.kind == "one-step":
        raise BadInput(f"{args.teacher}: a one-step model is distilled already; give a flow or a diffusion as --teacher")
    if not args.l2_iterations + args.lpips_iterations:
        raise BadInput("--l2-iterations and --lpips-iterations are both 0: nothing to do")
    check_output(args.out)
    state = Path(args.out + ".state")
    keep_others_out(state)
    distance = perceptual_distance(args.lpips_net, device) if args.lpips_iterations else None  # before hours of work

    prompts, description = pairs_asked(teacher, args, "distillation", TINY_PAIRS)
    dtype = autocast_dtype(args.dtype, device, teacher.unet)
    fits, lpips_fits = (None, None) if tiny else (FITS, FITS_LPIPS)
    l2 = options_from(args, args.l2_iterations, args.batch_size, args.accumulate, fits, args.learning_rate)
    lpips = options_from(
        args, args.lpips_iterations, args.lpips_batch_size, args.lpips_accumulate, lpips_fits, args.lpips_learning_rate
    )
    seen = l2.iterations * l2.batch_size
    l2_settings = {"pairs": description, "init": checkpoint.start_of(args), "student": args.student}
    lpips_settings = l2_settings | {"seen": seen, "net": args.lpips_net}
    stages = [(state / "l2", l2, l2_settings, dtype), (state / "lpips", lpips, lpips_settings, dtype)]
    stages = [stage for stage in stages if stage[1].iterations]
    finished = [check_stage(*stage) for stage in stages]
    if Path(args.out).exists() and all(finished):
        print(f"{args.out}: finished already, {args.l2_iterations} + {args.lpips_iterations} iterations")
        return
    checkpoint.check_start(args, teacher)
    pairs = make_pairs(teacher, prompts, description, args.pairs, args.teacher_batch_size, args.repair)
    print(f"distill: {len(pairs)} pairs, {args.l2_iterations} L2 iterations of {args.batch_size}, "
          f"{args.lpips_iterations} LPIPS ({args.lpips_net}) of {args.lpips_batch_size}")  # fmt: skip

    del teacher
    model = checkpoint.load_student(args, device)
    if args.student == "stacked":
        model.unet = stack(model.unet)
    model.unet.gradient_checkpointing = model.vae.decoder.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        model.compile()
    if args.l2_iterations:
        distill_l2(model, pairs, l2, state / "l2", l2_settings, dtype)
        plot_loss(state / "l2")
    if args.l2_iterations and args.lpips_iterations:
        checkpoint.save(model, args.out.removesuffix(".safetensors") + "-l2.safetensors")
    if args.lpips_iterations:
        distill_perceptual(model, pairs, distance, lpips, state / "lpips", lpips_settings, dtype, seen)
        plot_loss(state / "lpips")
    checkpoint.save(model, args.out)
    print(f"{args.out}: a one-step model; its losses are in {state}")


if __name__ == "__main__":
    run(main)
