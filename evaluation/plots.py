"""Tables and plots of the rows that evaluate.py and the experiments write."""

import itertools
import textwrap

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from command import write_whole
from evaluation.figures import GRADES

# Of models in all figures: the teacher, 2-RF, one step; 3-RF is green.
COLOURS = {"diffusion": "tab:blue", "flow": "tab:orange", "one-step": "tab:red"}


def rounded(value, interval: float | None = None) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    if interval is None:
        return text
    return f"{text} ± {float(f'{interval:.2g}'):g}"  # 100, where .2g alone says 1e+02


def grouped(rows: list[dict], names: tuple[str, ...]) -> dict[tuple, list[dict]]:
    """The rows that agree in the figures of these names, by their values."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def markdown_table(rows: list[dict]) -> str:
    """Rows with the same keys; lists are left out, and <name>_interval is joined to <name>."""
    is_list = lambda name: any(isinstance(row[name], list) for row in rows)
    names = [name for name in rows[0] if not name.endswith("_interval") and not is_list(name)]
    line = lambda cells: "| " + " | ".join(cells) + " |"
    lines = [line(name.replace("_", " ") for name in names), "|" + " --- |" * len(names)]
    for row in rows:
        lines.append(line(rounded(row[name], row.get(f"{name}_interval")) for name in names))
    return "\n".join(lines) + "\n"


def in_steps(number: int) -> str:
    return f"{number} step{'s' * (number > 1)}"


def label_of(row: dict, guidance: bool = False) -> str:
    """A model's name, its number of steps if it has one, and its guidance if asked."""
    label = row["model"].replace(".safetensors", "")
    if guidance and row["guidance"] is not None:
        label += f"\nguidance {row['guidance']:g}"
    return label + ("" if row["steps"] is None else "\n" + in_steps(row["steps"]))


def save_comparison(path: str, rows: list[tuple[str, Tensor]], captions: list[str]) -> None:
    """A picture with a row for each (label, pictures) and a column for each caption."""
    height, width = rows[0][1].shape[-2:]
    gap = max(1, width // 24)
    alike = [F.interpolate(pictures[: len(captions)], (height, width)) for _, pictures in rows]
    sheet = make_grid((torch.cat(alike).clamp(-1, 1) + 1) / 2, len(captions), gap, pad_value=1.0)
    figure = Figure(figsize=(1.25 * len(captions) + 1.2, 1.25 * len(rows) + 0.6))
    axis = figure.add_subplot()
    axis.imshow(sheet.permute(1, 2, 0).numpy(), interpolation="nearest")
    columns = [gap + width / 2 + x * (width + gap) for x in range(len(captions))]
    lines = [gap + height / 2 + y * (height + gap) for y in range(len(rows))]
    axis.set_xticks(columns, [textwrap.fill(caption, 15) for caption in captions], fontsize=7.5)
    axis.set_yticks(lines, [label for label, _ in rows], fontsize=9)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=150, bbox_inches="tight"))


def save_curves(path: str, rows: list[dict]) -> None:
    """The grades against the number of steps, and how bent paths are against t."""
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    axes = dict(zip((*GRADES, "profile"), figure.subplots(1, len(GRADES) + 1)))
    drawn = next((row for row in rows if row["kind"] is None), None)
    models = grouped([row for row in rows if row["kind"]], ("model", "guidance"))
    for ((model, guidance), mine), marker in zip(models.items(), itertools.cycle("osD^v<>P")):
        label = f"{model.replace('.safetensors', '')}, guidance {guidance:g}"
        look = {"color": COLOURS[mine[0]["kind"]], "label": label}
        for name in GRADES:
            if mine[0][name] is not None:
                x, y = [row["steps"] for row in mine], [row[name] for row in mine]
                bars = [row[f"{name}_interval"] or 0 for row in mine]
                axes[name].errorbar(x, y, bars, marker=marker, **look)
        if mine[0]["straightness_profile"]:
            axes["profile"].plot(*zip(*mine[0]["straightness_profile"]), **look)
    steps = sorted({row["steps"] for row in rows if row["steps"]})
    for name in GRADES:
        if drawn:
            axes[name].axhline(drawn[name], color="gray", linestyle=":", label="drawn pictures")
        title = name.replace("_", " ")
        axes[name].set(xscale="log", xlabel="steps", title=title, xticks=steps, xticklabels=steps)
        axes[name].minorticks_off()
    axes["frechet"].set_yscale("log")
    axes["profile"].set(xlabel="t  (0 noise, 1 data)", yscale="log", title="bend / squared length")
    for axis in axes.values():
        if axis.has_data():
            axis.legend(fontsize=6)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=150))
