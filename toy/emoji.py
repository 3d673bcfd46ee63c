"""The second tiny world: emoji, real pictures that people drew, with captions in their own words.

    python toy/emoji.py             fetches the pictures (npm, 160 MB) into runs/emoji/
    python toy/emoji.py --judge     and makes emoji.json and emoji.safetensors again

Some 570 things (animals, food, places, vehicles, sports) in three styles of drawing, on white,
32 x 32 pixels. A caption says what is on the picture by its name, by one of its tags or by its
group, and on every second one in which style:

    "red apple"    "fox google"    "fruit fluent"    "animal mammal"    "transport air twitter"

so that most names allow three pictures, a tag about ten and a group about fifty, as with real
captions. The pictures stay in their packages, whose licences are named in toy/NOTICE; here lie the
captions' words (emoji.json) and what the judge saw in every picture (emoji.safetensors), so that
models are measured without.

Some pictures are held out: nobody is trained on them, nor on captions that name their thing and
style together, though on the thing in other styles.

The judge asks EfficientNet (evaluation/efficientnet.py), which never saw an emoji with its name: of
all real pictures, that whose features are nearest must be of a thing that the caption allows, in
whichever style. Real pictures take the same test, each with itself left out, as a new drawing
would; a drawing that repeats a picture finds that one, and can do better.
"""

import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command import HERE, BadInput, Parser, check_output, run, write_text, write_whole
from evaluation.efficientnet import load_efficientnet

SIZE = 32  # pixels along a side
STYLES = {  # the packages that hold the pictures, and where
    "google": ("emoji-datasource-google@16.0.0", "package/img/google/64/"),
    "twitter": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/"),
}
WORDS = ("emojibase-data@17.0.0", "package/en/data.json", "package/en/messages.json")
# Its groups of things: animals and nature, food, travel and places, activities. No people, faces,
# flags or symbols; nor tools, papers and machines, of which 32 pixels show little.
GROUPS = (3, 4, 5, 6)
# How a caption says what is on the picture, and how often it says the style too.
BY_NAME, BY_TAG, WITH_STYLE = 0.7, 0.2, 0.5
MEASURED_ONE_IN = 5  # captions: one is kept for measuring, the others are for training on
HELD_OUT_ONE_IN = 20  # pictures
FEATURES = 64  # of EfficientNet's 1280 directions, those in which real pictures differ most
CONCEPTS = Path(__file__).with_name("emoji.json")
SEEN = Path(__file__).with_name("emoji.safetensors")
PICTURES = HERE / "runs" / "emoji" / "pictures.safetensors"


# --------------------------------------------------------------------------------------------------
# Things, pictures and captions


@dataclass(frozen=True)
class Concept:
    """A thing: its name, its tags, the group it is in, and the styles that it is drawn in."""

    name: str
    tags: tuple[str, ...]
    group: str
    styles: tuple[str, ...]


@lru_cache(maxsize=1)
def concepts() -> list[Concept]:
    return [Concept(**{key: tuple(value) if isinstance(value, list) else value
                       for key, value in fields.items()})
            for fields in json.loads(CONCEPTS.read_text())]


@lru_cache(maxsize=1)
def rows() -> list[tuple[Concept, str]]:
    """(concept, style) of every picture, in the order in which pictures and features lie."""
    return [(concept, style) for concept in concepts() for style in concept.styles]


@lru_cache(maxsize=1)
def allowed() -> dict[str, set[Concept]]:
    """What a caption may say without its style -> the concepts that it allows."""
    found = {}
    for concept in concepts():
        for what in (concept.name, *concept.tags, concept.group):
            found.setdefault(what, set()).add(concept)
    return found


def parse(caption: str) -> tuple[set[Concept], tuple[str, ...]]:
    """The concepts and the styles that a caption allows. ValueError: it is none."""
    what, _, last = caption.rpartition(" ")
    styles = (last,) if last in STYLES and what else tuple(STYLES)
    what = what if len(styles) == 1 else caption
    if what not in allowed():
        raise ValueError(f"{caption!r} is not a caption of the emoji's")
    return allowed()[what], styles


def pictures_of(caption: str) -> list[int]:
    """The rows of all pictures that a caption allows."""
    things, styles = parse(caption)
    return [k for k, (concept, style) in enumerate(rows()) if concept in things and style in styles]


def random_caption(row: int, rng: random.Random) -> str:
    """Something true of the picture in this row."""
    (concept, style), by = rows()[row], rng.random()
    what = concept.name if by < BY_NAME or not concept.tags and by < BY_NAME + BY_TAG else (
        rng.choice(concept.tags) if by < BY_NAME + BY_TAG else concept.group
    )
    return f"{what} {style}" if rng.random() < WITH_STYLE else what


def one_in(count: int, text: str) -> bool:
    """Is this text the one of so many? It decides itself, so that it is so on every machine."""
    return hashlib.sha256(text.encode()).digest()[0] % count == 0


def is_held_out(row: int) -> bool:
    """Is nobody trained on this picture? One style of a concept at most."""
    concept, style = rows()[row]
    chosen = concept.styles[hashlib.sha256(concept.name.encode()).digest()[1] % len(concept.styles)]
    return len(concept.styles) > 1 and style == chosen and one_in(
        max(1, HELD_OUT_ONE_IN // len(STYLES)), f"picture {concept.name}"
    )


@lru_cache(maxsize=1)
def held_out_captions() -> frozenset[str]:
    """Those that name a held-out picture's concept and style."""
    names = (rows()[row] for row in range(len(rows())) if is_held_out(row))
    return frozenset(f"{concept.name} {style}" for concept, style in names)


def is_for_measuring(caption: str) -> bool:
    """Is this caption one that no list to train on has?"""
    return caption in held_out_captions() or one_in(MEASURED_ONE_IN, caption)


def training_caption(row: int, rng: random.Random) -> str:
    """A caption of the picture to train on; the same things are said in many ways, so one is."""
    while True:
        caption = random_caption(row, rng)
        if not is_for_measuring(caption):
            return caption


@lru_cache(maxsize=1)
def training_rows() -> list[int]:
    """The pictures to train on that can be said in a caption to train on."""
    def can_be_said(row: int) -> bool:
        concept, style = rows()[row]
        whats = (concept.name, *concept.tags, concept.group)
        texts = [text for what in whats for text in (what, f"{what} {style}")]
        return not all(is_for_measuring(text) for text in texts)

    return [row for row in range(len(rows())) if not is_held_out(row) and can_be_said(row)]


def training_captions(count: int, seed: int) -> list[str]:
    """Captions to make pairs with."""
    rng, choose = random.Random(seed), training_rows()
    return [training_caption(rng.choice(choose), rng) for _ in range(count)]


def measuring_captions(count: int, seed: int) -> list[str]:
    """Captions to measure on: none of those to train on."""
    rng, captions = random.Random(seed), []
    while len(captions) < count:
        caption = random_caption(rng.randrange(len(rows())), rng)
        if is_for_measuring(caption):
            captions.append(caption)
    return captions


def words() -> set[str]:
    """Every word that captions have."""
    return {word for what in allowed() for word in what.split()} | set(STYLES)


def random_pictures(count: int, generator: torch.Generator) -> Tensor:
    """Pictures for an autoencoder to learn from, (count, 3, 32, 32) in [-1, 1]; half mirrored."""
    rows = torch.tensor(training_rows())
    images = pictures()[rows[torch.randint(len(rows), (count,), generator=generator)]]
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def teacher_data(count: int, seed: int) -> tuple[Sequence[Tensor], Callable]:
    """All pictures to train on in batches, and caption_of(number of a picture, random.Random)."""
    chosen = training_rows()
    return pictures()[chosen].split(500), lambda number, rng: training_caption(chosen[number], rng)


@lru_cache(maxsize=1)
def pictures() -> Tensor:
    """All pictures, (N, 3, 32, 32) in [-1, 1]. BadInput where they were not fetched."""
    fetch = "python toy/emoji.py fetches them"
    if not PICTURES.exists():
        raise BadInput(f"{PICTURES}: the pictures are not here; {fetch}")
    try:
        found = load_file(PICTURES)["pictures"]
    except (SafetensorError, KeyError):
        raise BadInput(f"{PICTURES}: damaged; delete it, and {fetch}") from None
    if len(found) != len(rows()):
        raise BadInput(f"{PICTURES}: {len(found)} pictures, and emoji.json has {len(rows())}; "
                       f"delete it, and {fetch}")
    return found.float() / 127.5 - 1


# --------------------------------------------------------------------------------------------------
# The judge (evaluation/judge.py)


class Judge(nn.Module):
    """EfficientNet's features of pictures in the directions in which real ones differ most.

    real (N, 64): the features of all real pictures.
    """

    def __init__(self, mean: Tensor, directions: Tensor, features: Tensor):
        super().__init__()
        self.network = load_efficientnet("the judge of emoji")
        self.mean, self.directions = mean.float(), directions.float()
        self.real = features.float()

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 64)."""
        parts = [self.network(part.float()) for part in pictures.clamp(-1, 1).split(100)]
        return (torch.cat(parts) - self.mean) @ self.directions


def features() -> Tensor:
    """Of all real pictures, (N, 64)."""
    return load_file(SEEN)["features"].float()


def load_reader() -> Judge:
    """BadInput where EfficientNet's weights are not installed, or emoji.json has other pictures."""
    reader = Judge(**load_file(SEEN))
    if len(reader.real) != len(rows()):
        raise BadInput(f"{SEEN}: features of {len(reader.real)} pictures, and {CONCEPTS.name} has "
                       f"{len(rows())}; make both again with python toy/emoji.py --judge")
    return reader


def some_rows(captions: list[str], seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.choice(pictures_of(caption)) for caption in captions]


def drawn(captions: list[str], seed: int) -> Tensor | None:
    """A real picture for each caption, (N, 3, 32, 32); None where they were not fetched."""
    return pictures()[some_rows(captions, seed)] if PICTURES.exists() else None


def real_features(reader: Judge, captions: list[str], seed: int) -> Tensor:
    """What the reader sees in those pictures, (N, 64), as it lies beside this file."""
    return reader.real[some_rows(captions, seed)]


def right(reader: Judge, features: Tensor, captions: list[str]) -> list[bool]:
    """For each picture: is the real one nearest to it of a thing that its caption allows?

    The nearest other one where it is itself in `reader.real`, at distance 0; a drawing never is.
    """
    # Through matrix products, the default for many rows, the distance to itself is rounded.
    distances = torch.cdist(features, reader.real, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.masked_fill(distances == 0, torch.inf).argmin(1).tolist()
    return [rows()[row][0] in parse(caption)[0] for row, caption in zip(nearest, captions)]


def held_out_pictures(count: int, seed: int) -> list[str]:
    """Captions that name a held-out picture's concept and style."""
    return random.Random(seed).choices(sorted(held_out_captions()), k=count)


# Which captions train_teacher.py measures a teacher on.
KINDS = {"trained on": training_captions, "not trained on": measuring_captions,
         "held-out pictures": held_out_pictures}


# --------------------------------------------------------------------------------------------------
# Made from the published packages


def archive_of(package: str, folder: Path) -> Path:
    """The package's archive, in the folder. BadInput where npm cannot fetch it."""
    path = folder / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if path.exists():
        return path
    by_hand = f"put the archive of {package} from its registry at {path}"
    if shutil.which("npm") is None:
        raise BadInput(f"npm: not installed; install it, or {by_hand}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as half:  # a killed run leaves no half archive
        pack = ["npm", "pack", package]
        answer = subprocess.run(pack, cwd=half, capture_output=True, text=True)
        if answer.returncode or not (Path(half) / path.name).exists():
            last = (answer.stderr.strip() or "no message").splitlines()[-1]
            raise BadInput(f"npm pack {package}: failed ({last}); see to the network, or {by_hand}")
        os.replace(Path(half) / path.name, path)
    return path


@contextmanager
def opened(archive: Path):
    """The archive, open. BadInput where it is damaged or another package."""
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except (tarfile.TarError, EOFError, zlib.error, KeyError, OSError) as problem:
        raise BadInput(f"{archive}: damaged or another package ({problem}); delete it, and run "
                       "this again") from None


def plain(text: str) -> str:
    """Letters and digits alone, in lower case: "Piñata" -> "pinata"."""
    letters = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", " ", letters).strip()


def read_words(archive: Path) -> dict[str, tuple[str, list[str], str]]:
    """Code point of an emoji -> its name, tags and group."""
    with opened(archive) as tar:
        data, messages = (json.load(tar.extractfile(name)) for name in WORDS[1:])
    groups = {group["order"]: plain(group["key"]) for group in messages["subgroups"]}
    found = {}
    for emoji in data:
        # The dials of clocks differ by a hand that 32 pixels do not show.
        if emoji.get("group") in GROUPS and not re.search("o.clock|-thirty", emoji["label"]):
            tags = [plain(tag) for tag in emoji.get("tags", [])]
            found[code_of(emoji["hexcode"])] = (plain(emoji["label"]), tags,
                                                groups[emoji["subgroup"]])
    return found


def code_of(name: str) -> str:
    """A code point as all packages say it: without the mark for coloured drawing."""
    return name.lower().replace("-fe0f", "")


def small(image: Image.Image) -> Tensor:
    """On white, (3, 32, 32) uint8."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return pil_to_tensor(white.convert("RGB").resize((SIZE, SIZE), Image.LANCZOS))


def read_pictures(archive: Path, folder: str, wanted: set[str]) -> dict[str, Tensor]:
    """Code point -> picture, of all that are wanted and there."""
    found = {}
    with opened(archive) as tar:
        for member in tqdm(tar, desc=archive.name, unit="file", leave=False):
            code = code_of(Path(member.name).stem)
            if member.name.startswith(folder) and member.isfile() and code in wanted:
                found[code] = small(Image.open(io.BytesIO(tar.extractfile(member).read())))
    return found


def described(words: dict, drawings: dict[str, dict[str, Tensor]]) -> tuple[list[Concept], Tensor]:
    """The concepts that at least one style draws, and all pictures in the order of `rows`."""
    counts = {}
    for name, tags, group in words.values():
        for tag in {*tags} - {name, group}:
            counts[tag] = counts.get(tag, 0) + 1
    things, images = [], []
    for code, (name, tags, group) in words.items():
        styles = tuple(style for style in STYLES if code in drawings[style])
        # A tag of one thing alone is one more name; a letter says nothing.
        shared = tuple(sorted({tag for tag in tags if counts.get(tag, 0) > 1 and len(tag) > 1
                               and tag not in (name, group)}))
        if styles:
            things.append(Concept(name, shared, group, styles))
            images += [drawings[style][code] for style in styles]
    return things, torch.stack(images)


@torch.no_grad()
def seen(pictures: Tensor) -> dict[str, Tensor]:
    """What lies in emoji.safetensors: the judge's directions, and its features of all pictures."""
    network = load_efficientnet("python toy/emoji.py")
    features = torch.cat([network(part) for part in pictures.split(100)])
    mean = features.mean(0)
    *_, directions = torch.linalg.svd(features - mean, full_matrices=False)
    directions = directions[:FEATURES].T.contiguous()
    tensors = {"features": (features - mean) @ directions, "mean": mean, "directions": directions}
    return {name: tensor.half() for name, tensor in tensors.items()}


def main():
    parser = Parser("Fetch the pictures of emoji.")
    parser.add_argument("--judge", action="store_true",
                        help="make emoji.json and emoji.safetensors again too: what models are "
                             "measured with, and what they were trained on, is then another")
    args = parser.parse_args()
    check_output(PICTURES)
    folder = PICTURES.parent
    known = read_words(archive_of(WORDS[0], folder))
    drawings = {style: read_pictures(archive_of(package, folder), inside, set(known))
                for style, (package, inside) in STYLES.items()}
    things, images = described(known, drawings)
    if args.judge:
        write_whole(SEEN, partial(save_file, seen(images.float() / 127.5 - 1)))
        lines = ",\n".join(json.dumps(asdict(thing)) for thing in things)
        write_text(CONCEPTS, f"[\n{lines}\n]\n")
    elif things != concepts():
        raise BadInput(f"{folder}: its packages hold other words or pictures than emoji.json; "
                       f"delete them, and fetch those of {', '.join((*STYLES, WORDS[0]))} again")
    write_whole(PICTURES, partial(save_file, {"pictures": images}))
    print(f"{PICTURES}: {len(images)} pictures of {len(things)} things")


if __name__ == "__main__":
    run(main)
