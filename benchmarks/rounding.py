"""The error of bf16 in the latents of a diffusion teacher's pairs, and the part due to guidance.

    python benchmarks/rounding.py        the tiny teacher, 25 steps at guidance 2.5 and 6; minutes

The network computes in bf16. Guidance multiplies the difference of two outputs. The solver's
(x - σ ε̂) / α then multiplies the result by up to 1 / α = 15, at the noisiest timestep. Guidance
combined in bf16 rounds the sum once more before that. Latents with guidance in bf16 and in fp32 are
compared with those of an fp32 network, on the same noises and captions. Writes
benchmarks/results/rounding-bf16-<device>.json.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from benchmarks.timing import report
from command import (
    TINY_TEACHER, BadInput, Parser, add_machine_options, pick_device, positive, run, solver_steps,
)
from diffusion import NoiseSchedule, dpm_solver
from rectified_flow import guided
from sample import noise_from_seeds, run_seed, seed_range
from toy import shapes

GUIDANCES = (2.5, 6.0)  # the tiny teacher's and the paper's


@torch.inference_mode()
def latents_of(
    model, prompts: list[str], seeds: list[int], steps: int, guidance: float, combine: torch.dtype
) -> torch.Tensor:
    """Latents (N, 4, h, w) in fp32, with guidance combined in the dtype `combine`."""
    null_context = model.encode_prompts([""])
    # `guided` combines in the dtype of x; the network casts x to its own dtype anyway.
    guided_network = guided(model.unet, null_context, guidance)
    predict_noise = lambda x, s, context: guided_network(x.to(combine), s, context)
    noise = noise_from_seeds(seeds, model.latent_shape()).to(model.device)
    context = model.encode_prompts(prompts)
    *_, latents = dpm_solver(predict_noise, noise, steps, NoiseSchedule(), context)
    return latents


def main():
    parser = Parser("Measure the rounding error of pairs that are made in bf16.")
    parser.add_argument("--num-pairs", type=positive, default=256)
    parser.add_argument("--steps", type=solver_steps, default=25)
    add_machine_options(parser, run_seed)
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.dtype not in ("auto", "bf16"):
        raise BadInput(f"--dtype {args.dtype}: this compares bf16 with fp32; drop it")
    exact, rough = (
        checkpoint.load(TINY_TEACHER, device, dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    seeds = list(seed_range("evaluation", args.seed, args.num_pairs))
    prompts = [str(caption) for caption in shapes.measuring_captions(args.num_pairs, seeds[0])]
    rows = []
    for guidance in GUIDANCES:
        reference = latents_of(exact, prompts, seeds, args.steps, guidance, torch.float32)
        for name, combine in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            error = latents_of(rough, prompts, seeds, args.steps, guidance, combine) - reference
            each = error.square().flatten(1).mean(1).sqrt()  # (N,)
            rows.append({
                "guidance": guidance, "combined in": name, "error, median": each.median().item(),
                "error, mean": each.mean().item(), "latents' deviation": reference.std().item(),
            })
    report("rounding", device, torch.bfloat16, rows, pairs=args.num_pairs, steps=args.steps,
           seed=args.seed)


if __name__ == "__main__":
    run(main)
