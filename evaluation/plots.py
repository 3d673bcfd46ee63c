"""Tables and plots: of the rows of evaluate.py and the experiments, and of a training's loss."""

import itertools
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from command import write_atomically
from evaluation.figures import GRADES
from formats.images import image_grid
from training import TIME_BINS, read_metrics

# The same in all figures: the teacher, 2-RF, the one-step model. 3-RF is green.
COLOURS = {"diffusion": "tab:blue", "flow": "tab:orange", "one-step": "tab:red"}


def rounded(value, interval: float | None = None) -> str:
    """A cell of a table, to 4 digits; the interval to 2."""
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    if interval is None:
        return text
    return f"{text} ± {float(f'{interval:.2g}'):g}"  # 100, where .2g alone says 1e+02


def grouped(rows: list[dict], names: tuple[str, ...]) -> dict[tuple, list[dict]]:
    """The rows by their values under these names."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def markdown_table(rows: list[dict]) -> str:
    """A table of rows with the same keys; lists are left out, <name>_interval joins <name>."""
    is_list = lambda name: any(isinstance(row[name], list) for row in rows)
    names = [name for name in rows[0] if not name.endswith("_interval") and not is_list(name)]
    line = lambda cells: "| " + " | ".join(cells) + " |"
    lines = [line(name.replace("_", " ") for name in names), "|" + " --- |" * len(names)]
    for row in rows:
        lines.append(line(rounded(row[name], row.get(f"{name}_interval")) for name in names))
    return "\n".join(lines) + "\n"


def steps_label(number: int) -> str:
    return f"{number} step{'s' * (number > 1)}"


def label_of(row: dict, guidance: bool = False) -> str:
    """The label of a row of evaluate.json: model, number of steps, guidance scale if asked."""
    label = row["model"].replace(".safetensors", "")
    if guidance and row["guidance"] is not None:
        label += f"\nguidance {row['guidance']:g}"
    return label + ("" if row["steps"] is None else "\n" + steps_label(row["steps"]))


def save_comparison(path: str, rows: list[tuple[str, Tensor]], captions: list[str]) -> None:
    """An image with a row for each (label, images) and a column for each caption."""
    height, width = rows[0][1].shape[-2:]
    gap = max(1, width // 24)
    resized = [F.interpolate(images[: len(captions)], (height, width)) for _, images in rows]
    grid = image_grid(torch.cat(resized), len(captions), gap)
    figure = Figure(figsize=(1.25 * len(captions) + 1.2, 1.25 * len(rows) + 0.6))
    axis = figure.add_subplot()
    axis.imshow(grid, interpolation="nearest")
    columns = [gap + width / 2 + x * (width + gap) for x in range(len(captions))]
    lines = [gap + height / 2 + y * (height + gap) for y in range(len(rows))]
    labels = [textwrap.fill(caption, 15) for caption in captions]
    axis.set_xticks(columns, labels, fontsize=7.5, parse_math=False)  # "$" is a character
    axis.set_yticks(lines, [label for label, _ in rows], fontsize=9, parse_math=False)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, bbox_inches="tight"))


def save_curves(path: str, rows: list[dict]) -> None:
    """The grades against the number of steps, and the straightness by t."""
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    axes = dict(zip((*GRADES, "profile"), figure.subplots(1, len(GRADES) + 1)))
    real = next((row for row in rows if row["kind"] is None), None)
    models = grouped([row for row in rows if row["kind"]], ("model", "kind", "guidance"))
    for ((model, _, guidance), mine), marker in zip(models.items(), itertools.cycle("osD^v<>P")):
        label = f"{model.replace('.safetensors', '')}, guidance {guidance:g}".replace("$", r"\$")
        style = {"color": COLOURS[mine[0]["kind"]], "label": label}
        for name in GRADES:
            if mine[0][name] is not None:
                x, y = [row["steps"] for row in mine], [row[name] for row in mine]
                bars = [row[f"{name}_interval"] or 0 for row in mine]
                axes[name].errorbar(x, y, bars, marker=marker, **style)
        if mine[0]["straightness_profile"]:
            axes["profile"].plot(*zip(*mine[0]["straightness_profile"]), **style)
    steps = sorted({row["steps"] for row in rows if row["steps"]})
    for name in GRADES:
        if real:
            axes[name].axhline(real[name], color="gray", linestyle=":", label="real images")
        title = name.replace("_", " ")
        axes[name].set(xscale="log", xlabel="steps", title=title, xticks=steps, xticklabels=steps)
        axes[name].minorticks_off()
    axes["frechet"].set_yscale("log")
    axes["profile"].set(xlabel="t  (0 noise, 1 data)", yscale="log", title="deviation² / length²")
    for axis in axes.values():
        if axis.has_data():
            axis.legend(fontsize=6)
    write_atomically(path, lambda file: figure.savefig(file, dpi=150))


def plot_loss(folder: str | Path) -> None:
    """Write loss.png from metrics.jsonl: training and held-out loss over samples, and by t."""
    rows, held_out = read_metrics(folder), read_metrics(folder, "held_out_loss")
    if not rows:
        return
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for label, key, part, style in (("training", "loss", rows, {"linewidth": 1}),
                                    ("held-out", "held_out_loss", held_out, {"marker": "o"})):
        if part:
            axes[0].plot([row["samples"] for row in part], [row[key] for row in part],
                         label=label, **style)
    scale = "log" if all(row["loss"] > 0 for row in rows) else "linear"
    axes[0].set(xlabel="samples seen", ylabel="loss", yscale=scale, title="loss")
    axes[0].legend()
    late = [row["loss_by_t"] for row in rows[-max(1, len(rows) // 5) :] if row["loss_by_t"]]
    if late:
        means = [[by_t[k] for by_t in late if by_t[k] is not None] for k in range(TIME_BINS)]
        centres = [(k + 0.5) / TIME_BINS for k in range(TIME_BINS)]
        heights = [sum(m) / len(m) if m else 0 for m in means]
        axes[1].bar(centres, heights, width=0.9 / TIME_BINS, color="tab:blue",
                    label="training, last fifth of the run")
        if held_out and held_out[-1]["held_out_loss_by_t"]:
            axes[1].plot(centres, held_out[-1]["held_out_loss_by_t"], "o", color="tab:orange",
                         label="held-out")
        axes[1].set(xlabel="t  (0 noise, 1 data)", ylabel="loss", title="loss by t")
        axes[1].legend()
    else:
        axes[1].set_visible(False)
    write_atomically(Path(folder) / "loss.png", lambda file: figure.savefig(file, dpi=120))
