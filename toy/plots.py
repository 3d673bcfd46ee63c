"""The figures of toy/demo.py."""

import io
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from command import write_atomically
from evaluation.plots import COLOURS, grouped

LIMIT = 2.6  # axes go from -LIMIT to LIMIT
PATHS, ARROWS, TRACES = 160, 8, 9  # how many are shown
LINE_TIMES = (0.1, 0.5, 0.8)  # of the panels of lines.png
FRAME_EVERY = 2  # states of a track between two frames of the GIF
matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}


class Track(NamedTuple):
    """The paths of N points."""

    name: str
    times: Tensor  # (steps + 1,), shown at even intervals
    states: Tensor  # (steps + 1, N, 2)

    def straight_ends(self) -> Tensor:
        """Z_t + (1 - t) v(Z_t, t), where a straight line from each state ends: (steps, N, 2)."""
        t = self.times.reshape(-1, 1, 1)
        return self.states[:-1] + (1 - t[:-1]) * self.states.diff(dim=0) / t.diff(dim=0)


def colours(labels: Tensor) -> list:
    """Dark for label 0, light for 1: distinct in greyscale and for colour-blind readers too."""
    dark_and_light = matplotlib.colormaps["viridis"]([0.12, 0.68])
    return [dark_and_light[k] for k in labels.tolist()]


def panels(count: int, width: float, height: float, **options) -> tuple[Figure, list]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, **options)[0])


def set_plane(axis, title: str) -> None:
    limits = (-LIMIT, LIMIT)
    axis.set(xlim=limits, ylim=limits, aspect="equal", xticks=[], yticks=[], title=title)
    axis.spines[:].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda name: figure.savefig(name, dpi=150, bbox_inches="tight"))


def save_paths(path: Path, tracks: list[Track], labels: Tensor, data: Tensor) -> None:
    """Paths from noise to data; for a few of them, one Euler step from the start."""
    figure, axes = panels(len(tracks), 3.0, 3.3)
    arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    for axis, track in zip(axes, tracks):
        set_plane(axis, track.name)
        axis.scatter(*data[:1000].T, s=3, color="0.8", linewidths=0)
        for k, colour in enumerate(colours(labels[:PATHS])):
            axis.plot(*track.states[:, k].T, color=colour, linewidth=0.6, alpha=0.65)
        axis.scatter(*track.states[-1, :PATHS].T, s=7, color=colours(labels[:PATHS]), zorder=3)
        start, ends = track.states[0], track.straight_ends()[0]
        inside = [k for k in range(len(labels)) if start[k].abs().max() < 0.8 * LIMIT]
        for k in inside[:ARROWS]:
            axis.annotate("", ends[k].tolist(), start[k].tolist(), arrowprops=arrow, zorder=4)
    figure.supxlabel("coloured by label: the model's paths, dots at their ends; grey: data; "
                     "black: one Euler step from the noise", fontsize=9)
    save(figure, path)


def save_lines(
    path: Path, x: Tensor, centres: Tensor, weights: Tensor, velocities: Tensor,
) -> None:
    """The lines through one place at LINE_TIMES, wide where likely, and their average.

    x (2,), centres (K, 2); weights (T, K, 1) and velocities (T, K, 2) of the lines to each centre.
    """
    figure, axes = panels(len(LINE_TIMES), 3.0, 3.3)
    arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
    for axis, t, weight, velocity in zip(axes, LINE_TIMES, weights, velocities):
        set_plane(axis, f"t = {t}")
        axis.set(xlim=(-1.7, 1.7), ylim=(-1.7, 1.7))
        axis.scatter(*centres.T, s=150, color="0.8", linewidths=0)
        for likely, v in zip(weight[:, 0].tolist(), velocity):
            line = torch.stack([x - t * v, x + (1 - t) * v])
            axis.plot(*line.T, color="tab:purple", linewidth=0.4 + 6 * likely,
                      alpha=0.6)
            axis.plot(*line[0], ".", color="0.5", markersize=4)
        end = x + (1 - t) * (weight * velocity).sum(0)
        axis.annotate("", end.tolist(), x.tolist(), arrowprops=arrow, zorder=4)
        axis.plot(*x, "o", color="black", markersize=4)
    figure.supxlabel("lines from noise (small dots) to data (grey) through one place, wide where "
                     "likely; black: their average, to t = 1", fontsize=9)
    save(figure, path)


def save_ddim(path: Path, ddim: Tensor, scales: Tensor, euler: Tensor, labels: Tensor) -> None:
    """DDIM's states x_s; and x_s / (α + σ) with the states of Euler's method on top."""
    # ddim, euler (steps + 1, N, 2); scales (steps + 1,): α + σ of each step.
    figure, axes = panels(2, 3.4, 3.6)
    titles = (r"DDIM, in its own $x_s$", r"$x_s / (\alpha + \sigma)$, and Euler's method")
    for axis, title, points in zip(axes, titles, (ddim, ddim / scales.reshape(-1, 1, 1))):
        set_plane(axis, title)
        for k, colour in enumerate(colours(labels)):
            axis.plot(*points[:, k].T, color=colour, linewidth=1.2, marker="o", markersize=3.5)
            axis.plot(*points[0, k], "o", color=colour, markersize=10, fillstyle="none")
    axes[1].plot(*euler.unbind(2), "+", color="black", markersize=7)
    figure.supxlabel(
        "rings: noise; dots: DDIM as published; crosses: Euler's steps on the velocity", fontsize=9
    )
    save(figure, path)


def save_steps(path: Path, rows: list[dict]) -> None:
    """The endpoint error over the number of Euler steps; and the straightness."""
    figure, axes = panels(2, 4.2, 3.3)
    by_euler = [row for row in rows
                if row["solver"] == "euler" and row["relative_straightness"] is not None]
    models = grouped(by_euler, ("model",))
    colours = [COLOURS["diffusion"], COLOURS["flow"], "tab:green"]
    for ((name,), mine), marker, colour in zip(models.items(), "osD", colours):
        steps, errors = ([row[key] for row in mine] for key in ("steps", "endpoint_error"))
        axes[0].plot(steps, errors, marker=marker, color=colour, label=name)
    axes[0].set(xscale="log", yscale="log", xlabel="Euler steps", xticks=steps, xticklabels=steps,
                title=r"endpoint error, $E\|Z_1 - exact\|^2$")
    axes[0].minorticks_off()
    axes[0].legend(fontsize=8)
    straight = [mine[0]["relative_straightness"] for mine in models.values()]
    bars = axes[1].bar([name for (name,) in models], straight, color=colours)
    axes[1].bar_label(bars, fmt="%.3f")
    axes[1].set(yscale="log", title=r"straightness, $S / E\|Z_1 - Z_0\|^2$")
    save(figure, path)


def save_straight(path: Path, tracks: list[Track], labels: Tensor) -> None:
    """Where a straight line from each state ends, which is constant on a straight path."""
    figure, axes = panels(len(tracks), 3.0, 3.0, sharey=True)
    for axis, track in zip(axes, tracks):
        x, _ = track.straight_ends().unbind(2)
        for k, colour in enumerate(colours(labels[:TRACES])):
            axis.plot(track.times[:-1], x[:, k], color=colour, linewidth=1.4)
        axis.set(xlim=(0, 1), xlabel="t  (0 noise, 1 data)", title=track.name)
    axes[0].set_ylabel("x of  $Z_t + (1-t)\\,v(Z_t, t)$")
    save(figure, path)


def save_clouds(path: Path, clouds: dict[str, Tensor], labels: Tensor) -> None:
    """Points (N, 2), a panel for each title."""
    figure, axes = panels(len(clouds), 2.5, 2.8)
    for axis, (title, points) in zip(axes, clouds.items()):
        set_plane(axis, title)
        axis.scatter(*points.T, s=3, color=colours(labels), linewidths=0, alpha=0.8)
    save(figure, path)


def save_gif(path: Path, tracks: list[Track], labels: Tensor) -> None:
    """Noise becoming data."""
    figure, axes = panels(len(tracks), 2.5, 2.9)
    clouds = []
    for axis, track in zip(axes, tracks):
        set_plane(axis, track.name)
        clouds.append(axis.scatter(*track.states[0].T, s=5, color=colours(labels), linewidths=0))
    frames, last = [], len(tracks[0].states) - 1
    for k in [0] * 6 + list(range(0, last + 1, FRAME_EVERY)) + [last] * 12:  # pauses at both ends
        for cloud, track in zip(clouds, tracks):
            cloud.set_offsets(track.states[k])
        figure.supxlabel(f"t = {k / last:.2f}", fontsize=9)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=100)
        frames.append(Image.open(png).convert("P", palette=Image.Palette.ADAPTIVE, colors=32))
    write_atomically(path, lambda name: frames[0].save(
        name, save_all=True, append_images=frames[1:], duration=70, loop=0
    ))
