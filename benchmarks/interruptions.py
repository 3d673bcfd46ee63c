"""kill -9, fifty times: does an interrupted pipeline end in the same files as one that was left alone?

    python benchmarks/interruptions.py                50 kills over pairs, reflow, pairs of the flow and distillation
    python benchmarks/interruptions.py --kills 5

The tiny model, few pairs and few updates. First the pipeline runs undisturbed. Then it is run again and again in new folders,
and killed: half of the times at a random moment of the work, half of the times as soon as a temporary file appears,
which is in the middle of a write. The same command is given again until it ends. Whenever a pipeline has ended, every
checkpoint, shard, training state and description is compared byte for byte with those of the undisturbed run.
Writes benchmarks/results/interruptions.json.
"""

import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command import HERE, BadInput, Parser, machine_name, not_negative, positive, run, write_text

FEW_PAIRS = ["--num-pairs", "2500", "--teacher-steps", "2", "--teacher-guidance", "1"]  # three shards
FEW_UPDATES = ["--batch-size", "8", "--save-every", "4"]
COMMANDS = [
    ["reflow.py", *FEW_PAIRS, *FEW_UPDATES, "--iterations", "40"],
    ["distill.py", *FEW_PAIRS, *FEW_UPDATES, "--l2-iterations", "24", "--lpips-iterations", "8"],
]
COMPARED = ("*.safetensors", "pairs.json", "settings.json")


def start(command: list[str], folder: Path, log: Path) -> subprocess.Popen:
    script, *options = command
    with open(log, "a") as file:
        return subprocess.Popen([sys.executable, HERE / script, *options], cwd=folder, stdout=file, stderr=file)


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file that an interruption must not change."""
    files = sorted(path for pattern in COMPARED for path in folder.rglob(pattern))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_writing(folder: Path) -> bool:
    return any(True for _ in folder.rglob(".*.tmp*"))


def kill_during(process: subprocess.Popen, folder: Path, seconds: float, in_a_write: bool) -> str | None:
    """Kill the process after so many seconds, or at the first write after them. What it was at, None if it ended before."""
    started = time.monotonic()
    while process.poll() is None:
        writing = is_writing(folder)
        if time.monotonic() - started > seconds and (writing or not in_a_write):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return "a write" if writing else "work"
        time.sleep(0.0005)
    return None


def main():
    parser = Parser("Kill the tiny pipeline at random moments and compare what it ends in.")
    parser.add_argument("--kills", type=positive, default=50)
    parser.add_argument("--seed", type=not_negative, default=0, help="of the moments")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as work, tqdm(total=args.kills, unit="kill") as bar:
        log, calm, duration = Path(work) / "log", Path(work) / "calm", {}
        calm.mkdir()
        for command in COMMANDS:
            started = time.monotonic()
            if start(command, calm, log).wait():
                raise BadInput(f"{command[0]}: failed undisturbed: {log.read_text().splitlines()[-1]}")
            duration[command[0]] = time.monotonic() - started
        expected = contents(calm)

        moments, killed_at, pipelines = random.Random(args.seed), {"work": 0, "a write": 0}, 0
        while bar.n < args.kills:
            folder = Path(work) / f"cut-{pipelines}"
            folder.mkdir()
            for command in COMMANDS:
                while True:
                    process = start(command, folder, log)
                    seconds, in_a_write = moments.uniform(0, duration[command[0]]), moments.random() < 0.5
                    what = kill_during(process, folder, seconds, in_a_write) if bar.n < args.kills else None
                    if what is None:
                        break
                    killed_at[what] += 1
                    bar.update()
                if process.wait():
                    raise BadInput(f"{command[0]}: failed after a kill: {log.read_text().splitlines()[-1]}")
            pipelines += 1
            found = contents(folder)
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            if wrong:
                raise BadInput(f"{len(wrong)} of {len(expected)} files differ after {bar.n} kills: {', '.join(wrong)}")

    machine = f"{machine_name(torch.device('cpu'))}, torch {torch.__version__}"
    result = {"command": " ".join(["python", *sys.argv]), "machine": machine, "kills": killed_at, "pipelines": pipelines,
              "files": len(expected), "different": 0}  # fmt: skip
    write_text(HERE / "benchmarks" / "results" / "interruptions.json", json.dumps(result, indent=2) + "\n")
    print(f"{sum(killed_at.values())} kills ({killed_at['a write']} in the middle of a write) over {pipelines} pipelines: "
          f"all {len(expected)} files of each identical to the undisturbed run's")  # fmt: skip


if __name__ == "__main__":
    run(main)
