"""The plane: its scripts, what the table must say, and the pipeline's own functions in it."""

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
        picture = Image.open(folder / name)
        assert np.asarray(picture.convert("L")).std() > 3, f"{name} is blank"
    assert picture.n_frames > 30
    picture.seek(25)
    first = Image.open(folder / "flow.gif")
    assert (np.asarray(picture.convert("L")) != np.asarray(first.convert("L"))).any()


def test_a_second_run_is_the_same(call, tmp_path):
    tables = []
    for out in "ab":
        assert call(demo.main, *SMALL, "--out", out)[0] == 0
        tables.append(json.loads((tmp_path / out / "table.json").read_text()))
    assert tables[0] == tables[1]


def test_students_in_the_plane(call, tmp_path):
    small = [*SMALL, "--num-seeds", 2, "--widths", 4, "--updates", 3, 6, "--out", "a"]
    code, out, err = call(plane_students.main, *small)
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "a/students.json").read_text())
    # Two seeds, two teachers, two students at two numbers of updates, and two of the teacher's at
    # one more.
    assert len(rows) == 2 * (2 * 2 * 2 + 1)
    assert np.asarray(Image.open(tmp_path / "a/students.png").convert("L")).std() > 3
    assert (tmp_path / "a/students.md").read_text() in out

    kept = [row for row in rows if row["seed"] == 0]  # as if killed in the second seed
    (tmp_path / "a/students.json").write_text(json.dumps(kept))
    assert call(plane_students.main, *small)[0] == 0
    assert json.loads((tmp_path / "a/students.json").read_text()) == rows


def test_bad_input_is_one_line(call):
    for arguments, words in (
        (["--width", 0], "at least 1"), (["--out", __file__], "cannot be written")
    ):
        code, _, err = call(demo.main, *SMALL, *arguments)
        assert code == 2 and err.count("\n") == 0 and words in err


def test_the_first_script_says_what_its_docstring_says(tmp_path):
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
# What the table must say. With seeds 0 to 2 paths get straighter 66-fold or more, then 2.7-fold or
# more, and the transport cost falls to 0.96 or less: each margin leaves room.


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    arguments = ["--width", 64, "--iterations", 1000, "--distill-iterations", 200,
                 "--num-pairs", 10_000, "--num-samples", 1000, "--out", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["demo.py", *map(str, arguments)])
        demo.main()
    return rows_by_name(json.loads((folder / "table.json").read_text()))


def test_reflow_straightens(table):
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


def test_distillation_brings_one_step_closer(table):
    assert (
        table["2-RF + distill", "euler", 1]["endpoint_error"]
        < table["2-RF", "euler", 1]["endpoint_error"]
    )
    assert (
        table["teacher + distill", "euler", 1]["endpoint_error"]
        < table["teacher", "euler", 1]["endpoint_error"]
    )


# --------------------------------------------------------------------------------------------------
# Measures and data


def test_wasserstein_has_known_answers():
    probe = demo.Probe(demo.rings(), 200, seed=0)
    assert probe.distance(probe.fresh) == 0
    assert probe.distance(probe.fresh + torch.tensor([3.0, 4.0])) == pytest.approx(5)
    # The order within a label and a group does not matter, but a label's points cannot stand in for
    # another's.
    turned = probe.fresh.clone()
    turned[:100:2] = probe.fresh[:100:2].flip(0)
    assert probe.distance(turned) == 0
    assert probe.distance(probe.fresh.roll(1, 0)) > 0.5
    again = demo.sample_data(demo.rings(), probe.labels, torch.Generator().manual_seed(1))
    assert 0.5 * probe.floor < probe.distance(again) < 2 * probe.floor


@pytest.mark.parametrize("name", list(demo.DATASETS))
def test_data_lie_on_their_own_modes(name):
    data = demo.DATASETS[name]()
    probe = demo.Probe(data, 2000, 0)
    points = demo.sample_data(data, probe.labels, torch.Generator().manual_seed(0))
    assert probe.on_mode(points) > 0.98
    assert probe.on_mode(
        demo.sample_data(data, 1 - probe.labels, torch.Generator().manual_seed(0))
    ) < 0.1
    assert 0.5 < points.std() < 2  # of the size of the noise


# --------------------------------------------------------------------------------------------------
# The pipeline's own functions


class InThePlane:
    """What batches and losses of reflow.py and distill.py ask of a model and of pairs."""

    def __init__(self, model, pairs):
        self.unet, self.kind, self.pairs = copy.deepcopy(model.network), model.kind, pairs

    def encode_prompts(self, prompts):
        return demo.context_of(torch.tensor([int(prompt) if prompt else -1 for prompt in prompts]))

    def batch(self, samples, seed):
        labels, x0, x1 = (column[samples % len(self.pairs[0])] for column in self.pairs)
        return x0, x1, [str(label) for label in labels.tolist()]


def test_the_pipelines_own_functions_do_the_same(tmp_path):
    args = argparse.Namespace(width=64, iterations=500, batch_size=256, num_pairs=5000,
                              teacher_guidance=1.5, seed=0)
    teacher = demo.make_teacher(demo.rings(), args)
    pairs = demo.make_pairs(teacher, args.num_pairs, generator_for(0, 1))
    ours = demo.reflow(teacher, pairs, args, "2-RF")
    model = InThePlane(teacher, pairs)
    options = TrainingOptions(500, 256, 4e-3, cooldown=0.5, ema_half_life=20 * 256, ema_ramp=0.05)
    train(model.unet, ema_copy(model.unet), partial(reflow.batch, model, 0),
          partial(reflow.loss, model.encode_prompts, squared), options, tmp_path / "2rf", {})
    theirs, probe = demo.Model("2-RF", model.unet, "flow"), demo.Probe(demo.rings(), 400, 0)
    rows = [demo.rows_of(each, probe)[0] for each in (teacher, ours, theirs)]
    first, *others = (row["relative_straightness"] for row in rows)
    assert max(others) < first / 5 and 0.4 < others[0] / others[1] < 2.5

    exact = demo.exact_ends(theirs, probe.noise, probe.labels)
    model.pairs = demo.make_pairs(theirs, args.num_pairs, generator_for(0, 2))
    before = demo.student_row(theirs, theirs, probe)["endpoint_error"]
    options = TrainingOptions(200, 256, 4e-3, ema_half_life=20 * 256, ema_ramp=0.05)
    train(model.unet, ema_copy(model.unet), partial(distill.batch, model, 0, 0),
          partial(distill.loss, model.encode_prompts, squared), options, tmp_path / "one", {})
    landing = one_step(flow_velocity(model.unet), probe.noise, demo.context_of(probe.labels))
    assert demo.squared_distance(landing.detach(), exact) < 0.7 * before
