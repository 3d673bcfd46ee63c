"""Nothing is measured on what it was trained on.

The noises and captions of all commands, with their defaults.
"""

import argparse
import itertools
from functools import partial

import pytest
import torch

import checkpoint
import command
import distill
import evaluate
import reflow
import sample
from command import TINY_TEACHER, BadInput
from evaluation import study
from pairs import built_in_prompts, split_prompts
from sample import noise_from_seeds, seed_range
from toy import demo


class Enough(Exception):
    """Raised where a command would begin to work."""


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """asked(main, arguments): (seeds of noises, captions) that the command begins to work with."""
    monkeypatch.chdir(tmp_path)
    flow = checkpoint.load(TINY_TEACHER, kind="flow")
    checkpoint.save(flow, "runs/2rf.safetensors")
    found = []

    def make_pairs(model, prompts, description, *args, **kwargs):
        found.append((
            range(description["first_seed"], description["first_seed"] + description["count"]),
            prompts,
        ))
        raise Enough

    def measure(model, questions, *args):
        found.append((
            list(itertools.chain(*(each.seeds for each in questions))),
            [p for each in questions for p in each.prompts],
        ))
        raise Enough

    def draw(model, prompts, seeds, *args, **kwargs):
        found.append((seeds, []))
        raise Enough

    for module in (reflow, distill, study):
        monkeypatch.setattr(module, "make_pairs", make_pairs)
    monkeypatch.setattr(evaluate, "evaluate", measure)
    monkeypatch.setattr(sample, "sample_images", draw)

    def run(main, *arguments):
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        with pytest.raises(Enough):
            main()
        command.unlock_folder()
        return found.pop()

    return run


def test_no_command_measures_or_samples_where_another_trained(asked):
    worlds, training, measuring = {}, set(), set()
    for seed in (0, 1):
        for name, main, arguments in (
            ("reflow", reflow.main, []),
            ("third reflow", reflow.main,
             ["--teacher", "runs/2rf.safetensors", "--out", "runs/3rf.safetensors"]),
            ("distill", distill.main, []),
            ("evaluate", evaluate.main, ["--model", TINY_TEACHER, "--repeats", 3]),
            ("sample", sample.main, ["--model", "runs/2rf.safetensors"]),
        ):
            seeds, captions = asked(main, *arguments, "--seed", seed)
            worlds[name, seed] = set(seeds)
            (measuring if name == "evaluate" else training).update(captions)
    sizes = {name: len(seeds) for (name, seed), seeds in worlds.items() if seed == 0}
    assert sizes == {
        "reflow": 10_000, "third reflow": 10_000, "distill": 10_000, "evaluate": 3_000, "sample": 4
    }
    for (a, first), (b, second) in itertools.combinations(worlds.items(), 2):
        shared = first & second
        # What a user asks for is taken as it is: picture k of --seed 1 is picture k + 1 of
        # --seed 0.
        assert not shared or (a[0], b[0]) == ("sample", "sample"), (a, b)
    assert len(training) > 1000 and len(measuring) > 300 and not training & measuring


def test_the_study_measures_on_what_nothing_was_trained_on(asked):
    args = argparse.Namespace(
        out="runs/study", num_samples=1000, num_pairs=10_000, held_out=500, captions="open",
        teacher_steps=8, dtype="fp32",
    )
    worlds = {}
    for seed in (0, 1):
        each = study.study_of(seed, args, torch.device("cpu"), [], None)
        models = {"teacher": checkpoint.load(TINY_TEACHER)}
        for stem in ("2rf", "3rf"):
            checkpoint.save(checkpoint.load(TINY_TEACHER, kind="flow"), f"runs/{stem}.safetensors")
            models[stem] = checkpoint.load(f"runs/{stem}.safetensors")
        of = {"questions": (each.evaluation_set.seeds, each.evaluation_set.prompts)}
        for model, held_out in itertools.product(models, (False, True)):
            of[model, held_out] = asked(partial(each.pairs_of, models[model], held_out))
        training = {text for key in of for text in of[key][1]
                    if key in itertools.product(models, [False])}
        measuring = {text for key in of for text in of[key][1]
                     if key not in itertools.product(models, [False])}
        assert training and measuring and not training & measuring
        worlds[seed] = {key: set(seeds) for key, (seeds, _) in of.items()}
        for (a, first), (b, second) in itertools.combinations(worlds[seed].items(), 2):
            # Held-out noises may serve all models.
            assert not first & second or (a[1], b[1]) == (True, True), (a, b)
    for key in worlds[0]:  # the teacher's pairs alone serve all seeds
        assert bool(worlds[0][key] & worlds[1][key]) == (key[0] == "teacher"), key


def test_the_plane_measures_on_new_noises(monkeypatch):
    """Nothing is trained here: models are their names; every noise they start from is noted."""
    noises = []
    monkeypatch.setattr(demo, "make_teacher", lambda data, args: "teacher")
    monkeypatch.setattr(demo, "reflow", lambda model, pairs, args, name: name)
    monkeypatch.setattr(demo, "exact_ends", lambda model, noise, labels: noises.append(noise))
    for seed in (0, 1):
        demo.up_to_second_flow(
            None, argparse.Namespace(num_pairs=2000, seed=seed, teacher_guidance=1.5)
        )
        noises.append(demo.Probe(demo.rings(), 1000, seed).noise)
    every = torch.cat(noises)
    assert len(every) == 2 * (2000 + 2000 + 1000) == len(every.unique(dim=0))


def test_worlds_and_seeds_share_no_noise():
    seeds = [seed_range(purpose, seed, 3) for purpose in sample.PURPOSES
             for seed in (0, 1, 255, 256, 65_536, sample.RUN_SEEDS - 1)]
    seeds.append(range(3))
    noises = noise_from_seeds([each for three in seeds for each in three], (64,))
    assert len(noises.unique(dim=0)) == 3 * len(seeds)
    assert max(seeds[-2]) < 2**63
    with pytest.raises(BadInput, match="--seed 16777216: there are 16,777,216"):
        seed_range("evaluation", 2**24, 1)
    with pytest.raises(BadInput, match="16,777,217 noises: one --seed has 16,777,216"):
        seed_range("reflow", 0, 2**24 + 1)


def test_the_last_hundredth_of_a_list_is_never_trained_on():
    prompts = [f"prompt {k}" for k in range(1000)] + ["prompt 3"]
    training, measuring = split_prompts(prompts)
    assert measuring == prompts[-10:] and training == [p for p in prompts[:991] if p != "prompt 3"]
    assert split_prompts(["a", "b"]) == (["a", "b"], [])
    assert split_prompts(["one prompt"] * 200) == (["one prompt"] * 200, [])
    training, measuring = split_prompts(built_in_prompts())
    assert (len(training), len(measuring)) == (6083, 61) and not set(training) & set(measuring)
