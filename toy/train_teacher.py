"""Make a tiny model from nothing: a miniature Stable Diffusion for one of two worlds.

    python toy/train_teacher.py                   shapes.py: writes toy/tiny_sd.safetensors and more
    python toy/train_teacher.py --world emoji     emoji.py: writes toy/tiny_emoji.safetensors

The classes are those of the full-size model. Each stage passes through the project's own loop and
is resumable:

    1. reading       what the captions' words mean, and of shapes the judge (reading.py)
    2. autoencoder   32 x 32 pictures <-> (4, 8, 8) latents: L1 + L2 + perceptual + KL
    3. U-Net         predicts the noise in latents; 10 % of the captions are dropped. That of emoji
                     trains the text transformer along
    4. figures       how good all this is, beside the model, as .json

A world is a Python file that has words, random_pictures and teacher_data to learn from, and what
evaluation/judge.py asks of a judge.
"""

import json
import random
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import emoji
import shapes
from command import (
    HERE, BadInput, Parser, check_output, pick_dtype, positive, run, write_json, write_text,
    write_whole,
)
from diffusion import NoiseSchedule, noise_loss
from distill import perceptual_distance
from evaluation.figures import frechet_distance, machine_name
from reading import EMA_RAMP, train_reader, train_text
from sample import draw_pictures, run_seed, seeds_in
from stable_diffusion import FAMILIES, StableDiffusion
from text_encoder import TextEncoder, TextEncoderConfig, tokenize, tokenizer_from
from training import TrainingOptions, plot_loss, read_metrics, seed_of, shuffled, train
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig


@dataclass(frozen=True)
class World:
    """What differs between the two."""

    module: ModuleType
    out: str
    autoencoder_widths: tuple[int, ...]
    unet_widths: tuple[int, ...]
    text_iterations: int
    unet_iterations: int

    @property
    def vae(self) -> VAEConfig:
        widths = self.autoencoder_widths
        return VAEConfig(block_out_channels=widths, layers_per_block=1, norm_num_groups=16)

    @property
    def unet(self) -> UNetConfig:
        return UNetConfig(
            block_out_channels=self.unet_widths, attention_levels=(False, True),
            layers_per_block=1, attention_heads=4, cross_attention_dim=TEXT.hidden_size,
            norm_num_groups=16, sample_size=8,
        )


TEXT = TextEncoderConfig(  # vocab_size is set by the vocabulary
    max_position_embeddings=16, hidden_size=128, intermediate_size=512, num_hidden_layers=3,
    num_attention_heads=4,
)
WORLDS = {
    "shapes": World(shapes, "tiny_sd.safetensors", (32, 64, 64), (64, 128), 2000, 6000),
    "emoji": World(emoji, "tiny_emoji.safetensors", (48, 96, 96), (80, 160), 1000, 5000),
}

# Share of captions replaced by the empty one, so that guidance works (Ho & Salimans 2022).
DROP = 0.1
# A number of the latent; small, as in Rombach et al. 2022: it keeps the latents near unit size.
KL_WEIGHT = 1e-4
PERCEPTUAL_WEIGHT = 0.5
CAPTIONS = 4000  # in the list from which pairs are drawn
MEASURED, TEACHER_STEPS = 1000, 25  # pictures and steps behind each figure


# --------------------------------------------------------------------------------------------------
# The vocabulary: CLIP's format, with one merged token for each word of the captions


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's and CLIP's vocabularies.

    They come in CLIP's order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


def byte_pairs(word: str, ranks: dict[str, int]) -> list[str]:
    """A word cut into tokens.

    Of all neighbours, the pair whose merge comes first is joined, until none is left.
    """
    parts = [*word[:-1], word[-1] + "</w>"]
    while True:
        pairs = [f"{a} {b}" for a, b in zip(parts, parts[1:])]
        found = [(ranks[pair], k) for k, pair in enumerate(pairs) if pair in ranks]
        if not found:
            return parts
        _, k = min(found)
        parts[k : k + 2] = [parts[k] + parts[k + 1]]


def make_vocabulary(words: set[str]) -> tuple[dict[str, int], list[str]]:
    """(token -> id, merges), for transformers' CLIPTokenizer: a token for each of these words.

    Any other text can be encoded too, letter by letter if need be.
    """
    alphabet = byte_alphabet()
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    ranks = {}  # merge -> its place among them
    for word in sorted(words):
        # The merges that are there go first, as they will when the word is read; what they leave is
        # joined here. A new merge may be wanted twice in a word ("cucumber"), so look anew.
        while len(parts := byte_pairs(word, ranks)) > 1:
            ranks[f"{parts[0]} {parts[1]}"] = len(ranks)
            tokens.append(parts[0] + parts[1])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, list(ranks)


# --------------------------------------------------------------------------------------------------
# The stages


def train_autoencoder(world: World, iterations: int, folder: Path, seed: int) -> AutoencoderKL:
    torch.manual_seed(seed_of(seed, 2))
    vae = AutoencoderKL(world.vae)
    perceptual = perceptual_distance("random", torch.device("cpu"))

    def draw(samples, share, generator):
        images = world.module.random_pictures(len(samples), generator)
        return images, torch.randn(len(images), 4, 8, 8, generator=generator)

    def loss(vae, images, noise):
        latent = vae.encode(images)
        sample = latent.mean + (0.5 * latent.logvar).exp() * noise
        answer = vae.decode(sample * vae.config.scaling_factor).float()
        error = answer - images
        pixels = error.abs().flatten(1).mean(1) + error.square().flatten(1).mean(1)
        kl = latent.kl().float() / noise[0].numel()
        return pixels + PERCEPTUAL_WEIGHT * perceptual(answer, images) + KL_WEIGHT * kl, None

    options = TrainingOptions(
        iterations, 64, learning_rate=6e-4, warmup_samples=6400, cooldown=0.5, ema_half_life=5_000,
        ema_ramp=EMA_RAMP, save_every=250, seed=seed,
    )
    # Of convolutions this wide a CPU makes twice as many in bf16, where it has it.
    dtype = pick_dtype("auto", torch.device("cpu"))
    train(vae, draw, loss, options, folder / "autoencoder", {}, "2 autoencoder", dtype)
    return vae


class WithText(nn.Module):
    """The U-Net with the text transformer before it, as one network: they learn together."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x: Tensor, timestep: Tensor, token_ids: Tensor) -> Tensor:
        return self.unet(x, timestep, self.text_encoder(token_ids))


def train_unet(
    network: WithText, iterations: int, folder: Path, seed: int, latents: Tensor, caption_of,
    ids_of, settings: dict,
) -> None:
    """In place, on scaled latents (N, 4, 8, 8), a caption of each. settings: of what is before."""
    schedule = NoiseSchedule()

    def draw(samples, share, generator):
        index = shuffled(samples, len(latents), seed)
        kept = torch.rand(len(samples), generator=generator) >= DROP
        s = torch.randint(schedule.timesteps, (len(samples),), generator=generator).float()
        noise = torch.randn(latents[index].shape, generator=generator)
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        prompts = [caption_of(i, rng) if keep else ""
                   for i, keep in zip(index.tolist(), kept.tolist())]
        return latents[index], noise, s, ids_of(prompts)

    def loss(network, x1, noise, s, token_ids):
        return noise_loss(network, schedule, x1, noise, s, token_ids), schedule.time(s)

    options = TrainingOptions(
        iterations, 64, learning_rate=1e-3, weight_decay=0.01, warmup_samples=64_000, cooldown=0.3,
        ema_half_life=50_000, ema_ramp=EMA_RAMP, save_every=500, log_every=50, seed=seed,
    )
    settings = {"data": len(latents)} | settings
    train(network, draw, loss, options, folder / "unet", settings, "3 U-Net")


# --------------------------------------------------------------------------------------------------
# How good it is


def minutes_of(folder: Path, steps: int | None = None) -> float:
    """Minutes that a stage takes, or its first steps.

    By the median of its seconds a step, so that pauses do not count. BadInput where that is lost.
    """
    rows = read_metrics(folder)
    if not rows:
        raise BadInput(f"{folder}: holds no metrics.jsonl any more, so its minutes are not known; "
                       "delete the model that it made, to make it again")
    seconds = statistics.median(row["seconds_per_step"] for row in rows)
    return round((steps or rows[-1]["step"]) * seconds / 60, 1)


def measure(model: StableDiffusion, world: ModuleType, reader, seed: int) -> dict:
    """Shares of right pictures and Fréchet distances, on noises and pictures never trained on."""
    seeds = seeds_in("evaluation", seed, MEASURED)
    figures = {"pictures": MEASURED, "teacher_steps": TEACHER_STEPS, "guidance": model.guidance}
    for kind, make in world.KINDS.items():
        captions = make(MEASURED, seed)
        prompts = [str(caption) for caption in captions]
        with tqdm(total=MEASURED, desc=f"4 figures, {kind} captions") as bar:
            pictures = draw_pictures(model, prompts, seeds, TEACHER_STEPS, bar=bar)
        # Other pictures of the same captions, as the teacher's are, where they allow others; the
        # same ones flatter the autoencoder.
        others = world.drawn(captions, seed + 1)
        with torch.inference_mode():
            rebuilt = torch.cat([
                model.vae.decode(model.vae.encode_latents(part)) for part in others.split(250)
            ])
            real = world.real_features(reader, captions, seed)
            sets = {"drawn": world.real_features(reader, captions, seed + 1),
                    "reconstructed": reader.features(rebuilt), "teacher": reader.features(pictures)}
        figures[kind] = {"reconstruction_error": (rebuilt - others).square().mean().item()}
        for name, features in sets.items():
            share = sum(world.right(reader, features, captions)) / MEASURED
            figures[kind] |= {name: share, f"frechet_{name}": frechet_distance(real, features)}
    return figures


# --------------------------------------------------------------------------------------------------


def main():
    parser = Parser("Train a tiny Stable Diffusion from nothing.")
    parser.add_argument("--world", choices=WORLDS, default="shapes")
    parser.add_argument("--out", type=checkpoint.model_file,
                        help="the model; what else is made lands beside it; default: toy/")
    parser.add_argument("--work", help="folder of the training states; default: runs/teacher-WORLD")
    of_shapes = parser.add_argument_group("shapes alone").add_argument
    of_shapes("--data", type=positive, default=100_000, help="pictures to draw for the U-Net")
    of_shapes("--reader-iterations", type=positive, default=3000)
    parser.add_argument("--text-iterations", type=positive, help="default: 2000 shapes, 1000 emoji")
    parser.add_argument("--autoencoder-iterations", type=positive, default=1500)
    parser.add_argument("--unet-iterations", type=positive, help="default: 6000 shapes, 5000 emoji")
    parser.add_argument("--seed", type=run_seed, default=0)
    args = parser.parse_args()
    world, seed = WORLDS[args.world], args.seed
    out = Path(args.out or HERE / "toy" / world.out)
    check_output(out)
    folder = Path(args.work or f"runs/teacher-{args.world}")
    if args.world == "emoji":  # what is not installed or fetched is said now, not after an hour
        emoji.load_reader()
        emoji.pictures()

    vocabulary, merges = make_vocabulary(world.module.words())
    text_config = replace(TEXT, vocab_size=len(vocabulary))
    tokenizer = tokenizer_from(vocabulary, merges)

    def ids_of(prompts: list[str]) -> Tensor:
        return tokenize(tokenizer, prompts, text_config.max_position_embeddings)

    if args.world == "shapes":
        reader = train_reader(args.reader_iterations, folder, seed)
        tensors = {name: tensor.half() for name, tensor in reader.state_dict().items()}
        write_whole(out.with_name("reader.safetensors"), lambda path: save_file(tensors, path))
    text_iterations = args.text_iterations or world.text_iterations
    text_encoder = train_text(args.world, text_iterations, folder, seed, ids_of, text_config)
    # Shapes' answers say all that their captions do; of emoji the U-Net learns more.
    text_encoder.requires_grad_(args.world == "emoji")
    vae = train_autoencoder(world, args.autoencoder_iterations, folder, seed)

    pictures, caption_of = world.module.teacher_data(args.data, seed)
    with torch.inference_mode():
        latents = torch.cat([vae.encode(batch).mean.float() for batch in pictures])
    # Latents of unit size, as SD's 0.18215 makes them.
    vae.config = replace(vae.config, scaling_factor=1 / latents.std().item())
    torch.manual_seed(seed_of(seed, 4))
    network = WithText(UNet(world.unet), text_encoder)
    iterations = args.unet_iterations or world.unet_iterations
    scaled = (vae.config.scaling_factor * latents).clone()
    before = {"text": text_iterations, "autoencoder": args.autoencoder_iterations}
    train_unet(network, iterations, folder, seed, scaled, caption_of, ids_of, before)

    model = StableDiffusion(
        network.unet, vae, text_encoder, tokenizer, "diffusion", family=args.world
    )
    checkpoint.save(model, out)
    prompts = [str(caption) for caption in world.module.training_captions(CAPTIONS, seed)]
    captions_file = FAMILIES[args.world].captions.name
    write_text(out.with_name(captions_file), "\n".join(prompts) + "\n")

    figures = {
        "command": " ".join(["python toy/train_teacher.py", *sys.argv[1:]]),
        "seed": seed,
        "machine": f"{machine_name(torch.device('cpu'))}, torch {torch.__version__}",
    }
    figures["minutes"] = {}
    for stage in sorted(path.parent.name for path in folder.glob("*/metrics.jsonl")):
        figures["minutes"][stage] = minutes_of(folder / stage)
        plot_loss(folder / stage)
    readers = [out.with_name("reader.safetensors")] if args.world == "shapes" else []
    reader = world.module.load_reader(*readers)
    figures |= measure(checkpoint.load(out), world.module, reader, seed + 1)
    write_json(out.with_suffix(".json"), figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    run(main)
