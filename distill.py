"""Distillation: one Euler step from the noise must land where the teacher lands.

    python distill.py                                   the tiny model, minutes on a laptop
    python distill.py --teacher runs/2rf.safetensors --lpips-net vgg

    min E D(X0 + v(X0, 0 | T), X1)     (X0, X1, T) pairs of the teacher, guidance 1.5

t stays at 0 and the student makes a single conditional pass, so that guidance is learned into it. D
is the squared L2 distance of latents first, then a perceptual distance (LPIPS) of the decoded
pictures: L2 gets the student close, but where it is unsure L2 is content with a blur, and LPIPS is
not. After L2 the model is written too, as OUT with -l2 before its suffix. Each stage has its own
batch, parts of a batch and learning rate. InstaFlow (arXiv 2309.06380).

A diffusion as --teacher is distilled directly; the paper reports that this fails and that reflow
first helps. --student stacked puts two U-Nets in series, both started from the teacher's weights:
InstaFlow-1.7B.

The perceptual distance is that of the lpips package (Zhang et al. 2018, 1801.03924) with a trained
backbone, which it downloads when first used. "random" needs no download: the same distance on a
SqueezeNet with random weights, of which Zhang et al. show that it already orders distortions better
than L2. It is what the tiny model uses. "efficientnet" is the same distance, not calibrated either,
on an EfficientNet that pip brings with its training (evaluation/efficientnet.py).
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
from command import (
    BadInput, ByModel, Parser, add_machine_options, not_below_zero, not_negative, pick_device,
    positive, run, settle, share, solver_steps,
)
from evaluation.efficientnet import load_efficientnet
from pairs import Pairs, pairs_asked
from rectified_flow import Distance, distill_loss, flow_velocity, squared
from sample import run_seed
from stable_diffusion import KINDS, StableDiffusion
from training import TrainingOptions, autocast_dtype, options_from, train
from unet import stack, started_from
from watch import Stage, add_watch_options, plain_batches, train_in_stages

RANDOM_NET_SEED = 1


def distill(
    model, pairs: Pairs, distance: Distance, options: TrainingOptions, folder: Path, settings: dict,
    name: str, dtype: torch.dtype = torch.float32, seen: int = 0, watch: Callable | None = None,
    train: Callable = train,
) -> None:
    """Train model.unet, in place, until one step lands near X1; model becomes one-step.

    distance(landing, X1) of latents. seen: samples of an earlier stage, behind which the order of
    the pairs goes on. watch: as for `train`; train: another one to measure with.
    """

    def draw(samples: Tensor, share: slice, generator: torch.Generator) -> tuple:
        return pairs.batch(samples[share] + seen, options.seed)

    def loss(unet, x0: Tensor, x1: Tensor, prompts: list[str]) -> tuple[Tensor, None]:
        context = model.encode_prompts(prompts)
        return distill_loss(flow_velocity(unet), x0, x1, context, distance), None

    train(model.unet, draw, loss, options, folder, settings, f"distill, {name}", dtype, watch)
    model.kind = "one-step"


def perceptual(vae, lpips: Distance) -> Distance:
    """The distance of latents whose pictures look alike; the decoder is frozen and runs in fp32."""
    vae.requires_grad_(False)

    def distance(latents: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            with torch.no_grad():
                wanted = vae.decode(targets)
            return lpips(vae.decode(latents.float()), wanted)

    return distance


def perceptual_distance(net: str, device: torch.device, trained: bool = True) -> Distance:
    """LPIPS of images (B, 3, H, W) in [-1, 1]: (B,); always in fp32, frozen.

    net: "vgg", "alex" or "squeeze" for lpips with its trained backbone, "random" or "efficientnet".
    trained False: random weights in place of the backbone's, to measure time with. BadInput where
    those are neither cached nor to be had.
    """
    if net == "efficientnet":
        return efficientnet_distance(device)
    import lpips  # here, since it takes seconds and most commands do without

    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")  # torchvision renamed an argument that lpips still uses
            torch.manual_seed(RANDOM_NET_SEED)
            if net == "random":
                # Without the trained weights that calibrate the layers, they count alike.
                network = lpips.LPIPS(net="squeeze", pnet_rand=True, lpips=False, verbose=False)
            else:
                network = lpips.LPIPS(net=net, pnet_rand=not trained, verbose=False)
    except OSError as problem:
        raise BadInput(f"--lpips-net {net}: its backbone could not be downloaded ({problem}); put "
                       "the file into torch's hub cache, or take --lpips-net random") from None
    network.requires_grad_(False).eval().to(device)

    def distance(images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):  # lpips is not a number in half precision
            return network(images.float(), targets.float()).flatten()

    return distance


def efficientnet_distance(device: torch.device) -> Distance:
    """The distance of Zhang et al. on EfficientNet's stages, all counted alike."""
    network = load_efficientnet("--lpips-net efficientnet").to(device)

    def distance(images: Tensor, targets: Tensor) -> Tensor:
        total = 0
        with torch.autocast(device.type, enabled=False):
            maps = zip(network.maps(images.float()), network.maps(targets.float()))
            for found, wanted in maps:  # (B, C, h, w)
                apart = F.normalize(found, dim=1, eps=1e-6) - F.normalize(wanted, dim=1, eps=1e-6)
                total = total + apart.square().sum(1).mean((1, 2))
        return total

    return distance


# --------------------------------------------------------------------------------------------------
# The command

TINY_PAIRS = 10_000
# Samples at 512 px that 80 GB hold, by benchmarks/README.md: 40 and 51 GB, stacked 59 and 68.
FITS, FITS_LPIPS = 64, 8
# Times slower: at L2's rate the LPIPS of the tiny model's training pairs rose from the first on.
LPIPS_SLOWER = 5


def arguments() -> argparse.Namespace:
    parser = Parser("Distill a flow (or a diffusion) into a one-step model.")
    add = parser.add_argument_group("pairs").add_argument
    add("--teacher", default="runs/2rf.safetensors",
        help="a flow or a diffusion: .safetensors or folder")
    add("--kind", choices=KINDS, help="what its U-Net predicts; default: as the file says")
    add("--tokenizer", help="folder with vocab.json and merges.txt, for a teacher without its own")
    add("--prompts",
        help="text file with a prompt a line, or .tsv/.csv; default: the tiny model's captions, "
             "for SD a built-in grammar")
    add("--prompt-column", default="Prompt", help="column of a .tsv or .csv that holds the prompts")
    add("--pairs", default="runs/pairs-2rf",
        help="folder of the pairs; whole shards in it are kept")
    add("--num-pairs", type=positive,
        help="default: 1,600,000 with --prompts (the paper's), 50,000 of the built-in grammar, "
             f"tiny model {TINY_PAIRS:,}")
    add("--teacher-steps", type=solver_steps,
        help="default: 25 for SD, 8 for its tiny model, 4 for the tiny flow, as good as 25")
    add("--teacher-guidance", type=not_below_zero,
        help="1 is off; default: 1.5 for a flow (the paper's), 6 for SD itself, 2.5 for its tiny "
             "model")
    add("--solver", choices=["dpm", "ddim"], default="dpm", help="for a diffusion; flows use Euler")
    add("--teacher-batch-size", type=positive, help="pairs drawn at once; default: 16 at 512 px")
    add("--repair", action="store_true", help="make damaged shards again")

    add = parser.add_argument_group("training").add_argument
    # InstaFlow-0.9B: 21,500 updates of 1024 in L2, then 18,000 in LPIPS. Its learning rate is
    # published nowhere that we could read; that of its reflow stands in.
    add("--student", choices=["unet", "stacked"], default="unet",
        help="stacked: two in series, InstaFlow-1.7B")
    add("--l2-iterations", type=not_negative, default=ByModel(21_500, 500),
        help="updates of the first stage")
    add("--lpips-iterations", type=not_negative, default=ByModel(18_000, 150), help="of the second")
    add("--lpips-net", choices=["vgg", "alex", "squeeze", "random", "efficientnet"],
        default=ByModel("vgg", "random"))
    add("--batch-size", type=positive, default=ByModel(1024, 64), help="samples of one update")
    add("--lpips-batch-size", type=positive, help="of the second stage; default: --batch-size")
    add("--init", type=checkpoint.initial_weights, default=ByModel("teacher", "negated"),
        metavar="{teacher,negated,random,CHECKPOINT}",
        help="weights to start from; negated: a diffusion's with the sign of its output changed")
    add("--learning-rate", type=not_below_zero, default=ByModel(1e-6, 5e-4),
        help="the paper does not say its own")
    add("--lpips-learning-rate", type=not_below_zero,
        help=f"default: --learning-rate / {LPIPS_SLOWER}")
    add("--cooldown", type=share, default=ByModel(0.0, 0.6),
        help="share of each stage, at its end, over which the rate falls to 0")
    add("--warmup-samples", type=not_negative, default=ByModel(None, 6_400),
        help="samples until the full learning rate; for SD 1,000 times the batch")
    add("--ema-half-life", type=positive, default=ByModel(None, 10_000),
        help="samples until a weight counts half; for SD 6,931 times the batch")
    add("--ema-ramp", type=share, default=ByModel(0.0, 0.05),
        help="the half-life is at most this share of the samples seen; 0: no limit, as in the "
             "paper")
    add("--accumulate", type=positive,
        help="parts that a batch passes in, over all processes; more need less memory and change "
             "rounding alone; default: as a GPU of 80 GB needs them for SD")
    add("--lpips-accumulate", type=positive, help="the same of the second stage")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
        default=ByModel(True, False),
        help="recompute activations in the backward pass: less memory, a third more time")
    add("--ema-device", choices=["cpu"], help="keep the averaged weights in main memory")
    add("--compile", action="store_true", help="torch.compile: minutes at first, faster after them")
    add("--save-every", type=positive, default=500,
        help="updates between saved states; 15 minutes at most")
    add("--out", type=checkpoint.model_file, default="runs/instaflow.safetensors",
        help="the one-step model, as it is at the last save; its state lies in OUT.state")
    add_watch_options(parser)
    add_machine_options(parser, run_seed)
    return parser.parse_args()


def main():
    args = arguments()
    device = pick_device(args.device)
    teacher = checkpoint.load(args.teacher, device, torch.float32, args.kind, args.tokenizer)
    settle(args, teacher.is_tiny)
    if args.teacher_steps is None:
        tiny_steps = 4 if teacher.kind == "flow" else 8
        args.teacher_steps = tiny_steps if teacher.is_tiny else 25
    if teacher.kind == "one-step":
        raise BadInput(f"{args.teacher}: a one-step model is distilled already; give a flow or a "
                       "diffusion as --teacher")
    if args.student == "stacked" and teacher.unet.config.stacked:
        raise BadInput(f"{args.teacher}: its U-Net is a stacked one already; take --student unet")
    if not args.l2_iterations + args.lpips_iterations:
        raise BadInput("--l2-iterations and --lpips-iterations are both 0: nothing to do")
    init, init_name = checkpoint.load_start(args.init, teacher)
    lpips = None
    if args.lpips_iterations:
        lpips = perceptual_distance(args.lpips_net, device, trained=not args.dry_run)
    asked = pairs_asked(teacher, args, "distillation", TINY_PAIRS)

    rate, slower = args.learning_rate, args.lpips_learning_rate
    slower = rate / LPIPS_SLOWER if slower is None else slower
    batch, lpips_batch = args.batch_size, args.lpips_batch_size or args.batch_size
    fits, lpips_fits = (batch, lpips_batch) if teacher.is_tiny else (FITS, FITS_LPIPS)
    first = options_from(args, args.l2_iterations, batch, rate, args.accumulate, fits)
    second = options_from(
        args, args.lpips_iterations, lpips_batch, slower, args.lpips_accumulate, lpips_fits
    )
    dtype = autocast_dtype(args.dtype, device, teacher.unet)
    seen, state = first.iterations * first.batch_size, Path(args.out + ".state")
    settings = {"pairs": asked[-1], "init": init_name, "student": args.student}
    lpips_settings = settings | {"seen": seen, "net": args.lpips_net}
    student = replace(teacher, kind="one-step")

    def start(drawer: StableDiffusion) -> torch.nn.Module:
        unet = started_from(teacher.unet, init, teacher.kind, args.seed)
        return stack(unet) if args.student == "stacked" else unet

    def l2(pairs: Pairs, train: Callable = train, watch: Callable | None = None) -> None:
        distill(student, pairs, squared, first, state / "l2", settings, "L2", dtype, watch=watch,
                train=train)

    def by_eye(pairs: Pairs, train: Callable = train, watch: Callable | None = None) -> None:
        distill(student, pairs, perceptual(student.vae, lpips), second, state / "lpips",
                lpips_settings, "LPIPS", dtype, seen, watch, train)

    l2_out = args.out
    if second.iterations:
        l2_out = args.out.removesuffix(".safetensors") + "-l2.safetensors"
    stages = [Stage("L2", first, l2, state / "l2", settings, l2_out),
              Stage("LPIPS", second, by_eye, state / "lpips", lpips_settings, args.out)]
    if train_in_stages(args, stages, teacher, student, start, asked, plain_batches, dtype,
                       args.student):
        print(f"{args.out}: a one-step model; its losses are in {state}")


if __name__ == "__main__":
    run(main)
