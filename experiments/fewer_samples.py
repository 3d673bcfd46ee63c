"""Beyond the paper: what makes reflow need fewer samples?

    python experiments/fewer_samples.py       3 seeds and the learning rate grid: 1.5 hours; resumes

InstaFlow's reflow starts from weights that predict something else (the noise, at a time with
another signal-to-noise ratio) and takes 4.5 million samples. Each way below changes one thing, on
the same pairs in the same order:

    paper        the teacher's weights
    negated      with the output negated: -ε̂ is half way from ε̂ to X1 - X0 (--init negated)
    matched      negated, and the network sees each t as the timestep of its signal-to-noise ratio
    pseudo-Huber negated; the loss √(‖e‖² + c²) - c of Lee et al. 2024 (2405.20320), which gives
                 large errors e less weight

"matched" is as close to the exact initialisation as a plain velocity network gets. The teacher as a
velocity is v = (X - ε̂(X / √(t² + (1-t)²), s(t))) / t. The scale of its input hardly matters to a
network that begins with a norm. s(t) goes into the last layer of the time embedding in closed form.
The division by t, which has no limit at t = 0, is left to be learned.

Each number of samples is a separate training; the learning rate rises over its first WARMUP and
falls to 0 over its last --cooldown. Each way has the best learning rate of RATES, by the Fréchet
distance in one step after --iterations on TUNING_SEED. Flows are sampled at their own guidance
scale, so a step is two NFE. Writes fewer_samples.json (a row for each seed), fewer_samples.md
(means with 95 % intervals over seeds), differences.md (paired, each way minus "negated") and
fewer_samples.png.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import reflow
from command import at_least, pick_device, run, write_atomically, write_text
from diffusion import NoiseSchedule
from evaluate import evaluate
from evaluation.figures import GRADES, paired_differences, with_intervals
from evaluation.plots import grouped, markdown_table, steps_label
from evaluation.study import (
    SETTINGS, TUNING_SEED, WARMUP, Study, add_pairs_option, add_table_options, best_rate, footer,
    one_seed_less, open_table, reported_seeds, study_of, study_parser,
)
from fewstep.meanflow import match_times
from rectified_flow import pseudo_huber, squared
from stable_diffusion import StableDiffusion
from training import ema_copy, train

WAYS = ("paper", "negated", "matched", "pseudo-Huber")
STEPS = [8, 1]
KEYS = ("way", "iterations", "steps")
FIGURES = (*GRADES, "relative_straightness")
FRECHET_TICKS = (50, 100, 200, 500, 1000, 2000)


# --------------------------------------------------------------------------------------------------
# One training


def reflowed(study: Study, way: str, iterations: int, rate: float) -> StableDiffusion:
    """The flow of this way: from its file, or trained."""
    name = f"{way}-{iterations}-{rate:g}"
    path = study.folder / f"{name}.safetensors"
    if not path.exists():
        teacher = study.load_teacher()
        pairs = study.pairs_of(teacher)
        init = "teacher" if way == "paper" else "negated"
        model = replace(study.new_student(teacher, init), kind="flow")
        if way == "matched":
            match_times(model.unet, NoiseSchedule())
        distance = pseudo_huber if way == "pseudo-Huber" else squared
        options = study.options(model.unet, iterations, f"{name}, seed {study.seed}", rate, WARMUP)
        train(model.unet, ema_copy(model.unet), partial(reflow.batch, pairs, study.seed),
              partial(reflow.loss, model.encode_prompts, distance), options, study.folder / name,
              {})
        checkpoint.save(model, path, None)
    return study.load(path)


def measure_cell(study: Study, way: str, iterations: int, rate: float) -> float:
    """Train and measure, unless the table has it; the Fréchet distance in one step."""
    key = {"way": way, "iterations": iterations, "learning_rate": rate, "seed": study.seed}
    if not study.rows_with(key):
        flow = reflowed(study, way, iterations, rate)
        for row, _ in evaluate(flow, [study.evaluation_set], STEPS, flow.guidance):
            study.rows.append(key | {"samples": iterations * study.args.batch_size,
                                     "steps": row["steps"]}
                              | {name: row[name] for name in FIGURES})
        study.write()
    return study.rows_with(key | {"steps": 1})[0]["frechet"]


def rate_for(study: Study, way: str) -> float:
    """The best learning rate of this way, by its Fréchet distances on the study's seed."""
    return best_rate(lambda rate: measure_cell(study, way, study.args.iterations, rate))


# --------------------------------------------------------------------------------------------------
# What is written


def summary_of(rows: list[dict]) -> list[dict]:
    """A line for each way, number of iterations and number of steps."""
    return [dict(zip(KEYS, key)) | {name: group[0][name] for name in ("samples", "learning_rate")}
            | with_intervals(group, FIGURES) | {"seeds": len(group)}
            for key, group in grouped(rows, KEYS).items()]


def differences_of(rows: list[dict]) -> list[dict]:
    """Each way minus "negated", seed by seed: a negative Fréchet distance is an improvement."""
    lines, names, groups = [], ("frechet", "caption_accuracy"), grouped(rows, KEYS)
    for (way, *rest), mine in groups.items():
        paired = paired_differences(mine, groups.get(("negated", *rest), []), names)
        if paired and way != "negated":
            lines.append(dict(zip(KEYS, (way, *rest))) | with_intervals(paired, names) | {
                f"{name}_by_seed": ", ".join(f"{each[name]:.3g}" for each in paired)
                for name in names})
    return lines


def save_curves(path: Path, summary: list[dict]) -> None:
    """Fréchet distance against samples, a panel for each number of steps."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, steps in zip(figure.subplots(1, len(STEPS), sharey=True), STEPS):
        for (way,), lines in grouped([line for line in summary if line["steps"] == steps],
                                     ("way",)).items():
            bars = [line["frechet_interval"] or 0 for line in lines]
            axis.errorbar([line["samples"] for line in lines],
                          [line["frechet"] for line in lines], bars, marker="o", label=way)
        axis.set(xscale="log", yscale="log", xlabel="samples of reflow", title=steps_label(steps))
        ticks = sorted({line["samples"] for line in summary})
        axis.set_xticks(ticks, [f"{samples:,}" for samples in ticks], fontsize=8)
        axis.set_yticks(FRECHET_TICKS, [str(value) for value in FRECHET_TICKS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("Fréchet distance")
    figure.axes[0].legend(fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))


def main():
    parser = study_parser("Ways to make reflow need fewer samples than in the paper.", "mixed",
                          "runs/fewer-samples")
    add_table_options(parser)
    add_pairs_option(parser)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--iterations", type=at_least(4), default=256,
                        help="also measured after a quarter and a half of them; the paper's way "
                             "also after 2 and 4 times as many")
    args = parser.parse_args()
    folder, device, n = Path(args.out), pick_device(args.device), args.iterations
    rows, write = open_table(folder / "fewer_samples.json", args, SETTINGS)
    of_seed = lambda seed: study_of(seed, args, device, rows, write)
    seeds = reported_seeds(args)
    rates = {way: rate_for(of_seed(TUNING_SEED), way) for way in args.ways}
    for seed in seeds:
        study = of_seed(seed)
        for way in args.ways:
            for iterations in [n // 4, n // 2, n] + [2 * n, 4 * n] * (way == "paper"):
                with one_seed_less(f"{way}, seed {seed}"):
                    measure_cell(study, way, iterations, rates[way])
    reported = [row for row in rows if row["seed"] != TUNING_SEED]
    summary = summary_of(reported)
    table = markdown_table(summary) + footer("experiments/fewer_samples.py", args, device, reported)
    write_text(folder / "fewer_samples.md", table)
    paired = differences_of(reported)
    if paired:
        write_text(folder / "differences.md", markdown_table(paired))
    save_curves(folder / "fewer_samples.png", summary)
    print(table + f"{folder}: fewer_samples.json, .md, .png" + ", differences.md" * bool(paired))


if __name__ == "__main__":
    run(main)
