"""A judge makes captions and grades images: how the tiny models are evaluated.

A judge is a Python file such as toy/shapes.py. Its reader is a classifier or another network whose
features tell what an image shows. The file defines

    measuring_captions(n, seed)              n captions that are in no training list
    load_reader()                            the reader, with .features(images) -> (N, D)
    right(reader, features, captions)        for each image: does it show what its caption says?
                                             toy/shapes.py: every word; toy/emoji.py: the thing,
                                             not its style
    real_features(reader, captions, seed)    features (N, D) of real images for the captions
    real_images(captions, seed)              those images, (N, 3, H, W) in [-1, 1]; None where they
                                             are not on disk
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from command import BadInput
from evaluation.figures import (
    FEWEST_SAMPLES, GRADES, frechet_distance, precision_recall, with_intervals,
)
from formats.diffusers_folder import read_index
from formats.hub import local_path
from formats.prompts import built_in_prompts, split_prompts
from formats.single_file import read_metadata
from formats.weights import open_safetensors
from sample import seed_range
from training import seed_of

JUDGE = ("measuring_captions", "load_reader", "right", "real_features", "real_images")


def load_judge(path: str):
    """The judge's module. BadInput: the file is missing or no judge."""
    if not Path(path).is_file():
        raise BadInput(f"--judge {path}: no such file; give a Python file such as toy/shapes.py")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None:
        raise BadInput(f"--judge {path}: not a Python file; give one such as toy/shapes.py")
    judge = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = judge  # where dataclasses look their module up
    spec.loader.exec_module(judge)
    missing = [name for name in JUDGE if not hasattr(judge, name)]
    if missing:
        raise BadInput(f"--judge {path}: has no {missing[0]}; a judge has {', '.join(JUDGE)}, as "
                       "toy/shapes.py does")
    return judge


@dataclass
class EvaluationSet:
    """The same prompts and noises for every model, and how the images are graded."""

    prompts: list[str]
    seeds: range  # of the noises
    seed: int  # --seed, which prompts and noises come from
    grade: Callable[[Tensor], dict] | None = None  # images -> GRADES; None: without a judge
    real_grades: dict | None = None  # of a second set of real images, for comparison
    real_images: Tensor | None = None  # to look at, where they are on disk


def make_evaluation_set(
    judge_path: str | Path | None, count: int | None, seed: int, repeat: int,
) -> EvaluationSet:
    """A judge's captions; without a judge, held-out built-in prompts and no grades.

    repeat: each has captions and noises of its own. BadInput: too few samples to grade.
    """
    count = count or (8 if judge_path is None else 1000)
    seeds = seed_range("evaluation", seed, count, start=repeat * count)
    if judge_path is None:
        _, held_out = split_prompts(built_in_prompts())
        return EvaluationSet([held_out[k % len(held_out)] for k in range(count)], seeds, seed)
    if count < FEWEST_SAMPLES:
        raise BadInput(f"--num-samples {count}: precision and recall need {FEWEST_SAMPLES} or more")
    judge = load_judge(judge_path)
    return judged_set(judge, judge.measuring_captions(count, seeds[0]), seeds, seed)


def judged_set(judge, captions: list, seeds: range, seed: int) -> EvaluationSet:
    """These captions and noise seeds, graded by the judge. seed: --seed."""
    reader, prompts = judge.load_reader(), [str(caption) for caption in captions]
    real, others = (judge.real_features(reader, captions, seed_of(seeds[0], k)) for k in range(2))

    def grade_features(features: Tensor) -> dict:
        accuracy = sum(judge.right(reader, features, captions)) / len(captions)
        precision, recall = precision_recall(real, features)
        return dict(zip(GRADES, (accuracy, frechet_distance(real, features), precision, recall)))

    @torch.no_grad()
    def grade(images: Tensor) -> dict:
        return grade_features(reader.features(images))

    real_images = judge.real_images(captions, seed_of(seeds[0], 0))
    return EvaluationSet(prompts, seeds, seed, grade, grade_features(others), real_images)


def mean_grades(sets: list[EvaluationSet], images: list[Tensor]) -> dict:
    """Mean grades with intervals over sets; images: of one model, for each set. {}: no judge."""
    if sets[0].grade is None:
        return {}
    return with_intervals([each.grade(generated) for each, generated in zip(sets, images)])


def check_same_dataset(paths: list[str]) -> None:
    """BadInput if the checkpoints were trained on different datasets; reads no weights."""
    families = {}
    for path in map(local_path, paths):
        files = open_safetensors([path]) if path.suffix == ".safetensors" else {}
        about = read_index(path) if path.is_dir() else read_metadata(path, files)
        families[about.get("family") or "sd"] = path
    if len(families) > 1:
        one, other = list(families.values())[:2]
        raise BadInput(f"{one}: was trained on another dataset than {other}; give models of one")
