"""Two processes generate the same pairs as one, to the byte, and train the same up to rounding.

A run may also resume with another number of processes.
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
from processes import start_two_processes
from training import read_metrics, saved_step

REFLOW = ["--num-pairs", 40, "--teacher-steps", 3, "--iterations", 6, "--batch-size", 4,
          "--validation-pairs", 0,
          "--accumulate", 2, "--save-every", 1,
          "--cooldown", 0]  # constant learning rate: a run may resume to more iterations

RUNNER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import command, pairs
pairs.PAIRS_PER_SHARD = 16
command.run(__import__(sys.argv.pop(1)).main)
"""


def torchrun(folder: Path, name: str, arguments: list) -> subprocess.Popen:
    """Start a command in two processes under torchrun, with one thread each."""
    folder.mkdir(exist_ok=True)
    (folder / "runner.py").write_text(RUNNER)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(folder / "log", "w") as output:
        return subprocess.Popen(
            [*line, "runner.py", name, *map(str, arguments)], cwd=folder, stdout=output,
            stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def run_two_processes(folders: list[Path], name: str, arguments: list) -> tuple[list[int], str]:
    """(exit codes, log) of the command in two processes, without torchrun, which takes seconds."""
    codes = [process.wait() for process in start_two_processes(folders, name, arguments)]
    return codes, (folders[0] / "log").read_text()


@pytest.fixture
def run_alone(call, monkeypatch):
    """run_alone(folder, main, arguments): the command in this process alone, with one thread."""
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
    state_a, state_b = (
        load_file(a / "runs/2rf.safetensors.state/state.safetensors"),
        load_file(b / "runs/2rf.safetensors.state/state.safetensors"),
    )
    for kind in ("weights", "ema", "exp_avg"):
        tensor_a, tensor_b = (
            torch.cat([state[name].flatten() for name in sorted(state)
                       if name.startswith(f"{kind}.")])
            for state in (state_a, state_b)
        )
        assert relative_error(tensor_a, tensor_b) < 1e-4, kind
    # The last row, since a row beside a stop averages over fewer iterations.
    losses = [read_metrics(folder / "runs/2rf.safetensors.state")[-1]["loss"] for folder in (a, b)]
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0]


def test_two_processes_give_the_same_pairs_and_training_as_one(tmp_path, run_alone):
    one, two = tmp_path / "one", tmp_path / "two"
    run_alone(one, reflow.main, REFLOW)
    assert torchrun(two, "reflow", REFLOW).wait(timeout=300) == 0, (two / "log").read_text()
    # Only the first process prints.
    assert (two / "log").read_text().count("a rectified flow") == 1
    names = sorted(path.name for path in (one / "runs/pairs").glob("shard-*"))
    assert len(names) == 3
    for name in [*names, "pairs.json"]:
        a, b = (folder / "runs/pairs" / name for folder in (one, two))
        assert a.read_bytes() == b.read_bytes(), name
    assert_same_training(one, two)

    # Both stages of distillation from that flow.
    arguments = ["--num-pairs", 20, "--teacher-steps", 2, "--l2-iterations", 2,
                 "--lpips-iterations", 2, "--batch-size", 3]
    codes, out = run_two_processes([two], "distill", arguments)
    assert codes == [0, 0] and "a one-step model" in out, out
    assert (two / "runs/instaflow.safetensors").exists()


def test_killed_process_ends_the_run_and_the_run_resumes(tmp_path, run_alone):
    undisturbed, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [*REFLOW[:4], "--iterations", 30, *REFLOW[6:]]
    run_alone(undisturbed, reflow.main, arguments)
    process, state = torchrun(killed, "reflow", arguments), killed / "runs/2rf.safetensors.state"
    while not saved_step(state):
        assert process.poll() is None, (killed / "log").read_text()
        time.sleep(0.05)
    workers = [
        int(number)
        for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    os.kill(workers[1], signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    assert "SIGKILL" in (killed / "log").read_text()
    assert 0 < saved_step(state) < 30
    further = min(29, saved_step(state) + 5)
    further = [*arguments[:4], "--iterations", further, *arguments[6:]]
    codes, out = run_two_processes([killed], "reflow", further)
    assert codes == [0, 0], out
    run_alone(killed, reflow.main, arguments)
    assert_same_training(undisturbed, killed)


def test_barrier_waits_longer_than_torchs_timeout(tmp_path):
    """torch's own timeout is for a network that hangs. waiting.py sets it to 1 second."""
    codes, out = run_two_processes([tmp_path], "waiting", [])
    assert codes == [0, 0] and out == "all are here\n", out


def test_cpu_processes_use_gloo_on_a_machine_with_gpus(monkeypatch):
    backends = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(command, "patient_group", lambda: None)
    monkeypatch.setattr("torch.distributed.init_process_group", backends.append)
    command.pick_device("cpu")
    assert backends == ["gloo"]


def test_evaluation_in_two_processes_gives_the_rows_of_one(tmp_path, call):
    """Only one of the two processes writes the rows."""
    arguments = ["--model", TINY_TEACHER, "--num-samples", 24, "--steps", "1"]
    codes, out = run_two_processes([tmp_path / "two"], "evaluate", arguments)
    assert codes == [0, 0] and out.count("comparison image") == 1, out
    assert call(evaluate.main, *arguments)[0] == 0
    rows = [json.loads((folder / "runs/evaluate.json").read_text())
            for folder in (tmp_path, tmp_path / "two")]
    for one, two in zip(*rows, strict=True):
        assert (
            one["caption_accuracy"] == two["caption_accuracy"]
            and abs(one["frechet"] - two["frechet"]) < 1e-2 * one["frechet"]
        )


def test_locked_folder_is_one_error_line_in_every_process(tmp_path):
    command.lock_folder(tmp_path / "a/runs/2rf.safetensors.state")
    try:
        codes, log = run_two_processes([tmp_path / "a"], "reflow", REFLOW)
    finally:
        command.unlock_folder()
    assert codes == [2, 2]
    assert log.count("2rf.safetensors.state: another run works in this folder") == 2
    assert "Traceback" not in log


def test_nodes_without_a_shared_disk_are_refused(tmp_path, run_alone):
    def failed_log() -> str:
        codes, log = run_two_processes([tmp_path / "0", tmp_path / "1"], "reflow", REFLOW)
        assert codes == [2, 2], log
        return log

    error = (
        ".safetensors: made by another process and not here; name a --pairs that all nodes share"
    )
    assert error in failed_log()
    run_alone(tmp_path / "0", reflow.main, [*REFLOW[:4], "--iterations", 3, *REFLOW[6:]])
    shutil.copytree(tmp_path / "0/runs/pairs", tmp_path / "1/runs/pairs", dirs_exist_ok=True)
    error = "the processes find states of different steps in it; name an --out that all nodes share"
    assert error in failed_log()


def test_bad_input_under_torchrun_is_one_line_before_any_work(tmp_path):
    process = torchrun(tmp_path / "a", "reflow", [*REFLOW[:6], "--batch-size", 1])
    assert process.wait(timeout=300) != 0
    log = (tmp_path / "a/log").read_text()
    assert "error: --batch-size 1: smaller than the number of processes, 2 (process 0 of 2)" in log
    assert "runner.py FAILED" in log and 'runner.py", line' not in log
    assert not (tmp_path / "a/runs/pairs/pairs.json").exists()  # the error comes before any work
