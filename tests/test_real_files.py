"""Files, prompts and images as people have them: each kind is read rightly or refused by name."""

import json
import os
import signal
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AddedToken

import checkpoint
import command
import reflow
import sample
from command import TINY_TEACHER, BadInput
from conftest import ROOT
from formats import diffusers_folder, images
from formats.prompts import read_prompts
from make_checkpoint import make_model, write_folder, write_single_file
from processes import Process
from sample import sample_images

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
ONE_STEP = ROOT / "toy/tiny_instaflow.safetensors"


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def notes(capsys):
    """notes(): what was printed to stderr since the last call."""
    command.note.cache_clear()
    return lambda: capsys.readouterr().err


def single_file(model, path, change=None, **metadata):
    """A single file whose tensors change(tensors) edits in place."""
    write_single_file(model, path, torch.float32)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | metadata
    tensors = load_file(path)
    if change:
        change(tensors)
    save_file(tensors, path, metadata)
    return path


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --------------------------------------------------------------------------------------------------
# A. What a file needs and the loader does not know


@pytest.mark.parametrize("name", [
    UNET + "time_embed.cond_proj.weight", UNET + "out.2.weight_scale", UNET + "label_emb.0.weight",
    VAE + "decoder.extra.weight", TEXT + "text_model.encoder.layers.0.mlp.fc1.scale_weight",
])
def test_an_unknown_tensor_within_a_network_is_refused(model, tmp_path, name):
    path = single_file(model, tmp_path / "a.safetensors", lambda t: t.update({name: torch.ones(2)}))
    with pytest.raises(BadInput, match=f"tensors that no SD 1.x network has, first {name}"):
        checkpoint.load(path)


def test_known_extras_are_silent_and_others_a_note(model, tmp_path, notes):
    names = (VAE + "loss.logvar", TEXT + "text_projection.weight", "sqrt_betas",
             "cond_stage_model.logit_scale", "else.weight")
    extras = {name: torch.ones(1) for name in names}
    checkpoint.load(single_file(model, tmp_path / "a.safetensors", lambda t: t.update(extras)))
    assert notes().count("1 unknown tensors are not used, first else.weight") == 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_weights_that_are_no_floats_are_refused(model, tmp_path, dtype):
    key = UNET + "out.2.weight"
    path = single_file(model, tmp_path / "a.safetensors",
                       lambda t: t.update({key: t[key].to(dtype)}))
    with pytest.raises(BadInput, match=f"{key} is {dtype}, quantized"):
        checkpoint.load(path)


@pytest.mark.parametrize("metadata, words", [
    ({"prediction_type": "v"}, "predicts 'v'"), ({"prediction_type": "v_prediction"}, "predicts"),
    ({"architecture": "stable-diffusion-xl-v1-base"}, "architecture is 'stable-diffusion-xl"),
    ({"architecture": "stable-diffusion-v1/lora"}, "architecture is 'stable-diffusion-v1/lora'"),
    ({"prediction_type": "epsilon", "architecture": "stable-diffusion-v1"}, None),
    ({"prediction_type": "Epsilon", "architecture": "stable-diffusion-v1-5"}, None),
])
def test_other_tools_metadata_is_read(model, tmp_path, metadata, words):
    path = single_file(model, tmp_path / "a.safetensors",
                       **{f"modelspec.{key}": value for key, value in metadata.items()})
    if words is None:
        assert checkpoint.load(path).kind == "diffusion"
    else:
        with pytest.raises(BadInput, match=words):
            checkpoint.load(path)


@pytest.mark.parametrize("kind, changes", [
    ("diffusion", {"_class_name": "LCMScheduler", "original_inference_steps": 50}),
    ("flow", {"_class_name": "FlowMatchEulerDiscreteScheduler", "beta_start": None}),
])
def test_kind_overrides_the_schedulers_class(model, tmp_path, kind, changes):
    write_folder(model, tmp_path / "sd")
    edit_json(tmp_path / "sd/scheduler/scheduler_config.json", **changes)
    with pytest.raises(BadInput, match="--kind overrides it"):
        checkpoint.load(tmp_path / "sd")
    assert checkpoint.load(tmp_path / "sd", kind=kind).kind == kind


@pytest.mark.parametrize("file, changes, words", [
    ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
    ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "beta_end is 0.02"),
    ("scheduler/scheduler_config.json", {"beta_start": None}, "beta_start is None"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "num_train_timesteps is 500"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "trained_betas is"),
    ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero_snr is True"),
    ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type is"),
    ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "a LCMScheduler"),
    ("scheduler/scheduler_config.json", {"trained_betas": []}, "trained_betas is"),
    ("unet/config.json", {"only_cross_attention": []}, "only_cross_attention is"),
    ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type is"),
    ("unet/config.json", {"transformer_layers_per_block": [1, 2, 1, 1]}, "transformer_layers"),
    ("vae/config.json", {"shift_factor": 0.1}, "shift_factor is 0.1"),
    ("text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("model_index.json", {"_class_name": "LatentConsistencyModelPipeline"},
     "_class_name is 'LatentConsistencyModelPipeline'"),
])
def test_what_decides_noise_or_network_of_a_folder_is_compared(
    model, tmp_path, file, changes, words
):
    write_folder(model, tmp_path / "sd")
    edit_json(tmp_path / "sd" / file, **changes)
    with pytest.raises(BadInput, match=words):
        checkpoint.load(tmp_path / "sd")


def test_a_scheduler_that_names_its_class_alone_has_diffusers_defaults(model, tmp_path):
    write_folder(model, tmp_path / "sd")
    (tmp_path / "sd/scheduler/scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    with pytest.raises(BadInput, match="beta_start is 0.0001"):
        checkpoint.load(tmp_path / "sd")


@pytest.mark.parametrize("key", ["betas", "alphas_cumprod"])
def test_a_single_files_own_noise_schedule_is_compared(model, tmp_path, key):
    checkpoint.load(single_file(model, tmp_path / "a.safetensors"))  # has Stable Diffusion's
    path = single_file(model, tmp_path / "b.safetensors", lambda t: t[key].mul_(1.1))
    with pytest.raises(BadInput, match=rf"its noise schedule \({key}\) is not Stable Diffusion"):
        checkpoint.load(path)


def test_equal_values_in_another_spelling_are_read(model, tmp_path):
    write_folder(model, tmp_path / "sd")
    heads = model.unet.config.attention_heads
    edit_json(tmp_path / "sd/unet/config.json", attention_head_dim=[heads] * 2,
              layers_per_block=[model.unet.config.layers_per_block] * 2,
              transformer_layers_per_block=[1, 1])
    assert checkpoint.load(tmp_path / "sd").unet.config == model.unet.config


def test_an_unknown_tensor_in_a_folder_is_refused(model, tmp_path):
    write_folder(model, tmp_path / "sd")
    path = tmp_path / "sd/unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"time_embedding.cond_proj.weight": torch.ones(2)}, path)
    with pytest.raises(BadInput, match="first time_embedding.cond_proj.weight"):
        checkpoint.load(tmp_path / "sd")


def test_the_old_sample_size_of_stable_diffusions_folders(model, tmp_path, notes):
    write_folder(model, tmp_path / "sd")
    path = tmp_path / "sd/unet/config.json"
    for version, size in (("0.6.0", 64), ("0.9.0", 32), ("0.21.0", 32)):
        edit_json(path, sample_size=32, _diffusers_version=version)
        assert checkpoint.load(tmp_path / "sd").latent_shape()[1] == size
    assert "sample_size 32 was the default before diffusers 0.9" in notes()


@pytest.mark.parametrize("name, kind", [
    ("instaflow_0_9B_from_sd_1_5", "one-step"), ("InstaFlow-0.9B-fp16", "one-step"),
    ("2_rectified_flow_from_sd_1_5", "flow"), ("2-rf", "flow"), ("sd15-2rf", "flow"),
    ("v1-5-pruned", "diffusion"), ("surf2rfish", "diffusion"),
])
def test_the_kind_of_a_single_file_by_its_name(model, tmp_path, notes, name, kind):
    path = single_file(model, tmp_path / f"{name}.safetensors")
    assert checkpoint.load(path).kind == kind
    assert ("--kind overrides it" in notes()) == (kind != "diffusion")
    command.note.cache_clear()
    assert checkpoint.load(path, kind="flow").kind == "flow" and not notes()


# --------------------------------------------------------------------------------------------------
# B. Numbers that are not finite


@pytest.mark.parametrize("key", [
    UNET + "out.2.bias", VAE + "decoder.conv_in.bias", TEXT + "text_model.final_layer_norm.bias"])
def test_weights_that_are_not_finite_are_refused(model, tmp_path, key):
    path = single_file(model, tmp_path / "a.safetensors", lambda t: t[key].fill_(float("nan")))
    with pytest.raises(BadInput, match=f"{key} is not finite in fp32"):
        checkpoint.load(path)


def test_weights_beyond_fp16(model, tmp_path, call):
    """Refused in fp16, read in bf16; a file in fp16 holds them in fp32."""
    key = VAE + "decoder.conv_in.bias"
    path = single_file(model, tmp_path / "a.safetensors", lambda t: t[key].fill_(1e5))
    with pytest.raises(BadInput, match=f"{key} is not finite in fp16; try --dtype fp32 or bf16"):
        checkpoint.load(path, dtype=torch.float16)
    assert checkpoint.load(path, dtype=torch.bfloat16).kind == "diffusion"
    for target in ("b.safetensors", "folder"):
        code, _, err = call(checkpoint.main, path, target)
        assert code == 0 and "does not fit fp16, written in fp32" in err
        bias = checkpoint.load(target).vae.decoder.conv_in.bias
        assert torch.allclose(bias, torch.full_like(bias, 1e5))


def test_an_overflow_names_its_part():
    """Latents and contexts that are not finite are errors; a decoder decodes again in fp32."""
    class Decoder(torch.nn.Linear):
        def decode(self, latents):
            images = self(latents.to(self.weight.dtype))
            return images * float("inf") if self.weight.dtype == torch.float16 else images

    context = torch.zeros(1)
    fake = SimpleNamespace(vae=Decoder(2, 2).half(), encode_prompts=lambda prompts: context)
    with pytest.raises(BadInput, match="the U-Net overflows: .*; try --dtype fp32 or bf16"):
        images.decode_finite(fake, torch.full((1, 2), float("nan")), ["a"])
    context = torch.full((1,), float("inf"))
    with pytest.raises(BadInput, match="the text encoder overflows"):
        images.decode_finite(fake, torch.full((1, 2), float("nan")), ["a"])
    assert images.decode_finite(fake, torch.ones(1, 2), ["a"]).isfinite().all()
    assert fake.vae.weight.dtype == torch.float16
    torch.nn.init.constant_(fake.vae.weight, float("nan"))
    with pytest.raises(BadInput, match="not finite, in fp32 too"):
        images.decode_finite(fake, torch.ones(1, 2), ["a"])


# --------------------------------------------------------------------------------------------------
# C. Guidance 0


def test_guidance_0_of_a_one_step_model_is_off(notes):
    one_step, diffusion = checkpoint.load(ONE_STEP), checkpoint.load(TINY_TEACHER)
    at = lambda model, guidance: sample_images(model, ["a red circle"], [0], None, guidance)
    assert torch.equal(at(one_step, 0), at(one_step, 1)) and "--guidance 0: off" in notes()
    assert not torch.equal(at(diffusion, 0), at(diffusion, 1)) and not notes()


# --------------------------------------------------------------------------------------------------
# D. Prompt files


@pytest.mark.parametrize("name, text, prompts", [
    ("A.CSV", 'Prompt,x\n"a cat, asleep",1\n', ["a cat, asleep"]),
    ("A.TSV", "Prompt\tx\na cat\t1\n", ["a cat"]),
    ("a.jsonl", '{"file": "1.png", "text": "a cat"}\n\n{"text": "a dog"}\n', ["a cat", "a dog"]),
    ("a.JSONL", '"a cat"\n{"caption": "a dog"}\n', ["a cat", "a dog"]),
    ("a.json", '["a cat", {"prompt": "a dog"}]', ["a cat", "a dog"]),
    ("a.json", '{"1.png": {"caption": "a cat"}, "2.png": "a dog"}', ["a cat", "a dog"]),
    ("a.txt", "a cat\ra dog\r", ["a cat", "a dog"]),
])
def test_prompt_files_of_every_kind(tmp_path, notes, name, text, prompts):
    path = tmp_path / name
    path.write_text(text, newline="")
    assert read_prompts(path) == prompts and "looks like" not in notes()


@pytest.mark.parametrize("name, text", [
    ("a.jsonl", '{"file": "1.png"}\n'), ("a.jsonl", "{oops\n"), ("a.json", '{"a": 3}'),
    ("a.json", "3"), ("a.jsonl", '{"text": null}\n'), ("a.jsonl", '{"text": "a \\ud83d"}\n'),
])
def test_json_without_prompts_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=f"{name}: not (a list of prompts|Unicode text)"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("text", [
    '{"text": "a cat"}\n', "id,caption\n1,a cat\n", "Prompt\tNote\na\tb\n"])
def test_lines_that_look_like_a_table_get_a_note(tmp_path, notes, text):
    (tmp_path / "a.txt").write_text(text)
    read_prompts(tmp_path / "a.txt")
    assert "its first line looks like a table or JSON" in notes()


# --------------------------------------------------------------------------------------------------
# E. Tokenizers


def test_added_tokens_and_the_pad_token_survive_both_formats(tmp_path):
    teacher = checkpoint.load(TINY_TEACHER)
    tokenizer = teacher.tokenizer
    tokenizer.add_tokens([AddedToken("<cat-toy>"), AddedToken("sks", single_word=True)])
    tokenizer.add_special_tokens({"pad_token": "!"})  # as a folder with this pad token loads
    rows = len(tokenizer.get_vocab())
    table = teacher.text_encoder.text_model.embeddings.token_embedding.weight
    grown = torch.cat([table.data, torch.randn(rows - len(table), table.shape[1])])
    teacher.text_encoder.text_model.embeddings.token_embedding.weight = torch.nn.Parameter(grown)
    config = teacher.text_encoder.config
    object.__setattr__(config, "vocab_size", rows)
    checkpoint.save(teacher, tmp_path / "a.safetensors")
    checkpoint.export(teacher, tmp_path / "folder")
    checkpoint.save(checkpoint.load(tmp_path / "folder"), tmp_path / "b.safetensors")
    for path in ("a.safetensors", "folder", "b.safetensors"):
        read = checkpoint.load(tmp_path / path).tokenizer
        for prompt in ("a <cat-toy>!", "sks circle, sksx", "<CAT-TOY> a !!", "é <|endoftext|> a"):
            assert read(prompt)["input_ids"] == tokenizer(prompt)["input_ids"], (path, prompt)
        assert read.pad_token_id == tokenizer.pad_token_id


# --------------------------------------------------------------------------------------------------
# F. Work that is not lost


def test_a_file_is_not_converted_onto_itself(model, tmp_path, call):
    path = single_file(model, tmp_path / "a.safetensors")
    before = path.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(path)
    for target in ("a.safetensors", "./a.safetensors", "link.safetensors"):
        code, _, err = call(checkpoint.main, path, target)
        assert code == 2 and "would overwrite the source" in err
    assert path.read_bytes() == before
    assert call(checkpoint.main, path, "folder")[0] == 0
    unet = Path("folder/unet/diffusion_pytorch_model.safetensors")
    before = unet.read_bytes()
    code, _, err = call(checkpoint.main, "folder", unet)
    assert code == 2 and "would overwrite the source" in err and unet.read_bytes() == before


@pytest.mark.parametrize("out", ["picture", "picture.v2", "a.safetensors", "a.gif", ".png"])
def test_an_ending_that_cannot_be_written_is_found_before_the_work(call, monkeypatch, out):
    monkeypatch.setattr(checkpoint, "load", None)
    code, _, err = call(sample.main, "--model", TINY_TEACHER, "--out", out)
    assert code == 2 and f"--out {out}: must end in .png" in err


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "webp"])
def test_every_ending_keeps_how_an_image_was_made(call, ending):
    code, _, err = call(sample.main, "--model", ONE_STEP, "--prompt", "a red circle, é",
                        "--num-images", 1, "--out", f"a.{ending}")
    assert code == 0, err
    with Image.open(f"a.{ending}") as image:
        said = image.text["prompt"] if ending == "png" else json.loads(
            image.getexif()[images.DESCRIPTION].encode("latin-1").decode()
            if isinstance(image.getexif()[images.DESCRIPTION], str)
            else image.getexif()[images.DESCRIPTION])["prompt"]
    assert said == "a red circle, é"


def test_ctrl_c_promises_no_more_than_is_so(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n" * 4000)
    process = Process(tmp_path, "sample", ["--model", TINY_TEACHER, "--prompts", "p.txt"])
    log = tmp_path / "sample.log"
    while not log.exists() or "images:" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 2
    last = (tmp_path / "sample.log").read_text().strip().splitlines()[-1]
    assert last.endswith("error: interrupted")


# --------------------------------------------------------------------------------------------------
# G. No tracebacks


def raising(problem):
    def main():
        raise problem

    return main


@pytest.mark.parametrize("problem, words", [
    (NotADirectoryError(20, "Not a directory", "a/b"), "a/b: Not a directory; check the path"),
    (OSError(36, "File name too long", "x" * 300), "File name too long; check the path"),
    (PermissionError(13, "Permission denied", "a"), "a: Permission denied; check the path"),
    (OSError(28, "No space left on device", "a"), "free some space"),
    (MemoryError(), "out of memory"), (torch.OutOfMemoryError("CUDA"), "out of memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
     "out of memory; sample fewer or smaller images"),
    (UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed"), "not Unicode text"),
], ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "")
def test_problems_of_the_system_are_one_line(call, problem, words):
    code, _, err = call(raising(problem))
    assert code == 2 and words in err and err.count("\n") == 0


def test_prompt_bytes_that_are_no_text(call):
    code, _, err = call(sample.main, "--model", ONE_STEP, "--prompt", "caf\udce9")
    assert code == 2 and "not Unicode text" in err
    code, _, err = call(sample.main, "--model", ONE_STEP, "--out", "x" * 300 + ".png")
    assert code == 2 and "cannot be written (File name too long)" in err


# --------------------------------------------------------------------------------------------------
# H. Nothing refused without need


def test_pairs_and_runs_are_known_by_content(call):
    few = ["--num-pairs", 8, "--iterations", 2, "--save-every", 2, "--validation-pairs", 0,
           "--teacher-steps", 2, "--batch-size", 4]
    Path("a.txt").write_text("a red circle\na blue square\n")
    Path("a.safetensors").write_bytes(Path(TINY_TEACHER).read_bytes())
    assert call(reflow.main, "--teacher", "a.safetensors", "--prompts", "a.txt", *few)[0] == 0
    os.rename("a.safetensors", "b.safetensors")
    os.rename("a.txt", "b.txt")
    renamed = ["--teacher", "b.safetensors", "--prompts", "b.txt", *few]
    code, out, err = call(reflow.main, *renamed)
    assert code == 0 and "finished already" in out, err
    Path("b.txt").write_text("a green circle\na blue square\n")
    code, _, err = call(reflow.main, *renamed)
    assert code == 2 and "prompts_hash was" in err


def test_a_folders_hash_covers_what_is_read(model, tmp_path):
    folder = tmp_path / "sd"
    write_folder(model, folder)
    before = checkpoint.fingerprint(folder)
    save_file({"a": torch.ones(1)}, folder / "safety_checker" / "model.safetensors")
    save_file({"a": torch.ones(1)}, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert checkpoint.fingerprint(folder) == before


def same_model(a, b):
    return all(torch.equal(tensor, getattr(b, part).state_dict()[name])
               for part in ("unet", "vae", "text_encoder")
               for name, tensor in getattr(a, part).state_dict().items())


def test_the_autoencoders_attention_in_diffusers_names(model, tmp_path):
    names = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}

    def rename(tensors):
        for key in [key for key in tensors if ".mid.attn_1." in key]:
            new = key
            for old, name in names.items():
                new = new.replace(f".attn_1{old}", f".attn_1{name}")
            tensor = tensors.pop(key)
            tensors[new] = tensor[:, :, 0, 0].contiguous() if tensor.ndim == 4 else tensor

    assert same_model(model, checkpoint.load(
        single_file(model, tmp_path / "a.SAFETENSORS", rename)))


@pytest.mark.parametrize("variant", ["bf16", "non_ema", "fp32"])
def test_the_only_variant_of_a_folder_is_read(model, tmp_path, variant):
    write_folder(model, tmp_path / "sd", torch.float32)
    for path in list((tmp_path / "sd").glob("*/*.safetensors")):
        path.rename(path.with_suffix(f".{variant}.safetensors"))
    assert same_model(model, checkpoint.load(tmp_path / "sd"))
    path = tmp_path / f"sd/vae/diffusion_pytorch_model.{variant}.safetensors"
    path.with_name("diffusion_pytorch_model.other.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(BadInput, match="holds the variants .*other"):
        checkpoint.load(tmp_path / "sd")


@pytest.mark.parametrize("names", [
    ("diffusion_pytorch_model.safetensors.index.fp16.json",
     "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors"),
    ("diffusion_pytorch_model.fp16.safetensors.index.json",
     "diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors"),
])
def test_a_variant_in_shards_is_read(model, tmp_path, names):
    write_folder(model, tmp_path / "sd", torch.float32)
    whole = tmp_path / "sd/unet/diffusion_pytorch_model.safetensors"
    tensors, (index, shard) = load_file(whole), names
    whole.unlink()
    where = {key: shard.format(k % 2 + 1) for k, key in enumerate(sorted(tensors))}
    for name in set(where.values()):
        save_file({key: tensors[key] for key in where if where[key] == name},
                  whole.with_name(name))
    whole.with_name(index).write_text(json.dumps({"weight_map": where}))
    assert same_model(model, checkpoint.load(tmp_path / "sd"))
    whole.with_name(shard.format(2)).unlink()
    with pytest.raises(BadInput, match="00002-of-00002.*which is not there"):
        checkpoint.load(tmp_path / "sd")


def test_a_file_with_averaged_weights_alone(model, tmp_path):
    def average_alone(tensors):
        for key in [key for key in tensors if key.startswith(UNET)]:
            tensors["model_ema." + key.removeprefix("model.").replace(".", "")] = tensors.pop(key)

    path = single_file(model, tmp_path / "a.safetensors", average_alone)
    assert same_model(model, checkpoint.load(path, use_ema=True))
    with pytest.raises(BadInput, match="holds no U-Net"):
        checkpoint.load(path)


# --------------------------------------------------------------------------------------------------
# I. Advice that works


def lightning_state():
    """An object and a class of a package that is not installed, as Lightning's files have."""
    module = types.ModuleType("absent_lightning")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "absent_lightning"})
    sys.modules["absent_lightning"] = module
    state = module.ModelCheckpoint()
    state.best = 1
    return {module.ModelCheckpoint: state}


@pytest.mark.parametrize("wrap", [
    lambda weights: weights,
    lambda weights: {"state_dict": weights, "global_step": 1, "callbacks": lightning_state()},
], ids=["weights alone", "Lightning's"])
def test_the_advice_for_a_pickle_converts_it(model, tmp_path, call, wrap, monkeypatch):
    write_single_file(model, tmp_path / "a.safetensors", torch.float32)
    weights = load_file(tmp_path / "a.safetensors")
    shared = {"else.a": weights["betas"], "else.b": weights["betas"]}  # memory of two tensors
    torch.save(wrap(weights | shared), tmp_path / "a.ckpt")
    sys.modules.pop("absent_lightning", None)
    code, _, err = call(sample.main, "--model", "a.ckpt")
    assert code == 2 and "may run its code" in err
    line = err[err.index("safetensors.torch.save_file"):]
    exec(line, {"safetensors": safetensors, "torch": torch, "file": "a.ckpt"})
    for name, tensor in load_file("out.safetensors").items():
        assert torch.equal(tensor, (weights | shared)[name])


def test_what_is_no_pickle_gets_a_reason_of_its_own(model, tmp_path, call):
    for name, words in (("a.gguf", "GGUF holds quantized weights"), ("a.onnx", "not a .safetens")):
        Path(name).write_bytes(b"x")
        code, _, err = call(sample.main, "--model", name)
        assert code == 2 and words in err and "torch.load" not in err
    path = single_file(model, tmp_path / "a.safetensors")
    code, _, err = call(checkpoint.main, path, "b.ckpt")
    assert code == 2 and "b.ckpt: pickles are not written" in err


# --------------------------------------------------------------------------------------------------
# J. Real images


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    found = images.read_image(tmp_path / "a.png", 8, 8)
    assert np.abs(found[0].numpy().astype(int) - values // 257).max() <= 1
    assert torch.equal(found[0], found[2])


def test_a_large_text_in_a_png_is_no_obstacle(tmp_path):
    info = PngInfo()
    info.add_itxt("workflow", "x" * 3_000_000, zip=True)
    Image.new("RGB", (40, 40), (200, 10, 10)).save(tmp_path / "a.png", pnginfo=info)
    assert images.read_image(tmp_path / "a.png", 8, 8)[:, 0, 0].tolist() == [200, 10, 10]


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:-40]), lambda path: path.write_bytes(b"x"),
    lambda path: Image.new("1", (14000, 13000)).save(path),
    lambda path: Image.new("F", (8, 8)).save(path.with_suffix(".tiff")) or path.write_bytes(
        path.with_suffix(".tiff").read_bytes()),
], ids=["cut", "no image", "a bomb", "floats"])
def test_what_pillow_refuses_is_one_line_that_names_the_file(tmp_path, damage):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    damage(path)
    with pytest.raises(BadInput, match="a.png: not a readable image") as problem:
        images.read_image(path, 8, 8)
    assert "\n" not in str(problem.value)


def test_the_folder_is_checked_by_values_that_diffusers_writes(model, tmp_path):
    """What export writes passes the comparison, also with diffusers' lists."""
    diffusers_folder.export(model, tmp_path / "a")
    assert same_model(checkpoint.load(tmp_path / "a"), checkpoint.load(tmp_path / "a"))
