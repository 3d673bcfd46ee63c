"""TUTORIAL.md and the READMEs: code is quoted from its file, answers are computed."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

import checkpoint
from benchmarks import cost
from command import TINY_TEACHER
from conftest import ROOT
from diffusion import NoiseSchedule
from rectified_flow import (
    distill_loss, euler, guided, interpolate, one_step, reflow_loss, straightness,
)
from sample import sample_latents
from test_method import CROSSING, ENDS, NOISES, best_velocity, sample_pairs

TUTORIAL, README, FEWSTEP, LAYTON = (
    (ROOT / name).read_text()
    for name in ("TUTORIAL.md", "README.md", "fewstep/README.md", "layton/README.md")
)
QUOTING = TUTORIAL + FEWSTEP + LAYTON
QUOTES = re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", QUOTING, re.DOTALL)
CHAPTERS = re.split(r"\n## (?=\d+\. |Appendix)", TUTORIAL)[1:]
PAGES = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.rglob("*.md"))
         if not {"runs", ".venv", ".pytest_cache"} & set(path.relative_to(ROOT).parts)]


def gives(text: str, answer: str) -> bool:
    """Does the text's folded answer say this?"""
    folded = text.split("<summary>Answer</summary>")[1].split("</details>")[0]
    return answer in " ".join(folded.split())


def answers(chapter: int, answer: str) -> bool:
    """Does the chapter's exercise give this answer?"""
    text = CHAPTERS[chapter - 1]
    assert text.startswith(f"{chapter}. ")
    return gives(text, answer)


@pytest.mark.parametrize("file, quoted", QUOTES, ids=[file for file, _ in QUOTES])
def test_quoted_code_is_in_its_file(file, quoted):
    assert quoted in (ROOT / file).read_text()
    assert quoted.count("\n") <= 15


def test_every_code_block_is_a_quote():
    assert len(CHAPTERS) == 10  # nine, and the appendix
    assert QUOTING.count("```python") == len(QUOTES) >= 15


def test_every_chapter_has_an_image_code_and_an_exercise():
    for chapter in CHAPTERS[:9]:
        assert "![" in chapter and "\n**Exercise.**" in chapter, chapter[:30]
        assert "```python" in chapter and "<summary>Answer</summary>" in chapter, chapter[:30]
    assert {file for file, _ in QUOTES} > {"minimal.py", "rectified_flow.py", "diffusion.py"}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_exist(page):
    for path in re.findall(r"\]\(((?!http)[^)#\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_links_to_headings_exist(page):
    text = (ROOT / page).read_text()
    for path, anchor in re.findall(r"\]\(((?!http)[^)#\s]*)#([^)]+)\)", text):
        target = (ROOT / page).parent.joinpath(path) if path else ROOT / page
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in slugs, f"{path}#{anchor}"


def test_readme_is_short_and_images_are_small():
    assert len(README.encode()) <= 8 * 1024
    assert max(map(len, re.findall(r"^(?![|!]|.*http).*$", README, re.MULTILINE))) <= 100
    images = set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TUTORIAL + README))
    assert sum((ROOT / path).stat().st_size for path in images) <= 3 * 2**20


def test_readme_shows_lines_of_minimal():
    rows = re.findall(r"^\| `([^`]+)` \|", README, re.MULTILINE)
    minimal = (ROOT / "minimal.py").read_text()
    assert len(rows) == 10
    for code in rows:
        assert code.split("…")[0] in minimal, code


# --------------------------------------------------------------------------------------------------
# The exercises


def test_exercise_1_loss_at_the_crossing():
    x, t = torch.zeros(1, 2), torch.tensor([0.5])
    best = best_velocity(CROSSING)(x, t, None)
    torch.testing.assert_close(best, torch.tensor([[2.0, 0.0]]))
    through = [x1 - x0 for x0, x1 in CROSSING if interpolate(x0[None], x1[None], t).norm() < 1e-6]
    loss = sum((line - best[0]).square().sum().item() for line in through) / len(through)
    assert answers(1, f"a loss of **{loss:g}**")


def output_of_first(tmp_path, old: str, new: str) -> list[str]:
    """What toy/first.py prints after this change of its code: its lines of points."""
    source = (ROOT / "toy/first.py").read_text()
    assert source.count(old) == 1
    (tmp_path / "first.py").write_text(source.replace(old, new))
    run = subprocess.run([sys.executable, "first.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_exercise_2_three_targets(tmp_path):
    lines = output_of_first(tmp_path, "[1.0, -1.0]])  # P, Q", "[1.0, -1.0], [1.0, 3.0]])  # P, Q")
    assert lines[1].count("(+1.00, +1.00)") == 2  # random pairs, one Euler step
    assert answers(2, "**(1, 1)**")


def test_exercise_3_timesteps():
    t = NoiseSchedule().time(torch.tensor(500.0)).item()
    alpha, sigma = (table.item() for table in NoiseSchedule().alpha_sigma(torch.tensor(500.0)))
    assert answers(3, f"s = 500 α is {alpha:.3f} and σ is {sigma:.3f}")
    assert answers(3, f"t = **{t:.3f}**") and answers(3, f"gives **{1000 * (1 - t):.0f}**")
    start = NoiseSchedule().time(torch.tensor(999.0)).item()
    assert f"(its noisiest step is t = {start:.3f})" in " ".join(CHAPTERS[2].split())


def test_exercise_4_transport_cost():
    cost_of = lambda pairs: sum((b - a).square().sum().item() for a, b in pairs) / len(pairs)
    before, after = cost_of(CROSSING), cost_of(list(zip(NOISES, ENDS)))
    assert answers(4, f"**{before:.0f}** at random") and answers(4, f"**{after:.0f}** after")


def test_chapter_4_transport_cost_falls_by_the_loss_plus_straightness():
    """E‖X1 - X0‖² = E‖Z1 - Z0‖² + L + S, on the narrow Gaussians of toy/first.py."""
    flow, steps = best_velocity(CROSSING), 200
    x0, x1, _ = sample_pairs(CROSSING, 20_000)
    times = (torch.arange(steps) + 0.5) / steps
    length = lambda v: v.square().sum(1).mean().item()
    loss = sum(
        length(x1 - x0 - flow(interpolate(x0, x1, t), t, None))
        for t in (torch.full((len(x0),), t) for t in times.tolist())
    ) / steps
    bend, _, path_cost = straightness(flow, x0, steps)
    reduction = length(x1 - x0) - path_cost.mean().item()
    assert reduction == pytest.approx(loss + bend.mean().item(), abs=0.05)
    assert 1.5 < reduction < 2.2 and min(loss, bend.mean().item()) > 0.2


def test_chapter_5_one_step_error_is_the_deviation_at_t_0():
    flow = best_velocity(CROSSING)
    *_, exact = euler(flow, NOISES, 1000)
    deviation = (exact - NOISES) - flow(NOISES, torch.zeros(2), None)
    torch.testing.assert_close((one_step(flow, NOISES) - exact).norm(dim=1), deviation.norm(dim=1))


def test_exercise_5_two_and_three_steps(tmp_path):
    for steps in (2, 3):
        other = f"euler(first, NOISES, {steps})"
        lines = output_of_first(tmp_path, "euler(first, NOISES, 1)", other)
        x, y = map(float, re.search(r"\(([-+.\d]+), ([-+.\d]+)\)", lines[1]).groups())
        assert answers(5, f"**({x:g}, {y:g})**")


def test_appendix_wasserstein_rewards_hedging():
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
        neighbour = np.stack([np.cos(angle), np.sin(angle)], 1)
        part = generator.random((1000, 1)) * (generator.random((1000, 1)) < 0.2)
        ratios.append(distance((1 - part) * data + part * neighbour, fresh) / distance(data, fresh))
    assert np.mean(ratios) < 0.93 and gives(CHAPTERS[9], "down by about a tenth")


def test_exercise_6_undecided_coupling():
    x0 = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    x0, x1 = x0.repeat(2, 1), torch.tensor([[1.0]] * 1000 + [[-1.0]] * 1000)
    losses = {end: distill_loss(lambda x, t, c, end=end: end - x, x0, x1).mean().item()
              for end in (-1.0, -0.5, 0.0, 0.5, 1.0)}
    assert min(losses, key=losses.get) == 0
    assert answers(6, f"with a loss of **{losses[0.0]:g}**")


def test_exercise_7_loss_halfway_between_two_answers():
    guesses = torch.linspace(-1, 1, 201)
    l2_loss = ((guesses - 1) ** 2 + (guesses + 1) ** 2) / 2
    root_loss = ((guesses - 1).abs().sqrt() + (guesses + 1).abs().sqrt()) / 2
    assert guesses[l2_loss.argmin()].abs() < 1e-6 and l2_loss.min().item() == pytest.approx(1)
    assert root_loss.min().item() == pytest.approx(root_loss[0].item())
    least, most = root_loss.min().item(), root_loss.max().item()
    assert answers(7, f"(loss {least:.2f} instead of {most:.0f})")


def test_exercise_8_guidance():
    passes = []

    def network(x, t, context):
        passes.append(len(x))
        return context

    text, null, x = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)
    velocities = [guided(network, null, a)(x, torch.zeros(1), text) for a in (2.5, 1, 0)]
    assert answers(8, "**({:g}, {:g})**".format(*velocities[0][0].tolist()))
    assert passes == [2, 1, 1]
    captions = [["a red circle"], ["a blue square"]]
    latents = [sample_latents(checkpoint.load(TINY_TEACHER), caption, [3], 2, guidance=0)
               for caption in captions]
    assert torch.equal(*latents) and answers(8, "**the same images**")


def test_exercise_9_passes_of_sampling_and_training():
    pairs, *training = (stage.samples for stage in cost.RECIPE.values())
    sampling_passes, training_passes = 25 * 2 * pairs / 1e6, 3 * sum(training) / 1e6
    assert answers(9, f"{sampling_passes:.0f} million and {training_passes:.0f} million")
    fraction = sampling_passes / (sampling_passes + training_passes)
    assert answers(9, f"{fraction:.0%}".replace("%", " %"))


def test_exercise_of_fewstep_mean_velocity():
    flow = lambda x, t, context: (2 * t)[:, None].expand_as(x)
    x = torch.zeros(3, 1, dtype=torch.float64)
    t, r, h = 0.2, 0.7, 1e-4

    def mean_velocity(t: float, r: float) -> float:
        *_, end = euler(flow, x, 1000, times=torch.linspace(t, r, 1001, dtype=torch.float64))
        return (end / (r - t))[0].item()

    assert mean_velocity(t, r) == pytest.approx(r + t, abs=1e-3)
    derivative = (mean_velocity(t + h, r) - mean_velocity(t - h, r)) / (2 * h)
    assert mean_velocity(t, r) == pytest.approx(2 * t + (r - t) * derivative, abs=2e-3)
    assert gives(FEWSTEP, "**r + t**")


def test_chapter_1_loss_is_least_at_the_mean():
    """The loss of any v is that of the mean plus the squared distance of v to the mean."""
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 100_000, 1, generator=generator, dtype=torch.float64)
    t = torch.full((len(x0),), 0.3, dtype=torch.float64)
    # For independent normal X0 and X1: E[X1 - X0 | X_t = x] = (2t - 1) x / (t² + (1-t)²).
    mean = lambda x, t, c: (2 * t - 1)[:, None] * x / (t**2 + (1 - t) ** 2)[:, None]
    other = lambda x, t, c: mean(x, t, c) + 0.5
    loss = lambda v: reflow_loss(v, x0, x1, t).mean().item()
    assert loss(other) == pytest.approx(loss(mean) + 0.25, abs=0.01)
