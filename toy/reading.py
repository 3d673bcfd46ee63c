"""What a world's captions mean, learned before its teacher is trained; and the judge of shapes.

    reader   the judge: names count, arrangement, shapes and colours of drawn pictures; it trains no
             other network
    text     a causal transformer that answers, from the end token on, what a caption asks for: of
             shapes, what is where; of emoji, which of all pictures it belongs to, in EfficientNet's
             features (CLIP's question, Radford et al. 2021, arXiv 2103.00020)

The second is what CLIP's pre-training is to Stable Diffusion: the U-Net meets words whose meaning
is already worked out. Without it a U-Net of this size hardly ever learns which colour belongs to
which shape at which place, above all when the caption names the lower object first.
"""

import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import emoji
import shapes
from text_encoder import TextEncoder, TextEncoderConfig
from training import TrainingOptions, seed_of, train

EMA_RAMP = 0.05  # the half-life of the averaged weights is at most this share of the samples seen
UNKNOWN = "unknown"  # what a caption leaves open, as a class of the text stage


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
        _, scenes = shapes.random_scenes(len(samples), generator)
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


class ShapesText(nn.Module):
    """The text encoder with heads that say what is where: one answer from every token."""

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

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> tuple[list[str], torch.Tensor]:
        """Captions, and the right answers as indices into `questions`, (count, 5)."""
        captions, _ = shapes.random_scenes(count, generator)
        return [str(caption) for caption in captions], torch.tensor([*map(answers_of, captions)])


def answers_of(caption: shapes.Caption) -> list[int]:
    """Objects in picture order where the caption fixes it, else in its own."""
    phrases = [caption.first] + ([caption.second] if caption.second else [])
    if caption.relation in ("below", "right of"):
        phrases.reverse()
    known = {"above": "vertical", "below": "vertical",
             "left of": "horizontal", "right of": "horizontal"}
    words = ["one" if caption.second is None else known.get(caption.relation, UNKNOWN)]
    for phrase in phrases:
        words += [phrase.color or UNKNOWN, phrase.shape or UNKNOWN]
    words += [UNKNOWN] * (5 - len(words))
    return [answers.index(word) for answers, word in zip(ShapesText.questions.values(), words)]


class EmojiText(nn.Module):
    """The text encoder beside a linear map of the pictures' features, both into one space."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.text_encoder = TextEncoder(config)
        features = emoji.features()[emoji.training_rows()]  # (N, emoji.FEATURES)
        self.register_buffer("features", features / features.std(0))
        self.of_text = nn.Linear(config.hidden_size, emoji.FEATURES)
        self.of_pictures = nn.Linear(emoji.FEATURES, emoji.FEATURES)
        self.sharpness = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # as CLIP begins

    def forward(self, token_ids: torch.Tensor) -> list[torch.Tensor]:
        text = F.normalize(self.of_text(self.text_encoder(token_ids)), dim=-1)  # (B, L, features)
        pictures = F.normalize(self.of_pictures(self.features), dim=-1)
        return [self.sharpness.exp() * text @ pictures.T]  # (B, L, N)

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> tuple[list[str], torch.Tensor]:
        """Captions, and the picture of each, (count, 1)."""
        rows = emoji.training_rows()
        chosen = torch.randint(len(rows), (count, 1), generator=generator)
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        return [emoji.training_caption(rows[k], rng) for k in chosen[:, 0].tolist()], chosen


TEXT_STAGES = {"shapes": ShapesText, "emoji": EmojiText}


def train_text(
    world: str, iterations: int, folder: Path, seed: int, tokenize, config: TextEncoderConfig,
) -> TextEncoder:
    torch.manual_seed(seed_of(seed, 3))
    model = TEXT_STAGES[world](config)

    def draw(samples, share, generator):
        captions, answers = model.draw(len(samples), generator)
        return tokenize(captions), answers

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

    train(model, draw, loss, classifier_options(iterations, seed), folder / "text", {}, "1 text")
    return model.text_encoder
