"""How short may the demo be? Quality of its one-step model against minutes.

    python benchmarks/demo.py       3 seeds of 3 lengths, 33 minutes on 2 CPU cores; resumes

Runs reflow.py and distill.py as `make demo` does, with the pairs, iterations and warm-up of FULL,
twice today's defaults, times each of --fractions; then evaluate.py on the one-step model alone. Run
nothing beside it: minutes are wall-clock time. A row that was interrupted starts again, so that its
minutes are whole.

Writes demo.json (a row for each fraction and seed), demo.md (means with 95 % intervals over seeds,
and the paired differences to the largest fraction) and demo.png.
"""

import shutil
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command import (
    Parser, at_least, positive, read_our_json, run, write_atomically, write_text,
)
from evaluation.figures import FEWEST_SAMPLES, machine_name, paired_differences, with_intervals
from evaluation.plots import grouped, markdown_table
from evaluation.study import footer, open_table, run_command
from sample import run_seed

FULL = {"pairs": 10_000, "reflow": 600, "L2": 500, "LPIPS": 150, "warm-up": 6_400}
FIGURES = ("minutes", "frechet", "caption_accuracy", "precision", "recall")


def measure(fraction: float, seed: int, folder: Path, num_samples: int) -> dict:
    """The whole method of this length and seed: its row."""
    shutil.rmtree(folder, ignore_errors=True)
    size = {name: round(fraction * count) for name, count in FULL.items()}
    flow, student, result = (folder / name for name in (
        "2rf.safetensors", "instaflow.safetensors", "evaluate.json"))
    shared = ("--num-pairs", size["pairs"], "--warmup-samples", size["warm-up"],
              "--save-every", 200, "--seed", seed)
    seconds = run_command("reflow.py", "--pairs", folder / "pairs", "--out", flow,
                          "--iterations", size["reflow"], *shared)
    seconds += run_command("distill.py", "--teacher", flow, "--pairs", folder / "pairs-2rf",
                           "--out", student, "--l2-iterations", size["L2"],
                           "--lpips-iterations", size["LPIPS"], *shared)
    run_command("evaluate.py", "--model", student, "--steps", 1, "--seed", seed,
                "--num-samples", num_samples, "--out", result)
    row = next(row for row in read_our_json(result, []) if row["model"] == student.name)
    shutil.rmtree(folder)
    figures = {name: row[name] for name in FIGURES[1:]}
    return {"fraction": fraction, "seed": seed} | size | {"minutes": seconds / 60} | figures


def summary_of(rows: list[dict]) -> list[dict]:
    """A line for each fraction, and one for its difference to the largest, seed by seed."""
    lines, groups = [], grouped(sorted(rows, key=lambda row: -row["fraction"]), ("fraction",))
    longest = next(iter(groups))
    for key, group in groups.items():
        size = {name: group[0][name] for name in FULL}
        lines.append({"row": f"{key[0]:g}"} | size | with_intervals(group, FIGURES))
        paired = paired_differences(group, groups[longest], FIGURES)
        if key != longest and paired:
            lines.append({"row": f"{key[0]:g}, difference"} | dict.fromkeys(FULL)
                         | with_intervals(paired, FIGURES))
    return lines


def save_curve(path: Path, rows: list[dict]) -> None:
    """Fréchet distance and caption accuracy against minutes: a point for each seed."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    titles = {"frechet": "Fréchet distance, one step", "caption_accuracy": "caption accuracy"}
    for axis, (name, title) in zip(figure.subplots(1, 2), titles.items()):
        for (fraction,), group in grouped(rows, ("fraction",)).items():
            axis.plot([row["minutes"] for row in group], [row[name] for row in group], "o",
                      label=f"{fraction:g} of the length")
        axis.set(title=title, xlabel="minutes")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))


def main():
    parser = Parser("Quality of the demo's one-step model against minutes.")
    add = parser.add_argument
    add("--fractions", type=at_least(0.002), nargs="+", default=[1.0, 0.5, 0.35])
    add("--num-seeds", type=positive, default=3, help="whole runs, from --seed on")
    add("--num-samples", type=at_least(FEWEST_SAMPLES), default=1000, help="images for each row")
    add("--out", default="runs/demo-length", help="folder")
    add("--seed", type=run_seed, default=0, help="fixes everything random")
    args = parser.parse_args()
    path = Path(args.out) / "demo.json"
    args.machine = machine_name(torch.device("cpu"))  # minutes of two machines do not compare
    rows, write = open_table(path, args, ("num_samples", "machine"))
    for seed in range(args.seed, args.seed + args.num_seeds):
        for fraction in args.fractions:
            key = {"fraction": fraction, "seed": seed}
            if not any(key.items() <= row.items() for row in rows):
                folder = path.parent / f"{fraction:g}-{seed}"
                rows.append(measure(fraction, seed, folder, args.num_samples))
                write()
    table = markdown_table(summary_of(rows))
    table += footer("benchmarks/demo.py", args, torch.device("cpu"), rows)
    write_text(path.with_suffix(".md"), table)
    save_curve(path.with_suffix(".png"), rows)
    print(table + f"{path}, .md and .png")


if __name__ == "__main__":
    run(main)
