"""Reflow: teach a velocity the straight lines between the teacher's noises and its latents.

    python reflow.py                                    the tiny model, minutes on a laptop
    python reflow.py --teacher sd14.safetensors         Stable Diffusion: the paper's 70,000 x 64 samples, 11.2 A100-days,
                                                        on 50,000 pairs of a small grammar; with --prompts FILE
                                                        on the paper's 1.6 million, 52 GB
    python reflow.py --teacher sd14.safetensors --init runs/2rf.safetensors --batch-size 1024 --iterations 25000 \\
                     --out runs/2rf-1024.safetensors    InstaFlow's second stage: 64 A100-days more, on the same pairs

The teacher's ODE pairs every noise X0 with a latent X1 (pairs.py). On those pairs the U-Net, started from the
teacher's own weights, regresses the direction of the line:

    min_v  E ‖(X1 - X0) - v(X_t, t | T)‖²      X_t = (1-t) X0 + t X1,  t ~ U[0, 1]

The paper starts from the teacher's weights as they are (--init teacher). They predict noise, which is the opposite of
half the velocity; changing the sign of the last convolution (--init negated) removes most of the work of the tiny model.
--loss pseudo-huber counts large errors less (README.md, "Fewer samples").
A tenth of the prompts T is dropped, so that guidance works on the result. The result is 2-Rectified Flow, of kind
"flow"; given as --teacher itself, it makes 3-Rectified Flow (a fourth flow wants another --seed). InstaFlow (2309.06380).
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
from command import (
    TINY_TEACHER,
    BadInput,
    ByModel,
    Parser,
    add_machine_options,
    add_model_options,
    check_output,
    keep_others_out,
    pick_device,
    positive,
    run,
    settle,
)  # fmt: skip
from pairs import Pairs, add_pairs_options, make_pairs, pairs_asked
from rectified_flow import flow_velocity, pseudo_huber_loss, reflow_loss
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

LOSSES = {"l2": reflow_loss, "pseudo-huber": pseudo_huber_loss}
CAPTION_DROPOUT = 0.1  # share of prompts replaced by the empty one (Ho & Salimans 2022, 2207.12598)


def uniform_times(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator)


def reflow(
    model, pairs: Pairs, options: TrainingOptions, folder: Path, settings: dict, dtype: torch.dtype,
    times: Callable[[int, torch.Generator], Tensor] = uniform_times, loss_of: Callable = reflow_loss,
) -> None:  # fmt: skip
    """Train model.unet on the pairs, in place; model becomes a flow.

    times(count, generator) draws t; loss_of(velocity, x0, x1, t, context) is the loss of each sample.
    """
    device, velocity = model.device, flow_velocity(model.unet)

    def draw(samples, generator):
        x0, x1, prompts = pairs.batch(shuffled(samples, len(pairs), options.seed))
        t = times(len(samples), generator)
        kept = torch.rand(len(samples), generator=generator) >= CAPTION_DROPOUT
        return x0, x1, t, [prompt if keep else "" for prompt, keep in zip(prompts, kept.tolist())]

    def loss(x0, x1, t, prompts):
        context = model.encode_prompts(prompts)
        return loss_of(velocity, x0.to(device), x1.to(device), t.to(device), context), t

    train(model.unet, draw, loss, options, folder, settings, "reflow", dtype)
    model.kind = "flow"


TINY_PAIRS = 15_000
FITS = 64  # samples at 512 px that a GPU of 80 GB holds with ease, by the table of benchmarks/README.md: 40 GB


def main():
    parser = Parser("Make a 2-Rectified Flow from a diffusion teacher (or a 3-Rectified Flow from a 2-Rectified Flow).")
    add_pairs_options(parser, teacher=TINY_TEACHER, folder="runs/pairs", tiny_count=TINY_PAIRS)
    # InstaFlow: 70,000 updates of 64, and a tenth of the learning rate for a third flow.
    group = add_training_options(parser, ByModel(64, 64), "1e-06 from a diffusion, 1e-07 from a flow, tiny model 0.0005")
    group.add_argument("--iterations", type=positive, default=ByModel(70_000, 700))
    group.add_argument("--loss", choices=LOSSES, default="l2", help="pseudo-huber counts large errors less (2405.20320)")
    group.add_argument("--out", default="runs/2rf.safetensors", help="the flow; its training state lies in OUT.state")
    add_model_options(parser)
    add_machine_options(parser)
    args = parser.parse_args()

    device = pick_device(args.device)
    teacher = checkpoint.load_as_asked(args.teacher, args, device, args.kind)
    tiny = teacher.captions is not None
    settle(args, tiny)
    if args.learning_rate is None:
        args.learning_rate = 5e-4 if tiny else 1e-6 if teacher.kind == "diffusion" else 1e-7
    if teacher.kind == "one-step":
        raise BadInput(f"{args.teacher}: a one-step model has no path to straighten; give a diffusion or a flow as --teacher")
    check_output(args.out)
    folder = Path(args.out + ".state")
    keep_others_out(folder)

    world = "reflow" if teacher.kind == "diffusion" else "second reflow"
    prompts, description = pairs_asked(teacher, args, world, TINY_PAIRS)
    fits = None if tiny else FITS
    options = options_from(args, args.iterations, args.batch_size, args.accumulate, fits, args.learning_rate)
    dtype = autocast_dtype(args.dtype, device, teacher.unet)
    settings = {"pairs": description, "init": checkpoint.start_of(args), "loss": args.loss}
    if check_stage(folder, options, settings, dtype) and Path(args.out).exists():
        print(f"{args.out}: finished already, {args.iterations} iterations")
        return
    checkpoint.check_start(args, teacher)
    pairs = make_pairs(teacher, prompts, description, args.pairs, args.teacher_batch_size, args.repair)
    seen = args.iterations * args.batch_size
    print(f"reflow: {len(pairs)} pairs, each seen {seen / len(pairs):.1f} times in {args.iterations} x {args.batch_size}")

    del teacher
    model = checkpoint.load_student(args, device)
    model.unet.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        model.compile()
    reflow(model, pairs, options, folder, settings, dtype, loss_of=LOSSES[args.loss])
    checkpoint.save(model, args.out)
    plot_loss(folder)
    print(f"{args.out}: a rectified flow; its loss is in {folder / 'loss.png'}")


if __name__ == "__main__":
    run(main)
