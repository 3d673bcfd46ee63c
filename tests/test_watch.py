"""The plan before a run, what is seen at its saves, and the recipes of recipes/ at tiny size."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import checkpoint
import command
import distill
import evaluate
import pairs
import reflow
import sample
import training
import watch
from command import TINY_TEACHER
from conftest import ROOT
from evaluation import figures
from pairs import Pairs, parts_of
from sample import prompts_of, seeds_in
from training import read_metrics

FEW = ["--num-pairs", 40, "--teacher-steps", 2, "--batch-size", 4, "--validation-pairs", 6]
REFLOW = [*FEW, "--iterations", 5, "--save-every", 2]
STATE = Path("runs/2rf.safetensors.state")


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """In as few steps as will do: what is tested is not how pictures look."""
    monkeypatch.setattr(watch, "STEPS", (1, 2))
    monkeypatch.setattr(watch, "PICTURED", 2)
    monkeypatch.setattr(figures, "STRAIGHTNESS_STEPS", 3)


def test_a_dry_run_forecasts_and_writes_nothing(call, monkeypatch):
    code, out, err = call(reflow.main, *REFLOW, "--dry-run")
    assert code == 0, err
    assert "40 pairs of 2 steps" in out and "5 updates of 4, 20 samples" in out
    assert "pairs a second" in out and "s an update of reflow" in out
    assert not list(Path(".").iterdir())
    code, out, err = call(
        distill.main, "--teacher", TINY_TEACHER, *FEW, "--l2-iterations", 2,
        "--lpips-iterations", 1, "--student", "stacked", "--dry-run",
    )
    assert code == 0, err
    assert "s an update of L2" in out and "s an update of LPIPS" in out
    assert not list(Path(".").iterdir())
    # The backbone of the trained LPIPS is not fetched for that.
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", None)
    code, out, err = call(distill.main, "--teacher", TINY_TEACHER, *FEW, "--l2-iterations", 0,
                          "--lpips-iterations", 1, "--lpips-net", "alex", "--dry-run")
    assert code == 0 and "s an update of LPIPS" in out, err


def test_room_for_the_models_is_asked_for_before_the_work(call, monkeypatch):
    free = 2.5 * Path(TINY_TEACHER).stat().st_size  # for two of them
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("", (), {"free": free}))
    code, _, err = call(reflow.main, *REFLOW, "--keep", 2)
    assert code == 2 and "runs/2rf.safetensors: needs" in err
    assert not Path("runs/pairs").exists()
    code, _, err = call(distill.main, "--teacher", TINY_TEACHER, *FEW, "--keep", 1)
    assert code == 2 and "runs/instaflow.safetensors: needs" in err


def test_the_plan_knows_what_is_there(call):
    assert call(reflow.main, *REFLOW)[0] == 0
    code, out, _ = call(reflow.main, *REFLOW, "--dry-run")
    assert code == 0 and "1 of 1 shards are there" in out


def test_the_forecast_is_of_the_loop(monkeypatch):
    """Days are counted from the measured times alone: 100 s a batch of pairs, 100 s an update."""
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(clock))
    description = {"count": 12_800, "steps": 2, "guidance": 1.0, "solver": "dpm", "first_seed": 0,
                   "latent_shape": [4, 8, 8], "prompts": "some"}
    model, options = checkpoint.load(TINY_TEACHER), training.TrainingOptions(10, 4)

    def train_on(pairs, train, watch=None):
        reflow.reflow(model, pairs, options, Path("nowhere"), {}, train=train)

    stage = watch.Stage("reflow", options, train_on, Path("nowhere"), {}, "nowhere")
    a_pair = watch.time_of_pairs(model, ["a shape"], description, None)
    update = watch.time_of_update(stage, description, ["a shape"])
    text = watch.forecast(a_pair, description["count"], [stage], [update])
    assert "1.28 pairs a second on a device, 2.8 hours for all" in text
    assert "100 s an update of reflow, 16.7 minutes" in text
    assert f"{(10_000 + 1_000) / 86_400:.3g} device-days" in text


def test_what_is_seen_at_every_save(call):
    code, _, err = call(reflow.main, *REFLOW, "--keep", 1)
    assert code == 0, err
    seen = read_metrics(STATE, "held_out_loss")
    assert [row["step"] for row in seen] == [0, 2, 4, 5]
    assert all(len(row["held_out_loss_by_t"]) == 10 for row in seen)
    assert seen[-1]["held_out_loss"] < seen[0]["held_out_loss"]
    assert all(row["relative_straightness"] > 0 for row in seen)
    pictures = sorted((STATE / "samples").iterdir())
    assert [path.stem for path in pictures] == ["0000000", "0000002", "0000004", "0000005"]
    assert Image.open(pictures[0]).size[0] > 300
    # What is there at each save is the model then, and at the end the last.
    models = sorted(path.stem for path in (STATE / "models").iterdir())
    assert models == ["0000004", "0000005"]
    kept, last = STATE / "models/0000005.safetensors", Path("runs/2rf.safetensors")
    assert kept.read_bytes() == last.read_bytes()


def test_the_held_out_loss_is_that_of_the_averaged_weights_on_pairs_never_trained_on(call):
    assert call(reflow.main, *REFLOW)[0] == 0
    row = read_metrics(STATE, "held_out_loss")[-1]
    model = checkpoint.load("runs/2rf.safetensors")
    held_out = Pairs("runs/pairs/held-out")
    x0, x1, prompts = held_out[torch.arange(6)]
    velocity, context = reflow.flow_velocity(model.unet), model.encode_prompts(prompts)
    with torch.no_grad():
        by_t = [reflow.reflow_loss(velocity, x0, x1, torch.full((6,), (k + 0.5) / 10), context)
                for k in range(10)]
    assert row["held_out_loss"] == pytest.approx(torch.cat(by_t).mean().item(), rel=2e-2)  # fp16
    training_prompts, kept = parts_of(prompts_of(model))
    assert set(prompts) <= set(kept) and not set(prompts) & set(training_prompts)
    assert held_out.description["first_seed"] == seeds_in("validation", 0, 6)[0]


def test_looking_changes_no_weight(call):
    assert call(reflow.main, *REFLOW, "--out", "runs/seen.safetensors")[0] == 0
    assert call(reflow.main, *REFLOW, "--validation-pairs", 0)[0] == 0
    assert not (STATE / "samples").exists()
    seen, unseen = (Path(f"runs/{name}.safetensors") for name in ("seen", "2rf"))
    assert seen.read_bytes() == unseen.read_bytes()


def test_a_run_killed_while_it_looks_goes_on(call, monkeypatch):
    """Killed before looking, in the middle of it, when the model is written: all is the same."""
    few = [*REFLOW, "--iterations", 3]
    assert call(reflow.main, *few, "--out", "runs/calm.safetensors")[0] == 0
    calm = Path("runs/calm.safetensors")

    class Killed(BaseException):
        pass

    for place, name in ((watch.Watch, "__call__"), (watch, "save_comparison"),
                        (training, "add_metrics")):
        whole, calls, cut = getattr(place, name), [], Path(f"runs/{name}.safetensors")

        def kill(*arguments, whole=whole, calls=calls, **more):
            calls.append(arguments)
            if len(calls) == 2:
                raise Killed
            return whole(*arguments, **more)

        monkeypatch.setattr(place, name, kill)
        with pytest.raises(Killed):
            call(reflow.main, *few, "--out", cut)
        monkeypatch.setattr(place, name, whole)
        command.let_others_in()  # as the system does for a process that is gone
        assert call(reflow.main, *few, "--out", cut)[0] == 0
        assert calm.read_bytes() == cut.read_bytes()
        figures = [read_metrics(f"{path}.state", "held_out_loss") for path in (calm, cut)]
        assert figures[0] == figures[1]
        names = [{p.name for p in Path(f"{path}.state/samples").iterdir()} for path in (calm, cut)]
        assert names[0] == names[1]


def test_a_model_of_an_earlier_save_is_not_taken_for_the_end(call):
    """The last state is written, and its model is not: the command still writes it."""
    assert call(reflow.main, *REFLOW)[0] == 0
    out = Path("runs/2rf.safetensors")
    whole = out.read_bytes()
    out.write_bytes(b"of an earlier save")
    os.utime(out, ns=(0, 0))
    assert call(reflow.main, *REFLOW)[0] == 0
    assert out.read_bytes() == whole
    code, said, _ = call(reflow.main, *REFLOW)
    assert code == 0 and "finished already" in said


def test_distillation_is_seen_too(call):
    assert call(reflow.main, *REFLOW)[0] == 0
    code, _, err = call(distill.main, *FEW, "--l2-iterations", 3, "--lpips-iterations", 2,
                        "--save-every", 2)
    assert code == 0, err
    state = Path("runs/instaflow.safetensors.state")
    assert [row["step"] for row in read_metrics(state / "l2", "held_out_loss")] == [0, 2, 3]
    assert [row["step"] for row in read_metrics(state / "lpips", "held_out_loss")] == [0, 2]
    assert (state / "samples/0000005.png").exists()
    assert checkpoint.load("runs/instaflow.safetensors").kind == "one-step"


def test_own_validation_prompts(call, monkeypatch):
    """The first of the file, and a bad file is told before any pair is made."""
    drawn, whole = [], watch.draw_pictures

    def draw(model, prompts, *how, **more):
        drawn.append(prompts)
        return whole(model, prompts, *how, **more)

    monkeypatch.setattr(watch, "draw_pictures", draw)
    Path("mine.txt").write_text("a red circle\na blue square\na shape\n")
    code, _, err = call(reflow.main, *REFLOW, "--validation-prompts", "none.txt")
    assert code == 2 and "none.txt" in err and err.count("\n") == 0
    assert not Path("runs/pairs").exists()
    assert call(reflow.main, *REFLOW, "--validation-prompts", "mine.txt")[0] == 0
    assert drawn and all(prompts == ["a red circle", "a blue square"] for prompts in drawn)


def test_what_the_flags_of_looking_refuse(call):
    for flags, said in ((["--keep", 1], "--keep: nothing is looked at"),
                        (["--validation-prompts", "a.txt"], "--validation-prompts: nothing")):
        code, _, err = call(reflow.main, *REFLOW, *flags, "--validation-pairs", 0)
        assert code == 2 and said in err
    code, _, err = call(reflow.main, *REFLOW, "--validation-pairs", 2**24)
    assert code == 2 and "one --seed has" in err
    assert not list(Path(".").iterdir())


def test_nothing_that_is_read_is_overwritten(call):
    assert call(reflow.main, *REFLOW)[0] == 0
    flow = Path("runs/2rf.safetensors")
    whole = flow.read_bytes()
    code, _, err = call(reflow.main, *REFLOW, "--teacher", flow, "--pairs", "runs/p", "--out", flow)
    assert code == 2 and "would overwrite --teacher" in err
    assert call(distill.main, *FEW, "--init", flow, "--out", flow)[0] == 2
    assert flow.read_bytes() == whole


def test_what_was_seen_before_the_first_state_is_of_this_run(call, monkeypatch):
    """Killed after its first look, and started again with other settings."""
    def kill(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "save_state", kill)
        assert call(reflow.main, *REFLOW)[0] == 2
    before = read_metrics(STATE, "held_out_loss")[0]
    assert call(reflow.main, *REFLOW, "--init", "teacher")[0] == 0
    after = read_metrics(STATE, "held_out_loss")[0]
    assert (before["step"], after["step"]) == (0, 0)
    assert before["held_out_loss"] != after["held_out_loss"]


def test_a_stage_that_is_not_asked_for_any_more(call):
    """After L2 and LPIPS the model of L2 alone is asked for, and is not that which lies there."""
    few = [*FEW, "--teacher", TINY_TEACHER, "--l2-iterations", 2]
    assert call(distill.main, *few, "--lpips-iterations", 1)[0] == 0
    out, l2 = Path("runs/instaflow.safetensors"), Path("runs/instaflow-l2.safetensors")
    assert out.read_bytes() != l2.read_bytes()
    assert call(distill.main, *few, "--lpips-iterations", 0)[0] == 0
    assert out.read_bytes() == l2.read_bytes()


def test_the_bar_counts_all_processes(monkeypatch, tmp_path):
    """Of two processes the first draws shards 0 and 2, and its bar ends at all pairs."""
    bars = []

    class Bar(pairs.tqdm):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            bars.append(self)

    model = checkpoint.load(TINY_TEACHER)
    monkeypatch.setattr(pairs, "PAIRS_PER_SHARD", 4)
    monkeypatch.setattr(pairs, "tqdm", Bar)
    asked = pairs.describe_pairs(model, ["a shape"], "some", 14, 1, 1.0, "dpm", model.dtype,
                                 "reflow", 0)
    for i in (1, 3):
        (tmp_path / f"shard-0000{i}.safetensors").touch()  # of the other process
    monkeypatch.setattr(pairs, "world_size", lambda: 2)
    monkeypatch.setattr(pairs, "from_all_processes", lambda items: [*items, 6])
    monkeypatch.setattr(pairs, "Pairs", lambda folder: None)
    pairs.make_pairs(model, ["a shape"], asked, tmp_path)
    assert (bars[0].total, bars[0].n) == (14, 14)


# --------------------------------------------------------------------------------------------------
# The recipes


# Counts, of which argparse takes those that come last, and what is not to be had without a network.
COUNTS = ["--num-pairs", 24, "--teacher-steps", 2, "--teacher-batch-size", 8, "--batch-size", 4,
          "--accumulate", 2, "--save-every", 1, "--validation-pairs", 4]
FEWER = {
    "reflow.py": [*COUNTS, "--iterations", 2],
    "distill.py": [*COUNTS, "--l2-iterations", 2, "--lpips-iterations", 1, "--lpips-batch-size", 4,
                   "--lpips-accumulate", 2, "--lpips-net", "random"],
    "sample.py": [], "evaluate.py": ["--num-samples", 12, "--steps", 1],
}
MAINS = {"reflow.py": reflow.main, "distill.py": distill.main, "sample.py": sample.main,
         "evaluate.py": evaluate.main}
# stacked.sh goes on from what the first makes.
RECIPES = [("8x80GB.sh", "stacked.sh"), ("1x24GB.sh",), ("laptop.sh",)]


def commands_of(recipes: tuple[str, ...], folder: Path) -> list[list[str]]:
    """The commands of some recipes as their shell gives them, with another model and counts."""
    commands, show = [], folder / "show.py"
    show.write_text("import shlex, sys\nprint(shlex.join(sys.argv[1:]))\n")
    for recipe in recipes:
        given = ["captions.txt"] if recipe == "stacked.sh" else [TINY_TEACHER, "captions.txt"]
        answer = subprocess.run(["sh", ROOT / "recipes" / recipe, *given], capture_output=True,
                                env=os.environ | {"RUN": f"{sys.executable} {show}"}, text=True,
                                check=True)
        for line in answer.stdout.splitlines():
            script, *arguments = shlex.split(line) if ".py " in line else [""]
            if script in FEWER:  # and not what the recipe says
                commands.append([script, *arguments, *map(str, FEWER[script])])
    return commands


@pytest.mark.parametrize("recipes", RECIPES, ids=" ".join)
def test_the_recipes_run(call, tmp_path, recipes):
    Path("captions.txt").write_text("\n".join(
        f"a {color} {shape}" for color in ("red", "blue") for shape in ("circle", "square")))
    (Path("toy")).symlink_to(ROOT / "toy")
    for script, *arguments in commands_of(recipes, tmp_path):
        code, _, err = call(MAINS[script], *arguments)
        assert code == 0, (script, arguments, err)
    assert checkpoint.load("runs/instaflow.safetensors").kind == "one-step"


@pytest.mark.slow
@pytest.mark.parametrize("recipes", RECIPES[:2], ids=" ".join)
def test_the_recipes_run_in_two_processes(tmp_path, recipes):
    (tmp_path / "captions.txt").write_text("a red circle\na blue square\n")
    for script, *arguments in commands_of(recipes, tmp_path):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", ROOT / script, *arguments]
        answer = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert answer.returncode == 0, answer.stderr
    rows = (tmp_path / "runs/2rf.safetensors.state/metrics.jsonl").read_text().splitlines()
    assert any("held_out_loss" in json.loads(row) for row in rows)
