"""Distillation: one Euler step from the noise must land where the teacher lands.

    python distill.py                                   the tiny model, minutes on a laptop
    python distill.py --teacher runs/2rf.safetensors --lpips-net vgg

    min E D(X0 + v(X0, 0 | T), X1)     (X0, X1, T) pairs of the teacher at guidance scale 1.5

t stays at 0, and the student makes one conditional forward pass: guidance is distilled into it.
D is squared L2 of latents first, then LPIPS of decoded images. Between two plausible images, L2 is
minimised by their average, a blur, which LPIPS penalises. The model after L2 is saved too, as OUT
with -l2 before its suffix. Each stage has its own batch size, micro-batches and learning rate.

A diffusion as --teacher is distilled directly; the paper reports that this fails and that reflow
first helps. --student stacked puts two U-Nets in series, each with the teacher's weights:
InstaFlow-1.7B (stacked_unet.py). --lpips-net is a backbone of evaluation/perceptual.py.
Source: Liu et al. 2023 (InstaFlow, arXiv 2309.06380).
"""

import argparse
import filecmp
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
from command import (
    BadInput, DefaultByModel, Parser, add_machine_options, all_gather, check_not_overwriting,
    non_negative, non_negative_int, pick_device, pick_dtype, positive, resolve_defaults, run,
)
from evaluation.perceptual import NETS, perceptual_distance
from evaluation.plan import check_request, print_plan
from evaluation.plots import plot_loss
from pairs import Pairs, add_pair_options, make_pairs, requested_pairs
from rectified_flow import Distance, distill_loss, flow_velocity, squared
from sample import run_seed
from training import (
    add_training_options, autocast_dtype, ema_copy, saved_step, train, training_options,
)
from validation import (
    add_validation_options, held_out_batches, validate, validation_data, validation_prompts,
)

# Samples at 512 px that 80 GB hold: 40 and 51 GB, stacked 59 and 68 (benchmarks/README.md).
FITS, FITS_LPIPS = 64, 8
LPIPS_SLOWER = 5  # at L2's learning rate, the tiny model's LPIPS rises from the first iterations


def batch(
    pairs: Pairs, seed: int, seen: int, samples: Tensor, share: slice, generator: torch.Generator,
) -> tuple[Tensor, Tensor, list[str]]:
    """X0, X1 and T: shuffled pairs, after the `seen` samples of an earlier stage."""
    return pairs.batch(samples[share] + seen, seed)


def loss(
    encode_prompts, distance: Distance, unet, x0: Tensor, x1: Tensor, prompts: list[str],
) -> tuple[Tensor, None]:
    """D(X0 + v(X0, 0 | T), X1) for each sample; t is always 0."""
    return distill_loss(flow_velocity(unet), x0, x1, encode_prompts(prompts), distance), None


def perceptual(vae, lpips: Distance) -> Distance:
    """LPIPS of latents once decoded; the decoder is frozen and runs in fp32."""
    vae.requires_grad_(False)

    def distance(latents: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            with torch.no_grad():
                wanted = vae.decode(targets)
            return lpips(vae.decode(latents.float()), wanted)

    return distance


# --------------------------------------------------------------------------------------------------
# The command


def arguments() -> argparse.Namespace:
    parser = Parser("Distill a flow (or a diffusion) into a one-step model.")
    # InstaFlow-0.9B: 21,500 iterations of 1024 in L2, then 18,000 in LPIPS. Its learning rate is
    # not published; reflow's stands in.
    add, either = parser.add_argument_group("distillation").add_argument, DefaultByModel
    add("--student", choices=["unet", "stacked"], default="unet", help="stacked: InstaFlow-1.7B")
    add("--l2-iterations", type=non_negative_int, default=either(21_500, 250), help="first stage")
    add("--lpips-iterations", type=non_negative_int, default=either(18_000, 75), help="second")
    add("--lpips-net", choices=NETS, default=either("vgg", "random"), help="the backbone of LPIPS")
    add("--lpips-batch-size", type=positive, help="default: --batch-size")
    add("--lpips-learning-rate", type=non_negative, help="default: a fifth of --learning-rate")
    add("--lpips-accumulate", type=positive, default=either(None, 1),
        help="micro-batches in LPIPS; see --accumulate")
    add_pair_options(parser, "runs/pairs-2rf", teacher="runs/2rf.safetensors")
    add_training_options(parser, "runs/instaflow.safetensors", DefaultByModel(1024, 64))
    add_validation_options(parser)
    add_machine_options(parser, run_seed)
    parser.set_defaults(teacher_steps=None, learning_rate=either(1e-6, 5e-4))
    return parser.parse_args()


def stages_for(args: argparse.Namespace, teacher, device: torch.device, spec: dict) -> list[tuple]:
    """(folder, options, settings) of L2 and of LPIPS."""
    rate, slower = args.learning_rate, args.lpips_learning_rate
    slower = rate / LPIPS_SLOWER if slower is None else slower
    size, lpips_size = args.batch_size, args.lpips_batch_size or args.batch_size
    dtype, state = autocast_dtype(args.dtype, device, teacher.unet), Path(args.out + ".state")
    first = training_options(args, "distill, L2", args.l2_iterations, size, rate, args.accumulate,
                             FITS, dtype)
    second = training_options(args, "distill, LPIPS", args.lpips_iterations, lpips_size, slower,
                              args.lpips_accumulate, FITS_LPIPS, dtype)
    settings = {"pairs": spec, "init": checkpoint.check_init(args.init, teacher),
                "student": args.student}
    after = {"seen": first.iterations * first.batch_size, "net": args.lpips_net}
    return [(state / "l2", first, settings), (state / "lpips", second, settings | after)]


def check_distillation(args: argparse.Namespace, teacher) -> None:
    if args.student == "stacked" and teacher.unet.config.stacked:
        raise BadInput(f"{args.teacher}: its U-Net is a stacked one already; take --student unet")
    if not args.l2_iterations + args.lpips_iterations:
        raise BadInput("--l2-iterations and --lpips-iterations are both 0: nothing to do")


def main():
    args = arguments()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    teacher = checkpoint.load(args.teacher, device, dtype, args.kind, args.tokenizer)
    resolve_defaults(args, teacher.is_tiny)
    if args.teacher_steps is None:
        tiny = 4 if teacher.kind == "flow" else 8  # the tiny flow's 4 steps are as good as 25
        args.teacher_steps = tiny if teacher.is_tiny else 25
    check_distillation(args, teacher)
    stem = args.out.removesuffix(".safetensors")
    l2_out = f"{stem}-l2.safetensors" if args.lpips_iterations else args.out
    if args.l2_iterations:
        check_not_overwriting(l2_out, {"--teacher": args.teacher, "--init": args.init})
    prompts, captions, spec = requested_pairs(teacher, args, "distillation")
    lpips = perceptual_distance(args.lpips_net, device) if args.lpips_iterations else None
    shown = validation_prompts(args, captions)
    stages = stages_for(args, teacher, device, spec)
    (l2_state, l2, l2_settings), (lpips_state, second, lpips_settings) = stages
    runs = [stage for stage in stages if stage[1].iterations]
    finished = check_request(args, spec, runs)
    if finished and len(runs) == 2:  # OUT is L2's after a command without LPIPS
        differ = Path(l2_out).exists() and not filecmp.cmp(l2_out, args.out, shallow=False)
        finished = all_gather([differ])[0]
    print_plan(args, teacher, prompts, spec, [options for _, options, _ in runs])
    # A stage that is not asked for now may have written OUT.
    skipped = any(saved_step(stage[0]) for stage in stages if stage not in runs)
    if finished and not skipped:
        done = " + ".join(f"{options.iterations:,}" for _, options, _ in runs)
        print(f"{args.out}: finished already, {done} iterations")
        return

    if args.compile:
        teacher.compile()
    pairs = make_pairs(teacher, prompts, spec, args.pairs, args.teacher_batch_size, args.repair)
    reference = validation_data(teacher, captions, shown, spec, args)
    del teacher

    student = checkpoint.load_student(args, device, spec["teacher_hash"], l2_settings["init"])
    student.kind = "one-step"
    ema = ema_copy(student.unet, args.ema_device)
    if args.compile:
        student.compile()
    validator = reference and partial(
        validate, student, ema, reference, held_out_batches(reference)
    )
    if l2.iterations:
        train(student.unet, ema, partial(batch, pairs, args.seed, 0),
              partial(loss, student.encode_prompts, squared), l2, l2_state, l2_settings,
              validator and partial(validator, l2, l2_state))
        checkpoint.save(student, l2_out)
        plot_loss(l2_state)
    if second.iterations:
        train(student.unet, ema, partial(batch, pairs, args.seed, lpips_settings["seen"]),
              partial(loss, student.encode_prompts, perceptual(student.vae, lpips)), second,
              lpips_state, lpips_settings,
              validator and partial(validator, second, lpips_state, before=l2.iterations))
        checkpoint.save(student, args.out)
        plot_loss(lpips_state)
    print(f"{args.out}: a one-step model; its losses are in {args.out}.state")


if __name__ == "__main__":
    run(main)
