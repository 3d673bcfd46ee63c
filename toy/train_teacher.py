"""Make the tiny model from nothing: a miniature Stable Diffusion that draws shapes.py's shapes.

    python toy/train_teacher.py     writes toy/tiny_sd.safetensors, reader.safetensors and figures

Five stages, each with the project's own loop, each resumable. The classes are those of the
full-size model.

    1. reader        the judge: reads attributes from drawn pictures; trains none of the others
    2. autoencoder   32 x 32 pictures <-> (4, 8, 8) latents: L1 + L2 + perceptual + KL
    3. text          a causal transformer that learns to say, from the end token on, what is where
    4. U-Net         predicts the noise in latents; 10 % of the captions are dropped
    5. figures       how good all this is, into toy/tiny_sd.json

Stage 3 is what CLIP's pre-training is to Stable Diffusion: the U-Net meets words whose meaning is
already worked out. Without it a U-Net of this size hardly ever learns which colour belongs to which
shape at which place, above all when the caption names the lower object first.
"""

import json
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import shapes
from command import HERE, Parser, check_output, positive, run, write_json, write_text, write_whole
from diffusion import NoiseSchedule, noise_loss
from distill import perceptual_distance
from evaluation.figures import frechet_distance, machine_name
from sample import draw_pictures, run_seed, seeds_in
from stable_diffusion import StableDiffusion
from text_encoder import TextEncoder, TextEncoderConfig, tokenize, tokenizer_from
from training import TrainingOptions, plot_loss, read_metrics, seed_of, shuffled, train
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

VAE = VAEConfig(block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=16)
UNET = UNetConfig(
    block_out_channels=(64, 128), attention_levels=(False, True), layers_per_block=1,
    attention_heads=4, cross_attention_dim=128, norm_num_groups=16, sample_size=8,
)
TEXT = TextEncoderConfig(  # vocab_size is set by the vocabulary
    max_position_embeddings=16, hidden_size=128, intermediate_size=512, num_hidden_layers=3,
    num_attention_heads=4,
)

# Share of captions replaced by the empty one, so that guidance works (Ho & Salimans 2022).
DROP = 0.1
# A number of the latent; small, as in Rombach et al. 2022: it keeps the latents near unit size.
KL_WEIGHT = 1e-4
PERCEPTUAL_WEIGHT = 0.5
EMA_RAMP = 0.05  # the half-life of the averaged weights is at most this share of the samples seen
CAPTIONS = 4000  # in toy/captions.txt, from which pairs are drawn
MEASURED, TEACHER_STEPS = 1000, 25  # pictures and steps behind each figure
UNKNOWN = "unknown"  # what a caption leaves open, as a class of the text stage


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


def byte_pairs(word: str, merges: list[str]) -> list[str]:
    """A word cut into tokens.

    Of all neighbours, the pair whose merge comes first is joined, until none is left.
    """
    parts = [*word[:-1], word[-1] + "</w>"]
    while True:
        found = [(merges.index(f"{a} {b}"), k) for k, (a, b) in enumerate(zip(parts, parts[1:]))
                 if f"{a} {b}" in merges]
        if not found:
            return parts
        k = min(found)[1]
        parts[k : k + 2] = [parts[k] + parts[k + 1]]


def make_vocabulary() -> tuple[dict[str, int], list[str]]:
    """(token -> id, merges), for transformers' CLIPTokenizer.

    Any text can be encoded, letter by letter if need be.
    """
    words = {"a", "and", "of", "shape", *shapes.SHAPES, *shapes.COLORS,
             "above", "below", "left", "right"}
    alphabet = byte_alphabet()
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    merges = []
    for word in sorted(words):
        # The merges of earlier words go first, as they will when the word is read; what they leave
        # is joined here.
        first, *rest = byte_pairs(word, merges)
        for part in rest:
            merges.append(f"{first} {part}")
            first += part
            tokens.append(first)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


# --------------------------------------------------------------------------------------------------
# The stages


def scenes_for(samples: torch.Tensor, generator: torch.Generator) -> tuple[list, list]:
    """Random captions and a scene that obeys each."""
    rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    captions = [shapes.random_caption(rng) for _ in samples]
    return captions, [shapes.scene_of(caption, rng) for caption in captions]


def blur(images: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def classifier_options(iterations: int, seed: int) -> TrainingOptions:
    """How reader and text transformer are trained, which both learn to name what a scene holds."""
    return TrainingOptions(
        iterations, 128, learning_rate=1e-3, warmup_samples=12_800, ema_half_life=50_000,
        ema_ramp=EMA_RAMP, save_every=500, seed=seed,
    )


def train_reader(iterations: int, folder: Path, seed: int) -> shapes.Reader:
    torch.manual_seed(seed_of(seed, 1))
    reader = shapes.Reader()

    def draw(samples, share, generator):
        _, scenes = scenes_for(samples, generator)
        images = shapes.draw(scenes, int(torch.randint(2**62, (1,), generator=generator)))
        # Soft and noisy pictures too, so that what is judged is what is drawn and not how cleanly.
        images = torch.where(
            torch.rand(len(images), 1, 1, 1, generator=generator) < 0.3, blur(images), images
        )
        noise = torch.randn(images.shape, generator=generator)
        images = images + 0.3 * torch.rand(len(images), 1, 1, 1, generator=generator) * noise
        return images, shapes.labels_of(scenes)

    def loss(reader, images, labels):
        pairs = zip(reader(images), labels.T)
        return sum(F.cross_entropy(logits, label, reduction="none")
                   for logits, label in pairs), None

    train(reader, draw, loss, classifier_options(iterations, seed), folder / "reader", {},
          "1 reader")
    return reader


def train_autoencoder(iterations: int, folder: Path, seed: int) -> AutoencoderKL:
    torch.manual_seed(seed_of(seed, 2))
    vae = AutoencoderKL(VAE)
    perceptual = perceptual_distance("random", torch.device("cpu"))

    def draw(samples, share, generator):
        _, scenes = scenes_for(samples, generator)
        images = shapes.draw(scenes, int(torch.randint(2**62, (1,), generator=generator)))
        return images, torch.randn(len(images), 4, 8, 8, generator=generator)

    def loss(vae, images, noise):
        latent = vae.encode(images)
        sample = latent.mean + (0.5 * latent.logvar).exp() * noise
        answer = vae.decode(sample * VAE.scaling_factor).float()
        error = answer - images
        pixels = error.abs().flatten(1).mean(1) + error.square().flatten(1).mean(1)
        kl = latent.kl().float() / noise[0].numel()
        return pixels + PERCEPTUAL_WEIGHT * perceptual(answer, images) + KL_WEIGHT * kl, None

    options = TrainingOptions(
        iterations, 64, learning_rate=6e-4, warmup_samples=6400, cooldown=0.5, ema_half_life=5_000,
        ema_ramp=EMA_RAMP, save_every=250, seed=seed,
    )
    dtype = torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
    train(vae, draw, loss, options, folder / "autoencoder", {}, "2 autoencoder", dtype)
    return vae


class TextReader(nn.Module):
    """The text encoder with heads that say what is where.

    They give one answer from every token behind the caption's end.
    """

    questions = {
        "arrangement": (*shapes.ARRANGEMENTS, UNKNOWN),
        "color 0": (*shapes.COLORS, UNKNOWN),
        "shape 0": (*shapes.SHAPES, UNKNOWN),
        "color 1": (*shapes.COLORS, UNKNOWN),
        "shape 1": (*shapes.SHAPES, UNKNOWN),
    }

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.text_encoder = TextEncoder(config)
        self.heads = nn.Linear(
            config.hidden_size, sum(len(answers) for answers in self.questions.values())
        )

    def forward(self, token_ids: torch.Tensor) -> list[torch.Tensor]:
        logits = self.heads(self.text_encoder(token_ids))  # (B, L, answers)
        return logits.split([len(answers) for answers in self.questions.values()], dim=-1)


def answers_of(caption: shapes.Caption) -> list[int]:
    """Indices into TextReader.questions.

    Objects in picture order where the caption fixes it, else in its own.
    """
    phrases = [caption.first] + ([caption.second] if caption.second else [])
    if caption.relation in ("below", "right of"):
        phrases.reverse()
    known = {"above": "vertical", "below": "vertical",
             "left of": "horizontal", "right of": "horizontal"}
    words = ["one" if caption.second is None else known.get(caption.relation, UNKNOWN)]
    for phrase in phrases:
        words += [phrase.color or UNKNOWN, phrase.shape or UNKNOWN]
    words += [UNKNOWN] * (5 - len(words))
    return [answers.index(word) for answers, word in zip(TextReader.questions.values(), words)]


def train_text(
    iterations: int, folder: Path, seed: int, tokenize, config: TextEncoderConfig,
) -> TextEncoder:
    torch.manual_seed(seed_of(seed, 3))
    model = TextReader(config)

    def draw(samples, share, generator):
        captions, _ = scenes_for(samples, generator)
        return (tokenize([str(caption) for caption in captions]),
                torch.tensor([answers_of(c) for c in captions]))

    def loss(model, token_ids, answers):
        # The end token is the last of the vocabulary.
        after_end = (token_ids == config.vocab_size - 1).float()
        total = 0
        for logits, answer in zip(model(token_ids), answers.T):
            each = F.cross_entropy(
                logits.transpose(1, 2), answer[:, None].expand_as(token_ids), reduction="none"
            )
            total = total + (each * after_end).sum(1) / after_end.sum(1)
        return total, None

    train(model, draw, loss, classifier_options(iterations, seed), folder / "text", {}, "3 text")
    return model.text_encoder


def latent_data(vae: AutoencoderKL, count: int, seed: int) -> tuple[torch.Tensor, list, float]:
    """Unscaled latent means (N, 4, 8, 8) of drawn pictures, their captions, standard deviation."""
    captions = shapes.random_captions(count, seed)
    latents = []
    with torch.inference_mode():
        for start in range(0, count, 500):
            images = shapes.drawn(captions[start : start + 500], seed_of(seed, start))
            latents.append(vae.encode(images).mean.float())
    latents = torch.cat(latents)
    return latents, captions, latents.std().item()


def train_unet(iterations: int, folder: Path, seed: int, latents, captions, encode) -> UNet:
    torch.manual_seed(seed_of(seed, 4))
    unet, schedule = UNet(UNET), NoiseSchedule()

    def draw(samples, share, generator):
        index = shuffled(samples, len(latents), seed)
        x1 = latents[index]
        kept = torch.rand(len(samples), generator=generator) >= DROP
        prompts = [str(captions[i]) if keep else ""
                   for i, keep in zip(index.tolist(), kept.tolist())]
        s = torch.randint(schedule.timesteps, (len(samples),), generator=generator).float()
        return x1, torch.randn(x1.shape, generator=generator), s, prompts

    def loss(unet, x1, noise, s, prompts):
        return noise_loss(unet, schedule, x1, noise, s, encode(prompts)), schedule.time(s)

    options = TrainingOptions(
        iterations, 64, learning_rate=1e-3, weight_decay=0.01, warmup_samples=64_000, cooldown=0.3,
        ema_half_life=50_000, ema_ramp=EMA_RAMP, save_every=500, log_every=50, seed=seed,
    )
    train(unet, draw, loss, options, folder / "unet", {"data": len(latents)}, "4 U-Net")
    return unet


# --------------------------------------------------------------------------------------------------
# How good it is


def minutes_of(folder: Path, steps: int | None = None) -> float:
    """Minutes that a stage takes, or its first steps.

    By the median of its seconds a step, so that pauses do not count.
    """
    rows = read_metrics(folder)
    seconds = statistics.median(row["seconds_per_step"] for row in rows)
    return round((steps or rows[-1]["step"]) * seconds / 60, 1)


def measure(model: StableDiffusion, reader: shapes.Reader, seed: int) -> dict:
    """Shares of right pictures and Fréchet distances, on noises and pictures never trained on."""
    share = lambda pictures, captions: sum(shapes.right(reader, pictures, captions)) / len(captions)
    seeds = seeds_in("evaluation", seed, MEASURED)
    figures = {"pictures": MEASURED, "teacher_steps": TEACHER_STEPS, "guidance": model.guidance}
    kinds = {"full": shapes.full_captions, "open": shapes.open_captions,
             "mixed": shapes.random_captions}
    for kind, make in kinds.items():
        captions = make(MEASURED, seed)
        drawn = shapes.drawn(captions, seed)
        prompts = [str(caption) for caption in captions]
        with tqdm(total=MEASURED, desc=f"5 figures, {kind} captions") as bar:
            pictures = draw_pictures(model, prompts, seeds, TEACHER_STEPS, bar=bar)
        with torch.inference_mode():
            # Other pictures of the same captions, as the teacher's are; the same ones would flatter
            # the autoencoder.
            others = shapes.drawn(captions, seed + 1)
            rebuilt = torch.cat([
                model.vae.decode(model.vae.encode_latents(part)) for part in others.split(250)
            ])
            real = reader.features(drawn)
            figures[kind] = {
                "reader_on_drawn": share(drawn, captions),
                "reconstructions": share(rebuilt, captions),
                "teacher": share(pictures, captions),
                "frechet_floor": frechet_distance(real, reader.features(others)),
                "frechet_reconstructions": frechet_distance(real, reader.features(rebuilt)),
                "frechet_teacher": frechet_distance(real, reader.features(pictures)),
            }
    return figures


# --------------------------------------------------------------------------------------------------


def main():
    parser = Parser("Train the tiny Stable Diffusion and its judge, from nothing.")
    parser.add_argument(
        "--out", default=str(HERE / "toy" / "tiny_sd.safetensors"),
        help="the model; the reader lands beside it"
    )
    parser.add_argument("--work", default="runs/teacher", help="folder of the training states")
    parser.add_argument("--data", type=positive, default=100_000,
                        help="pictures to draw for the U-Net")
    parser.add_argument("--reader-iterations", type=positive, default=3000)
    parser.add_argument("--autoencoder-iterations", type=positive, default=1500)
    parser.add_argument("--text-iterations", type=positive, default=2000)
    parser.add_argument("--unet-iterations", type=positive, default=6000)
    parser.add_argument("--seed", type=run_seed, default=0)
    args = parser.parse_args()
    check_output(args.out)
    folder, seed = Path(args.work), args.seed

    vocabulary, merges = make_vocabulary()
    text_config = replace(TEXT, vocab_size=len(vocabulary))
    tokenizer = tokenizer_from(vocabulary, merges)

    def ids_of(prompts: list[str]) -> torch.Tensor:
        return tokenize(tokenizer, prompts, text_config.max_position_embeddings)

    reader = train_reader(args.reader_iterations, folder, seed)
    vae = train_autoencoder(args.autoencoder_iterations, folder, seed)
    text_encoder = train_text(args.text_iterations, folder, seed, ids_of, text_config)

    @torch.no_grad()
    def encode(prompts: list[str]) -> torch.Tensor:
        return text_encoder(ids_of(prompts))

    latents, captions, deviation = latent_data(vae, args.data, seed)
    # Latents of unit size, as SD's 0.18215 makes them.
    vae.config = replace(vae.config, scaling_factor=1 / deviation)
    unet = train_unet(
        args.unet_iterations, folder, seed, vae.config.scaling_factor * latents, captions, encode
    )

    out = Path(args.out)
    model = StableDiffusion(unet, vae, text_encoder, tokenizer, "diffusion", family="shapes")
    checkpoint.save(model, out)
    reader_tensors = {name: tensor.half() for name, tensor in reader.state_dict().items()}
    write_whole(out.with_name("reader.safetensors"), lambda path: save_file(reader_tensors, path))
    prompts = [str(caption) for caption in shapes.training_captions(CAPTIONS, seed)]
    write_text(out.with_name("captions.txt"), "\n".join(prompts) + "\n")

    figures = {
        "command": " ".join(["python toy/train_teacher.py", *sys.argv[1:]]),
        "seed": seed,
        "machine": f"{machine_name(torch.device('cpu'))}, torch {torch.__version__}",
    }
    figures["minutes"] = {}
    for stage in ("reader", "autoencoder", "text", "unet"):
        figures["minutes"][stage] = minutes_of(folder / stage)
        plot_loss(folder / stage)
    figures |= measure(
        checkpoint.load(out), shapes.load_reader(out.with_name("reader.safetensors")), seed + 1
    )
    write_json(out.with_suffix(".json"), figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    run(main)
