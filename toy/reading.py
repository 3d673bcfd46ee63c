"""Train, before a tiny teacher, its text transformer and the classifier that judges shapes.

    classifier   predicts count, arrangement, shapes and colours of shapes' images
    text         a causal transformer whose end token predicts what the caption says: for shapes,
                 what is where; for emoji, which of all images it belongs to, in EfficientNet's
                 features (as CLIP does, Radford et al. 2021, arXiv 2103.00020)

The text stage is what CLIP's pre-training is to Stable Diffusion: the U-Net's words have a meaning
from the start. Without it, a U-Net of this size hardly ever learns which colour belongs to which
shape at which place, least of all when the caption names the lower object first.
"""

import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from text_encoder import TextEncoder, TextEncoderConfig
from toy import emoji, shapes
from training import TrainingOptions, ema_copy, seed_of, train

EMA_RAMP = 0.05  # limit the EMA's half-life to this fraction of the samples seen
UNKNOWN = "unknown"  # class of an attribute that the caption leaves out


def classifier_options(iterations: int, seed: int, name: str) -> TrainingOptions:
    """Of both stages, which are both classifications."""
    return TrainingOptions(
        iterations, 128, learning_rate=1e-3, warmup_samples=12_800, ema_half_life=50_000,
        ema_ramp=EMA_RAMP, save_every=500, seed=seed, name=name,
    )


def train_classifier(iterations: int, folder: Path, seed: int) -> shapes.Classifier:
    torch.manual_seed(seed_of(seed, 1))
    classifier = shapes.Classifier()

    def batch(samples, share, generator):
        _, scenes = shapes.random_scenes(len(samples), generator)
        images = shapes.draw(scenes, int(torch.randint(2**62, (1,), generator=generator)))
        # Blurred and noisy images too, so that it judges the content and not the quality.
        blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        is_blurred = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.3
        images = torch.where(is_blurred, blurred, images)
        noise = torch.randn(images.shape, generator=generator)
        images = images + 0.3 * torch.rand(len(images), 1, 1, 1, generator=generator) * noise
        return images, shapes.labels_of(scenes)

    def loss(classifier, images, labels):
        return sum(F.cross_entropy(logits, label, reduction="none")
                   for logits, label in zip(classifier(images), labels.T)), None

    options = classifier_options(iterations, seed, "1 classifier")
    train(classifier, ema_copy(classifier), batch, loss, options, folder / "reader", {})
    return classifier


class ShapesText(nn.Module):
    """The text encoder with a linear head that predicts shapes.ATTRIBUTES from every token."""

    attributes = [(*values, UNKNOWN) for values in shapes.ATTRIBUTES.values()]

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.text_encoder = TextEncoder(config)
        self.heads = nn.Linear(config.hidden_size, sum(map(len, self.attributes)))

    def forward(self, token_ids: Tensor) -> tuple[Tensor, ...]:
        logits = self.heads(self.text_encoder(token_ids))  # (B, L, all values)
        return logits.split([*map(len, self.attributes)], dim=-1)

    def batch(self, count: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
        """Captions, and their attributes as indices, (count, 5)."""
        captions, _ = shapes.random_scenes(count, generator)
        return [str(caption) for caption in captions], torch.tensor([*map(self.labels, captions)])

    def labels(self, caption: shapes.Caption) -> list[int]:
        """Objects in image order where the caption fixes it, else in the caption's."""
        words = [caption.arrangement]
        for phrase in shapes.in_image_order(caption.relation, caption.phrases):
            words += [phrase.color, phrase.shape]
        words += [None] * (len(self.attributes) - len(words))
        return [values.index(word or UNKNOWN) for values, word in zip(self.attributes, words)]


class EmojiText(nn.Module):
    """The text encoder, and a linear map each of text and image features into one space."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.text_encoder = TextEncoder(config)
        features = emoji.features()[emoji.training_rows()]  # (N, emoji.FEATURES)
        self.register_buffer("features", features / features.std(0))
        self.of_text = nn.Linear(config.hidden_size, emoji.FEATURES)
        self.of_pictures = nn.Linear(emoji.FEATURES, emoji.FEATURES)
        self.sharpness = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's initial value

    def forward(self, token_ids: Tensor) -> tuple[Tensor]:
        text = F.normalize(self.of_text(self.text_encoder(token_ids)), dim=-1)  # (B, L, features)
        images = F.normalize(self.of_pictures(self.features), dim=-1)
        return (self.sharpness.exp() * text @ images.T,)  # (B, L, N)

    def batch(self, count: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
        """Captions, and the image of each, (count, 1)."""
        rows = emoji.training_rows()
        chosen = torch.randint(len(rows), (count, 1), generator=generator)
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        return [emoji.training_caption(rows[k], rng) for k in chosen[:, 0].tolist()], chosen


def train_text(
    dataset: str, config: TextEncoderConfig, iterations: int, folder: Path, seed: int, tokenize,
) -> TextEncoder:
    torch.manual_seed(seed_of(seed, 3))
    model = {"shapes": ShapesText, "emoji": EmojiText}[dataset](config)
    end_token = config.vocab_size - 1  # the last of the vocabulary

    def batch(samples, share, generator):
        captions, labels = model.batch(len(samples), generator)
        return tokenize(captions), labels

    def loss(model, token_ids, labels):
        after_end = (token_ids == end_token).float()
        total = 0
        for logits, label in zip(model(token_ids), labels.T):
            target = label[:, None].expand_as(token_ids)
            each = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
            total = total + (each * after_end).sum(1) / after_end.sum(1)
        return total, None

    options = classifier_options(iterations, seed, "1 text")
    train(model, ema_copy(model), batch, loss, options, folder / "text", {})
    return model.text_encoder
