"""The first tiny dataset: captioned images of shapes, and a classifier that reads captions back.

A scene is one or two of {circle, square, triangle} in {red, green, blue, yellow, white} on gray,
32 x 32 pixels. Two objects stand above one another or side by side. A caption such as

    "a red circle above a blue square"    "a shape left of a white triangle"    "a green shape"

leaves attributes out at random ("shape" for any shape, "and" for any arrangement), so that, as with
real captions, many images match it. An image is right when it shows everything its caption says.

`Classifier` judges all experiments: a small network that predicts count, arrangement, shapes and
colours. Its last hidden layer gives the features for the Fréchet distance. It never takes part in
training a model.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from training import seed_of

SIZE = 32  # pixels along a side
SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow", "white")
RGB = torch.tensor([[220, 40, 40], [40, 160, 60], [50, 80, 225], [240, 215, 50],
                    [245, 245, 245]]) / 127.5 - 1
GRAY = 120 / 127.5 - 1
ARRANGEMENTS = ("one", "vertical", "horizontal")
RELATIONS = ("above", "below", "left of", "right of")  # a caption may also say "and"
# What the classifier predicts. Objects are in image order: the upper or the left one first.
ATTRIBUTES = {"arrangement": ARRANGEMENTS, "color 0": COLORS, "shape 0": SHAPES,
              "color 1": COLORS, "shape 1": SHAPES}
OMIT = 0.25  # probability that a caption leaves an attribute out
MEASURED_ONE_IN = 5  # captions: one is kept for evaluation, the others are for training
ONE_OBJECT = 0.15  # fraction of scenes with a single object
RADIUS = (4.5, 6.5)  # pixels from an object's centre to its edge
READER = Path(__file__).with_name("reader.safetensors")  # weights of the classifier


# --------------------------------------------------------------------------------------------------
# Captions


@dataclass(frozen=True)
class Phrase:
    """One object of a caption; None is an attribute left out."""

    color: str | None
    shape: str | None

    def __str__(self) -> str:
        return " ".join(filter(None, ("a", self.color, self.shape or "shape")))


@dataclass(frozen=True)
class Caption:
    """One phrase, or two and their relation: one of RELATIONS, or "and" for any."""

    first: Phrase
    relation: str | None = None
    second: Phrase | None = None

    def __str__(self) -> str:
        if self.second is None:
            return str(self.first)
        return f"{self.first} {self.relation} {self.second}"

    @property
    def arrangement(self) -> str | None:
        """One of ARRANGEMENTS; None for any of two objects."""
        return {None: "one", "above": "vertical", "below": "vertical", "left of": "horizontal",
                "right of": "horizontal", "and": None}[self.relation]

    @property
    def phrases(self) -> list[Phrase]:
        return [self.first] + ([self.second] if self.second else [])

    @property
    def omitted(self) -> int:
        """How many colours and shapes are left out."""
        return sum((phrase.color, phrase.shape).count(None) for phrase in self.phrases)


def in_image_order(relation: str | None, objects: list) -> list:
    """Objects in the order of a caption -> the upper or the left one first."""
    return objects[::-1] if relation in ("below", "right of") else objects


def parse(text: str) -> Caption:
    """The inverse of str(caption). ValueError: not such a text."""
    for relation in (*RELATIONS, "and"):
        if f" {relation} " in text:
            first, second = text.split(f" {relation} ")
            return Caption(parse_phrase(first), relation, parse_phrase(second))
    return Caption(parse_phrase(text))


def parse_phrase(text: str) -> Phrase:
    for color, shape in itertools.product((None, *COLORS), (None, *SHAPES)):
        phrase = Phrase(color, shape)
        if str(phrase) == text:
            return phrase
    raise ValueError(f"{text!r} is not a phrase of the shapes' captions")


def random_caption(rng: random.Random) -> Caption:
    keep = lambda word: None if rng.random() < OMIT else word
    phrase = lambda: Phrase(keep(rng.choice(COLORS)), keep(rng.choice(SHAPES)))
    if rng.random() < ONE_OBJECT:
        return Caption(phrase())
    return Caption(phrase(), keep(rng.choice(RELATIONS)) or "and", phrase())


def random_captions(count: int, seed: int, wanted: Callable | None = None) -> list[Caption]:
    """Captions from the training distribution; only those for which wanted(caption) is true."""
    rng = random.Random(seed)
    captions = (random_caption(rng) for _ in itertools.count())
    return list(itertools.islice(filter(wanted, captions), count))


def full_captions(count: int, seed: int) -> list[Caption]:
    """Two-object captions with nothing left out: the hardest to follow."""
    rng = random.Random(seed)
    phrase = lambda: Phrase(rng.choice(COLORS), rng.choice(SHAPES))
    return [Caption(phrase(), rng.choice(RELATIONS), phrase()) for _ in range(count)]


def open_captions(count: int, seed: int) -> list[Caption]:
    """Two-object captions with the arrangement and two or more attributes left out."""
    return random_captions(count, seed, lambda c: c.relation == "and" and c.omitted >= 2)


def single_captions(count: int, seed: int) -> list[Caption]:
    """Captions of one object, whose colour or shape or both may be left out."""
    return random_captions(count, seed, lambda caption: caption.second is None)


def is_for_measuring(caption: Caption) -> bool:
    """Is the caption held out from training? Its text alone decides."""
    # The second byte: it holds out a fifth of each kind (single, full, open), others do not.
    return hashlib.sha256(str(caption).encode()).digest()[1] % MEASURED_ONE_IN == 0


def captions_of_split(measuring: bool, count: int, seed: int, make: Callable) -> list[Caption]:
    """The first `count` captions of make(..., seed) on this side of the split."""
    size, captions = 2 * count, []
    while len(captions) < count:
        captions = [c for c in make(size, seed) if is_for_measuring(c) == measuring]
        size *= 2
    return captions[:count]


def training_captions(count: int, seed: int, make: Callable = random_captions) -> list[Caption]:
    """Captions for making pairs: four fifths of those of make(count, seed)."""
    return captions_of_split(False, count, seed, make)


def measuring_captions(count: int, seed: int, make: Callable = random_captions) -> list[Caption]:
    """Held-out captions, for evaluation: the other fifth."""
    return captions_of_split(True, count, seed, make)


# --------------------------------------------------------------------------------------------------
# Scenes and images


@dataclass(frozen=True)
class Scene:
    """What an image shows. Objects in image order: the upper or the left one first."""

    arrangement: str
    objects: tuple[tuple[str, str], ...]  # (color, shape)


def scene_of(caption: Caption, rng: random.Random) -> Scene:
    """A scene that matches the caption; what the caption leaves out is uniformly random."""
    if caption.relation == "and":
        caption = replace(caption, relation=rng.choice(RELATIONS))
    objects = [(phrase.color or rng.choice(COLORS), phrase.shape or rng.choice(SHAPES))
               for phrase in caption.phrases]
    return Scene(caption.arrangement, tuple(in_image_order(caption.relation, objects)))


def obeys(scene: Scene, caption: Caption) -> bool:
    """Does the scene show everything that the caption says?"""
    phrases = in_image_order(caption.relation, caption.phrases)

    def fits(objects: tuple) -> bool:
        return all(phrase.color in (None, color) and phrase.shape in (None, shape)
                   for phrase, (color, shape) in zip(phrases, objects))

    if caption.relation == "and":
        return scene.arrangement != "one" and (fits(scene.objects) or fits(scene.objects[::-1]))
    return scene.arrangement == caption.arrangement and fits(scene.objects)


def labels_of(scenes: list[Scene]) -> Tensor:
    """(B, 5) indices into ATTRIBUTES; -100, which cross entropy skips, without a second object."""
    rows = []
    for scene in scenes:
        words = [scene.arrangement, *itertools.chain(*scene.objects)]
        row = [values.index(word) for values, word in zip(ATTRIBUTES.values(), words)]
        rows.append(row + [-100] * (5 - len(row)))
    return torch.tensor(rows)


def draw(scenes: list[Scene], seed: int) -> Tensor:
    """Images of the scenes, (B, 3, 32, 32) in [-1, 1]; the seed decides places and sizes."""
    rng = torch.Generator().manual_seed(seed)
    labels, count = labels_of(scenes), len(scenes)
    uniform = lambda *shape: 2 * torch.rand(*shape, generator=rng) - 1
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * torch.rand(count, 2, generator=rng)
    centre = SIZE / 2 + 2.5 * uniform(count, 2, 2)  # (B, object, (x, y))
    alone = SIZE / 2 + 7.0 * uniform(count, 2)
    arrangement = labels[:, 0]
    apart = 7.5 + uniform(count)
    for k, side in enumerate((-1, 1)):
        centre[:, k, 1] += side * apart * (arrangement == 1)
        centre[:, k, 0] += side * apart * (arrangement == 2)
    centre[arrangement == 0, 0] = alone[arrangement == 0]

    pixels = torch.arange(SIZE) + 0.5
    images = torch.full((count, 3, SIZE, SIZE), GRAY)
    for k in range(2):
        color = RGB[labels[:, 1 + 2 * k].clamp(min=0)][:, :, None, None]  # (B, 3, 1, 1)
        shape = labels[:, 2 + 2 * k, None, None]  # negative: no such object
        dx = (pixels[None, None, :] - centre[:, k, 0, None, None]).expand(-1, SIZE, -1)
        dy = (pixels[None, :, None] - centre[:, k, 1, None, None]).expand(-1, -1, SIZE)
        r = radius[:, k, None, None]
        circle = (dx**2 + dy**2).sqrt() - r  # (B, 32, 32)
        square = torch.maximum(dx.abs(), dy.abs()) - 0.9 * r
        slanted = (dx.abs() * 1.9 - (dy + 1.05 * r)) / (1 + 1.9**2) ** 0.5  # both sides at once
        triangle = torch.maximum(dy - 0.85 * r, slanted)  # upright, of height 1.9 r
        distance = torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))
        # Anti-aliased: coverage falls from 1 to 0 over one pixel around the signed distance 0.
        coverage = ((0.5 - distance).clamp(0, 1) * (shape >= 0))[:, None]  # (B, 1, 32, 32)
        images = coverage * color + (1 - coverage) * images
    return images


def real_images(captions: list[Caption], seed: int) -> Tensor:
    """A real image for each caption, as from a perfect model: (B, 3, 32, 32)."""
    rng = random.Random(seed)
    return draw([scene_of(caption, rng) for caption in captions], seed)


# --------------------------------------------------------------------------------------------------
# For train_teacher.py


def words() -> set[str]:
    """All words of the captions."""
    return {"a", "and", "of", "shape", *SHAPES, *COLORS, "above", "below", "left", "right"}


def random_scenes(count: int, generator: torch.Generator) -> tuple[list[Caption], list[Scene]]:
    """Random captions and a scene that matches each."""
    rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    captions = [random_caption(rng) for _ in range(count)]
    return captions, [scene_of(caption, rng) for caption in captions]


def random_images(count: int, generator: torch.Generator) -> Tensor:
    """Images to train an autoencoder on, (count, 3, 32, 32) in [-1, 1]."""
    _, scenes = random_scenes(count, generator)
    return draw(scenes, int(torch.randint(2**62, (1,), generator=generator)))


def teacher_data(count: int, seed: int) -> tuple[Iterator[Tensor], Callable]:
    """`count` images in batches, and caption_of(index of an image, random.Random)."""
    captions = random_captions(count, seed)
    batches = (real_images(captions[k : k + 500], seed_of(seed, k)) for k in range(0, count, 500))
    return batches, lambda index, rng: str(captions[index])


# Captions that train_teacher.py evaluates a teacher on.
KINDS = {"full": full_captions, "open": open_captions, "mixed": random_captions}


# --------------------------------------------------------------------------------------------------
# The judge (evaluation/judge.py): measuring_captions, real_images, and these


class Classifier(nn.Module):
    """Images (B, 3, 32, 32) -> features (B, 64) -> logits of each of the ATTRIBUTES."""

    def __init__(self):
        super().__init__()
        channels = [(3, 24), (24, 48), (48, 96)]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in channels)
        self.hidden = nn.Linear(96 * 4 * 4, 64)
        self.heads = nn.Linear(64, sum(map(len, ATTRIBUTES.values())))

    def features(self, images: Tensor) -> Tensor:
        h = images
        for convolution in self.convolutions:
            h = F.max_pool2d(F.relu(convolution(h)), 2)
        return F.relu(self.hidden(h.flatten(1)))

    def logits(self, features: Tensor) -> tuple[Tensor, ...]:
        return self.heads(features).split([*map(len, ATTRIBUTES.values())], dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.logits(self.features(images))


def load_reader(path: str | Path = READER) -> Classifier:
    classifier = Classifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return classifier.eval()


@torch.no_grad()
def real_features(classifier: Classifier, captions: list[Caption], seed: int) -> Tensor:
    """Features of a real image for each caption, (N, 64)."""
    return classifier.features(real_images(captions, seed))


@torch.no_grad()
def right(classifier: Classifier, features: Tensor, captions: list[Caption]) -> list[bool]:
    """For each image, from its features (B, 64): does it show everything that its caption says?"""
    best = torch.stack([logits.argmax(1) for logits in classifier.logits(features)], dim=1)
    answers = []
    for (arrangement, *things), caption in zip(best.tolist(), captions):
        objects = tuple((COLORS[c], SHAPES[s]) for c, s in (things[:2], things[2:]))
        scene = Scene(ARRANGEMENTS[arrangement], objects[: 1 if arrangement == 0 else 2])
        answers.append(obeys(scene, caption))
    return answers
