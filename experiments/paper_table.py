"""The paper's table on the tiny model.

Is distilling the teacher directly worse, and what does reflow buy?

    python experiments/paper_table.py                   seeds 0, 1 and 2; hours on 2 CPU cores
    python experiments/paper_table.py --num-seeds 1 --parts direct      some rows; others are kept
    python experiments/paper_table.py --captions emoji                  the world of real pictures
    python experiments/paper_table.py --captions mixed --asked full     measured on others

For each seed, on captions that leave much open ("a shape and a red square"), where a prompt has
many right pictures:

    part       row
    teacher    drawn                         real pictures, set against other real ones
               teacher                       at 25, 8, 4, 2, 1 steps of DPM-Solver
    reflow     2-RF                          at 25, 8, 4, 2, 1 Euler steps; `--iterations` updates
               2-RF + distill                after 1/4, 1/2 and 1 times `--iterations` in L2
               2-RF + distill + LPIPS        `--lpips-iterations` more
    direct     teacher + distill             after 1/4, 1/2, 1, 2 and 4 times (`--budgets`)
               teacher + distill + LPIPS     `--lpips-iterations` more, after 1 time and above
    third      3-RF, 3-RF + distill          a second reflow, and one step from it
    stacked    2-RF + distill, stacked       two U-Nets in series (distill.py --student stacked)

The rate of every training falls over its last part (--cooldown), so each number of updates is a
training of its own. Every student starts from its teacher's weights; where that is the diffusion,
with the sign of its output changed, as reflow does (unet.started_from). The teacher's pairs are the
same for every seed.
They are drawn in 8 steps, as those of the flows: nearly as good as 25 (the table shows both), and
three times as many in the same time. Captions and noises that figures are taken on are in none of
the pairs. How many pairs there are decides much, since a student that sees few pairs often learns
them by heart: --num-pairs 3000 is such a study.

"samples" counts what training saw on the whole way from the teacher, "own_samples" what this
student saw, and "minutes" is the time of training on the whole way, without that of making pairs.

held_out_error    E‖X1 - (X0 + v(X0, 0))‖² a number of the latent, on noises and captions of no
                  training pair, X1 being where the student's own teacher leads; train_error the
                  same on the pairs it was trained on
transport_cost    E‖Z1 - Z0‖²; the other figures are those of evaluate.py

Writes study.json (a row for each seed), study.md (means with 95 % intervals over seeds), study.png
(one-step quality against samples) and study-pictures-SEED.png (the same captions and noises in
every row).
"""

import argparse
import functools
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "toy"))

import checkpoint
import emoji
import shapes
from command import (
    TINY_EMOJI, TINY_TEACHER, BadInput, Parser, add_machine_options, check_output, not_below_zero,
    not_negative, pick_device, pick_dtype, positive, refuse_other, run, share, solver_steps,
    write_json, write_text, write_whole,
)
from distill import distill, perceptual, perceptual_distance
from evaluate import PICTURED, evaluate
from evaluation.figures import GRADES, machine_name, with_interval
from evaluation.judge import Questions, judged
from evaluation.plots import COLOURS, grouped, in_steps, markdown_table, save_comparison
from pairs import Pairs, describe_pairs, make_pairs
from rectified_flow import flow_velocity, one_step, squared
from reflow import reflow
from sample import draw_pictures, run_seed, seeds_in
from stable_diffusion import StableDiffusion
from train_teacher import minutes_of
from training import TrainingOptions, autocast_dtype
from unet import stack, started_from

PARTS = ("teacher", "reflow", "direct", "third", "stacked")
CAPTIONS = {
    "open": shapes.open_captions, "full": shapes.full_captions, "single": shapes.single_captions,
    "mixed": shapes.random_captions, "emoji": None,
}
# At 5e-4, as in L2, the LPIPS of the training pairs rises from the first updates on.
LPIPS_LEARNING_RATE = 1e-4
CAPTIONS_DRAWN = 1000  # for the pairs, some of them more than once
# Of the noises of their pairs, so that no model is sampled where it was trained. Those of the
# teacher serve all seeds.
WORLDS = {"tiny_sd": "reflow", "tiny_emoji": "reflow", "2rf": "second reflow",
          "3rf": "distillation"}
KEYS = ("row", "updates", "steps")
FIGURES = (*GRADES, "held_out_error", "train_error", "relative_straightness", "transport_cost")
COSTS = ("samples", "own_samples", "minutes")
SETTINGS = ("iterations", "lpips_iterations", "batch_size", "cooldown", "num_pairs",
            "teacher_steps", "captions", "held_out", "num_samples", "passes", "learning_rate",
            "dtype")


def world_of(captions: str) -> tuple[ModuleType, str]:
    """The world that has captions of this name, and its teacher."""
    return (emoji, TINY_EMOJI) if captions == "emoji" else (shapes, TINY_TEACHER)


@functools.cache
def captions_of(name: str, count: int, seed: int, measuring: bool) -> list:
    world, _ = world_of(name)
    make = world.measuring_captions if measuring else world.training_captions
    return make(count, seed) if name == "emoji" else make(count, seed, CAPTIONS[name])


@dataclass
class Study:
    """One seed: where its files lie, what is measured with, and the rows of all seeds."""

    seed: int
    folder: Path
    args: argparse.Namespace
    device: torch.device
    questions: Questions
    rows: list[dict]
    write: Callable[[], None]  # puts the rows on the disk
    # Rows of the picture.
    shown: list[tuple[str, StableDiffusion, int]] = field(default_factory=list)

    def load(self, path: str | Path) -> StableDiffusion:
        """A model to draw with, in --dtype."""
        return checkpoint.load(path, self.device, pick_dtype(self.args.dtype, self.device))

    def options(self, iterations: int, learning_rate: float = 5e-4) -> TrainingOptions:
        """Those of reflow.py and distill.py for the tiny model.

        The warm-up is shorter, for these shorter runs.
        """
        return TrainingOptions(
            iterations, self.args.batch_size, learning_rate=learning_rate, warmup_samples=1_600,
            cooldown=self.args.cooldown, ema_half_life=10_000, ema_ramp=0.05, save_every=500,
            seed=self.seed,
        )

    def pairs_of(
        self, model: StableDiffusion, held_out: bool = False, guidance: float | None = None
    ) -> Pairs:
        """Pairs of this model, made when first asked for.

        guidance: another than the model's own.
        """
        shared, stem = model.kind == "diffusion", Path(model.path).stem
        folder, seed = (self.folder.parent, 0) if shared else (self.folder, self.seed)
        name, count = (
            ("held-out", self.args.held_out) if held_out else ("pairs", self.args.num_pairs)
        )
        world = "validation" if held_out else WORLDS[stem]
        first = seeds_in(world, seed, count)[0]
        captions = captions_of(self.args.captions, CAPTIONS_DRAWN, first, held_out)
        captions = [str(caption) for caption in captions]
        folder = folder / f"{name}-{stem}{'' if guidance is None else f'-guidance-{guidance:g}'}"
        description = describe_pairs(
            model, captions, self.args.captions, count, self.args.teacher_steps, guidance, "dpm",
            model.dtype, world, seed,
        )
        return make_pairs(model, captions, description, folder)

    def made(
        self, name: str, start: StableDiffusion, train: Callable[[StableDiffusion], object],
        init: str = "negated",
    ) -> StableDiffusion:
        """The model of that name: from its file, or trained from `start`'s weights.

        What is trained is written there, in fp32.
        """
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            model = checkpoint.load(start.path, self.device)
            model.unet = started_from(model.unet, init, model.kind, self.seed)
            train(model)
            checkpoint.save(model, path, None)
        return self.load(path)

    def record_drawn(self) -> None:
        """The floor: one set of drawn pictures measured against the other."""
        key = {"row": "drawn", "updates": None, "seed": self.seed}
        if not any(key.items() <= each.items() for each in self.rows):
            figures = dict.fromkeys((*FIGURES, *COSTS)) | self.questions.real
            self.rows.append(key | {"steps": None} | figures)

    def record(
        self, row: str, model: StableDiffusion, updates: int, source: StableDiffusion | None = None,
        steps: list[int] | None = None, guidance: float | None = None, **about,
    ) -> None:
        """Measure a model, at those of these numbers of steps that the table lacks.

        source: the teacher of a one-step model, on whose pairs its errors are measured.
        """
        steps = [1] if model.kind == "one-step" else steps or self.args.steps
        guidance = model.guidance if guidance is None else guidance
        label = row + f", {updates} updates" * bool(updates)
        self.shown += [(f"{label}\n{in_steps(number)}", model, number) for number in steps]
        key = {"row": row, "updates": updates, "seed": self.seed}
        known = {each["steps"] for each in self.rows if key.items() <= each.items()}
        steps = [number for number in steps if number not in known]
        if not steps:
            return
        errors = {"held_out_error": None, "train_error": None}
        if source is not None:
            errors["held_out_error"], cost = self.errors_on(
                self.pairs_of(source, held_out=True), model
            )
            errors["train_error"], _ = self.errors_on(self.pairs_of(source), model)
        for measured, _ in evaluate(model, [self.questions], steps, guidance):
            figures = {name: measured[name]
                       for name in (*GRADES, "relative_straightness", "transport_cost")}
            if source is not None:
                figures["transport_cost"] = cost
            self.rows.append(key | {"steps": measured["steps"]} | figures | errors | about)
        self.write()

    @torch.inference_mode()
    def errors_on(self, pairs: Pairs, student: StableDiffusion) -> tuple[float, float]:
        """The distillation loss on the first `--held-out` pairs, and the student's E‖Z1 - Z0‖²."""
        x0, x1, prompts = pairs[torch.arange(min(len(pairs), self.args.held_out))]
        x0, x1 = x0.to(self.device), x1.to(self.device)
        ends = one_step(flow_velocity(student.unet), x0, student.encode_prompts(prompts))
        cost = (ends - x0).square().flatten(1).sum(1).mean().item()
        return (x1 - ends).square().mean().item(), cost


def measure_seed(study: Study, lpips_distance: Callable) -> None:
    """Every row of one seed, in the order in which each needs the ones before."""
    n, lpips = study.args.iterations, study.args.lpips_iterations
    teacher = study.load(world_of(study.args.captions)[1])
    dtype = autocast_dtype(study.args.dtype, study.device, teacher.unet)

    def costs(before: dict[str, int], own: dict[str, int]) -> dict:
        """Of stages of training, by folder and updates: those on the way, and the student's own."""
        batch, stages = study.args.batch_size, before | own
        minutes = sum(
            minutes_of(study.folder / stage, updates) for stage, updates in stages.items()
        )
        return {"samples": sum(stages.values()) * batch, "own_samples": sum(own.values()) * batch,
                "minutes": minutes}

    def flow_from(model: StableDiffusion, name: str) -> StableDiffusion:
        train = lambda new: reflow(
            new, study.pairs_of(model), study.options(n), study.folder / name, {}, dtype
        )
        return study.made(name, model, train)

    def student_of(
        source: StableDiffusion, row: str, before: dict[str, int], budgets: list[int],
        finish: bool = False, stacked: bool = False,
    ):
        """Distil `source`, recorded at each of the budgets.

        before: stages that led to the source; finish: after n updates also in LPIPS;
        stacked: the student.
        """
        name = row.replace(" ", "")

        def train(new: StableDiffusion, updates: int) -> None:
            if stacked:
                new.unet = stack(new.unet)
            options = study.options(updates)
            folder = study.folder / f"{name}-{updates}"
            distill(new, study.pairs_of(source), squared, options, folder, {}, "L2", dtype)

        def finish_by_eye(new: StableDiffusion, updates: int) -> None:
            options = study.options(lpips, LPIPS_LEARNING_RATE)
            folder, seen = study.folder / f"{name}-{updates}-lpips", updates * options.batch_size
            distance, pairs = perceptual(new.vae, lpips_distance), study.pairs_of(source)
            distill(new, pairs, distance, options, folder, {}, "LPIPS", dtype, seen)

        for updates in budgets:
            stage = {f"{name}-{updates}": updates}
            student = study.made(f"{name}-{updates}", source, partial(train, updates=updates))
            study.record(row, student, updates, source, **costs(before, stage))
            if updates >= n and finish and lpips:
                finished = study.made(f"{name}-{updates}-lpips", student,
                                      partial(finish_by_eye, updates=updates))
                spent = costs(before, stage | {f"{name}-{updates}-lpips": lpips})
                study.record(f"{row} + LPIPS", finished, updates + lpips, source, **spent)

    parts, budgets = study.args.parts, sorted(round(n * budget) for budget in study.args.budgets)
    up_to_n = [updates for updates in budgets if updates <= n]
    if "teacher" in parts:
        study.record_drawn()
        study.record("teacher", teacher, 0, **costs({}, {}))
    if "direct" in parts:
        student_of(teacher, "teacher + distill", {}, budgets, finish=True)
    if not {"reflow", "third", "stacked"} & set(parts):
        return
    flow2 = flow_from(teacher, "2rf")
    if "reflow" in parts:
        study.record("2-RF", flow2, n, **costs({}, {"2rf": n}))
        student_of(flow2, "2-RF + distill", {"2rf": n}, up_to_n, finish=True)
    if "third" in parts:
        flow3 = flow_from(flow2, "3rf")
        study.record("3-RF", flow3, 2 * n, **costs({"2rf": n}, {"3rf": n}))
        student_of(flow3, "3-RF + distill", {"2rf": n, "3rf": n}, [n])
    if "stacked" in parts:
        student_of(flow2, "2-RF + distill, stacked", {"2rf": n}, [n], stacked=True)


# --------------------------------------------------------------------------------------------------
# What is written


def summary_of(rows: list[dict]) -> list[dict]:
    """One line for the rows that differ in their seed alone: means with 95 % intervals."""
    summary = []
    for key, group in grouped(rows, KEYS).items():
        line = dict(zip(KEYS, key))
        for name in FIGURES:
            line[name], line[f"{name}_interval"] = with_interval([row[name] for row in group])
        line |= {name: with_interval([row[name] for row in group])[0] for name in COSTS}
        summary.append(line | {"seeds": len(group)})
    return summary


def save_pictures(path: Path, study: Study) -> None:
    """The first captions in every row: drawn, and by every model."""
    asked = study.questions
    captions, seeds, pictures = asked.prompts[:PICTURED], asked.seeds[:PICTURED], []
    if asked.drawn is not None:
        pictures.append(("drawn", asked.drawn[:PICTURED]))
    for label, model, steps in study.shown:
        pictures.append((label, draw_pictures(model, captions, seeds, steps)))
    save_comparison(path, pictures, captions)


def save_curves(path: Path, summary: list[dict]) -> None:
    """One-step quality against the samples seen since the teacher, and the error on new noises."""
    figure = Figure(figsize=(16, 3.8), layout="constrained")
    panels = ("held_out_error", "frechet", "caption_accuracy", "recall")
    thousand = lambda lines, name="samples": [line[name] / 1000 for line in lines]
    one_step = [line for line in summary if line["held_out_error"] is not None]
    axes = figure.subplots(1, len(panels))
    for axis, name in zip(axes, panels):
        markers = iter("*^vPX")
        for (row,), mine in grouped(one_step, ("row",)).items():
            bars, values = (
                [line[f"{name}_interval"] or 0 for line in mine], [line[name] for line in mine]
            )
            colour = COLOURS["diffusion" if row.startswith("teacher") else "flow"]
            if row in ("teacher + distill", "2-RF + distill"):
                axis.errorbar(thousand(mine), values, bars, color=colour, marker="o", capsize=2,
                              label=row)
            else:
                axis.errorbar(thousand(mine), values, bars, color=colour, marker=next(markers),
                              ls="", ms=8, label=row)
            if row == "2-RF + distill":
                axis.plot(thousand(mine, "own_samples"), values, ":o", color=colour,
                          fillstyle="none", label=f"{row}, without reflow's samples")
        axis.set(xlabel="thousand samples seen since the teacher", title=name.replace("_", " "))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=150))


# --------------------------------------------------------------------------------------------------
# The command


def study_parser(description: str) -> Parser:
    """The options that studies of the tiny model share."""
    parser = Parser(description)
    parser.add_argument("--num-seeds", type=positive, default=3, help="whole runs, from --seed on")
    parser.add_argument("--batch-size", type=positive, default=64, help="samples of one update")
    parser.add_argument("--cooldown", type=share, default=0.6,
                        help="share of a training, at its end, over which the rate falls to 0")
    parser.add_argument("--num-pairs", type=positive, default=10_000, help="of each teacher")
    parser.add_argument("--teacher-steps", type=solver_steps, default=8, help="of the pairs")
    parser.add_argument("--captions", choices=CAPTIONS, default="open",
                        help="of shapes: much left out of two objects, nothing; one object; as in "
                             "training. Or those of emoji, whose teacher train_teacher.py makes")
    parser.add_argument("--num-samples", type=positive, default=1000,
                        help="pictures for each row and seed")
    parser.add_argument("--out", default="runs/study",
                        help="folder of table, figures and everything made on the way")
    add_machine_options(parser, run_seed)
    return parser


def open_table(
    path: Path, args: argparse.Namespace, asked: str = "",
) -> tuple[list[dict], Callable[[], None]]:
    """The rows that are there already, and a function that writes them with what was added.

    asked: what the table of the same models lacks in its name. BadInput where those are of other
    settings.
    """
    check_output(path)
    settings = {name: value for name, value in vars(args).items() if name in SETTINGS}
    told = path.with_suffix(".settings.json")
    refuse_other(told, settings, "another study", "name another folder with --out")
    write_json(told, settings)
    path = path.with_stem(path.stem + asked)
    rows = json.loads(path.read_text()) if path.exists() else []
    return rows, lambda: write_json(path, rows)


def study_of(
    seed: int, args: argparse.Namespace, device: torch.device, rows: list[dict], write: Callable,
    asked: str | None = None,
) -> Study:
    """asked: captions to measure on, if others than those of --captions."""
    seeds = seeds_in("evaluation", seed, args.num_samples)
    captions = captions_of(asked or args.captions, args.num_samples, seeds[0], measuring=True)
    questions = judged(world_of(args.captions)[0], captions, seeds, seed)
    return Study(seed, Path(args.out) / f"seed-{seed}", args, device, questions, rows, write)


def footer(script: str, args: argparse.Namespace, device: torch.device, rows: list[dict]) -> str:
    """What wrote a table, below it. script: its path."""
    command = shlex.join(["python", script, *sys.argv[1:]])
    settings = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in vars(args).items()
        if name in SETTINGS
    )
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    machine = f"{machine_name(device)}, torch {torch.__version__}"
    return f"\nWritten by `{command}`, seeds {seeds}; {settings}; {machine}.\n"


def main():
    parser = study_parser("The paper's table on the tiny model.")
    parser.add_argument("--iterations", type=positive, default=256,
                        help="updates of each reflow and distillation, the unit")
    parser.add_argument("--held-out", type=positive, default=500,
                        help="pairs that nothing is trained on")
    parser.add_argument("--steps", type=solver_steps, nargs="+", default=[25, 8, 4, 2, 1],
                        help="at which paths are measured")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="rows to measure")
    parser.add_argument("--budgets", type=not_below_zero, nargs="+", default=[0.25, 0.5, 1, 2, 4],
                        help="updates of a distillation at which it is measured, in --iterations")
    parser.add_argument("--lpips-iterations", type=not_negative, default=64)
    parser.add_argument("--asked", choices=CAPTIONS,
                        help="measure the same models on these captions, in study-ASKED.json and "
                             "its like; default: on such as they were trained on")
    args = parser.parse_args()
    if args.asked and world_of(args.asked) != world_of(args.captions):
        raise BadInput(f"--asked {args.asked}: of another world than --captions {args.captions}")
    folder, device = Path(args.out), pick_device(args.device)
    asked = f"-{args.asked}" if args.asked else ""
    name = f"study{asked}"
    rows, write = open_table(folder / "study.json", args, asked)
    distance = perceptual_distance("random", device)
    for seed in range(args.seed, args.seed + args.num_seeds):
        study = study_of(seed, args, device, rows, write, args.asked)
        measure_seed(study, distance)
        save_pictures(folder / f"{name}-pictures-{seed}.png", study)

    summary = summary_of(rows)
    table = markdown_table(summary) + footer("experiments/paper_table.py", args, device, rows)
    write_text(folder / f"{name}.md", table)
    save_curves(folder / f"{name}.png", summary)
    print(table + f"{folder}: {name}.json, {name}.md, {name}.png and pictures")


if __name__ == "__main__":
    run(main)
