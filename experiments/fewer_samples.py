"""Beyond the paper: what makes reflow need fewer samples?

    python experiments/fewer_samples.py       seeds 0, 1 and 2, on the pairs of paper_table.py
    python experiments/fewer_samples.py --num-seeds 1

InstaFlow's reflow begins with weights that answer another question (which noise, at a time of
another signal-to-noise ratio) and takes 4.5 million samples. Each way below changes one thing, on
the same pairs and from the same seeds:

    paper        the teacher's weights as they are
    negated      the sign of the output changed: -ε̂ is half way from ε̂ to X1 - X0 (--init negated)
    matched      negated, and each t is shown as the timestep with its signal-to-noise ratio
    U-shaped     negated; t drawn from p(t) ∝ cosh(4 (t - 1/2)), most often at the ends
    pseudo-Huber negated; the loss √(‖e‖² + c²) - c, which counts large errors e less
    perceptual   negated; that loss plus LPIPS of the decoded X1 that v points to
    unguided     negated; pairs made at guidance 1 and half the price, guidance 2.5 when drawing

Times and losses are those of Lee et al. 2024 (2405.20320).

"matched" is the exact start as far as a plain velocity network can have it. The teacher seen as a
velocity is v = (X - ε̂(X / √(t² + (1-t)²), s(t))) / t: the scale of its input hardly matters to a
network that begins with a norm, s(t) goes into the last layer of the time embedding in closed form,
and the division by t, which has no limit at t = 0, is left to be learned.

Writes fewer_samples.json, .md and .png: the Fréchet distance at 1 Euler step against the
samples of reflow, and from half of --iterations updates on at 8 steps.
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "toy"))

from command import pick_device, positive, run, write_text, write_whole
from diffusion import NoiseSchedule
from distill import perceptual_distance
from evaluation.figures import with_interval
from evaluation.plots import grouped, in_steps, markdown_table
from paper_table import Study, footer, open_table, study_of, study_parser, world_of
from rectified_flow import Distance, like, pseudo_huber, reflow_loss
from reflow import LOSSES, reflow, uniform_times
from training import autocast_dtype
from unet import UNet, timestep_embedding

U_SHAPE = 4.0  # the exponent of Lee et al.
RIDGE = 1e-2  # keeps the refitted weights small
FRECHET_TICKS = (100, 200, 500, 1000, 2000)
WAYS = ("paper", "negated", "matched", "U-shaped", "pseudo-Huber", "perceptual", "unguided")


def match_times(unet: UNet, schedule: NoiseSchedule) -> None:
    """Make the U-Net answer at 1000 (1 - t) as it did at the timestep of t's signal-to-noise ratio.

    It is changed in place. The embedding of times is two linear layers. The second is fitted anew,
    by least squares over all whole timesteps.
    """
    embedding, channels = unet.time_embedding, unet.config.block_out_channels[0]
    asked = torch.arange(schedule.timesteps + 1, dtype=torch.float64)
    meant = schedule.timestep(1 - asked / schedule.timesteps)
    with torch.no_grad():
        hidden = F.silu(embedding.linear_1(timestep_embedding(asked, channels))).double()
        wanted = embedding(timestep_embedding(meant, channels)).double()
        inputs = torch.cat([hidden, torch.ones(len(hidden), 1, dtype=hidden.dtype)], dim=1)
        penalty = RIDGE * torch.eye(inputs.shape[1], dtype=inputs.dtype)
        # (hidden + 1, out)
        fitted = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ wanted)
        embedding.linear_2.weight.copy_(fitted[:-1].T)
        embedding.linear_2.bias.copy_(fitted[-1])


def u_shaped_times(count: int, generator: torch.Generator) -> Tensor:
    """t with the density ∝ cosh(a (t - 1/2)), by the inverse of its distribution function."""
    uniform = torch.rand(count, generator=generator)
    return 0.5 + torch.asinh((2 * uniform - 1) * math.sinh(U_SHAPE / 2)) / U_SHAPE


def perceptual_loss(
    model, lpips: Distance, velocity, x0: Tensor, x1: Tensor, t: Tensor, context
) -> Tensor:
    """t pseudo-Huber + LPIPS of the pictures of X1 and of X_t + (1 - t) v, where v points to: (B,).

    At noise, where v can only point to an average, the weight is 0 and LPIPS alone counts.
    """
    with torch.no_grad():
        wanted = model.vae.decode(x1)

    def distance(v: Tensor, straight: Tensor) -> Tensor:
        # X_t + (1 - t) (X1 - X0) is X1.
        landing = model.vae.decode(x1 - like(1 - t, x1) * (straight - v))
        return t * pseudo_huber(v, straight) + lpips(landing, wanted)

    return reflow_loss(velocity, x0, x1, t, context, distance)


def measure_seed(study: Study, lpips: Distance) -> None:
    """Every way, measured after 1/4, 1/2 and 1 times --iterations updates.

    The paper's after 2 and 4 times too.
    """
    teacher = study.load(world_of(study.args.captions)[1])
    dtype = autocast_dtype(study.args.dtype, study.device, teacher.unet)
    for way in study.args.ways:
        measure_way(study, way, teacher, dtype, lpips)


def measure_way(study: Study, way: str, teacher, dtype: torch.dtype, lpips: Distance) -> None:
    n, unguided = study.args.iterations, way == "unguided"
    times = u_shaped_times if way == "U-shaped" else uniform_times

    def train(model, updates: int) -> None:
        if way == "matched":
            match_times(model.unet, NoiseSchedule())
        perceptual = partial(perceptual_loss, model, lpips)
        losses = {"pseudo-Huber": LOSSES["pseudo-huber"], "perceptual": perceptual}
        loss = losses.get(way, LOSSES["l2"])
        model.vae.requires_grad_(False)
        pairs = study.pairs_of(teacher, guidance=1.0 if unguided else None)
        folder = study.folder / f"reflow-{way}"
        reflow(model, pairs, study.options(updates), folder, {}, dtype, loss, times)

    for updates in [n // 4, n // 2, n] + [2 * n, 4 * n] * (way == "paper"):
        start = partial(train, updates=updates)
        init = "teacher" if way == "paper" else "negated"
        flow = study.made(f"reflow-{way}-{updates}", teacher, start, init)
        steps = [8, 1] if updates >= n // 2 else [1]
        study.record(
            way, flow, updates, steps=steps, guidance=teacher.guidance if unguided else None,
            samples=updates * study.args.batch_size,
        )


def summary_of(rows: list[dict]) -> list[dict]:
    """One line for each way and number of updates.

    Fréchet distance and captions right at each number of steps, S.
    """
    summary = []
    for (way, updates), group in grouped(rows, ("row", "updates")).items():
        line = {"way": way, "updates": updates, "samples": group[0]["samples"]}
        for steps in sorted({row["steps"] for row in rows}):
            mine = [row for row in group if row["steps"] == steps]
            for name in ("frechet", "caption_accuracy"):
                label = f"{name}, {in_steps(steps)}"
                line[label], line[f"{label}_interval"] = with_interval(
                    [row[name] for row in mine] or [None]
                )
        name = "relative_straightness"
        line[name], line[f"{name}_interval"] = with_interval(
            [row[name] for row in group if row["steps"] == 1]
        )
        summary.append(line | {"seeds": len({row["seed"] for row in group})})
    return summary


def save_curves(path: Path, summary: list[dict]) -> None:
    labels = [name for name in summary[0]
              if name.startswith("frechet") and not name.endswith("_interval")]
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, label in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels):
        for (way,), mine in grouped(summary, ("way",)).items():
            mine = [line for line in mine if line[label] is not None]
            bars = [line[f"{label}_interval"] or 0 for line in mine]
            axis.errorbar([line["samples"] for line in mine], [line[label] for line in mine], bars,
                          marker="o", label=way)
        axis.set(xscale="log", yscale="log", xlabel="samples of reflow",
                 title=label.replace("frechet", "Fréchet distance"))
        ticks = sorted({line["samples"] for line in summary})
        axis.set_xticks(ticks, [f"{samples:,}" for samples in ticks])
        axis.minorticks_off()
        axis.set_yticks(FRECHET_TICKS, [str(value) for value in FRECHET_TICKS])
    axis.legend(fontsize=8)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=150))


def main():
    parser = study_parser("What makes reflow need fewer samples than the paper's.")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--iterations", type=positive, default=256, help="updates of each reflow")
    # One training goes on from each number of samples to the next, so its rate does not fall.
    parser.set_defaults(cooldown=0.0)
    args = parser.parse_args()
    device = pick_device(args.device)
    rows, write = open_table(Path(args.out) / "fewer_samples.json", args)
    distance = perceptual_distance("random", device)
    for seed in range(args.seed, args.seed + args.num_seeds):
        measure_seed(study_of(seed, args, device, rows, write), distance)
    summary = summary_of(rows)
    table = markdown_table(summary) + footer("experiments/fewer_samples.py", args, device, rows)
    write_text(Path(args.out) / "fewer_samples.md", table)
    save_curves(Path(args.out) / "fewer_samples.png", summary)
    print(table + f"{args.out}: fewer_samples.json, .md and .png")


if __name__ == "__main__":
    run(main)
