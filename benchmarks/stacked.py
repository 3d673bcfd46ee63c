"""Time of the stacked U-Net against one U-Net and against two complete U-Nets in series.

    python benchmarks/stacked.py            SD's size, random weights; 12 GB in fp32, minutes
    python benchmarks/stacked.py --device cuda

The three alternate in one run. Seconds are medians; ratios to one U-Net are medians over the rounds
with quartiles. Writes benchmarks/results/stacked-<dtype>-<device>.json.
"""

import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import TOKENS, ratio, report, take_turns, timing_parser
from command import pick_device, pick_dtype, run
from stacked_unet import StackedUNet
from unet import UNet, UNetConfig


@torch.inference_mode()
def main():
    parser = timing_parser("Time one U-Net, the stacked U-Net and two complete U-Nets.", rounds=7)
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)
    config = UNetConfig()
    make = lambda network: network.to(device, dtype, memory_format=torch.channels_last).eval()
    one, stacked = make(UNet(config)), make(StackedUNet(replace(config, stacked=True)))
    x = torch.randn(args.batch_size, 4, args.latent_size, args.latent_size, device=device)
    timestep = torch.full((args.batch_size,), 1000.0, device=device)
    context = torch.randn(args.batch_size, TOKENS, 768, device=device)
    calls = {
        "one U-Net": lambda: one(x, timestep, context),
        "stacked": lambda: stacked(x, timestep, context),
        "two whole U-Nets": lambda: one(one(x, timestep, context), timestep, context),
    }
    seconds, _ = take_turns(calls, args.rounds, device)
    count = lambda network: sum(weight.numel() for weight in network.parameters())
    parameters = {"one U-Net": count(one), "stacked": count(stacked),
                  "two whole U-Nets": 2 * count(one)}
    rows = []
    for name, measured in seconds.items():
        row = {"network": name, "parameters": f"{parameters[name]:,}",
               "seconds": statistics.median(measured)}
        rows.append(row | ratio(measured, seconds["one U-Net"]))
    report("stacked", device, dtype, rows, batch=args.batch_size)


if __name__ == "__main__":
    run(main)
