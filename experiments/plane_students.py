"""One-step students in the plane: where does direct distillation fall behind, and does it catch up?

    python experiments/plane_students.py        3 seeds, 5 minutes; if stopped, run it again

Distils the teacher and 2-RF (toy/demo.py) into students of several widths, iterations, initial
weights and seeds; each seed is a whole run. Random initial weights are the same for both teachers,
so that only the targets differ. At the teacher's width, students also start from its weights, as in
the paper; there, direct distillation also gets as many more iterations as reflow took, and another
start: the teacher with its output negated, as reflow.py --init negated.

Writes students.json (a row for each seed), students.md (means with 95 % intervals over seeds) and
students.png. The columns are those of toy/demo.py; endpoint_error is to the student's own teacher.
"""

import copy
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command import Parser, positive, run, write_atomically, write_text
from evaluation.figures import with_intervals
from evaluation.plots import COLOURS, grouped, markdown_table
from evaluation.study import footer, open_table
from toy.demo import MLP, Model, Probe, add_options, distill, rings, student_row, up_to_second_flow

# Flags that decide the rows, beside KEYS.
SETTINGS = ("width", "iterations", "batch_size", "num_pairs", "teacher_guidance", "num_samples")
KEYS = ("teacher", "start", "width", "iterations")
FIGURES = {
    "endpoint_error": "squared error to its own teacher",
    "times_floor": "Wasserstein-2 to data, times the floor",
    "on_mode": "fraction of points on a mode",
}
# The lines of the figure: teacher, start, legend, colour, marker, dashes.
LINES = [
    ("teacher", "random", "direct, random start", COLOURS["diffusion"], "o", "-"),
    ("2-RF", "random", "after reflow, random start", COLOURS["flow"], "s", "-"),
    ("teacher", "teacher", "direct, started from the teacher", COLOURS["diffusion"], "^", "--"),
    ("teacher", "negated", "direct, started from the negated teacher", "tab:cyan", "P", "--"),
    ("2-RF", "teacher", "after reflow, started from 2-RF", COLOURS["flow"], "v", "--"),
]


def negated(model: Model) -> Model:
    """The model with the opposite output."""
    model = copy.deepcopy(model)
    for parameter in model.network.layers[-1].parameters():
        parameter.data.neg_()
    return model


def measure_seed(args: Namespace, rows: list[dict], write: Callable) -> None:
    """Add the students of --seed that are missing in the rows; write the rows after each."""
    wanted, counts = [], args.student_iterations  # wanted: of KEYS
    for teacher in ("teacher", "2-RF"):
        more = [counts[-1] + args.iterations] * (teacher == "teacher")
        wanted += [(teacher, "teacher", args.width, count) for count in counts + more]
        wanted += [(teacher, "negated", args.width, count)
                   for count in counts if teacher == "teacher"]
        wanted += [(teacher, "random", width, count) for width in args.widths for count in counts]
    keys = [dict(zip(KEYS, key)) | {"seed": args.seed} for key in wanted]
    missing = [key for key in keys if not any(key.items() <= row.items() for row in rows)]
    if not missing:
        return
    teacher, teacher_pairs, flow, flow_pairs = up_to_second_flow(rings(), args)
    sources = {"teacher": (teacher, teacher_pairs), "2-RF": (flow, flow_pairs)}
    probe = Probe(rings(), args.num_samples, args.seed)
    for key in missing:
        source, pairs = sources[key["teacher"]]
        torch.manual_seed(args.seed)
        random = Model("", MLP(key["width"]), "flow")
        start = {"teacher": source, "negated": negated(source), "random": random}[key["start"]]
        name = f"{source.name} + distill, {key['width']}, {key['iterations']}"
        measured = student_row(distill(start, pairs, args, key["iterations"], name), source, probe)
        figures = {name: measured[name] for name in FIGURES}
        rows.append(key | figures | {"samples": args.num_samples})
        write()


def summary_of(rows: list[dict]) -> list[dict]:
    """A line for each student: means with 95 % intervals over seeds."""
    return [dict(zip(KEYS, key)) | with_intervals(group, FIGURES) | {"seeds": len(group)}
            for key, group in grouped(rows, KEYS).items()]


def save_figure(path: Path, summary: list[dict], width: int, iterations: int) -> None:
    """Figures over the width, at that many iterations, and over iterations, at that width.

    Lines are means over seeds, bands their 95 % intervals.
    """
    figure = Figure(figsize=(13, 7), layout="constrained")
    columns = figure.subplots(2, 3)
    for column, (name, title) in zip(columns.T, FIGURES.items()):
        fixed_by_row = ({"iterations": iterations}, {"width": width})
        for axis, variable, fixed in zip(column, ("width", "iterations"), fixed_by_row):
            shown = [row for row in summary if fixed.items() <= row.items()]
            for teacher, start, legend, colour, marker, dashes in LINES:
                mine = [row for row in shown if (row["teacher"], row["start"]) == (teacher, start)]
                mine.sort(key=lambda row: row[variable])  # noqa: B023
                x, y = [row[variable] for row in mine], [row[name] for row in mine]
                bands = [row[f"{name}_interval"] or 0 for row in mine]
                low, high = ([mean + sign * band for mean, band in zip(y, bands)]
                             for sign in (-1, 1))
                axis.plot(x, y, dashes, color=colour, marker=marker, markersize=5, label=legend)
                axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            ticks = sorted({row[variable] for row in shown})
            scale = "log" if name == "endpoint_error" else "linear"
            axis.set(xscale="log", xticks=ticks, xticklabels=ticks, yscale=scale)
            axis.xaxis.minorticks_off()
        column[0].set(title=title, xlabel=f"width of the student ({iterations} iterations)")
        column[1].set(xlabel=f"iterations (width {width})")
    columns[0, 0].legend(fontsize=8)
    write_atomically(path, lambda name: figure.savefig(name, dpi=150, bbox_inches="tight"))


def main():
    parser = Parser("One-step students in the plane, over widths, iterations, starts and seeds.")
    add = parser.add_argument
    add_options(parser)
    parser.set_defaults(num_samples=2000)
    add("--num-seeds", type=positive, default=3, help="whole runs, from --seed on")
    add("--widths", type=positive, nargs="+", default=[8, 16, 32, 64, 128, 256],
        help="of the students")
    add("--student-iterations", type=positive, nargs="+", default=[125, 250, 500, 1000, 2000],
        help="increasing")
    add("--distill-iterations", type=positive, default=250,
        help="iterations at which widths are compared")
    add("--out", default="runs/plane-students", help="folder")
    args = parser.parse_args()
    path = Path(args.out) / "students.json"
    rows, write = open_table(path, args, SETTINGS)
    for seed in range(args.seed, args.seed + args.num_seeds):
        measure_seed(Namespace(**vars(args) | {"seed": seed}), rows, write)
    summary = summary_of(rows)
    device = torch.device("cpu")
    table = markdown_table(summary) + footer("experiments/plane_students.py", args, device, rows)
    write_text(path.with_suffix(".md"), table)
    # Widths are compared where the demo stops, or at the next measured number of iterations.
    counts = args.student_iterations
    at = min((n for n in counts if n >= args.distill_iterations), default=counts[-1])
    save_figure(path.with_suffix(".png"), summary, args.width, at)
    print(table + f"{args.out}: students.json, students.md and students.png")


if __name__ == "__main__":
    run(main)
