"""Layton in miniature: an image in 16 tokens, decoded in one step, and written from a caption.

    python layton/train.py --dataset emoji          after python toy/emoji.py; default: shapes
    python layton/train.py --num-samples 1000       train what is missing, then measure

Stop the command and run it again: it continues. Each of its three stages is a run of training.py:

    tokenizer    encoder, codebook and U-Net learn the velocity of real images' latents X1, given
                 the images' tokens q:  min E ‖v(X_t, t | q) - (X1 - X0)‖² + quantize's loss
    one-step     encoder and codebook are frozen. The U-Net makes the latent in one step, so a loss
                 on images I can train it, through the VAE's frozen decoder d:
                 min E LPIPS(y, I) + |y - I|,  y = d(X0 + v(X0, 0 | q))
    laytongen    a causal transformer learns p(q_k | q_<k, caption) by cross entropy

The U-Net starts from the teacher, negated as in reflow.py. Source: Layton (arXiv 2503.08377).
Metrics: psnr in dB; lpips_random is a loss of stage 2 and of the VAE; nothing trains on
lpips_efficientnet. used is the fraction of codebook entries that LaytonGen's training images take,
nearest the fraction of a generated image's tokens that its most similar training image has too.
"""

import copy
import random
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from command import Parser, add_machine_options, at_least, pick_device, positive, run, write_text
from editing import psnr
from evaluate import NUM_SHOWN
from evaluation.figures import FEWEST_SAMPLES, with_intervals
from evaluation.judge import judged_set
from evaluation.perceptual import perceptual_distance
from evaluation.plots import grouped, markdown_table, save_comparison
from evaluation.study import ONE_STEP, dataset_of, footer, open_table
from layton.model import CODES, Layton, LaytonGen, decode, quantize, sample_tokens
from pairs import shuffled
from rectified_flow import interpolate, squared
from reflow import CAPTION_DROPOUT
from sample import RUN_SEEDS, run_seed, sample_images, seed_range
from stable_diffusion import TOY, initial_student
from training import (
    TrainingOptions, append_metrics, autocast_dtype, ema_copy, generator_for, read_metrics, train,
)

ITERATIONS = {"shapes": [4000, 1000, 3000], "emoji": [3000, 700, 3000]}  # of the three stages
RATES = (5e-4, 1e-3, 1e-3)  # their learning rates, which fall to 0 over their
COOLDOWN = 0.6  # last fraction
BATCH_SIZE, CAPTIONED = 64, 20_000  # images that LaytonGen learns from; of emoji all, some 1,600
SAVE_EVERY, CENSUS = 100, 1024  # iterations; images whose tokens show which entries are used
SETTINGS = ("dataset", "dtype", "iterations", "num_samples")  # that decide the tables
NEW_IMAGES = {"shapes": "mixed", "emoji": "held-out pictures"}  # their captions in dataset.KINDS


@torch.no_grad()
def restart_unused(network, ema, dataset, last: int, seed: int, folder: Path, step: int, _) -> None:
    """Log the fraction of entries in use; move the others, at step 0 all, to encoder outputs.

    The loop calls this after a save, and again if it resumes from that save. For one process.
    """
    generator = generator_for(seed, step, 1)  # the batch's is of (seed, step)
    z = network.encode(dataset.random_images(CENSUS, generator).to(network.codebook.device))
    codes, tokens, _ = quantize(z, network.codebook)
    unused = tokens.flatten().bincount(minlength=CODES) == 0
    if not any(row["step"] == step for row in read_metrics(folder, "used")):
        append_metrics(folder, {"step": step, "used": 1 - unused.float().mean().item()})
    unused |= step == 0
    if unused.any() and step <= (1 - COOLDOWN) * last:  # later the entries hardly adapt
        distances = (codes - z).square().sum(-1).flatten().cpu()
        chosen = torch.multinomial(distances, int(unused.sum()), generator=generator)
        for each in (network, ema):
            each.codebook[unused] = z.flatten(0, 1)[chosen]


def train_layton(args, device: torch.device) -> tuple:
    """The teacher, Layton after stages 1 and 2, LaytonGen, its tokens; finished stages are loaded.

    BadInput: a folder holds another run; and what training.train and the dataset refuse.
    """
    (dataset, path), seed = dataset_of(args.dataset), args.seed
    teacher, lpips = checkpoint.load(path, device), perceptual_distance("random", device)
    vae, settings = teacher.vae.requires_grad_(False), {"model": checkpoint.fingerprint(path)}
    folder = Path(args.out, f"seed-{seed}")

    def learn(stage: int, name: str, network, ema, batch, loss, validate=None) -> None:
        options = TrainingOptions(  # as reflow.py trains tiny models, but for the warm-up
            args.iterations[stage], BATCH_SIZE, RATES[stage], warmup_samples=6_400, seed=seed,
            cooldown=COOLDOWN, ema_half_life=10_000, ema_ramp=0.05, save_every=SAVE_EVERY,
            dtype=autocast_dtype(args.dtype, device, network), name=f"{name}, seed {seed}")
        train(network, ema, batch, loss, options, folder / name, settings, validate)
        print(f"{folder / name}: trained")

    def image_batch(samples, share, generator):  # I, X0 and t of stages 1 and 2
        images = dataset.random_images(len(samples), generator)
        x0 = torch.randn(len(samples), *teacher.latent_shape(), generator=generator)
        return images[share], x0[share], torch.rand(len(samples), generator=generator)[share]

    def tokenizer_loss(network, images, x0, t):
        with torch.autocast(device.type, enabled=False):
            x1 = vae.encode_latents(images)
        velocity, codebook_loss = network(images, interpolate(x0, x1, t), t)
        return squared(velocity, x1 - x0) + codebook_loss, t

    torch.manual_seed(seed)
    network = Layton(initial_student(teacher.unet, "negated", teacher.kind, seed)).to(device)
    ema = ema_copy(network)
    learn(0, "tokenizer", network, ema, image_batch, tokenizer_loss, partial(
        restart_unused, network, ema, dataset, args.iterations[0], seed, folder / "tokenizer"))
    settings = settings | {"tokenizer_iterations": args.iterations[0]}

    def one_step_loss(network, images, x0, t):
        velocity, _ = network(images, x0, torch.zeros_like(t))
        with torch.autocast(device.type, enabled=False):
            made = vae.decode(x0 + velocity)
        return lpips(made, images) + (made - images).abs().flatten(1).mean(1), None

    one_step = copy.deepcopy(network).requires_grad_(False)
    one_step.unet.requires_grad_(True)
    learn(1, "one-step", one_step, ema_copy(one_step), image_batch, one_step_loss)

    images, caption_of = dataset.teacher_data(CAPTIONED, seed)
    tokens = torch.cat([one_step.tokens(part.to(device)).cpu() for part in images])
    rng, is_held_out = random.Random(seed), dataset.is_for_measuring  # of captions
    rows = torch.tensor([k for k in range(len(tokens)) if not is_held_out(caption_of(k, rng))])

    def caption_batch(samples, share, generator):
        index = rows[shuffled(samples, len(rows), seed)]
        keep = torch.rand(len(samples), generator=generator) >= CAPTION_DROPOUT
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        captions = [caption_of(k, rng) if kept else "" for k, kept in zip(index.tolist(), keep)]
        return tokens[index][share], captions[share]

    def gen_loss(gen, tokens, captions):
        logits = gen(teacher.encode_prompts(captions), tokens[:, :-1])  # (B, 16, 256)
        return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").mean(1), None

    torch.manual_seed(seed)
    gen = LaytonGen().to(device)
    learn(2, "laytongen", gen, ema_copy(gen), caption_batch, gen_loss)
    return teacher, network, one_step, gen, tokens[rows]


@torch.inference_mode()
def measure(args, distances: dict, teacher, tokenizer: Layton, one_step: Layton, gen, seen) -> None:
    """Add OUT's missing rows of --seed. distances: LPIPS; seen (N, 16): LaytonGen trained on it."""
    (dataset, path), vae, device = dataset_of(args.dataset), teacher.vae, teacher.device
    seeds, kind = seed_range("evaluation", args.seed, args.num_samples), NEW_IMAGES[args.dataset]
    captions, originals = (judged_set(dataset, make(len(seeds), seeds[0]), seeds, args.seed)
                           for make in (dataset.measuring_captions, dataset.KINDS[kind]))
    models = [checkpoint.load(each, device) for each in (path, TOY / ONE_STEP[args.dataset])]

    others = [each + RUN_SEEDS // 2 for each in seeds]  # `seeds` are the decoder's noises
    written = sample_tokens(gen, *map(teacher.encode_prompts, (captions.prompts, [""])), others)
    read = tokenizer.tokens(originals.real_images.to(device))
    nearest = sum((seen == each).sum(1).max().item() for each in written.cpu()) / written.numel()

    def decoded(network, tokens, steps, _, seeds):
        return decode(teacher, network, tokens[: len(seeds)], seeds, steps)

    tables = {  # name: evaluation set, inputs, and rows as functions (inputs, seeds) -> images
        "reconstruction": (originals, originals.real_images, {
            "VAE alone": lambda images, _: vae.decode(vae.encode_latents(images.to(device))),
            "tokens, 25 diffusion steps": partial(decoded, tokenizer, read, 25),
            "tokens, one step after stage 1": partial(decoded, tokenizer, read, 1),
            "tokens, one step after stage 2": partial(decoded, one_step, read, 1)}),
        "generation": (captions, captions.prompts, {
            "teacher, 25 steps": partial(sample_images, models[0]),
            "InstaFlow, one step": partial(sample_images, models[1]),
            "LaytonGen, 25 diffusion steps": partial(decoded, tokenizer, written, 25),
            "LaytonGen, one step": partial(decoded, one_step, written, 1)})}
    for name, (judged, inputs, ways) in tables.items():
        stem = Path(args.out, name)
        rows, write = open_table(stem.with_suffix(".json"), args, SETTINGS)
        if judged is captions and not any(row["seed"] == args.seed for row in rows):
            rows.append({"row": "real", "seed": args.seed} | judged.real_grades | {"nearest": None})
        for label, way in tqdm(ways.items(), f"{name}, seed {args.seed}"):
            if any((row["row"], row["seed"]) == (label, args.seed) for row in rows):
                continue
            images = way(inputs, seeds).float().cpu().clamp(-1, 1)
            row = {"row": label, "seed": args.seed} | judged.grade(images)
            row |= {"nearest": nearest if "Gen" in label else None} if judged is captions else {}
            for net, distance in distances.items() if judged is originals else ():
                apart = map(distance, images.split(BATCH_SIZE), inputs.split(BATCH_SIZE))
                row[f"lpips_{net}"] = torch.cat([*apart]).mean().item()
                row |= {"psnr": psnr(images, inputs).mean().item(),
                        "used": None if "VAE" in label else seen.unique().numel() / CODES}
            rows.append(row)
            write()
        sheet = [("original" if judged is originals else "real", judged.real_images)] + [
            (label.replace(", ", "\n"), way(inputs[:NUM_SHOWN], seeds[:NUM_SHOWN]).cpu())
            for label, way in ways.items()]
        save_comparison(f"{stem}-{args.seed}.png", sheet, judged.prompts[:NUM_SHOWN])
        table = [{"row": label, "seeds": len(group)} | with_intervals(group, list(group[0])[2:])
                 for (label,), group in grouped(rows, ("row",)).items()]
        table = markdown_table(table) + footer("layton/train.py", args, device, rows)
        write_text(stem.with_suffix(".md"), table)


def main():
    parser = Parser("Train Layton: an image in 16 tokens.")
    add = parser.add_argument
    add("--dataset", choices=ITERATIONS, default="shapes")
    add("--iterations", type=positive, nargs=3, metavar="N", help=f"stages; default: {ITERATIONS}")
    add("--num-samples", type=at_least(FEWEST_SAMPLES), help="images to measure; default: none")
    add("--out", help="folder of states and tables; default: runs/layton/DATASET")
    add_machine_options(parser, run_seed)
    args = parser.parse_args()
    args.iterations = args.iterations or ITERATIONS[args.dataset]
    args.out, device = args.out or f"runs/layton/{args.dataset}", pick_device(args.device)
    cpu, nets = torch.device("cpu"), ("random", "efficientnet") if args.num_samples else ()
    distances = {net: perceptual_distance(net, cpu) for net in nets}  # before hours of training
    if args.num_samples:  # the same settings for both tables
        open_table(Path(args.out, "reconstruction.json"), args, SETTINGS)
    trained = train_layton(args, device)
    if args.num_samples:
        measure(args, distances, *trained)


if __name__ == "__main__":
    run(main)
