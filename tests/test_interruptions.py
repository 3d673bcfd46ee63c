"""Fifty kills (kill -9): an interrupted pipeline ends with the same files as an undisturbed one.

    make test-slow

The pipeline runs on the tiny model with few pairs and iterations, first undisturbed. Then it runs
in new folders and is killed, half of the time at a random moment. Otherwise the kill waits for a
temporary file, so that it hits the middle of a write. The same command runs again until it ends.
At the end of each pipeline, every checkpoint, shard, training state and description must equal
that of the undisturbed run, byte for byte.
"""

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from conftest import ROOT

# The pairs fill three shards.
FEW_PAIRS = ["--num-pairs", "2500", "--teacher-steps", "2", "--teacher-guidance", "1"]
FEW_ITERATIONS = ["--batch-size", "8", "--save-every", "4", "--validation-pairs", "8"]
COMMANDS = [
    ["reflow.py", *FEW_PAIRS, *FEW_ITERATIONS, "--iterations", "40"],
    ["distill.py", *FEW_PAIRS, *FEW_ITERATIONS, "--l2-iterations", "24", "--lpips-iterations", "8"],
]
COMPARED = ("*.safetensors", "pairs.json", "settings.json")


def start(command: list[str], folder: Path, log: Path) -> subprocess.Popen:
    script, *options = command
    with open(log, "a") as file:
        return subprocess.Popen(
            [sys.executable, ROOT / script, *options], cwd=folder, stdout=file, stderr=file
        )


def file_hashes(folder: Path) -> dict[str, str]:
    """The hash of every file that an interruption must not change."""
    files = sorted(path for pattern in COMPARED for path in folder.rglob(pattern))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files}


def is_writing(folder: Path) -> bool:
    return any(True for _ in folder.rglob(".*.tmp*"))


def kill_during(
    process: subprocess.Popen, folder: Path, seconds: float, during_a_write: bool
) -> str | None:
    """Kill the process after so many seconds, or at the first write after them.

    Returns what the kill interrupted, "work" or "a write"; None: the process ended first.
    """
    started = time.monotonic()
    while process.poll() is None:
        writing = is_writing(folder)
        if time.monotonic() - started > seconds and (writing or not during_a_write):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return "a write" if writing else "work"
        time.sleep(0.0005)
    return None


@pytest.mark.slow
def test_fifty_kills_change_no_file(tmp_path, capsys):
    kills, log, undisturbed, duration = 50, tmp_path / "log", tmp_path / "calm", {}
    undisturbed.mkdir()
    for command in COMMANDS:
        started = time.monotonic()
        assert start(command, undisturbed, log).wait() == 0, log.read_text()
        duration[command[0]] = time.monotonic() - started
    expected = file_hashes(undisturbed)
    rng, killed_at, pipelines = random.Random(0), {"work": 0, "a write": 0}, 0
    with capsys.disabled(), tqdm(total=kills, unit="kill") as bar:
        while bar.n < kills:
            folder = tmp_path / f"cut-{pipelines}"
            folder.mkdir()
            for command in COMMANDS:
                while True:
                    process = start(command, folder, log)
                    seconds, during_a_write = (
                        rng.uniform(0, duration[command[0]]), rng.random() < 0.5
                    )
                    interrupted = (
                        kill_during(process, folder, seconds, during_a_write)
                        if bar.n < kills else None
                    )
                    if interrupted is None:
                        break
                    killed_at[interrupted] += 1
                    bar.update()
                assert process.wait() == 0, log.read_text()
            pipelines += 1
            assert file_hashes(folder) == expected
        print(f"{killed_at} over {pipelines} pipelines; all {len(expected)} files as undisturbed")
