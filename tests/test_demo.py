"""The 2-D toy: its command, what its table must say, and its worked example."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

import demo
from rectified_flow import euler, one_step, straightness

SMALL = ["--width", 16, "--iterations", 30, "--distill-iterations", 10, "--batch-size", 32, "--num-pairs", 200,
         "--num-samples", 120]  # fmt: skip


def rows_by_name(rows):
    return {(row["model"], row["solver"], row["steps"]): row for row in rows}


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# ---------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("dataset", list(demo.DATASETS))
def test_the_demo_writes_table_and_figures(call, tmp_path, dataset):
    code, out, err = call(demo.main, "--dataset", dataset, *SMALL)
    assert (code, err) == (0, "")
    folder = tmp_path / ("runs/toy" if dataset == "rings" else f"runs/toy-{dataset}")
    rows = json.loads((folder / "table.json").read_text())
    assert [row["model"] for row in rows] == (
        ["data"] + ["teacher"] * 6 + ["2-RF"] * 5 + ["3-RF"] * 5 + ["teacher + distill", "2-RF + distill"]
    )
    assert (folder / "table.md").read_text() in out
    for name in ("paths.png", "straight.png", "one-step.png", "flow.gif"):
        picture = Image.open(folder / name)
        assert np.asarray(picture.convert("L")).std() > 3, f"{name} is blank"
    assert picture.n_frames > 30
    picture.seek(25)
    assert (np.asarray(picture.convert("L")) != np.asarray(Image.open(folder / "flow.gif").convert("L"))).any()


def test_a_second_run_finds_everything_finished(call, tmp_path):
    tables = []
    for _ in range(2):
        call(demo.main, *SMALL)
        tables.append(without_seconds(json.loads((tmp_path / "runs/toy/table.json").read_text())))
    assert tables[0] == tables[1]


def test_the_study_goes_on_where_it_was(call, tmp_path):
    study = [*SMALL, "--study", "--study-seeds", 2, "--study-widths", "4", "--study-updates", "3,6"]
    code, out, err = call(demo.main, *study, "--out", "a")
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "a/study.json").read_text())
    # Two seeds, two teachers, two students at two numbers of updates, and two of the teacher's at one more.
    assert len(rows) == 2 * (2 * 2 * 2 + 1)
    assert np.asarray(Image.open(tmp_path / "a/study.png").convert("L")).std() > 3
    assert (tmp_path / "a/study.md").read_text() in out

    (tmp_path / "a/study.json").write_text(json.dumps(rows[:-1]))  # as if killed before the last was measured
    assert call(demo.main, *study, "--out", "a")[0] == 0
    assert json.loads((tmp_path / "a/study.json").read_text()) == rows


def test_bad_input_is_one_line(call):
    assert call(demo.main, "--study-widths", "8,x")[0] == 2
    call(demo.main, *SMALL)
    code, _, err = call(demo.main, *SMALL, "--dataset", "spirals", "--out", "runs/toy")
    assert code == 2 and err.count("\n") == 0 and "dataset was 'rings', now 'spirals'" in err
    code, _, err = call(demo.main, *SMALL, "--teacher-guidance", 3)
    assert code == 2 and "guidance was 1.5, now 3.0" in err


# ---------------------------------------------------------------------------------------------------------------
# What the table must say. With seeds 0 to 2 paths get straighter 66-fold or more, then 2.7-fold or more, and the transport
# cost falls to 0.96 or less: each margin leaves room.


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    args = argparse.Namespace(
        dataset="rings", width=64, iterations=1000, distill_iterations=200, batch_size=256, num_pairs=10_000,
        teacher_guidance=1.5, num_samples=1000, seed=0,
    )  # fmt: skip
    demo.demo(demo.rings(), folder, args)
    return rows_by_name(json.loads((folder / "table.json").read_text()))


def test_reflow_straightens(table):
    first, second, third = (table[name, "euler", 25]["relative_straightness"] for name in ("teacher", "2-RF", "3-RF"))
    assert second < first / 10
    assert third < second


def test_reflow_does_not_raise_the_transport_cost(table):
    costs = [table[key]["transport_cost"] for key in (("data", None, None), ("teacher", "dpm", 25), ("2-RF", "euler", 25))]
    assert costs[1] < 0.5 * costs[0]
    assert costs[2] < 1.02 * costs[1]  # the theorem is about exact flows


def test_few_steps_suffice_after_reflow(table):
    error = lambda *key: table[key]["endpoint_error"]
    assert error("2-RF", "euler", 1) < 0.2 * error("teacher", "euler", 1)
    assert table["2-RF", "euler", 1]["times_floor"] < 0.7 * table["teacher", "euler", 1]["times_floor"]
    for name in ("teacher", "2-RF", "3-RF"):
        errors = [error(name, "euler", steps) for steps in demo.TABLE_STEPS]
        assert errors == sorted(errors, reverse=True)


def test_distillation_brings_one_step_closer(table):
    assert table["2-RF + distill", "euler", 1]["endpoint_error"] < table["2-RF", "euler", 1]["endpoint_error"]
    assert table["teacher + distill", "euler", 1]["endpoint_error"] < table["teacher", "euler", 1]["endpoint_error"]


# ---------------------------------------------------------------------------------------------------------------
# Measures and data


def test_wasserstein_has_known_answers():
    probe, again = demo.make_probe(demo.rings(), 200, seed=0)
    assert probe.wasserstein(probe.fresh) == 0
    assert probe.wasserstein(probe.fresh + torch.tensor([3.0, 4.0])) == pytest.approx(5)
    # The order within a label and a group does not matter, but a label's points cannot stand in for another's.
    turned = probe.fresh.clone()
    turned[:100:2] = probe.fresh[:100:2].flip(0)
    assert probe.wasserstein(turned) == 0
    assert probe.wasserstein(probe.fresh.roll(1, 0)) > 0.5
    assert 0.5 * probe.floor < probe.wasserstein(again) < 2 * probe.floor


@pytest.mark.parametrize("name", list(demo.DATASETS))
def test_data_lie_on_their_own_modes(name):
    data = demo.DATASETS[name]()
    labels = torch.arange(2000) % 2
    points = data.draw(labels, torch.Generator().manual_seed(0))
    assert data.on_mode(points, labels) > 0.98
    assert data.on_mode(points, 1 - labels) < 0.1
    assert 0.5 < points.std() < 2  # of the size of the noise


def test_the_worked_example():
    """The clouds of the docstring's example, of width 0.15, for which the average velocity has a closed form."""
    noises, targets, width = torch.tensor([[-1.0, 1], [-1, -1]]), torch.tensor([[1.0, 1], [1, -1]]), 0.15

    def velocity_of(pairs):
        def velocity(x, t, context):
            t = t[:, None]
            spread = (1 - t) ** 2 + t**2
            answers, weights = [], []
            for noise, target in pairs:
                away = x - ((1 - t) * noise + t * target)
                answers.append(target - noise + (2 * t - 1) / spread * away)  # E[X1 - X0 | X_t = x] on this line
                weights.append(-away.square().sum(1) / (2 * width**2 * spread[:, 0]))
            return (torch.stack(weights).softmax(0)[..., None] * torch.stack(answers)).sum(0)

        return velocity

    first = velocity_of([(noise, target) for noise in noises for target in targets])
    assert torch.allclose(one_step(first, noises[:1]), torch.tensor([[1.0, 0.0]]), atol=1e-4)  # neither P nor Q
    *_, ends = euler(first, noises, 1000)
    assert torch.allclose(ends, targets, atol=0.05)  # A to P, B to Q
    assert straightness(first, noises, 1000).relative > 0.02
    assert (targets[None] - noises[:, None]).square().sum(2).mean() == 6

    second = velocity_of(list(zip(noises, ends)))
    assert torch.allclose(one_step(second, noises), ends, atol=1e-4)
    assert straightness(second, noises, 100).relative < 1e-6
    assert (ends - noises).square().sum(1).mean() == pytest.approx(4, abs=0.2)
