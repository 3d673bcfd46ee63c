"""The README's first image: the same captions and noise by teacher, 2-RF and one-step model.

    python toy/picture.py            shapes, as runs/picture.png; for emoji, see toy/README.md

The first row takes the teacher's 25 steps, the others one. The noise comes from the evaluation
seeds, which no training uses.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from command import (
    TINY_TEACHER, BadInput, Parser, add_machine_options, check_output, pick_device, pick_dtype, run,
)
from evaluation.judge import check_same_dataset, load_judge
from evaluation.plots import save_comparison, steps_label
from formats.images import check_image_ending
from sample import run_seed, sample_images, seed_range
from stable_diffusion import FAMILIES

CAPTIONS = 8


def main():
    parser = Parser("Images of the same captions by the teacher, and in one step by each model.")
    parser.add_argument("--teacher", default=TINY_TEACHER)
    parser.add_argument("--flow", default="runs/2rf.safetensors")
    parser.add_argument("--one-step", default="runs/instaflow.safetensors")
    parser.add_argument("--prompts", nargs="+", help=f"default: {CAPTIONS} held-out captions")
    parser.add_argument("--out", default="runs/picture.png")
    add_machine_options(parser, run_seed)
    args = parser.parse_args()
    check_image_ending(args.out.rstrip("/"))
    check_output(args.out)
    paths = [args.teacher, args.flow, args.one_step]
    check_same_dataset(paths)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    teacher, flow, one_step = (checkpoint.load(path, device, dtype) for path in paths)
    prompts, judge = args.prompts, FAMILIES[teacher.family].judge
    if not prompts and judge is None:
        raise BadInput(f"{args.teacher}: no captions are known for it; give some with --prompts")
    if not prompts:
        prompts = [str(c) for c in load_judge(judge).measuring_captions(CAPTIONS, args.seed)]
    seeds = seed_range("evaluation", args.seed, len(prompts))
    rows = [
        (f"{name}\n{steps_label(steps)}", sample_images(model, prompts, seeds, steps))
        for name, model, steps in (("Stable Diffusion,\ntiny", teacher, 25),
                                   ("Stable Diffusion,\ntiny", teacher, 1),
                                   ("2-Rectified Flow", flow, 1), ("InstaFlow", one_step, 1))
    ]
    save_comparison(args.out, rows, prompts)
    print(f"{args.out}: {len(prompts)} captions, four rows")


if __name__ == "__main__":
    run(main)
