"""The method in the plane: scripts, results in the table, and the pipeline's own functions."""

import argparse
import copy
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import distill
import reflow
from conftest import ROOT
from experiments import plane_students
from rectified_flow import flow_velocity, one_step, squared
from toy import demo
from training import TrainingOptions, ema_copy, generator_for, train

SMALL = ["--width", 16, "--iterations", 30, "--distill-iterations", 10, "--batch-size", 32,
         "--num-pairs", 200, "--num-samples", 120]


def rows_by_name(rows):
    return {(row["model"], row["solver"], row["steps"]): row for row in rows}


# --------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("dataset", list(demo.DATASETS))
def test_the_demo_writes_table_and_figures(call, tmp_path, dataset):
    code, out, err = call(demo.main, "--dataset", dataset, *SMALL)
    assert (code, err) == (0, "")
    folder = tmp_path / ("runs/toy" if dataset == "rings" else f"runs/toy-{dataset}")
    rows = json.loads((folder / "table.json").read_text())
    assert [row["model"] for row in rows] == (
        ["data"] + ["teacher"] * 6 + ["2-RF"] * 5 + ["3-RF"] * 5
        + ["teacher + distill", "2-RF + distill"]
    )
    assert (folder / "table.md").read_text() in out
    for name in ("paths.png", "straight.png", "one-step.png", "flow.gif"):
        image = Image.open(folder / name)
        assert np.asarray(image.convert("L")).std() > 3, f"{name} is blank"
    assert image.n_frames > 30
    image.seek(25)
    first = Image.open(folder / "flow.gif")
    assert (np.asarray(image.convert("L")) != np.asarray(first.convert("L"))).any()


def test_second_run_gives_the_same_table(call, tmp_path):
    tables = []
    for out in "ab":
        assert call(demo.main, *SMALL, "--out", out)[0] == 0
        tables.append(json.loads((tmp_path / out / "table.json").read_text()))
    assert tables[0] == tables[1]


def test_plane_students_writes_all_rows_and_resumes(call, tmp_path):
    arguments = [*SMALL, "--num-seeds", 2, "--widths", 4, "--student-iterations", 3, 6,
                 "--out", "a"]
    code, out, err = call(plane_students.main, *arguments)
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "a/students.json").read_text())
    # Per seed: two teachers, two students each at two numbers of iterations; of the teacher also
    # the negated start at both, and one student at a third number.
    assert len(rows) == 2 * (2 * 2 * 2 + 2 + 1)
    errors = {row["start"]: row["endpoint_error"] for row in rows
              if row["teacher"] == "teacher" and row["width"] == 16 and row["iterations"] == 3}
    assert errors["negated"] != errors["teacher"]
    assert np.asarray(Image.open(tmp_path / "a/students.png").convert("L")).std() > 3
    assert (tmp_path / "a/students.md").read_text() in out

    code, _, err = call(plane_students.main, *arguments, "--iterations", 3)
    assert code == 2 and "a: holds another study (iterations was" in err

    first_seed_rows = [row for row in rows if row["seed"] == 0]  # as if killed in the second
    (tmp_path / "a/students.json").write_text(json.dumps(first_seed_rows))
    assert call(plane_students.main, *arguments)[0] == 0
    assert json.loads((tmp_path / "a/students.json").read_text()) == rows


def test_bad_input_is_a_one_line_error(call):
    for arguments, words in (
        (["--width", 0], "at least 1"), (["--out", __file__], "cannot be written")
    ):
        code, _, err = call(demo.main, *SMALL, *arguments)
        assert code == 2 and err.count("\n") == 0 and words in err


def test_first_script_prints_its_known_answers(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "toy/first.py"], cwd=tmp_path,
                            capture_output=True, text=True, check=True)
    lines = [line.split(":")[1].split() for line in result.stdout.splitlines()[1:5]]
    assert lines[0] == ["(+1.00,", "+0.00)"] * 2  # blur
    # A to P and B to Q, in one step after reflow.
    assert lines[1] == lines[2] == ["(+1.00,", "+1.00)", "(+1.00,", "-1.00)"]
    assert lines[3][0] == "6.00" and lines[3][3] == "4.00"
    assert np.asarray(Image.open(tmp_path / "runs/first.png").convert("L")).std() > 3
    text = (ROOT / "toy/first.py").read_text()
    assert len(text.splitlines()) <= 100
    modules = {line.split()[1] for line in text.splitlines()
               if line.startswith(("import ", "from "))}
    assert modules == {"pathlib", "torch", "matplotlib.figure"}


# --------------------------------------------------------------------------------------------------
# Results in the table. With seeds 0 to 2, the first reflow makes paths at least 66 times
# straighter, the second at least 2.7 times. The transport cost falls to at most 0.96 of the
# teacher's. All thresholds below are looser.


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    arguments = ["--width", 64, "--iterations", 1000, "--distill-iterations", 200,
                 "--num-pairs", 10_000, "--num-samples", 1000, "--out", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["demo.py", *map(str, arguments)])
        demo.main()
    return rows_by_name(json.loads((folder / "table.json").read_text()))


def test_reflow_straightens_paths(table):
    first, second, third = (
        table[name, "euler", 25]["relative_straightness"] for name in ("teacher", "2-RF", "3-RF")
    )
    assert second < first / 10
    assert third < second


def test_reflow_does_not_raise_the_transport_cost(table):
    costs = [table[key]["transport_cost"]
             for key in (("data", None, None), ("teacher", "dpm", 25), ("2-RF", "euler", 25))]
    assert costs[1] < 0.5 * costs[0]
    assert costs[2] < 1.02 * costs[1]  # the theorem is about exact flows


def test_few_steps_suffice_after_reflow(table):
    error = lambda *key: table[key]["endpoint_error"]
    assert error("2-RF", "euler", 1) < 0.2 * error("teacher", "euler", 1)
    assert (
        table["2-RF", "euler", 1]["times_floor"]
        < 0.7 * table["teacher", "euler", 1]["times_floor"]
    )
    for name in ("teacher", "2-RF", "3-RF"):
        errors = [error(name, "euler", steps) for steps in demo.TABLE_STEPS]
        assert errors == sorted(errors, reverse=True)


def test_distillation_lowers_the_one_step_error(table):
    assert (
        table["2-RF + distill", "euler", 1]["endpoint_error"]
        < table["2-RF", "euler", 1]["endpoint_error"]
    )
    assert (
        table["teacher + distill", "euler", 1]["endpoint_error"]
        < table["teacher", "euler", 1]["endpoint_error"]
    )


# --------------------------------------------------------------------------------------------------
# Metrics and data


def test_wasserstein_has_known_answers():
    probe = demo.Probe(demo.rings(), 200, seed=0)
    assert probe.distance(probe.fresh) == 0
    assert probe.distance(probe.fresh + torch.tensor([3.0, 4.0])) == pytest.approx(5)
    # The order of points within a label and a group does not matter. Points of one label cannot
    # replace points of another.
    reordered = probe.fresh.clone()
    reordered[:100:2] = probe.fresh[:100:2].flip(0)
    assert probe.distance(reordered) == 0
    assert probe.distance(probe.fresh.roll(1, 0)) > 0.5
    resampled = demo.sample_data(demo.rings(), probe.labels, torch.Generator().manual_seed(1))
    assert 0.5 * probe.floor < probe.distance(resampled) < 2 * probe.floor


@pytest.mark.parametrize("name", list(demo.DATASETS))
def test_data_lie_on_the_modes_of_their_label(name):
    data = demo.DATASETS[name]()
    probe = demo.Probe(data, 2000, 0)
    points = demo.sample_data(data, probe.labels, torch.Generator().manual_seed(0))
    assert probe.on_mode(points) > 0.98
    assert probe.on_mode(
        demo.sample_data(data, 1 - probe.labels, torch.Generator().manual_seed(0))
    ) < 0.1
    assert 0.5 < points.std() < 2  # on the scale of the noise


# --------------------------------------------------------------------------------------------------
# The pipeline's functions


class PlaneModel:
    """A model and its pairs, as the batches and losses of reflow.py and distill.py use them."""

    def __init__(self, model, pairs):
        self.unet, self.kind, self.pairs = copy.deepcopy(model.network), model.kind, pairs

    def encode_prompts(self, prompts):
        return demo.context_of(torch.tensor([int(prompt) if prompt else -1 for prompt in prompts]))

    def batch(self, samples, seed):
        labels, x0, x1 = (column[samples % len(self.pairs[0])] for column in self.pairs)
        return x0, x1, [str(label) for label in labels.tolist()]


def test_pipeline_functions_give_the_demos_results(tmp_path):
    args = argparse.Namespace(width=64, iterations=500, batch_size=256, num_pairs=5000,
                              teacher_guidance=1.5, seed=0)
    teacher = demo.make_teacher(demo.rings(), args)
    pairs = demo.make_pairs(teacher, args.num_pairs, generator_for(0, 1))
    by_demo = demo.reflow(teacher, pairs, args, "2-RF")
    model = PlaneModel(teacher, pairs)
    options = TrainingOptions(500, 256, 4e-3, cooldown=0.5, ema_half_life=20 * 256, ema_ramp=0.05)
    train(model.unet, ema_copy(model.unet), partial(reflow.batch, model, 0),
          partial(reflow.loss, model.encode_prompts, squared), options, tmp_path / "2rf", {})
    by_pipeline, probe = demo.Model("2-RF", model.unet, "flow"), demo.Probe(demo.rings(), 400, 0)
    rows = [demo.rows_of(each, probe)[0] for each in (teacher, by_demo, by_pipeline)]
    first, *reflowed = (row["relative_straightness"] for row in rows)
    assert max(reflowed) < first / 5 and 0.4 < reflowed[0] / reflowed[1] < 2.5

    exact = demo.exact_ends(by_pipeline, probe.noise, probe.labels)
    model.pairs = demo.make_pairs(by_pipeline, args.num_pairs, generator_for(0, 2))
    before = demo.student_row(by_pipeline, by_pipeline, probe)["endpoint_error"]
    options = TrainingOptions(200, 256, 4e-3, ema_half_life=20 * 256, ema_ramp=0.05)
    train(model.unet, ema_copy(model.unet), partial(distill.batch, model, 0, 0),
          partial(distill.loss, model.encode_prompts, squared), options, tmp_path / "one", {})
    landing = one_step(flow_velocity(model.unet), probe.noise, demo.context_of(probe.labels))
    assert demo.squared_distance(landing.detach(), exact) < 0.7 * before
