"""Why does direct distillation stall from the teacher's own weights? Where does its answer point?

    python experiments/stalled_start.py       3 seeds, 40 minutes on one CPU core; resumes

At t = 0 squared L2 of distillation is reflow's loss, ‖v(X0, 0) - (X1 - X0)‖². A noise predictor
gives v ≈ X0 there: X0 + v lands at 2 X0, far from any data. Five trainings use the same pairs of
the teacher in the same order. Each has --iterations steps at t = 0 (except the last training) and a
constant learning rate:

    teacher               from the weights as they are, the paper's start
    negated               the sign of the last convolution flipped first
    flipped at 100        as "teacher", but after 100 steps the sign is flipped and Adam restarts
    restarted at 100      its control: after 100 steps Adam's moments start again from zero
    a tenth at random t   as "teacher", with t ~ U[0, 1] for a tenth of the samples

Every --measure-every steps, on held-out pairs:

    loss               E‖X0 + v - X1‖² per latent element
    share_of_constant  loss / loss of the best constant v, E[X1 - X0]: 1 if v ignores its input
    share_of_zero      loss / E‖X1‖²: 1 if the step could as well land at 0
    cosine_noise       of v and X0
    cosine_target      of v and X1 - X0

Two rows of the table have no network: "constant v" is E[X1 - X0] and "target" X1 - X0.
left_plateau lists, for each seed, the first measured step with share_of_constant below PLATEAU.

Writes stalled_start.json, .md (means with 95 % intervals over seeds at the last step) and .png.
"""

import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import distill
import reflow
from command import (
    at_least, non_negative, pick_device, positive, run, write_atomically, write_text,
)
from evaluation.figures import with_intervals
from evaluation.plots import grouped, markdown_table
from evaluation.study import Study, footer, open_table, study_parser
from pairs import Pairs
from rectified_flow import flow_velocity, one_step, squared
from stable_diffusion import initial_student
from training import append_metrics, ema_copy, read_metrics, train

RUNS = ("teacher", "negated", "flipped at 100", "restarted at 100", "a tenth at random t")
FIRST = 100  # steps before the flip or the restart
TENTH = 0.1
PLATEAU = 0.75  # of share_of_constant: between the plateau, near 1, and what follows it, near 0.1
FIGURES = ("loss", "share_of_constant", "share_of_zero", "cosine_noise", "cosine_target")
SETTINGS = ("iterations", "batch_size", "teacher_steps", "held_out", "dtype", "learning_rate",
            "captions", "measure_every")


def batch_at_t(
    pairs: Pairs, seed: int, seen: int, fraction: float, samples: Tensor, share: slice,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """X0, X1, t and T: t is random for this fraction of the samples, 0 for the others."""
    x0, x1, prompts = distill.batch(pairs, seed, seen, samples, share, generator)
    t, chance = torch.rand(2, len(samples), generator=generator)
    return x0, x1, torch.where(chance < fraction, t, 0.0)[share], prompts


def figures_of(v: Tensor, x0: Tensor, x1: Tensor) -> dict:
    """FIGURES of the velocities v (N, 4, h, w) at the noises X0."""
    straight = x1 - x0
    loss, varies = (v - straight).square().mean(), (straight - straight.mean(0)).square().mean()
    cosine = lambda a: F.cosine_similarity(v.flatten(1), a.flatten(1)).mean().item()
    return {
        "loss": loss.item(), "share_of_constant": (loss / varies).item(),
        "share_of_zero": (loss / x1.square().mean()).item(),
        "cosine_noise": cosine(x0), "cosine_target": cosine(straight),
    }


@torch.no_grad()
def measure(model, held_out: tuple, folder: Path, step: int) -> None:
    """Append the figures of the network, on held-out pairs, to the run's metrics."""
    x0, x1, prompts = held_out
    end = one_step(flow_velocity(model.unet), x0, model.encode_prompts(prompts))
    append_metrics(folder, {"step": step} | figures_of(end - x0, x0, x1))


def measure_run(name: str, seed: int, args, rows: list[dict], write) -> None:
    """Train one run of this seed and add its rows, unless the table has them."""
    if any(row["run"] == name and row["seed"] == seed for row in rows):
        return
    start, folder = "negated" if name == "negated" else "teacher", Path(args.out) / args.captions
    mine = Namespace(**vars(args), num_pairs=args.iterations * args.batch_size, cooldown=0.0)
    study = Study(seed, folder / f"stalled-{name.replace(' ', '-')}-{seed}", mine,
                  pick_device(args.device), None, rows, write)
    teacher = study.load_teacher()
    pairs, held_out = study.pairs_of(teacher), study.pairs_of(teacher, held_out=True)
    x0, x1, prompts = held_out[torch.arange(len(held_out))]
    held_out = x0.to(study.device), x1.to(study.device), prompts
    if not rows:
        rows += references(seed, *held_out[:2])
    model, new = replace(study.new_student(teacher, start), kind="one-step"), {}
    fraction, done = TENTH if name == "a tenth at random t" else 0.0, 0
    breaks = [FIRST] if name.endswith("at 100") else []
    for end in [*breaks, args.iterations]:
        options = study.options(model.unet, end - done, f"{name}, seed {seed}", args.learning_rate)
        # No averaging (2^-32 is none in fp32, so from batches of 32 on) and no second warm-up: so
        # a break changes what its name says and no more.
        options = replace(options, save_every=args.measure_every, ema_half_life=1,
                          warmup_samples=0 if done else options.warmup_samples)
        if done and name.startswith("flipped"):
            initial_student(model.unet, "negated", teacher.kind, seed)
        part = study.folder / f"from-{done}"
        train(model.unet, ema_copy(model.unet),
              partial(batch_at_t, pairs, seed, done * args.batch_size, fraction),
              partial(reflow.loss, model.encode_prompts, squared), options, part, {},
              lambda step, loss, part=part: measure(model, held_out, part, step))
        new |= {done + row["step"]: row | {"step": done + row["step"]}
                for row in read_metrics(part, "share_of_zero")}
        done = end
    rows += [{"run": name, "seed": seed} | row for row in new.values()]
    write()


def references(seed: int, x0: Tensor, x1: Tensor) -> list[dict]:
    """Two rows without a network: the best constant velocity, and the target itself."""
    straight = x1 - x0
    constant = straight.mean(0, keepdim=True).expand_as(straight)
    return [{"run": name, "seed": seed, "step": None} | figures_of(v, x0, x1)
            for name, v in (("constant v", constant), ("target", straight))]


def left_plateau(rows: list[dict]) -> str:
    """For each seed of a run, the first measured step with its loss below the plateau."""
    steps = [next((row["step"] for row in group if row["share_of_constant"] < PLATEAU), "never")
             for group in grouped(rows, ("seed",)).values()]
    return ", ".join(map(str, steps))


def summary_of(rows: list[dict]) -> list[dict]:
    """The last step of each run: means with 95 % intervals over seeds."""
    last, lines = max(row["step"] or 0 for row in rows), []
    for (name,), group in grouped(rows, ("run",)).items():
        ends = [row for row in group if row["step"] in (None, last)]
        left = None if ends[0]["step"] is None else left_plateau(group)
        lines.append({"run": name} | with_intervals(ends, FIGURES)
                     | {"left_plateau": left, "seeds": len(ends)})
    return lines


def save_curves(path: Path, rows: list[dict]) -> None:
    """Each figure against training steps, a line for each run and seed."""
    panels = {"share_of_constant": "loss / that of a constant v",
              "cosine_noise": "cosine of v and X0", "cosine_target": "cosine of v and X1 - X0"}
    references = {row["run"]: row for row in rows if row["step"] is None}
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(1, len(panels)), panels.items()):
        for k, run_name in enumerate(RUNS):
            label = run_name
            for _, group in grouped([r for r in rows if r["run"] == run_name], ("seed",)).items():
                axis.plot([row["step"] for row in group], [row[name] for row in group],
                          color=f"C{k}", label=label, linewidth=1)
                label = None
        axis.axhline(references["constant v"][name], color="black", linewidth=1, linestyle="--",
                     label="a constant v")
        axis.axhline(references["target"][name], color="black", linewidth=1, linestyle=":",
                     label="the target, X1 - X0")
        axis.set(title=title, xlabel="training steps")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))


def main():
    parser = study_parser("Why direct distillation stalls from the teacher's own weights.",
                          "mixed", "runs/paper-table")
    add = parser.add_argument
    add("--iterations", type=at_least(FIRST + 1), default=500, help="training steps of each run")
    add("--learning-rate", type=non_negative, default=5e-4, help="constant after the warm-up")
    add("--measure-every", type=positive, default=20, help="training steps")
    add("--held-out", type=positive, default=500, help="pairs that nothing is trained on")
    args = parser.parse_args()
    path = Path(args.out) / "stalled_start.json"
    rows, write = open_table(path, args, SETTINGS)
    for seed in range(args.seed, args.seed + args.num_seeds):
        for name in RUNS:
            measure_run(name, seed, args, rows, write)
    table = markdown_table(summary_of(rows))
    table += footer("experiments/stalled_start.py", args, pick_device(args.device), rows)
    write_text(path.with_suffix(".md"), table)
    save_curves(path.with_suffix(".png"), rows)
    print(table + f"{path}, .md and .png")


if __name__ == "__main__":
    run(main)
