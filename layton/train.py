"""Layton in miniature: an image in 16 tokens, decoded in one step, and written from a caption.

    python layton/train.py                                      shapes, seed 0
    python layton/train.py --dataset emoji                      after python toy/emoji.py
    python layton/train.py --num-seeds 3 --num-samples 1000     and measure (measure.py)

Stop the command and run it again: it continues. Each of its three stages is a run of training.py:

    tokenizer    encoder, codebook and U-Net learn the velocity of real images' latents X1, given
                 the images' tokens q:  min E ‖v(X_t, t | q) - (X1 - X0)‖² + quantize's loss
    one-step     encoder and codebook are frozen. The U-Net makes the latent in one step, so a loss
                 of images I can train it, through the VAE's frozen decoder d:
                 min E LPIPS(y, I) + |y - I|,  y = d(X0 + v(X0, 0 | q))
    laytongen    a causal transformer learns p(q_k | q_<k, caption) by cross entropy

The U-Net starts from the teacher, negated as in reflow.py. Source: Layton (arXiv 2503.08377).
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
from command import Parser, add_machine_options, at_least, pick_device, positive, run
from distill import LPIPS_SLOWER
from evaluation.figures import NEIGHBOURS, minutes_of
from evaluation.perceptual import perceptual_distance
from evaluation.study import dataset_of
from layton.measure import LPIPS_NETS, measure
from layton.model import CODES, Layton, LaytonGen, quantize
from pairs import shuffled
from rectified_flow import interpolate, squared
from reflow import CAPTION_DROPOUT
from sample import run_seed
from stable_diffusion import initial_student
from training import (
    TrainingOptions, append_metrics, autocast_dtype, ema_copy, generator_for, read_metrics, train,
)

ITERATIONS = {"shapes": [4000, 1000, 3000], "emoji": [3000, 600, 3000]}  # of the three stages
RATES = (5e-4, 5e-4 / LPIPS_SLOWER, 1e-3)  # their learning rates
BATCH_SIZE = 64
CAPTIONED = 20_000  # images that LaytonGen learns from; of emoji all, some 1,600
SAVE_EVERY = 250  # iterations; at each save the unused entries restart
CENSUS = 1024  # images whose tokens show which entries are used


@torch.no_grad()
def restart_unused(network, ema, dataset, last: int, seed: int, folder: Path, step: int, _) -> None:
    """Log the fraction of entries in use; move the others, at step 0 all, to encoder outputs.

    An output's probability is ∝ its squared distance to its entry, as in k-means++ (Arthur and
    Vassilvitskii 2007). The loop calls this after a save, and again when it resumes from there:
    all depends on the state and the step. last: iterations of the run.
    """
    generator = generator_for(seed, step, 1)  # the batch has (seed, step)
    z = network.encode(dataset.random_images(CENSUS, generator).to(network.codebook.device))
    codes, tokens, _ = quantize(z, network.codebook)
    unused = tokens.flatten().bincount(minlength=CODES) == 0
    if not any(row["step"] == step for row in read_metrics(folder, "used")):
        append_metrics(folder, {"step": step, "used": 1 - unused.float().mean().item()})
    unused |= step == 0
    if unused.any() and step < last:
        distances = (codes - z).square().sum(-1).flatten().cpu()  # (16 CENSUS,)
        chosen = torch.multinomial(distances, int(unused.sum()), generator=generator)
        for each in (network, ema):
            each.codebook[unused] = z.flatten(0, 1)[chosen]


def train_layton(args, device: torch.device, seed: int) -> tuple:
    """The teacher, Layton after stages 1 and 2, LaytonGen; finished stages are loaded.

    BadInput: a folder holds another run; and what training.train and the dataset refuse.
    """
    (dataset, path), folder = dataset_of(args.dataset), Path(args.out, f"seed-{seed}")
    teacher, lpips = checkpoint.load(path, device), perceptual_distance("random", device)
    vae, settings = teacher.vae.requires_grad_(False), {"model": checkpoint.fingerprint(path)}

    def learn(stage: int, name: str, network, ema, batch, loss, validate=None) -> None:
        options = TrainingOptions(  # as reflow.py trains tiny models
            args.iterations[stage], BATCH_SIZE, RATES[stage], warmup_samples=6_400, cooldown=0.6,
            ema_half_life=10_000, ema_ramp=0.05, seed=seed, save_every=SAVE_EVERY,
            dtype=autocast_dtype(args.dtype, device, network), name=f"{name}, seed {seed}")
        train(network, ema, batch, loss, options, folder / name, settings, validate)
        print(f"{folder / name}: trained, in {minutes_of(folder / name)} minutes")

    def image_batch(samples, share, generator):  # I, X0 and t of stages 1 and 2
        images = dataset.random_images(len(samples), generator)
        x0 = torch.randn(len(samples), *teacher.latent_shape(), generator=generator)
        return images[share], x0[share], torch.rand(len(samples), generator=generator)[share]

    def tokenizer_loss(network, images, x0, t):
        x1 = vae.encode_latents(images).float()
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
    images = tqdm(images, "tokens of images", unit="batch", leave=False)
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
    return teacher, network, one_step, gen


def main():
    parser = Parser("Train Layton: an image in 16 tokens.")
    add = parser.add_argument
    add("--dataset", choices=ITERATIONS, default="shapes")
    add("--iterations", type=positive, nargs=3, metavar="N", help=f"default: {ITERATIONS}")
    add("--num-seeds", type=positive, default=1, help="whole runs, from --seed on")
    add("--num-samples", type=at_least(NEIGHBOURS + 2), help="images to measure; default: none")
    add("--out", help="folder of states and tables; default: runs/layton/DATASET")
    add_machine_options(parser, run_seed)
    args = parser.parse_args()
    args.iterations = args.iterations or ITERATIONS[args.dataset]
    args.out, device = args.out or f"runs/layton/{args.dataset}", pick_device(args.device)
    # Before hours of training: the networks of LPIPS may be missing.
    distances = {net: perceptual_distance(net, device) for net in LPIPS_NETS if args.num_samples}
    for seed in range(args.seed, args.seed + args.num_seeds):
        trained = train_layton(args, device, seed)
        if args.num_samples:
            measure(args, seed, distances, *trained)


if __name__ == "__main__":
    run(main)
