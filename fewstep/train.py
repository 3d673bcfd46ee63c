"""Train a few-step model by one of the methods beside InstaFlow, on the same pairs.

    python fewstep/train.py --method perflow                    the tiny model, minutes on a laptop
    python fewstep/train.py --method lcm --teacher sd14.safetensors --prompts captions.txt

Teacher, pairs, student, loop and options are those of reflow.py; a method is its loss:

    perflow               straighten the path window by window, from pictures
    progressive           one step learns what two do, in rounds of 8, 4, 2 and 1 steps
    lcm, mlcm, scott      consistency: every point of a path must see the same end
    rectified-diffusion   reflow that keeps Stable Diffusion's noise prediction and schedule
    re-meanflow           the mean velocity of a whole step, on pairs; a second time as input
    hipa                  a LoRA for the single step, asked for its high frequencies
    freeflow              follow the teacher's path from noise alone

What they need differs: own pairs (X0 and the X1 that it leads to), pictures (an X1, with fresh
noise) or prompts alone; a frozen target; rounds. All learn the teacher's guidance and are drawn
without. OUT says how (stable_diffusion.METHODS), so sample.py and evaluate.py take it as any other;
the rounds of progressive distillation before the last lie beside it as OUT-8, OUT-4 and OUT-2.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from command import (
    BadInput, ByModel, Parser, check_output, keep_others_out, pick_device, pick_dtype,
    refuse_overwriting, run, settle,
)
from diffusion import diffusion_start, diffusion_velocity
from distill import FITS_LPIPS, perceptual_distance
from fewstep import (
    consistency, freeflow, hipa, lora, meanflow, perflow, progressive, rectified_diffusion,
)
from fewstep.steps import SCHEDULE
from pairs import Pairs, make_pairs, pairs_asked
from rectified_flow import Velocity, flow_velocity, guided, mean_velocity, squared
from reflow import FITS, TINY_PAIRS, add_options
from stable_diffusion import StableDiffusion
from training import (
    TrainingOptions, autocast_dtype, generator_for, is_finished, options_from, plot_loss,
    tell_what_is_kept, train,
)
from unet import started_from
from watch import (
    Stage, forecast, plain_batches, plan, time_of_pairs, time_of_update, validation_prompts,
    watch_for,
)


@dataclass(frozen=True)
class Needs:
    """What a method's loss asks for, beside its student."""

    draw: Callable  # draw(count, generator): what is random in a sample, beside its noise
    kind: str  # what the student predicts: noise as Stable Diffusion ("diffusion"), or a velocity
    data: str  # "pairs", "pictures" with fresh noise, or "prompts" alone
    target: str = ""  # a velocity without gradient: the "student" itself, or the "averaged" one
    second_time: bool = False


METHODS = {
    "perflow": Needs(perflow.draw, "diffusion", "pictures"),
    "progressive": Needs(progressive.draw, "flow", "pictures"),
    "lcm": Needs(consistency.draw_lcm, "diffusion", "pictures", "averaged"),
    "mlcm": Needs(consistency.draw_mlcm, "diffusion", "prompts", "student"),
    "scott": Needs(consistency.draw_scott, "diffusion", "pictures", "averaged"),
    "rectified-diffusion": Needs(rectified_diffusion.draw, "diffusion", "pairs"),
    "re-meanflow": Needs(meanflow.draw, "flow", "pairs", "student", second_time=True),
    "hipa": Needs(lambda count, generator: (), "diffusion", "pairs"),
    "freeflow": Needs(freeflow.draw, "flow", "prompts", "student", second_time=True),
}
LONGEST, MEASURED = 0.9, 1000  # Re-MeanFlow keeps this share of the pairs, by the first thousand


class Prompts:
    """In place of pairs for methods that need prompts alone: what is drawn, and no picture."""

    def __init__(self, description: dict, prompts: list[str]):
        self.shape, self.prompts = tuple(description["latent_shape"]), prompts

    def batch(self, samples: Tensor, seed: int) -> tuple[Tensor, Tensor, list[str]]:
        none = torch.empty(len(samples), 0)
        return none, none, [self.prompts[int(k) % len(self.prompts)] for k in samples]


@dataclass
class Round:
    """One training of a method: most have one."""

    name: str
    options: TrainingOptions
    # loss(student, target, teacher, x0, x1, context, *random), the first three velocities
    loss: Callable


def rounds_of(method: str, options: TrainingOptions, model: StableDiffusion, net: str):
    """The trainings of a method, `options.iterations` in all."""
    if method == "progressive":
        losses = {f"{steps} steps": lambda v, target, teacher, x0, x1, c, place, steps=steps:
                  progressive.loss(v, teacher, x0, x1, c, place, steps,
                                   diffusion=steps == progressive.ROUNDS[0])
                  for steps in progressive.ROUNDS}
    elif method == "mlcm":
        losses = {
            name: lambda v, target, teacher, x0, x1, c, *random, loss=loss: loss(
                v, teacher, target, diffusion_start(x0, SCHEDULE), c, *random)
            for name, loss in (("segments", consistency.mlcm_segments),
                               ("edges", consistency.mlcm_edges))
        }
    else:
        losses = {method: one_loss(method, model, net)}
    each, left = divmod(options.iterations, len(losses))
    if not each:
        raise BadInput(f"--iterations {options.iterations}: {method} trains in {len(losses)} "
                       "rounds; give at least one for each")
    return [
        Round(name, replace(options, iterations=each + (left if k == len(losses) - 1 else 0)), loss)
        for k, (name, loss) in enumerate(losses.items())
    ]


def one_loss(method: str, model: StableDiffusion, net: str) -> Callable:
    """The loss of a method of one round. net: of hipa's perceptual distance."""
    if method == "perflow":
        return lambda v, target, teacher, *batch: perflow.loss(v, teacher, *batch)
    if method in ("lcm", "scott"):
        loss = getattr(consistency, method)
        return lambda v, target, teacher, *batch: loss(v, teacher, target, *batch)
    if method == "rectified-diffusion":
        return lambda v, target, teacher, *batch: rectified_diffusion.loss(v, *batch)
    if method == "re-meanflow":
        return lambda v, target, teacher, *batch: meanflow.loss(v, target, *batch)
    if method == "freeflow":
        return lambda v, target, teacher, x0, x1, *more: freeflow.loss(v, teacher, target, x0,
                                                                       *more)
    distance = perceptual_distance(net, model.device)
    model.vae.requires_grad_(False)

    def decode(latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            return model.vae.decode(latents.float())

    return lambda v, target, teacher, *batch: hipa.loss(v, decode, distance, *batch)


def student_of(
    teacher: StableDiffusion, method: str, needs: Needs, start="negated", seed: int = 0,
) -> StableDiffusion:
    """A copy of the teacher as the method's student. start: as for `started_from`."""
    unet = started_from(copy.deepcopy(teacher.unet), start, teacher.kind, seed)
    torch.manual_seed(seed)  # for what is new: the second time's embedding, LoRA
    unet = meanflow.with_second_time(unet) if needs.second_time else unet
    if method == "hipa":
        lora.add_lora(unet)
    return replace(teacher, unet=unet, kind=needs.kind, method=method)


def finished(model: StableDiffusion) -> StableDiffusion:
    """As it is saved: with its LoRA merged, if it has one."""
    return replace(model, unet=lora.merged(model.unet)) if model.method == "hipa" else model


def guide(drawer: StableDiffusion, guidance: float) -> Velocity:
    """The diffusion as the teacher's velocity in a loss."""
    null_context = drawer.encode_prompts([""])
    return diffusion_velocity(guided(drawer.unet, null_context, guidance), SCHEDULE)


def next_teacher(method: str, student: StableDiffusion, teacher: Velocity) -> Velocity:
    """Who teaches the next round: in progressive distillation the last round's student."""
    if method != "progressive":
        return teacher
    return flow_velocity(copy.deepcopy(student.unet).requires_grad_(False))


def of_shorter_pairs(pairs: Pairs) -> Callable:
    """The loss of Re-MeanFlow, without the tenth of the pairs that is longest."""
    x0, x1, _ = pairs[torch.arange(min(MEASURED, len(pairs)))]
    longest = squared(x0, x1).quantile(LONGEST).item()
    return lambda v, target, teacher, *batch: meanflow.loss(v, target, *batch, longest)


def velocity_of(unet, needs: Needs) -> Callable:
    """The student's network as the velocity that its method's loss takes."""
    if needs.second_time:
        return mean_velocity(unet)
    return diffusion_velocity(unet, SCHEDULE) if needs.kind == "diffusion" else flow_velocity(unet)


def train_round(
    model: StableDiffusion, teacher: Velocity, one: Round, needs: Needs, pairs: Pairs | Prompts,
    folder: Path, settings: dict, dtype: torch.dtype, watch: Callable | None = None,
    train: Callable = train,
) -> None:
    """Train model.unet, in place. pairs: of the teacher, or prompts; the rest as for `train`."""
    averaged, shape = None, model.latent_shape()
    if needs.target == "averaged":
        averaged = copy.deepcopy(model.unet).requires_grad_(False)

    def draw(samples: Tensor, share: slice, generator: torch.Generator) -> tuple:
        noise = torch.randn(len(samples), *shape, generator=generator)[share]
        random = [numbers[share] for numbers in needs.draw(len(samples), generator)]
        x0, x1, prompts = pairs.batch(samples[share], one.options.seed)
        return x0 if needs.data == "pairs" else noise, x1, prompts, *random

    def loss(unet, x0: Tensor, x1: Tensor, prompts: list[str], *random: Tensor) -> tuple:
        context = model.encode_prompts(prompts)
        # Not the processes' wrapper of it, nor the compiled one, which has no forward derivative.
        bare = getattr(unet, "module", unet).forward
        target = velocity_of(averaged or bare, needs)
        return one.loss(velocity_of(unet, needs), target, teacher, x0, x1, context, *random), None

    train(model.unet, draw, loss, one.options, folder, settings, one.name, dtype, watch,
          averaged=averaged)


def held_out_batches(needs: Needs, seed: int, pairs: Pairs, size: int) -> tuple[list, list]:
    """Held-out pairs as a method's loss takes them, with what is random in them."""
    batches = []
    for k, (x0, x1, prompts) in enumerate(plain_batches(pairs, size)[0]):
        generator = generator_for(seed, k)
        noise = torch.randn(x0.shape, generator=generator)
        random = needs.draw(len(x0), generator)
        batches.append((x0 if needs.data == "pairs" else noise, x1, prompts, *random))
    return batches, []


# --------------------------------------------------------------------------------------------------
# The command


def arguments():
    parser = Parser("Train a few-step model by one of the methods beside InstaFlow.")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--lpips-net", choices=["vgg", "alex", "squeeze", "random", "efficientnet"],
                        default=ByModel("vgg", "random"), help="of hipa")
    add_options(parser)
    parser.set_defaults(out=None, init=None, iterations=ByModel(10_000, 600))
    return parser.parse_args()


def main():
    args = arguments()
    args.out = args.out or f"runs/{args.method}.safetensors"
    needs, device = METHODS[args.method], pick_device(args.device)
    teacher = checkpoint.load(args.teacher, device, torch.float32, args.kind, args.tokenizer)
    settle(args, teacher.is_tiny)
    if teacher.kind != "diffusion":
        raise BadInput(f"{args.teacher}: of kind {teacher.kind}; give a diffusion as --teacher")
    if needs.target == "averaged" and args.ema_device:
        raise BadInput(f"--ema-device: the averaged network is {args.method}'s target at every "
                       "update; leave it away")
    refuse_overwriting(args.out, {"--teacher": args.teacher, "--init": args.init or ""})
    args.init = args.init or ("negated" if needs.kind == "flow" else "teacher")
    start, start_name = checkpoint.load_start(args.init, teacher)

    pairs_dtype = pick_dtype(args.dtype, device)
    prompts, held_out, description = pairs_asked(teacher, args, pairs_dtype, "reflow", TINY_PAIRS)
    shown = validation_prompts(args, prompts, held_out)
    rate = args.learning_rate
    if rate is None:
        rate = 5e-4 if teacher.is_tiny else 1e-6
    fits = FITS_LPIPS if args.method == "hipa" else FITS
    fits = args.batch_size if teacher.is_tiny else fits
    options = options_from(args, args.iterations, args.batch_size, rate, args.accumulate, fits)
    tell_what_is_kept(options)
    dtype = autocast_dtype(args.dtype, device, teacher.unet)
    data = description if needs.data != "prompts" else {
        name: description[name] for name in ("teacher_hash", "guidance", "prompts_hash")}
    settings = {"method": args.method, "pairs": data, "init": start_name}
    if args.method == "hipa":
        settings["net"] = args.lpips_net
    state = Path(args.out + ".state")
    drawer = teacher.in_dtype(pairs_dtype)  # and the frozen teacher of the loss
    student = replace(teacher, kind=needs.kind, method=args.method)
    rounds = rounds_of(args.method, options, student, args.lpips_net)
    folders = [state if len(rounds) == 1 else state / one.name.replace(" ", "-") for one in rounds]

    def start_student() -> None:
        student.found_tokenizer()  # to be saved along
        student.unet = student_of(teacher, args.method, needs, start, args.seed).unet
        if drawer is not teacher:
            teacher.unet = student.unet  # so that no other is held
        for network in (student.unet, student.vae.decoder):
            network.gradient_checkpointing = args.gradient_checkpointing
        if args.compile:
            student.compile()

    def train_on(one, folder, pairs, train: Callable = train, watch: Callable | None = None):
        train_round(student, velocity, one, needs, pairs, folder, settings, dtype, watch, train)

    stages = [Stage(one.name, one.options, partial(train_on, one, folder))
              for one, folder in zip(rounds, folders)]
    print(plan(teacher, prompts, description, args.pairs, stages, "unet",
               args.gradient_checkpointing))
    velocity = guide(drawer, description["guidance"])
    if args.compile:
        drawer.compile()
    at_once = args.teacher_batch_size
    parts = [(folder, one.options, settings) for folder, one in zip(folders, rounds)]
    done = is_finished(args.out, parts, dtype)
    if args.dry_run:
        a_pair = time_of_pairs(drawer, prompts, description, at_once)
        start_student()
        updates = []
        for stage in stages:
            updates.append(time_of_update(stage, description, prompts))
            velocity = next_teacher(args.method, student, velocity)
        count = 0 if needs.data == "prompts" else description["count"]
        print(forecast(a_pair, count, stages, updates))
        return
    size = checkpoint.file_size(teacher.unet, teacher.vae, teacher.text_encoder)
    check_output(args.out, needed=size * (len(rounds) + args.keep))
    keep_others_out(state)
    if done:
        print(f"{args.out}: finished already, {args.iterations} iterations")
        return

    if needs.data == "prompts":
        pairs = Prompts(description, prompts)
    else:
        pairs = make_pairs(drawer, prompts, description, args.pairs, at_once, args.repair)
    if args.method == "re-meanflow":
        rounds[0].loss = of_shorter_pairs(pairs)
    watch = watch_for(args, drawer, shown, held_out or prompts, description,
                      partial(held_out_batches, needs, args.seed), state)
    start_student()
    if watch:
        watch.model, watch.finished = student, finished
    for k, stage in enumerate(stages):
        stage.train(pairs, watch=watch)
        plot_loss(folders[k])
        if stage is stages[-1]:
            break
        if watch:
            watch.before += stage.options.iterations
        if args.method == "progressive":
            steps = progressive.ROUNDS[k]
            checkpoint.save(student, f"{args.out.removesuffix('.safetensors')}-{steps}.safetensors")
        velocity = next_teacher(args.method, student, velocity)
    checkpoint.save(finished(student), args.out)
    print(f"{args.out}: a model by {args.method}, drawn in {student.steps} "
          f"step{'s' * (student.steps > 1)} where no other number is asked for; its loss is in "
          f"{state}")


if __name__ == "__main__":
    run(main)
