"""Reflow: teach a velocity the straight lines between the teacher's noises and its latents.

    python reflow.py                                    the tiny model, minutes on a laptop
    python reflow.py --teacher sd14.safetensors
        Stable Diffusion: the paper's 70,000 x 64 samples, 11.2 A100-days, on 50,000 pairs of a
        small grammar; with --prompts FILE on the paper's 1.6 million, 52 GB
    python reflow.py --teacher sd14.safetensors --init runs/2rf.safetensors --batch-size 1024 \\
                     --iterations 25000 --out runs/2rf-1024.safetensors
        InstaFlow's second stage: 64 A100-days more, on the same pairs

The teacher's ODE pairs every noise X0 with a latent X1 (pairs.py). On those pairs the U-Net,
started from the teacher's own weights, regresses the direction of the line:

    min_v  E ‖(X1 - X0) - v(X_t, t | T)‖²      X_t = (1-t) X0 + t X1,  t ~ U[0, 1]

The paper starts from the teacher's weights as they are (--init teacher). They predict noise, which
is the opposite of half the velocity; changing the sign of the last convolution (--init negated)
removes most of the work of the tiny model. --loss pseudo-huber counts large errors less. A tenth of
the prompts T is dropped, so that guidance works on the result. The result is 2-Rectified Flow, of
kind "flow"; given as --teacher itself, it makes 3-Rectified Flow (a fourth flow wants another
--seed). InstaFlow (arXiv 2309.06380).
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
from command import (
    TINY_TEACHER, BadInput, ByModel, Parser, add_machine_options, not_below_zero, not_negative,
    pick_device, positive, run, settle, share, solver_steps,
)
from pairs import Pairs, pairs_asked
from rectified_flow import flow_velocity, pseudo_huber, reflow_loss
from sample import run_seed
from stable_diffusion import KINDS, StableDiffusion
from training import TrainingOptions, autocast_dtype, options_from, train
from unet import started_from
from watch import Stage, add_watch_options, batches_by_time, train_in_stages

LOSSES = {"l2": reflow_loss, "pseudo-huber": partial(reflow_loss, distance=pseudo_huber)}
CAPTION_DROPOUT = 0.1  # share of prompts replaced by the empty one (Ho & Salimans 2022, 2207.12598)


def uniform_times(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator)


def reflow(
    model, pairs: Pairs, options: TrainingOptions, folder: Path, settings: dict,
    dtype: torch.dtype = torch.float32, loss_of: Callable = reflow_loss,
    times: Callable = uniform_times, watch: Callable | None = None, train: Callable = train,
) -> None:
    """Train model.unet on the pairs, in place; model becomes a flow.

    loss_of(velocity, x0, x1, t, context): the loss of each sample; times(count, generator) draws t.
    watch: as for `train`; train: another one to measure with.
    """

    def draw(samples: Tensor, share: slice, generator: torch.Generator) -> tuple:
        t = times(len(samples), generator)[share]
        kept = torch.rand(len(samples), generator=generator)[share] >= CAPTION_DROPOUT
        x0, x1, prompts = pairs.batch(samples[share], options.seed)
        return x0, x1, t, [prompt if keep else "" for prompt, keep in zip(prompts, kept)]

    def loss(unet, x0: Tensor, x1: Tensor, t: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        context = model.encode_prompts(prompts)
        return loss_of(flow_velocity(unet), x0, x1, t, context), t

    train(model.unet, draw, loss, options, folder, settings, "reflow", dtype, watch)
    model.kind = "flow"


# --------------------------------------------------------------------------------------------------
# The command

TINY_PAIRS = 10_000
# Samples at 512 px that 80 GB hold with ease, by the table of benchmarks/README.md: 40 GB.
FITS = 64


def add_options(parser: Parser) -> None:
    """Those of every training on the teacher's pairs: reflow's, and fewstep/train.py's."""
    add = parser.add_argument_group("pairs").add_argument
    add("--teacher", default=TINY_TEACHER,
        help="an SD 1.x .safetensors, one of ours, or a diffusers folder")
    add("--kind", choices=KINDS, help="what its U-Net predicts; default: as the file says")
    add("--tokenizer", help="folder with vocab.json and merges.txt, for a teacher without its own")
    add("--prompts",
        help="text file with a prompt a line, or .tsv/.csv; default: the tiny model's captions, "
             "for SD a built-in grammar")
    add("--prompt-column", default="Prompt", help="column of a .tsv or .csv that holds the prompts")
    add("--pairs", default="runs/pairs", help="folder of the pairs; whole shards in it are kept")
    add("--num-pairs", type=positive,
        help="default: 1,600,000 with --prompts (the paper's), 50,000 of the built-in grammar, "
             f"tiny model {TINY_PAIRS:,}")
    add("--teacher-steps", type=solver_steps, default=ByModel(25, 8))
    add("--teacher-guidance", type=not_below_zero,
        help="1 is off; default: 6 for SD (the paper's for SD 1.4; for SD 1.5 it takes 5), 2.5 for "
             "its tiny model, 1.5 for a flow")
    add("--solver", choices=["dpm", "ddim"], default="dpm", help="for a diffusion; flows use Euler")
    add("--teacher-batch-size", type=positive, help="pairs drawn at once; default: 16 at 512 px")
    add("--repair", action="store_true", help="make damaged shards again")

    add = parser.add_argument_group("training").add_argument
    # InstaFlow: 70,000 updates of 64, and a tenth of the learning rate for a third flow.
    add("--iterations", type=positive, default=ByModel(70_000, 600), help="updates")
    add("--batch-size", type=positive, default=64, help="samples of one update")
    add("--init", type=checkpoint.initial_weights, default=ByModel("teacher", "negated"),
        metavar="{teacher,negated,random,CHECKPOINT}",
        help="weights to start from; negated: a diffusion's with the sign of its output changed")
    add("--learning-rate", type=not_below_zero,
        help="default: 1e-06 from a diffusion, 1e-07 from a flow, tiny model 0.0005")
    add("--cooldown", type=share, default=ByModel(0.0, 0.6),
        help="share of the run, at its end, over which the rate falls to 0; the paper's is "
             "constant")
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
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
        default=ByModel(True, False),
        help="recompute activations in the backward pass: less memory, a third more time")
    add("--ema-device", choices=["cpu"], help="keep the averaged weights in main memory")
    add("--compile", action="store_true", help="torch.compile: minutes at first, faster after them")
    add("--save-every", type=positive, default=500,
        help="updates between saved states; 15 minutes at most")
    add("--out", type=checkpoint.model_file, default="runs/2rf.safetensors",
        help="the model, as it is at the last save; its training state lies in OUT.state")
    add_watch_options(parser)
    add_machine_options(parser, run_seed)


def arguments() -> argparse.Namespace:
    parser = Parser("Make a 2-Rectified Flow from a diffusion, or a 3-Rectified Flow from that.")
    parser.add_argument("--loss", choices=LOSSES, default="l2",
                        help="pseudo-huber counts large errors less (2405.20320)")
    add_options(parser)
    return parser.parse_args()


def main():
    args = arguments()
    device = pick_device(args.device)
    teacher = checkpoint.load(args.teacher, device, torch.float32, args.kind, args.tokenizer)
    settle(args, teacher.is_tiny)
    if teacher.kind == "one-step":
        raise BadInput(f"{args.teacher}: a one-step model has no path to straighten; give a "
                       "diffusion or a flow as --teacher")
    init, init_name = checkpoint.load_start(args.init, teacher)
    world = "reflow" if teacher.kind == "diffusion" else "second reflow"
    asked = pairs_asked(teacher, args, world, TINY_PAIRS)

    rate = args.learning_rate
    if rate is None:
        rate = 5e-4 if teacher.is_tiny else 1e-6 if teacher.kind == "diffusion" else 1e-7
    fits = args.batch_size if teacher.is_tiny else FITS
    options = options_from(args, args.iterations, args.batch_size, rate, args.accumulate, fits)
    dtype = autocast_dtype(args.dtype, device, teacher.unet)
    settings = {"pairs": asked[-1], "init": init_name, "loss": args.loss}
    folder, student = Path(args.out + ".state"), replace(teacher, kind="flow")

    def start(drawer: StableDiffusion) -> torch.nn.Module:
        return started_from(teacher.unet, init, teacher.kind, args.seed)

    def train_on(pairs: Pairs, train: Callable = train, watch: Callable | None = None) -> None:
        reflow(student, pairs, options, folder, settings, dtype, LOSSES[args.loss], watch=watch,
               train=train)

    stages = [Stage("reflow", options, train_on, folder, settings, args.out)]
    if train_in_stages(args, stages, teacher, student, start, asked, batches_by_time, dtype):
        print(f"{args.out}: a rectified flow; its loss is in {folder / 'loss.png'}")


if __name__ == "__main__":
    run(main)
