"""Figures of toy/demo.py: DDIM and Euler, paths, where straight lines would end, errors, a film."""

import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from command import write_whole
from evaluation.plots import COLOURS
from rectified_flow import euler, one_step

LIMIT = 2.6  # the plane is drawn from -LIMIT to LIMIT
PATHS, ARROWS, TRACES = 160, 8, 9  # how many are drawn
FRAME_EVERY = 2  # states of a track between two frames of the film
matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}


@dataclass
class Track:
    """The way of some points."""

    name: str
    times: Tensor  # (steps + 1,)
    states: Tensor  # (steps + 1, N, 2)
    velocities: Tensor  # (steps, N, 2)


@torch.no_grad()
def track(name: str, kind: str, velocity, start: Tensor, times: Tensor, context: Tensor) -> Track:
    """The points on their way; those of a one-step model go straight to where they land."""
    steps = len(times) - 1
    times = torch.linspace(times[0].item(), 1, steps + 1)  # even, for the eye
    if kind == "one-step":
        jump = one_step(velocity, start, context) - start
        return Track(
            name, times, start + times.reshape(-1, 1, 1) * jump, jump.expand(steps, -1, -1)
        )
    states = torch.stack(list(euler(velocity, start, steps, context, times)))
    return Track(name, times, states, states.diff(dim=0) / times.diff().reshape(-1, 1, 1))


def colours(labels: Tensor) -> list:
    """A dark and a light colour, which differ in grey print and to the colour-blind too."""
    dark_and_light = matplotlib.colormaps["viridis"]([0.12, 0.68])
    return [dark_and_light[k % 2] for k in labels.tolist()]


def panels(count: int, width: float, height: float, **options) -> tuple[Figure, list]:
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, **options)[0])


def plane(axis, title: str) -> None:
    limits = (-LIMIT, LIMIT)
    axis.set(xlim=limits, ylim=limits, aspect="equal", xticks=[], yticks=[], title=title)
    axis.spines[:].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=150, bbox_inches="tight"))


def save_paths(path: Path, tracks: list[Track], labels: Tensor, data: Tensor) -> None:
    """Paths from noise to data, and over them one Euler step from the start for a few."""
    figure, axes = panels(len(tracks), 3.0, 3.3)
    for axis, track in zip(axes, tracks):
        plane(axis, track.name)
        axis.scatter(*data[:1000].T, s=3, color="0.8", linewidths=0)
        for k, colour in enumerate(colours(labels[:PATHS])):
            axis.plot(*track.states[:, k].T, color=colour, linewidth=0.6, alpha=0.65)
        axis.scatter(*track.states[-1, :PATHS].T, s=7, color=colours(labels[:PATHS]), zorder=3)
        ends = track.states[0] + (1 - track.times[0]) * track.velocities[0]
        inside = [k for k in range(len(labels)) if track.states[0, k].abs().max() < 0.8 * LIMIT]
        for k in inside[:ARROWS]:
            arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.3,
                     "shrinkA": 0, "shrinkB": 0}
            axis.annotate("", ends[k].tolist(), track.states[0, k].tolist(),
                          arrowprops=arrow, zorder=4)
    figure.supxlabel(
        "coloured by label: the model's paths, dots at their ends; grey: data; "
        "black: one Euler step from the noise", fontsize=9
    )
    save(figure, path)


def save_ddim(
    path: Path, states: list[tuple[Tensor, float]], euler_states: list[Tensor], labels: Tensor,
) -> None:
    """DDIM's states x_s, and divided by α + σ with those of Euler's method over them."""
    figure, axes = panels(2, 3.4, 3.6)
    titles = (r"DDIM, in its own $x_s$", r"$x_s / (\alpha + \sigma)$, and Euler's method")
    for axis, title, divided in zip(axes, titles, (False, True)):
        plane(axis, title)
        points = torch.stack([x / (scale if divided else 1.0) for x, scale in states])
        for k, colour in enumerate(colours(labels)):
            axis.plot(*points[:, k].T, color=colour, linewidth=1.2, marker="o", markersize=3.5)
            axis.plot(*points[0, k], "o", color=colour, markersize=10, fillstyle="none")
    for k in range(len(labels)):
        axes[1].plot(*torch.stack(euler_states)[:, k].T, "+", color="black", markersize=7)
    figure.supxlabel(
        "rings: noise; dots: DDIM as published; crosses: Euler's steps on the velocity", fontsize=9
    )
    save(figure, path)


def save_steps(path: Path, rows: list[dict]) -> None:
    """How far from the exact end, against the number of Euler steps; and the straightness."""
    figure, axes = panels(2, 4.2, 3.3)
    models = {}
    for row in rows:
        if row["relative_straightness"] is not None and row["solver"] == "euler":
            models.setdefault(row["model"], []).append(row)
    colours = [COLOURS["diffusion"], COLOURS["flow"], "tab:green"]
    for (name, mine), marker, colour in zip(models.items(), "osD", colours):
        steps, errors = ([row[key] for row in mine] for key in ("steps", "endpoint_error"))
        axes[0].plot(steps, errors, marker=marker, color=colour, label=name)
    axes[0].set(xscale="log", yscale="log", xlabel="Euler steps", xticks=steps, xticklabels=steps,
                title=r"error of the end, $E\|Z_1 - exact\|^2$")
    axes[0].minorticks_off()
    axes[0].legend(fontsize=8)
    straight = [mine[0]["relative_straightness"] for mine in models.values()]
    bars = axes[1].bar(list(models), straight, color=colours[: len(models)])
    axes[1].bar_label(bars, fmt="%.3f")
    axes[1].set(yscale="log", title=r"straightness, $S / E\|Z_1 - Z_0\|^2$")
    save(figure, path)


def save_straight(path: Path, tracks: list[Track], labels: Tensor) -> None:
    """Z_t + (1 - t) v(Z_t, t): where a straight line from Z_t ends; level on a straight path."""
    figure, axes = panels(len(tracks), 3.0, 3.0, sharey=True)
    for axis, track in zip(axes, tracks):
        left = (1 - track.times[:-1]).reshape(-1, 1, 1)
        ends = track.states[:-1] + left * track.velocities  # (steps, points, 2)
        for k, colour in enumerate(colours(labels[:TRACES])):
            axis.plot(track.times[:-1], ends[:, k, 0], color=colour, linewidth=1.4)
        axis.set(xlim=(0, 1), xlabel="t  (0 noise, 1 data)", title=track.name)
    axes[0].set_ylabel("x of  $Z_t + (1-t)\\,v(Z_t, t)$")
    save(figure, path)


def save_landings(path: Path, landings: dict[str, Tensor], labels: Tensor) -> None:
    """Clouds of points, each under its title."""
    figure, axes = panels(len(landings), 2.5, 2.8)
    for axis, (title, points) in zip(axes, landings.items()):
        plane(axis, title)
        axis.scatter(*points.T, s=3, color=colours(labels), linewidths=0, alpha=0.8)
    save(figure, path)


def save_film(path: Path, tracks: list[Track], labels: Tensor) -> None:
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
    write_whole(path, lambda temporary: frames[0].save(
        temporary, save_all=True, append_images=frames[1:], duration=70, loop=0
    ))
