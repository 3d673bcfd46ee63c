"""Does a small decoder, distilled from a model's own, keep the images?

    python experiments/small_decoders.py                      shapes, 3 seeds; resumes
    python experiments/small_decoders.py --captions emoji     after python toy/emoji.py

small_decoder.py trains once for each seed, on latents of the teacher's pairs. The one-step model
then makes the same images with its own decoder and with the small one, both in fp32, from held-out
captions and noises. psnr compares the two decoders' images, in dB.

Writes small_decoders.json (a row for each seed), .md (means with 95 % intervals over seeds and of
the paired differences, small minus full) and .png: full, small and their difference, of --seed.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from command import at_least, pick_device, positive, run, write_text
from editing import psnr
from evaluate import NUM_SHOWN
from evaluation.figures import FEWEST_SAMPLES, GRADES, paired_differences, with_intervals
from evaluation.plots import markdown_table, save_comparison
from evaluation.study import (
    ONE_STEP, SETTINGS, Study, add_pairs_option, footer, open_table, run_command, study_of,
    study_parser,
)
from formats.small_decoder import SmallDecoder, load_decoder
from sample import sample_images
from stable_diffusion import TOY

FIGURES = (*GRADES, "psnr")


def trained_decoder(study: Study, model) -> SmallDecoder:
    """The small decoder of this seed: from its file, or distilled from the model's own."""
    path, args = study.folder / "small.safetensors", study.args
    if not path.exists():
        pairs = study.pairs_of(study.load_teacher()).folder
        run_command("small_decoder.py", "--model", model.path, "--pairs", pairs, "--out", path,
                    "--iterations", args.iterations, "--batch-size", args.batch_size,
                    "--warmup-samples", 6400,
                    "--width", args.width, "--seed", study.seed, "--dtype", args.dtype,
                    "--device", args.device)
    return load_decoder(path, model)


def measure_seed(study: Study, path: Path) -> list[tuple[str, torch.Tensor]]:
    """Add the rows of both decoders, unless the table has them; the first images of both."""
    model, asked = checkpoint.load(path, study.device), study.evaluation_set
    models = {"full": model, "small": replace(model, vae=trained_decoder(study, model))}
    if not study.rows_with({"seed": study.seed}):
        images = [sample_images(each, asked.prompts, asked.seeds) for each in models.values()]
        close = {"full": None, "small": psnr(*reversed(images)).mean().item()}
        for name, made in zip(models, images):
            study.rows.append({"decoder": name, "seed": study.seed, "psnr": close[name]}
                              | asked.grade(made))
        study.write()
    prompts, seeds = asked.prompts[:NUM_SHOWN], asked.seeds[:NUM_SHOWN]
    full, small = (sample_images(each, prompts, seeds) for each in models.values())
    return [("full decoder", full), ("small decoder", small), ("difference", small - full)]


def summary_of(rows: list[dict]) -> list[dict]:
    """Means with 95 % intervals over seeds, of each decoder and of small minus full."""
    full, small = ([row for row in rows if row["decoder"] == name] for name in ("full", "small"))
    groups = {"full": full, "small": small,
              "small - full": paired_differences(small, full, FIGURES)}
    return [{"decoder": name} | with_intervals(group, FIGURES) | {"seeds": len(group)}
            for name, group in groups.items()]


def main():
    parser = study_parser("Full against small decoder, with the one-step model.", "mixed",
                          "runs/small-decoders")
    add_pairs_option(parser)
    add = parser.add_argument
    add("--iterations", type=positive, default=1000, help="of a small decoder")
    add("--num-samples", type=at_least(FEWEST_SAMPLES), default=1000,
        help="images for each row and seed")
    add("--width", type=positive, default=32, help="channels of the small decoder")
    args = parser.parse_args()
    data = "emoji" if args.captions == "emoji" else "shapes"
    path = Path(args.out) / data / "small_decoders.json"
    rows, write = open_table(path, args, (*SETTINGS, "width"))
    for seed in range(args.seed, args.seed + args.num_seeds):
        study = study_of(seed, args, pick_device(args.device), rows, write)
        study.folder = path.parent / f"seed-{seed}"
        sheet = measure_seed(study, TOY / ONE_STEP[data])
        if seed == args.seed:
            save_comparison(path.with_suffix(".png"), sheet,
                            study.evaluation_set.prompts[:NUM_SHOWN])
    table = markdown_table(summary_of(rows))
    table += footer("experiments/small_decoders.py", args, pick_device(args.device), rows)
    write_text(path.with_suffix(".md"), table)
    print(table + f"{path}, .md and .png")


if __name__ == "__main__":
    run(main)
