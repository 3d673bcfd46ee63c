"""Images from images: starts on the path, inversion, interpolation, their flags and the study."""

import json
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

import checkpoint
import editing
import sample
from command import TINY_TEACHER
from conftest import ROOT, relative_error
from editing import invert, psnr, slerp
from experiments import inversion
from make_checkpoint import make_model
from formats.images import enlarged, to_bytes
from rectified_flow import euler, even_times, flow_velocity, interpolate, squared
from sample import noise_from_seeds, sample_images, sample_latents
from stable_diffusion import FewStep
from test_rectified_flow import SCHEDULE, WithoutFloat64, dummy_network, points, toy_model

TINY = ROOT / "toy/tiny_sd.safetensors"
ONE_STEP = ROOT / "toy/tiny_instaflow.safetensors"
PROMPTS, SEEDS = ["a cat", "a dog", "a cat"], [5, 6, 7]
LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
RENOISE = FewStep("renoise", 4)
KINDS = {  # name: kind, few_step, solver
    "dpm": ("diffusion", None, "dpm"), "ddim": ("diffusion", None, "ddim"),
    "flow": ("flow", None, "dpm"), "renoising diffusion": ("diffusion", RENOISE, "dpm"),
    "renoising flow": ("flow", RENOISE, "dpm"),
}


def sampler(name, **more):
    """sample_latents of a small random model, on the prompts and seeds above, in 4 steps."""
    kind, few_step, solver = KINDS[name]
    model = replace(make_model(kind=kind), few_step=few_step)
    guidance = None if few_step else 2.0
    return partial(sample_latents, model, PROMPTS, SEEDS, 4, guidance, solver=solver, **more)


# --------------------------------------------------------------------------------------------------
# A start on the path


@pytest.mark.parametrize("name", KINDS)
def test_start_at_noise_is_no_start_and_at_data_the_data(name):
    generate = sampler(name, batch_size=2)
    assert torch.equal(generate(start=(LATENTS, 0)), generate())
    assert torch.equal(generate(start=(LATENTS, 1)), LATENTS)
    errors = [relative_error(generate(start=(LATENTS, t)), LATENTS) for t in (0.3, 0.9, 0.98, 1.0)]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.15


def test_start_of_a_flow_takes_all_its_steps_after_that_time():
    generate, noise = sampler("flow"), noise_from_seeds(SEEDS, (4, 8, 8))
    model = generate.args[0]
    x, times = interpolate(noise, LATENTS, torch.full((3,), 0.4)), 0.4 + 0.6 * even_times(4)
    with torch.no_grad():
        *_, expected = euler(flow_velocity(model.unet), x, 4, model.encode_prompts(PROMPTS), times)
    actual = sample_latents(model, PROMPTS, SEEDS, 4, 1.0, start=(LATENTS, 0.4))
    torch.testing.assert_close(actual, expected)


def test_start_of_dpm_solver_agrees_with_diffusers():
    """From t = 0.5, where α = σ: x_s = (latents + noise) / √2, near timestep 500 of a linear β."""
    latents, steps, used = points(3, 7, seed=4).float(), 5, []
    noise, timesteps = noise_from_seeds(SEEDS, (7,)), SCHEDULE.sampling_timesteps(5, 0.5)
    assert abs(timesteps[0] - SCHEDULE.timestep(torch.tensor(0.5))) <= 1

    def network(x, s, context):
        used.append(s[0].item())
        return dummy_network(x, s, context)

    actual = sample_latents(toy_model("diffusion", network), PROMPTS, SEEDS, steps, 1.0,
                            start=(latents, 0.5))
    assert used == timesteps.tolist() and len(used) == steps
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=False)
    scheduler.set_timesteps(timesteps=timesteps.int().tolist())
    x = scheduler.add_noise(latents, noise, timesteps[:1].long())
    assert relative_error(x, (latents + noise) / 2**0.5) < 0.01
    for s in scheduler.timesteps:
        x = scheduler.step(dummy_network(x, torch.full((3,), float(s)), None), s, x).prev_sample
    assert relative_error(actual, x) < 1e-4


def test_start_near_the_data_takes_a_step_for_each_timestep_that_is_left():
    for t, count in ((0.0, 25), (0.5, 25), (0.96, None), (0.98, 0)):
        timesteps = SCHEDULE.sampling_timesteps(25, t).tolist()
        assert timesteps == sorted(set(timesteps), reverse=True)
        assert len(timesteps) == count or count is None and 0 < len(timesteps) < 25
        assert all(SCHEDULE.time(torch.tensor(s)) > t for s in timesteps)


def test_images_start_as_latents_do_in_any_batch():
    model = make_model(kind="flow")
    images = [sample_images(model, PROMPTS, SEEDS, 2, 1.0, start=(LATENTS, 0.7), batch_size=size)
              for size in (1, 3)]
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, few_step", [
    ("one-step", None), ("flow", FewStep("mean", 1)), ("diffusion", FewStep("euler", 4)),
])
def test_models_that_know_their_own_steps_alone_have_no_start(kind, few_step):
    with pytest.raises(AssertionError):
        sample_latents(replace(make_model(kind=kind), few_step=few_step), PROMPTS, SEEDS,
                       start=(LATENTS, 0.5))


def test_starts_and_inversion_run_without_float64():
    latents = points(3).float()

    def results(device):
        for kind, solver in (("diffusion", "dpm"), ("diffusion", "ddim"), ("flow", "dpm")):
            model, x = toy_model(kind, device=device), latents.to(device)
            yield sample_latents(model, PROMPTS, SEEDS, 3, 2.0, solver=solver, start=(x, 0.4))
            yield invert(model, x, PROMPTS, 3)

    expected = list(results("cpu"))
    for device, mode in (("cpu", nullcontext()), ("mps", WithoutFloat64())):
        with mode:
            actual = [result.cpu() for result in results(device)]
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


# --------------------------------------------------------------------------------------------------
# Inversion and interpolation


def test_straight_paths_are_inverted_exactly_in_one_step():
    """X1 = a X0 + b: the velocity X1 - X0 is constant on each path, though not between them."""
    a, b, x0 = 0.3, 2.0, points(3).float()

    def network(x, s, context):
        t = 1 - s[:, None] / 1000
        return (a - 1) * (x - t * b) / (1 - t + t * a) + b

    for steps in (1, 2, 7):
        found = invert(toy_model("flow", network), a * x0 + b, PROMPTS, steps)
        torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_round_trip_improves_with_steps(kind, guidance):
    model, errors = make_model(kind=kind), []
    for steps in (2, 8, 32, 128):
        x0 = invert(model, LATENTS, PROMPTS, steps, guidance, "a red shape")
        again = sample_latents(model, PROMPTS, x0, steps, guidance, "a red shape", "ddim")
        errors.append(relative_error(again, LATENTS))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 8


def test_inverted_noise_of_a_diffusion_is_scaled_as_sampling_starts():
    """Where the predicted noise is 0, x1 = x_s / α: the noise that leads to x1 is α_999 x1."""
    model = toy_model("diffusion", lambda x, s, context: torch.zeros_like(x))
    alpha, _ = SCHEDULE.alpha_sigma(torch.tensor(999))
    latents = points(3).float()
    for steps in (1, 10):
        torch.testing.assert_close(invert(model, latents, PROMPTS, steps), alpha.float() * latents)


def test_slerp_keeps_norms_and_ends():
    a, b = noise_from_seeds(SEEDS[:2], (4, 8, 8))
    b *= a.norm() / b.norm()
    weights = torch.linspace(0, 1, 7)
    between = slerp(a, b, weights)
    assert torch.equal(between[0], a) and torch.equal(between[-1], b)
    torch.testing.assert_close(between.flatten(1).norm(dim=1), a.norm().expand(7))
    steps = between.diff(dim=0).flatten(1).norm(dim=1)
    torch.testing.assert_close(steps, steps[:1].expand(6))  # equal angles
    assert (0.5 * (a + b)).norm() < 0.8 * a.norm()


def test_psnr_of_a_known_error():
    image = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(psnr(image, image + 0.2), torch.full((2,), 20.0))
    assert psnr(image + 1, image + 1.5).isinf().all()  # clamped


def test_given_noises_and_contexts_are_those_of_seeds_and_prompts():
    for name in KINDS:
        generate = sampler(name, batch_size=2)
        model = generate.args[0]
        noises = noise_from_seeds(SEEDS, (4, 4, 8, 8))  # 4 of each, for renoising
        given = generate.func(model, model.encode_prompts(PROMPTS), noises, *generate.args[3:],
                              **generate.keywords)
        torch.testing.assert_close(given, generate(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("prompts", [["a cat"], ["a cat", "a dog"]])
def test_interpolation_ends_at_the_plain_samples(name, prompts, tmp_path):
    kind, few_step, solver = KINDS[name]
    model = replace(make_model(kind=kind), few_step=few_step)
    generate = partial(sample_latents, model, steps=3, solver=solver)
    args = Namespace(interpolate=4, out=str(tmp_path / "out.png"), batch_size=3)
    images, columns = editing.edit(args, model, prompts, [5] * len(prompts),
                                   noise_from_seeds([5, 6], (3, 4, 8, 8)), generate)
    seeds = [5, 6] if len(prompts) == 1 else [5, 5]
    ends = sample_images(model, (prompts * 2)[:2], seeds, 3, solver=solver)
    torch.testing.assert_close(images[[0, -1]], ends, rtol=1e-3, atol=1e-3)
    assert columns == 4 and len(images) == 4 and relative_error(images[1], images[0]) > 1e-4
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.n_frames == 4 and gif.size == (128, 128)


# --------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture
def files(tmp_path):
    """flow.safetensors and photo.png (not square) in the folder of `call`."""
    checkpoint.save(checkpoint.load(TINY, kind="flow"), tmp_path / "flow.safetensors")
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[10:40, 30:60] = (250, 40, 40)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path


PROMPT = ["--prompt", "a red square", "--dtype", "fp32", "--steps", 3]


def pixels_of(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_init_image_command(files, call):
    grids = {}
    for strength in (0, 0.5, 1):
        arguments = ["--model", TINY, "--init-image", "photo.png", *PROMPT, "--num-images", 2,
                     "--strength", strength]
        code, out, err = call(sample.main, *arguments)
        assert code == 0 and "out.png: 2 images, 3 steps" in out, err
        assert Image.open("out.png").text["strength"] == str(float(strength))
        grids[strength] = pixels_of("out.png")
    assert call(sample.main, "--model", TINY, *PROMPT, "--num-images", 2)[0] == 0
    assert (grids[1] == pixels_of("out.png")).all()
    left, right = grids[0][2:130, 2:130], grids[0][2:130, 132:260]
    assert (left == right).all()  # the image itself, whatever the seed
    model = checkpoint.load(TINY)
    image = editing.read_image("photo.png", 32, 32)[None] / 127.5 - 1
    with torch.no_grad():
        decoded = model.vae.decode(editing.encode_image(model, image))
    assert abs(left - to_bytes(enlarged(decoded))[0].numpy().astype(int)).max() <= 1
    assert (grids[0.5][2:130, 2:130] != grids[0.5][2:130, 132:260]).any()

    assert call(sample.main, "--model", "flow.safetensors", "--init-image", "photo.png",
                "--height", 32, "--width", 64, *PROMPT, "--num-images", 1)[0] == 0
    image = Image.open("out.png")
    assert image.size == (256, 128) and image.text["strength"] == "0.6"


@pytest.mark.parametrize("model, arguments", [
    (TINY, PROMPT), ("flow.safetensors", PROMPT), ("flow.safetensors", [*PROMPT, "--guidance", 2]),
    (ONE_STEP, [*PROMPT[:4], "--invert-model", "flow.safetensors"]),
    (ONE_STEP, [*PROMPT[:4], "--invert-model", TINY]),
])
def test_invert_command(files, call, model, arguments):
    code, out, err = call(sample.main, "--model", model, "--invert", "photo.png", *arguments)
    assert code == 0, err
    assert out.startswith("round trip: RMS ") and " dB by the autoencoder alone" in out
    image = Image.open("out.png")
    assert image.size == (2 * 130 + 2, 132) and image.text["invert"] == "photo.png"
    assert image.text["guidance"] == ("2.0" if "--guidance" in arguments else "1.0")
    left = pixels_of("out.png")[2:130, 2:130]
    assert left[64, 64].tolist() == [250, 40, 40] and left[2, 2].tolist() == [0, 0, 0]


def test_invert_command_prints_the_round_trip_of_its_model(files, call):
    _, out, _ = call(sample.main, "--model", TINY, "--invert", "photo.png", *PROMPT)
    model = checkpoint.load(TINY)
    image = editing.read_image("photo.png", 32, 32)[None] / 127.5 - 1
    latents = editing.encode_image(model, image)
    x0 = invert(model, latents, ["a red square"], 3)
    again = sample_latents(model, ["a red square"], x0, 3, 1.0, solver="ddim")
    assert f"RMS {squared(again, latents).sqrt().item():.3f} of latents" in out


def test_interpolate_command_ends_at_the_plain_images(files, call):
    one, two = ["--prompt", "a red square"], ["--prompt", "a blue circle"]
    plain = {}
    for name, prompt in {"first": one, "second": two}.items():
        arguments = [*prompt, "--num-images", 2, "--dtype", "fp32", "--model", ONE_STEP]
        assert call(sample.main, *arguments)[0] == 0
        plain[name] = pixels_of("out.png")
    for name, arguments in {"seeds": one, "prompts": [*one, *two]}.items():
        code, out, err = call(sample.main, *arguments, "--interpolate", 3, "--out", "strip.png",
                              "--dtype", "fp32", "--model", ONE_STEP)
        assert code == 0 and "3 images" in out, err
        strip = pixels_of("strip.png")
        assert strip.shape == (132, 3 * 130 + 2, 3)
        right = plain["first"][:, 132:260] if name == "seeds" else plain["second"][:, 2:130]
        for expected, actual in ((plain["first"][:, 2:130], strip[:, 2:130]),
                                 (right, strip[:, 262:390])):
            assert abs(expected[2:130] - actual[2:130]).max() <= 1
        with Image.open("strip.gif") as gif:
            assert gif.n_frames == 3 and gif.size == (128, 128)


BAD = {
    "one-step start": (
        ["--model", ONE_STEP, "--init-image", "photo.png"],
        f"--init-image: {ONE_STEP} is a one-step model, trained at t = 0 alone; it needs the noise "
        "of the image, by --invert IMAGE --invert-model FLOW",
    ),
    "few-step start": (
        ["--model", "mean.safetensors", "--init-image", "photo.png"],
        "is a few-step model, trained for its own steps alone",
    ),
    "one-step inversion": (
        ["--model", ONE_STEP, "--invert", "photo.png"],
        "is a one-step model, trained at t = 0 alone, so it has no ODE that runs backwards; give a",
    ),
    "few-step inversion": (
        ["--model", TINY, "--invert", "photo.png", "--invert-model", "mean.safetensors"],
        "--invert: mean.safetensors is a few-step model",
    ),
    "another dataset": (
        ["--model", ONE_STEP, "--invert", "photo.png", "--invert-model",
         ROOT / "toy/tiny_emoji.safetensors"], "tiny_emoji.safetensors has other latents than",
    ),
    "two modes": (
        ["--init-image", "photo.png", "--interpolate", 3],
        "--interpolate: not allowed with argument --init-image",
    ),
    "strength alone": (["--strength", 0.5], "--strength 0.5: is for --init-image"),
    "too strong": (
        ["--init-image", "photo.png", "--strength", 1.1], "--strength 1.1: is for --init-image, and"
    ),
    "model alone": (["--invert-model", TINY], "--invert-model: is for --invert"),
    "no image": (
        ["--model", TINY, "--init-image", "none.png"], "none.png: not a readable image"
    ),
    "two prompts": (
        ["--model", TINY, "--invert", "photo.png", "--prompt", "a", "--prompt", "b"],
        "--invert: 2 prompts given; give the image's own",
    ),
    "three prompts": (
        ["--interpolate", 3, "--prompt", "a", "--prompt", "b", "--prompt", "c"],
        "--interpolate: 3 prompts given; give one or two",
    ),
    "useless number": (
        ["--interpolate", 3, "--num-images", 2], "--num-images: has no effect with --invert or"
    ),
    "no file": (["--interpolate", 3, "--out", "."], "--out .: must end in .png"),
    "no name": (["--interpolate", 3, "--out", ""], "--out : must end in .png"),
    "a folder": (["--interpolate", 3, "--out", "/"], "--out /: a folder"),
    "one frame": (["--interpolate", 1], "--interpolate: must be a whole number of at least 2"),
    "overwriting": (
        ["--model", TINY, "--init-image", "photo.png", "--out", "photo.png"],
        "photo.png: would overwrite --init-image",
    ),
}


@pytest.mark.parametrize("arguments, words", BAD.values(), ids=BAD)
def test_bad_input_is_a_one_line_error(files, call, arguments, words):
    if "mean.safetensors" in arguments:
        model = replace(checkpoint.load(TINY, kind="flow"), few_step=FewStep("euler", 4))
        checkpoint.save(model, "mean.safetensors")
    code, _, err = call(sample.main, *arguments)
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]


def test_study_of_inversion(files, call):
    code, out, err = call(inversion.main, "--flow", "flow.safetensors", "--one-step", ONE_STEP,
                          "--num-samples", 3, "--num-sets", 2, "--steps", 1, 2)
    assert code == 0 and "runs/inversion/inversion.json and .png" in out, err
    checkpoint.save(make_model(), "sd.safetensors")
    code, _, err = call(inversion.main, "--teacher", "sd.safetensors", "--flow", "sd.safetensors",
                        "--one-step", "sd.safetensors")
    assert code == 2 and "sd.safetensors: has no captions with a judge" in err
    rows = json.loads(Path("runs/inversion/inversion.json").read_text())
    assert {(row["model"], row["steps"]) for row in rows} == {
        ("autoencoder", None), ("one step, new noise", None),
        *((name, steps) for name in ("teacher", "2-RF", "one step, 2-RF's noise")
          for steps in (1, 2)),
    }
    assert rows[0]["latents_rms"] == 0 and rows[0]["psnr"] > max(row["psnr"] for row in rows[1:])
    assert all(row["psnr_interval"] > 0 for row in rows)
    assert Image.open("runs/inversion/inversion.png").size[0] > 1000


def test_steps_reach_the_inversion_by_another_many_step_model(call, tmp_path):
    """--invert-model with the model itself is --invert, to the printed digit."""
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(tmp_path / "a.png")
    said = []
    for more in ((), ("--invert-model", TINY_TEACHER)):
        code, out, err = call(sample.main, "--model", TINY_TEACHER, "--prompt", "a", "--steps", 3,
                              "--invert", "a.png", "--out", "b.png", *more)
        assert code == 0, err
        said.append(out.splitlines()[0])
    assert said[0] == said[1] and said[0].startswith("round trip")


def test_the_gif_of_an_interpolation_overwrites_no_input(call, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "g.gif")
    before = (tmp_path / "g.gif").read_bytes()
    code, _, err = call(sample.main, "--controlnet", "c.safetensors", "--control-image", "g.gif",
                        "--interpolate", 3, "--out", "g.png")
    assert code == 2 and "g.gif" in err and (tmp_path / "g.gif").read_bytes() == before
