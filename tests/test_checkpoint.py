"""Loading and saving: both layouts, every variant of published files, every refused file."""

import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersVAE
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

import checkpoint
from app_sampling import find_models
import command
from command import TINY_TEACHER, BadInput
from conftest import ROOT, relative_error
from formats.single_file import METADATA
from formats.tokenizers import merges_text, tokenizer_parts
from make_checkpoint import make_model, single_file_tensors, write_folder, write_single_file
from sample import noise_from_seeds, sample_images
from stable_diffusion import StableDiffusion
from text_encoder import TextEncoder, TextEncoderConfig, tokenize
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def model():
    return make_model()


def assert_same(a, b, dtype=torch.float32):
    for part in PARTS:
        ours, theirs = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        assert list(ours) == list(theirs)
        for name in ours:
            assert torch.equal(ours[name], theirs[name].to(dtype).to(ours[name].dtype)), name


def full_size_on_meta():
    with torch.device("meta"):
        networks = UNet(UNetConfig()), AutoencoderKL(VAEConfig()), TextEncoder(TextEncoderConfig())
    return StableDiffusion(*networks, None, "diffusion")


def test_single_file_names_and_shapes_match_diffusers_converter():
    full = full_size_on_meta()
    tensors = single_file_tensors(full, torch.float16)
    count = lambda prefix: sum(name.startswith(prefix) for name in tensors)
    assert count("model.diffusion_model.") == 686
    assert count("first_stage_model.") == 248
    assert count("cond_stage_model.transformer.text_model.") == 196 + 1  # and position_ids
    assert tensors["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)

    config = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
    unet = convert_ldm_unet_checkpoint(dict(tensors), config)
    assert {n: tuple(t.shape) for n, t in unet.items()} == {
        n: tuple(t.shape) for n, t in full.unet.state_dict().items()
    }
    vae = convert_ldm_vae_checkpoint(
        dict(tensors), {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
    )
    assert {n: tuple(t.shape) for n, t in vae.items()} == {
        n: tuple(t.shape) for n, t in full.vae.state_dict().items()
    }


def test_single_file_tensors_match_diffusers_converter(model):
    """Shapes can agree while tensors are swapped, so compare the values too."""
    tensors = single_file_tensors(model, torch.float32)
    config = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
    for name, tensor in convert_ldm_unet_checkpoint(dict(tensors), config).items():
        assert torch.equal(tensor, model.unet.state_dict()[name]), name
    levels = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
    for name, tensor in convert_ldm_vae_checkpoint(dict(tensors), levels).items():
        assert torch.equal(tensor, model.vae.state_dict()[name]), name


FILE_VARIANTS = {
    "plain": {}, "no text_model level": {"text_level": False},
    "float ids": {"position_ids": torch.float32}, "no ids": {"position_ids": None},
    "no buffers": {"buffers": False}, "with EMA": {"ema": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", FILE_VARIANTS.values(), ids=FILE_VARIANTS)
def test_every_variant_of_a_single_file_loads(model, tmp_path, capsys, variant, dtype):
    write_single_file(model, tmp_path / "a.safetensors", dtype, **variant)
    loaded = checkpoint.load(tmp_path / "a.safetensors")
    assert_same(loaded, model, dtype)
    assert loaded.kind == "diffusion" and not loaded.unet.training
    assert capsys.readouterr().err == ""  # no note about unknown tensors


def test_ema_weights_are_loaded_on_request(model, tmp_path):
    write_single_file(model, tmp_path / "a.safetensors", torch.float32, ema=True)
    averaged = checkpoint.load(tmp_path / "a.safetensors", use_ema=True)
    for name, tensor in averaged.unet.state_dict().items():
        assert torch.equal(tensor, model.unet.state_dict()[name] + 1), name
    write_single_file(model, tmp_path / "b.safetensors")
    with pytest.raises(BadInput, match="holds no averaged weights"):
        checkpoint.load(tmp_path / "b.safetensors", use_ema=True)


FOLDER_VARIANTS = {
    "plain": {}, "old attention": {"old_attention": True}, "transformers 5": {"text_level": False},
    "fp16 names": {"fp16_names": True}, "shards": {"shards": True},
    "no scaling factor": {"scaling_factor": False},
}


@pytest.mark.parametrize("variant", FOLDER_VARIANTS.values(), ids=FOLDER_VARIANTS)
def test_every_variant_of_a_folder_loads(model, tmp_path, capsys, variant):
    write_folder(model, tmp_path / "sd", torch.float32, **variant)
    loaded = checkpoint.load(tmp_path / "sd")
    assert_same(loaded, model)
    assert loaded.unet.config == model.unet.config
    assert loaded.vae.config == model.vae.config
    assert loaded.text_encoder.config == model.text_encoder.config
    assert loaded.encode_prompts(["a cat"]).shape == (1, 16, 32)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_round_trip_through_both_layouts_is_exact(model, tmp_path, dtype):
    model = StableDiffusion(
        model.unet, model.vae, model.text_encoder, model.tokenizer, "one-step", "shapes"
    )
    checkpoint.save(model, tmp_path / "a.safetensors", dtype)
    checkpoint.export(
        checkpoint.load(tmp_path / "a.safetensors", dtype=dtype), tmp_path / "b", None
    )
    checkpoint.save(checkpoint.load(tmp_path / "b", dtype=dtype), tmp_path / "c.safetensors", None)
    first, last = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "c.safetensors")
    assert first.keys() == last.keys()
    assert all(first[name].dtype == dtype and torch.equal(first[name], last[name])
               for name in first)
    loaded = checkpoint.load(tmp_path / "c.safetensors")
    assert_same(loaded, model, dtype)
    assert (loaded.kind, loaded.family, loaded.vae.config) == (
        "one-step", "shapes", model.vae.config
    )
    assert torch.equal(
        tokenize(loaded.tokenizer, ["Ünïcode cat, 3"], 16),
        tokenize(model.tokenizer, ["Ünïcode cat, 3"], 16),
    )


def test_exported_networks_agree_with_diffusers_and_transformers(model, tmp_path):
    checkpoint.export(model, tmp_path / "sd", torch.float32)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "sd" / "unet")
    x, context, timestep = (
        torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32), torch.tensor([10.0, 900.0])
    )
    with torch.no_grad():
        torch.testing.assert_close(
            unet(x, timestep, context).sample, model.unet(x, timestep, context)
        )
        text = CLIPTextModel.from_pretrained(tmp_path / "sd" / "text_encoder")
        token_ids = tokenize(model.tokenizer, ["a cat"], 16)
        torch.testing.assert_close(text(token_ids).last_hidden_state, model.text_encoder(token_ids))


def generate_images(model, prompts, steps, guidance):
    """Images (B, 3, H, W) from the noise of seeds 0, 1, ..."""
    return sample_images(model, prompts, range(len(prompts)), steps, guidance)


PROMPTS = ["a red circle above a blue square", "a shape"]


def test_exported_diffusion_model_gives_the_same_images_in_diffusers(tmp_path):
    """From prompt to pixels, with diffusers' own tokenizer, solver and decoder."""
    model = checkpoint.load(TINY_TEACHER)
    checkpoint.export(model, tmp_path / "sd", torch.float32)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    pipeline.set_progress_bar_config(disable=True)
    noise = noise_from_seeds(range(2), model.latent_shape())
    images = pipeline(
        PROMPTS, num_inference_steps=8, guidance_scale=2.5, latents=noise, output_type="pt"
    ).images
    expected = (generate_images(model, PROMPTS, 8, 2.5) / 2 + 0.5).clamp(0, 1)
    assert relative_error(images, expected) < 1e-4
    assert pipeline.tokenizer.model_max_length == 16
    prompt = " and ".join(["a red circle"] * 20)
    assert torch.isfinite(pipeline(prompt, num_inference_steps=1, output_type="pt").images).all()


@pytest.mark.parametrize("kind, steps, guidance", [("flow", 4, 1.5), ("one-step", 1, 1.0)])
@torch.no_grad()
def test_exported_flow_gives_the_same_images_on_diffusers_networks(tmp_path, kind, steps, guidance):
    model, folder = checkpoint.load(TINY_TEACHER, kind=kind), tmp_path / "flow"
    checkpoint.export(model, folder, torch.float32)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "RectifiedFlowPipeline"
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = DiffusersVAE.from_pretrained(folder / "vae")
    text, tokenizer = (
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    )
    encode = lambda prompts: text(
        tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    )[0]
    x, context, null = (
        noise_from_seeds(range(2), model.latent_shape()), encode(PROMPTS), encode(["", ""])
    )
    for k in range(steps):
        timestep = torch.full((2,), 1000 * (1 - k / steps))
        unconditional, velocity = unet(x, timestep, null).sample, unet(x, timestep, context).sample
        x = x + (unconditional + guidance * (velocity - unconditional)) / steps
    expected = generate_images(model, PROMPTS, steps, guidance)
    assert relative_error(vae.decode(x / vae.config.scaling_factor).sample, expected) < 1e-4


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_of_written_files_follow_the_umask(model, tmp_path, umask):
    previous_umask = os.umask(umask)
    try:
        checkpoint.export(model, tmp_path / "sd")
        checkpoint.save(model, tmp_path / "a.safetensors")
        command.write_text(tmp_path / "a.txt", "text")
    finally:
        os.umask(previous_umask)
    files = [path for path in (tmp_path / "sd").rglob("*") if path.is_file()] + list(
        tmp_path.glob("a.*")
    )
    assert len(files) > 10 and {
        stat.S_IMODE(path.stat().st_mode) for path in files
    } == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "sd").stat().st_mode) == 0o777 & ~umask


def test_exported_files_are_flushed_before_the_folder_is_renamed(model, tmp_path, monkeypatch):
    flushed, renamed = set(), []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        "os.fsync", lambda number: flushed.add(os.fstat(number).st_ino) or fsync(number)
    )

    def rename(source, target):
        renamed.append([path.stat().st_ino for path in source.rglob("*") if path.is_file()])
        replace(source, target)

    monkeypatch.setattr("os.replace", rename)
    (tmp_path / ".sd.tmp" / "unet").mkdir(parents=True)  # left behind by a killed export
    checkpoint.export(model, tmp_path / "sd")
    assert len(renamed[-1]) > 8 and set(renamed[-1]) <= flushed and not list(tmp_path.glob(".sd*"))


@pytest.mark.parametrize(
    "folder, source, kind",
    [
        ("instaflow_0_9B_from_sd_1_5", None, "one-step"),
        ("2_rectified_flow_from_sd_1_5", None, "flow"),
        ("models--XCLiu--instaflow_0_9B_from_sd_1_5/snapshots/0123abc", None, "one-step"),
        ("mine", "XCLiu/instaflow_0_9B_from_sd_1_5", "one-step"),
    ],
)
def test_published_flows_are_recognised_by_name(model, tmp_path, capsys, folder, source, kind):
    command.note.cache_clear()
    path = tmp_path / folder
    write_folder(model, path)
    index = json.loads((path / "model_index.json").read_text()) | {
        "_class_name": "RectifiedFlowPipeline", "_name_or_path": source,
    }
    del index["kind"]
    (path / "model_index.json").write_text(json.dumps(index))
    assert checkpoint.load(path).kind == kind
    note = f"by its name a rectified flow, of kind {kind}; --kind overrides it"
    assert note in capsys.readouterr().err
    assert (
        checkpoint.load(path, kind="diffusion").kind == "diffusion"
        and not capsys.readouterr().err
    )


def test_kind_comes_from_the_argument_or_the_pipeline_class(model, tmp_path):
    write_single_file(model, tmp_path / "a.safetensors")
    assert checkpoint.load(tmp_path / "a.safetensors", kind="flow").kind == "flow"
    write_folder(model, tmp_path / "sd")
    index = json.loads((tmp_path / "sd" / "model_index.json").read_text())
    del index["kind"]  # as in the published InstaFlow folders
    index["_class_name"] = "RectifiedFlowPipeline"
    (tmp_path / "sd" / "model_index.json").write_text(json.dumps(index))
    assert checkpoint.load(tmp_path / "sd").kind == "flow"


def test_long_prompts_keep_their_end_token(model, capsys):
    command.note.cache_clear()
    ids = tokenize(model.tokenizer, ["abc", "abcdefghijklmnopqrstuvwxyz"], 16)
    assert ids.shape == (2, 16)
    assert ids[1, 0] == 512 and ids[1, 15] == 513 and (ids[1, 1:15] < 512).all()
    assert (ids[0, 4:] == 513).all()
    tokenize(model.tokenizer, ["abcdefghijklmnopqrstuvwxyz"], 16)
    assert capsys.readouterr().err.count("truncated to 16 tokens") == 1


def test_command_converts_between_both_layouts(model, tmp_path, call):
    write_single_file(model, tmp_path / "a.safetensors", torch.float32)
    assert call(
        checkpoint.main, tmp_path / "a.safetensors", tmp_path / "b", "--kind", "flow"
    )[0] == 0
    assert call(checkpoint.main, tmp_path / "b", tmp_path / "c.safetensors")[0] == 0
    loaded = checkpoint.load(tmp_path / "c.safetensors")
    assert loaded.kind == "flow"
    assert_same(loaded, model, torch.float16)


def test_make_checkpoint_writes_the_same_weights_in_both_layouts(tmp_path):
    script = [sys.executable, str(ROOT / "tests" / "make_checkpoint.py")]
    subprocess.run(
        [*script, str(tmp_path / "a.safetensors"), "--size", "small", "--ema"], check=True
    )
    subprocess.run(
        [*script, str(tmp_path / "b"), "--size", "small", "--layout", "folder", "--shards"],
        check=True,
    )
    assert_same(checkpoint.load(tmp_path / "a.safetensors"), checkpoint.load(tmp_path / "b"))


# Refused files: each error is one line that names the file


def write_edited(model, path, edit):
    """Write a single file whose tensors are changed in place by edit(tensors)."""
    write_single_file(model, path, torch.float32)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata)
    return path


def drop(prefix):
    """An edit that deletes the tensors whose names start with prefix."""

    def edit(tensors):
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return edit


REFUSED = {
    "SDXL": (
        lambda t: t.update({"conditioner.embedders.0.x": torch.zeros(1)}), "Stable Diffusion XL"
    ),
    "SD 2": (
        lambda t: t.update({"cond_stage_model.model.x": torch.zeros(1)}), "Stable Diffusion 2.x"
    ),
    "no text encoder": (drop("cond_stage_model."), "no text encoder"),
    "no U-Net": (drop("model.diffusion_model."), "no U-Net"),
    "no autoencoder": (drop("first_stage_model."), "no autoencoder"),
    "missing": (
        drop("model.diffusion_model.out.2"),
        "2 tensors are missing, first model.diffusion_model.out.2",
    ),
    "shape": (
        lambda t: t.update({"model.diffusion_model.out.2.bias": torch.zeros(9)}),
        r"model.diffusion_model.out.2.bias is \[9\] and should be \[4\]",
    ),
}


def write_with_metadata(model, path, metadata):
    """Write a single file with this metadata: a JSON string, or an object to convert to JSON."""
    write_single_file(model, path, torch.float32)
    save_file(
        load_file(path), path,
        {METADATA: metadata if isinstance(metadata, str) else json.dumps(metadata)},
    )
    return path


@pytest.mark.parametrize("name", ["../../secret.txt", "/etc/passwd", "c.txt"])
def test_family_in_metadata_cannot_be_a_file(model, tmp_path, name):
    path = write_with_metadata(model, tmp_path / "a.safetensors", {"family": name})
    with pytest.raises(BadInput, match="its metadata names the family .*; known are sd, shapes"):
        checkpoint.load(path)
    write_folder(model, tmp_path / "sd")
    index = json.loads((tmp_path / "sd" / "model_index.json").read_text())
    (tmp_path / "sd" / "model_index.json").write_text(json.dumps(index | {"family": name}))
    with pytest.raises(BadInput, match="model_index.json: its metadata names the family"):
        checkpoint.load(tmp_path / "sd")


@pytest.mark.parametrize(
    "metadata",
    [
        "{", "[]", "3", {"kind": "banana"}, {"kind": ["flow"]}, {"config": 3}, {"config": {}},
        {"config": {"unet": {"layers": 3}}},
        {"config": {"unet": {"block_out_channels": "wide"}, "vae": {}, "text_encoder": {}}},
        {"config": {"unet": {"norm_num_groups": 0}, "vae": {}, "text_encoder": {}}},
        {"config": {"unet": {"block_out_channels": []}, "vae": {}, "text_encoder": {}}},
        {"config": {"unet": {"sample_size": "64"}, "vae": {}, "text_encoder": {}}},
        {"config": {"unet": {}, "vae": {"scaling_factor": None}, "text_encoder": {}}},
        {"sizes": {"sample_size": 64.0}}, {"sizes": {"sample_size": 0}},
        {"sizes": {"attention_heads": 0}}, {"sizes": {"attention_heads": 7}},
        {"sampler": "fast"}, {"sampler": "renoise"},
        *({"sampler": "renoise", "steps": steps, "allowed_steps": []}
          for steps in (0, -3, "4", 2.5, True, 10**9, float("inf"))),
        *({"sampler": "renoise", "steps": 4, "allowed_steps": allowed}
          for allowed in ("148", [8], [4, 0], [4, "8"], {"4": 1}, None)),
        {"sampler": "mean", "steps": 1, "allowed_steps": []},  # without a second time
        {"method": "freeflow"}, {"method": "magic"},
        {"tokenizer": [1]}, {"tokenizer": {"vocabulary": 3, "merges": []}},
    ],
    ids=str,
)
def test_malformed_metadata_is_a_one_line_error(model, tmp_path, metadata):
    written = metadata
    # These fields are read only after the weights fit.
    if isinstance(metadata, dict) and {"tokenizer", "sampler", "method", "sizes"} & set(metadata):
        small = tmp_path / "small.safetensors"
        write_single_file(model, small, torch.float32)
        with safe_open(small, "pt") as file:
            written = json.loads(file.metadata()[METADATA]) | metadata
        written.get("config", {}).get("unet", {}).update(written.pop("sizes", {}))
    path = write_with_metadata(model, tmp_path / "a.safetensors", written)
    with pytest.raises(
        BadInput, match="a.safetensors: its (metadata|configuration)|the tokenizer in its"
    ) as problem:
        checkpoint.load(path)
    assert "\n" not in str(problem.value)


def test_tiny_models_of_an_earlier_version_are_refused(model, tmp_path):
    path = write_with_metadata(model, tmp_path / "a.safetensors", {"captions": "toy/captions.txt"})
    with pytest.raises(BadInput, match="a.safetensors: its metadata is of an earlier version"):
        checkpoint.load(path)


def test_other_prediction_types_and_inpainting_models_are_refused(model, tmp_path):
    for prediction_type in ("v_prediction", "sample"):
        write_folder(model, tmp_path / prediction_type)
        scheduler = tmp_path / prediction_type / "scheduler" / "scheduler_config.json"
        config = json.loads(scheduler.read_text()) | {"prediction_type": prediction_type}
        scheduler.write_text(json.dumps(config))
        with pytest.raises(BadInput, match=f"its prediction_type is '{prediction_type}'"):
            checkpoint.load(tmp_path / prediction_type)
    write_folder(model, tmp_path / "inpainting")
    config = tmp_path / "inpainting" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    with pytest.raises(BadInput, match="inpainting: an inpainting model"):
        checkpoint.load(tmp_path / "inpainting")
    widen_input = lambda t: t.update(
        {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}
    )
    with pytest.raises(BadInput, match="an inpainting model"):
        checkpoint.load(write_edited(model, tmp_path / "a.safetensors", widen_input))
    with pytest.raises(BadInput, match="a v-prediction model"):
        checkpoint.load(write_edited(
            model, tmp_path / "a.safetensors", lambda t: t.update({"v_pred": torch.zeros(1)})
        ))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"block_out_channels": 3}'])
@pytest.mark.parametrize(
    "name",
    ["unet/config.json", "vae/config.json", "model_index.json", "scheduler/scheduler_config.json"],
)
def test_malformed_folder_is_a_one_line_error(model, tmp_path, name, content):
    write_folder(model, tmp_path / "sd")
    (tmp_path / "sd" / name).write_text(content)
    if "config" in name and name[0] in "uv" or content in ("{", "[]"):
        with pytest.raises(BadInput, match="sd") as problem:
            checkpoint.load(tmp_path / "sd")
        assert "\n" not in str(problem.value)
    else:  # loading needs nothing from these files
        checkpoint.load(tmp_path / "sd")


def test_malformed_index_or_tokenizer_is_refused(model, tmp_path):
    write_folder(model, tmp_path / "sd", shards=True)
    index = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for content in ("{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../../vae/x"}}'):
        index.write_text(content)
        with pytest.raises(BadInput, match="index.json"):
            checkpoint.load(tmp_path / "sd")
    write_folder(model, tmp_path / "other")
    for name in ("vocab.json", "tokenizer_config.json"):
        (tmp_path / "other" / "tokenizer" / name).write_text("[")
    with pytest.raises(BadInput, match="not a CLIP tokenizer"):
        checkpoint.load(tmp_path / "other")
    write_folder(model, tmp_path / "third")
    path, own = str(tmp_path / "other"), tmp_path / "third" / "tokenizer"
    assert checkpoint.load(path, tokenizer=own).tokenizer is not None
    assert find_models([path])[path] is None and find_models([path], own)[path] is not None


@pytest.mark.parametrize("edit, words", REFUSED.values(), ids=REFUSED)
def test_refused_single_file_is_a_one_line_error(model, tmp_path, edit, words):
    path = write_edited(model, tmp_path / "a.safetensors", edit)
    with pytest.raises(BadInput, match=words) as problem:
        checkpoint.load(path)
    assert "a.safetensors" in str(problem.value) and "\n" not in str(problem.value)


def test_error_lists_at_most_three_missing_tensors(model, tmp_path):
    with pytest.raises(BadInput, match="248 tensors are missing|tensors are missing") as problem:
        checkpoint.load(write_edited(
            model, tmp_path / "a.safetensors", drop("first_stage_model.decoder")
        ))
    assert str(problem.value).count("first_stage_model.") == 3


def test_truncated_missing_and_pickled_files_are_refused(model, tmp_path):
    path = tmp_path / "a.safetensors"
    write_single_file(model, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match="not a complete safetensors file"):
        checkpoint.load(path)
    path.write_bytes(b"garbage" * 100)
    with pytest.raises(BadInput, match="not a complete safetensors file"):
        checkpoint.load(path)
    with pytest.raises(BadInput, match="no such file"):
        checkpoint.load(tmp_path / "b.safetensors")
    (tmp_path / "sd.ckpt").write_bytes(b"x")
    with pytest.raises(BadInput, match="converts it"):
        checkpoint.load(tmp_path / "sd.ckpt")


def test_sdxl_sd2_and_incomplete_folders_are_refused(model, tmp_path):
    write_folder(model, tmp_path / "sd")
    (tmp_path / "sd" / "text_encoder_2").mkdir()
    with pytest.raises(BadInput, match="XL"):
        checkpoint.load(tmp_path / "sd")
    (tmp_path / "sd" / "text_encoder_2").rmdir()
    config = tmp_path / "sd" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 1024}))
    with pytest.raises(BadInput, match="2.x"):
        checkpoint.load(tmp_path / "sd")
    with pytest.raises(BadInput, match="unet/config.json"):
        checkpoint.load(tmp_path)
    write_folder(model, tmp_path / "weightless")
    (tmp_path / "weightless" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BadInput, match="holds no .safetensors"):
        checkpoint.load(tmp_path / "weightless")


def test_missing_or_mismatched_tokenizer_is_refused(model, tmp_path):
    write_single_file(model, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match="--tokenizer"):
        checkpoint.load(tmp_path / "a.safetensors").encode_prompts(["a cat"])
    with pytest.raises(BadInput, match="holds no tokenizer"):
        checkpoint.load(tmp_path / "a.safetensors", tokenizer=tmp_path)
    vocabulary, merges = tokenizer_parts(model.tokenizer)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {"more": 514}))
    (tmp_path / "merges.txt").write_text(merges_text(merges))
    with pytest.raises(BadInput, match="has 515 tokens and the text encoder 514"):
        checkpoint.load(tmp_path / "a.safetensors", tokenizer=tmp_path)


def test_unknown_tensors_give_a_note(model, tmp_path, capsys):
    path = write_edited(
        model, tmp_path / "a.safetensors", lambda t: t.update({"some.lora.weight": torch.zeros(1)})
    )
    checkpoint.load(path)
    assert "1 unknown tensors are not used, first some.lora.weight" in capsys.readouterr().err
