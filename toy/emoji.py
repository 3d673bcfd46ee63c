"""The second tiny dataset: emoji, images by human artists, captioned with their names and tags.

    python toy/emoji.py             downloads the images (npm, 160 MB) into runs/emoji/
    python toy/emoji.py --judge     also makes emoji.json and emoji.safetensors again

Some 570 concepts (animals, food, places, vehicles, sports) in three styles, 32 x 32 pixels on
white. A caption is a concept's name, one of its tags or its group; every second one adds a style:

    "red apple"    "fox google"    "fruit fluent"    "animal mammal"    "transport air twitter"

As with real captions, many images match one: mostly three a name, about ten a tag, fifty a group.
Some images are held out: no training uses them, nor captions that name their concept and style.
The images stay in their packages (licences: toy/NOTICE). The repository holds the captions' words
(emoji.json) and the judge's features of every image (emoji.safetensors): all that evaluation needs.

The judge compares features of EfficientNet (evaluation/efficientnet.py), which was not trained on
emoji. An image is right when the real image with the nearest features shows a concept that the
caption allows, in any style. Real images take the same test; each is compared with all others. A
generated copy of a real image finds that image, so it can score higher than real images.
"""

import hashlib
import io
import itertools
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
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command import HERE, BadInput, Parser, check_output, run, write_atomically, write_text
from evaluation.efficientnet import load_efficientnet

SIZE = 32  # pixels along a side
STYLES = {  # package, and its folder of images
    "google": ("emoji-datasource-google@16.0.0", "package/img/google/64/"),
    "twitter": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/"),
}
WORDS = ("emojibase-data@17.0.0", "package/en/data.json", "package/en/messages.json")
# Of its groups: animals and nature, food, travel and places, activities. No people, faces, flags or
# symbols; nor tools, papers and machines, which are hardly recognisable in 32 pixels.
GROUPS = (3, 4, 5, 6)
BY_NAME, BY_TAG, WITH_STYLE = 0.7, 0.2, 0.5  # probabilities of a caption's form
MEASURED_ONE_IN = 5  # captions: one is kept for evaluation, the others are for training
HELD_OUT_ONE_IN = 20  # images
FEATURES = 64  # of EfficientNet's 1280 directions: the principal components of real images
CONCEPTS = Path(__file__).with_name("emoji.json")
JUDGE = Path(__file__).with_name("emoji.safetensors")
PICTURES = HERE / "runs" / "emoji" / "pictures.safetensors"


# --------------------------------------------------------------------------------------------------
# Concepts, images and captions


@dataclass(frozen=True)
class Concept:
    name: str
    tags: tuple[str, ...]
    group: str
    styles: tuple[str, ...]  # in which there is an image of it


@cache
def concepts() -> list[Concept]:
    return [Concept(each["name"], tuple(each["tags"]), each["group"], tuple(each["styles"]))
            for each in json.loads(CONCEPTS.read_text())]


@cache
def rows() -> list[tuple[Concept, str]]:
    """(concept, style) of each image. An image is known by its row here."""
    return [(concept, style) for concept in concepts() for style in concept.styles]


@cache
def allowed() -> dict[str, set[Concept]]:
    """A caption without its style -> the concepts that it allows."""
    found = {}
    for concept in concepts():
        for what in (concept.name, *concept.tags, concept.group):
            found.setdefault(what, set()).add(concept)
    return found


def parse(caption: str) -> tuple[set[Concept], tuple[str, ...]]:
    """The concepts and the styles that a caption allows. ValueError: not such a caption."""
    what, _, last = caption.rpartition(" ")
    styles = (last,) if last in STYLES and what else tuple(STYLES)
    what = what if len(styles) == 1 else caption
    if what not in allowed():
        raise ValueError(f"{caption!r} is not a caption of the emoji dataset")
    return allowed()[what], styles


def matching_rows(caption: str) -> list[int]:
    """The rows of all images that a caption allows."""
    wanted, styles = parse(caption)
    return [k for k, (concept, style) in enumerate(rows()) if concept in wanted and style in styles]


def sample_rows(captions: list[str], seed: int) -> list[int]:
    """A random matching row for each caption."""
    rng = random.Random(seed)
    return [rng.choice(matching_rows(caption)) for caption in captions]


def random_caption(row: int, rng: random.Random) -> str:
    """A caption that matches the image in this row."""
    (concept, style), form = rows()[row], rng.random()
    if form >= BY_NAME + BY_TAG:
        what = concept.group
    elif form >= BY_NAME and concept.tags:
        what = rng.choice(concept.tags)
    else:
        what = concept.name
    return f"{what} {style}" if rng.random() < WITH_STYLE else what


def one_in(count: int, text: str) -> bool:
    """True for one in `count` texts; the text alone decides, so all machines agree."""
    return hashlib.sha256(text.encode()).digest()[0] % count == 0


def is_held_out(row: int) -> bool:
    """Is the image held out from all training? At most one style of a concept is."""
    concept, style = rows()[row]
    chosen = concept.styles[hashlib.sha256(concept.name.encode()).digest()[1] % len(concept.styles)]
    has_held_out = one_in(HELD_OUT_ONE_IN // len(STYLES), f"picture {concept.name}")
    return len(concept.styles) > 1 and style == chosen and has_held_out


@cache
def held_out_captions() -> frozenset[str]:
    """The captions that name a held-out image's concept and style."""
    return frozenset(f"{concept.name} {style}" for row, (concept, style) in enumerate(rows())
                     if is_held_out(row))


def is_for_measuring(caption: str) -> bool:
    """Is the caption held out from training?"""
    return caption in held_out_captions() or one_in(MEASURED_ONE_IN, caption)


@cache
def training_rows() -> list[int]:
    """The rows of images to train on: not held out, with at least one caption to train on."""

    def has_caption(concept: Concept, style: str) -> bool:
        whats = (concept.name, *concept.tags, concept.group)
        captions = (text for what in whats for text in (what, f"{what} {style}"))
        return not all(map(is_for_measuring, captions))

    return [k for k, row in enumerate(rows()) if not is_held_out(k) and has_caption(*row)]


def training_caption(row: int, rng: random.Random) -> str:
    """A random caption of the image to train on."""
    while True:
        caption = random_caption(row, rng)
        if not is_for_measuring(caption):
            return caption


def training_captions(count: int, seed: int) -> list[str]:
    """Captions for making pairs."""
    rng = random.Random(seed)
    return [training_caption(rng.choice(training_rows()), rng) for _ in range(count)]


def measuring_captions(count: int, seed: int) -> list[str]:
    """Held-out captions, for evaluation."""
    rng = random.Random(seed)
    captions = (random_caption(rng.randrange(len(rows())), rng) for _ in itertools.count())
    return list(itertools.islice(filter(is_for_measuring, captions), count))


@cache
def pictures() -> Tensor:
    """All images, (N, 3, 32, 32) in [-1, 1]. BadInput: not downloaded."""
    try:
        images = load_file(PICTURES)["pictures"]
    except (FileNotFoundError, SafetensorError, KeyError):
        raise BadInput(f"{PICTURES}: missing or damaged; download the images with "
                       "python toy/emoji.py") from None
    if len(images) != len(rows()):
        raise BadInput(f"{PICTURES}: {len(images)} images, and emoji.json has {len(rows())}; "
                       "download them again with python toy/emoji.py")
    return images.float() / 127.5 - 1


# --------------------------------------------------------------------------------------------------
# For train_teacher.py


def words() -> set[str]:
    """All words of the captions."""
    return {word for what in allowed() for word in what.split()} | set(STYLES)


def random_images(count: int, generator: torch.Generator) -> Tensor:
    """Images to train an autoencoder on, (count, 3, 32, 32) in [-1, 1]; half are mirrored."""
    rows = torch.tensor(training_rows())
    images = pictures()[rows[torch.randint(len(rows), (count,), generator=generator)]]
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def teacher_data(count: int, seed: int) -> tuple[Sequence[Tensor], Callable]:
    """All images to train on in batches, and caption_of(index of an image, random.Random)."""
    chosen = training_rows()
    return pictures()[chosen].split(500), lambda index, rng: training_caption(chosen[index], rng)


def held_out_pictures(count: int, seed: int) -> list[str]:
    """Captions that allow held-out images alone, in random order, each as often as the others."""
    captions = [caption for caption in sorted(held_out_captions())
                if all(map(is_held_out, matching_rows(caption)))]
    random.Random(seed).shuffle(captions)
    return [captions[k % len(captions)] for k in range(count)]


# Captions that train_teacher.py evaluates a teacher on.
KINDS = {"trained on": training_captions, "not trained on": measuring_captions,
         "held-out pictures": held_out_pictures}


# --------------------------------------------------------------------------------------------------
# The judge (evaluation/judge.py): measuring_captions and these


class Judge(nn.Module):
    """EfficientNet's features, projected to the principal components of real images."""

    def __init__(self, mean: Tensor, directions: Tensor, features: Tensor):
        super().__init__()
        self.network = load_efficientnet("the judge of emoji")
        self.mean, self.directions = mean.float(), directions.float()
        self.real = features.float()  # of all real images, (N, 64)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 64)."""
        batches = [self.network(batch.float()) for batch in images.clamp(-1, 1).split(100)]
        return (torch.cat(batches) - self.mean) @ self.directions


def load_reader() -> Judge:
    """BadInput: EfficientNet's weights are not installed, or emoji.json has other images."""
    judge = Judge(**load_file(JUDGE))
    if len(judge.real) != len(rows()):
        raise BadInput(f"{JUDGE}: features of {len(judge.real)} images, and {CONCEPTS.name} has "
                       f"{len(rows())}; make both again with python toy/emoji.py --judge")
    return judge


def features() -> Tensor:
    """The features of all real images, (N, 64); needs no EfficientNet."""
    return load_file(JUDGE)["features"].float()


def real_images(captions: list[str], seed: int) -> Tensor | None:
    """A real image for each caption, (N, 3, 32, 32); None: not downloaded."""
    return pictures()[sample_rows(captions, seed)] if PICTURES.exists() else None


def real_features(judge: Judge, captions: list[str], seed: int) -> Tensor:
    """The features of those images, (N, 64); needs no images."""
    return judge.real[sample_rows(captions, seed)]


def right(judge: Judge, features: Tensor, captions: list[str]) -> list[bool]:
    """For each image: does the nearest real image show a concept that the caption allows?"""
    # A real image, at distance 0 from itself, takes the nearest other one. Matrix products, the
    # default for many rows, would round that distance.
    distances = torch.cdist(features, judge.real, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.masked_fill(distances == 0, torch.inf).argmin(1).tolist()
    return [rows()[row][0] in parse(caption)[0] for row, caption in zip(nearest, captions)]


# --------------------------------------------------------------------------------------------------
# Made from the published packages


def fetch_archive(package: str, folder: Path) -> Path:
    """The package's archive in the folder, downloaded if missing. BadInput: npm cannot."""
    path = folder / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if path.exists():
        return path
    by_hand = f"put the archive of {package} from its registry at {path}"
    if shutil.which("npm") is None:
        raise BadInput(f"npm: not installed; install it, or {by_hand}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # a kill leaves no partial archive
        pack = ["npm", "pack", package]
        result = subprocess.run(pack, cwd=temporary, capture_output=True, text=True)
        if result.returncode or not Path(temporary, path.name).exists():
            last = (result.stderr.strip() or "no message").splitlines()[-1]
            raise BadInput(f"npm pack {package}: failed ({last}); check the network, or {by_hand}")
        os.replace(Path(temporary, path.name), path)
    return path


@contextmanager
def open_archive(archive: Path):
    """The opened archive. BadInput: damaged, or another package."""
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except (tarfile.TarError, EOFError, zlib.error, KeyError, OSError) as problem:
        raise BadInput(f"{archive}: damaged or another package ({problem}); delete it, and run "
                       "this again") from None


def plain(text: str) -> str:
    """Only letters and digits, in lower case: "Piñata" -> "pinata"."""
    letters = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", " ", letters).strip()


def code_of(name: str) -> str:
    """A code point as all packages write it: without the mark for a coloured emoji."""
    return name.lower().replace("-fe0f", "")


def read_words(archive: Path) -> dict[str, tuple[str, list[str], str]]:
    """Code point -> name, tags and group."""
    with open_archive(archive) as tar:
        data, messages = (json.load(tar.extractfile(name)) for name in WORDS[1:])
    groups = {group["order"]: plain(group["key"]) for group in messages["subgroups"]}
    found = {}
    for emoji in data:
        # Clock faces differ by a hand that 32 pixels do not show.
        if emoji.get("group") in GROUPS and not re.search("o.clock|-thirty", emoji["label"]):
            tags = [plain(tag) for tag in emoji.get("tags", [])]
            group = groups[emoji["subgroup"]]
            found[code_of(emoji["hexcode"])] = (plain(emoji["label"]), tags, group)
    return found


def read_images(archive: Path, folder: str, wanted: set[str]) -> dict[str, Tensor]:
    """Code point -> image on white, (3, 32, 32) uint8, of the wanted ones that are there."""
    found = {}
    with open_archive(archive) as tar:
        for member in tqdm(tar, desc=archive.name, unit="file", leave=False):
            code = code_of(Path(member.name).stem)
            if member.name.startswith(folder) and member.isfile() and code in wanted:
                file = io.BytesIO(tar.extractfile(member).read())
                image = Image.open(file).convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                white.alpha_composite(image)
                small = white.convert("RGB").resize((SIZE, SIZE), Image.LANCZOS)
                found[code] = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    return found


def make_concepts(words: dict, images: dict[str, dict[str, Tensor]]) -> tuple[list, Tensor]:
    """Concepts with an image, all images as in `rows`. images: style -> code point -> image."""
    counts = Counter(tag for name, tags, group in words.values() for tag in {*tags} - {name, group})
    made, ordered = [], []
    for code, (name, tags, group) in words.items():
        styles = tuple(style for style in STYLES if code in images[style])
        # A tag of one concept alone would be a second name; a single letter says nothing.
        shared = {tag for tag in tags if counts[tag] > 1 and len(tag) > 1} - {name, group}
        if styles:
            made.append(Concept(name, tuple(sorted(shared)), group, styles))
            ordered += [images[style][code] for style in styles]
    return made, torch.stack(ordered)


@torch.no_grad()
def judge_tensors(images: Tensor) -> dict[str, Tensor]:
    """The contents of emoji.safetensors: principal components, and features of all images."""
    network = load_efficientnet("python toy/emoji.py")
    features = torch.cat([network(batch) for batch in images.split(100)])
    mean = features.mean(0)
    *_, directions = torch.linalg.svd(features - mean, full_matrices=False)
    directions = directions[:FEATURES].T.contiguous()
    tensors = {"features": (features - mean) @ directions, "mean": mean, "directions": directions}
    return {name: tensor.half() for name, tensor in tensors.items()}


def main():
    parser = Parser("Download the images of emoji.")
    parser.add_argument("--judge", action="store_true",
                        help="also make emoji.json and emoji.safetensors again, which changes the "
                             "captions and the judge: do not compare with older results")
    args = parser.parse_args()
    check_output(PICTURES)
    folder = PICTURES.parent
    words = read_words(fetch_archive(WORDS[0], folder))
    images = {style: read_images(fetch_archive(package, folder), inside, set(words))
              for style, (package, inside) in STYLES.items()}
    made, images = make_concepts(words, images)
    if args.judge:
        write_atomically(JUDGE, partial(save_file, judge_tensors(images.float() / 127.5 - 1)))
        lines = ",\n".join(json.dumps(asdict(concept)) for concept in made)
        write_text(CONCEPTS, f"[\n{lines}\n]\n")
    elif made != concepts():
        raise BadInput(f"{folder}: its packages hold other words or images than emoji.json; "
                       f"delete them, and download {', '.join((*STYLES, WORDS[0]))} again")
    write_atomically(PICTURES, partial(save_file, {"pictures": images}))
    print(f"{PICTURES}: {len(images)} images of {len(made)} concepts")


if __name__ == "__main__":
    run(main)
