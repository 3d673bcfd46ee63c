"""The plan before a run, validation at every save, and the recipes of recipes/ at toy size."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import checkpoint
import command
import distill
import evaluate
import pairs
import reflow
import sample
import training
import validation
from command import TINY_TEACHER
from conftest import ROOT
from evaluation import figures
from formats.prompts import read_prompts, split_prompts
from pairs import Pairs
from sample import seed_range
from training import read_metrics

FEW = ["--num-pairs", 40, "--teacher-steps", 2, "--batch-size", 4, "--validation-pairs", 6]
REFLOW = [*FEW, "--iterations", 5, "--save-every", 2]
STATE = Path("runs/2rf.safetensors.state")


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Few steps and prompts: no test depends on image quality."""
    monkeypatch.setattr(validation, "STEPS", (1, 2))
    monkeypatch.setattr(validation, "NUM_PROMPTS", 2)
    monkeypatch.setattr(figures, "STRAIGHTNESS_STEPS", 3)


def test_plan_is_printed_before_the_work(call, monkeypatch):
    def stop(*arguments):
        raise command.BadInput("enough")

    with monkeypatch.context() as patch:
        patch.setattr(reflow, "make_pairs", stop)
        code, out, err = call(reflow.main, *REFLOW)
    assert code == 2 and err == "error: enough"
    assert "40 pairs of 2 steps at guidance scale 2.5" in out and "0 of 1 shards are there" in out
    assert "5 iterations of 4, 20 samples, 0.5 epochs" in out
    assert call(reflow.main, *REFLOW)[0] == 0
    _, out, _ = call(reflow.main, *REFLOW)
    assert "1 of 1 shards are there" in out
    monkeypatch.setattr(distill, "make_pairs", stop)
    _, out, _ = call(distill.main, *FEW, "--l2-iterations", 2, "--lpips-iterations", 1,
                     "--student", "stacked")
    assert "distill, L2, 2 iterations" in out and "distill, LPIPS, 1 iterations" in out


def test_every_save_writes_metrics_images_and_the_model(call):
    code, _, err = call(reflow.main, *REFLOW, "--keep", 1)
    assert code == 0, err
    metrics = read_metrics(STATE, "held_out_loss")
    assert [row["step"] for row in metrics] == [0, 2, 4, 5]
    assert all(len(row["held_out_loss_by_t"]) == 10 for row in metrics)
    assert metrics[-1]["held_out_loss"] < metrics[0]["held_out_loss"]
    assert all(row["relative_straightness"] > 0 for row in metrics)
    image_paths = sorted((STATE / "samples").iterdir())
    assert [path.stem for path in image_paths] == ["0000000", "0000002", "0000004", "0000005"]
    assert Image.open(image_paths[0]).size[0] > 300
    # Every save writes the current model; the last one is the finished model.
    models = sorted(path.stem for path in (STATE / "models").iterdir())
    assert models == ["0000004", "0000005"]
    kept_model, final_model = STATE / "models/0000005.safetensors", Path("runs/2rf.safetensors")
    assert kept_model.read_bytes() == final_model.read_bytes()


def test_held_out_loss_is_of_averaged_weights_on_held_out_pairs(call):
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
    training_prompts, held_out_prompts = split_prompts(read_prompts(ROOT / "toy/captions.txt"))
    assert set(prompts) <= set(held_out_prompts) and not set(prompts) & set(training_prompts)
    assert held_out.spec["first_seed"] == seed_range("validation", 0, 6)[0]


def test_validation_changes_no_weight(call):
    assert call(reflow.main, *REFLOW, "--out", "runs/seen.safetensors")[0] == 0
    assert call(reflow.main, *REFLOW, "--validation-pairs", 0)[0] == 0
    assert not (STATE / "samples").exists()
    validated, unvalidated = (Path(f"runs/{name}.safetensors") for name in ("seen", "2rf"))
    assert validated.read_bytes() == unvalidated.read_bytes()


def test_run_killed_around_validation_resumes_to_the_same_files(call, monkeypatch):
    """Killed before validation, during it, or once the model is written: the results are equal."""
    few = [*REFLOW, "--iterations", 3]
    assert call(reflow.main, *few, "--out", "runs/calm.safetensors")[0] == 0
    undisturbed = Path("runs/calm.safetensors")

    class Killed(BaseException):
        pass

    for place, name in ((reflow, "validate"), (validation, "save_comparison"),
                        (validation, "append_metrics")):
        original, calls, killed = getattr(place, name), [], Path(f"runs/{name}.safetensors")

        def kill(*arguments, original=original, calls=calls, **kwargs):
            calls.append(arguments)
            if len(calls) == 2:
                raise Killed
            return original(*arguments, **kwargs)

        monkeypatch.setattr(place, name, kill)
        with pytest.raises(Killed):
            call(reflow.main, *few, "--out", killed)
        monkeypatch.setattr(place, name, original)
        command.unlock_folder()  # as the system does for a process that is gone
        assert call(reflow.main, *few, "--out", killed)[0] == 0
        assert undisturbed.read_bytes() == killed.read_bytes()
        metrics = [read_metrics(f"{path}.state", "held_out_loss") for path in (undisturbed, killed)]
        assert metrics[0] == metrics[1]
        names = [{p.name for p in Path(f"{path}.state/samples").iterdir()}
                 for path in (undisturbed, killed)]
        assert names[0] == names[1]


def test_model_older_than_the_last_state_is_written_again(call):
    """If the last state is saved but its model is not, the command writes the model."""
    assert call(reflow.main, *REFLOW)[0] == 0
    out = Path("runs/2rf.safetensors")
    finished = out.read_bytes()
    out.write_bytes(b"of an earlier save")
    os.utime(out, ns=(0, 0))
    assert call(reflow.main, *REFLOW)[0] == 0
    assert out.read_bytes() == finished
    code, output, _ = call(reflow.main, *REFLOW)
    assert code == 0 and "finished already" in output


def test_both_stages_of_distillation_are_validated(call):
    assert call(reflow.main, *REFLOW)[0] == 0
    code, _, err = call(distill.main, *FEW, "--l2-iterations", 3, "--lpips-iterations", 2,
                        "--save-every", 2)
    assert code == 0, err
    state = Path("runs/instaflow.safetensors.state")
    assert [row["step"] for row in read_metrics(state / "l2", "held_out_loss")] == [0, 2, 3]
    assert [row["step"] for row in read_metrics(state / "lpips", "held_out_loss")] == [0, 2]
    assert (state / "samples/0000005.png").exists()
    assert checkpoint.load("runs/instaflow.safetensors").kind == "one-step"


def test_validation_prompts_come_from_the_given_file(call, monkeypatch):
    """The first prompts of the file are sampled. A bad file is refused before any pair is made."""
    sampled_prompts, original = [], validation.sample_images

    def record_prompts(model, prompts, *args, **kwargs):
        sampled_prompts.append(prompts)
        return original(model, prompts, *args, **kwargs)

    monkeypatch.setattr(validation, "sample_images", record_prompts)
    Path("mine.txt").write_text("a red circle\na blue square\na shape\n")
    code, _, err = call(reflow.main, *REFLOW, "--validation-prompts", "none.txt")
    assert code == 2 and "none.txt" in err and err.count("\n") == 0
    assert not Path("runs/pairs").exists()
    assert call(reflow.main, *REFLOW, "--validation-prompts", "mine.txt")[0] == 0
    assert sampled_prompts
    assert all(prompts == ["a red circle", "a blue square"] for prompts in sampled_prompts)


def test_validation_flags_are_checked_before_any_work(call):
    for flags in (["--keep", 1], ["--validation-prompts", "a.txt"]):
        code, _, err = call(reflow.main, *REFLOW, *flags, "--validation-pairs", 0)
        assert code == 2 and f"{flags[0]}: needs validation" in err
    code, _, err = call(reflow.main, *REFLOW, "--validation-pairs", 2**24)
    assert code == 2 and "one --seed has" in err
    assert not list(Path(".").iterdir())


def test_inputs_are_never_overwritten(call):
    assert call(reflow.main, *REFLOW)[0] == 0
    flow = Path("runs/2rf.safetensors")
    content = flow.read_bytes()
    code, _, err = call(reflow.main, *REFLOW, "--teacher", flow, "--pairs", "runs/p", "--out", flow)
    assert code == 2 and "would overwrite --teacher" in err
    assert call(distill.main, *FEW, "--init", flow, "--out", flow)[0] == 2
    l2 = Path("runs/instaflow-l2.safetensors")
    l2.write_bytes(content)
    code, _, err = call(distill.main, *FEW, "--init", l2)
    assert code == 2 and "would overwrite --init" in err  # in the first stage
    assert call(distill.main, *FEW, "--init", l2, "--l2-iterations", 0, "--lpips-iterations", 1,
                "--lpips-net", "random")[0] == 0  # without the first stage
    assert flow.read_bytes() == l2.read_bytes() == content


def test_init_that_changes_during_the_run_is_refused(call, monkeypatch):
    """--init is hashed when the run starts and loaded after the pairs, maybe days later."""
    Path("start.safetensors").write_bytes(Path(TINY_TEACHER).read_bytes())
    original = reflow.make_pairs

    def change_init_and_make_pairs(*arguments):
        Path("start.safetensors").write_bytes(
            (ROOT / "toy/tiny_instaflow.safetensors").read_bytes())
        return original(*arguments)

    monkeypatch.setattr(reflow, "make_pairs", change_init_and_make_pairs)
    code, _, err = call(reflow.main, *REFLOW, "--init", "start.safetensors")
    assert code == 2 and "start.safetensors: has changed since this command started" in err


def test_metrics_from_before_the_first_state_are_replaced(call, monkeypatch):
    """Killed after its first validation, and started again with other settings."""
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


def test_output_becomes_the_l2_model_if_lpips_is_no_longer_requested(call):
    """After L2 and LPIPS, a second command requests L2 alone."""
    few = [*FEW, "--teacher", TINY_TEACHER, "--l2-iterations", 2]
    assert call(distill.main, *few, "--lpips-iterations", 1)[0] == 0
    out, l2 = Path("runs/instaflow.safetensors"), Path("runs/instaflow-l2.safetensors")
    assert out.read_bytes() != l2.read_bytes()
    l2_model = l2.read_bytes()
    l2.unlink()  # a lost model is written again
    assert call(distill.main, *few, "--lpips-iterations", 1)[0] == 0
    assert l2.read_bytes() == l2_model != out.read_bytes()
    finished = out.read_bytes()
    assert call(distill.main, *few, "--lpips-iterations", 0)[0] == 0
    assert out.read_bytes() == l2_model
    _, output, _ = call(distill.main, *few, "--lpips-iterations", 1)  # and back
    assert out.read_bytes() == finished and "finished already" not in output
    assert "finished already" in call(distill.main, *few, "--lpips-iterations", 1)[1]


def test_progress_bar_counts_the_pairs_of_all_processes(monkeypatch, tmp_path):
    """The first of two processes generates shards 0 and 2, and its bar ends at all pairs."""
    bars = []

    class Bar(pairs.tqdm):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            bars.append(self)

    model = checkpoint.load(TINY_TEACHER)
    monkeypatch.setattr(pairs, "PAIRS_PER_SHARD", 4)
    monkeypatch.setattr(pairs, "tqdm", Bar)
    spec = pairs.make_pair_spec(model, ["a shape"], "some", 14, 1, 1.0, "dpm", "reflow", 0)
    for i in (1, 3):
        (tmp_path / f"shard-0000{i}.safetensors").touch()  # by the other process
    monkeypatch.setattr(pairs, "world_size", lambda: 2)
    monkeypatch.setattr(pairs, "all_gather", lambda items: [*items, 6])
    monkeypatch.setattr(pairs, "Pairs", lambda folder: None)
    pairs.make_pairs(model, ["a shape"], spec, tmp_path)
    assert (bars[0].total, bars[0].n) == (14, 14)


# --------------------------------------------------------------------------------------------------
# The recipes


# Small counts, which override the recipe's since they come last, and what works offline.
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
# stacked.sh continues from the files of 8x80GB.sh.
RECIPES = [("8x80GB.sh", "stacked.sh"), ("1x24GB.sh",), ("laptop.sh",)]


def commands_of(recipes: tuple[str, ...], folder: Path) -> list[list[str]]:
    """The commands of some recipes as the shell runs them, with the tiny model and small counts."""
    commands, show = [], folder / "show.py"
    show.write_text("import shlex, sys\nprint(shlex.join(sys.argv[1:]))\n")
    for recipe in recipes:
        inputs = ["captions.txt"] if recipe == "stacked.sh" else [TINY_TEACHER, "captions.txt"]
        result = subprocess.run(["sh", ROOT / "recipes" / recipe, *inputs], capture_output=True,
                                env=os.environ | {"RUN": f"{sys.executable} {show}"}, text=True,
                                check=True)
        for line in result.stdout.splitlines():
            script, *arguments = shlex.split(line) if ".py " in line else [""]
            if script in FEWER:  # and not text that the recipe prints
                commands.append([script, *arguments, *map(str, FEWER[script])])
    return commands


def test_the_laptop_recipe_shows_a_finished_table_of_its_own_model_alone(tmp_path):
    """A table without its figures, after a kill, or of another model is measured again."""
    def recipe() -> str:
        return subprocess.run(["sh", ROOT / "recipes/laptop.sh"], cwd=tmp_path, text=True,
                              capture_output=True, env=os.environ | {"RUN": "echo"},
                              check=True).stdout

    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/instaflow.safetensors").touch()
    (tmp_path / "runs/evaluate.json").write_text('[{"model": "instaflow.safetensors"}]')
    assert "evaluate.py --steps" in recipe()
    (tmp_path / "runs/evaluate.md").write_text("the table")
    (tmp_path / "runs/evaluate-curves.png").touch()
    assert "the table" in recipe() and "evaluate.py --steps" not in recipe()
    (tmp_path / "runs/evaluate.json").write_text('[{"model": "tiny_sd.safetensors"}]')
    assert "evaluate.py --steps" in recipe()


@pytest.mark.parametrize("recipes", RECIPES, ids=" ".join)
def test_recipes_run_at_toy_size(call, tmp_path, recipes):
    Path("captions.txt").write_text("\n".join(
        f"a {color} {shape}" for color in ("red", "blue") for shape in ("circle", "square")))
    (Path("toy")).symlink_to(ROOT / "toy")
    for script, *arguments in commands_of(recipes, tmp_path):
        code, _, err = call(MAINS[script], *arguments)
        assert code == 0, (script, arguments, err)
    assert checkpoint.load("runs/instaflow.safetensors").kind == "one-step"


@pytest.mark.slow
@pytest.mark.parametrize("recipes", RECIPES[:2], ids=" ".join)
def test_recipes_run_in_two_processes(tmp_path, recipes):
    (tmp_path / "captions.txt").write_text("a red circle\na blue square\n")
    for script, *arguments in commands_of(recipes, tmp_path):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", ROOT / script, *arguments]
        result = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
    rows = (tmp_path / "runs/2rf.safetensors.state/metrics.jsonl").read_text().splitlines()
    assert any("held_out_loss" in json.loads(row) for row in rows)


# --------------------------------------------------------------------------------------------------
# Runs of earlier versions


EARLIER = ROOT / "tests" / "earlier"
AS_EARLIER = ["--num-pairs", 12, "--teacher-steps", 2, "--batch-size", 4, "--save-every", 2,
              "--validation-pairs", 4, "--dtype", "fp32", "--warmup-samples", 6_400]


def test_pairs_and_settings_of_an_earlier_version_are_accepted(call, monkeypatch):
    """tests/earlier has pairs and run settings by code that still had watch.py."""
    shutil.copytree(EARLIER / "pairs", "runs/pairs")
    made = Path("runs/pairs/shard-00000.safetensors").stat().st_mtime_ns
    assert call(reflow.main, *AS_EARLIER, "--iterations", 4)[0] == 0
    assert Path("runs/pairs/shard-00000.safetensors").stat().st_mtime_ns == made
    same = lambda path, name: json.loads(Path(path, "settings.json").read_text()) == json.loads(
        (EARLIER / f"{name}.json").read_text())
    assert same(STATE, "reflow")
    # Another processor trains other weights, so the flow's hash is replaced by the earlier one.
    earlier = json.loads((EARLIER / "l2.json").read_text())["pairs"]["teacher_hash"]
    for module in (pairs, checkpoint):
        monkeypatch.setattr(module, "fingerprint", lambda path: earlier)
    code, _, err = call(distill.main, *AS_EARLIER, "--l2-iterations", 2, "--lpips-iterations", 2)
    assert code == 0, err
    for stage in ("l2", "lpips"):
        assert same(f"runs/instaflow.safetensors.state/{stage}", stage)


def test_same_seed_gives_the_pairs_of_an_earlier_version(call):
    """Up to rounding: another processor may have made tests/earlier/pairs."""
    call(reflow.main, *AS_EARLIER, "--iterations", 1)
    for path in (EARLIER / "pairs").glob("shard-*"):
        earlier, now = (load_file(p) for p in (path, Path("runs/pairs") / path.name))
        assert torch.equal(earlier["seeds"], now["seeds"])
        torch.testing.assert_close(earlier["latents"], now["latents"], rtol=2e-2, atol=2e-2)
