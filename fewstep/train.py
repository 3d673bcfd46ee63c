"""Train a few-step model by one of the methods beside InstaFlow, on the same pairs.

    python fewstep/train.py --method perflow                    the tiny model, minutes on a laptop
    python fewstep/train.py --method lcm --teacher sd14.safetensors --prompts captions.txt

Teacher, pairs, loop and options are those of reflow.py; a method is its loss:

    perflow               straighten the path window by window, from pictures
    progressive           one step learns what two do, in rounds of 8, 4, 2 and 1 steps
    lcm, mlcm, scott      consistency: every point of a path must see the same end
    rectified-diffusion   reflow that keeps Stable Diffusion's noise prediction and schedule
    re-meanflow           the mean velocity of a whole step, on pairs; a second time as input
    hipa                  a LoRA for the single step, asked for its high frequencies
    freeflow              follow the teacher's path from noise alone

What they need differs (`NEEDS`): own pairs (X0 and the X1 that it leads to), pictures (an X1, with
fresh noise) or prompts alone; a frozen target; rounds. All learn the teacher's guidance and are
drawn without. OUT says how (stable_diffusion.METHODS), so sample.py and evaluate.py take it as any
other; the rounds of progressive distillation before the last lie beside it as OUT-8, OUT-4, OUT-2.

Unlike reflow.py's, the rate falls over the last 60 % of each round and the averages forget their
start at Stable Diffusion's size too; these methods' papers train for a hundredth of its samples.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from command import BadInput, ByModel, Parser, pick_device, run, settle
from diffusion import diffusion_velocity
from distill import FITS_LPIPS, perceptual_distance
from fewstep import (
    consistency, freeflow, hipa, lora, meanflow, perflow, progressive, rectified_diffusion,
)
from fewstep.steps import SCHEDULE
from pairs import Pairs, pairs_asked
from rectified_flow import Velocity, flow_velocity, guided, mean_velocity, squared
from reflow import FITS, TINY_PAIRS, add_options
from stable_diffusion import StableDiffusion
from training import (
    TrainingOptions, autocast_dtype, generator_for, options_from, shuffled, train,
)
from unet import started_from
from watch import Stage, plain_batches, train_in_stages


@dataclass(frozen=True)
class Needs:
    """What a method's loss asks for, beside its student."""

    loss: Callable  # loss(student, x0, x1, context, *random, teacher=, target=)
    draw: Callable  # draw(count, generator): what is random in a sample, beside its noise
    kind: str  # what the student predicts: noise as Stable Diffusion ("diffusion"), or a velocity
    data: str  # "pairs", "pictures" with fresh noise, or "prompts" alone
    teacher: bool = True  # does it ask the frozen teacher?
    target: str = ""  # a velocity without gradient: of the "student" itself, or the "averaged" one
    second_time: bool = False
    rate: float = 1e-6  # of Stable Diffusion where no other is published: reflow's

    @property
    def start(self) -> str:
        """What the student's weights begin as: the teacher's, as --init says it."""
        return "negated" if self.kind == "flow" else "teacher"


NEEDS = {
    "perflow": Needs(perflow.loss, perflow.draw, "diffusion", "pictures", rate=8e-5),
    "progressive": Needs(progressive.loss, progressive.draw, "flow", "pictures"),
    "lcm": Needs(consistency.lcm, consistency.draw_lcm, "diffusion", "pictures",
                 target="averaged"),
    "mlcm": Needs(consistency.mlcm_segments, consistency.draw_mlcm, "diffusion", "prompts",
                  target="student"),
    "scott": Needs(consistency.scott, consistency.draw_scott, "diffusion", "pictures",
                   target="averaged"),
    "rectified-diffusion": Needs(rectified_diffusion.loss, rectified_diffusion.draw, "diffusion",
                                 "pairs", teacher=False, rate=5e-6),
    "re-meanflow": Needs(meanflow.loss, meanflow.draw, "flow", "pairs", teacher=False,
                         target="student", second_time=True),
    # Its addition begins at zero, so it has further to go.
    "hipa": Needs(hipa.loss, lambda count, generator: (), "diffusion", "pairs", teacher=False,
                  rate=1e-4),
    "freeflow": Needs(freeflow.loss, freeflow.draw, "flow", "prompts", target="student",
                      second_time=True),
}
LONGEST, MEASURED = 0.9, 1000  # Re-MeanFlow keeps this share of the pairs, by the first thousand


class Prompts:
    """In place of pairs for methods that need prompts alone: what is drawn, and no picture."""

    def __init__(self, prompts: list[str]):
        self.prompts = prompts

    def batch(self, samples: Tensor, seed: int) -> tuple[Tensor, Tensor, list[str]]:
        none = torch.empty(len(samples), 0)
        numbers = shuffled(samples, len(self.prompts), seed).tolist()
        return none, none, [self.prompts[number] for number in numbers]


# --------------------------------------------------------------------------------------------------
# A method's trainings


@dataclass
class Round:
    """One training of a method: most have one."""

    name: str
    options: TrainingOptions
    loss: Callable  # as Needs.loss
    method: str  # of the model that it makes
    part: str  # its folder within the method's
    end: str = ""  # of its model's name, where that is another than the method's
    before: int = 0  # updates of earlier rounds
    settings: dict = field(default_factory=dict)  # what else decides it


def rounds_of(method: str, options: TrainingOptions, needs: Needs) -> list[Round]:
    """The trainings of a method, `options.iterations` and its warm-up in all."""
    losses = {method: needs.loss}
    if method == "progressive":
        losses = {f"{steps} steps": partial(needs.loss, steps=steps,
                                            diffusion=steps == progressive.ROUNDS[0])
                  for steps in progressive.ROUNDS}
    elif method == "mlcm":
        losses = {"segments": needs.loss, "edges": consistency.mlcm_edges}
    each, left = divmod(options.iterations, len(losses))
    options = replace(options, warmup_samples=options.warmup_samples // len(losses))
    if not each:
        raise BadInput(f"--iterations {options.iterations}: {method} trains in {len(losses)} "
                       "rounds; give at least one for each")
    rounds = []
    for k, (name, loss) in enumerate(losses.items()):
        part = name.replace(" ", "-") if len(losses) > 1 else ""
        rounds.append(Round(name, replace(options, iterations=each), loss, method, part,
                            before=k * each, settings={"before": k * each}))
    rounds[-1].options = replace(options, iterations=each + left)
    if method == "progressive":
        for one, steps in zip(rounds[:-1], progressive.ROUNDS):
            one.end = f"-{steps}"
            one.method = method + one.end
    return rounds


def student_of(
    teacher: StableDiffusion, method: str, needs: Needs, start=None, seed: int = 0,
) -> StableDiffusion:
    """A copy of the teacher as the method's student. start: as for `started_from`, or its own."""
    unet = started_from(copy.deepcopy(teacher.unet), start or needs.start, teacher.kind, seed)
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


def next_teacher(student: StableDiffusion, teacher: Velocity | None) -> Velocity | None:
    """Who teaches after this student's round: it does where progressive distillation goes on."""
    if not student.method.startswith("progressive-"):
        return teacher
    return flow_velocity(copy.deepcopy(student.unet).requires_grad_(False))


def of_shorter_pairs(loss: Callable, pairs: Pairs) -> Callable:
    """The loss of Re-MeanFlow without the tenth of the pairs that is longest."""
    x0, x1, _ = pairs[torch.arange(min(MEASURED, len(pairs)))]
    return partial(loss, longest=squared(x0, x1).quantile(LONGEST).item())


def of_pictures(model: StableDiffusion, net: str, trained: bool = True) -> Callable:
    """The loss of HiPA on this model's pictures. net, trained: as for `perceptual_distance`."""
    distance = perceptual_distance(net, model.device, trained)
    model.vae.requires_grad_(False)
    decode = lambda latents: model.vae.decode(latents.float())
    return partial(hipa.loss, decode=decode, distance=distance)


def velocity_of(unet, needs: Needs) -> Callable:
    """The student's network as the velocity that its method's loss takes."""
    if needs.second_time:
        return mean_velocity(unet)
    return diffusion_velocity(unet, SCHEDULE) if needs.kind == "diffusion" else flow_velocity(unet)


def train_round(
    model: StableDiffusion, teacher: Velocity | None, one: Round, needs: Needs,
    pairs: Pairs | Prompts, folder: Path, settings: dict, dtype: torch.dtype,
    watch: Callable | None = None, train: Callable = train,
) -> None:
    """Train model.unet, in place. pairs: of the teacher, or prompts; the rest as for `train`."""
    averaged, shape = None, model.latent_shape()
    model.method = one.method
    if needs.target == "averaged":
        averaged = copy.deepcopy(model.unet).requires_grad_(False)
    seen = one.before * one.options.batch_size  # samples of earlier rounds

    def draw(samples: Tensor, share: slice, generator: torch.Generator) -> tuple:
        samples = samples + seen
        if seen:  # the loop counts each round from 0, which would bring the first round's noise
            step = int(samples[0]) // one.options.batch_size
            generator = generator_for(one.options.seed, step)
        noise = torch.randn(len(samples), *shape, generator=generator)[share]
        random = [numbers[share] for numbers in needs.draw(len(samples), generator)]
        x0, x1, prompts = pairs.batch(samples[share], one.options.seed)
        return x0 if needs.data == "pairs" else noise, x1, prompts, *random

    def loss(unet, x0: Tensor, x1: Tensor, prompts: list[str], *random: Tensor) -> tuple:
        frozen = {"teacher": teacher} if needs.teacher else {}
        if needs.target:
            bare = getattr(unet, "module", unet)  # not the processes' wrapper of it
            frozen["target"] = velocity_of(averaged or bare, needs)
        context = model.encode_prompts(prompts)
        return one.loss(velocity_of(unet, needs), x0, x1, context, *random, **frozen), None

    train(model.unet, draw, loss, one.options, folder, settings | one.settings, one.name, dtype,
          watch, averaged=averaged)


def held_out_batches(needs: Needs, seed: int, pairs: Pairs, size: int) -> tuple[list, list]:
    """Held-out pairs as a method's loss takes them, with what is random in them."""
    batches = []
    for k, (x0, x1, prompts) in enumerate(plain_batches(pairs, size)[0]):
        generator = generator_for(seed, -1 - k)  # of no update
        noise = torch.randn(x0.shape, generator=generator)
        random = needs.draw(len(x0), generator)
        batches.append((x0 if needs.data == "pairs" else noise, x1, prompts, *random))
    return batches, []


# --------------------------------------------------------------------------------------------------
# The command


def arguments():
    parser = Parser("Train a few-step model by one of the methods beside InstaFlow.")
    parser.add_argument("--method", choices=NEEDS, required=True)
    parser.add_argument("--lpips-net", choices=["vgg", "alex", "squeeze", "random", "efficientnet"],
                        default=ByModel("vgg", "random"), help="of hipa")
    add_options(parser)
    parser.set_defaults(out=None, init=None, iterations=ByModel(10_000, 600), cooldown=0.6,
                        ema_ramp=0.05)
    return parser.parse_args()


def main():
    args = arguments()
    args.out = args.out or f"runs/{args.method}.safetensors"
    needs, device = NEEDS[args.method], pick_device(args.device)
    teacher = checkpoint.load(args.teacher, device, torch.float32, args.kind, args.tokenizer)
    settle(args, teacher.is_tiny)
    if teacher.kind != "diffusion":
        raise BadInput(f"{args.teacher}: of kind {teacher.kind}; give a diffusion as --teacher")
    if needs.target == "averaged" and args.ema_device:
        raise BadInput(f"--ema-device: the averaged network is {args.method}'s target at every "
                       "update; leave it away")
    if args.init == "negated" and needs.kind == "diffusion":
        raise BadInput(f"--init negated: is a start for velocities, and {args.method} predicts "
                       "noise; leave it away")
    args.init = args.init or needs.start
    init, init_name = checkpoint.load_start(args.init, teacher)
    prompts, held_out, description = pairs_asked(teacher, args, "reflow", TINY_PAIRS)

    rate = args.learning_rate
    if rate is None:
        rate = 5e-4 if teacher.is_tiny else needs.rate
    fits = FITS_LPIPS if args.method == "hipa" else FITS
    fits = args.batch_size if teacher.is_tiny else fits
    options = options_from(args, args.iterations, args.batch_size, rate, args.accumulate, fits)
    dtype = autocast_dtype(args.dtype, device, teacher.unet)
    paired = needs.data != "prompts"
    data = description if paired else {
        name: description[name] for name in ("teacher_hash", "guidance", "prompts_hash")}
    settings = {"method": args.method, "pairs": data, "init": init_name}
    if args.method == "hipa":
        settings["net"] = args.lpips_net
    student = replace(teacher, kind=needs.kind, method=args.method)
    rounds = rounds_of(args.method, options, needs)
    if args.method == "hipa":
        rounds[0].loss = of_pictures(student, args.lpips_net, trained=not args.dry_run)
    state, velocity = Path(args.out + ".state"), None

    def start(drawer: StableDiffusion) -> torch.nn.Module:
        nonlocal velocity
        if needs.teacher:
            velocity = guide(drawer, description["guidance"])
        return student_of(teacher, args.method, needs, init, args.seed).unet

    def train_on(one, folder, pairs, train: Callable = train, watch: Callable | None = None):
        nonlocal velocity
        if args.method == "re-meanflow":
            one.loss = of_shorter_pairs(needs.loss, pairs)
        train_round(student, velocity, one, needs, pairs, folder, settings, dtype, watch, train)
        velocity = next_teacher(student, velocity)

    stages, stem = [], args.out.removesuffix(".safetensors")
    for one in rounds:
        folder, out = state / one.part, f"{stem}{one.end}.safetensors"
        train_one = partial(train_on, one, folder)
        stages.append(Stage(one.name, one.options, train_one, folder, settings | one.settings, out))
    if train_in_stages(
        args, stages, teacher, student, start, (prompts, held_out, description),
        partial(held_out_batches, needs, args.seed), dtype,
        pairs=None if paired else Prompts(prompts), finished=finished,
    ):
        print(f"{args.out}: a model by {args.method}, drawn in {student.steps} "
              f"step{'s' * (student.steps > 1)} where no other number is asked for; its loss is in "
              f"{state}")


if __name__ == "__main__":
    run(main)
