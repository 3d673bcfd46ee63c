"""TUTORIAL.md and README.md: what they quote stands in the files, their numbers are computed."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from benchmarks import cost
from conftest import ROOT
from diffusion import NoiseSchedule
from rectified_flow import (
    distill_loss, euler, even_times, guided, interpolate, one_step, reflow_loss, squared_deviations,
)
from test_method import CROSSING, ENDS, NOISES, best_velocity, sample_of

TUTORIAL, README = ((ROOT / name).read_text() for name in ("TUTORIAL.md", "README.md"))
QUOTES = re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", TUTORIAL, re.DOTALL)
CHAPTERS = re.split(r"\n## (?=\d+\. )", TUTORIAL)[1:]


def says(chapter: int, answer: str) -> bool:
    """Is this the exercise's answer in that chapter?"""
    text = CHAPTERS[chapter - 1]
    assert text.startswith(f"{chapter}. ")
    return answer in " ".join(text.split("*Answer:*")[1].split("\n\n")[0].split())


@pytest.mark.parametrize("file, quoted", QUOTES, ids=[file for file, _ in QUOTES])
def test_what_is_quoted_stands_in_its_file(file, quoted):
    assert quoted in (ROOT / file).read_text()
    assert quoted.count("\n") <= 15


def test_every_block_of_code_is_such_a_quote():
    assert len(CHAPTERS) == 10
    assert TUTORIAL.count("```python") == len(QUOTES) >= 9


@pytest.mark.parametrize("text", [TUTORIAL, README], ids=["tutorial", "readme"])
def test_links_and_pictures_are_there(text):
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert (ROOT / path).exists(), path


def test_the_texts_are_short():
    assert len(README.encode()) <= 9 * 1024
    shown = set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TUTORIAL + README))
    shown = [path for path in shown if Path(path).name not in ("paths.png", "one-step.png")]
    assert sum((ROOT / path).stat().st_size for path in shown) <= 2**20


# --------------------------------------------------------------------------------------------------
# The exercises


def test_1_the_loss_at_the_crossing():
    x, t = torch.zeros(1, 2), torch.tensor([0.5])
    best = best_velocity(CROSSING)(x, t, None)
    torch.testing.assert_close(best, torch.tensor([[2.0, 0.0]]))
    through = [x1 - x0 for x0, x1 in CROSSING if interpolate(x0[None], x1[None], t).norm() < 1e-6]
    missed = sum((line - best[0]).square().sum().item() for line in through) / len(through)
    assert says(1, f"a loss of **{missed:g}**")


def test_2_three_targets():
    targets = torch.tensor([[1.0, 1], [1, -1], [1, 3]])
    *_, ends = euler(best_velocity([(a, b) for a in NOISES for b in targets]), NOISES, 1)
    torch.testing.assert_close(ends, torch.ones(2, 2))
    assert says(2, "**(1, 1)**")


def test_3_timesteps():
    t = NoiseSchedule().time(torch.tensor(500.0)).item()
    alpha, sigma = (table.item() for table in NoiseSchedule().alpha_sigma(torch.tensor(500.0)))
    assert f"s = 500 α is {alpha:.3f} and σ is {sigma:.3f}" in " ".join(CHAPTERS[2].split())
    assert says(3, f"t = **{t:.3f}**") and says(3, f"gives **{1000 * (1 - t):.0f}**")
    start = NoiseSchedule().time(torch.tensor(999.0)).item()
    assert f"(its noisiest step is t = {start:.3f})" in " ".join(CHAPTERS[2].split())


def test_4_the_transport_cost():
    cost_of = lambda pairs: sum((b - a).square().sum().item() for a, b in pairs) / len(pairs)
    before, after = cost_of(CROSSING), cost_of(list(zip(NOISES, ENDS)))
    assert says(4, f"**{before:.0f}** at random") and says(4, f"**{after:.0f}** after")


def test_4_what_the_transport_cost_loses_is_loss_and_bend():
    """E‖X1 - X0‖² = E‖Z1 - Z0‖² + L + S, on the narrow Gaussians of toy/first.py."""
    flow, steps = best_velocity(CROSSING), 200
    x0, x1, _ = sample_of(CROSSING, 20_000)
    times = (torch.arange(steps) + 0.5) / steps
    length = lambda v: v.square().sum(1).mean().item()
    loss = sum(
        length(x1 - x0 - flow(interpolate(x0, x1, t), t, None))
        for t in (torch.full((len(x0),), t) for t in times.tolist())
    ) / steps
    bends, way = squared_deviations(flow, x0, steps, None, even_times(steps))
    gone = length(x1 - x0) - way.mean().item()
    assert gone == pytest.approx(loss + bends.mean().item(), abs=0.05)
    assert 1.5 < gone < 2.2 and min(loss, bends.mean().item()) > 0.2


def test_5_one_steps_error_is_the_profile_at_0():
    flow = best_velocity(CROSSING)
    *_, exact = euler(flow, NOISES, 1000)
    bend = (exact - NOISES) - flow(NOISES, torch.zeros(2), None)
    torch.testing.assert_close((one_step(flow, NOISES) - exact).norm(dim=1), bend.norm(dim=1))


def test_5_wasserstein_rewards_hedging():
    generator = np.random.default_rng(0)

    def ring(count):
        angle = generator.integers(6, size=count) * math.pi / 3
        return angle, np.stack([np.cos(angle), np.sin(angle)], 1)

    def distance(a, b):
        squares = cdist(a, b, "sqeuclidean")
        return squares[linear_sum_assignment(squares)].mean() ** 0.5

    ratios = []
    for _ in range(6):
        (angle, data), (_, fresh) = ring(1000), ring(1000)
        angle = angle + np.where(generator.random(1000) < 0.5, 1, -1) * math.pi / 3
        beside = np.stack([np.cos(angle), np.sin(angle)], 1)
        way = generator.random((1000, 1)) * (generator.random((1000, 1)) < 0.2)
        ratios.append(distance((1 - way) * data + way * beside, fresh) / distance(data, fresh))
    assert np.mean(ratios) < 0.93 and says(5, "down by about a tenth")


def test_6_a_coupling_that_does_not_decide():
    x0 = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    x0, x1 = x0.repeat(2, 1), torch.tensor([[1.0]] * 1000 + [[-1.0]] * 1000)
    losses = {end: distill_loss(lambda x, t, c, end=end: end - x, x0, x1).mean().item()
              for end in (-1.0, -0.5, 0.0, 0.5, 1.0)}
    assert min(losses, key=losses.get) == 0
    assert says(6, f"with a loss of **{losses[0.0]:g}**")


def test_7_halfway():
    guesses = torch.linspace(-1, 1, 201)
    square = ((guesses - 1) ** 2 + (guesses + 1) ** 2) / 2
    root = ((guesses - 1).abs().sqrt() + (guesses + 1).abs().sqrt()) / 2
    assert guesses[square.argmin()].abs() < 1e-6 and square.min().item() == pytest.approx(1)
    assert root.min().item() == pytest.approx(root[0].item())
    assert says(7, f"(loss {root.min().item():.2f} instead of {root.max().item():.0f})")


def test_8_guidance():
    passes = []

    def network(x, t, context):
        passes.append(len(x))
        return context

    text, null, x = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)
    answers = [guided(network, null, a)(x, torch.zeros(1), text) for a in (2.5, 1, 0)]
    assert says(8, "**({:g}, {:g})**".format(*answers[0][0].tolist())) and passes == [2, 1, 1]


def test_9_passes():
    pairs, *training = (stage.samples for stage in cost.RECIPE.values())
    drawing, learning = 25 * 2 * pairs / 1e6, 3 * sum(training) / 1e6
    assert says(9, f"{drawing:.0f} million and {learning:.0f} million")
    assert says(9, f"{drawing / (drawing + learning):.0%}".replace("%", " %"))


def test_10_the_mean_velocity():
    flow = lambda x, t, context: (2 * t)[:, None].expand_as(x)
    x = torch.zeros(3, 1, dtype=torch.float64)
    t, r, h = 0.2, 0.7, 1e-4

    def mean(t: float, r: float) -> float:
        *_, end = euler(flow, x, 1000, times=torch.linspace(t, r, 1001, dtype=torch.float64))
        return (end / (r - t))[0].item()

    assert mean(t, r) == pytest.approx(r + t, abs=1e-3)
    derivative = (mean(t + h, r) - mean(t - h, r)) / (2 * h)
    assert mean(t, r) == pytest.approx(2 * t + (r - t) * derivative, abs=2e-3)
    assert says(10, "**r + t**")


def test_chapter_1s_proof_in_numbers():
    """The loss of any v is that of the mean, and how far v is from it."""
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 100_000, 1, generator=generator, dtype=torch.float64)
    t = torch.full((len(x0),), 0.3, dtype=torch.float64)
    # Of independent normal X0 and X1: E[X1 - X0 | X_t = x] = (2t - 1) x / (t² + (1-t)²).
    mean = lambda x, t, c: (2 * t - 1)[:, None] * x / (t**2 + (1 - t) ** 2)[:, None]
    other = lambda x, t, c: mean(x, t, c) + 0.5
    loss = lambda v: reflow_loss(v, x0, x1, t).mean().item()
    assert loss(other) == pytest.approx(loss(mean) + 0.25, abs=0.01)
