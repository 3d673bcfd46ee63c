"""Measure Layton: images rebuilt from their tokens, and images generated from captions.

    psnr                dB, mean over images
    lpips_NET           evaluation/perceptual.py; "random" is stage 2's loss, "efficientnet" is not
    frechet and others  of evaluate.py; the real images of a reconstruction are the originals

Reconstruction takes images that nothing was trained on: new shapes; emoji that are held out.
Generation takes held-out captions. A row is written as soon as it is measured.
"""

from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
from command import write_text
from editing import psnr
from evaluate import NUM_SHOWN
from evaluation.figures import with_interval
from evaluation.judge import judged_set
from evaluation.plots import grouped, markdown_table, save_comparison
from evaluation.study import dataset_of, footer, open_table
from layton.model import decode, sample_tokens
from sample import RUN_SEEDS, sample_images, seed_range
from stable_diffusion import TOY

INSTAFLOW = {"shapes": "tiny_instaflow.safetensors", "emoji": "tiny_emoji_instaflow.safetensors"}
UNSEEN = {"shapes": "mixed", "emoji": "held-out pictures"}  # captions of new images, in KINDS
LPIPS_NETS, AT_ONCE = ("random", "efficientnet"), 50  # images that LPIPS compares in one pass


@torch.inference_mode()
def measure(args, seed: int, distances: dict, teacher, tokenizer, one_step, gen) -> None:
    """Add what the tables lack of this seed. distances: LPIPS by network; then of train_layton."""
    (dataset, path), count, device = dataset_of(args.dataset), args.num_samples, teacher.device
    seeds, vae = seed_range("evaluation", seed, count), teacher.vae
    captions = judged_set(dataset, dataset.measuring_captions(count, seeds[0]), seeds, seed)
    unseen = judged_set(dataset, dataset.KINDS[UNSEEN[args.dataset]](count, seeds[0]), seeds, seed)
    models = [checkpoint.load(each, device) for each in (path, TOY / INSTAFLOW[args.dataset])]

    def rebuilt(network, steps, images, seeds):
        return decode(teacher, network, network.tokens(images.to(device)), seeds, steps)

    def generated(network, steps, prompts, seeds):
        context, null = teacher.encode_prompts(prompts), teacher.encode_prompts([""])
        others = [each + RUN_SEEDS // 2 for each in seeds]  # `seeds` are the decoder's noises
        return decode(teacher, network, sample_tokens(gen, context, null, others), seeds, steps)

    tables = {  # name: evaluation set, inputs, and rows as functions (inputs, seeds) -> images
        "reconstruction": (unseen, unseen.real_images, {
            "VAE alone": lambda images, _: vae.decode(vae.encode_latents(images.to(device))),
            "tokens, 25 diffusion steps": partial(rebuilt, tokenizer, 25),
            "tokens, one step after stage 1": partial(rebuilt, tokenizer, 1),
            "tokens, one step after stage 2": partial(rebuilt, one_step, 1)}),
        "generation": (captions, captions.prompts, {
            "teacher, 25 steps": partial(sample_images, models[0]),
            "InstaFlow, one step": partial(sample_images, models[1]),
            "LaytonGen, 25 diffusion steps": partial(generated, tokenizer, 25),
            "LaytonGen, one step": partial(generated, one_step, 1)})}
    for name, (judged, inputs, ways) in tables.items():
        stem = Path(args.out, name)
        rows, write = open_table(stem.with_suffix(".json"), args, ("iterations", "num_samples"))
        for label, way in tqdm(ways.items(), f"{name}, seed {seed}"):
            if any((row["row"], row["seed"]) == (label, seed) for row in rows):
                continue
            images = way(inputs, seeds).float().cpu()
            row = {"row": label, "seed": seed} | judged.grade(images)
            for net, distance in distances.items() if name == "reconstruction" else ():
                pairs = zip(images.split(AT_ONCE), inputs.split(AT_ONCE))
                row[f"lpips_{net}"] = torch.cat([distance(*pair) for pair in pairs]).mean().item()
                row["psnr"] = psnr(images, inputs).mean().item()
            rows.append(row)
            write()
        sheet = [(label.replace(", ", "\n"), way(inputs[:NUM_SHOWN], seeds[:NUM_SHOWN]).cpu())
                 for label, way in ways.items()]
        save_comparison(f"{stem}-{seed}.png", [("real", judged.real_images), *sheet],
                        judged.prompts[:NUM_SHOWN])
        table = []
        for (label,), group in grouped(rows, ("row",)).items():
            line = {"row": label, "seeds": len(group)}
            for key in list(group[0])[2:]:
                line[key], line[f"{key}_interval"] = with_interval([each[key] for each in group])
            table.append(line)
        text = markdown_table(table) + footer("layton/train.py", args, device, rows)
        write_text(stem.with_suffix(".md"), text)
