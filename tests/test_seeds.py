"""No evaluation uses noise or captions of training, in any command with its defaults."""

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


class WorkStarts(Exception):
    """Raised where a command would start its work."""


@pytest.fixture
def data_of(monkeypatch, tmp_path):
    """data_of(main, *arguments): the noise seeds and captions with which the command starts."""
    monkeypatch.chdir(tmp_path)
    flow = checkpoint.load(TINY_TEACHER, kind="flow")
    checkpoint.save(flow, "runs/2rf.safetensors")
    recorded = []

    def record_pairs(model, prompts, description, *args, **kwargs):
        recorded.append((
            range(description["first_seed"], description["first_seed"] + description["count"]),
            prompts,
        ))
        raise WorkStarts

    def record_evaluation(model, sets, *args):
        recorded.append((
            list(itertools.chain(*(each.seeds for each in sets))),
            [p for each in sets for p in each.prompts],
        ))
        raise WorkStarts

    def record_sampling(model, prompts, seeds, *args, **kwargs):
        recorded.append((seeds, []))
        raise WorkStarts

    for module in (reflow, distill, study):
        monkeypatch.setattr(module, "make_pairs", record_pairs)
    monkeypatch.setattr(evaluate, "evaluate", record_evaluation)
    monkeypatch.setattr(sample, "sample_images", record_sampling)

    def run(main, *arguments):
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        with pytest.raises(WorkStarts):
            main()
        command.unlock_folder()
        return recorded.pop()

    return run


def test_no_command_evaluates_or_samples_on_training_data(data_of):
    seeds_of, training, evaluation = {}, set(), set()
    for seed in (0, 1):
        for name, main, arguments in (
            ("reflow", reflow.main, []),
            ("third reflow", reflow.main,
             ["--teacher", "runs/2rf.safetensors", "--out", "runs/3rf.safetensors"]),
            ("distill", distill.main, []),
            ("evaluate", evaluate.main, ["--model", TINY_TEACHER, "--repeats", 3]),
            ("sample", sample.main, ["--model", "runs/2rf.safetensors"]),
        ):
            seeds, captions = data_of(main, *arguments, "--seed", seed)
            seeds_of[name, seed] = set(seeds)
            (evaluation if name == "evaluate" else training).update(captions)
    sizes = {name: len(seeds) for (name, seed), seeds in seeds_of.items() if seed == 0}
    assert sizes == {
        "reflow": 5_000, "third reflow": 5_000, "distill": 5_000, "evaluate": 3_000, "sample": 4
    }
    for (a, first), (b, second) in itertools.combinations(seeds_of.items(), 2):
        shared = first & second
        # sample.py uses seeds as given: image k of --seed 1 is image k + 1 of --seed 0.
        assert not shared or (a[0], b[0]) == ("sample", "sample"), (a, b)
    assert len(training) > 1000 and len(evaluation) > 300 and not training & evaluation


def test_study_does_not_evaluate_on_training_data(data_of):
    args = argparse.Namespace(
        out="runs/study", num_samples=1000, num_pairs=10_000, held_out=500, captions="open",
        teacher_steps=8, dtype="fp32",
    )
    seeds_of = {}
    for seed in (0, 1):
        each = study.study_of(seed, args, torch.device("cpu"), [], None)
        models = {"teacher": checkpoint.load(TINY_TEACHER)}
        for stem in ("2rf", "3rf"):
            checkpoint.save(checkpoint.load(TINY_TEACHER, kind="flow"), f"runs/{stem}.safetensors")
            models[stem] = checkpoint.load(f"runs/{stem}.safetensors")
        data = {"questions": (each.evaluation_set.seeds, each.evaluation_set.prompts)}
        for model, held_out in itertools.product(models, (False, True)):
            data[model, held_out] = data_of(partial(each.pairs_of, models[model], held_out))
        training = {text for key in data for text in data[key][1]
                    if key in itertools.product(models, [False])}
        evaluation = {text for key in data for text in data[key][1]
                      if key not in itertools.product(models, [False])}
        assert training and evaluation and not training & evaluation
        seeds_of[seed] = {key: set(seeds) for key, (seeds, _) in data.items()}
        for (a, first), (b, second) in itertools.combinations(seeds_of[seed].items(), 2):
            # All models may share held-out noise.
            assert not first & second or (a[1], b[1]) == (True, True), (a, b)
    for key in seeds_of[0]:  # only the teacher's pairs are shared by all seeds
        assert bool(seeds_of[0][key] & seeds_of[1][key]) == (key[0] == "teacher"), key


def test_demo_does_not_evaluate_on_training_noise(monkeypatch):
    """Names stand in for models, so nothing is trained; all starting noise is recorded."""
    noises = []
    monkeypatch.setattr(demo, "make_teacher", lambda data, args: "teacher")
    monkeypatch.setattr(demo, "reflow", lambda model, pairs, args, name: name)
    monkeypatch.setattr(demo, "exact_ends", lambda model, noise, labels: noises.append(noise))
    for seed in (0, 1):
        demo.up_to_second_flow(
            None, argparse.Namespace(num_pairs=2000, seed=seed, teacher_guidance=1.5)
        )
        noises.append(demo.Probe(demo.rings(), 1000, seed).noise)
    all_noises = torch.cat(noises)
    assert len(all_noises) == 2 * (2000 + 2000 + 1000) == len(all_noises.unique(dim=0))


def test_purposes_and_seeds_share_no_noise():
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


def test_last_hundredth_of_the_prompts_is_held_out():
    prompts = [f"prompt {k}" for k in range(1000)] + ["prompt 3"]
    training, held_out = split_prompts(prompts)
    assert held_out == prompts[-10:] and training == [p for p in prompts[:991] if p != "prompt 3"]
    assert split_prompts(["a", "b"]) == (["a", "b"], [])
    assert split_prompts(["one prompt"] * 200) == (["one prompt"] * 200, [])
    training, held_out = split_prompts(built_in_prompts())
    assert (len(training), len(held_out)) == (6083, 61) and not set(training) & set(held_out)
