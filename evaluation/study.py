"""What studies of the tiny models share: seeds, pairs and models on disk, rows that resume, tables.

A study trains and measures several models for each seed. A row is written as soon as it is
measured; pairs, models and training states stay in OUT/seed-SEED. Stop a study and run it again: it
continues at the first missing row. The captions and noises of the evaluation are held out from all
pairs.
"""

import argparse
import functools
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

import checkpoint
from command import (
    HERE, TINY_TEACHER, BadInput, NotFinite, Parser, add_machine_options, at_least, check_output,
    check_same_settings, fraction, lock_folder, note, pick_dtype, positive, read_our_json,
    solver_steps, write_json,
)
from evaluate import NUM_SHOWN
from evaluation.figures import FEWEST_SAMPLES, machine_name
from evaluation.judge import EvaluationSet, judged_set, load_judge
from evaluation.plots import save_comparison
from pairs import Pairs, make_pair_spec, make_pairs
from rectified_flow import flow_velocity, one_step
from sample import run_seed, sample_images, seed_range
from stable_diffusion import FAMILIES, TOY, StableDiffusion, initial_student
from training import TrainingOptions, autocast_dtype

CAPTIONS = {  # values of --captions, and the function in toy/shapes.py that makes them
    "open": "open_captions", "full": "full_captions", "single": "single_captions",
    "mixed": "random_captions", "emoji": None,
}
ONE_STEP = {"shapes": "tiny_instaflow.safetensors", "emoji": "tiny_emoji_instaflow.safetensors"}
NUM_CAPTIONS = 1000  # of the pairs; some occur more than once
# Purpose of the noises of a teacher's pairs, by its file: no model is sampled where it was trained.
# The diffusions' pairs serve all seeds.
PURPOSE_OF = {"tiny_sd": "reflow", "tiny_emoji": "reflow", "2rf": "second reflow",
              "3rf": "distillation"}
RATES = (1e-4, 5e-4, 2e-3)  # learning rates to choose from
LOWER, HIGHER = 2e-5, 8e-3  # tried where the best lies at the grid's edge
TUNING_SEED = 100  # of the choice; reported nowhere
WARMUP = 0.06  # fraction of a training, in studies of trainings of several lengths
# Flags that decide the results of a table.
SETTINGS = ("iterations", "batch_size", "cooldown", "num_pairs", "teacher_steps", "captions",
            "held_out", "num_samples", "passes", "learning_rate", "dtype")


load_dataset = functools.cache(load_judge)


def dataset_of(captions: str) -> tuple[ModuleType, str]:
    """The dataset in toy/ with captions of this name, and its teacher's path."""
    family = "emoji" if captions == "emoji" else "shapes"
    teacher = str(TOY / "tiny_emoji.safetensors") if family == "emoji" else TINY_TEACHER
    return load_dataset(str(FAMILIES[family].judge)), teacher


@functools.cache
def captions_of(name: str, count: int, seed: int, measuring: bool) -> list:
    """Captions of this name, to measure on or to train on."""
    dataset, _ = dataset_of(name)
    make = dataset.measuring_captions if measuring else dataset.training_captions
    if name == "emoji":
        return make(count, seed)
    return make(count, seed, getattr(dataset, CAPTIONS[name]))


@dataclass
class Study:
    """One seed of a study, with the rows of all seeds."""

    seed: int
    folder: Path
    args: argparse.Namespace
    device: torch.device
    evaluation_set: EvaluationSet | None
    rows: list[dict]
    write: Callable[[], None]  # writes the rows to disk
    # Rows of the image sheet: label, model, number of steps.
    shown: list[tuple[str, StableDiffusion, int]] = field(default_factory=list)

    def load(self, path: str | Path) -> StableDiffusion:
        """A model to sample from, in --dtype."""
        return checkpoint.load(path, self.device, pick_dtype(self.args.dtype, self.device))

    def load_teacher(self) -> StableDiffusion:
        """The dataset's diffusion. BadInput: a --dtype that nothing can train in."""
        teacher = self.load(dataset_of(self.args.captions)[1])
        autocast_dtype(self.args.dtype, self.device, teacher.unet)
        return teacher

    def new_student(self, source: StableDiffusion, init: str = "negated") -> StableDiffusion:
        """The source in fp32, with a student's initial weights (`initial_student`)."""
        model = checkpoint.load(source.path, self.device)
        model.unet = initial_student(model.unet, init, model.kind, self.seed)
        return model

    def options(
        self, network: nn.Module, iterations: int, name: str, learning_rate: float = 5e-4,
        warmup: float | None = None,
    ) -> TrainingOptions:
        """As reflow.py and distill.py train tiny models; a shorter warm-up, for shorter runs.

        warmup: as a fraction of the training; None: 1,600 samples.
        """
        samples = 1_600 if warmup is None else round(warmup * iterations * self.args.batch_size)
        return TrainingOptions(
            iterations, self.args.batch_size, learning_rate=learning_rate, warmup_samples=samples,
            cooldown=self.args.cooldown, ema_half_life=10_000, ema_ramp=0.05, save_every=500,
            seed=self.seed, dtype=autocast_dtype(self.args.dtype, self.device, network), name=name,
        )

    def pairs_of(
        self, teacher: StableDiffusion, held_out: bool = False, guidance: float | None = None,
    ) -> Pairs:
        """The pairs of this teacher, made if they are missing. guidance None: the teacher's own."""
        shared, stem = teacher.kind == "diffusion", Path(teacher.path).stem
        folder, seed = (self.folder.parent, 0) if shared else (self.folder, self.seed)
        name, count, purpose = "pairs", self.args.num_pairs, PURPOSE_OF[stem]
        if held_out:
            name, count, purpose = "held-out", self.args.held_out, "validation"
        first_seed = seed_range(purpose, seed, count)[0]
        captions = captions_of(self.args.captions, NUM_CAPTIONS, first_seed, measuring=held_out)
        prompts = [str(caption) for caption in captions]
        spec = make_pair_spec(teacher, prompts, self.args.captions, count, self.args.teacher_steps,
                              guidance, "dpm", purpose, seed)
        ending = "" if guidance is None else f"-guidance-{guidance:g}"
        return make_pairs(teacher, prompts, spec, folder / f"{name}-{stem}{ending}")

    def rows_with(self, key: dict) -> list[dict]:
        return [row for row in self.rows if key.items() <= row.items()]

    @torch.inference_mode()
    def error_on(self, pairs: Pairs, student: StableDiffusion) -> float:
        """The distillation loss per latent element, E‖X1 - (X0 + v(X0, 0))‖², on all pairs."""
        x0, x1, prompts = pairs[torch.arange(len(pairs))]
        z1 = one_step(flow_velocity(student.unet), x0.to(self.device),
                      student.encode_prompts(prompts))
        return (x1.to(self.device) - z1).square().mean().item()


def study_parser(description: str, captions: str, out: str) -> Parser:
    """The flags that all studies have, with these defaults of --captions and --out."""
    parser = Parser(description)
    add = parser.add_argument
    add("--num-seeds", type=positive, default=3, help="whole runs, from --seed on")
    add("--batch-size", type=positive, default=64, help="samples of an iteration")
    add("--teacher-steps", type=solver_steps, default=8, help="of the pairs")
    add("--captions", choices=CAPTIONS, default=captions,
        help="of shapes: open leaves out much of two objects, full nothing; single has one object; "
             "mixed is as in the teacher's training. emoji: the other dataset")
    add("--out", default=out, help="folder of tables, figures, pairs and models")
    add_machine_options(parser, run_seed)
    return parser


def add_table_options(parser: Parser) -> None:
    """The flags of studies that train with a falling learning rate and measure images."""
    add = parser.add_argument
    add("--cooldown", type=fraction, default=0.6,
        help="last fraction of a training, in which the learning rate falls to 0")
    add("--num-samples", type=at_least(FEWEST_SAMPLES), default=1000,
        help="images for each row and seed")


def add_pairs_option(parser: Parser) -> None:
    parser.add_argument("--num-pairs", type=positive, default=10_000, help="of each teacher")


def open_table(
    path: Path, args: argparse.Namespace, names: tuple[str, ...] = SETTINGS,
) -> tuple[list[dict], Callable[[], None]]:
    """The rows that are on disk, and a function that writes them with those added.

    names: of the flags that decide the rows. BadInput: the folder holds a study with other ones, or
    another run writes there, whose rows would be lost.
    """
    check_one_process()
    check_output(path)
    lock_folder(path.parent)
    settings = {name: value for name, value in vars(args).items() if name in names}
    settings_path = path.with_suffix(".settings.json")
    check_same_settings(settings_path, settings, "another study", "name another folder with --out")
    write_json(settings_path, settings)
    rows = read_our_json(path, [])
    return rows, lambda: write_json(path, rows)


def check_one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput("a study runs in one process; start it without torchrun")


def study_of(
    seed: int, args: argparse.Namespace, device: torch.device, rows: list[dict], write: Callable,
) -> Study:
    """One seed."""
    seeds = seed_range("evaluation", seed, args.num_samples)
    measured = captions_of(args.captions, args.num_samples, seeds[0], measuring=True)
    evaluation_set = judged_set(dataset_of(args.captions)[0], measured, seeds, seed)
    return Study(seed, Path(args.out) / f"seed-{seed}", args, device, evaluation_set, rows, write)


def run_command(*command) -> float:
    """Run a command of this repository; its wall-clock seconds. BadInput: it failed."""
    started = time.perf_counter()
    if subprocess.run([sys.executable, HERE / command[0], *map(str, command[1:])]).returncode:
        raise BadInput(f"{command[0]}: failed, see above")
    return time.perf_counter() - started


def footer(script: str, args: argparse.Namespace, device: torch.device, rows: list[dict]) -> str:
    """The line below a table that says what wrote it last. script: its path."""
    command = shlex.join(["python", script, *sys.argv[1:]])
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in vars(args).items()
                         if name in (*SETTINGS, "tune_at", "measure_every"))
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    machine = f"{machine_name(device)}, torch {torch.__version__}"
    return f"\nLast written by `{command}`, seeds {seeds}; {settings}; {machine}.\n"


def best_rate(frechet: Callable[[float], float]) -> float:
    """The learning rate with the least Fréchet distance on TUNING_SEED; none that diverges."""

    @functools.cache
    def distance(rate: float) -> float:
        try:
            return frechet(rate)
        except NotFinite:
            return math.inf

    best = min(RATES, key=distance)
    beyond = {RATES[0]: LOWER, RATES[-1]: HIGHER}.get(best, best)
    return min(best, beyond, key=distance)


@contextmanager
def one_seed_less(cell: str) -> Iterator[None]:
    """Go on where the training of a reported cell diverges: its line then has one seed less."""
    try:
        yield
    except NotFinite as problem:
        note(f"{cell}: {problem}")


def reported_seeds(args: argparse.Namespace) -> range:
    """The seeds that the table reports. BadInput: TUNING_SEED is among them."""
    seeds = range(args.seed, args.seed + args.num_seeds)
    if TUNING_SEED in seeds:
        raise BadInput(f"--seed {args.seed} --num-seeds {args.num_seeds}: seed {TUNING_SEED} "
                       "chooses the learning rates; take others")
    return seeds


def save_images(path: str | Path, study: Study) -> None:
    """An image sheet: the first captions, with a row of real images and a row for each model."""
    asked, rows = study.evaluation_set, []
    prompts, seeds = asked.prompts[:NUM_SHOWN], asked.seeds[:NUM_SHOWN]
    if asked.real_images is not None:
        rows.append(("real", asked.real_images[:NUM_SHOWN]))
    for label, model, steps in study.shown:
        rows.append((label, sample_images(model, prompts, seeds, steps)))
    save_comparison(path, rows, prompts)
