"""Beyond the paper: what makes reflow need fewer samples?

    python experiments/fewer_samples.py       seeds 0, 1 and 2; 20 minutes each; resumes
    python experiments/fewer_samples.py --ways paper negated matched

InstaFlow's reflow starts from weights that predict something else (the noise, at a time with
another signal-to-noise ratio) and takes 4.5 million samples. Each way below changes one thing, on
the same pairs and from the same seeds:

    paper        the teacher's weights
    negated      with the output negated: -ε̂ is half way from ε̂ to X1 - X0 (--init negated)
    matched      negated, and the network sees each t as the timestep of its signal-to-noise ratio
    pseudo-Huber negated; the loss √(‖e‖² + c²) - c, which weighs large errors e less
    perceptual   negated; that loss plus LPIPS of the decoded X1 that v points to

The losses are those of Lee et al. 2024 (2405.20320).

"matched" is as close to the exact initialisation as a plain velocity network gets. The teacher as a
velocity is v = (X - ε̂(X / √(t² + (1-t)²), s(t))) / t. The scale of its input hardly matters to a
network that begins with a norm. s(t) goes into the last layer of the time embedding in closed form.
The division by t, which has no limit at t = 0, is left to be learned.

Each number of samples has its own training, over whose last part the learning rate falls to 0.
Writes fewer_samples.json (a row for each seed, explained in evaluation/study.py), .md and .png: the
Fréchet distance in 1 Euler step against the samples of reflow, and from half of --iterations on in
8 steps too.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import reflow
from command import pick_device, positive, run, write_atomically, write_text
from diffusion import NoiseSchedule
from evaluation.figures import with_interval
from evaluation.perceptual import perceptual_distance
from evaluation.plots import grouped, markdown_table, steps_label
from evaluation.study import (
    Study, add_pairs_option, add_table_options, footer, open_table, study_of, study_parser,
)
from fewstep.meanflow import match_times
from rectified_flow import (
    Distance, broadcast_over, flow_velocity, pseudo_huber, reflow_loss, squared,
)
from stable_diffusion import StableDiffusion
from training import ema_copy, train

FRECHET_TICKS = (100, 200, 500, 1000, 2000)
WAYS = ("paper", "negated", "matched", "pseudo-Huber", "perceptual")


# --------------------------------------------------------------------------------------------------
# The ways


def perceptual_loss(
    model, lpips: Distance, velocity, x0: Tensor, x1: Tensor, t: Tensor, context
) -> Tensor:
    """t pseudo-Huber + LPIPS of the images of X1 and of X_t + (1 - t) v, where v points to: (B,).

    At noise, where v can only point to an average, the weight is 0 and LPIPS alone counts.
    """
    with torch.no_grad():
        wanted = model.vae.decode(x1)

    def distance(v: Tensor, straight: Tensor) -> Tensor:
        # X_t + (1 - t) (X1 - X0) is X1.
        end = model.vae.decode(x1 - broadcast_over(1 - t, x1) * (straight - v))
        return t * pseudo_huber(v, straight) + lpips(end, wanted)

    return reflow_loss(velocity, x0, x1, t, context, distance)


def perceptual_batch_loss(
    model, lpips: Distance, unet, x0: Tensor, x1: Tensor, t: Tensor, prompts: list[str],
) -> tuple[Tensor, Tensor]:
    """`perceptual_loss` as the training loop calls it, and t."""
    context = model.encode_prompts(prompts)
    return perceptual_loss(model, lpips, flow_velocity(unet), x0, x1, t, context), t


def reflowed(
    study: Study, way: str, teacher: StableDiffusion, iterations: int, lpips: Distance,
) -> StableDiffusion:
    """The flow of this way: from its file, or trained."""
    name = f"reflow-{way}-{iterations}"
    path = study.folder / f"{name}.safetensors"
    if not path.exists():
        init = "teacher" if way == "paper" else "negated"
        model = replace(study.new_student(teacher, init), kind="flow")
        if way == "matched":
            match_times(model.unet, NoiseSchedule())
        model.vae.requires_grad_(False)
        pairs = study.pairs_of(teacher)
        distance = pseudo_huber if way == "pseudo-Huber" else squared
        loss = partial(reflow.loss, model.encode_prompts, distance)
        if way == "perceptual":
            loss = partial(perceptual_batch_loss, model, lpips)
        train(model.unet, ema_copy(model.unet), partial(reflow.batch, pairs, study.seed), loss,
              study.options(model.unet, iterations, name), study.folder / name, {})
        checkpoint.save(model, path, None)
    return study.load(path)


def measure_seed(study: Study, lpips: Distance) -> None:
    """Measure each way after 1/4, 1/2 and 1 times --iterations; the paper's also after 2 and 4."""
    n, teacher = study.args.iterations, study.load_teacher()
    for way in study.args.ways:
        for iterations in [n // 4, n // 2, n] + [2 * n, 4 * n] * (way == "paper"):
            flow = reflowed(study, way, teacher, iterations, lpips)
            study.record(way, flow, iterations, [8, 1] if iterations >= n // 2 else [1],
                         flow.guidance, samples=iterations * study.args.batch_size)


# --------------------------------------------------------------------------------------------------
# What is written


def summary_of(rows: list[dict]) -> list[dict]:
    """A line for each way and number of iterations, with metrics at each number of steps."""
    summary = []
    for (way, iterations), group in grouped(rows, ("row", "iterations")).items():
        line = {"way": way, "iterations": iterations, "samples": group[0]["samples"]}
        for steps in sorted({row["steps"] for row in rows}):
            measured = [row for row in group if row["steps"] == steps]
            for name in ("frechet", "caption_accuracy"):
                label = f"{name}, {steps_label(steps)}"
                line[label], line[f"{label}_interval"] = with_interval(
                    [row[name] for row in measured] or [None]
                )
        name = "relative_straightness"
        line[name], line[f"{name}_interval"] = with_interval(
            [row[name] for row in group if row["steps"] == 1]
        )
        summary.append(line | {"seeds": len({row["seed"] for row in group})})
    return summary


def save_curves(path: Path, summary: list[dict]) -> None:
    """Fréchet distance against samples, a panel for each number of steps."""
    labels = [name for name in summary[0]
              if name.startswith("frechet") and not name.endswith("_interval")]
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, label in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels):
        for (way,), lines in grouped(summary, ("way",)).items():
            lines = [line for line in lines if line[label] is not None]
            bars = [line[f"{label}_interval"] or 0 for line in lines]
            axis.errorbar([line["samples"] for line in lines], [line[label] for line in lines],
                          bars, marker="o", label=way)
        axis.set(xscale="log", yscale="log", xlabel="training samples",
                 title=label.replace("frechet", "Fréchet distance"))
        ticks = sorted({line["samples"] for line in summary})
        axis.set_xticks(ticks, [f"{samples:,}" for samples in ticks])
        axis.minorticks_off()
        axis.set_yticks(FRECHET_TICKS, [str(value) for value in FRECHET_TICKS])
    axis.legend(fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))


def main():
    parser = study_parser("Ways to make reflow need fewer samples than in the paper.")
    add_table_options(parser)
    add_pairs_option(parser)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--iterations", type=positive, default=256, help="of each reflow")
    args = parser.parse_args()
    device = pick_device(args.device)
    rows, write = open_table(Path(args.out) / "fewer_samples.json", args)
    lpips = perceptual_distance("random", device)
    for seed in range(args.seed, args.seed + args.num_seeds):
        measure_seed(study_of(seed, args, device, rows, write), lpips)
    summary = summary_of(rows)
    table = markdown_table(summary) + footer("experiments/fewer_samples.py", args, device, rows)
    write_text(Path(args.out) / "fewer_samples.md", table)
    save_curves(Path(args.out) / "fewer_samples.png", summary)
    print(table + f"{args.out}: fewer_samples.json, .md and .png")


if __name__ == "__main__":
    run(main)
