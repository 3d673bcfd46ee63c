"""Evaluation: metrics with known answers, table rows, and the studies built on them."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import evaluate
import pairs
from command import TINY_TEACHER
from diffusion import NoiseSchedule
from evaluation import figures
from evaluation.figures import GRADES
from evaluation.plots import markdown_table
from experiments import fewer_samples
from experiments import paper_table


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pairs, "PAIRS_PER_SHARD", 16)


# --------------------------------------------------------------------------------------------------
# Metrics


def test_precision_and_recall_have_known_answers():
    torch.manual_seed(0)
    two_clouds = torch.cat([torch.randn(200, 3), torch.randn(200, 3) + 50])
    assert figures.precision_recall(two_clouds, two_clouds) == (1, 1)
    assert figures.precision_recall(two_clouds, two_clouds + 1000) == (0, 0)
    # Every image is real, but one cloud is missing.
    precision, recall = figures.precision_recall(two_clouds, two_clouds[:200])
    assert (precision, recall) == (1, 0.5)
    precision, recall = figures.precision_recall(two_clouds[:200], two_clouds)
    assert (precision, recall) == (0.5, 1)


def test_copies_of_a_real_image_count_once():
    """Otherwise the five copies would be each other's nearest neighbours, at distance 0."""
    line = torch.arange(10.0)[:, None]
    with_copies = torch.cat([line, line[:1].expand(4, 1)])
    assert figures.precision_recall(with_copies, torch.tensor([[-1.0]])) == (1, 0)
    # A model that generates one image only has radius 0, and no recall.
    assert figures.precision_recall(line, torch.full((10, 1), 4.5)) == (1, 0)


def test_confidence_interval_uses_students_t():
    assert figures.with_interval([3.0]) == (3, None)
    assert figures.with_interval([None, None]) == (None, None)
    mean, interval = figures.with_interval([1.0, 2.0, 3.0])
    # Student's t at 97.5 % and 2 degrees of freedom is 4.3027; the standard error is 1 / √3.
    assert mean == 2 and interval == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


def test_table_joins_values_with_their_intervals():
    rows = [{"a": 1.23456, "a_interval": 0.0512, "b": None, "b_interval": None, "c": [1]}]
    assert markdown_table(rows) == "| a | b |\n| --- | --- |\n| 1.235 ± 0.051 |  |\n"


def test_rows_of_each_guidance_scale_have_intervals_over_repeats(call):
    arguments = ["--model", TINY_TEACHER, "--steps", "2,1", "--guidance", "1,2.5",
                 "--num-samples", 16, "--repeats", 2]
    code, out, err = call(evaluate.main, *arguments)
    assert code == 0, err
    rows = json.loads(Path("runs/evaluate.json").read_text())
    assert [(row["guidance"], row["steps"]) for row in rows] == [
        (None, None), (1, 2), (1, 1), (2.5, 2), (2.5, 1)
    ]
    for row in rows:
        for name in GRADES:
            assert row[f"{name}_interval"] >= 0 and 0 <= row[name]
        assert row["precision"] <= 1 and row["recall"] <= 1
    profile = rows[1]["straightness_profile"]
    assert len(profile) == figures.STRAIGHTNESS_STEPS and all(
        0 < t < 1 and deviation >= 0 for t, deviation in profile
    )
    assert rows[1]["relative_straightness_interval"] > 0
    assert rows[1]["straightness_profile"] != rows[3]["straightness_profile"]
    assert np.asarray(Image.open("runs/evaluate-curves.png").convert("L")).std() > 3
    assert call(evaluate.main, "--guidance", "1,-2")[0] == 2


# --------------------------------------------------------------------------------------------------
# The study at toy size

FEW = ["--iterations", 4, "--batch-size", 4, "--num-pairs", 20,
       "--num-samples", 12, "--teacher-steps", 4]
STUDY = [*FEW, "--held-out", 8, "--lpips-iterations", 2, "--steps", 2, 1,
         "--budgets", 0.5, 1, 2]


@pytest.fixture
def short_paths(monkeypatch):
    """Measure straightness with three steps: tests check that it exists, not its value."""
    monkeypatch.setattr(figures, "STRAIGHTNESS_STEPS", 3)


def test_paper_table_writes_all_rows_and_resumes(call, tmp_path, monkeypatch, short_paths):
    code, out, err = call(paper_table.main, *STUDY, "--num-seeds", 1)
    assert code == 0, err
    rows = json.loads(Path("runs/study/study.json").read_text())
    names = ["drawn"] + ["teacher"] * 2 + ["2-RF"] * 2
    names += ["2-RF + distill"] * 2 + ["2-RF + distill + LPIPS"]
    names += ["teacher + distill"] * 3 + ["teacher + distill + LPIPS"] * 2
    names += ["3-RF"] * 2 + ["3-RF + distill", "2-RF + distill, stacked"]
    assert (
        sorted(row["row"] for row in rows) == sorted(names)
        and {row["seed"] for row in rows} == {0}
    )
    find = lambda name, iterations: next(
        row for row in rows if (row["row"], row["updates"]) == (name, iterations)
    )
    assert find("teacher + distill", 8)["samples"] == find("2-RF + distill", 4)["samples"] == 8 * 4
    assert (
        find("teacher + distill", 4)["held_out_error"]
        != find("teacher + distill", 8)["held_out_error"] > 0
    )
    flow_row = find("2-RF", 4)
    assert flow_row["held_out_error"] is None and flow_row["relative_straightness"] > 0
    for name in ("study.png", "study-pictures-0.png"):
        assert np.asarray(Image.open(Path("runs/study") / name).convert("L")).std() > 3
    assert Path("runs/study/study.md").read_text() in out

    # Resume as if killed before some rows were written, then request one part of another seed.
    # Existing rows stay as they are.
    without_minutes = lambda rows: sorted(
        json.dumps({**row, "minutes": 0}, sort_keys=True) for row in rows
    )
    written = [row for row in rows if row["row"] not in ("2-RF", "2-RF + distill, stacked")]
    Path("runs/study/study.json").write_text(json.dumps(written))
    Path("runs/study/seed-0/2-RF+distill,stacked-4.safetensors").unlink()
    assert call(paper_table.main, *STUDY, "--num-seeds", 1)[0] == 0
    resumed = json.loads(Path("runs/study/study.json").read_text())
    assert without_minutes(resumed) == without_minutes(rows)
    assert call(paper_table.main, *STUDY, "--num-seeds", 2, "--parts", "teacher")[0] == 0
    longer = json.loads(Path("runs/study/study.json").read_text())
    assert [row["row"] for row in longer if row["seed"] == 1] == ["drawn", "teacher", "teacher"]
    assert longer[: len(resumed)] == resumed
    assert longer[-1]["frechet"] != find("teacher", 0)["frechet"]
    code, _, err = call(paper_table.main, *STUDY, "--captions", "emoji")
    assert code == 2 and "holds another study (captions was 'open', now 'emoji')" in err

    # The same models on captions of one object: nothing is trained.
    monkeypatch.setattr(paper_table, "distill", None)
    arguments = [*STUDY, "--num-seeds", 1, "--parts", "teacher", "direct", "--asked"]
    assert call(paper_table.main, *arguments, "single")[0] == 0
    single = json.loads(Path("runs/study/study-single.json").read_text())
    assert len(single) == 3 + 3 + 2 and {row["frechet"] for row in single}.isdisjoint(
        {row["frechet"] for row in rows}
    )
    assert json.loads(Path("runs/study/study.json").read_text()) == longer
    other_arguments = [*arguments]
    other_arguments[other_arguments.index("--iterations") + 1] = 8
    code, _, err = call(paper_table.main, *other_arguments, "single")
    assert code == 2 and "holds another study (iterations was 4, now 8)" in err
    code, _, err = call(paper_table.main, *arguments, "emoji")
    assert code == 2 and "--asked emoji: from another dataset than --captions open" in err


# --------------------------------------------------------------------------------------------------
# Fewer samples


def test_matched_times_give_the_teachers_output():
    schedule = NoiseSchedule()
    unet = checkpoint.load(TINY_TEACHER).unet
    torch.manual_seed(0)
    x, context = torch.randn(6, 4, 8, 8), torch.randn(6, 16, 128)
    t = torch.tensor([0.1, 0.25, 0.4, 0.6, 0.75, 0.9])
    with torch.no_grad():
        expected, unmatched = (
            unet(x, schedule.timestep(t).float(), context), unet(x, 1000 * (1 - t), context)
        )
        fewer_samples.match_times(unet, schedule)
        matched = unet(x, 1000 * (1 - t), context)
    error = lambda y: (y - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error(matched).max() < 0.1 and error(matched).mean() < error(unmatched).mean() / 5


def test_u_shaped_times_have_their_density():
    t = fewer_samples.u_shaped(
        torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert 0 <= t.min() and t.max() <= 1 and abs(t.mean() - 0.5) < 0.005
    # For a density ∝ cosh(4 (t - 1/2)), the fraction below x is
    # (sinh(2) + sinh(4 (x - 1/2))) / (2 sinh(2)).
    for x in (0.1, 0.3, 0.5, 0.8):
        fraction = (math.sinh(2) + math.sinh(4 * (x - 0.5))) / (2 * math.sinh(2))
        assert (t < x).double().mean().item() == pytest.approx(fraction, abs=0.005)


def test_perceptual_loss_has_its_authors_weights():
    """The Huber term is a mean over the latent, with weight t; LPIPS has weight 1 at every t."""
    x0, x1, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.25, 1.0])
    model = SimpleNamespace(vae=SimpleNamespace(decode=lambda latents: latents))
    velocity = lambda x, t, context: x1 - x0 - 0.5  # off by ½ in each of 256 elements
    loss = fewer_samples.perceptual_loss(
        model, lambda a, b: torch.full((3,), 7.0), velocity, x0, x1, t, None
    )
    c = 0.00054 * 256
    huber = ((256 / 4 + c**2) ** 0.5 - c) / 256
    assert loss.tolist() == pytest.approx([7, 7 + huber / 4, 7 + huber])
    landing = lambda a, b: (a - b).abs().flatten(1).mean(1)  # ends are off by (1 - t) / 2
    loss = fewer_samples.perceptual_loss(model, landing, velocity, x0, x1, t, None)
    assert loss.tolist() == pytest.approx([0.5, 0.375 + huber / 4, huber], rel=1e-4)


def test_fewer_samples_writes_all_rows_and_repeats_nothing(call, short_paths):
    ways = ["paper", "negated", "matched", "perceptual", "unguided"]
    few = [*FEW, "--num-seeds", 1, "--ways", *ways]
    code, out, err = call(fewer_samples.main, *few)
    assert code == 0, err
    rows = json.loads(Path("runs/study/fewer_samples.json").read_text())
    assert {row["row"] for row in rows} == set(ways)
    for way in ways:
        iterations = [row["updates"] for row in rows if row["row"] == way and row["steps"] == 1]
        assert iterations == ([1, 2, 4, 8, 16] if way == "paper" else [1, 2, 4])
    last = [row["frechet"] for row in rows if row["updates"] == 4 and row["steps"] == 1]
    assert len(set(last)) == len(ways)  # all variants differ
    assert np.asarray(Image.open("runs/study/fewer_samples.png").convert("L")).std() > 3
    assert Path("runs/study/fewer_samples.md").read_text() in out
    assert (
        call(fewer_samples.main, *few)[0] == 0
        and json.loads(Path("runs/study/fewer_samples.json").read_text()) == rows
    )
