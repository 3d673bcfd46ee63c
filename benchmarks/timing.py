"""Fair timing: the compared calls alternate within one run, so all see the same machine."""

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
from stable_diffusion import StableDiffusion
from text_encoder import TextEncoder, TextEncoderConfig
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

TOKENS = 77  # of a prompt
PROCESS = Path("/proc/self")  # Linux's files about this process


def timing_parser(description: str, rounds: int) -> Parser:
    """A parser with the flags of every timing at Stable Diffusion's size."""
    parser = Parser(description)
    parser.add_argument("--rounds", type=positive, default=rounds)
    parser.add_argument("--batch-size", type=positive, default=1)
    parser.add_argument("--latent-size", type=positive, default=64, help="64 is 512 pixels")
    add_machine_options(parser, run_seed)
    return parser


def full_size_model(seed: int = 0, kind: str = "diffusion") -> StableDiffusion:
    """Stable Diffusion 1.x with random weights, in fp32."""
    torch.manual_seed(seed)
    return StableDiffusion(UNet(UNetConfig()), AutoencoderKL(VAEConfig()),
                           TextEncoder(TextEncoderConfig()), None, kind)


def take_turns(
    calls: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> tuple[dict, dict]:
    """(seconds of each call in each round, its output in a warm-up round before)."""
    seconds, outputs = {name: [] for name in calls}, {}
    with tqdm(total=(rounds + 1) * len(calls), unit="call", leave=False) as bar:
        for number in range(rounds + 1):
            for name, call in calls.items():
                bar.set_description(name)
                started = time.perf_counter()
                output = call()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if number:
                    seconds[name].append(time.perf_counter() - started)
                else:
                    outputs[name] = output
                bar.update()
    return seconds, outputs


def ratio(ours: list[float], theirs: list[float]) -> dict:
    """Our seconds over theirs in the same round: median and quartiles."""
    ratios = [a / b for a, b in zip(ours, theirs)]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    if len(ratios) > 2:  # two have no quartiles within their range
        low, _, high = statistics.quantiles(ratios, n=4)
    return {"ratio": middle, "quartiles": f"{low:.2f} to {high:.2f}"}


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value: do both sides compute the same?"""
    theirs = theirs.float()
    return ((ours.float() - theirs).abs().max() / theirs.abs().max()).item()


def side_by_side(
    name: str, ours: Callable[[], Tensor], peer: str, theirs: Callable[[], Tensor], rounds: int,
    device: torch.device,
) -> dict:
    """Ours against the peer's: seconds of both, their ratio, and how far the outputs differ."""
    calls = {f"{name}, ours": ours, f"{name}, {peer}": theirs}
    seconds, outputs = take_turns(calls, rounds, device)
    mine, others = seconds.values()
    row = {"ours, s": statistics.median(mine), f"{peer}, s": statistics.median(others)}
    return row | ratio(mine, others) | {"differ by": relative_difference(*outputs.values())}


def reset_peak_memory(device: torch.device) -> None:
    """Restart the peak of `peak_memory` from what is held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif PROCESS.exists():
        (PROCESS / "clear_refs").write_text("5")  # see proc(5)


def peak_memory(device: torch.device) -> float | None:
    """Peak GB: of tensors on a GPU, else of this process; None outside Linux."""
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
