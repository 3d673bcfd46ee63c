"""A long run that sees where it is going: the plan before it, and at every save what was learned.

    python reflow.py --teacher sd14.safetensors --dry-run      the plan, timed; writes nothing

The plan counts prompts, pairs, updates and memory, and forecasts days from the time of one batch of
pairs and of one update. During the run, before the first update and at every saved state, `Watch`
looks at the averaged weights:

    held_out_loss          the run's own loss on pairs of captions and noises that nothing is
                           trained on, at fixed t, and by t
    straightness           of the paths on the validation prompts (evaluation/figures.py)
    OUT.state/samples/     the same prompts and noises in 1, 4 and 25 steps, beside the teacher
    OUT                    the model as it is by then, so that sample.py and evaluate.py can read it

`train_in_stages` is the walk of reflow.py, distill.py and fewstep/train.py through all of it.

The captions are the last hundredth of the list, which no pair for training is made from; their
pairs lie in the pairs' folder as held-out/.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
from command import (
    BadInput, ByModel, check_output, keep_others_out, not_negative, pick_dtype, refuse_overwriting,
    world_size, write_whole,
)
from evaluation.figures import straightness_figures
from evaluation.plots import in_steps, save_comparison
from pairs import PAIRS_PER_SHARD, Pairs, described_prompts, make_pairs, shard_path
from sample import (
    draw_latents, draw_pictures, drawn_at_once, parts, read_prompts, seeds_in,
)
from stable_diffusion import StableDiffusion
from training import (
    TIME_BINS, TrainingOptions, explained, generator_for, is_finished, new_run, plot_loss,
    saved_progress, shared_by_processes, tell_what_is_kept, to_device, update,
)

TIMED = 3  # updates of a dry run
STEPS = (1, 4, 25)  # of the pictures; a one-step model takes 1
PICTURED = 8  # validation prompts
VALIDATION_PAIRS = ByModel(64, 128)
LOOKED_AT_ONCE = 64  # held-out pairs that pass the network together; 4 at 512 px
DAY = 24 * 3600
# Bytes a parameter on a device, fp32: weights, gradients, two moments; the average, if it is there.
FIXED, AVERAGE = 16, 4
# GB of activations a sample at 512 px in bf16, without and with checkpointing, by
# benchmarks/README.md.
ACTIVATIONS = {("unet", False): 0.97, ("unet", True): 0.36, ("stacked", False): 1.93,
               ("stacked", True): 0.38, ("unet lpips", False): 7.5, ("unet lpips", True): 4.1,
               ("stacked lpips", False): 8.4, ("stacked lpips", True): 4.2}


def add_watch_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("seeing where it goes").add_argument
    add("--dry-run", action="store_true",
        help="print the plan, time one batch of pairs and one update, and write nothing")
    add("--validation-pairs", type=not_negative, default=VALIDATION_PAIRS,
        help="pairs of held-out captions and noises that the loss is measured on at every save; "
             "0: nothing is looked at, and OUT is written at the end alone")
    add("--validation-prompts",
        help=f"file whose first {PICTURED} prompts are drawn at every save; default: held-out "
             "captions")
    add("--keep", type=not_negative, default=0,
        help="models of earlier saves to keep in OUT.state/models/, beside the last")


# --------------------------------------------------------------------------------------------------
# Before the run


@dataclass
class Stage:
    """One training of a command."""

    name: str
    options: TrainingOptions
    train: Callable  # train(pairs, with this in place of training.train, watch)
    folder: Path  # of its state
    settings: dict  # what else decides it
    out: str  # the model after it


def plan(
    model: StableDiffusion, prompts: list[str], description: dict, folder: str,
    stages: list[Stage], student: str, checkpointing: bool, paired: bool = True,
) -> str:
    """What a run is going to do, in lines. paired: does it train on pairs?"""
    count, size = description["count"], torch.Size(description["latent_shape"]).numel()
    shards = range(-(-count // PAIRS_PER_SHARD))
    there = sum(shard_path(Path(folder), i).exists() for i in shards)
    lines = [
        f"plan: {len(prompts):,} prompts of {description['prompts']}, each used "
        f"{count / len(prompts):.3g} times",
        f"plan: {count:,} pairs of {description['steps']} steps at guidance "
        f"{description['guidance']:g}, {2 * count * size / 1e9:.3g} GB in {folder}, "
        f"{there} of {len(shards)} shards are there",
    ] if paired else [f"plan: {len(prompts):,} prompts of {description['prompts']}, and no pairs"]
    count_of = lambda *networks: sum(p.numel() for n in networks for p in n.parameters())
    parameters = count_of(model.unet)
    if student == "stacked":  # without the joint of the two
        unet = model.unet
        parameters += parameters - count_of(unet.conv_norm_out, unet.conv_out, unet.conv_in)
    for stage in stages:
        options = stage.options
        samples, at_once = options.iterations * options.batch_size, samples_at_once(options)
        memory = (FIXED + AVERAGE * (options.ema_device is None)) * parameters / 1e9
        text = f"{memory:.3g} GB of weights, gradients, moments and averages"
        if not model.is_tiny:
            each = ACTIVATIONS[student + " lpips" * (stage.name == "LPIPS"), checkpointing]
            text += f" and {each * at_once:.3g} GB of activations at 512 px in bf16"
        lines.append(
            f"plan: {stage.name}, {options.iterations:,} updates of {options.batch_size}, "
            f"{samples:,} samples, each {'pair' if paired else 'prompt'} "
            f"{samples / (count if paired else len(prompts)):.3g} times; {parameters:,} "
            f"parameters, {at_once} at once: {text} on each of {world_size()} devices"
        )
    return "\n".join(lines)


def samples_at_once(options: TrainingOptions) -> int:
    """Samples that pass the network together on one device."""
    return max(1, min(-(-options.batch_size // options.accumulate),
                      options.batch_size // world_size()))


class PretendedPairs:
    """Random latents in place of pairs that are not made yet."""

    def __init__(self, description: dict, prompts: list[str]):
        self.shape, self.prompts = tuple(description["latent_shape"]), prompts
        self.description = description

    def __len__(self) -> int:
        return self.description["count"]

    def __getitem__(self, samples: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        return self.batch(samples, 0)

    def batch(self, samples: Tensor, seed: int) -> tuple[Tensor, Tensor, list[str]]:
        x0, x1 = torch.randn(2, len(samples), *self.shape)
        return x0, x1, [self.prompts[int(k) % len(self.prompts)] for k in samples]


def time_of_pairs(
    teacher: StableDiffusion, prompts: list[str], description: dict, batch_size: int | None,
) -> float:
    """Seconds that a pair takes on this device."""
    how = (description["steps"], description["guidance"], "", description["solver"])
    at_once = batch_size or drawn_at_once(teacher.latent_shape())
    some = [prompts[k % len(prompts)] for k in range(at_once)]
    seeds = range(description["first_seed"], description["first_seed"] + at_once)
    for _ in range(2):  # the first is slower
        started = time.monotonic()
        draw_latents(teacher, some, seeds, *how, batch_size=at_once)
    return (time.monotonic() - started) / at_once


def time_of_update(stage: Stage, description: dict, prompts: list[str]) -> float:
    """Seconds that an update of the stage takes, by the loop's own."""
    seconds = []

    def timed(network, draw, loss, options, folder, settings, name, dtype, watch=None, **more):
        run = new_run(network, options, Path(folder), settings, name, dtype)
        shared, share = shared_by_processes(network), slice(0, options.batch_size // world_size())
        samples = torch.arange(options.batch_size)
        network.train()
        with explained(name, Path(folder), options):
            for step in range(TIMED):
                started = time.monotonic()
                batch = draw(samples, share, generator_for(options.seed, step))
                losses, *_ = update(run, shared, loss, to_device(batch, run.device))
                torch.cat(losses).sum().item()  # waits for the device
                seconds.append(time.monotonic() - started)

    stage.train(PretendedPairs(description, prompts), timed)
    return min(seconds)  # the first are slower


def forecast(a_pair: float, count: int, stages: list[Stage], updates: list[float]) -> str:
    """What all of it takes, at these seconds a pair on a device and an update of each stage."""
    devices = world_size()
    total = a_pair * count / devices
    lines = [f"forecast: {1 / a_pair:.3g} pairs a second on a device, {spoken(total)} for all"]
    for stage, seconds in zip(stages, updates):
        spent = seconds * stage.options.iterations
        total += spent
        lines.append(f"forecast: {seconds:.3g} s an update of {stage.name}, {spoken(spent)}")
    lines.append(f"forecast: {spoken(total)} in all on {devices} device{'s' * (devices > 1)}, "
                 f"{total * devices / DAY:.3g} device-days, without looking and saving")
    return "\n".join(lines)


def spoken(seconds: float) -> str:
    for unit, name in ((DAY, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} seconds"


# --------------------------------------------------------------------------------------------------
# The run


def train_in_stages(
    args: argparse.Namespace, stages: list[Stage], teacher: StableDiffusion,
    student: StableDiffusion, start: Callable, asked: tuple, batches_of: Callable,
    dtype: torch.dtype, network: str = "unet", pairs=None, finished: Callable = lambda model: model,
) -> bool:
    """Plan, pairs and stages: what commands do once they have said what a stage is.

    student: the model that the stages train, in place; start(teacher in the dtype of its pairs) is
    its network. asked: by `pairs_asked`. batches_of: as for `watch_for`. network: "unet" or
    "stacked". pairs: in place of the teacher's. finished(student): as it is to be saved.
    False where nothing is trained, as for --dry-run; BadInput for whatever is in the way.
    """
    prompts, held_out, description = asked
    ran = [stage for stage in stages if stage.options.iterations]
    for stage in ran:
        refuse_overwriting(stage.out, {"--teacher": args.teacher, "--init": args.init})
    shown = validation_prompts(args, prompts, held_out)
    for stage in ran:
        tell_what_is_kept(stage.options)
    paired = pairs is None
    print(plan(teacher, prompts, description, args.pairs, ran, network,
               args.gradient_checkpointing, paired))
    done = is_finished(args.out, [(one.folder, one.options, one.settings) for one in ran], dtype)
    # A stage that is not asked for now may have written OUT.
    done &= not any(saved_progress(one.folder)["step"] for one in stages
                    if not one.options.iterations)

    drawer = teacher.in_dtype(pick_dtype(args.dtype, teacher.device))
    if args.compile:
        drawer.compile()
    if args.dry_run:
        a_pair = time_of_pairs(drawer, prompts, description, args.teacher_batch_size)
        begin(args, teacher, student, start(drawer))
        del drawer
        updates = [time_of_update(stage, description, prompts) for stage in ran]
        print(forecast(a_pair, description["count"] if paired else 0, ran, updates))
        return False
    halves = 2 if network == "stacked" else 1
    size = checkpoint.file_size(*[teacher.unet] * halves, teacher.vae, teacher.text_encoder)
    models = len({stage.out for stage in ran}) + args.keep
    state = Path(args.out + ".state")
    check_output(args.out, needed=size * models)
    keep_others_out(state)
    if done:
        updates = " + ".join(f"{stage.options.iterations:,}" for stage in ran)
        print(f"{args.out}: finished already, {updates} iterations")
        return False

    if paired:
        pairs = make_pairs(drawer, prompts, description, args.pairs, args.teacher_batch_size,
                           args.repair)
    captions = held_out or prompts
    watch = watch_for(args, drawer, shown, captions, description, batches_of, state)
    begin(args, teacher, student, start(drawer))
    del drawer
    if watch:
        watch.model, watch.finished = student, finished
    for stage in ran:
        stage.train(pairs, watch=watch)
        checkpoint.save(finished(student), stage.out)
        plot_loss(stage.folder)
        if watch:
            watch.before += stage.options.iterations
    return True


def begin(
    args: argparse.Namespace, teacher: StableDiffusion, student: StableDiffusion,
    unet: torch.nn.Module,
) -> None:
    """Give the student its network, and the teacher's up."""
    student.found_tokenizer()  # to be saved along
    student.unet = teacher.unet = unet  # so that no other is held
    for one in (student.unet, student.vae.decoder):
        one.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        student.compile()


# --------------------------------------------------------------------------------------------------
# What looks at it


@dataclass
class Watch:
    """Looks at a run's averaged weights: watch(step, loss), as training.train calls it."""

    batches: list[tuple]  # held-out pairs as the loss takes them
    times: list[float]  # the t of each batch, none where the loss has no t
    prompts: list[str]
    seeds: range
    teacher: Tensor  # its pictures of them
    teacher_steps: int
    out: str
    folder: Path  # OUT.state
    keep: int
    at_once: int | None  # pictures drawn at once
    model: StableDiffusion | None = None  # the student, as the kind that it is to become
    before: int = 0  # updates of earlier stages
    finished: Callable = lambda model: model  # the student, as it is to be saved

    @torch.no_grad()
    def __call__(self, step: int, loss: Callable) -> dict:
        by_t = {}
        for batch, t in zip(self.batches, self.times or [None] * len(self.batches)):
            batch = tuple(c.to(self.model.device) if isinstance(c, Tensor) else c for c in batch)
            by_t.setdefault(t, []).append(loss(self.model.unet, *batch)[0].float().cpu())
        means = [torch.cat(losses).mean().item() for losses in by_t.values()]
        figures = {"held_out_loss": sum(means) / len(means),
                   "held_out_loss_by_t": means if self.times else []}
        model = self.finished(self.model)
        rows = [(f"teacher\n{in_steps(self.teacher_steps)}", self.teacher)]
        for steps in [number for number in STEPS if model.takes(number)] or [model.steps]:
            pictures = draw_pictures(
                model, self.prompts, self.seeds, steps, batch_size=self.at_once
            )
            rows.append((f"{self.before + step:,} updates\n{in_steps(steps)}", pictures))
        path = self.folder / "samples" / f"{self.before + step:07d}.png"
        save_comparison(str(path), rows, self.prompts)
        if model.kind != "one-step" and not model.method:
            straight = straightness_figures(model, self.prompts, self.seeds, model.guidance)
            figures["relative_straightness"] = straight["relative_straightness"]
        if step:
            self.save(model, self.before + step)
        return figures

    def save(self, model: StableDiffusion, step: int) -> None:
        """The model as it is: OUT, and OUT of earlier saves."""
        checkpoint.save(model, self.out)
        if self.keep:
            models = self.folder / "models"
            write_whole(models / f"{step:07d}.safetensors",
                        lambda path: shutil.copyfile(self.out, path))
            for old in sorted(models.glob("*.safetensors"))[: -self.keep - 1]:
                old.unlink()


def validation_prompts(
    args: argparse.Namespace, prompts: list[str], held_out: list[str],
) -> list[str]:
    """What is drawn at every save, before any work. BadInput: no such file, too many pairs."""
    if not args.validation_pairs:
        for flag, given in (("--validation-prompts", args.validation_prompts),
                            ("--keep", args.keep)):
            if given:
                raise BadInput(f"{flag}: nothing is looked at with --validation-pairs 0; "
                               "leave one of them away")
        return []
    seeds_in("validation", args.seed, args.validation_pairs + PICTURED)
    if args.validation_prompts:
        return read_prompts(args.validation_prompts, args.prompt_column)[:PICTURED]
    every = held_out or prompts
    pictured = min(PICTURED, len(every))
    return [every[k * len(every) // pictured] for k in range(pictured)]


def watch_for(
    args: argparse.Namespace, teacher: StableDiffusion, shown: list[str], captions: list[str],
    description: dict, batches_of: Callable, folder: Path,
) -> Watch | None:
    """What looks at a run, all but its model.

    teacher: in the dtype of the pairs. shown: prompts to draw; captions: of the held-out pairs.
    batches_of(pairs, size): those as the run's loss takes them, and the t of each batch, or none.
    """
    count = args.validation_pairs
    if not count:
        return None
    asked = description | described_prompts(captions, f"{description['prompts']}, held out") | {
        "first_seed": seeds_in("validation", args.seed, count)[0], "count": count,
    }
    pairs = make_pairs(teacher, captions, asked, Path(args.pairs) / "held-out",
                       args.teacher_batch_size, args.repair)
    seeds = seeds_in("validation", args.seed, len(shown), start=count)
    at_once = None if teacher.is_tiny else 1  # beside a training, there is not much room
    pictures = draw_pictures(teacher, shown, seeds, description["steps"], description["guidance"],
                             batch_size=at_once)
    batches, times = batches_of(pairs, LOOKED_AT_ONCE if teacher.is_tiny else 4)
    return Watch(batches, times, shown, seeds, pictures, description["steps"], args.out, folder,
                 args.keep, at_once)


def batches_by_time(pairs: Pairs, size: int) -> tuple[list[tuple], list[float]]:
    """Held-out pairs as reflow's loss takes them, at fixed t."""
    batches, times = [], []
    for (x0, x1, prompts) in plain_batches(pairs, size)[0]:
        for k in range(TIME_BINS):
            t = (k + 0.5) / TIME_BINS
            batches.append((x0, x1, torch.full((len(x0),), t), prompts))
            times.append(t)
    return batches, times


def plain_batches(pairs: Pairs, size: int) -> tuple[list[tuple], list[float]]:
    """Held-out pairs as distillation's loss takes them."""
    return [pairs[torch.arange(len(pairs))[part]] for part in parts(len(pairs), size)], []
