"""What the benchmarks compute without timing anything: the bill, and the memory that is counted."""

import json

import torch
from torch import nn

from benchmarks import cost
from benchmarks.memory import Kept


def test_the_bill_adds_up(call, tmp_path):
    code, out, err = call(cost.main, "--gpus", 4, "--price", 2)
    assert code == 0, err
    total = next(line for line in out.splitlines() if line.startswith("| all"))
    # The paper's A100-days; a quarter of them, on 4 GPUs; 199.2 x 24 x 2.
    assert "| 199.2 | 49.8 |" in total and "| 9562 |" in total
    rows = [{"stage": name, "samples_per_second": 2 * cost.RECIPE[name].rate}
            for name in ("pairs", "reflow", "l2", "lpips")]
    (tmp_path / "rates.json").write_text(json.dumps({"rows": rows}))
    code, out, err = call(cost.main, "--rates", tmp_path / "rates.json")
    assert code == 0 and "this: 99.6 GPU-days" in out
    (tmp_path / "rates.json").write_text(json.dumps({"rows": rows[1:]}))
    assert call(cost.main, "--rates", tmp_path / "rates.json")[0] == 2
    assert call(cost.main, "--reflow-share", 1.5)[0] == 2


def test_what_is_kept_for_the_backward_pass():
    network = nn.Sequential(
        nn.Sequential(nn.Linear(4, 8), nn.SiLU()), nn.Sequential(nn.Linear(8, 2), nn.SiLU())
    )
    kept = Kept(list(network), {weight.untyped_storage()._cdata for weight in network.parameters()})
    x = torch.randn(3, 4)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        loss = network(x).square().sum()
    assert loss.requires_grad
    # The inputs of both linear layers, of both SiLUs and of the square, 4 bytes a number.
    assert kept.plain() == 4 * (3 * 4 + 3 * 8 + 3 * 8 + 3 * 2 + 3 * 2)
    # The inputs of both blocks and of the square, and what the first block computes again beyond
    # its input.
    assert kept.checkpointed() == 4 * (3 * 4 + 3 * 8 + 3 * 2 + 3 * 8)
    assert kept.checkpointed() == kept.plain() - 24
