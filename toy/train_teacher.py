"""Train a miniature Stable Diffusion from scratch, on one of two tiny datasets.

    python toy/train_teacher.py                   shapes.py: toy/tiny_sd.safetensors and more
    python toy/train_teacher.py --dataset emoji   emoji.py: toy/tiny_emoji.safetensors and more

The networks are smaller versions of the full-size model's networks. Each stage uses the project's
training loop and resumes:

    1. reading       the meaning of the captions' words; for shapes also the judge (reading.py)
    2. autoencoder   32 x 32 images <-> (4, 8, 8) latents: L1 + L2 + perceptual + KL
    3. U-Net         predicts the noise in latents, with 10 % caption dropout; for emoji, the text
                     transformer trains with it
    4. figures       evaluation of all this, in a .json beside the model

A dataset is a Python file with words, random_images and teacher_data for training, KINDS of
captions for evaluation, and the judge's functions (evaluation/judge.py).
"""

import json
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from command import (
    HERE, BadInput, Parser, check_output, pick_dtype, positive, run, write_atomically, write_json,
    write_text,
)
from diffusion import NoiseSchedule, noise_loss
from evaluation.figures import frechet_distance, machine_name, minutes_of
from evaluation.perceptual import perceptual_distance
from evaluation.plots import plot_loss
from formats.tokenizers import tokenizer_from
from pairs import shuffled
from sample import run_seed, sample_images, seed_range
from stable_diffusion import FAMILIES, StableDiffusion
from text_encoder import TextEncoder, TextEncoderConfig, tokenize
from toy import emoji, shapes
from toy.reading import EMA_RAMP, train_classifier, train_text
from training import TrainingOptions, ema_copy, seed_of, train
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig


@dataclass(frozen=True)
class Dataset:
    """What differs between the two."""

    module: ModuleType
    out: str
    vae_widths: tuple[int, ...]
    unet_widths: tuple[int, ...]
    text_iterations: int
    unet_iterations: int


DATASETS = {
    "shapes": Dataset(shapes, "tiny_sd.safetensors", (32, 64, 64), (64, 128), 2000, 6000),
    "emoji": Dataset(emoji, "tiny_emoji.safetensors", (48, 96, 96), (80, 160), 1000, 5000),
}
# Configs of all; vocab_size and widths are the dataset's.
TEXT = TextEncoderConfig(max_position_embeddings=16, hidden_size=128, intermediate_size=512,
                         num_hidden_layers=3, num_attention_heads=4)
VAE = VAEConfig(layers_per_block=1, norm_num_groups=16)
UNET = UNetConfig(attention_levels=(False, True), layers_per_block=1, attention_heads=4,
                  cross_attention_dim=TEXT.hidden_size, norm_num_groups=16, sample_size=8)

CAPTION_DROPOUT = 0.1  # as in classifier-free guidance (Ho & Salimans 2022)
KL_WEIGHT = 1e-4  # small, as in Rombach et al. 2022: it only keeps the latents near unit size
PERCEPTUAL_WEIGHT = 0.5
CAPTIONS = 4000  # in the list that pairs are made from
MEASURED, TEACHER_STEPS = 1000, 25  # images behind each figure, and the teacher's steps


# --------------------------------------------------------------------------------------------------
# The vocabulary: CLIP's format, one token for each word of the captions


def byte_pairs(word: str, ranks: dict[str, int]) -> list[str]:
    """The word's tokens: join the neighbours whose merge ranks first, until no merge applies."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while True:
        pairs = [f"{a} {b}" for a, b in zip(parts, parts[1:])]
        found = [(ranks[pair], k) for k, pair in enumerate(pairs) if pair in ranks]
        if not found:
            return parts
        _, k = min(found)
        parts[k : k + 2] = [parts[k] + parts[k + 1]]


def make_vocabulary(words: set[str]) -> tuple[dict[str, int], list[str]]:
    """(token -> id, merges) for CLIPTokenizer: a token a word; other text splits, down to bytes."""
    alphabet = sorted(ByteLevel.alphabet())  # the characters that stand for bytes, in CLIP's order
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    ranks = {}  # merge -> its rank
    for word in sorted(words):
        # Existing merges apply first, as they will when the word is read. One new merge at a time:
        # it may apply twice in a word ("cucumber").
        while len(parts := byte_pairs(word, ranks)) > 1:
            ranks[f"{parts[0]} {parts[1]}"] = len(ranks)
            tokens.append(parts[0] + parts[1])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, list(ranks)


# --------------------------------------------------------------------------------------------------
# The stages


def train_autoencoder(dataset: Dataset, iterations: int, folder: Path, seed: int) -> AutoencoderKL:
    torch.manual_seed(seed_of(seed, 2))
    vae = AutoencoderKL(replace(VAE, block_out_channels=dataset.vae_widths))
    perceptual = perceptual_distance("random", torch.device("cpu"))

    def batch(samples, share, generator):
        images = dataset.module.random_images(len(samples), generator)
        return images, torch.randn(len(images), 4, 8, 8, generator=generator)

    def loss(vae, images, noise):
        mean, logvar = vae.encode(images)
        sample = mean + (0.5 * logvar).exp() * noise
        rebuilt = vae.decode(sample * vae.config.scaling_factor).float()
        error = rebuilt - images
        pixels = error.abs().flatten(1).mean(1) + error.square().flatten(1).mean(1)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)  # from N(0, I), in nats
        kl = kl.float() / noise[0].numel()
        return pixels + PERCEPTUAL_WEIGHT * perceptual(rebuilt, images) + KL_WEIGHT * kl, None

    options = TrainingOptions(
        iterations, 64, learning_rate=6e-4, warmup_samples=6400, cooldown=0.5, ema_half_life=5_000,
        ema_ramp=EMA_RAMP, save_every=250, seed=seed, name="2 autoencoder",
        # With convolutions this wide, a CPU that has bf16 is twice as fast in it.
        dtype=pick_dtype("auto", torch.device("cpu")),
    )
    train(vae, ema_copy(vae), batch, loss, options, folder / "autoencoder", {})
    return vae


class WithText(nn.Module):
    """The U-Net and the text transformer as one network, to train together."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x: Tensor, timestep: Tensor, token_ids: Tensor) -> Tensor:
        return self.unet(x, timestep, self.text_encoder(token_ids))


def train_unet(
    network: WithText, iterations: int, folder: Path, seed: int, latents: Tensor, caption_of,
    ids_of, settings: dict,
) -> None:
    """On scaled latents (N, 4, 8, 8) and a caption for each. settings: as in training.train."""
    schedule = NoiseSchedule()

    def batch(samples, share, generator):
        index = shuffled(samples, len(latents), seed)
        keep = torch.rand(len(samples), generator=generator) >= CAPTION_DROPOUT
        s = torch.randint(schedule.timesteps, (len(samples),), generator=generator).float()
        noise = torch.randn(latents[index].shape, generator=generator)
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        prompts = [caption_of(k, rng) if kept else "" for k, kept in zip(index.tolist(), keep)]
        return latents[index], noise, s, ids_of(prompts)

    def loss(network, x1, noise, s, token_ids):
        return noise_loss(network, schedule, x1, noise, s, token_ids), schedule.time(s)

    options = TrainingOptions(
        iterations, 64, learning_rate=1e-3, weight_decay=0.01, warmup_samples=64_000, cooldown=0.3,
        ema_half_life=50_000, ema_ramp=EMA_RAMP, save_every=500, log_every=50, seed=seed,
        name="3 U-Net",
    )
    train(network, ema_copy(network), batch, loss, options, folder / "unet", settings)


def evaluate(model: StableDiffusion, module: ModuleType, judge, seed: int) -> dict:
    """Fractions of right images and Fréchet distances, on held-out noise and new real images."""
    seeds = seed_range("evaluation", seed, MEASURED)
    figures = {"pictures": MEASURED, "teacher_steps": TEACHER_STEPS, "guidance": model.guidance}
    for kind, make in module.KINDS.items():
        captions = make(MEASURED, seed)
        prompts = [str(caption) for caption in captions]
        with tqdm(total=MEASURED, desc=f"4 figures, {kind} captions") as bar:
            images = sample_images(model, prompts, seeds, TEACHER_STEPS, bar=bar)
        # Other real images of the same captions, where there are others, since the teacher's are
        # new too; the same ones would flatter the autoencoder.
        others = module.real_images(captions, seed + 1)
        with torch.inference_mode():
            latents = [model.vae.encode_latents(part) for part in others.split(250)]
            rebuilt = torch.cat([model.vae.decode(part) for part in latents])
            real = module.real_features(judge, captions, seed)
            sets = {"real": module.real_features(judge, captions, seed + 1),
                    "reconstructed": judge.features(rebuilt), "teacher": judge.features(images)}
        figures[kind] = {"reconstruction_error": (rebuilt - others).square().mean().item()}
        for name, features in sets.items():
            accuracy = sum(module.right(judge, features, captions)) / MEASURED
            figures[kind] |= {name: accuracy, f"frechet_{name}": frechet_distance(real, features)}
    return figures


# --------------------------------------------------------------------------------------------------
# The command


def main():
    parser = Parser("Train a tiny Stable Diffusion from scratch.")
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="shapes", help="the dataset")
    add("--out",
        help="the model; its .json, captions and reader are named after it; default: in toy/")
    add("--work", help="folder of the training states; default: runs/teacher-DATASET")
    add("--data", type=positive, default=100_000, help="images for the U-Net (shapes only)")
    add("--reader-iterations", type=positive, default=3000, help="of the judge (shapes only)")
    add("--text-iterations", type=positive, help="default: 2000 shapes, 1000 emoji")
    add("--autoencoder-iterations", type=positive, default=1500)
    add("--unet-iterations", type=positive, help="default: 6000 shapes, 5000 emoji")
    add("--seed", type=run_seed, default=0)
    args = parser.parse_args()
    dataset, seed = DATASETS[args.dataset], args.seed
    out = Path(args.out or HERE / "toy" / dataset.out)
    if out.suffix != ".safetensors":
        raise BadInput(f"--out: must end in .safetensors, got {args.out!r}")
    check_output(out)
    beside = lambda name: out.with_name(f"{out.stem}-{name}" if args.out else name)
    reader, captions = beside("reader.safetensors"), beside(FAMILIES[args.dataset].captions.name)
    folder = Path(args.work or f"runs/teacher-{args.dataset}")
    if args.dataset == "emoji":  # fail now, not after an hour, if something is not installed
        emoji.load_reader()
        emoji.pictures()

    vocabulary, merges = make_vocabulary(dataset.module.words())
    text_config = replace(TEXT, vocab_size=len(vocabulary))
    tokenizer = tokenizer_from(vocabulary, merges)
    ids_of = lambda prompts: tokenize(tokenizer, prompts, text_config.max_position_embeddings)

    if args.dataset == "shapes":
        classifier = train_classifier(args.reader_iterations, folder, seed)
        tensors = {name: tensor.half() for name, tensor in classifier.state_dict().items()}
        write_atomically(reader, lambda path: save_file(tensors, path))
    text_iterations = args.text_iterations or dataset.text_iterations
    text_encoder = train_text(args.dataset, text_config, text_iterations, folder, seed, ids_of)
    # The text stage of shapes covers all that captions say. For emoji the U-Net teaches more.
    text_encoder.requires_grad_(args.dataset == "emoji")
    vae = train_autoencoder(dataset, args.autoencoder_iterations, folder, seed)

    images, caption_of = dataset.module.teacher_data(args.data, seed)
    with torch.inference_mode():
        latents = torch.cat([vae.encode(batch)[0].float() for batch in images])
    # Scale the latents to unit standard deviation, as 0.18215 does for Stable Diffusion.
    vae.config = replace(vae.config, scaling_factor=1 / latents.std().item())
    scaled = (vae.config.scaling_factor * latents).clone()
    torch.manual_seed(seed_of(seed, 4))
    unet = UNet(replace(UNET, block_out_channels=dataset.unet_widths))
    train_unet(
        WithText(unet, text_encoder), args.unet_iterations or dataset.unet_iterations, folder, seed,
        scaled, caption_of, ids_of,
        {"data": len(latents), "text": text_iterations, "autoencoder": args.autoencoder_iterations},
    )

    model = StableDiffusion(unet, vae, text_encoder, tokenizer, "diffusion", family=args.dataset)
    checkpoint.save(model, out)
    prompts = [str(caption) for caption in dataset.module.training_captions(CAPTIONS, seed)]
    write_text(captions, "\n".join(prompts) + "\n")

    stages = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
    for stage in stages:
        plot_loss(stage)
    judge = dataset.module.load_reader(*[reader] * (args.dataset == "shapes"))
    figures = {
        "command": " ".join(["python toy/train_teacher.py", *sys.argv[1:]]),
        "seed": seed,
        "machine": f"{machine_name(torch.device('cpu'))}, torch {torch.__version__}",
        "minutes": {stage.name: minutes_of(stage) for stage in stages},
    } | evaluate(checkpoint.load(out), dataset.module, judge, seed + 1)
    write_json(out.with_suffix(".json"), figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    run(main)
