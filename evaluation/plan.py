"""Before a run: refuse what cannot work, then print what the run will do and need."""

import argparse
from pathlib import Path

import torch

from command import (
    BadInput, all_gather, check_not_overwriting, check_output, lock_folder, note, world_size,
)
from pairs import PAIRS_PER_SHARD, check_same_pairs, shard_path
from stable_diffusion import StableDiffusion
from training import TrainingOptions, check_run

# GB a sample at 512 px in bf16, (without, with) gradient checkpointing: benchmarks/README.md.
ACTIVATIONS = {"unet": (0.97, 0.36), "stacked": (1.93, 0.38), "unet, LPIPS": (7.5, 4.1),
               "stacked, LPIPS": (8.4, 4.2),
               "hipa": (7.5, 4.1), "scott": (1.94, 0.72)}  # decoder and LPIPS; a second U-Net


def check_request(args: argparse.Namespace, spec: dict, runs: list[tuple]) -> bool:
    """Refuse, before any work, what cannot work; is everything finished already?

    runs: (folder, options, settings) of each stage.
    """
    if not args.out.endswith(".safetensors"):
        raise BadInput(f"--out: must end in .safetensors, got {args.out!r}")
    check_same_pairs(args.pairs, spec)
    check_not_overwriting(args.out, {"--teacher": args.teacher, "--init": args.init})
    check_output(args.out)
    ended = [check_run(*run) for run in runs]
    lock_folder(args.out + ".state")
    for _, options, _ in runs:
        note_slow_ema(options)
    out, state = Path(args.out), runs[-1][0] / "state.safetensors"
    # OUT is written at every save, so it may be older than the last state.
    newer = out.exists() and state.exists() and out.stat().st_mtime_ns >= state.stat().st_mtime_ns
    return all_gather([all(ended) and newer])[0]


def note_slow_ema(options: TrainingOptions) -> None:
    """A note if the EMA of a short run still holds much of its initial weights."""
    left = 0.5 ** (options.iterations * options.batch_size / options.ema_half_life)
    # The paper's shortest stage, 18,000 iterations, leaves 0.17.
    if left > 0.2 and options.iterations and not options.ema_ramp:
        note(f"after {options.iterations:,} iterations {left:.0%} of the averaged weights are "
             f"still the initial ones, by --ema-half-life {options.ema_half_life:,}; --ema-ramp "
             "0.05 forgets them sooner")


def print_plan(
    args: argparse.Namespace, model: StableDiffusion, prompts: list[str], spec: dict,
    stages: list[TrainingOptions], paired: bool = True,
) -> None:
    """What the run will do: prompts, pairs, samples and memory. paired: does it train on pairs?"""
    count, size = spec["count"], torch.Size(spec["latent_shape"]).numel()
    print(f"plan: {len(prompts):,} prompts of {spec['prompts']}"
          + f", each used about {count / len(prompts):.3g} times" * paired)
    if paired:
        shards = [shard_path(args.pairs, i).exists() for i in range(-(-count // PAIRS_PER_SHARD))]
        print(f"plan: {count:,} pairs of {spec['steps']} steps at guidance scale "
              f"{spec['guidance']:g}, {2 * count * size / 1e9:.3g} GB in {args.pairs}, "
              f"{sum(shards)} of {len(shards)} shards are there")
    student = getattr(args, "student", "unet")  # of distill.py
    parameters = sum(p.numel() for p in model.unet.parameters()) * (1 + (student == "stacked"))
    for stage in stages:
        samples = stage.iterations * stage.batch_size
        micro = -(-stage.batch_size // max(stage.accumulate, world_size()))
        memory = (16 if args.ema_device else 20) * parameters / 1e9  # see training.py
        if not model.is_tiny:
            network = student + ", LPIPS" * ("LPIPS" in stage.name)
            each = ACTIVATIONS.get(stage.name, ACTIVATIONS[network])
            memory += micro * each[args.gradient_checkpointing]
        print(f"plan: {stage.name}, {stage.iterations:,} iterations of {stage.batch_size}, "
              f"{samples:,} samples, {samples / (count if paired else len(prompts)):.3g} epochs; "
              f"{parameters:,} parameters, micro-batches of {micro}, about {memory:.3g} GB"
              + f" on each of {world_size()} devices" * (world_size() > 1))
