"""FID and CLIP score against real images, by the protocols of InstaFlow (arXiv 2309.06380).

For evaluate.py, with

    --coco DIR      DIR/annotations/captions_val2017.json and DIR/val2017/*.jpg: 5,000 captions,
                    at 512 px; or likewise val2014: 30,000 captions, at 256 px
    --images DIR --prompts FILE     any folder of images, and any captions

Fréchet Inception Distance (Heusel et al. 2017, 1706.08500) is torchmetrics' own, on Inception's
standard weights. The CLIP score (Hessel et al. 2021, 2104.08718) is the cosine similarity of image
and caption under a CLIP of transformers. Both networks are downloaded at first use. Real and
generated images are cropped to squares and resized to the protocol's size.

Each model, number of steps and guidance scale has a folder of generated images, as numbered PNG
files. Existing files are not made again. Of N processes, each generates every N-th image.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from command import (
    BadInput, barrier, check_same_settings, dtype_name, first_line, is_out_of_memory, lock_folder,
    positive, rank, world_size, write_atomically, write_json,
)
from evaluation.perceptual import UNREADABLE
from formats.hub import name_of
from formats.images import read_image, to_bytes
from formats.prompts import read_prompts
from sample import batch_slices, max_batch_size, sample_images

# Of each COCO split: number of captions, size in pixels.
PROTOCOLS = {"val2017": (5_000, 512), "val2014": (30_000, 256)}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
BATCH_SIZE = 32  # images that Inception and CLIP see at once
CLIP = "openai/clip-vit-large-patch14"


# --------------------------------------------------------------------------------------------------
# The flags of evaluate.py about real images


def add_real_image_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("real images, for FID and CLIP score").add_argument
    add("--coco",
        help="COCO's folder, with annotations/ and val2017/ (5,000 captions) or val2014/ (30,000)")
    add("--images", help="another folder of images; needs --prompts")
    add("--prompts",
        help="captions for --images, other than those of the pairs: a file with a prompt a line, "
             "or .tsv, .csv, .json, .jsonl")
    add("--prompt-column", default="Prompt", help="column or key of the prompts in such a file")
    add("--image-size", type=positive,
        help="pixels at which images are compared; default: COCO's, else 512")
    add("--feature-extractor",
        help="TorchScript file instead of Inception: uint8 images to features")
    add("--clip", help=f"CLIP for the score, a folder or a hub id; default: {CLIP}")


def check_real_image_options(args: argparse.Namespace) -> None:
    """BadInput for flags that exclude or need each other."""
    if not (args.coco or args.images):
        for flag, given in (("--prompts", args.prompts), ("--image-size", args.image_size),
                            ("--feature-extractor", args.feature_extractor), ("--clip", args.clip)):
            if given:
                raise BadInput(f"{flag}: is for --coco or --images; give one of them too")
        return
    if args.coco and args.images:
        raise BadInput("--coco and --images: give one of them")
    if args.coco and args.prompts:
        raise BadInput("--prompts: COCO has captions of its own; give --images, or drop it")
    if args.judge:
        raise BadInput("--judge: grades tiny models; drop it with --coco and --images")
    if args.images and not args.prompts:
        raise BadInput("--images: needs --prompts too, a file with captions")
    if args.repeats > 1:
        raise BadInput("--repeats: FID is measured once; drop it with --coco and --images")


def load_gallery(args: argparse.Namespace, device: torch.device) -> "Gallery":
    """The captions and real images that the flags name, with FID and CLIP score."""
    if args.coco:
        prompts, images, side = read_coco(args.coco, args.num_samples)
    else:
        prompts = read_prompts(args.prompts, args.prompt_column)[: args.num_samples]
        images, side = read_images(args.images), 512
    if len(prompts) < 2:
        raise BadInput("one caption: FID compares two images or more; give more of them")
    fid = feature_distance(args.feature_extractor, device)
    clip = caption_score(args.clip or CLIP, device)
    folder = Path(args.out.removesuffix(".json") + "-images")
    gallery = Gallery(prompts, images, args.image_size or side, folder, fid, clip)
    gallery.measure_real()  # so that what cannot be measured is found before the work
    return gallery


# --------------------------------------------------------------------------------------------------
# Captions and real images


def read_coco(folder: str | Path, count: int | None) -> tuple[list[str], list[Path], int]:
    """(captions, real images, size in pixels). count: of captions; None: the protocol's.

    2017 takes the first caption of each image, 2014 a fixed random subset of all captions.
    """
    folder = Path(folder)
    there = [split for split in PROTOCOLS
             if (folder / "annotations" / f"captions_{split}.json").exists()]
    if not there:
        raise BadInput(f"--coco {folder}: holds no annotations/captions_val2017.json nor "
                       "..._val2014.json; give COCO's folder")
    split = next((split for split in there if (folder / split).is_dir()), there[0])
    path, (standard, side) = folder / "annotations" / f"captions_{split}.json", PROTOCOLS[split]
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        captions = [(entry["image_id"], entry["caption"].strip())
                    for entry in sorted(annotations, key=lambda e: e["id"])]
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise BadInput(f"{path}: not a COCO caption file ({problem!r}); get it again") from None
    if split == "val2014":
        random.Random(0).shuffle(captions)
        texts = [caption for _, caption in captions]
    else:
        first = {}
        for image, caption in captions:
            first.setdefault(image, caption)
        texts = list(first.values())
    return texts[: count or standard], read_images(folder / split), side


def read_images(folder: str | Path) -> list[Path]:
    """The image files of a folder, sorted. BadInput: fewer than two."""
    found = sorted(path for path in Path(folder).glob("[!.]*") if path.suffix.lower() in SUFFIXES)
    if len(found) < 2:
        raise BadInput(f"{folder}: holds {len(found)} images ({', '.join(SUFFIXES)}); FID "
                       "needs two or more")
    return found


def feature_distance(extractor: str | None, device: torch.device):
    """torchmetrics' FID on Inception, or on a TorchScript file.

    Both networks map images (B, 3, H, W) uint8 to features (B, D). BadInput: no such network.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    # Its sums are float64, which mps lacks.
    with_float64 = torch.device("cpu") if device.type == "mps" else device
    try:
        feature = 2048 if extractor is None else torch.jit.load(extractor, map_location="cpu")
        fid = FrechetInceptionDistance(feature, reset_real_features=False, sync_on_compute=False)
        return fid.to(with_float64)  # not summed over processes: each measures all images
    except UNREADABLE as problem:
        if is_out_of_memory(problem):
            raise
        reason = first_line(problem)
        if extractor is not None:
            raise BadInput(f"--feature-extractor {extractor}: not a TorchScript file of a feature "
                           f"network ({reason})") from None
        raise BadInput(
            f"the Inception network could not be downloaded ({reason}); put its file into torch's "
            "hub cache, or give another network with --feature-extractor"
        ) from None


def caption_score(name: str, device: torch.device) -> Callable[[Tensor, list[str]], Tensor]:
    """score(images (B, 3, H, W) uint8, captions) -> cosine similarities (B,) under a CLIP.

    name: a folder or a hub id. BadInput: no such CLIP.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(name).eval().to(device)
        processor = CLIPProcessor.from_pretrained(name)
    except UNREADABLE as problem:
        if is_out_of_memory(problem):
            raise
        raise BadInput(
            f"--clip {name}: could not be read or downloaded ({first_line(problem)})"
        ) from None

    def score(images: Tensor, captions: list[str]) -> Tensor:
        inputs = processor(
            text=captions, images=list(images), padding=True, truncation=True, return_tensors="pt"
        )
        outputs = model(**inputs.to(device))
        return torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds)

    return score


# --------------------------------------------------------------------------------------------------
# Generated images, and how they compare


@dataclass
class Gallery:
    """Captions, real images, folders of generated images, and the two metrics."""

    prompts: list[str]
    images: list[Path]  # the real ones
    side: int  # pixels at which images are compared
    folder: Path  # holds a folder for each model, number of steps and guidance scale
    fid: object  # of feature_distance
    clip: Callable  # of caption_score

    def generate(self, model, weights_hash: str, steps: int, guidance: float, seeds: range) -> Path:
        """The folder of a model's images, image k from seeds[k]; missing images are generated.

        weights_hash: of the model's file, so that no folder mixes two models.
        """
        name = f"{name_of(model.path).removesuffix('.safetensors')}-{steps}-{guidance:g}"
        folder = self.folder / name.replace("/", "-")
        settings = {
            "model": name_of(model.path), "hash": weights_hash, "kind": model.kind,
            "steps": steps, "guidance": guidance, "first_seed": seeds[0],
            "dtype": dtype_name(model.dtype), "prompts": len(self.prompts),
            "prompts_hash": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest(),
        }
        lock_folder(folder)
        remedy = f"give another --out or delete {folder}"
        check_same_settings(folder / "settings.json", settings, "other images", remedy)
        write_json(folder / "settings.json", settings)

        mine = range(rank(), len(self.prompts), world_size())
        missing = {k for k in mine if not image_path(folder, k).exists()}
        # The rounding of an image depends on its batch, so batches are those of an uninterrupted
        # run, and existing images in them are generated once more but not written.
        parts = batch_slices(len(mine), max_batch_size(model.latent_shape()))
        todo = [mine[part] for part in parts if not missing.isdisjoint(mine[part])]
        done = len(mine) - sum(map(len, todo))
        with tqdm(total=len(mine), initial=done, desc=name, unit="image",
                  disable=rank() > 0) as bar:
            for batch in todo:
                images = sample_images(model, [self.prompts[k] for k in batch],
                                       [seeds[k] for k in batch], steps, guidance, bar=bar)
                for k, pixels in zip(batch, to_bytes(images)):
                    if k in missing:
                        save = Image.fromarray(pixels.numpy()).save
                        write_atomically(image_path(folder, k), save, every_rank=True)
        barrier()
        return folder

    @torch.no_grad()
    def measure_real(self) -> None:
        """Show the FID all real images, and CLIP one. BadInput: one of them cannot be measured."""
        try:
            for paths in batches(self.images, "real images"):
                self.fid.update(self.load_images(paths), real=True)
            self.clip(self.load_images(self.images[:1]), self.prompts[:1])
        except (RuntimeError, ValueError, TypeError, IndexError) as problem:
            if is_out_of_memory(problem):
                raise
            raise BadInput("--feature-extractor or --clip: does not take these images and captions "
                           f"({first_line(problem)})") from None

    @torch.no_grad()
    def score(self, folder: Path) -> dict:
        """{"fid", "clip_score"} of the images in a folder of `generate`."""
        self.fid.reset()
        scores = []
        for numbers in batches(range(len(self.prompts)), "FID and CLIP score"):
            images = self.load_images([image_path(folder, k) for k in numbers])
            self.fid.update(images, real=False)
            scores.append(self.clip(images, [self.prompts[k] for k in numbers]))
        return {"fid": self.fid.compute().item(), "clip_score": torch.cat(scores).mean().item()}

    def first_images(self, folder: Path, count: int) -> Tensor:
        """The first images in a folder of `generate`, (count, 3, side, side) in [-1, 1]."""
        paths = [image_path(folder, k) for k in range(min(count, len(self.prompts)))]
        return self.load_images(paths).float().cpu() / 127.5 - 1

    def load_images(self, paths: list[Path]) -> Tensor:
        images = [read_image(path, self.side, self.side) for path in paths]
        return torch.stack(images).to(self.fid.device)


def image_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def batches(items, description: str):
    for part in tqdm(batch_slices(len(items), BATCH_SIZE), desc=description, leave=False):
        yield items[part]
