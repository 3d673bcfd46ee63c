"""Models from the hub's cache, and another autoencoder for a model. Nothing is fetched here."""

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import evaluate
import reflow
import sample
from command import TINY_TEACHER, BadInput
from formats.hub import fetch, is_hub_name, name_of
from formats.images import read_image, save_image
from formats.single_file import VAE_PREFIX
from formats.vae_file import replace_vae
from make_checkpoint import make_model
from stable_diffusion import FewStep


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def put(model, cache, name="XCLIU/instaflow_tiny"):
    """The model's diffusers folder as the hub's client caches it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    checkpoint.export(model, repository / "snapshots" / "0123abc", torch.float32)
    return name


def test_a_cached_model_opens_by_its_name(cache, call):
    model = make_model()
    name = put(model, cache)
    opened = checkpoint.load(name)
    for name_, weight in model.unet.state_dict().items():
        torch.testing.assert_close(opened.unet.state_dict()[name_], weight)
    assert call(checkpoint.main, name, "copy.safetensors")[0] == 0
    assert checkpoint.load("copy.safetensors").kind == opened.kind


def test_every_command_takes_a_cached_model(cache, call, monkeypatch):
    name = put(checkpoint.load(TINY_TEACHER), cache, "org/teacher")
    training = ["--num-pairs", 4, "--teacher-steps", 2, "--validation-pairs", 0, "--batch-size", 2]
    difference = ["--add-difference", name, TINY_TEACHER, "--prompt", "a", "--num-images", 1]
    for main, *arguments in (
        (reflow.main, "--teacher", name, "--iterations", 1, *training),
        (sample.main, "--model", name, *difference, "--steps", 1, "--out", "many/"),
        (reflow.main, "--init", name, "--iterations", 1, *training, "--out", "b.safetensors",
         "--pairs", "pairs"),
        (evaluate.main, "--model", name, TINY_TEACHER, "--num-samples", 10, "--steps", 1),
    ):
        code, _, err = call(main, *arguments)
        assert code == 0, err
    models = {row["model"] for row in json.loads(Path("runs/evaluate.json").read_text())}
    assert models == {"real", name, "tiny_sd.safetensors"}
    # Names differ by their organisations; an unknown name is refused before any work.
    shutil.copytree(cache / "models--org--teacher", cache / "models--other--teacher")
    two = ["--model", name, "other/teacher", "--num-samples", 10, "--steps", 1]
    assert call(evaluate.main, *two)[0] == 0
    monkeypatch.setattr(checkpoint, "load", None)
    code, _, err = call(evaluate.main, "--model", TINY_TEACHER, "nobody/typo")
    assert code == 2 and err.startswith("error: nobody/typo: no such file or folder")


def test_only_a_folder_of_the_cache_gives_its_name(tmp_path):
    assert name_of(tmp_path / "models--a--b" / "snapshots" / "0123abc") == "a/b"
    for folder in ("snapshots", "models--a--b", "runs"):
        assert name_of(tmp_path / folder / "m.safetensors") == "m.safetensors"


def test_a_small_tmp_is_not_a_damaged_tokenizer(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(OSError):
        checkpoint.load(TINY_TEACHER, "meta")


def test_offline_and_not_cached_is_one_line(cache, call):
    code, _, err = call(sample.main, "--model", "some/model")
    assert code == 2 and "\n" not in err and "cannot be reached" in err


@pytest.mark.parametrize("problem, said", [
    (RuntimeError("Task error: CAS Client Error"), "the download broke off (Task error"),
    (OSError(28, "No space left on device"), "No space left on device; finished files are kept"),
])
def test_a_broken_download_is_one_line(monkeypatch, call, problem, said):
    def download(*arguments, **more):
        raise problem

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setitem(sys.modules, "httpx", None)  # comes with gradio alone
    code, _, err = call(sample.main, "--model", "some/model")
    assert code == 2 and said in err and "\n" not in err


def test_a_local_path_wins(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(make_model(), cache, "org/name")
    assert is_hub_name("org/name") and not is_hub_name("org/name.safetensors")
    assert not is_hub_name("a/b/c") and not is_hub_name("name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_hub_name("org/name")


def test_only_what_is_read_is_asked_for(monkeypatch, tmp_path):
    """Variants are fetched only for a network without other weights."""
    files = ["model_index.json", "safety_checker/model.safetensors", "tokenizer/vocab.json",
             "unet/model.safetensors", "unet/model.fp16.safetensors", "unet/model.bin",
             "vae/model.fp16.safetensors", "text_encoder/model.fp16.safetensors"]
    calls = []

    def download(name, allow_patterns, ignore_patterns=None):
        calls.append(name)
        for file in filter_repo_objects(files, allow_patterns=allow_patterns,
                                        ignore_patterns=ignore_patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch("org/name") == tmp_path and len(calls) == 2
    fetched = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")}
    assert fetched == {file for file in files if "/" in file} - {
        "safety_checker/model.safetensors", "unet/model.fp16.safetensors", "unet/model.bin"}
    assert fetch("org/name") == tmp_path and len(calls) == 3


# --------------------------------------------------------------------------------------------------
# Another autoencoder


@pytest.fixture(scope="module")
def other():
    """A model with the small sizes and other weights."""
    return make_model(seed=7)


def layouts(other, folder):
    """The other autoencoder as a diffusers folder, as original files, and in a whole model."""
    checkpoint.export(other, folder / "sd", torch.float32)
    checkpoint.save(other, folder / "whole.safetensors", None)
    whole = load_file(folder / "whole.safetensors")
    original = {key: x for key, x in whole.items() if key.startswith(VAE_PREFIX)}
    bare = {key.removeprefix(VAE_PREFIX): x for key, x in original.items()}
    save_file(bare | {"loss.logvar": torch.zeros(1)}, folder / "ft-mse.safetensors")
    shutil.copy(folder / "sd/vae/diffusion_pytorch_model.safetensors", folder / "kl.safetensors")
    with_loss = whole | {VAE_PREFIX + "loss.logvar": torch.zeros(1)}
    save_file(with_loss, folder / "with-loss.safetensors")
    files = ("with-loss", "ft-mse", "kl", "whole")
    return [folder / "sd" / "vae", *(folder / f"{name}.safetensors" for name in files)]


def test_every_layout_of_an_autoencoder_is_read(other, tmp_path):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = other.vae.decode(latents)
    for path in layouts(other, tmp_path):
        model = make_model()
        assert not torch.allclose(model.vae.decode(latents), wanted, atol=1e-3)
        replace_vae(model, path)
        torch.testing.assert_close(model.vae.decode(latents), wanted, atol=1e-5, rtol=1e-5)
    theirs = AutoencoderKL.from_pretrained(tmp_path / "sd" / "vae")
    images = theirs.decode(latents / theirs.config.scaling_factor).sample
    torch.testing.assert_close(wanted, images, atol=1e-5, rtol=1e-5)


def test_sample_takes_another_autoencoder(other, tmp_path, call):
    *_, path, _ = layouts(other, tmp_path)
    checkpoint.save(make_model(), "model.safetensors")
    images = []
    for more in ((), ("--vae", path)):
        options = ["--prompt", "a", "--steps", 2, "--num-images", 1, "--out", "a.png", *more]
        assert call(sample.main, "--model", "model.safetensors", *options)[0] == 0
        images.append((tmp_path / "a.png").read_bytes())
    assert images[0] != images[1]


def test_what_is_no_autoencoder_is_refused_in_one_line(tmp_path, call):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({"conditioner.a": torch.zeros(1)}, tmp_path / "xl.safetensors")
    checkpoint.save(make_model(), "sd_xl_base_1.0.safetensors")
    (tmp_path / "sdxl-vae").mkdir()
    shutil.copy("sd_xl_base_1.0.safetensors", "sdxl-vae/diffusion_pytorch_model.safetensors")
    (tmp_path / "vae.pt").touch()
    model = make_model()
    model.vae.config = replace(model.vae.config, scaling_factor=0.13)  # SDXL's
    checkpoint.export(model, "sdxl", torch.float32)
    with pytest.raises(BadInput, match="another scaling_factor"):
        replace_vae(make_model(), "sdxl/vae")
    for path, said in (("a.safetensors", "tensors are missing"), ("vae.pt", "pickle"),
                       ("xl.safetensors", "of Stable Diffusion XL"),
                       ("sd_xl_base_1.0.safetensors", "of Stable Diffusion XL"),
                       ("sdxl-vae/diffusion_pytorch_model.safetensors", "of Stable Diffusion XL"),
                       ("none.safetensors", "no such file"), (".", "config.json"),
                       ("sdxl/text_encoder", "its configuration is not that of")):
        code, _, err = call(sample.main, "--model", TINY_TEACHER, "--vae", path)
        assert code == 2 and said in err and "\n" not in err, err


# --------------------------------------------------------------------------------------------------
# Many images


def test_a_folder_gets_a_png_an_image_and_continues(call, monkeypatch, tmp_path):
    (tmp_path / "captions.txt").write_text("a red circle\na blue square\n")
    arguments = ["--model", TINY_TEACHER, "--prompts", "captions.txt", "--num-images", 2, "--steps",
                 2, "--seed", 5, "--batch-size", 3, "--dtype", "fp32", "--out", "many/"]
    code, out, err = call(sample.main, *arguments)
    assert (code, out) == (0, "many/: 4 images, 4 of them new\n"), err
    names = ["000000-5.png", "000001-6.png", "000002-5.png", "000003-6.png"]
    files = {path.name: path.read_bytes() for path in (tmp_path / "many").glob("*.png")}
    assert sorted(files) == names
    image = Image.open(tmp_path / "many" / names[3])
    assert image.size == (32, 32) and image.text["prompt"] == "a blue square"
    assert image.text["parameters"] == ("a blue square\nSteps: 2, Sampler: DPM++ 2M, CFG scale: "
                                        "2.5, Seed: 6, Size: 32x32, Model: tiny_sd")
    assert image.text["solver"] == "dpm"
    model = checkpoint.load(TINY_TEACHER)  # few-step and flow models have samplers of their own
    few_step = FewStep("renoise", 4)
    for name, change in (("renoise", {"few_step": few_step}), ("euler", {"kind": "flow"})):
        checkpoint.save(replace(model, **change), "other.safetensors")
        other = ["--model", "other.safetensors", *arguments[2:-1], f"{name}/"]
        assert call(sample.main, *other)[0] == 0
        about = Image.open(f"{name}/{names[0]}").text
        assert about["solver"] == name
        assert f"Sampler: {'LCM' if name == 'renoise' else 'Euler'}," in about["parameters"]
    # As if interrupted: what is missing is made again, to the byte, and nothing else.
    (tmp_path / "many" / names[2]).unlink()
    assert "4 images, 1 of them new" in call(sample.main, *arguments)[1]
    assert {path.name: path.read_bytes() for path in (tmp_path / "many").glob("*.png")} == files
    for more, said in ((["--guidance", 1], "guidance"), (["--height", 64], "size"),
                       (["--prompt", "a red circle"], "prompts"), (["--seed", 6], "seeds"),
                       (["--dtype", "bf16"], "dtype")):
        code, _, err = call(sample.main, *arguments, *more)
        assert code == 2 and "holds other images (" in err and said in err, err
        assert {path.name: path.read_bytes() for path in (tmp_path / "many").glob("*.png")} == files
    (tmp_path / "many" / "settings.json").unlink()  # images of nobody knows what
    code, _, err = call(sample.main, *arguments)
    assert code == 2 and "holds other images" in err
    code, _, err = call(sample.main, "--out", "many/", "--interpolate", 3)
    assert code == 2 and "give one image file" in err


def test_a_folder_continues_with_the_same_additions_alone(call, tmp_path, other):
    layouts(other, tmp_path)
    checkpoint.save(make_model(), "model.safetensors")
    width = make_model().unet.mid_block.attentions[0].proj_in.weight.shape[0]
    name = "lora_unet_mid_block_attentions_0_proj_in"
    lora = {f"{name}.lora_down.weight": torch.randn(2, width, 1, 1),
            f"{name}.lora_up.weight": torch.randn(width, 2, 1, 1)}
    save_file(lora, "l.safetensors")
    base = ["--model", "model.safetensors", "--prompt", "a", "--steps", 1, "--num-images", 1]
    added = ["--lora", "l.safetensors:0.5", "--vae", tmp_path / "kl.safetensors"]
    for again in ("1 of them new", "0 of them new"):
        code, out, err = call(sample.main, *base, *added, "--out", "c/")
        assert code == 0 and again in out, err
    assert Image.open("c/000000-0.png").text["lora"] == "['l.safetensors:0.5']"
    for less, said in ((added[2:], "lora"), (added[:2], "vae")):
        code, _, err = call(sample.main, *base, *less, "--out", "c/")
        assert code == 2 and said in err, err
    checkpoint.save(make_model(seed=3), "model.safetensors")  # another model by the same name
    code, _, err = call(sample.main, *base, *added, "--out", "c/")
    assert code == 2 and "files differ" in err
    code, _, err = call(sample.main, *base, *added, "--decoder", "l.safetensors")
    assert code == 2 and "\n" not in err


def test_what_no_file_can_hold_is_refused_before_the_work(call):
    model = ["--model", TINY_TEACHER, "--prompt", "a", "--steps", 1]
    for count, out in ((200, "w.webp"), (600, "w.jpg")):
        code, _, err = call(sample.main, *model, "--num-images", count, "--out", out)
        assert code == 2 and "take .png, or DIR/" in err
    (long := Path("long.txt")).write_text("\n".join("a circle " * 40 for _ in range(300)))
    about = {"prompt": long.read_text()}
    save_image("long.jpg", np.zeros((8, 8, 3), np.uint8), about)
    assert Image.open("long.jpg").size == (8, 8)
    for out in ("a.png", "a.jpg"):  # a file name that is not Unicode
        save_image(out, np.zeros((8, 8, 3), np.uint8), {"model": "caf\udce9.safetensors"})
        assert Image.open(out).size == (8, 8)


def test_a_malformed_hub_name_is_one_line(call):
    for name in ("a--b/c", "x/y.git"):
        code, _, err = call(sample.main, "--model", name)
        assert code == 2 and "\n" not in err and name in err


def test_images_are_read_upright_and_on_white(tmp_path):
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255  # white above black
    turned, exif = Image.fromarray(half).rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise, to see it
    turned.save(tmp_path / "turned.png", exif=exif)
    assert (read_image(tmp_path / "turned.png", 8, 8).permute(1, 2, 0).numpy() == half).all()
    deep = Image.fromarray(np.asarray(turned.convert("L")).astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png", exif=exif)
    assert (read_image(tmp_path / "deep.png", 8, 8).permute(1, 2, 0).numpy() == half).all()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", 8, 8) == 255).all()


def test_one_flag_takes_several_prompts(call, tmp_path):
    arguments = ["--num-images", 1, "--model", TINY_TEACHER, "--steps", 1, "--out", "b/"]
    assert call(sample.main, "--prompt", "a red circle", "a circle", *arguments)[0] == 0
    assert len(list((tmp_path / "b").glob("*.png"))) == 2
