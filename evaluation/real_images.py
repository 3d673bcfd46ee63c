"""FID and CLIP score against real images, by the protocols of InstaFlow (arXiv 2309.06380).

For evaluate.py, with

    --coco DIR      DIR/annotations/captions_val2017.json and DIR/val2017/*.jpg: 5,000 captions,
                    at 512 px; or those of val2014: 30,000 captions, at 256 px
    --images DIR --prompts FILE     any folder of images, and any captions

Fréchet Inception Distance (Heusel et al. 2017, 1706.08500) is that of torchmetrics, on Inception's
standard weights; the CLIP score (Hessel et al. 2021, 2104.08718) is the cosine of picture and
caption under a CLIP of transformers. Both networks are downloaded when first used. Real images and
generated ones are cropped to squares and resized to the protocol's size before the network sees
them.

Generated pictures lie in a folder for each model, number of steps and guidance, one PNG each, named
by its number. Whatever is there already is not drawn again, and of N processes each draws every
N-th.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from command import (
    BadInput, keep_others_out, rank, refuse_other, wait_for_all, world_size, write_json,
    write_whole,
)
from vae import to_bytes

# COCO's part: number of captions, size in pixels.
PROTOCOLS = {"val2017": (5_000, 512), "val2014": (30_000, 256)}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
AT_ONCE = 32  # images that a network sees together


def read_coco(folder: str | Path, count: int | None) -> tuple[list[str], list[Path], int]:
    """Captions, real images and the size in pixels.

    One caption an image for 2017, a fixed random draw for 2014.
    """
    folder = Path(folder)
    part = next((part for part in PROTOCOLS
                 if (folder / "annotations" / f"captions_{part}.json").exists()), None)
    if part is None:
        raise BadInput(f"--coco {folder}: holds no annotations/captions_val2017.json nor "
                       "..._val2014.json; give COCO's folder")
    path, (standard, side) = folder / "annotations" / f"captions_{part}.json", PROTOCOLS[part]
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        captions = [(entry["image_id"], entry["caption"].strip())
                    for entry in sorted(annotations, key=lambda e: e["id"])]
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise BadInput(f"{path}: not a COCO caption file ({problem!r}); get it again") from None
    if part == "val2014":
        random.Random(0).shuffle(captions)
        texts = [caption for _, caption in captions]
    else:
        first = {}
        for image, caption in captions:
            first.setdefault(image, caption)
        texts = list(first.values())
    return texts[: count or standard], read_images(folder / part), side


def read_images(folder: str | Path) -> list[Path]:
    found = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in SUFFIXES)
    if len(found) < 2:
        raise BadInput(f"{folder}: holds {len(found)} images ({', '.join(SUFFIXES)}); a distance "
                       "needs two or more")
    return found


def squared(path: Path, side: int) -> Tensor:
    """The middle square of an image file as (3, side, side) uint8."""
    try:
        with Image.open(path) as image:
            pixels = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError) as problem:
        raise BadInput(
            f"{path}: not a readable image ({problem}); delete it, or get it again"
        ) from None
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def feature_distance(extractor: str | None, device: torch.device):
    """torchmetrics' FID, on Inception or on a TorchScript file.

    Either is a network of images (B, 3, H, W) uint8 -> features (B, D).
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    # Its sums are in float64.
    with_float64 = torch.device("cpu") if device.type == "mps" else device
    try:
        feature = 2048 if extractor is None else torch.jit.load(extractor, map_location="cpu")
        return FrechetInceptionDistance(feature, reset_real_features=False).to(with_float64)
    except (OSError, RuntimeError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0]
        if extractor is not None:
            raise BadInput(f"--feature-extractor {extractor}: not a TorchScript file of a feature "
                           f"network ({reason})") from None
        raise BadInput(
            f"the Inception network could not be downloaded ({reason}); put its file into torch's "
            "hub cache, or give another network with --feature-extractor"
        ) from None


def caption_score(name: str, device: torch.device) -> Callable[[Tensor, list[str]], Tensor]:
    """score(images (B, 3, H, W) uint8, captions) -> cosine similarities (B,), by a CLIP.

    name: a folder or a hub id.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(name).eval().to(device)
        processor = CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as problem:
        raise BadInput(
            f"--clip {name}: could not be read or downloaded ({str(problem).splitlines()[0]})"
        ) from None

    def score(images: Tensor, captions: list[str]) -> Tensor:
        inputs = processor(
            text=captions, images=list(images), padding=True, truncation=True, return_tensors="pt"
        )
        outputs = model(**inputs.to(device))
        return torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds)

    return score


@dataclass
class Gallery:
    """Captions to draw, real images to compare with, and the two measures."""

    prompts: list[str]
    images: list[Path]
    side: int
    folder: Path  # of the generated pictures
    fid: object  # of feature_distance
    clip: Callable  # of caption_score
    seen: bool = False  # has the FID seen the real images?

    def draw(
        self, name: str, about: dict, draw: Callable[[list[str], list[int], tqdm], Tensor],
        seed: int, batch: int,
    ) -> Path:
        """Have draw(prompts, seeds, bar) make what is missing in the folder of that name.

        Picture k is drawn from the noise of `seed` + k. about: what decides the pictures.
        """
        folder = self.folder / name
        keep_others_out(folder)
        remedy = f"give another --out or delete {folder}"
        refuse_other(folder / "settings.json", about, "other pictures", remedy)
        write_json(folder / "settings.json", about)
        mine = range(rank(), len(self.prompts), world_size())
        absent = {k for k in mine if not picture_path(folder, k).exists()}
        parts = [mine[start : start + batch] for start in range(0, len(mine), batch)]
        # Drawn in the company of a run that was not interrupted, since a picture's rounding depends
        # on its batch.
        todo = [part for part in parts if not absent.isdisjoint(part)]
        done = len(mine) - sum(map(len, todo))
        with tqdm(
            total=len(mine), initial=done, desc=name, unit="picture", disable=rank() > 0
        ) as bar:
            for part in todo:
                pictures = draw([self.prompts[k] for k in part], [seed + k for k in part], bar)
                for k, pixels in zip(part, to_bytes(pictures)):
                    if k in absent:
                        write_whole(picture_path(folder, k), Image.fromarray(pixels.numpy()).save,
                                    every_rank=True)
        wait_for_all()
        return folder

    @torch.no_grad()
    def score(self, folder: Path) -> dict:
        """{"fid", "clip_score"} of the pictures in a folder that `draw` filled."""
        self.fid.reset()
        scores = []
        if not self.seen:
            for batch in batches(self.images, "real images"):
                self.fid.update(self.load(batch), real=True)
            self.seen = True
        for numbers in batches(range(len(self.prompts)), "FID and CLIP score"):
            pictures = self.load([picture_path(folder, k) for k in numbers])
            self.fid.update(pictures, real=False)
            scores.append(self.clip(pictures, [self.prompts[k] for k in numbers]))
        return {"fid": self.fid.compute().item(), "clip_score": torch.cat(scores).mean().item()}

    def first(self, folder: Path, count: int) -> Tensor:
        """The first pictures in a folder that `draw` filled, (count, 3, side, side) in [-1, 1]."""
        paths = [picture_path(folder, k) for k in range(min(count, len(self.prompts)))]
        return self.load(paths).float().cpu() / 127.5 - 1

    def load(self, paths: list[Path]) -> Tensor:
        return torch.stack([squared(path, self.side) for path in paths]).to(self.fid.device)


def picture_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def batches(items, what: str):
    for start in tqdm(range(0, len(items), AT_ONCE), desc=what, leave=False):
        yield items[start : start + AT_ONCE]
