"""The README's first picture: the same captions and noises by teacher, 2-RF and one-step model.

    python toy/picture.py                                 shapes: runs/picture.png
    python toy/picture.py --flow runs/emoji/2rf.safetensors \\
        --one-step toy/tiny_emoji_instaflow.safetensors --teacher toy/tiny_emoji.safetensors \\
        --prompts "red apple" "cat" "rocket"

The first row takes the teacher's 25 steps, the others one. Noises are those of evaluation, which
nothing was trained on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from command import (
    TINY_TEACHER, BadInput, Parser, add_machine_options, check_output, pick_device, pick_dtype,
    run,
)
from evaluation.judge import load_judge
from evaluation.plots import in_steps, save_comparison
from sample import draw_pictures, run_seed, seeds_in
from stable_diffusion import FAMILIES

PICTURED = 8
MANY = 25


def main():
    parser = Parser("Draw the same captions by the teacher, and in one step by each model.")
    parser.add_argument("--teacher", default=TINY_TEACHER)
    parser.add_argument("--flow", default="runs/2rf.safetensors")
    parser.add_argument("--one-step", default="runs/instaflow.safetensors")
    parser.add_argument("--prompts", nargs="+", help=f"default: {PICTURED} captions to measure on")
    parser.add_argument("--out", default="runs/picture.png")
    add_machine_options(parser, run_seed)
    args = parser.parse_args()
    check_output(args.out)
    checkpoint.refuse_other_worlds([args.teacher, args.flow, args.one_step])
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    teacher, flow, one = (
        checkpoint.load(path, device, dtype) for path in (args.teacher, args.flow, args.one_step)
    )
    judge = FAMILIES[teacher.family].judge
    if not args.prompts and judge is None:
        raise BadInput(f"{args.teacher}: no captions are known for it; give some with --prompts")
    prompts = args.prompts or [
        str(caption) for caption in load_judge(judge).measuring_captions(PICTURED, args.seed)
    ]
    seeds = seeds_in("evaluation", args.seed, len(prompts))
    rows = [
        (f"{name}\n{in_steps(steps)}", draw_pictures(model, prompts, seeds, steps))
        for name, model, steps in (("Stable Diffusion,\ntiny", teacher, MANY),
                                   ("Stable Diffusion,\ntiny", teacher, 1),
                                   ("2-Rectified Flow", flow, 1), ("InstaFlow", one, 1))
    ]
    save_comparison(args.out, rows, prompts)
    print(f"{args.out}: {len(prompts)} captions, four rows")


if __name__ == "__main__":
    run(main)
