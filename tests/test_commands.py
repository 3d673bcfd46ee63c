"""The commands as users run them: the whole method at toy size, kills and resumes, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
from PIL import Image

import checkpoint
import command
import distill
import evaluate
import pairs
import reflow
import sample
import training
import validation
from command import BadInput
from conftest import ROOT, relative_error
from make_checkpoint import make_model, write_folder, write_single_file
from processes import Process
from stable_diffusion import StableDiffusion, initial_student
from training import read_metrics, saved_step

REFLOW = ["--num-pairs", 40, "--teacher-steps", 3, "--validation-pairs", 0,
          "--iterations", 6, "--batch-size", 4, "--save-every", 1]
DISTILL = ["--num-pairs", 40, "--teacher-steps", 3, "--validation-pairs", 0,
           "--l2-iterations", 4, "--lpips-iterations", 3, "--batch-size", 4, "--save-every", 1,
           "--cooldown", 0]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pairs, "PAIRS_PER_SHARD", 16)
    monkeypatch.setattr(validation, "VALIDATION_PAIRS", 0)  # tested in tests/test_validation.py


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which reflow and distill ran with default settings, at toy size."""
    folder = tmp_path_factory.mktemp("finished")
    for name, arguments in (("reflow", REFLOW), ("distill", DISTILL)):
        assert Process(folder, name, arguments).wait() == 0
    return folder


# --------------------------------------------------------------------------------------------------
# The method


def test_whole_method_with_default_paths(finished, call):
    flow = checkpoint.load(finished / "runs/2rf.safetensors")
    student = checkpoint.load(finished / "runs/instaflow.safetensors")
    assert (flow.kind, student.kind) == ("flow", "one-step")
    teacher = checkpoint.load(ROOT / "toy/tiny_sd.safetensors")
    for part in ("vae", "text_encoder"):  # frozen parts are copied bit for bit
        for name, tensor in getattr(teacher, part).state_dict().items():
            assert torch.equal(tensor, getattr(student, part).state_dict()[name]), name
    weight = lambda model: model.unet.conv_in.weight
    assert (
        not torch.equal(weight(teacher), weight(flow))
        and not torch.equal(weight(flow), weight(student))
    )
    for path in (
        "runs/2rf.safetensors.state", "runs/instaflow.safetensors.state/l2",
        "runs/instaflow.safetensors.state/lpips",
    ):
        assert (finished / path / "loss.png").stat().st_size > 5000

    call_in_finished = lambda main, *arguments: in_folder(finished, call, main, *arguments)
    code, out, err = call_in_finished(sample.main)
    assert (
        code == 0 and "seconds each" in out
        and err.startswith("note: no --prompt given; using")
    )
    image = Image.open(finished / "out.png")
    assert image.text["steps"] == "1" and image.text["model"] == "instaflow.safetensors"
    assert image.text["seed"] == "0"
    assert image.size == (4 * 130 + 2, 132)

    code, out, err = call_in_finished(evaluate.main, "--num-samples", 32, "--steps", "4,1")
    assert code == 0 and "comparison image: runs/evaluate.png" in out
    rows = json.loads((finished / "runs/evaluate.json").read_text())
    keys = ["model", "kind", "steps", "guidance", "caption_accuracy", "frechet", "straightness",
            "relative_straightness", "seconds_per_image", "samples", "seed"]
    assert all(set(keys) <= set(row) == set(rows[0]) for row in rows)
    assert [(row["kind"], row["steps"]) for row in rows] == [
        (None, None), ("diffusion", 4), ("diffusion", 1), ("flow", 4), ("flow", 1), ("one-step", 1)
    ]
    assert rows[0]["caption_accuracy"] > 0.95 and rows[-1]["straightness"] is None
    assert rows[3]["relative_straightness"] > 0 and rows[1]["frechet"] > 0
    assert (finished / "runs/evaluate.md").read_text().count("\n") == 8
    for name in ("evaluate.png", "evaluate-curves.png"):
        assert len(Image.open(finished / "runs" / name).convert("RGB").getcolors(10**7)) > 20

    for main, arguments in ((reflow.main, REFLOW), (distill.main, DISTILL)):  # both are finished
        code, out, err = call_in_finished(main, *arguments)
        assert code == 0 and "finished already" in out


def in_folder(folder, call, main, *arguments):
    """`call`, but in the given folder instead of an empty one."""
    previous_folder = os.getcwd()
    os.chdir(folder)
    try:
        return call(main, *arguments)
    finally:
        os.chdir(previous_folder)


def test_sample_uses_the_committed_model_before_any_training(call):
    code, out, err = call(sample.main, "--num-images", 1)
    assert code == 0 and "no runs/instaflow.safetensors yet, which `make demo` makes" in err
    image = Image.open("out.png")
    assert image.size == (128, 128)  # one image has no frame
    assert image.text["model"] == "tiny_emoji_instaflow.safetensors"
    assert image.text["steps"] == "1"
    assert np.asarray(image.convert("L")).std() > 3


def test_reflow_of_a_flow_generates_its_pairs_with_euler(finished, call):
    code, out, err = call(reflow.main, "--teacher", finished / "runs/2rf.safetensors", *REFLOW)
    assert code == 0, err
    assert json.loads(Path("runs/pairs/pairs.json").read_text())["solver"] == "euler"
    assert checkpoint.load("runs/2rf.safetensors").kind == "flow"


def test_negated_init_flips_the_sign_of_a_diffusion_model_only():
    model = make_model()
    x, context, timestep = (
        torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32), torch.tensor([10.0, 900.0])
    )
    with torch.no_grad():
        before = model.unet(x, timestep, context)
        initial_student(model.unet, "negated", "flow", 0)
        torch.testing.assert_close(model.unet(x, timestep, context), before)
        initial_student(model.unet, "negated", "diffusion", 0)
        torch.testing.assert_close(model.unet(x, timestep, context), -before)


def test_init_from_a_checkpoint_starts_from_its_weights(finished, call):
    flow = finished / "runs/2rf.safetensors"
    arguments = [*REFLOW, "--learning-rate", 0, "--out", "runs/on.safetensors"]
    code, _, err = call(reflow.main, *arguments, "--init", flow)
    assert code == 0, err
    before, after = (
        checkpoint.load(path).unet.state_dict() for path in (flow, "runs/on.safetensors")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    code, _, err = call(distill.main, "--teacher", flow, *DISTILL,
                        "--init", finished / "runs/instaflow.safetensors")
    assert code == 0, err

    code, _, err = call(reflow.main, *arguments, "--init", finished / "runs/instaflow.safetensors")
    assert code == 2 and "runs/on.safetensors.state: holds another run (init was" in err
    checkpoint.save(make_model(), "other.safetensors")
    code, _, err = call(reflow.main, *REFLOW, "--init", "other.safetensors")
    assert code == 2
    assert "--init other.safetensors: its U-Net is not built like the teacher's" in err
    code, _, err = call(reflow.main, *REFLOW, "--init", "nowhere")
    assert code == 2
    assert "must be teacher, negated, random or a checkpoint that exists, got 'nowhere'" in err


def test_negated_init_reaches_a_lower_loss_than_teacher_init(call):
    losses = {}
    for init in ("teacher", "negated", "random"):
        code, _, err = call(reflow.main, *REFLOW, "--init", init,
                            "--out", f"runs/{init}.safetensors")
        assert code == 0, err
        losses[init] = read_metrics(f"runs/{init}.safetensors.state")[-1]["loss"]
    assert losses["negated"] < losses["teacher"] and len(set(losses.values())) == 3


def test_distill_accepts_a_diffusion_teacher(call):
    code, out, err = call(distill.main, "--teacher", ROOT / "toy/tiny_sd.safetensors", *DISTILL)
    assert code == 0, err
    assert json.loads(Path("runs/pairs-2rf/pairs.json").read_text())["kind"] == "diffusion"


def test_stacked_student_is_trained_and_sampled_but_not_exported(finished, call):
    teacher = finished / "runs/2rf.safetensors"
    code, out, err = call(distill.main, "--teacher", teacher, "--student", "stacked", *DISTILL)
    assert code == 0, err
    student = checkpoint.load("runs/instaflow.safetensors")
    unet = checkpoint.load(teacher).unet
    assert student.kind == "one-step" and student.unet.config.stacked
    # Both halves started from the teacher's weights, and both were trained.
    for half in (student.unet.first, student.unet.second):
        for name, weight in half.named_parameters():
            change = (weight - unet.state_dict()[name]).abs().max()
            # The file's fp16 may round away a small change of a norm's weights.
            assert change < 0.1 and (change > 0 or weight.ndim == 1), name
    code, out, err = call(sample.main, "--model", "runs/instaflow.safetensors",
                          "--prompt", "a red circle")
    assert code == 0 and Path("out.png").exists(), err
    code, out, err = call(checkpoint.main, "runs/instaflow.safetensors", "folder")
    assert code == 2 and "stacked" in err
    code, out, err = call(distill.main, "--teacher", teacher, *DISTILL)
    assert code == 2 and "student was 'stacked', now 'unet'" in err


def test_whole_method_on_a_checkpoint_in_the_published_layout(call, tmp_path):
    """Such a checkpoint has no captions: built-in prompts and a large model's defaults apply."""
    write_single_file(make_model(), tmp_path / "sd.safetensors")
    tokenizer_folder = tmp_path / "tokens"
    write_folder(make_model(), tmp_path / "folder")
    (tmp_path / "folder" / "tokenizer").rename(tokenizer_folder)
    common = ["--tokenizer", tokenizer_folder, "--batch-size", 2, "--num-pairs", 4]
    code, _, err = call(reflow.main, "--teacher", tmp_path / "sd.safetensors",
                        "--teacher-steps", 2, "--iterations", 2, *common)
    assert code == 0, err
    code, _, err = call(distill.main, "--teacher-steps", 2, "--l2-iterations", 1,
                        "--lpips-iterations", 1, "--lpips-net", "random", *common)
    assert code == 0, err
    code, out, err = call(sample.main, "--prompt", "a cat", "--num-images", 2, "--height", 64,
                          "--width", 128)
    assert code == 0, err
    assert Image.open("out.png").size == (2 * 258 + 2, 132)
    code, out, err = call(evaluate.main, "--model", "runs/2rf.safetensors", "--num-samples", 2,
                          "--steps", "2")
    assert code == 0, err
    row = json.loads(Path("runs/evaluate.json").read_text())[0]
    assert row["caption_accuracy"] is None and row["relative_straightness"] > 0


def test_every_sampling_option_but_the_batch_size_changes_the_image(call):
    model = ["--model", ROOT / "toy/tiny_sd.safetensors"]
    images = {}
    for name, options in {
        "plain": [], "again": [], "seed": ["--seed", 9], "ddim": ["--solver", "ddim"],
        "unguided": ["--guidance", 1], "unconditional": ["--guidance", 0],
        "negative": ["--negative-prompt", "a red shape"], "steps": ["--steps", 4],
        "batch": ["--batch-size", 1],
    }.items():
        code, _, err = call(sample.main, *model, "--prompt", "a red circle", "--num-images", 2,
                            "--dtype", "fp32", *options)
        assert code == 0, err
        images[name] = torch.frombuffer(
            bytearray(Image.open("out.png").tobytes()), dtype=torch.uint8
        ).float()
    assert torch.equal(images["plain"], images["again"])
    # One seed gives one image at any batch size.
    assert (images["plain"] - images["batch"]).abs().max() <= 1
    for name in ("seed", "ddim", "unguided", "unconditional", "negative", "steps"):
        assert (images["plain"] - images[name]).abs().mean() > 0.2, name


def test_reflow_loss_is_one_of_the_runs_settings(call):
    arguments = [*REFLOW, "--warmup-samples", 0, "--loss"]
    assert call(reflow.main, *arguments, "pseudo-huber")[0] == 0
    code, _, err = call(reflow.main, *arguments, "l2")
    assert code == 2 and "loss was 'pseudo-huber', now 'l2'" in err
    assert call(reflow.main, *arguments, "l2", "--out", "l2.safetensors")[0] == 0
    weights = [checkpoint.load(path).unet.conv_out.weight
               for path in ("runs/2rf.safetensors", "l2.safetensors")]
    assert not torch.equal(*weights)


def test_compiled_networks_give_the_same_results(finished, call, monkeypatch):
    # "aot_eager" captures and differentiates the graphs, without the C++ compiler that "inductor"
    # needs.
    monkeypatch.setattr(StableDiffusion.compile, "__defaults__", ("aot_eager",))
    torch.compiler.reset()
    images, weights = {}, {}
    for name, options in {"plain": [], "compiled": ["--compile"]}.items():
        arguments = ["--model", finished / "runs/instaflow.safetensors", "--num-images", 2,
                     "--out", f"{name}.png", *options]
        assert call(sample.main, *arguments)[0] == 0
        images[name] = torch.from_numpy(np.asarray(Image.open(f"{name}.png")).astype(int))
        pairs_and_length = [*REFLOW[:6], "--iterations", 2, "--batch-size", 4, "--init", "random",
                            "--out", f"{name}.safetensors"]
        assert call(reflow.main, *pairs_and_length, *options)[0] == 0
        weights[name] = checkpoint.load(f"{name}.safetensors").unet.conv_out.weight
    assert (images["plain"] - images["compiled"]).abs().max() <= 1
    assert relative_error(weights["compiled"], weights["plain"]) < 1e-4
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # something was compiled


# --------------------------------------------------------------------------------------------------
# Defaults, and the checks before the first stage


def defaults_of(call, monkeypatch, main, *arguments):
    """(TrainingOptions of each stage, number of pairs, messages) with which a command starts."""
    recorded = []

    def make_pairs(model, prompts, spec, *rest):
        recorded.append(spec["count"])
        raise BadInput("enough")

    def options(*arguments, **kwargs):
        recorded.append(training.training_options(*arguments, **kwargs))
        return recorded[-1]

    module = sys.modules[main.__module__]
    monkeypatch.setattr(module, "make_pairs", make_pairs)
    monkeypatch.setattr(module, "training_options", options)
    # The default LPIPS backbone would be downloaded.
    monkeypatch.setattr(distill, "perceptual_distance", lambda *rest, **kwargs: None)
    code, out, err = call(main, *arguments)
    assert code == 2 and err.endswith("error: enough")
    return *recorded, err


def test_defaults_for_stable_diffusion_are_the_papers(call, tmp_path, monkeypatch):
    write_single_file(make_model(), tmp_path / "sd.safetensors")
    checkpoint.save(make_model(kind="flow"), tmp_path / "2rf.safetensors")
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    options, count, err = defaults_of(call, monkeypatch, reflow.main, "--teacher", "sd.safetensors")
    assert (
        options.iterations, options.batch_size, options.accumulate, options.learning_rate
    ) == (70_000, 64, 1, 1e-6)
    assert (options.warmup_samples, options.ema_half_life, options.ema_ramp) == (
        1000 * 64, 6931 * 64, 0
    )
    assert (
        count == 50_000
        and "50,000 pairs of the built-in grammar, enough to try the method; captions" in err
    )
    options, count, _ = defaults_of(call, monkeypatch, reflow.main, "--teacher", "2rf.safetensors",
                                    "--prompts", "p.txt")
    assert options.learning_rate == 1e-7 and count == 1_600_000
    options, *_ = defaults_of(call, monkeypatch, reflow.main, "--teacher", "sd.safetensors",
                              "--batch-size", 1024)
    assert (options.accumulate, options.warmup_samples, options.ema_half_life) == (
        16, 1000 * 1024, 6931 * 1024
    )
    assert options.log_every == 1  # states between saves are written at log rows

    l2, lpips, *_ = defaults_of(call, monkeypatch, distill.main, "--teacher", "2rf.safetensors",
                                "--prompts", "p.txt")
    assert (l2.iterations, l2.batch_size, l2.accumulate, l2.learning_rate) == (
        21_500, 1024, 16, 1e-6
    )
    assert (lpips.iterations, lpips.batch_size, lpips.accumulate, lpips.learning_rate) == (
        18_000, 1024, 128, 2e-7
    )
    assert (lpips.warmup_samples, lpips.ema_half_life) == (1000 * 1024, 6931 * 1024)
    lpips_flags = ["--lpips-batch-size", 32, "--lpips-accumulate", 2, "--lpips-learning-rate", 1e-5]
    l2, lpips, *_ = defaults_of(call, monkeypatch, distill.main, "--teacher", "2rf.safetensors",
                                "--prompts", "p.txt", *lpips_flags)
    assert (l2.batch_size, lpips.batch_size, lpips.accumulate, lpips.learning_rate) == (
        1024, 32, 2, 1e-5
    )
    _, _, err = defaults_of(call, monkeypatch, reflow.main, "--teacher", "sd.safetensors",
                            "--iterations", 700)
    assert "93% of the averaged weights are still the initial ones" in err


def test_bf16_is_the_default_on_cpus_that_support_it(monkeypatch):
    for amx, avx512 in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", partial(bool, amx))
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", partial(bool, avx512))
        assert command.pick_dtype("auto", torch.device("cpu")) == (
            torch.bfloat16 if amx or avx512 else torch.float32
        )


def test_all_stages_are_checked_before_the_first_starts(finished, call):
    """Errors of the second stage are reported before the first stage continues."""
    shutil.copytree(finished / "runs", "runs")
    state = Path("runs/instaflow.safetensors.state/l2/state.safetensors").read_bytes()
    code, _, err = call(distill.main, *DISTILL, "--l2-iterations", 8)
    assert code == 2 and "lpips: holds another run (seen was 16, now 32)" in err
    code, _, err = call(distill.main, *DISTILL, "--l2-iterations", 2)
    assert code == 2 and "its run is at iteration 4, beyond the 2 asked for" in err
    assert Path("runs/instaflow.safetensors.state/l2/state.safetensors").read_bytes() == state


def test_lpips_out_of_memory_keeps_the_l2_model_and_resumes(finished, call, monkeypatch):
    """The L2 model is saved, and the run continues with smaller micro-batches."""
    Path("runs").mkdir()
    shutil.copy(finished / "runs/2rf.safetensors", "runs/2rf.safetensors")

    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(distill, "perceptual", lambda *arguments: out_of_memory)
        code, _, err = call(distill.main, *DISTILL)
    assert code == 2 and "distill, LPIPS: out of memory; no state is saved yet" in err
    assert "--lpips-accumulate" in err
    assert checkpoint.load("runs/instaflow-l2.safetensors").kind == "one-step"
    code, _, err = call(distill.main, *DISTILL, "--accumulate", 2, "--lpips-accumulate", 4,
                        "--lpips-batch-size", 8)
    assert code == 0, err
    assert saved_step("runs/instaflow.safetensors.state/lpips") == 3


def test_second_stage_continues_the_shuffled_order_of_the_first(finished, call, monkeypatch):
    used = []
    get_item = pairs.Pairs.__getitem__
    monkeypatch.setattr(
        pairs.Pairs, "__getitem__",
        lambda self, indices: used.extend(indices.tolist()) or get_item(self, indices),
    )
    few = ["--num-pairs", 40, "--teacher-steps", 1, "--l2-iterations", 6, "--lpips-iterations", 4,
           "--batch-size", 4, "--validation-pairs", 0]
    assert call(distill.main, "--teacher", finished / "runs/2rf.safetensors", *few)[0] == 0
    assert sorted(used) == list(range(40))  # 24 in the first stage, the other 16 in the second


# --------------------------------------------------------------------------------------------------
# Locks, kills and Ctrl-C


def wait_for(process: Process, path: Path) -> None:
    """Wait until the process writes the file; fail if the process ends first."""
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.05)


def test_second_command_in_a_locked_folder_is_refused(call, tmp_path):
    first = Process(
        tmp_path, "reflow", [*REFLOW[:2], "--teacher-steps", 900, "--iterations", 1])
    wait_for(first, tmp_path / "runs/pairs/pairs.json")
    for out, folder in (
        ("runs/2rf.safetensors", "runs/2rf.safetensors.state"),
        ("other.safetensors", "runs/pairs"),
    ):
        code, _, err = call(reflow.main, *REFLOW, "--teacher-steps", 900, "--out", out)
        assert code == 2
        message = "another run works in this folder; wait for it, or name another"
        assert err == f"error: {folder}: {message}"
    assert first.poll() is None
    first.kill()


@pytest.mark.parametrize(
    "name, arguments, reached",
    [
        ("reflow", REFLOW, lambda folder: list((folder / "runs/pairs").glob("shard-00001*"))),
        ("reflow", REFLOW, lambda folder: saved_step(folder / "runs/2rf.safetensors.state") >= 2),
        ("distill", DISTILL,
         lambda folder: saved_step(folder / "runs/instaflow.safetensors.state/l2") >= 2),
        ("distill", DISTILL,
         lambda folder: saved_step(folder / "runs/instaflow.safetensors.state/lpips") >= 1),
    ],
    ids=["pairs", "reflow", "L2", "LPIPS"],
)
def test_killed_command_resumes_to_the_same_bytes(finished, tmp_path, name, arguments, reached):
    (tmp_path / "runs").mkdir()
    if name == "distill":
        shutil.copy(finished / "runs/2rf.safetensors", tmp_path / "runs/2rf.safetensors")
    process = Process(tmp_path, name, arguments)
    while process.poll() is None and not reached(tmp_path):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert Process(tmp_path, name, arguments).wait() == 0, (tmp_path / f"{name}.log").read_text()
    out = "runs/2rf.safetensors" if name == "reflow" else "runs/instaflow.safetensors"
    same = (tmp_path / out).read_bytes() == (finished / out).read_bytes()
    assert same  # comparing in the assertion would print both files


def test_ctrl_c_during_pair_generation_says_how_to_continue(tmp_path):
    process = Process(tmp_path, "reflow", [*REFLOW[:2], "--teacher-steps", 200])
    wait_for(process, tmp_path / "runs/pairs/pairs.json")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 2
    log = (tmp_path / "reflow.log").read_text()
    assert "error: interrupted; run the same command again to continue" in log
    assert "Traceback" not in log


# --------------------------------------------------------------------------------------------------
# Bad input: exit code 2 and one line

TINY = ROOT / "toy/tiny_sd.safetensors"
BAD = {
    "missing teacher": (
        reflow, ["--teacher", "none.safetensors"], "none.safetensors: no such file"
    ),
    "missing flow": (distill, [], "runs/2rf.safetensors: no such file"),
    "missing model": (
        sample, ["--model", "runs/x.safetensors"], "no such file or folder; `make demo`"
    ),
    "nothing to evaluate": (evaluate, [], "runs/2rf.safetensors: no such checkpoint"),
    "pickle": (reflow, ["--teacher", "a.ckpt"], "a.ckpt: only .safetensors is read"),
    "corrupted": (
        reflow, ["--teacher", "corrupt.safetensors"],
        "corrupt.safetensors: not a complete safetensors file",
    ),
    "no prompts": (reflow, ["--prompts", "empty.txt"], "empty.txt: holds no prompt"),
    "no prompt file": (reflow, ["--prompts", "none.txt"], "none.txt: cannot be read"),
    "not UTF-8": (reflow, ["--prompts", "latin.txt"], "latin.txt: not UTF-8"),
    "no column": (
        reflow, ["--prompts", "a.tsv", "--prompt-column", "x"], "a.tsv: has no column 'x'"
    ),
    "size": (sample, ["--height", 500], "--height: must be a multiple of 8"),
    "zero pairs": (
        reflow, ["--num-pairs", 0], "--num-pairs: must be a whole number of at least 1, got '0'"
    ),
    "negative steps": (
        reflow, ["--teacher-steps", -1],
        "--teacher-steps: must be a whole number of at least 1 and below 1,001",
    ),
    "zero batch": (
        distill, ["--batch-size", 0], "--batch-size: must be a whole number of at least 1"
    ),
    "zero steps": (sample, ["--steps", 0], "--steps: must be a whole number of at least 1"),
    "words for steps": (
        evaluate, ["--steps", "1,many"],
        "--steps: must be a whole number of at least 1 and below 1,001",
    ),
    "guidance": (sample, ["--guidance", "nan"], "--guidance: must be a number of at least 0"),
    "unknown flag": (reflow, ["--stepz", 3], "unrecognized arguments: --stepz 3"),
    "unknown device": (reflow, ["--device", "cuda:77"], "--device cuda:77: not usable"),
    "device without numbers": (reflow, ["--device", "meta"], "--device meta: not usable"),
    "output is a folder": (evaluate, ["--model", TINY, "--out", "."], ".: is a folder"),
    "output of another kind": (reflow, ["--out", "flow.pt"], "--out: must end in .safetensors"),
    "more than a share": (distill, ["--cooldown", 5], "--cooldown: must be a number of at least 0"),
    "too few to grade": (
        evaluate, ["--model", TINY, "--num-samples", 3], "precision and recall need 5 or more"
    ),
    "useless prompts": (
        evaluate, ["--model", TINY, "--prompts", "a.tsv"], "--prompts: is for --coco or --images"
    ),
    "output in a file": (
        reflow, ["--out", "empty.txt/x.safetensors"], "empty.txt/x.safetensors: cannot be written"
    ),
    "useless negative": (
        sample, ["--model", TINY, "--guidance", 1, "--negative-prompt", "x"],
        "no effect at guidance 1",
    ),
    "too many solver steps": (
        sample, ["--steps", 2000], "--steps: must be a whole number of at least 1 and below 1,001"
    ),
    "too many steps of pairs": (
        reflow, ["--teacher-steps", 1001],
        "--teacher-steps: must be a whole number of at least 1 and below 1,001",
    ),
    "kinds of several models": (
        evaluate, ["--model", TINY, TINY, "--kind", "flow"],
        "--kind: 1 given for 2 models; give one for each, in order",
    ),
    "a run's seed": (
        reflow, ["--seed", 2**24],
        "--seed: must be a whole number of at least 0 and below 16,777,216, got",
    ),
    "pairs of the grammar": (
        reflow, ["--teacher", "sd.safetensors", "--num-pairs", 50_001],
        "--num-pairs 50001: the built-in grammar is good for 50,000; captions are to be had as "
        "LAION's or COCO's lists",
    ),
    "nothing to distill": (
        distill, ["--teacher", TINY, "--l2-iterations", 0, "--lpips-iterations", 0],
        "both 0: nothing to do",
    ),
    "backbone offline": (
        distill, ["--teacher", TINY, "--lpips-net", "vgg"],
        "--lpips-net vgg: its backbone could not be",
    ),
    "not a tokenizer": (reflow, ["--tokenizer", "."], ".: holds no tokenizer"),
    "training in fp16": (reflow, ["--dtype", "fp16"], "train in bf16 or fp32"),
    "distilling in fp16": (
        distill, ["--teacher", TINY, "--dtype", "fp16", "--lpips-net", "random"],
        "--dtype fp16: is for sampling only; train in bf16 or fp32",
    ),
    "EMA": (checkpoint, [TINY, "out", "--use-ema"], "holds no averaged weights"),
}


@pytest.mark.parametrize("module, arguments, words", BAD.values(), ids=BAD)
def test_bad_input_is_a_one_line_error(call, tmp_path, monkeypatch, module, arguments, words):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-cache"))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    if "sd.safetensors" in arguments:
        write_single_file(make_model(), tmp_path / "sd.safetensors")
    Path(tmp_path, "a.ckpt").write_bytes(b"x")
    Path(tmp_path, "corrupt.safetensors").write_bytes(b"x" * 1000)
    Path(tmp_path, "empty.txt").write_text("")
    Path(tmp_path, "latin.txt").write_bytes("café".encode("latin-1"))
    Path(tmp_path, "a.tsv").write_text("Prompt\na cat\n")
    code, out, err = call(module.main, *arguments)
    assert code == 2
    assert err.count("\n") == 0 and err.startswith("error: ") and words in err


def offline(*arguments, **options):
    raise OSError("no network")


def test_script_shows_one_error_line_and_no_traceback(tmp_path):
    line = [sys.executable, str(ROOT / "reflow.py"), "--teacher", "none.safetensors"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: none.safetensors")


def test_one_step_model_is_refused_as_teacher_and_for_more_steps(finished, call):
    student = finished / "runs/instaflow.safetensors"
    for main, arguments, words in (
        (sample.main, ["--model", student, "--steps", 4],
         "is a one-step model, trained at t = 0 alone"),
        (reflow.main, ["--teacher", student], "has no path to learn from"),
        (distill.main, ["--teacher", student], "has no path to learn from"),
    ):
        code, _, err = call(main, *arguments)
        assert code == 2 and words in err


def test_changed_settings_are_refused_by_name(finished, call):
    call_in_finished = lambda *arguments: in_folder(
        finished, call, reflow.main, *REFLOW, *arguments
    )
    code, _, err = call_in_finished("--teacher-guidance", 3)
    assert code == 2 and "guidance was 2.5, now 3.0" in err and "--pairs" in err
    code, _, err = call_in_finished("--learning-rate", 1)
    assert code == 2 and "learning_rate was 0.0005, now 1.0" in err


def test_unwritable_output_is_refused(call, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    code, _, err = call(reflow.main, "--out", "x/y.safetensors")
    assert code == 2 and "x/y.safetensors: cannot be written (Permission denied)" in err


def test_checking_an_output_spares_what_another_run_writes(tmp_path):
    path = tmp_path / "2rf.safetensors"

    def write(temporary):
        Path(temporary).write_text("whole")
        command.check_output(path)  # of a second run, before its lock refuses it

    command.write_atomically(path, write)
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_full_disk_leaves_no_partial_file(tmp_path):
    """Complete files survive. A limit on file sizes stands in for a full disk."""
    assert Process(tmp_path, "reflow", REFLOW, file_limit=1_000_000).wait() == 2
    log = (tmp_path / "reflow.log").read_text()
    assert "Traceback" not in log and "state.safetensors: could not be written" in log
    assert len(list((tmp_path / "runs/pairs").glob("shard*"))) == 3
    assert not list((tmp_path / "runs/2rf.safetensors.state").glob("*state.*"))


def test_full_disk_leaves_no_partial_folder(tmp_path):
    process = Process(tmp_path, "checkpoint", [TINY, "sd"], file_limit=1_000_000)
    assert process.wait() == 2
    log = (tmp_path / "checkpoint.log").read_text()
    assert "sd: could not be written" in log and "Traceback" not in log
    assert not (tmp_path / "sd").exists() and not (tmp_path / ".sd.tmp").exists()


def test_blank_prompt_lines_give_one_note(call, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n\n\na blue square\n")
    code, _, err = call(reflow.main, *REFLOW, "--prompts", "p.txt")
    assert code == 0 and err == "note: p.txt: 2 blank lines are skipped"
