"""kill -9, fifty times: does an interrupted pipeline end in the same files as one left alone?

    make test-slow

The tiny model, few pairs and few updates. First the pipeline runs undisturbed. Then it is run again
and again in new folders, and killed: half of the times at a random moment of the work, half of the
times as soon as a temporary file appears, which is in the middle of a write. The same command is
given again until it ends. Whenever a pipeline has ended, every checkpoint, shard, training state
and description is compared byte for byte with those of the undisturbed run.
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
FEW_UPDATES = ["--batch-size", "8", "--save-every", "4", "--validation-pairs", "8"]
COMMANDS = [
    ["reflow.py", *FEW_PAIRS, *FEW_UPDATES, "--iterations", "40"],
    ["distill.py", *FEW_PAIRS, *FEW_UPDATES, "--l2-iterations", "24", "--lpips-iterations", "8"],
]
COMPARED = ("*.safetensors", "pairs.json", "settings.json")


def start(command: list[str], folder: Path, log: Path) -> subprocess.Popen:
    script, *options = command
    with open(log, "a") as file:
        return subprocess.Popen(
            [sys.executable, ROOT / script, *options], cwd=folder, stdout=file, stderr=file
        )


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file that an interruption must not change."""
    files = sorted(path for pattern in COMPARED for path in folder.rglob(pattern))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files}


def is_writing(folder: Path) -> bool:
    return any(True for _ in folder.rglob(".*.tmp*"))


def kill_during(
    process: subprocess.Popen, folder: Path, seconds: float, in_a_write: bool
) -> str | None:
    """Kill the process after so many seconds, or at the first write after them.

    What it was at, None if it ended before.
    """
    started = time.monotonic()
    while process.poll() is None:
        writing = is_writing(folder)
        if time.monotonic() - started > seconds and (writing or not in_a_write):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return "a write" if writing else "work"
        time.sleep(0.0005)
    return None


@pytest.mark.slow
def test_fifty_kills(tmp_path, capsys):
    kills, log, calm, duration = 50, tmp_path / "log", tmp_path / "calm", {}
    calm.mkdir()
    for command in COMMANDS:
        started = time.monotonic()
        assert start(command, calm, log).wait() == 0, log.read_text()
        duration[command[0]] = time.monotonic() - started
    expected = contents(calm)
    moments, killed_at, pipelines = random.Random(0), {"work": 0, "a write": 0}, 0
    with capsys.disabled(), tqdm(total=kills, unit="kill") as bar:
        while bar.n < kills:
            folder = tmp_path / f"cut-{pipelines}"
            folder.mkdir()
            for command in COMMANDS:
                while True:
                    process = start(command, folder, log)
                    seconds, in_a_write = (
                        moments.uniform(0, duration[command[0]]), moments.random() < 0.5
                    )
                    what = (
                        kill_during(process, folder, seconds, in_a_write)
                        if bar.n < kills else None
                    )
                    if what is None:
                        break
                    killed_at[what] += 1
                    bar.update()
                assert process.wait() == 0, log.read_text()
            pipelines += 1
            assert contents(folder) == expected
        print(f"{killed_at} over {pipelines} pipelines; all {len(expected)} files as undisturbed")
