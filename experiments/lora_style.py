"""Does a LoRA that was trained on the teacher restyle the one-step model?

    python toy/emoji.py                          downloads the images (npm, 160 MB)
    python experiments/lora_style.py             7 minutes on 2 CPU cores, with a 2-RF of emoji

A LoRA (rank 16, on the U-Net's linear maps and inner convolutions) learns one style of emoji on the
teacher, from images of that style and captions without the style's name. Its file is then merged
into the teacher, 2-RF and the one-step model. Measured on held-out captions that name no style, and
on held-out noises:

    in_style    fraction of images whose nearest real image is of this style
    right       fraction whose nearest real image is of the right thing

The means have 95 % intervals over three sets of captions and noises, of one training. Writes
lora_style.json, .md and .png, and the LoRA as lora_style.safetensors.
"""

import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from command import (
    Parser, add_machine_options, check_output, non_negative, pick_device, pick_dtype, positive,
    run, write_atomically, write_json, write_text,
)
from diffusion import NoiseSchedule, noise_loss
from evaluation.figures import with_intervals
from evaluation.plots import markdown_table, save_comparison, steps_label
from evaluation.study import check_one_process
from fewstep.lora import LoRA, add_lora
from formats.lora import merge_lora
from pairs import shuffled
from reflow import CAPTION_DROPOUT
from sample import run_seed, sample_images, seed_range
from stable_diffusion import TOY
from toy import emoji
from training import TrainingOptions, ema_copy, train

SHOWN, REPEATS = 8, 3


def style_captions(rows: list[int], rng: random.Random) -> list[str]:
    """A training caption for each image that does not name its style; a tenth is empty."""
    captions = []
    for concept in (emoji.rows()[row][0] for row in rows):
        known = [text for text in (concept.name, concept.name, *concept.tags[:1])
                 if not emoji.is_for_measuring(text)]
        captions.append(rng.choice(known) if known and rng.random() >= CAPTION_DROPOUT else "")
    return captions


def train_lora(teacher, style: str, args) -> dict[str, Tensor]:
    """The LoRA's tensors in diffusers' layout, trained by the noise loss."""
    rows = [row for row in emoji.training_rows() if emoji.rows()[row][1] == style]
    with torch.no_grad():
        latents = teacher.vae.encode_latents(emoji.pictures()[rows]).float()
    schedule, unet = NoiseSchedule(), teacher.unet
    torch.manual_seed(args.seed)
    add_lora(unet, args.rank, everywhere=True)

    def batch(samples, share, generator):
        index = shuffled(samples, len(latents), args.seed)
        s = torch.randint(schedule.timesteps, (len(samples),), generator=generator).float()
        noise = torch.randn(latents[index].shape, generator=generator)
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        return latents[index], noise, s, style_captions([rows[k] for k in index.tolist()], rng)

    def loss(unet, x1, noise, s, prompts):
        context = teacher.encode_prompts(prompts)
        return noise_loss(unet, schedule, x1, noise, s, context), schedule.time(s)

    options = TrainingOptions(args.iterations, 64, args.learning_rate, warmup_samples=1_600,
                              cooldown=0.6, ema_half_life=2_000, ema_ramp=0.05, seed=args.seed,
                              name=f"LoRA, {style}")
    settings = {"teacher_hash": checkpoint.fingerprint(teacher.path), "style": style,
                "rank": args.rank}
    train(unet, ema_copy(unet), batch, loss, options, Path(args.out + ".state"), settings)
    tensors = {}
    for name, module in unet.named_modules():
        if isinstance(module, LoRA):
            tensors[f"unet.{name}.lora_A.weight"] = module.down.weight.detach().contiguous()
            tensors[f"unet.{name}.lora_B.weight"] = module.up.weight.detach().contiguous()
    return tensors


def measure(model, steps: int, style: str, judge: nn.Module, args) -> tuple[dict, Tensor]:
    """The two fractions with intervals, and the first images."""
    grades, shown = [], None
    for repeat in range(REPEATS):
        seeds = seed_range("evaluation", args.seed, args.num_samples, repeat * args.num_samples)
        # Most candidates name no style; 100 more are enough for small samples too.
        candidates = emoji.measuring_captions(4 * args.num_samples + 100, seeds[0])
        unstyled = [text for text in candidates if text.rpartition(" ")[2] not in emoji.STYLES]
        captions = unstyled[: args.num_samples]
        images = sample_images(model, captions, seeds, steps)
        features = judge.features(images)
        nearest = torch.cdist(features, judge.real).argmin(1).tolist()
        in_style = [emoji.rows()[row][1] == style for row in nearest]
        right = emoji.right(judge, features, captions)
        grades.append({"in_style": sum(in_style) / len(captions),
                       "right": sum(right) / len(captions)})
        shown = (images[:SHOWN], captions[:SHOWN]) if shown is None else shown
    return with_intervals(grades, ("in_style", "right")), shown


def main():
    parser = Parser("Merge a LoRA of the teacher into the flow and the one-step model.")
    add = parser.add_argument
    add("--teacher", default=str(TOY / "tiny_emoji.safetensors"), help="of emoji")
    add("--flow", default="runs/emoji/2rf.safetensors", help="2-RF")
    add("--one-step", default=str(TOY / "tiny_emoji_instaflow.safetensors"))
    add("--style", choices=emoji.STYLES, default="fluent")
    add("--rank", type=positive, default=16)
    add("--iterations", type=positive, default=600)
    add("--learning-rate", type=non_negative, default=1e-3)
    add("--scale", type=non_negative, default=1.0, help="of the LoRA, when it is merged")
    add("--num-samples", type=positive, default=300)
    add("--out", default="runs/lora_style.json")
    add_machine_options(parser, run_seed)
    args = parser.parse_args()
    check_one_process()
    check_output(args.out)
    stem, device = args.out.removesuffix(".json"), pick_device(args.device)
    dtype, judge = pick_dtype(args.dtype, device), emoji.load_reader()
    file = f"{stem}.safetensors"
    tensors = train_lora(checkpoint.load(args.teacher, device), args.style, args)
    write_atomically(file, partial(save_file, tensors))

    rows, sheet = [], []
    for name, path, steps in (("teacher", args.teacher, 8), ("2-RF", args.flow, 8),
                              ("2-RF", args.flow, 1), ("one-step model", args.one_step, 1)):
        for scale in (0.0, args.scale):
            model = checkpoint.load(path, device)
            if scale:
                merge_lora(model, file, scale)
            model = replace(model, **{part: getattr(model, part).to(dtype)
                                      for part in ("unet", "vae", "text_encoder")})
            grades, (images, captions) = measure(model, steps, args.style, judge, args)
            rows.append({"model": name, "steps": steps, "LoRA": scale} | grades)
            sheet.append((f"{name}, {steps_label(steps)}\n{'with' if scale else 'without'} LoRA",
                          images))
    write_json(f"{stem}.json", rows)
    write_text(f"{stem}.md", markdown_table(rows))
    save_comparison(f"{stem}.png", sheet, captions)
    print(markdown_table(rows) + f"{stem}: .json, .md, .png and .safetensors")


if __name__ == "__main__":
    run(main)
