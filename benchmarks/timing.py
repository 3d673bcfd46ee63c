"""Fair timing for the benchmarks: the sides take turns in one run, so all see the same machine."""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from command import HERE, Parser, add_machine_options, dtype_name, positive, write_json
from evaluation.figures import machine_name
from evaluation.plots import markdown_table
from sample import run_seed

TOKENS = 77  # of a prompt
PROCESS = Path("/proc/self")  # what Linux tells of this process


def timing_parser(description: str, rounds: int) -> Parser:
    """The options that the timings at Stable Diffusion's size share."""
    parser = Parser(description)
    parser.add_argument("--rounds", type=positive, default=rounds)
    parser.add_argument("--batch-size", type=positive, default=1)
    parser.add_argument("--latent-size", type=positive, default=64, help="64 is 512 pixels")
    add_machine_options(parser, run_seed)
    return parser


def take_turns(
    ways: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> tuple[dict, dict]:
    """Seconds of every call in every round, after one round to warm up.

    Also what each call answered in that one.
    """
    seconds, answers = {name: [] for name in ways}, {}
    with tqdm(total=(rounds + 1) * len(ways), unit="call", leave=False) as bar:
        for number in range(rounds + 1):
            for name, call in ways.items():
                bar.set_description(name)
                started = time.perf_counter()
                answer = call()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if number:
                    seconds[name].append(time.perf_counter() - started)
                else:
                    answers[name] = answer
                bar.update()
    return seconds, answers


def ratio(ours: list[float], theirs: list[float]) -> dict:
    """Ours over theirs, round by round: the median and the quartiles."""
    ratios = [a / b for a, b in zip(ours, theirs)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ratio": middle, "quartiles": f"{low:.2f} to {high:.2f}"}


def differ_by(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two answers, as a share of the largest value.

    Do both sides do the same work?
    """
    theirs = theirs.float()
    return ((ours.float() - theirs).abs().max() / theirs.abs().max()).item()


def side_by_side(
    what: str, mine: Callable[[], Tensor], peer: str, theirs: Callable[[], Tensor], rounds: int,
    device: torch.device,
) -> dict:
    """Ours against the peer's: seconds of both, their ratio, and how far the answers are apart."""
    seconds, answers = take_turns(
        {f"{what}, ours": mine, f"{what}, {peer}": theirs}, rounds, device
    )
    ours, others = seconds.values()
    row = {"ours, s": statistics.median(ours), f"{peer}, s": statistics.median(others)}
    return row | ratio(ours, others) | {"differ by": differ_by(*answers.values())}


def forget_peak(device: torch.device) -> None:
    """Begin anew what `peak_memory` counts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif PROCESS.exists():
        (PROCESS / "clear_refs").write_text("5")  # proc(5): the peak becomes what is held now


def peak_memory(device: torch.device) -> float | None:
    """GB that were held at once: of a GPU by tensors, on a CPU by this process.

    The latter Linux alone tells.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if not PROCESS.exists():
        return None
    line = next(line for line in (PROCESS / "status").read_text().splitlines()
                if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def report(name: str, device: torch.device, dtype: torch.dtype, rows: list[dict], **about) -> None:
    """Print the rows as a table; write them to benchmarks/results/<name>-<dtype>-<device>.json."""
    short = dtype_name(dtype)
    about = {"command": " ".join(["python", *sys.argv]), "device": machine_name(device),
             "torch": torch.__version__, "dtype": short} | about
    path = HERE / "benchmarks" / "results" / f"{name}-{short}-{device.type}.json"
    write_json(path, about | {"rows": rows})
    print(", ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    print(markdown_table(rows), end="")
