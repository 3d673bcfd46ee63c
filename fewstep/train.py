"""Train a few-step model with one of nine methods beside InstaFlow, on the same pairs.

    python fewstep/train.py --method perflow                    the tiny model, minutes on a laptop
    python fewstep/train.py --method lcm --teacher sd14.safetensors --prompts captions.txt

The tiny model is the default. Teacher, pairs, training loop and flags are the same as in reflow.py;
the method is a loss (methods.py). OUT is by default runs/METHOD.safetensors; sample.py and
evaluate.py take it like any other model. Progressive distillation also saves the models of its
first rounds, as OUT-8, OUT-4 and OUT-2.

Unlike in reflow.py, the learning rate decays over the last 60 % of each round and --ema-ramp is on
for Stable Diffusion too, because the default is 640,000 samples. compare.py runs the teacher inside
a loss in fp32; here it has --dtype.
"""

import argparse
import copy
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from command import (
    BadInput, DefaultByModel, Parser, add_machine_options, check_not_overwriting, pick_device,
    pick_dtype, positive, resolve_defaults, run,
)
from distill import FITS_LPIPS
from evaluation.perceptual import NETS, perceptual_distance
from evaluation.plan import check_request, print_plan
from evaluation.plots import plot_loss, steps_label
from fewstep import lora, meanflow
from fewstep.critic import adversarial_loss, make_heads
from fewstep.methods import METHODS, Method, Round, rounds_of
from fewstep.steps import SCHEDULE, guided_velocity
from pairs import Pairs, add_pair_options, make_pairs, requested_pairs, shuffled
from rectified_flow import Distance
from reflow import FITS
from sample import run_seed
from stable_diffusion import INITS, StableDiffusion
from training import (
    add_training_options, autocast_dtype, ema_copy, generator_for, train, training_options,
)
from validation import (
    Reference, add_validation_options, held_out_batches, validate, validation_data,
    validation_prompts,
)


class Prompts:
    """Stands in for pairs where a method needs prompts alone: batches without latents."""

    def __init__(self, prompts: list[str]):
        self.prompts = prompts

    def batch(self, samples: Tensor, seed: int) -> tuple[Tensor, Tensor, list[str]]:
        none, indices = torch.empty(len(samples), 0), shuffled(samples, len(self.prompts), seed)
        return none, none, [self.prompts[i] for i in indices.tolist()]


def student_of(model: StableDiffusion, method: Method, init: str, seed: int) -> StableDiffusion:
    """The method's student, from a model with the initial weights `init`; changes the model."""
    torch.manual_seed(seed)  # for new weights: the second time's embedding, LoRA
    unet = meanflow.with_second_time(model.unet) if method.second_time else model.unet
    if method.matched:  # only a diffusion's times differ from the flow's; waves of all are left out
        own = SCHEDULE if init in ("teacher", "negated") else None
        meanflow.match_times(unet, own, meanflow.SLOW)
    if method.critic:
        unet.critic = make_heads(unet.config).to(next(unet.parameters()))
    if method.lora:
        lora.add_lora(unet, everywhere=method.lora == "everywhere")
    return replace(model, unet=unet, kind=method.kind, few_step=method.few_step)


def finished(model: StableDiffusion) -> StableDiffusion:
    """The model as it is saved: with its LoRA merged, without a critic."""
    if not lora.has_lora(model.unet) and not hasattr(model.unet, "critic"):
        return model
    unet = lora.merged(model.unet)  # a copy
    unet.critic = None
    return replace(model, unet=unet)


def batch(
    round_: Round, pairs: Pairs | Prompts, shape: tuple[int, ...], samples: Tensor, share: slice,
    generator: torch.Generator,
) -> tuple:
    """X0, X1, T and the method's random numbers. shape: of a latent."""
    method, size, seed = round_.method, round_.options.batch_size, round_.options.seed
    if round_.before:  # the loop counts each round from 0; noise must not repeat
        samples = samples + round_.before * size
        generator = generator_for(seed, int(samples[0]) // size)
    noise = torch.randn(len(samples), *shape, generator=generator)[share]
    random = [numbers[share] for numbers in method.draw(len(samples), generator)]
    x0, x1, prompts = pairs.batch(samples[share], seed)
    if method.dropout:
        keep = torch.rand(len(samples), generator=generator)[share] >= method.dropout
        prompts = [prompt if kept else "" for prompt, kept in zip(prompts, keep)]
    return x0 if method.data == "pairs" else noise, x1, prompts, *random


def loss(
    method: Method, encode_prompts: Callable, ema, inputs: dict, unet, x0: Tensor, x1: Tensor,
    prompts: list[str], *random: Tensor,
) -> tuple[Tensor, None]:
    """The method's loss for each sample. inputs: of `loss_inputs`."""
    bare = getattr(unet, "module", unet)  # without DDP
    if method.target:
        target = ema if method.target == "ema" else bare
        inputs = inputs | {"target": method.velocity(target)}
    if method.critic:
        inputs = inputs | {"critic": partial(adversarial_loss, inputs["critic"], bare.critic)}
    context = encode_prompts(prompts)
    return method.loss(method.velocity(unet), x0, x1, context, *random, **inputs), None


def loss_inputs(
    method: Method, student: StableDiffusion, teacher: StableDiffusion, guidance: float,
    pairs: Pairs | Prompts, lpips: Distance | None,
) -> dict:
    """What the loss takes beside its batch and target. guidance: of the pairs; lpips: for HiPA."""
    inputs = {}
    if method.teacher:
        scale = guidance if method.guidance is None else method.guidance
        inputs["teacher"] = guided_velocity(teacher, scale)
    if method.critic:
        inputs["critic"] = teacher.unet.requires_grad_(False)
    if method.name == "re-meanflow" and method.data == "pairs":
        inputs["longest"] = meanflow.longest_length(pairs)
    if method.name == "hipa":
        student.vae.requires_grad_(False)
        inputs["decode"] = lambda latents: student.vae.decode(latents.float())
        inputs["distance"] = lpips
    return inputs


def next_inputs(inputs: dict, student: StableDiffusion, done: Round) -> dict:
    """`loss_inputs` after a round, whose student may become the teacher."""
    if not done.teaches:
        return inputs
    frozen = copy.deepcopy(student.unet).requires_grad_(False)
    return inputs | {"teacher": done.method.velocity(frozen)}


def validation_batches(method: Method, seed: int, reference: Reference) -> list[tuple]:
    """Held-out pairs as the method's loss takes them: (X0, X1, T, random numbers)."""
    batches = []
    for k, (x0, x1, prompts) in enumerate(held_out_batches(reference)):
        generator = generator_for(seed, -1 - k)  # training has steps from 0
        noise = torch.randn(x0.shape, generator=generator)
        random = method.draw(len(x0), generator)
        batches.append((x0 if method.data == "pairs" else noise, x1, prompts, *random))
    return batches


# --------------------------------------------------------------------------------------------------
# The command


def arguments() -> argparse.Namespace:
    parser = Parser("Train a few-step model with one of the methods beside InstaFlow.")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--iterations", type=positive, default=DefaultByModel(10_000, 600))
    parser.add_argument("--lpips-net", choices=NETS, default=DefaultByModel("vgg", "random"),
                        help="for hipa")
    add_pair_options(parser, "runs/pairs")
    add_training_options(parser, out=None)
    add_validation_options(parser)
    add_machine_options(parser, run_seed)
    parser.set_defaults(init=None, learning_rate=DefaultByModel("the method's own", 5e-4),
                        cooldown=0.6, ema_ramp=0.05)
    args = parser.parse_args()
    method = METHODS[args.method]
    if isinstance(args.lpips_net, str) and method.name != "hipa":
        raise BadInput(f"--lpips-net: is for hipa, not {method.name}; drop it")
    args.out, args.init = args.out or f"runs/{method.name}.safetensors", args.init or method.init
    if isinstance(args.learning_rate, DefaultByModel):
        args.learning_rate = DefaultByModel(method.learning_rate, 5e-4)
    return args


def check_method(args: argparse.Namespace, method: Method, teacher: StableDiffusion) -> None:
    if teacher.kind != "diffusion":
        raise BadInput(f"{args.teacher}: of kind {teacher.kind}; give a diffusion as --teacher")
    if method.target == "ema" and args.ema_device:
        raise BadInput(f"--ema-device: {method.name} calls the EMA network in every iteration; "
                       "drop it")
    if args.compile and method.name == "re-meanflow":
        raise BadInput("--compile: a compiled network has no forward derivative, which re-meanflow "
                       "needs; drop it")
    if args.num_pairs and method.data == "prompts":
        raise BadInput(f"--num-pairs: {method.name} trains on prompts alone; drop it")
    if args.init == "negated" and method.kind == "diffusion":
        raise BadInput(f"--init negated: is for methods that predict velocity, and {method.name} "
                       "predicts noise; drop it")


def settings_for(args: argparse.Namespace, method: Method, teacher, spec: dict) -> dict:
    """What decides the result, beside the options and the round."""
    if method.data == "prompts":
        spec = {name: spec[name] for name in ("teacher_hash", "guidance", "prompts_hash")}
    init = checkpoint.check_init(args.init, teacher)
    if args.init not in INITS:
        kind, predicts_noise = checkpoint.load(args.init, "meta").kind, method.kind == "diffusion"
        if predicts_noise != (kind == "diffusion"):
            raise BadInput(f"--init {args.init}: of kind {kind}, but {method.name} predicts "
                           f"{'noise' if predicts_noise else 'velocity'}; give a checkpoint that "
                           f"does, or --init {method.init}; checkpoint.py --kind mends a kind")
    settings = {"method": method.name, "pairs": spec, "init": init}
    return settings | ({"net": args.lpips_net} if method.name == "hipa" else {})


def main():
    args = arguments()
    method, device = METHODS[args.method], pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    teacher = checkpoint.load(args.teacher, device, dtype, args.kind, args.tokenizer)
    resolve_defaults(args, teacher.is_tiny)
    check_method(args, method, teacher)
    lpips = perceptual_distance(args.lpips_net, device) if method.name == "hipa" else None
    paired = method.data != "prompts"
    prompts, captions, spec = requested_pairs(teacher, args, "reflow", paired)
    shown = validation_prompts(args, captions)
    fits = FITS_LPIPS if method.name == "hipa" else FITS
    if method.critic:
        fits //= 2  # the teacher's U-Net keeps activations too
        teacher.unet.gradient_checkpointing = args.gradient_checkpointing
    rounds = rounds_of(method, training_options(
        args, method.name, args.iterations, args.batch_size, args.learning_rate, args.accumulate,
        fits, autocast_dtype(args.dtype, device, teacher.unet)))
    state, settings = Path(args.out + ".state"), settings_for(args, method, teacher, spec)
    runs = [(state / round_.folder, round_.options, settings | {"before": round_.before})
            for round_ in rounds]
    stem = args.out.removesuffix(".safetensors")
    outs = [f"{stem}{round_.suffix}.safetensors" for round_ in rounds]
    for out in outs:
        check_not_overwriting(out, {"--teacher": args.teacher, "--init": args.init})
    is_finished = (check_request(args, spec if paired else {}, runs)
                   and all(map(os.path.exists, outs)))
    print_plan(args, teacher, prompts, spec, [options for _, options, _ in runs], paired=paired)
    if is_finished:
        done = " + ".join(f"{options.iterations:,}" for _, options, _ in runs)
        print(f"{args.out}: finished already, {done} iterations")
        return

    if args.compile:
        teacher.compile()
    pairs = Prompts(prompts)
    if paired:
        pairs = make_pairs(teacher, prompts, spec, args.pairs, args.teacher_batch_size, args.repair)
    reference = validation_data(teacher, captions, shown, spec, args)

    student = checkpoint.load_student(args, device, spec["teacher_hash"], settings["init"])
    student = student_of(student, method, args.init, args.seed)
    ema = ema_copy(student.unet, args.ema_device)
    if args.compile:
        student.compile()
    batches = reference and validation_batches(method, args.seed, reference)
    inputs = loss_inputs(method, student, teacher, spec["guidance"], pairs, lpips)
    del teacher  # its U-Net lives on in `inputs` where the loss calls it
    for round_, (folder, options, own_settings), out in zip(rounds, runs, outs):
        student = replace(student, few_step=round_.method.few_step)
        validator = reference and partial(validate, student, ema, reference, batches, options,
                                          folder, before=round_.before, finish=finished)
        train(student.unet, ema, partial(batch, round_, pairs, student.latent_shape()),
              partial(loss, round_.method, student.encode_prompts, ema, inputs), options, folder,
              own_settings, validator)
        if round_.suffix or round_ is rounds[-1]:  # mlcm's first part has no model of its own
            checkpoint.save(finished(student), out)
        plot_loss(folder)
        inputs = next_inputs(inputs, student, round_)
    print(f"{args.out}: a model by {method.name}, sampled in {steps_label(student.steps)} by "
          f"default; its loss is in {state}")


if __name__ == "__main__":
    run(main)
