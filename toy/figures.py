"""Figures of toy/demo.py: paths, where straight lines would end, where one step lands, an animation, and the study."""

import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from command import write_whole

LIMIT = 2.6  # the plane is drawn from -LIMIT to LIMIT
PATHS, ARROWS, TRACES = 160, 8, 9  # how many are drawn
FRAME_EVERY = 2  # states of a track between two frames of the animation
matplotlib.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


def colours(labels: Tensor) -> list:
    """A dark and a light colour, which differ in grey print and to the colour-blind too."""
    dark_and_light = matplotlib.colormaps["viridis"]([0.12, 0.68])
    return [dark_and_light[k % 2] for k in labels.tolist()]


def panels(count: int, width: float, height: float, **options) -> tuple[Figure, list]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, **options)[0])


def plane(axis, title: str) -> None:
    axis.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal", xticks=[], yticks=[], title=title)
    axis.spines[:].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=150, bbox_inches="tight"))


def save_paths(path: Path, tracks: list, labels: Tensor, data: Tensor) -> None:
    """Paths from noise to data, and over them one Euler step from the start for a few."""
    figure, axes = panels(len(tracks), 3.0, 3.3)
    for axis, track in zip(axes, tracks):
        plane(axis, track.name)
        axis.scatter(*data[:1000].T, s=3, color="0.8", linewidths=0)
        for k, colour in enumerate(colours(labels[:PATHS])):
            axis.plot(*track.states[:, k].T, color=colour, linewidth=0.6, alpha=0.65)
        axis.scatter(*track.states[-1, :PATHS].T, s=7, color=colours(labels[:PATHS]), linewidths=0, zorder=3)
        ends = track.states[0] + (1 - track.times[0]) * track.velocities[0]
        inside = [k for k in range(len(labels)) if track.states[0, k].abs().max() < 0.8 * LIMIT]
        for k in inside[:ARROWS]:
            arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
            axis.annotate("", ends[k].tolist(), track.states[0, k].tolist(), arrowprops=arrow, zorder=4)
    figure.supxlabel("coloured: the model's paths; black: one Euler step from the noise", fontsize=9)
    save(figure, path)


def save_traces(path: Path, tracks: list, labels: Tensor) -> None:
    """Z_t + (1 - t) v(Z_t, t): where a straight line from Z_t would end. On a straight path it stays where it is."""
    figure, axes = panels(len(tracks), 3.0, 3.0, sharey=True)
    for axis, track in zip(axes, tracks):
        left = (1 - track.times[:-1]).reshape(-1, 1, 1)
        ends = track.states[:-1] + left * track.velocities  # (steps, points, 2)
        for k, colour in enumerate(colours(labels[:TRACES])):
            axis.plot(track.times[:-1], ends[:, k, 0], color=colour, linewidth=1.4)
        axis.set(xlim=(0, 1), xlabel="t  (0 noise, 1 data)", title=track.name)
    axes[0].set_ylabel("x of  $Z_t + (1-t)\\,v(Z_t, t)$")
    save(figure, path)


def save_landings(path: Path, landings: list[tuple[str, Tensor]], labels: Tensor) -> None:
    """Clouds of points, each (title, points)."""
    figure, axes = panels(len(landings), 2.5, 2.8)
    for axis, (title, points) in zip(axes, landings):
        plane(axis, title)
        axis.scatter(*points.T, s=3, color=colours(labels), linewidths=0, alpha=0.8)
    save(figure, path)


def save_animation(path: Path, tracks: list, labels: Tensor) -> None:
    """Noise becoming data, a GIF."""
    figure, axes = panels(len(tracks), 2.5, 2.9)
    clouds = []
    for axis, track in zip(axes, tracks):
        plane(axis, track.name)
        clouds.append(axis.scatter(*track.states[0].T, s=5, color=colours(labels), linewidths=0))
    frames, last = [], len(tracks[0].states) - 1
    for k in [0] * 6 + list(range(0, last + 1, FRAME_EVERY)) + [last] * 12:  # a rest at both ends
        for cloud, track in zip(clouds, tracks):
            cloud.set_offsets(track.states[k])
        figure.supxlabel(f"t = {k / last:.2f}", fontsize=9)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=100)
        frames.append(Image.open(png).convert("P", palette=Image.Palette.ADAPTIVE, colors=32))
    write_whole(path, lambda temporary: frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=70, loop=0))


# The lines of the study: teacher, start, legend, colour, marker, dashes.
LINES = [
    ("teacher", "random", "direct, random start", "tab:orange", "o", "-"),
    ("2-RF", "random", "after reflow, random start", "tab:blue", "s", "-"),
    ("teacher", "teacher", "direct, started from the teacher", "tab:orange", "^", "--"),
    ("2-RF", "teacher", "after reflow, started from 2-RF", "tab:blue", "v", "--"),
]  # fmt: skip
FIGURES = [
    ("endpoint_error", "squared error to its own teacher"),
    ("times_floor", "Wasserstein-2 to data, times the floor"),
    ("on_mode", "share of points on a mode"),
]


def save_study(path: Path, summary: list[dict], width: int, updates: int) -> None:
    """Figures of the students against their width, at that many updates, and against updates, at that width.

    Lines are means over seeds, bands go from the least to the greatest.
    """
    figure = Figure(figsize=(13, 7), layout="constrained")
    columns = figure.subplots(2, 3)
    for column, (name, title) in zip(columns.T, FIGURES):
        for axis, variable, fixed in zip(column, ("width", "updates"), ({"updates": updates}, {"width": width})):
            shown = [row for row in summary if fixed.items() <= row.items()]
            for teacher, start, legend, colour, marker, dashes in LINES:
                mine = [row for row in shown if (row["teacher"], row["start"]) == (teacher, start)]
                mine.sort(key=lambda row: row[variable])
                x = [row[variable] for row in mine]
                low, high = ([row[f"{name}_{end}"] for row in mine] for end in ("min", "max"))
                axis.plot(x, [row[name] for row in mine], dashes, color=colour, marker=marker, markersize=5, label=legend)
                axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            ticks = sorted({row[variable] for row in shown})
            axis.set(xscale="log", xticks=ticks, xticklabels=ticks, yscale="log" if name == "endpoint_error" else "linear")
            axis.xaxis.minorticks_off()
        column[0].set(title=title, xlabel=f"width of the student ({updates} updates)")
        column[1].set(xlabel=f"updates (width {width})")
    columns[0, 0].legend(fontsize=8)
    save(figure, path)
