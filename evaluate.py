"""Evaluation: how well models draw what captions say, in how many steps, and how straight they go.

    python evaluate.py                      teacher, 2-RF and the one-step model, side by side
    python evaluate.py --model runs/2rf.safetensors --steps 1,4,25 --guidance 1,1.5,2.5 --repeats 5

All models draw the same captions from the same noises, which nothing was trained on: noises have a
world of seeds of their own (sample.seeds_in), and captions are in no list that pairs are made from.
(The teacher of shapes alone was trained on all captions.) Writes beside each other

    evaluate.json     a row for each model, guidance and number of steps (null: does not apply)
    evaluate.md       the same as a table
    evaluate.png      the pictures, and  evaluate-curves.png  the figures against steps

caption_accuracy   share of pictures that show all that their caption says, as the reader reads
frechet            Fréchet distance between the reader's features of drawn and generated pictures;
                   the row "drawn" has what two sets of drawn pictures have, about the least
precision, recall  share of generated pictures that lie among the drawn ones, and of drawn among the
                   generated: a model that forgets variety loses recall
straightness       S of rectified_flow.py along the model's own path at 25 steps, where any of
                   --steps is more than 1; relative: S / E‖Z1 - Z0‖²
fid, clip_score    against real images, with --coco or --images: evaluation/real_images.py

A figure ± an interval is a mean with its 95 % confidence interval, over --repeats sets of captions
and noises (for straightness over samples). In evaluate.json it is called <figure>_interval.

Captions, drawn pictures and the reader come from a judge (evaluation/judge.py). Models without one
(Stable Diffusion) get straightness, seconds and pictures, and with real images the paper's figures:

    python evaluate.py --model sd14.safetensors runs/instaflow.safetensors --coco coco --steps 25
"""

import argparse
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
from command import (
    TINY_TEACHER, BadInput, Parser, add_machine_options, check_output, dtype_name,
    not_below_zero, pick_device, pick_dtype, positive, run, solver_steps, write_json, write_text,
)
from evaluation.figures import GRADES, STRAIGHT, straightness_figures
from evaluation.judge import Questions, graded, questions_of, with_intervals
from evaluation.plots import in_steps, label_of, markdown_table, save_comparison, save_curves
from evaluation.real_images import Gallery, caption_score, feature_distance, read_coco, read_images
from sample import (
    NUMBERS_PER_BATCH, draw_pictures, drawn_at_once, read_prompts, refuse_guidance, run_seed,
    seeds_in,
)
from stable_diffusion import FAMILIES, KINDS

STRAIGHTNESS_SAMPLES = 256  # at most; 16 at 512 px, as whole paths are held at once
PICTURED = 8  # captions in the comparison picture
ON_IMAGES = ("fid", "clip_score")
CLIP = "openai/clip-vit-large-patch14"


# --------------------------------------------------------------------------------------------------
# Asked by a judge


def evaluate(
    model, questions: list[Questions], steps: list[int], guidance: float,
) -> Iterator[tuple[dict, Tensor]]:
    """A row and the first questions' pictures for each number of steps that the model takes."""
    straight = straight_path(model, questions[0].prompts, questions[0].seeds, steps, guidance)
    count = sum(len(asked.prompts) for asked in questions)
    for number in steps_of(model, steps):
        started, name = time.perf_counter(), f"{Path(model.path).stem}, {in_steps(number)}"
        with tqdm(total=count, desc=name, unit="picture", leave=False, dynamic_ncols=True) as bar:
            pictures = [
                draw_pictures(model, asked.prompts, asked.seeds, number, guidance, bar=bar)
                for asked in questions
            ]
        seconds = (time.perf_counter() - started) / count
        figures = graded(questions, pictures) | straight | {"seconds_per_image": seconds}
        shown = pictures[0][:PICTURED].clone()  # all of them would be held until the end
        yield row_of(model, number, guidance, figures, questions), shown


def steps_of(model, steps: list[int]) -> list[int]:
    """Those of the numbers of steps that the model takes; if none, its own."""
    return [number for number in steps if model.takes(number)] or [model.steps]


def straight_path(
    model, prompts: list[str], seeds: range, steps: list[int], guidance: float,
) -> dict:
    """The figures of straightness, of models that follow a velocity in more than one step."""
    if model.kind == "one-step" or model.method or max(steps) == 1:
        return {}
    fit = NUMBERS_PER_BATCH // torch.Size(model.latent_shape()).numel()
    count = min(STRAIGHTNESS_SAMPLES, max(1, fit))
    return straightness_figures(model, prompts[:count], seeds[:count], guidance)


def row_of(
    model, steps: int | None, guidance: float | None, figures: dict, asked: list[Questions],
) -> dict:
    """A row of evaluate.json: every figure by name, null where it does not apply.

    model: a StableDiffusion, or "drawn".
    """
    drawn = model == "drawn"
    row = {"model": model if drawn else Path(model.path).name,
           "kind": None if drawn else model.kind}
    row |= {"steps": steps, "guidance": guidance}
    for name in (*GRADES, *ON_IMAGES, *STRAIGHT):
        row |= {name: figures.get(name), f"{name}_interval": figures.get(f"{name}_interval")}
    row |= {name: figures.get(name) for name in ("straightness_profile", "seconds_per_image")}
    return row | {"samples": len(asked[0].prompts), "repeats": len(asked), "seed": asked[0].seed}


def ask_judge(args: argparse.Namespace, device: torch.device) -> tuple[list, list, list]:
    """(rows, labelled pictures, their captions). The first model decides what all are asked."""
    for flag, given in (("--prompts", args.prompts), ("--image-size", args.image_size),
                        ("--feature-extractor", args.feature_extractor), ("--clip", args.clip)):
        if given:
            raise BadInput(f"{flag}: is for --coco or --images; give one of them too")
    checkpoint.refuse_other_worlds(args.model)
    rows, pictures, questions = [], [], []
    for model, guidance in models(args, device):
        if not questions:
            judge = args.judge or FAMILIES[model.family].judge
            for repeat in range(args.repeats):
                questions.append(questions_of(judge, args.num_samples, args.seed, repeat))
            if questions[0].real:
                grades = with_intervals([asked.real for asked in questions])
                rows.append(row_of("drawn", None, None, grades, questions))
            if questions[0].drawn is not None:
                pictures.append(("drawn", questions[0].drawn))
        for row, drawn in evaluate(model, questions, args.steps, guidance):
            rows.append(row)
            pictures.append((label_of(row, guidance=args.guidance is not None), drawn))
    return rows, pictures, questions[0].prompts


# --------------------------------------------------------------------------------------------------
# Compared with real images


def compare_with_images(args: argparse.Namespace, device: torch.device) -> tuple[list, list, list]:
    """(rows, labelled pictures, their captions), for the captions of the real images."""
    rows, pictures, gallery = [], [], gallery_of(args, device)
    prompts, seeds = gallery.prompts, seeds_in("evaluation", args.seed, len(gallery.prompts))
    asked = [Questions(prompts, seeds, lambda pictures: {}, args.seed)]
    for model, guidance in models(args, device):
        straight = straight_path(model, prompts, seeds, args.steps, guidance)
        weights_hash = checkpoint.fingerprint(model.path)
        for number in steps_of(model, args.steps):
            about = {
                "model": Path(model.path).name, "hash": weights_hash,
                "kind": model.kind, "steps": number, "guidance": guidance, "first_seed": seeds[0],
                "dtype": dtype_name(model.dtype), "prompts": len(prompts),
                "prompts_hash": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
            }

            def draw(texts: list[str], numbers: list[int], bar: tqdm) -> Tensor:
                return draw_pictures(model, texts, numbers, number, guidance, bar=bar)  # noqa: B023

            batch = drawn_at_once(model.latent_shape())
            name = f"{Path(model.path).stem}-{number}-{guidance:g}"
            folder = gallery.draw(name, about, draw, seeds[0], batch)
            row = row_of(model, number, guidance, gallery.score(folder) | straight, asked)
            rows.append(row)
            shown = gallery.first(folder, PICTURED)
            pictures.append((label_of(row, guidance=args.guidance is not None), shown))
    return rows, pictures, prompts


def gallery_of(args: argparse.Namespace, device: torch.device) -> Gallery:
    """The real images that a command's arguments name."""
    if args.coco and args.images:
        raise BadInput("--coco and --images: give one of them")
    if args.coco and args.prompts:
        raise BadInput("--prompts: COCO has captions of its own; give --images, or leave it away")
    if args.judge:
        raise BadInput("--judge: grades tiny models; leave it away with --coco and --images")
    if args.images and not args.prompts:
        raise BadInput("--images: needs --prompts too, a file with captions to draw")
    if args.repeats > 1:
        raise BadInput("--repeats: FID is measured once; leave it away with --coco and --images")
    if args.coco:
        prompts, images, side = read_coco(args.coco, args.num_samples)
    else:
        prompts = read_prompts(args.prompts, args.prompt_column)[: args.num_samples]
        images, side = read_images(args.images), 512
    fid = feature_distance(args.feature_extractor, device)
    clip = caption_score(args.clip or CLIP, device)
    folder = Path(args.out.removesuffix(".json") + "-pictures")
    return Gallery(prompts, images, args.image_size or side, folder, fid, clip)


# --------------------------------------------------------------------------------------------------
# The command


def models(args: argparse.Namespace, device: torch.device) -> Iterator[tuple]:
    """(model, guidance) for all of --model and --guidance."""
    for path, kind in zip(args.model, args.kind or ["auto"] * len(args.model)):
        kind = None if kind == "auto" else kind
        model = checkpoint.load(path, device, pick_dtype(args.dtype, device), kind, args.tokenizer)
        if args.compile:
            model.compile()
        if args.guidance:
            refuse_guidance(model)
        for guidance in args.guidance or [model.guidance]:
            yield model, guidance


def steps_list(text: str) -> list[int]:
    """argparse type: numbers of solver steps, with commas."""
    return [solver_steps(part) for part in text.split(",")]


def guidance_list(text: str) -> list[float]:
    """argparse type: numbers of at least 0, with commas."""
    return [not_below_zero(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = Parser("Measure models and set them side by side.")
    add = parser.add_argument
    ours = [TINY_TEACHER, "runs/2rf.safetensors", "runs/instaflow.safetensors"]
    add("--model", nargs="+", default=ours, help="one or more checkpoints")
    add("--steps", type=steps_list, default="25,8,4,2,1", help="a one-step model takes 1")
    add("--guidance", type=guidance_list, help="one or more, for all; default: each kind's own")
    add("--num-samples", type=positive,
        help="pictures for each row; default: 1000 with a judge, else 8")
    add("--repeats", type=positive, default=1, help="times that many, for confidence intervals")
    add("--judge",
        help="Python file that makes captions and grades pictures; default: the tiny model's own, "
             "toy/shapes.py or toy/emoji.py")
    add("--tokenizer", help="folder with vocab.json and merges.txt, for models without their own")
    add("--kind", choices=["auto", *KINDS], nargs="+",
        help="what the U-Net of each --model predicts, in their order; auto: as its file says")
    add("--compile", action="store_true",
        help="torch.compile: minutes at each new size, faster after them")
    add("--out", default="runs/evaluate.json", help="the rows; table and pictures land beside it")
    add = parser.add_argument_group("real images, for FID and CLIP score").add_argument
    add("--coco",
        help="COCO's folder, with annotations/ and val2017/ (5,000 captions) or val2014/ (30,000)")
    add("--images", help="another folder of images, with --prompts")
    add("--prompts",
        help="text file with a prompt a line, or .tsv/.csv, to draw with --images; others than "
             "those of the pairs")
    add("--prompt-column", default="Prompt", help="column of a .tsv or .csv that holds the prompts")
    add("--image-size", type=positive,
        help="pixels at which images are compared; default: COCO's, else 512")
    add("--feature-extractor",
        help="TorchScript file instead of Inception: uint8 images to features")
    add("--clip", help=f"CLIP of the score, a folder or a hub id; default: {CLIP}")
    add_machine_options(parser, run_seed)
    return parser.parse_args()


def main():
    args = arguments()
    missing = [path for path in args.model if not Path(path).exists()]
    if missing:
        raise BadInput(f"{missing[0]}: no such checkpoint; make it with reflow.py and distill.py, "
                       "or name others with --model")
    if args.kind and len(args.kind) != len(args.model):
        raise BadInput(f"--kind: {len(args.kind)} given for {len(args.model)} models; give one for "
                       "each, in order (auto: as its file says)")
    check_output(args.out)
    device = pick_device(args.device)
    ask = compare_with_images if args.coco or args.images else ask_judge
    rows, pictures, captions = ask(args, device)

    stem = args.out.removesuffix(".json")
    write_json(f"{stem}.json", rows)
    write_text(f"{stem}.md", markdown_table(rows))
    shown = [(label, drawn[:PICTURED]) for label, drawn in pictures]
    save_comparison(f"{stem}.png", shown, captions[:PICTURED])
    save_curves(f"{stem}-curves.png", rows)
    print(markdown_table(rows), end="")
    print(f"comparison picture: {stem}.png")


if __name__ == "__main__":
    run(main)
