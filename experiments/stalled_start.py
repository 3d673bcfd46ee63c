"""Why does direct distillation stall from the teacher's own weights? Where does its answer point?

    python experiments/stalled_start.py          3 seeds, 10 minutes each on 2 CPU cores; resumes

At t = 0 squared L2 of distillation is reflow's loss, ‖v(X0, 0) - (X1 - X0)‖². A noise predictor
answers v ≈ X0 there: X0 + v lands at 2 X0, far from everything. Five trainings on the same pairs of
the teacher, each of --iterations steps at t = 0 (but for the last) and a constant learning rate:

    teacher               from the weights as they are, the paper's start
    negated               the sign of the last convolution flipped first
    flipped at 100        as "teacher", but the sign is flipped after 100 steps
    restarted at 100      its control: the optimizer alone starts again after 100 steps
    a tenth at random t   as "teacher", with t ~ U[0, 1] for a tenth of the samples

Every --measure-every steps, on pairs that nothing is trained on:

    loss            E‖X0 + v - X1‖² per latent element
    share_of_zero   loss / E‖X1‖²: 1 if the step could as well land at 0
    share_of_mean   loss / E‖X1 - E[X1]‖²: 1 if it could as well land at the mean latent
    cosine_noise    of v and X0: 1 is the noise predictor's answer, -1 lands near 0
    cosine_target   of v and X1 - X0
    cosine_end      of X0 + v and X1, both without the mean latent: what the step knows of its image

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
from command import non_negative, pick_device, positive, run, write_atomically, write_text
from evaluation.figures import with_intervals
from evaluation.plots import grouped, markdown_table
from evaluation.study import Study, footer, open_table, study_parser
from pairs import Pairs
from rectified_flow import flow_velocity, one_step, squared
from training import ema_copy, train

RUNS = ("teacher", "negated", "flipped at 100", "restarted at 100", "a tenth at random t")
FIRST = 100  # steps before the flip or the restart
TENTH = 0.1
FIGURES = ("loss", "share_of_zero", "share_of_mean", "cosine_noise", "cosine_target", "cosine_end")
SETTINGS = ("iterations", "batch_size", "teacher_steps", "held_out", "dtype", "learning_rate",
            "captions", "measure_every")


def batch_at_t(
    pairs: Pairs, seed: int, fraction: float, samples: Tensor, share: slice,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """X0, X1, t and T: t is random for this fraction of the samples, 0 for the others."""
    x0, x1, prompts = distill.batch(pairs, seed, 0, samples, share, generator)
    t, chance = torch.rand(2, len(samples), generator=generator)
    return x0, x1, torch.where(chance < fraction, t, 0.0)[share], prompts


@torch.no_grad()
def measure(model, held_out: tuple, step: int) -> dict:
    """Where the one step of the network, not its average, points on held-out pairs."""
    x0, x1, prompts = held_out
    end = one_step(flow_velocity(model.unet), x0, model.encode_prompts(prompts))
    mean = x1.mean(0)
    cosine = lambda a, b: F.cosine_similarity(a.flatten(1), b.flatten(1)).mean().item()
    loss = (end - x1).square().mean()
    return {
        "step": step, "loss": loss.item(),
        "share_of_zero": (loss / x1.square().mean()).item(),
        "share_of_mean": (loss / (x1 - mean).square().mean()).item(),
        "cosine_noise": cosine(end - x0, x0), "cosine_target": cosine(end - x0, x1 - x0),
        "cosine_end": cosine(end - mean, x1 - mean),
    }


def flip(network) -> None:
    for parameter in network.conv_out.parameters():
        parameter.data.neg_()


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
    held_out = held_out[torch.arange(len(held_out))]
    model, new = replace(study.new_student(teacher, start), kind="one-step"), []
    fraction = TENTH if name == "a tenth at random t" else 0.0
    parts = [args.iterations]
    if name.endswith("at 100"):
        parts = [FIRST, args.iterations - FIRST]
    for done, steps in zip((0, FIRST), parts):
        options = study.options(model.unet, steps, f"{name}, seed {seed}", args.learning_rate)
        options = replace(options, save_every=args.measure_every, seed=seed + done)
        if done and name.startswith("flipped"):
            flip(model.unet)

        def validate(step: int, loss, done=done) -> None:
            new.append(measure(model, held_out, done + step))

        train(model.unet, ema_copy(model.unet),
              partial(batch_at_t, pairs, seed + done, fraction),
              partial(reflow.loss, model.encode_prompts, squared), options,
              study.folder / str(done), {}, validate)
    rows += [{"run": name, "seed": seed} | row for row in new]
    write()


def summary_of(rows: list[dict]) -> list[dict]:
    """The last step of each run: means with 95 % intervals over seeds."""
    last = max(row["step"] for row in rows)
    groups = grouped([row for row in rows if row["step"] == last], ("run",))
    return [{"run": name, "step": last} | with_intervals(group, FIGURES) | {"seeds": len(group)}
            for (name,), group in groups.items()]


def save_curves(path: Path, rows: list[dict]) -> None:
    """Each figure against training steps, a line for each run and seed."""
    panels = {"share_of_mean": "loss / that of the mean latent",
              "cosine_noise": "cosine of v and X0", "cosine_target": "cosine of v and X1 - X0",
              "cosine_end": "cosine of the end and X1"}
    figure = Figure(figsize=(15, 3.5), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(1, len(panels)), panels.items()):
        for k, run_name in enumerate(RUNS):
            label = run_name
            for _, group in grouped([r for r in rows if r["run"] == run_name], ("seed",)).items():
                axis.plot([row["step"] for row in group], [row[name] for row in group],
                          color=f"C{k}", label=label, linewidth=1)
                label = None
        axis.set(title=title, xlabel="training steps")
        axis.grid(alpha=0.3)
    figure.axes[0].set_yscale("log")
    figure.axes[0].legend(fontsize=7)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))


def main():
    parser = study_parser("Why direct distillation stalls from the teacher's own weights.",
                          "mixed", "runs/paper-table")
    add = parser.add_argument
    add("--iterations", type=positive, default=500, help="training steps of each run")
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
