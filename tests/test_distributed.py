"""Two processes do what one does: the same pairs to the byte, the same training up to rounding.

So it is at any change of number.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import command
import evaluate
import pairs
import reflow
from command import TINY_TEACHER
from conftest import ROOT, relative_error
from training import read_metrics, saved_progress

REFLOW = ["--num-pairs", 40, "--teacher-steps", 3, "--iterations", 6, "--batch-size", 4,
          "--validation-pairs", 0,
          "--accumulate", 2, "--save-every", 1,
          "--cooldown", 0]  # at a constant rate, so that a run may go on to more iterations

RUNNER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import command, pairs
pairs.PAIRS_PER_SHARD = 16
if sys.argv[1] == "apart":  # each process has a disk of its own
    del sys.argv[1]
    os.chdir(os.environ["RANK"])
name = sys.argv.pop(1)
command.run(__import__(name).main)
"""


def start(folder: Path, name: str, arguments: list) -> subprocess.Popen:
    """A command in two processes under torchrun, in a folder, one thread a process."""
    folder.mkdir(exist_ok=True)
    (folder / "runner.py").write_text(RUNNER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(folder / "log", "w") as output:
        return subprocess.Popen(
            [*torchrun, "runner.py", name, *map(str, arguments)], cwd=folder, stdout=output,
            stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def run(folder: Path, name: str, arguments: list) -> str:
    process = start(folder, name, arguments)
    assert process.wait(timeout=300) == 0, (folder / "log").read_text()
    return (folder / "log").read_text()


@pytest.fixture
def run_alone(call, monkeypatch):
    """The same in this process alone, with one thread too: run_alone(folder, main, arguments)."""
    monkeypatch.setattr(pairs, "PAIRS_PER_SHARD", 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(folder: Path, main, arguments: list) -> None:
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        code, _, err = call(main, *arguments)
        assert code == 0, err

    yield run
    torch.set_num_threads(threads)


def assert_same_training(a: Path, b: Path) -> None:
    first, second = (
        load_file(a / "runs/2rf.safetensors.state/state.safetensors"),
        load_file(b / "runs/2rf.safetensors.state/state.safetensors"),
    )
    for kind in ("weights", "ema", "exp_avg"):
        one, two = (
            torch.cat([state[name].flatten() for name in sorted(state)
                       if name.startswith(f"{kind}.")])
            for state in (first, second)
        )
        assert relative_error(one, two) < 1e-4, kind
    # The last row, since the row in which a run was stopped averages over fewer steps.
    losses = [read_metrics(folder / "runs/2rf.safetensors.state")[-1]["loss"] for folder in (a, b)]
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0]


def test_two_processes_do_what_one_does(tmp_path, run_alone):
    one, two = tmp_path / "one", tmp_path / "two"
    run_alone(one, reflow.main, REFLOW)
    out = run(two, "reflow", REFLOW)
    assert out.count("a rectified flow") == 1  # only the first process speaks
    names = sorted(path.name for path in (one / "runs/pairs").glob("shard-*"))
    assert len(names) == 3
    for name in [*names, "pairs.json"]:
        a, b = (folder / "runs/pairs" / name for folder in (one, two))
        assert a.read_bytes() == b.read_bytes(), name
    assert_same_training(one, two)

    # Distillation of that flow, both stages.
    arguments = ["--num-pairs", 20, "--teacher-steps", 2, "--l2-iterations", 2,
                 "--lpips-iterations", 2, "--batch-size", 3]
    assert "a one-step model" in run(two, "distill", arguments)
    assert (two / "runs/instaflow.safetensors").exists()


def test_a_killed_process_ends_the_run_and_the_next_goes_on(tmp_path, run_alone):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [*REFLOW[:4], "--iterations", 30, *REFLOW[6:]]
    run_alone(whole, reflow.main, arguments)
    process, state = start(killed, "reflow", arguments), killed / "runs/2rf.safetensors.state"
    while not saved_progress(state)["step"]:
        assert process.poll() is None, (killed / "log").read_text()
        time.sleep(0.05)
    workers = [
        int(number)
        for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    os.kill(workers[1], signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    assert "SIGKILL" in (killed / "log").read_text()
    assert 0 < saved_progress(state)["step"] < 30
    further = min(29, saved_progress(state)["step"] + 5)
    run(killed, "reflow", [*arguments[:4], "--iterations", further, *arguments[6:]])
    run_alone(killed, reflow.main, arguments)
    assert_same_training(whole, killed)


def test_a_slow_process_is_waited_for(tmp_path):
    """Longer than torch waits elsewhere, which is made short here.

    There it tells of a network that hangs.
    """
    (tmp_path / "waiting.py").write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from datetime import timedelta
import torch.distributed as dist
import command

join = dist.init_process_group
dist.init_process_group = lambda backend: join(backend, timeout=timedelta(seconds=2))
command.pick_device("cpu")
time.sleep(4 * command.rank())
command.wait_for_all()
print("all are here")
dist.destroy_process_group()
""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                "waiting.py"]
    result = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout == "all are here\n", result.stderr


def test_processes_on_the_cpu_of_a_machine_with_gpus_use_gloo(monkeypatch):
    backends = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(command, "patient_group", lambda: None)
    monkeypatch.setattr("torch.distributed.init_process_group", backends.append)
    command.pick_device("cpu")
    assert backends == ["gloo"]


def test_evaluation_under_two_processes(tmp_path, call):
    """The rows are those of one process, and one of the two writes."""
    arguments = ["--model", TINY_TEACHER, "--num-samples", 24, "--steps", "1"]
    out = run(tmp_path / "two", "evaluate", arguments)
    assert out.count("comparison picture") == 1 and call(evaluate.main, *arguments)[0] == 0
    rows = [json.loads((folder / "runs/evaluate.json").read_text())
            for folder in (tmp_path, tmp_path / "two")]
    for one, two in zip(*rows, strict=True):
        assert (
            one["caption_accuracy"] == two["caption_accuracy"]
            and abs(one["frechet"] - two["frechet"]) < 1e-2 * one["frechet"]
        )


def test_two_runs_at_once_are_one_line_in_every_process(tmp_path):
    command.keep_others_out(tmp_path / "a/runs/2rf.safetensors.state")
    try:
        assert start(tmp_path / "a", "reflow", REFLOW).wait(timeout=300) != 0
    finally:
        command.let_others_in()
    log = (tmp_path / "a/log").read_text()
    assert "2rf.safetensors.state: another run works in this folder" in log
    assert 'runner.py", line' not in log  # no traceback of ours beside torchrun's


def test_nodes_that_share_no_disk(tmp_path, run_alone):
    for rank in "01":
        (tmp_path / rank).mkdir()

    def refused() -> str:
        assert start(tmp_path, "apart", ["reflow", *REFLOW]).wait(timeout=300) != 0
        return (tmp_path / "log").read_text()

    said = ".safetensors: made by another process and not here; name a --pairs that all nodes share"
    assert said in refused()
    run_alone(tmp_path / "0", reflow.main, [*REFLOW[:4], "--iterations", 3, *REFLOW[6:]])
    shutil.copytree(tmp_path / "0/runs/pairs", tmp_path / "1/runs/pairs", dirs_exist_ok=True)
    said = "the processes find states of different steps in it; name an --out that all nodes share"
    assert said in refused()


def test_bad_input_under_torchrun(tmp_path):
    process = start(tmp_path / "a", "reflow", [*REFLOW[:6], "--batch-size", 1])
    assert process.wait(timeout=300) != 0
    log = (tmp_path / "a/log").read_text()
    assert "error: --batch-size 1: smaller than the number of processes, 2 (process 0 of 2)" in log
    assert "runner.py FAILED" in log and 'runner.py", line' not in log
    assert not (tmp_path / "a/runs/pairs/pairs.json").exists()  # said before any work
