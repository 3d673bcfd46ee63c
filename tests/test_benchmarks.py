"""The cost of the recipe, the counted training memory, the demo's lengths, int8's packages."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import cost, demo, int8, sampling, timing
from benchmarks.memory import Kept
from processes import Process


def test_cost_follows_gpus_price_and_measured_speed(call, tmp_path):
    code, out, err = call(cost.main, "--gpus", 4, "--price", 2)
    assert code == 0, err
    total = next(line for line in out.splitlines() if line.startswith("| all"))
    # The paper's 199.2 A100-days; a quarter of that on 4 GPUs; 199.2 x 24 h x $2.
    assert "| 199.2 | 49.8 |" in total and "| 9562 |" in total
    rows = [{"stage": name, "samples_per_second": 2 * cost.RECIPE[name].rate}
            for name in ("pairs", "reflow", "l2", "lpips")]
    (tmp_path / "rates.json").write_text(json.dumps({"rows": rows}))
    code, out, err = call(cost.main, "--rates", tmp_path / "rates.json")
    assert code == 0 and "this: 99.6 GPU-days" in out
    (tmp_path / "rates.json").write_text(json.dumps({"rows": rows[1:]}))
    code, _, err = call(cost.main, "--rates", tmp_path / "rates.json")
    assert code == 2 and "has no stage pairs" in err
    assert call(cost.main, "--reflow-share", 1.5)[0] == 2


@pytest.mark.parametrize("flags", [["--openvino"], ["--openvino", "--int8"], ["--int8"]])
def test_sampling_without_optional_packages_is_refused(call, monkeypatch, flags):
    has = "openvino" if "--int8" in flags else None
    monkeypatch.setattr(sampling, "find_spec", lambda name: name == has)
    code, _, err = call(sampling.main, *flags, "--device", "cpu")
    assert code == 2 and err.startswith(f"error: {flags[-1]}: ") and "pip install" in err


def test_int8_needs_its_packages_and_whole_batches(call, monkeypatch):
    monkeypatch.setattr(int8, "find_spec", lambda name: None)
    code, _, err = call(int8.main)
    assert code == 2 and "pip install openvino nncf" in err
    monkeypatch.setattr(int8, "find_spec", lambda name: True)
    code, _, err = call(int8.main, "--num-samples", 150)
    assert code == 2 and "--num-samples 150: not a multiple of 100" in err


def test_quartiles_lie_within_what_was_measured():
    assert timing.ratio([1, 1], [1, 2])["quartiles"] == "0.50 to 1.00"
    assert timing.ratio([2], [1])["quartiles"] == "2.00 to 2.00"


def test_memory_saved_for_the_backward_pass_is_counted():
    network = nn.Sequential(
        nn.Sequential(nn.Linear(4, 8), nn.SiLU()), nn.Sequential(nn.Linear(8, 2), nn.SiLU())
    )
    weights = {weight.untyped_storage()._cdata for weight in network.parameters()}
    saved = Kept(list(network), weights)
    x = torch.randn(3, 4)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        loss = network(x).square().sum()
    assert loss.requires_grad
    # The inputs of both linear layers, of both SiLUs and of the square, 4 bytes per element.
    assert saved.plain() == 4 * (3 * 4 + 3 * 8 + 3 * 8 + 3 * 2 + 3 * 2)
    # The inputs of both blocks and of the square, and what the first block saves beyond its input
    # while it is recomputed.
    assert saved.checkpointed() == 4 * (3 * 4 + 3 * 8 + 3 * 2 + 3 * 8)
    assert saved.checkpointed() == saved.plain() - 24


def test_a_demo_length_is_measured_and_resumes(call, monkeypatch, tmp_path):
    def run_command(name, *arguments) -> float:
        assert Process(tmp_path, name.removesuffix(".py"), arguments).wait() == 0
        return 60.0  # seconds

    monkeypatch.setattr(demo, "run_command", run_command)
    flags = ["--fractions", 0.004, "--num-seeds", 1, "--num-samples", 12]
    code, out, err = call(demo.main, *flags)
    assert code == 0, err
    row, = rows = json.loads(Path("runs/demo-length/demo.json").read_text())
    assert [row[name] for name in ("pairs", "reflow", "L2", "LPIPS")] == [40, 2, 2, 1]
    assert row["minutes"] == 2 and row["frechet"] > 0  # the evaluation does not count
    assert Path("runs/demo-length/demo.md").read_text() in out
    monkeypatch.setattr(demo, "measure", None)  # nothing is measured again
    assert call(demo.main, *flags)[0] == 0
    assert json.loads(Path("runs/demo-length/demo.json").read_text()) == rows


def test_demo_lengths_are_compared_seed_by_seed():
    row = lambda fraction, seed, value: {
        "fraction": fraction, "seed": seed} | demo.FULL | dict.fromkeys(demo.FIGURES, value)
    summary = demo.summary_of([row(0.5, 1, 8), row(1.0, 0, 3), row(1.0, 1, 5), row(0.5, 0, 4)])
    assert [line["row"] for line in summary] == ["1", "0.5", "0.5, difference"]
    assert [line["frechet"] for line in summary] == [4, 6, 2]  # the mean of 4 - 3 and 8 - 5
