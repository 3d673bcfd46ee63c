"""The tiny world: captioned pictures of shapes, and a reader that reads captions back from them.

A scene is one or two of {circle, square, triangle} in {red, green, blue, yellow, white} on gray,
32 x 32 pixels. Two objects stand above one another or side by side. A caption such as

    "a red circle above a blue square"    "a shape left of a white triangle"    "a green shape"

leaves attributes out at random ("shape" for any shape, "and" for any arrangement), so that what a
caption allows is many pictures, as with real captions. A picture is right when everything that its
caption says is in it.

`Reader` is the judge of all experiments: a small network that reads count, arrangement, shapes and
colours back. Its last hidden layer gives the features for the Fréchet distance. It never takes part
in training a model.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
RELATIONS = ("above", "below", "left of", "right of", "and")
OMIT = 0.25  # probability with which a caption leaves one attribute out
MEASURED_ONE_IN = 5  # captions: one is kept for measuring, the others are for training on
ONE_OBJECT = 0.15  # share of scenes with a single object
RADIUS = (4.5, 6.5)  # pixels from an object's centre to its edge
READER = Path(__file__).with_name("reader.safetensors")


# --------------------------------------------------------------------------------------------------
# Captions


@dataclass(frozen=True)
class Phrase:
    """One object of a caption; None is an attribute left out."""

    color: str | None
    shape: str | None

    def __str__(self) -> str:
        return " ".join(["a"] + ([self.color] if self.color else []) + [self.shape or "shape"])


@dataclass(frozen=True)
class Caption:
    """One phrase, or two and how they stand to each other ("and" leaves that open)."""

    first: Phrase
    relation: str | None = None
    second: Phrase | None = None

    def __str__(self) -> str:
        if self.second is None:
            return str(self.first)
        return f"{self.first} {self.relation} {self.second}"

    @property
    def is_full(self) -> bool:
        """Nothing is left out, and there are two objects to tell apart."""
        phrases = (self.first, self.second)
        return self.second is not None and self.relation != "and" and all(
            p.color and p.shape for p in phrases
        )


def parse(text: str) -> Caption:
    """The caption of a text that `Caption` wrote. ValueError for any other text."""
    for relation in RELATIONS:
        if f" {relation} " in text:
            first, second = text.split(f" {relation} ")
            return Caption(parse_phrase(first), relation, parse_phrase(second))
    return Caption(parse_phrase(text))


def parse_phrase(text: str) -> Phrase:
    words = text.split()
    color, shape = (
        (words[1:] if len(words) == 3 else [None, *words[1:]])
        if words[:1] == ["a"] else (None, None)
    )
    if shape not in (*SHAPES, "shape") or color not in (None, *COLORS):
        raise ValueError(f"{text!r} is not a phrase of the shapes' captions")
    return Phrase(color, None if shape == "shape" else shape)


# --------------------------------------------------------------------------------------------------
# Scenes


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Objects in picture order: the upper or the left one first."""

    arrangement: str
    objects: tuple[tuple[str, str], ...]  # (color, shape)


def scene_of(caption: Caption, rng: random.Random) -> Scene:
    """A scene that the caption allows; what it leaves out is drawn evenly."""

    def fill(phrase: Phrase) -> tuple[str, str]:
        return phrase.color or rng.choice(COLORS), phrase.shape or rng.choice(SHAPES)

    if caption.second is None:
        return Scene("one", (fill(caption.first),))
    relation = caption.relation if caption.relation != "and" else rng.choice(RELATIONS[:4])
    objects = fill(caption.first), fill(caption.second)
    if relation in ("below", "right of"):
        objects = objects[::-1]
    return Scene("vertical" if relation in ("above", "below") else "horizontal", objects)


def random_caption(rng: random.Random) -> Caption:
    def keep(word: str) -> str | None:
        return None if rng.random() < OMIT else word

    def phrase() -> Phrase:
        return Phrase(keep(rng.choice(COLORS)), keep(rng.choice(SHAPES)))

    if rng.random() < ONE_OBJECT:
        return Caption(phrase())
    return Caption(phrase(), keep(rng.choice(RELATIONS[:4])) or "and", phrase())


def random_captions(count: int, seed: int) -> list[Caption]:
    """Captions as the models are trained on."""
    rng = random.Random(seed)
    return [random_caption(rng) for _ in range(count)]


def full_captions(count: int, seed: int) -> list[Caption]:
    """Two-object captions with nothing left out: the hardest to obey."""
    rng = random.Random(seed)
    phrases = lambda: Phrase(rng.choice(COLORS), rng.choice(SHAPES))
    return [Caption(phrases(), rng.choice(RELATIONS[:4]), phrases()) for _ in range(count)]


def chosen_captions(count: int, seed: int, wanted: Callable[[Caption], bool]) -> list[Caption]:
    """Captions as the models are trained on, of those alone that are wanted."""
    rng, captions = random.Random(seed), []
    while len(captions) < count:
        caption = random_caption(rng)
        if wanted(caption):
            captions.append(caption)
    return captions


def open_captions(count: int, seed: int) -> list[Caption]:
    """Two-object captions with the arrangement and at least two attributes left out.

    Many pictures are right.
    """

    def is_open(caption: Caption) -> bool:
        if caption.second is None or caption.relation != "and":
            return False
        return [word for p in (caption.first, caption.second)
                for word in (p.color, p.shape)].count(None) >= 2

    return chosen_captions(count, seed, is_open)


def single_captions(count: int, seed: int) -> list[Caption]:
    """Captions of one object, of which colour or shape or both may be left out."""
    return chosen_captions(count, seed, lambda caption: caption.second is None)


def is_for_measuring(caption: Caption) -> bool:
    """Is this caption one of those that no list to train on has?

    Its text decides, so that it is so in every list.
    """
    # The second byte, of all the one with a fifth of each kind: of one object, of two, of those
    # that leave much open.
    return hashlib.sha256(str(caption).encode()).digest()[1] % MEASURED_ONE_IN == 0


def captions_of_part(measuring: bool, count: int, seed: int, make: Callable) -> list[Caption]:
    """The first `count` captions of make(..., seed) that are for measuring, or that are not."""
    drawn, captions = 2 * count, []
    while len(captions) < count:
        captions = [caption for caption in make(drawn, seed)
                    if is_for_measuring(caption) == measuring]
        drawn *= 2
    return captions[:count]


def training_captions(
    count: int, seed: int, make: Callable[[int, int], list[Caption]] = random_captions,
) -> list[Caption]:
    """Captions to make pairs with: four fifths of all that there are."""
    return captions_of_part(False, count, seed, make)


def measuring_captions(
    count: int, seed: int, make: Callable[[int, int], list[Caption]] = random_captions,
) -> list[Caption]:
    """Captions to measure on: the other fifth."""
    return captions_of_part(True, count, seed, make)


def obeys(scene: Scene, caption: Caption) -> bool:
    """Does the scene show everything that the caption says?"""

    def fits(phrase: Phrase, thing: tuple[str, str]) -> bool:
        return phrase.color in (None, thing[0]) and phrase.shape in (None, thing[1])

    if caption.second is None:
        return scene.arrangement == "one" and fits(caption.first, scene.objects[0])
    if scene.arrangement == "one":
        return False
    in_order = fits(caption.first, scene.objects[0]) and fits(caption.second, scene.objects[1])
    swapped = fits(caption.first, scene.objects[1]) and fits(caption.second, scene.objects[0])
    if caption.relation == "and":
        return in_order or swapped
    if scene.arrangement != (
        "vertical" if caption.relation in ("above", "below") else "horizontal"
    ):
        return False
    return swapped if caption.relation in ("below", "right of") else in_order


# --------------------------------------------------------------------------------------------------
# Pictures


def draw(scenes: list[Scene], seed: int) -> Tensor:
    """Pictures of the scenes, (B, 3, 32, 32) in [-1, 1]; places and sizes are drawn from the seed.

    Edges are anti-aliased: a pixel's coverage falls from 1 to 0 over one pixel around the signed
    distance 0.
    """
    rng = torch.Generator().manual_seed(seed)
    count = len(scenes)
    uniform = lambda *shape: 2 * torch.rand(*shape, generator=rng) - 1
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * torch.rand(count, 2, generator=rng)
    centre = SIZE / 2 + 2.5 * uniform(count, 2, 2)  # (B, object, (x, y))
    alone = SIZE / 2 + 7.0 * uniform(count, 2)
    axis = torch.tensor([ARRANGEMENTS.index(scene.arrangement) for scene in scenes])
    apart = 7.5 + uniform(count)
    for k, side in enumerate((-1, 1)):
        centre[:, k, 1] += side * apart * (axis == 1)
        centre[:, k, 0] += side * apart * (axis == 2)
    centre[axis == 0, 0] = alone[axis == 0]

    pixels = torch.arange(SIZE) + 0.5
    images = torch.full((count, 3, SIZE, SIZE), GRAY)
    for k in range(2):
        things = [scene.objects[k] if k < len(scene.objects) else None for scene in scenes]
        shape = torch.tensor(
            [SHAPES.index(thing[1]) if thing else -1 for thing in things]
        )[:, None, None]
        color = RGB[[COLORS.index(thing[0]) if thing else 0 for thing in things]][:, :, None, None]
        # (B, 32, 32)
        dx = (pixels[None, None, :] - centre[:, k, 0, None, None]).expand(-1, SIZE, -1)
        dy = (pixels[None, :, None] - centre[:, k, 1, None, None]).expand(-1, -1, SIZE)
        r = radius[:, k, None, None]
        circle = (dx**2 + dy**2).sqrt() - r
        square = torch.maximum(dx.abs(), dy.abs()) - 0.9 * r
        # Upright, of height 1.9 r: the base, and both slanted sides at once.
        triangle = torch.maximum(
            dy - 0.85 * r, (dx.abs() * 1.9 - (dy + 1.05 * r)) / (1 + 1.9**2) ** 0.5
        )
        distance = torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))
        coverage = ((0.5 - distance).clamp(0, 1) * (shape >= 0))[:, None]  # (B, 1, 32, 32)
        images = coverage * color + (1 - coverage) * images
    return images


def drawn(captions: list[Caption], seed: int) -> Tensor:
    """Real pictures for captions: what a perfect model would draw. (B, 3, 32, 32)."""
    rng = random.Random(seed)
    return draw([scene_of(caption, rng) for caption in captions], seed)


# --------------------------------------------------------------------------------------------------
# What train_teacher.py asks of a world


def words() -> set[str]:
    """Every word that captions have."""
    return {"a", "and", "of", "shape", *SHAPES, *COLORS, "above", "below", "left", "right"}


def random_scenes(count: int, generator: torch.Generator) -> tuple[list[Caption], list[Scene]]:
    """Random captions and a scene that obeys each."""
    rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    captions = [random_caption(rng) for _ in range(count)]
    return captions, [scene_of(caption, rng) for caption in captions]


def random_pictures(count: int, generator: torch.Generator) -> Tensor:
    """Pictures for an autoencoder to learn from, (count, 3, 32, 32) in [-1, 1]."""
    _, scenes = random_scenes(count, generator)
    return draw(scenes, int(torch.randint(2**62, (1,), generator=generator)))


def teacher_data(count: int, seed: int) -> tuple[Iterator[Tensor], Callable]:
    """`count` pictures in batches, and caption_of(number of a picture, random.Random)."""
    captions = random_captions(count, seed)
    starts = range(0, count, 500)
    batches = (drawn(captions[k : k + 500], seed_of(seed, k)) for k in starts)
    return batches, lambda number, rng: str(captions[number])


# --------------------------------------------------------------------------------------------------
# The reader

HEADS = {"arrangement": ARRANGEMENTS, "color 0": COLORS, "shape 0": SHAPES,
         "color 1": COLORS, "shape 1": SHAPES}


class Reader(nn.Module):
    """Pictures (B, 3, 32, 32) -> features (B, 64) -> logits for every attribute in HEADS."""

    def __init__(self):
        super().__init__()
        widths = [3, 24, 48, 96]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:])
        )
        self.hidden = nn.Linear(96 * 4 * 4, 64)
        self.heads = nn.Linear(64, sum(len(values) for values in HEADS.values()))

    def features(self, images: Tensor) -> Tensor:
        h = images
        for convolution in self.convolutions:
            h = F.max_pool2d(F.relu(convolution(h)), 2)
        return F.relu(self.hidden(h.flatten(1)))

    def answers(self, features: Tensor) -> tuple[Tensor, ...]:
        return self.heads(features).split([len(values) for values in HEADS.values()], dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.answers(self.features(images))


def labels_of(scenes: list[Scene]) -> Tensor:
    """(B, 5) indices into HEADS; -100, which cross entropy skips, for a missing second object."""
    rows = []
    for scene in scenes:
        row = [ARRANGEMENTS.index(scene.arrangement)]
        for color, shape in scene.objects:
            row += [COLORS.index(color), SHAPES.index(shape)]
        rows.append(row + [-100] * (5 - len(row)))
    return torch.tensor(rows)


@torch.no_grad()
def read(reader: Reader, features: Tensor) -> list[Scene]:
    """What the reader sees in each picture, from its features (B, 64)."""
    best = torch.stack([logits.argmax(1) for logits in reader.answers(features)], dim=1).tolist()
    scenes = []
    for arrangement, *things in best:
        objects = tuple((COLORS[c], SHAPES[s]) for c, s in (things[:2], things[2:]))
        scenes.append(
            Scene(ARRANGEMENTS[arrangement], objects[:1] if arrangement == 0 else objects)
        )
    return scenes


def load_reader(path: str | Path = READER) -> Reader:
    reader = Reader()
    reader.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return reader.eval()


# --------------------------------------------------------------------------------------------------
# What evaluation/judge.py asks beside measuring_captions, drawn and load_reader


@torch.no_grad()
def real_features(reader: Reader, captions: list[Caption], seed: int) -> Tensor:
    """What the reader sees in drawn pictures, (N, 64)."""
    return reader.features(drawn(captions, seed))


def right(reader: Reader, features: Tensor, captions: list[Caption]) -> list[bool]:
    """For each picture: does it show everything that its caption says?"""
    return [obeys(scene, caption) for scene, caption in zip(read(reader, features), captions)]


# Which captions train_teacher.py measures a teacher on.
KINDS = {"full": full_captions, "open": open_captions, "mixed": random_captions}
