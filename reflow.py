"""Reflow: learn the straight lines between a teacher's noises and its latents.

    python reflow.py                                    the tiny model, minutes on a laptop
    python reflow.py --teacher sd14.safetensors --prompts captions.txt
        Stable Diffusion, as in the paper: 1.6 million pairs (52 GB of disk), then 70,000 iterations
        of batch 64 (11.2 A100-days); without --prompts 50,000 pairs of a small built-in grammar
    python reflow.py --teacher sd14.safetensors --init runs/2rf.safetensors --batch-size 1024 \\
                     --iterations 25000 --out runs/2rf-1024.safetensors
        InstaFlow's second stage on the same pairs (64 A100-days more)

The teacher's ODE takes each noise X0 to a latent X1, in --teacher-steps with --teacher-guidance.
pairs.py stores X1 and the seed of X0. The U-Net learns X1 - X0 on these pairs:

    min_v  E ‖(X1 - X0) - v(X_t, t | T)‖²      X_t = (1-t) X0 + t X1,  t ~ U[0, 1]

The paper starts from the teacher's weights (--init teacher, Stable Diffusion's default). They
predict X0, but the velocity X1 - X0 contains -X0. So --init negated, the tiny model's default,
flips the sign of the last convolution and saves most of the work. A tenth of the prompts becomes
empty, so that the result, 2-Rectified Flow (2-RF), can be guided. With 2-RF as --teacher: 3-RF.

After a kill, the same command continues: it keeps finished shards of pairs, and training resumes
from the last save in OUT.state (every --save-every iterations) with the batches that come next.
Source: Liu et al. 2023 (InstaFlow, arXiv 2309.06380).
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
from command import (
    DefaultByModel, Parser, add_machine_options, pick_device, pick_dtype, positive,
    resolve_defaults, run,
)
from evaluation.plan import check_request, print_plan
from evaluation.plots import plot_loss
from pairs import Pairs, add_pair_options, make_pairs, requested_pairs
from rectified_flow import Distance, flow_velocity, pseudo_huber, reflow_loss, squared
from sample import run_seed
from training import add_training_options, autocast_dtype, ema_copy, train, training_options
from validation import (
    add_validation_options, batches_by_t, validate, validation_data, validation_prompts,
)

CAPTION_DROPOUT = 0.1  # as in classifier-free guidance (Ho & Salimans 2022, 2207.12598)
DISTANCES = {"l2": squared, "pseudo-huber": pseudo_huber}  # of --loss
FITS = 64  # samples at 512 px in one pass: 40 of a GPU's 80 GB (benchmarks/README.md)


# training.train calls loss(unet, *batch(samples, share, generator)) in every iteration.


def batch(
    pairs: Pairs, seed: int, samples: Tensor, share: slice, generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """X0, X1, t and T of this process's share of a batch. samples: their numbers in the run."""
    # drawn for the whole batch, so that the number of processes does not matter
    t = torch.rand(len(samples), generator=generator)[share]
    keep = torch.rand(len(samples), generator=generator)[share] >= CAPTION_DROPOUT
    x0, x1, prompts = pairs.batch(samples[share], seed)  # shuffled by the seed
    return x0, x1, t, [prompt if kept else "" for prompt, kept in zip(prompts, keep)]


def loss(
    encode_prompts, distance: Distance, unet, x0: Tensor, x1: Tensor, t: Tensor, prompts: list[str],
) -> tuple[Tensor, Tensor]:
    """D(v(X_t, t | T), X1 - X0) to minimise (B,), and t (B,) for the log."""
    context = encode_prompts(prompts)
    return reflow_loss(flow_velocity(unet), x0, x1, t, context, distance), t


# --------------------------------------------------------------------------------------------------
# The command


def arguments() -> argparse.Namespace:
    parser = Parser("Make a 2-Rectified Flow from a diffusion, or a 3-Rectified Flow from that.")
    # The paper: 70,000 iterations of 64.
    parser.add_argument("--iterations", type=positive, default=DefaultByModel(70_000, 300),
                        help="of --batch-size samples")
    parser.add_argument("--loss", choices=DISTANCES, default="l2",
                        help="pseudo-huber weighs large errors less (2405.20320)")
    add_pair_options(parser, "runs/pairs")
    add_training_options(parser, "runs/2rf.safetensors")
    add_validation_options(parser)
    add_machine_options(parser, run_seed)
    return parser.parse_args()


def main():
    args = arguments()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)  # of the teacher
    teacher = checkpoint.load(args.teacher, device, dtype, args.kind, args.tokenizer)
    resolve_defaults(args, teacher.is_tiny)
    purpose = "reflow" if teacher.kind == "diffusion" else "second reflow"  # of the noises
    prompts, captions, spec = requested_pairs(teacher, args, purpose)
    shown = validation_prompts(args, captions)
    state, rate = Path(args.out + ".state"), args.learning_rate
    if rate is None:  # the paper's, and a tenth of it for a third flow
        rate = 1e-6 if teacher.kind == "diffusion" else 1e-7
    options = training_options(args, "reflow", args.iterations, args.batch_size, rate,
                               args.accumulate, FITS,
                               autocast_dtype(args.dtype, device, teacher.unet))
    # A run continues only with the same settings; spec says what decides the pairs.
    settings = {"pairs": spec, "init": checkpoint.check_init(args.init, teacher), "loss": args.loss}
    finished = check_request(args, spec, [(state, options, settings)])
    print_plan(args, teacher, prompts, spec, [options])
    if finished:
        print(f"{args.out}: finished already, {options.iterations:,} iterations")
        return

    if args.compile:
        teacher.compile()
    pairs = make_pairs(teacher, prompts, spec, args.pairs, args.teacher_batch_size, args.repair)
    reference = validation_data(teacher, captions, shown, spec, args)
    del teacher

    student = checkpoint.load_student(args, device, spec["teacher_hash"], settings["init"])
    student.kind = "flow"
    ema = ema_copy(student.unet, args.ema_device)
    if args.compile:
        student.compile()
    validator = reference and partial(
        validate, student, ema, reference, batches_by_t(reference), options, state
    )
    train(student.unet, ema, partial(batch, pairs, args.seed),
          partial(loss, student.encode_prompts, DISTANCES[args.loss]), options, state, settings,
          validator)  # resumes from `state`; student.unet ends with the averaged (EMA) weights
    checkpoint.save(student, args.out)
    plot_loss(state)
    print(f"{args.out}: a rectified flow; its loss is in {state / 'loss.png'}")


if __name__ == "__main__":
    run(main)
