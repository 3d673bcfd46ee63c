"""When does distilling the teacher directly fail? The paper's comparison, on the tiny model.

    python experiments/paper_table.py                    hours on 2 CPU cores; resumes
    python experiments/paper_table.py --iterations 1000 --captions open
    python experiments/paper_table.py --iterations 1000 --guidance 6 --starts negated

InstaFlow compares two arms at N training steps in all (paper, table 1: 100,000):

    direct          N steps of distillation on N x 64 pairs of the teacher
    reflow first    N/2 steps of reflow on N/2 x 64 pairs of the teacher, then N/2 steps of
                    distillation on N/2 x 64 pairs of that 2-RF

No pair is used twice, so neither arm can memorise, and both arms use equally many pairs. The
teacher's pairs of a smaller N are the first of a larger N. Each arm begins from one of two starts
(stable_diffusion.initial_student):

    teacher         the weights as they are, the paper's start
    negated         the sign of the last convolution flipped

The learning rate decays over the last part of each training. It is the best of RATES for each start
and arm at --tune-at steps on seed TUNING_SEED, by the Fréchet distance in one step, on the captions
`mixed` (or `emoji`) at the teacher's own guidance. A best rate at the grid's edge adds one to it.

Every row goes to study.json as soon as it is measured: stop the study at any time, run it again, it
continues. The captions and noises of the evaluation are held out from all pairs. Writes study.md
(means with 95 % intervals over seeds), differences.md (paired, seed by seed), study.png (gap
between student and teacher), losses.png (of the longest trainings) and images.png.

With --lpips-iterations every student continues training in LPIPS (random weights), reported as
another row.

    gap             Fréchet distance in one step minus its teacher's: the diffusion for direct, 2-RF
                    for reflow first, each with the steps that made its pairs
    held_out_error  E‖X1 - (X0 + v(X0, 0))‖² per latent element on new pairs of its teacher
"""

import sys
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import distill
import reflow
from command import (
    BadInput, at_least, non_negative, non_negative_int, pick_device, positive, run,
    write_atomically, write_text,
)
from evaluate import NUM_SHOWN, evaluate
from evaluation.figures import GRADES, paired_differences, with_interval, with_intervals
from evaluation.perceptual import perceptual_distance
from evaluation.plots import COLOURS, grouped, markdown_table, save_comparison
from evaluation.study import (
    TUNING_SEED, Study, add_table_options, best_rate, footer, one_seed_less, open_table,
    reported_seeds, study_of, study_parser,
)
from formats.images import image_grid
from rectified_flow import squared
from sample import sample_images
from stable_diffusion import StableDiffusion
from training import ema_copy, read_metrics, train

STARTS, ARMS = ("teacher", "negated"), ("direct", "reflow first")
# At L2's 5e-4, the LPIPS of the training pairs rises from the first iterations.
LPIPS_LEARNING_RATE = 1e-4
FLOW_STEPS = 4  # of 2-RF's pairs, as in distill.py
EARLY, LATER = 200, 100  # the loss curves: all logged steps up to 200, then every 100th
KEYS = ("captions", "guidance", "start", "arm", "iterations", "model", "steps")
FIGURES = (*GRADES, "gap", "held_out_error", "relative_straightness")
SETTINGS = ("batch_size", "cooldown", "teacher_steps", "num_samples", "held_out", "tune_at",
            "dtype")


@dataclass(frozen=True)
class Cell:
    """One student: what decides it."""

    captions: str
    guidance: float | None  # of the teacher; None: its own
    start: str
    arm: str
    iterations: int  # in all
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return (f"{self.start}-{self.arm.replace(' ', '-')}-{self.iterations}"
                f"-{self.learning_rate:g}-seed-{self.seed}")


def study_for(cell: Cell, args: Namespace, num_pairs: int, rows: list[dict], write) -> Study:
    """The cell's seed, captions and number of pairs, as evaluation/study.py takes them."""
    mine = Namespace(**vars(args) | {"captions": cell.captions, "num_pairs": num_pairs})
    study = study_of(cell.seed, mine, pick_device(args.device), rows, write)
    setting = cell.captions + ("" if cell.guidance is None else f"-guidance-{cell.guidance:g}")
    study.folder = Path(args.out) / setting / cell.name  # pairs of the teacher lie beside it
    return study


def trained(study: Study, cell: Cell, name: str, source, kind: str, batch, loss, iterations: int,
            learning_rate: float) -> StableDiffusion:
    """The model of this name: from its file, or trained from the source's weights.

    batch(samples, share, generator) and loss(encode_prompts, network, *batch): of the iterations.
    """
    path = study.folder / f"{name}.safetensors"
    if not path.exists():
        model = replace(study.new_student(source, cell.start), kind=kind)
        options = study.options(model.unet, iterations, f"{cell.name}, {name}", learning_rate)
        train(model.unet, ema_copy(model.unet), batch, partial(loss, model.encode_prompts), options,
              study.folder / name, {})
        checkpoint.save(model, path, None)
    return study.load(path)


def measure(study: Study, cell: Cell, name: str, model, steps: list[int], **columns) -> None:
    """Add the model's rows at these numbers of steps, unless the table has them."""
    key = asdict(cell) | {"model": name}
    if name == "teacher":  # the same for all cells of these captions and this guidance
        key |= {"start": None, "arm": None, "iterations": 0, "learning_rate": None}
    missing = [n for n in steps if not study.rows_with(key | {"steps": n})]
    guidance = model.guidance if name != "teacher" or cell.guidance is None else cell.guidance
    for row, _ in evaluate(model, [study.evaluation_set], missing, guidance) if missing else ():
        figures = {each: row[each] for each in (*GRADES, "relative_straightness")}
        study.rows.append(key | {"steps": row["steps"]} | figures | columns)
    study.write()


def losses_of(folder: Path) -> list:
    return [(row["step"], row["loss"]) for row in read_metrics(folder)
            if row["step"] <= EARLY or row["step"] % LATER == 0]


def measure_cell(cell: Cell, args: Namespace, rows: list[dict], write, lpips=None) -> None:
    """Train and measure the cell's student and its teachers, unless the table has them.

    lpips: a distance to continue in.
    """
    last = {"model": "one-step + LPIPS" if lpips else "one-step"}
    if any((asdict(cell) | last).items() <= row.items() for row in rows):
        return
    direct, rate = cell.arm == "direct", cell.learning_rate
    steps = cell.iterations if direct else cell.iterations // 2
    study = study_for(cell, args, steps * args.batch_size, rows, write)
    teacher = study.load_teacher()
    measure(study, cell, "teacher", teacher, sorted({args.teacher_steps, 1}, reverse=True))
    pairs, first = study.pairs_of(teacher, guidance=cell.guidance), {}
    loss = lambda encode_prompts, *rest: reflow.loss(encode_prompts, squared, *rest)
    source = teacher if direct else trained(
        study, cell, "2rf", teacher, "flow", partial(reflow.batch, pairs, cell.seed), loss, steps,
        rate)
    if not direct:
        measure(study, cell, "2-RF", source, [FLOW_STEPS, 1])
        first = {"reflow_losses": losses_of(study.folder / "2rf")}
        study.args.teacher_steps = FLOW_STEPS
        pairs = study.pairs_of(source)
    loss = lambda encode_prompts, *rest: distill.loss(encode_prompts, squared, *rest)
    student = trained(study, cell, "one-step", source, "one-step",
                      partial(distill.batch, pairs, cell.seed, 0), loss, steps, rate)
    held_out = study.pairs_of(source, held_out=True, guidance=cell.guidance if direct else None)
    save_strip(study, args, cell, student, "")
    measure(study, cell, "one-step", student, [1], **first,
            held_out_error=study.error_on(held_out, student),
            losses=losses_of(study.folder / "one-step"))
    if lpips:
        perceptual = distill.perceptual(student.vae, lpips)
        loss = lambda encode_prompts, *rest: distill.loss(encode_prompts, perceptual, *rest)
        batch = partial(distill.batch, pairs, cell.seed, steps * args.batch_size)
        count = args.lpips_iterations
        student = trained(study, cell, f"one-step-lpips-{count}", student, "one-step", batch, loss,
                          count, LPIPS_LEARNING_RATE)
        save_strip(study, args, cell, student, "-lpips")
        measure(study, cell, "one-step + LPIPS", student, [1],
                lpips_iterations=count, held_out_error=study.error_on(held_out, student))


def rate_for(cell: Cell, args: Namespace, rows: list[dict], write) -> float:
    """The learning rate of this start and arm, tuned on TUNING_SEED."""
    captions = "emoji" if cell.captions == "emoji" else "mixed"
    tuning = replace(cell, captions=captions, guidance=None, iterations=args.tune_at,
                     seed=TUNING_SEED)

    def frechet(rate: float) -> float:
        candidate = replace(tuning, learning_rate=rate)
        measure_cell(candidate, args, rows, write)
        key = asdict(candidate) | {"model": "one-step"}
        return next(row["frechet"] for row in rows if key.items() <= row.items())

    return best_rate(frechet)


# --------------------------------------------------------------------------------------------------
# What is written


def strip_path(args: Namespace, study: Study, cell: Cell, suffix: str) -> Path:
    return Path(args.out) / "strips" / f"{study.folder.parent.name}-{cell.name}{suffix}.png"


def save_strip(study: Study, args: Namespace, cell: Cell, student, suffix: str) -> None:
    """The student's first images side by side without gaps, to be read back."""
    asked, path = study.evaluation_set, strip_path(args, study, cell, suffix)
    images = sample_images(student, asked.prompts[:NUM_SHOWN], asked.seeds[:NUM_SHOWN])
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = image_grid(images, len(images), 0)
    write_atomically(path, lambda temporary: Image.fromarray(pixels).save(temporary))


def with_gaps(rows: list[dict], teacher_steps: int) -> list[dict]:
    """The reported rows, with each student's gap to its own teacher."""
    rows = [row for row in rows if row["seed"] != TUNING_SEED]
    result = []
    for row in rows:
        gap = None
        if row["model"].startswith("one-step"):
            name, steps = (("teacher", teacher_steps) if row["arm"] == "direct" else
                           ("2-RF", FLOW_STEPS))
            same = ("captions", "guidance", "seed")
            same += () if name == "teacher" else ("start", "arm", "iterations")
            own = next(each for each in rows if each["model"] == name and each["steps"] == steps
                       and all(each[key] == row[key] for key in same))
            gap = row["frechet"] - own["frechet"]
        result.append({"held_out_error": None} | row | {"gap": gap})
    return result


def summary_of(rows: list[dict]) -> list[dict]:
    """A line for each model: means with 95 % intervals over seeds."""
    order = lambda row: [str(row[key] or "") if key != "iterations" else f"{row[key]:9d}"
                         for key in KEYS]
    summary = []
    for key, group in grouped(sorted(rows, key=order), KEYS).items():
        line = dict(zip(KEYS, key)) | {"learning_rate": group[0]["learning_rate"]}
        summary.append(line | with_intervals(group, FIGURES) | {"seeds": len(group)})
    return summary


def differences_of(rows: list[dict]) -> list[dict]:
    """Direct minus reflow first, seed by seed: positive where reflow first is better."""
    students = [row for row in rows if row["model"] == "one-step"]
    keys, lines = ("captions", "guidance", "start", "iterations"), []
    names = ("frechet", "gap", "caption_accuracy")
    for key, group in grouped(students, keys).items():
        arms = ([row for row in group if row["arm"] == arm] for arm in ARMS)
        paired = paired_differences(*arms, names)
        line = dict(zip(keys, key))
        for name in names if paired else ():
            line |= with_intervals(paired, [name])
            line |= {f"{name}_by_seed": ", ".join(f"{each[name]:.4g}" for each in paired)}
        if paired:
            lines.append(line | {"seeds": len(paired)})
    return lines


def main_students(rows: list[dict]) -> list[dict]:
    """One-step students on captions `mixed` at the teacher's own guidance; if none, on others."""
    students = [row for row in rows if row["model"] == "one-step"]
    setting = lambda row: (row["captions"], row["guidance"])
    main = [row for row in students if setting(row) == ("mixed", None)]
    return main or [row for row in students if setting(row) == setting(students[0])]


def save_gaps(path: Path, rows: list[dict]) -> None:
    """The gap to the own teacher against N: a panel for each start, a line for each arm."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots(1, len(STARTS), sharey=True)
    main = main_students(rows)
    for axis, start in zip(axes, STARTS):
        for arm, colour in zip(ARMS, (COLOURS["diffusion"], COLOURS["flow"])):
            mine = [row for row in main if (row["start"], row["arm"]) == (start, arm)]
            if mine:
                axis.plot([row["iterations"] for row in mine], [row["gap"] for row in mine], "o",
                          color=colour, markersize=4)
                means = [(n, with_interval([row["gap"] for row in group])[0])
                         for (n,), group in sorted(grouped(mine, ("iterations",)).items())]
                axis.plot(*zip(*means), color=colour, label=arm)
        counts = sorted({row["iterations"] for row in main})
        axis.set(xscale="log", title=f"start: {start}", xlabel="training steps in all")
        axis.set_yscale("symlog", linthresh=10)  # a student may be ahead of its teacher
        axis.set_xticks(counts, [f"{n:,}" for n in counts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("Fréchet distance above the own teacher's")
    axes[0].legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))


def save_losses(path: Path, rows: list[dict]) -> None:
    """The loss of the longest trainings, a panel for each start."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    curves = (("direct", "losses", "direct distillation", COLOURS["diffusion"]),
              ("reflow first", "reflow_losses", "reflow", COLOURS["flow"]),
              ("reflow first", "losses", "distillation after reflow", COLOURS["one-step"]))
    for axis, start in zip(figure.subplots(1, len(STARTS), sharey=True), STARTS):
        mine = [row for row in main_students(rows) if row["start"] == start]
        longest = max((row["iterations"] for row in mine), default=0)
        for arm, column, label, colour in curves:
            for row in mine:
                if (row["arm"], row["iterations"]) == (arm, longest):
                    axis.plot(*zip(*row[column]), color=colour, label=label)
                    label = None
        axis.set(xscale="log", yscale="log", xlabel="training steps",
                 title=f"start: {start}, {longest:,} steps in all")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("training loss")
    figure.axes[0].legend(fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))


def save_images(path: Path, args: Namespace, rows: list[dict], study: Study, teacher) -> None:
    """The same captions and noises for the teacher and each student of the first seed.

    With --lpips-iterations, only the students of --iterations and --starts, before and after LPIPS.
    """
    mine = [row for row in rows if (row["model"], row["seed"], row["captions"], row["guidance"])
            == ("one-step", args.seed, args.captions, args.guidance)]
    order = lambda cell: (cell.iterations, -STARTS.index(cell.start), ARMS.index(cell.arm))
    suffixes = ("",)
    if args.lpips_iterations:
        suffixes = ("", "-lpips")
        mine = [row for row in mine
                if row["iterations"] in args.iterations and row["start"] in args.starts]
    cells = sorted((Cell(**{key: row[key] for key in Cell.__annotations__}) for row in mine),
                   key=order)
    asked = study.evaluation_set
    prompts, seeds = asked.prompts[:NUM_SHOWN], asked.seeds[:NUM_SHOWN]
    steps = study.args.teacher_steps
    images = sample_images(teacher, prompts, seeds, steps, args.guidance)
    sheet = [(f"teacher\n{steps} steps", images)]
    for cell in cells:
        for suffix in suffixes:
            file = strip_path(args, study, cell, suffix)
            if file.exists():
                pixels = np.array(Image.open(file))
                strip = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
                label = f"from {cell.start}\n{cell.arm}, {cell.iterations:,}"
                label += ", then LPIPS" * bool(suffix)
                sheet.append((label, torch.stack(strip.chunk(len(prompts), dim=2))))
    save_comparison(path, sheet, prompts)


def main():
    parser = study_parser("When does distilling the teacher directly fail?", "mixed",
                          "runs/paper-table")
    add_table_options(parser)
    add = parser.add_argument
    add("--iterations", type=at_least(2), nargs="+", default=[250, 1000, 4000],
        help="training steps in all, of each arm")
    add("--starts", nargs="+", choices=STARTS, default=STARTS)
    add("--arms", nargs="+", choices=ARMS, default=ARMS)
    add("--guidance", type=non_negative, help="of the teacher; default: its own, 2.5")
    add("--tune-at", type=at_least(2), default=1000, help="training steps to choose the rates at")
    add("--lpips-iterations", type=non_negative_int, default=0, help="after L2, as a row more")
    add("--held-out", type=positive, default=500, help="pairs that nothing is trained on")
    args = parser.parse_args()
    folder, device = Path(args.out), pick_device(args.device)
    rows, write = open_table(folder / "study.json", args, SETTINGS)
    lengths = {row["lpips_iterations"] for row in rows if "lpips_iterations" in row}
    if args.lpips_iterations and lengths - {args.lpips_iterations}:
        raise BadInput(f"--lpips-iterations {args.lpips_iterations}: {folder} has rows of "
                       f"{max(lengths)}; name another folder with --out")
    lpips = perceptual_distance("random", device) if args.lpips_iterations else None
    for iterations in args.iterations:
        for seed in reported_seeds(args):
            for start in args.starts:
                for arm in args.arms:
                    cell = Cell(args.captions, args.guidance, start, arm, iterations, 0.0, seed)
                    cell = replace(cell, learning_rate=rate_for(cell, args, rows, write))
                    with one_seed_less(f"seed {seed}"):
                        measure_cell(cell, args, rows, write, lpips)

    reported = with_gaps(rows, args.teacher_steps)
    table = markdown_table(summary_of(reported))
    of_all = {name: value for name, value in vars(args).items() if name not in KEYS}
    table += footer("experiments/paper_table.py", Namespace(**of_all), device, reported)
    write_text(folder / "study.md", table)
    if paired := differences_of(reported):  # of two arms
        write_text(folder / "differences.md", markdown_table(paired))
    save_gaps(folder / "study.png", reported)
    save_losses(folder / "losses.png", reported)
    study = study_for(replace(cell, seed=args.seed), args, 1, rows, write)
    save_images(folder / "images.png", args, reported, study, study.load_teacher())
    print(table + f"{folder}: study.json, .md, .png, losses.png, images.png"
          + ", differences.md" * bool(paired))


if __name__ == "__main__":
    run(main)
