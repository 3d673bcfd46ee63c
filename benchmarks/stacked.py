"""What the stacked U-Net costs: its time against one U-Net and against two whole ones in series, side by side in one run.

    python benchmarks/stacked.py                  Stable Diffusion's size, random weights; needs 12 GB in fp32, minutes
    python benchmarks/stacked.py --device cuda

The three take turns, so that all see the same machine; figures are medians, ratios are medians over the rounds with their
quartiles. Writes benchmarks/results/stacked-<device>.json.
"""

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command import Parser, add_machine_options, pick_device, pick_dtype, positive, run, write_text
from unet import StackedUNet, UNet, UNetConfig


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


@torch.inference_mode()
def main():
    parser = Parser("Time one U-Net, the stacked U-Net and two whole U-Nets.")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--batch-size", type=positive, default=1)
    parser.add_argument("--latent-size", type=positive, default=64, help="64 is 512 pixels")
    add_machine_options(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)
    config = UNetConfig()
    make = lambda network: network(config).to(device, dtype, memory_format=torch.channels_last).eval()
    one, stacked = make(UNet), make(StackedUNet)
    x = torch.randn(args.batch_size, 4, args.latent_size, args.latent_size, device=device)
    timestep, context = (
        torch.full((args.batch_size,), 1000.0, device=device),
        torch.randn(args.batch_size, 77, 768, device=device),
    )
    ways = {
        "one U-Net": lambda: one(x, timestep, context),
        "stacked": lambda: stacked(x, timestep, context),
        "two whole U-Nets": lambda: one(one(x, timestep, context), timestep, context),
    }
    seconds = {name: [] for name in ways}
    for round_number in range(args.rounds + 1):
        for name, call in ways.items():
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)

    count = lambda network: sum(weight.numel() for weight in network.parameters())
    parameters = {"one U-Net": count(one), "stacked": count(stacked), "two whole U-Nets": 2 * count(one)}
    result = {"command": " ".join(["python", *sys.argv]), "device": device_name(device), "torch": torch.__version__,
              "dtype": str(dtype).removeprefix("torch."), "batch_size": args.batch_size, "rows": []}  # fmt: skip
    print(f"{result['device']}, {result['dtype']}, torch {torch.__version__}, batch {args.batch_size}")
    print("| network | parameters | seconds | times one U-Net (quartiles) |\n| --- | --- | --- | --- |")
    for name, measured in seconds.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(measured, seconds["one U-Net"])], n=4)
        row = {"network": name, "parameters": parameters[name], "seconds": statistics.median(measured), "ratio": middle,
               "ratio_quartiles": [low, high]}  # fmt: skip
        result["rows"].append(row)
        print(f"| {name} | {row['parameters']:,} | {row['seconds']:.3f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    path = Path(__file__).parent / "results" / f"stacked-{device.type}.json"
    write_text(path, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
