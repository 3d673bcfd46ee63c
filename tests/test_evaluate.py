"""Evaluation: metrics with known answers, table rows, and the studies built on them."""

import argparse
import fcntl
import json
import math
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import evaluate
import pairs
from command import TINY_TEACHER, BadInput, NotFinite, unlock_folder
from diffusion import NoiseSchedule
from evaluation import figures, study
from evaluation.figures import GRADES
from evaluation.plots import markdown_table, save_comparison, save_curves
from experiments import fewer_samples, paper_table, stalled_start


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
    assert math.isnan(figures.with_interval([1.0, math.inf, -math.inf])[0])
    mean, interval = figures.with_interval([1.0, 2.0, 3.0])
    # Student's t at 97.5 % and 2 degrees of freedom is 4.3027; the standard error is 1 / √3.
    assert mean == 2 and interval == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


def test_intervals_of_straightness_are_those_of_a_mean():
    model = checkpoint.load(TINY_TEACHER)
    one = figures.straightness_figures(model, ["a"], range(1), 1.0)
    assert one["straightness_interval"] is one["relative_straightness_interval"] is None
    eight = figures.straightness_figures(model, ["a"] * 8, range(8), 1.0)
    each = [figures.straightness_figures(model, ["a"], [k], 1.0) for k in range(8)]
    mean, interval = figures.with_interval([row["straightness"] for row in each])
    assert eight["straightness"] == pytest.approx(mean, rel=1e-4)
    assert eight["straightness_interval"] == pytest.approx(interval, rel=1e-4)


def test_overflow_on_the_path_of_a_flow_is_one_line(call):
    model = checkpoint.load(TINY_TEACHER)
    model.kind = "flow"
    torch.nn.init.constant_(model.unet.conv_out.bias, 3e38)
    checkpoint.save(model, "a$$b.safetensors", None)
    arguments = ["--model", "a$$b.safetensors", "--num-samples", 8, "--dtype", "fp32"]
    code, _, err = call(evaluate.main, *arguments, "--steps", 2)
    assert code == 2 and "overflows" in err and "\n" not in err


def test_captions_and_models_with_dollars_are_text(tmp_path):
    captions = ["Save $$ on shoes", "$9 (50% of $18)", '$5 "x" $6']
    save_comparison(tmp_path / "a.png", [("a$$", torch.zeros(3, 3, 8, 8))], captions)
    assert Image.open(tmp_path / "a.png").size[0] > 100
    grades = {name: 1.0 for name in GRADES} | {f"{name}_interval": None for name in GRADES}
    row = {"model": "a$$b", "kind": "flow", "guidance": 1.0, "steps": 1, **grades}
    save_curves(tmp_path / "b.png", [row | {"straightness_profile": [(0.0, 1.0), (0.5, 1.0)]}])
    assert Image.open(tmp_path / "b.png").size[0] > 100


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

FEW = ["--batch-size", 4, "--num-samples", 12]
STUDY = [*FEW, "--teacher-steps", 2, "--held-out", 8, "--iterations", 4, 8, "--tune-at", 4]


@pytest.fixture
def short_paths(monkeypatch):
    """Measure straightness with three steps: tests check that it exists, not its value."""
    monkeypatch.setattr(figures, "STRAIGHTNESS_STEPS", 3)


def test_paper_table_tunes_measures_and_resumes(call, monkeypatch, short_paths):
    monkeypatch.setattr(study, "RATES", (5e-4,))  # at the edge, so one more is tried
    code, out, err = call(paper_table.main, *STUDY, "--num-seeds", 1)
    assert code == 0, err
    folder, path = Path("runs/paper-table"), Path("runs/paper-table/study.json")
    rows = json.loads(path.read_text())
    tuning = [row for row in rows if row["seed"] == paper_table.TUNING_SEED]
    reported = [row for row in rows if row["seed"] == 0]
    for start in paper_table.STARTS:
        for arm in paper_table.ARMS:
            mine = [row for row in tuning if (row["start"], row["arm"]) == (start, arm)
                    and row["model"] == "one-step"]
            best = min(mine, key=lambda row: row["frechet"])["learning_rate"]
            assert {row["learning_rate"] for row in mine} == {5e-4, study.HIGHER}
            cells = [row for row in reported if (row["start"], row["arm"]) == (start, arm)]
            assert {row["learning_rate"] for row in cells} == {best}
            models = ["one-step"] + ["2-RF", "2-RF"] * (arm != "direct")
            assert sorted(row["model"] for row in cells) == sorted(models * 2)  # 4 and 8 steps
    assert [row["steps"] for row in reported if row["model"] == "teacher"] == [2, 1]
    # No pair is used twice, and both arms see as many: 4 x 4 directly, 2 x 4 + 2 x 4.
    for name, count in (("pairs-tiny_sd", 4 * 8), ("teacher-reflow-first-4-*-seed-0/pairs-2rf", 8)):
        spec = next(folder.glob(f"mixed/{name}")) / "pairs.json"
        assert json.loads(spec.read_text())["count"] in (count, count // 2)
    for name in ("study.png", "losses.png", "images.png"):
        assert np.asarray(Image.open(folder / name).convert("L")).std() > 3
    assert (folder / "study.md").read_text() in out
    differences = (folder / "differences.md").read_text()
    assert differences.count("| mixed |") == 4  # two starts at two numbers of iterations

    # Resume as if killed before a row was written; nothing else is trained again.
    path.write_text(json.dumps(rows[:-1]))
    with monkeypatch.context() as patch:
        patch.setattr(paper_table, "train", None)
        assert call(paper_table.main, *STUDY, "--num-seeds", 1)[0] == 0
        Path("one").mkdir()  # one arm alone has no differences
        one_arm = [row for row in rows if row["arm"] != "reflow first"]
        Path("one/study.json").write_text(json.dumps(one_arm))
        arguments = [*STUDY, "--num-seeds", 1, "--arms", "direct", "--out", "one"]
        code, out, _ = call(paper_table.main, *arguments)
        assert code == 0 and "differences.md" not in out
        assert not Path("one/differences.md").exists()
    assert json.loads(path.read_text()) == rows
    lpips = [*STUDY, "--num-seeds", 1, "--starts", "negated", "--lpips-iterations", 2]
    assert call(paper_table.main, *lpips)[0] == 0
    longer = json.loads(path.read_text())
    added = [row for row in longer if row not in rows]
    assert len(added) == 4 and {row["model"] for row in added} == {"one-step + LPIPS"}
    for more, words in ((["--batch-size", 8], "holds another study (batch_size was 4, now 8)"),
                        (["--tune-at", 8], "holds another study (tune_at was 4, now 8)"),
                        (["--lpips-iterations", 3], "runs/paper-table has rows of 2")):
        code, _, err = call(paper_table.main, *STUDY, *more)
        assert code == 2 and words in err, err


def test_two_studies_in_one_folder_are_refused(tmp_path):
    with open(tmp_path / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="another run works in this folder"):
            study.open_table(tmp_path / "study.json", argparse.Namespace(), ())
    study.open_table(tmp_path / "study.json", argparse.Namespace(), ())
    unlock_folder(tmp_path)


def test_gaps_are_to_the_own_teacher_and_differences_are_paired():
    key = {"captions": "mixed", "guidance": None, "steps": 1, "learning_rate": 1e-4,
           "caption_accuracy": 0.5}
    rows = []
    for seed, (teacher, flow, direct, after) in enumerate([(20, 30, 100, 70), (22, 31, 90, 80)]):
        cell = key | {"seed": seed, "start": "teacher", "iterations": 8}
        rows += [
            key | {"seed": seed, "start": None, "arm": None, "iterations": 0, "model": "teacher",
                   "steps": 8, "frechet": teacher},
            cell | {"arm": "direct", "model": "one-step", "frechet": direct},
            cell | {"arm": "reflow first", "model": "2-RF", "steps": 4, "frechet": flow},
            cell | {"arm": "reflow first", "model": "one-step", "frechet": after},
        ]
    rows.append(rows[-1] | {"seed": paper_table.TUNING_SEED})
    rows = paper_table.with_gaps(rows, 8)
    assert [row["gap"] for row in rows if row["model"] == "one-step"] == [80, 40, 68, 49]
    line, = paper_table.differences_of(rows)
    assert (line["frechet"], line["frechet_by_seed"], line["seeds"]) == (20, "30, 10", 2)
    assert line["gap"] == (40 + 19) / 2


def test_figures_of_the_main_study_leave_out_other_captions_and_guidance_scales():
    rows = [{"model": model, "captions": captions, "guidance": guidance}
            for model, captions, guidance in (
                ("one-step", "mixed", None), ("one-step", "mixed", 6.0), ("one-step", "open", None),
                ("one-step + LPIPS", "mixed", None), ("2-RF", "mixed", None))]
    assert paper_table.main_students(rows) == rows[:1]


def test_a_learning_rate_that_diverges_is_not_chosen():
    tried = []

    def frechet(rate: float) -> float:
        tried.append(rate)
        if rate > 1e-3:
            raise NotFinite("the loss is not finite")
        return 1 / rate

    assert study.best_rate(frechet) == 5e-4 and sorted(tried) == [1e-4, 5e-4, 2e-3]


def test_studies_refuse_what_no_training_can_serve(call, monkeypatch):
    monkeypatch.setattr(fewer_samples, "rate_for", None)  # refused before the tuning
    for main, arguments, words in (
        (paper_table.main, ["--iterations", 1], "must be a whole number of at least 2"),
        (paper_table.main, ["--num-samples", 4], "must be a whole number of at least 5"),
        (stalled_start.main, ["--iterations", stalled_start.FIRST], "of at least 101"),
        (fewer_samples.main, [*FEW, "--iterations", 3], "must be a whole number of at least 4"),
        (fewer_samples.main, [*FEW, "--seed", study.TUNING_SEED], "chooses the learning rates"),
    ):
        code, _, err = call(main, *arguments)
        assert code == 2 and words in err


def test_emoji_are_tuned_on_emoji_and_have_a_figure(monkeypatch):
    rows = []

    def measure(cell, *more):
        rows.append(asdict(cell) | {"model": "one-step", "frechet": cell.learning_rate})

    monkeypatch.setattr(paper_table, "measure_cell", measure)
    for captions, tuned_on in (("emoji", "emoji"), ("open", "mixed")):
        cell = paper_table.Cell(captions, 6.0, "negated", "direct", 4, 5e-4, 0)
        paper_table.rate_for(cell, Namespace(tune_at=4), rows, None)
        assert {row["captions"] for row in rows} == {tuned_on}
        assert paper_table.main_students(rows) == rows
        rows.clear()


def test_guidance_0_has_a_folder_of_its_own(tmp_path):
    cell = paper_table.Cell("mixed", 0.0, "negated", "direct", 4, 5e-4, 0)
    args = Namespace(out=str(tmp_path), num_samples=5, device="cpu")
    folders = {paper_table.study_for(replace(cell, guidance=scale), args, 4, [], None).folder
               for scale in (None, 0.0, 1.0)}
    assert len(folders) == 3


def test_stalled_start_measures_where_the_step_points(call, monkeypatch):
    monkeypatch.setattr(stalled_start, "FIRST", 2)
    arguments = ["--iterations", 4, "--measure-every", 2, "--batch-size", 32, "--num-seeds", 1,
                 "--held-out", 4, "--teacher-steps", 2]
    code, out, err = call(stalled_start.main, *arguments)
    assert code == 0, err
    path = Path("runs/paper-table/stalled_start.json")
    rows = json.loads(path.read_text())
    at = {(row["run"], row["step"]): row for row in rows}
    # The teacher's weights answer the noise; their negation answers minus the noise.
    first = [at[name, 0]["cosine_noise"] for name in ("teacher", "negated")]
    assert first[0] > 0.9 and first[1] < -0.9
    assert at["teacher", 0]["loss"] == at["a tenth at random t", 0]["loss"] > 2
    # The flip comes after the same first steps; its control has none.
    assert at["flipped at 100", 0] | {"run": ""} == at["teacher", 0] | {"run": ""}
    # The break itself changes nothing but the sign and the optimizer.
    assert at["restarted at 100", 2] | {"run": ""} == at["teacher", 2] | {"run": ""}
    assert at["flipped at 100", 2]["loss"] != at["teacher", 2]["loss"]
    assert len({at[name, 4]["loss"] for name in stalled_start.RUNS}) == 5
    # What a network can say without reading its input, and the right answer.
    assert at["constant v", None]["share_of_constant"] == pytest.approx(1)
    assert at["target", None]["loss"] == 0 and at["target", None]["cosine_noise"] < 0
    assert np.asarray(Image.open(path.with_suffix(".png")).convert("L")).std() > 3
    assert call(stalled_start.main, *arguments)[0] == 0 and json.loads(path.read_text()) == rows
    path.unlink()  # as if killed in the first run's last step: the curves are still whole
    assert call(stalled_start.main, *arguments)[0] == 0 and json.loads(path.read_text()) == rows


def test_a_run_leaves_the_plateau_where_its_loss_falls_below_that_of_a_constant():
    x0, x1 = torch.randn(2, 6, 1, 2, 2)
    constant, target = stalled_start.references(0, x0, x1)
    half = stalled_start.figures_of((x1 - x0) / 2 + (x1 - x0).mean(0) / 2, x0, x1)
    assert half["share_of_constant"] == pytest.approx(0.25) and half["loss"] < constant["loss"]
    assert target["cosine_target"] == pytest.approx(1)
    rows = [figures | {"run": "teacher", "seed": seed, "step": step} for seed, step, figures in (
        (0, 0, constant), (1, 0, constant), (0, 20, half), (1, 20, constant), (0, 40, half))]
    assert stalled_start.left_plateau(rows) == "20, never"


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


def test_fewer_samples_tunes_each_way_measures_it_and_repeats_nothing(
    call, monkeypatch, short_paths,
):
    monkeypatch.setattr(study, "RATES", (5e-4,))  # at the edge, so one more is tried
    ways = ["paper", "negated", "matched"]
    few = [*FEW, "--iterations", 4, "--num-pairs", 20, "--teacher-steps", 2, "--num-seeds", 1,
           "--ways", *ways]
    code, out, err = call(fewer_samples.main, *few)
    assert code == 0, err
    folder = Path("runs/fewer-samples")
    rows = json.loads((folder / "fewer_samples.json").read_text())
    chosen = {}
    for way in ways:
        tried = {row["frechet"]: row["learning_rate"] for row in rows if row["way"] == way
                 and row["seed"] == study.TUNING_SEED and row["steps"] == 1}
        assert sorted(tried.values()) == [5e-4, study.HIGHER]
        mine = [row for row in rows if row["way"] == way and row["seed"] == 0]
        assert {row["learning_rate"] for row in mine} == {tried[min(tried)]}
        iterations = [row["iterations"] for row in mine if row["steps"] == 1]
        assert iterations == ([1, 2, 4, 8, 16] if way == "paper" else [1, 2, 4])
        chosen[way] = next(row["frechet"] for row in mine
                           if (row["iterations"], row["steps"]) == (4, 1))
    assert len(set(chosen.values())) == len(ways)  # all ways differ
    difference = next(line for line in fewer_samples.differences_of(
        [row for row in rows if row["seed"] == 0])
        if (line["way"], line["iterations"], line["steps"]) == ("paper", 4, 1))
    assert difference["frechet"] == pytest.approx(chosen["paper"] - chosen["negated"])
    assert np.asarray(Image.open(folder / "fewer_samples.png").convert("L")).std() > 3
    assert (folder / "fewer_samples.md").read_text() in out
    assert call(fewer_samples.main, *few)[0] == 0
    assert json.loads((folder / "fewer_samples.json").read_text()) == rows
