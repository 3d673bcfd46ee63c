"""A judge draws captions and reads pictures: what tiny models are asked, and how they are graded.

A Python file such as toy/shapes.py, with

    measuring_captions(n, seed)              captions that are in no list to train on
    load_reader()                            a network with .features(pictures) -> (N, D)
    right(reader, features, captions)        does each picture show what its caption says? Of shapes
                                             all of it, of emoji the thing and not its style
    real_features(reader, captions, seed)    features of real pictures for captions, (N, D)
    drawn(captions, seed)                    and those pictures, (N, 3, H, W) in [-1, 1]; None where
                                             they are not at hand
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
    GRADES, NEIGHBOURS, frechet_distance, precision_recall, with_interval,
)
from pairs import built_in_prompts, parts_of
from sample import seeds_in
from training import seed_of

JUDGE = ("measuring_captions", "load_reader", "right", "real_features", "drawn")


def load_judge(path: str):
    """The judge's module. BadInput where it is none."""
    if not Path(path).is_file():
        raise BadInput(f"--judge {path}: no such file; give a Python file such as toy/shapes.py")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None:
        raise BadInput(f"--judge {path}: is no Python file; give one such as toy/shapes.py")
    judge = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = judge  # dataclasses look their module up
    spec.loader.exec_module(judge)
    missing = [name for name in JUDGE if not hasattr(judge, name)]
    if missing:
        raise BadInput(f"--judge {path}: has no {missing[0]}; a judge has {', '.join(JUDGE)}, as "
                       "toy/shapes.py does")
    return judge


@dataclass
class Questions:
    """What every model is asked: prompts and seeds, and how its pictures are graded."""

    prompts: list[str]
    seeds: range  # of the noises
    grade: Callable[[Tensor], dict]  # pictures -> a figure for each of GRADES
    seed: int  # the --seed that all this comes from
    real: dict | None = None  # the grades of other real pictures, to compare with
    drawn: Tensor | None = None  # and real pictures to look at, where they are at hand


def questions_of(judge_path: str | None, count: int | None, seed: int, repeat: int) -> Questions:
    """A judge's captions; without one built-in prompts nothing was trained on, and no grades."""
    count = count or (8 if judge_path is None else 1000)
    seeds = seeds_in("evaluation", seed, count, start=repeat * count)
    if judge_path is None:
        _, kept = parts_of(built_in_prompts())
        prompts = [kept[k % len(kept)] for k in range(count)]
        return Questions(prompts, seeds, lambda pictures: dict.fromkeys(GRADES), seed)
    if count < NEIGHBOURS + 2:
        raise BadInput(f"--num-samples {count}: precision and recall need {NEIGHBOURS + 2} or more")
    judge = load_judge(judge_path)
    return judged(judge, judge.measuring_captions(count, seeds[0]), seeds, seed)


def judged(judge, captions: list, seeds: range, seed: int) -> Questions:
    """These captions and seeds of noises, which come from the --seed, graded by a judge."""
    reader, texts = judge.load_reader(), [str(caption) for caption in captions]
    real, others = (judge.real_features(reader, captions, seed_of(seeds[0], k)) for k in range(2))

    def grade_features(features: Tensor) -> dict:
        accuracy = sum(judge.right(reader, features, captions)) / len(captions)
        precision, recall = precision_recall(real, features)
        return dict(zip(GRADES, (accuracy, frechet_distance(real, features), precision, recall)))

    @torch.no_grad()
    def grade(pictures: Tensor) -> dict:
        return grade_features(reader.features(pictures))

    drawn = judge.drawn(captions, seed_of(seeds[0], 0))
    return Questions(texts, seeds, grade, seed, grade_features(others), drawn)


def graded(questions: list[Questions], pictures: list[Tensor]) -> dict:
    """The grades of a set of pictures for each of the questions, as means with intervals."""
    return with_intervals([asked.grade(drawn) for asked, drawn in zip(questions, pictures)])


def with_intervals(grades: list[dict]) -> dict:
    figures = {}
    for name in GRADES:
        each = [grade[name] for grade in grades]
        figures[name], figures[f"{name}_interval"] = with_interval(each)
    return figures
