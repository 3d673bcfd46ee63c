"""LoRA files and differences of fine-tunes: merged weights against diffusers', refused files."""

import json
import random

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
import sample
from command import TINY_ONE_STEP, BadInput
from conftest import relative_error
from experiments import lora_style
from fewstep.lora import add_lora, merged
from formats.lora import add_difference, merge_lora, parse_lora
from formats.single_file import UNET_PREFIX, original_names, single_file_names
from make_checkpoint import make_model
from stable_diffusion import TOY, initial_student
from toy import emoji
from stacked_unet import stack

RANK, CONVOLUTION_RANK, ALPHA = 4, 3, 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small model as a diffusers folder."""
    path = tmp_path_factory.mktemp("sd") / "sd"
    checkpoint.export(make_model(), path, torch.float32)
    return path


def weights(model):
    """"unet.mid_block..." or "text_encoder..." -> a copy of each weight."""
    return {f"{part}.{name}": tensor.clone() for part in ("unet", "text_encoder")
            for name, tensor in getattr(model, part).state_dict().items()}


def layers(model):
    """Our name -> weight, of each linear map and convolution."""
    return {f"{part}.{name}": module.weight for part in ("unet", "text_encoder")
            for name, module in getattr(model, part).named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))}


def random_lora(model, seed=0):
    """Our name of each layer -> (down, up), of which the product has about the weight's size."""
    generator, lora = torch.Generator().manual_seed(seed), {}
    for name, weight in layers(model).items():
        rank = CONVOLUTION_RANK if weight.ndim == 4 else RANK
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator)
        lora[name] = down * weight.std() / 4, up
    return lora


def kohya_name(name):
    part, _, layer = name.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + layer.replace(".", "_")


def original_name(model, name):
    """kohya's name where it follows the original Stable Diffusion code."""
    if not name.startswith("unet."):
        return kohya_name(name)
    table = original_names(model.unet.config, model.vae.config)["unet"]
    layer = name.removeprefix("unet.") + "."
    original = single_file_names("unet", [layer], table)[layer]
    return "lora_unet_" + original.removeprefix(UNET_PREFIX)[:-1].replace(".", "_")


def is_attention(name):
    return any(f".{layer}" in name for layer in ("to_q", "to_k", "to_v", "to_out", "q_proj",
                                                 "k_proj", "v_proj", "out_proj"))


def processor_name(name):
    """diffusers' name of 2023 for a layer of attention."""
    layer, _, projection = name.removesuffix(".0").rpartition(".")
    if name.startswith("unet."):
        return f"{layer}.processor.{projection}"
    return f"{layer}.to_{projection.removesuffix('_proj')}"


def kohya_tensors(lora, name_of=kohya_name, alpha=ALPHA):
    tensors = {}
    for name, (down, up) in lora.items():
        tensors[f"{name_of(name)}.lora_down.weight"] = down
        tensors[f"{name_of(name)}.lora_up.weight"] = up
        if alpha is not None:
            tensors[f"{name_of(name)}.alpha"] = torch.tensor(alpha)
    return tensors


def pairs_of(lora, name_of, down_key, up_key):
    keys = ((down_key, 0), (up_key, 1))
    return {f"{name_of(name)}{key}.weight": pair[i]
            for name, pair in lora.items() for key, i in keys}


def only(lora, keep):
    return {name: pair for name, pair in lora.items() if keep(name)}


def in_unet(name):
    return name.startswith("unet.")


def peft_tensors(lora):
    return pairs_of(lora, str, ".lora_A", ".lora_B")


# Each as diffusers reads it: it takes neither alpha nor every layer in its older layouts.
LAYOUTS = {
    "kohya": lambda model, lora: kohya_tensors(lora),
    "kohya without alpha": lambda model, lora: kohya_tensors(lora, alpha=None),
    "kohya, original names": lambda model, lora: kohya_tensors(
        only(lora, lambda name: not name.startswith("unet.up_blocks.0.upsamplers")),
        lambda name: original_name(model, name)),
    "PEFT": lambda model, lora: peft_tensors(lora),
    "diffusers with .lora.down": lambda model, lora: (
        pairs_of(only(lora, in_unet), str, ".lora.down", ".lora.up")
        | pairs_of(only(lora, lambda name: not in_unet(name)), str, ".lora_linear_layer.down",
                   ".lora_linear_layer.up")),
    "diffusers with processors": lambda model, lora: pairs_of(
        only(lora, is_attention), processor_name, "_lora.down", "_lora.up"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_weights_agree_with_diffusers(folder, tmp_path, layout):
    model = checkpoint.load(folder)
    before, path = weights(model), tmp_path / "lora.safetensors"
    save_file(LAYOUTS[layout](model, random_lora(model)), path)
    merge_lora(model, path, 0.8)
    changed = assert_agrees_with_diffusers(model, before, folder, path, 0.8)
    assert any(name.startswith("text_encoder.") for name in changed)
    assert any(".conv1." in name for name in changed) or "processors" in layout


def assert_agrees_with_diffusers(model, before, folder, path, scale):
    """Compares every weight after the merge; returns the names of those that changed."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    more = {"unet_config": pipeline.unet.config}  # for the original names
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, **more)
    pipeline.fuse_lora(lora_scale=scale)
    expected = {f"{part}.{name.replace('.base_layer', '')}": tensor
                for part in ("unet", "text_encoder")
                for name, tensor in getattr(pipeline, part).state_dict().items()
                if ".lora_" not in name}
    changed = set()
    for name, tensor in weights(model).items():
        theirs = expected.get(name, expected.get(name.replace(".text_model", "", 1)))
        assert (tensor - theirs).norm() <= 1e-5 * theirs.norm(), name
        if not torch.equal(tensor, before[name]):
            assert relative_error(tensor, before[name]) > 0.1, name
            changed.add(name)
    return changed


def test_names_without_a_prefix_and_of_transformers_5_are_known(tmp_path):
    model, other = make_model(), make_model()
    lora = random_lora(model)
    save_file(peft_tensors(lora), tmp_path / "a.safetensors")
    save_file({key.removeprefix("unet.").replace("text_model.", ""): tensor
               for key, tensor in peft_tensors(lora).items()}, tmp_path / "b.safetensors")
    merge_lora(model, tmp_path / "a.safetensors")
    merge_lora(other, tmp_path / "b.safetensors")
    same = weights(other)
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights(model).items())


def test_alpha_comes_from_the_metadata_of_peft(folder, tmp_path):
    model, path = checkpoint.load(folder), tmp_path / "lora.safetensors"
    lora = only(random_lora(model), lambda name: ".down_blocks.0." in name and ".attn1." in name)
    before, own = weights(model), "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    settings = {"unet.r": RANK, "unet.lora_alpha": 6, "unet.alpha_pattern": {own: 10},
                "unet.target_modules": [name.removeprefix("unet.") for name in lora]}
    save_file(peft_tensors(lora), path, {"lora_adapter_metadata": json.dumps(settings)})
    merge_lora(model, path)
    assert_agrees_with_diffusers(model, before, folder, path, 1.0)
    for name, (down, up) in lora.items():
        alpha = 10 if name.endswith(own) else 6
        expected = before[f"{name}.weight"] + alpha / RANK * up @ down
        assert relative_error(layers(model)[name], expected) < 1e-6, name
    settings["unet.use_rslora"] = True
    save_file(peft_tensors(lora), path, {"lora_adapter_metadata": json.dumps(settings)})
    model = checkpoint.load(folder)
    merge_lora(model, path)
    assert_agrees_with_diffusers(model, before, folder, path, 1.0)


def test_each_layer_has_its_own_alpha_in_kohya_files(tmp_path):
    model = make_model()
    before, lora = weights(model), random_lora(model)
    tensors = kohya_tensors(lora, alpha=None)
    alphas = {name: 1.0 + k % 5 for k, name in enumerate(lora)}
    tensors |= {f"{kohya_name(name)}.alpha": torch.tensor(a) for name, a in alphas.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    merge_lora(model, tmp_path / "a.safetensors")
    for name, (down, up) in lora.items():
        weight = before[f"{name}.weight"]
        change = alphas[name] / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        assert relative_error(layers(model)[name], weight + change) < 1e-6, name


@torch.no_grad()
def test_three_convolutions_of_locon_are_merged(tmp_path):
    model, layer = make_model(), "mid_block.resnets.0.conv1"
    convolution = model.unet.get_submodule(layer)
    x = torch.randn(1, convolution.in_channels, 5, 5)
    down = torch.randn(3, convolution.in_channels, 1, 1)
    mid, up = torch.randn(3, 3, 3, 3), torch.randn(convolution.out_channels, 3, 1, 1)
    thin = nn.functional.conv2d(nn.functional.conv2d(x, down), mid, padding=1)
    expected = convolution(x) + 0.5 * nn.functional.conv2d(thin, up)
    stem = "lora_unet_" + layer.replace(".", "_")
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid,
               f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.5)},
              tmp_path / "a.safetensors")
    merge_lora(model, tmp_path / "a.safetensors")
    assert relative_error(convolution(x), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_files_and_models_merge_in_fp32(tmp_path, dtype):
    lora = kohya_tensors(random_lora(make_model()))
    half = {key: tensor.to(dtype) for key, tensor in lora.items()}
    save_file(half, tmp_path / "half.safetensors")
    save_file({key: tensor.float() for key, tensor in half.items()}, tmp_path / "fp32.safetensors")
    from_half, from_fp32, half_model = make_model(), make_model(), make_model()
    half_model.unet.to(dtype)
    rounded = {name: weight.detach().clone().float() for name, weight in layers(half_model).items()}
    merge_lora(from_half, tmp_path / "half.safetensors", 0.7)
    merge_lora(from_fp32, tmp_path / "fp32.safetensors", 0.7)
    merge_lora(half_model, tmp_path / "half.safetensors", 0.7)
    before = weights(make_model())
    for name, weight in layers(from_half).items():
        assert torch.equal(weight, layers(from_fp32)[name]), name
        merged_weight = layers(half_model)[name]
        assert merged_weight.dtype == (dtype if in_unet(name) else torch.float32)
        expected = rounded[name] + (weight - before[f"{name}.weight"])
        assert relative_error(merged_weight.float(), expected) < torch.finfo(dtype).eps, name


def test_scale_zero_changes_nothing_and_two_loras_add_up(tmp_path):
    model, paths = make_model(), [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    before = weights(model)
    for seed, path in enumerate(paths):
        save_file(kohya_tensors(random_lora(model, seed)), path)
    merge_lora(model, paths[0], 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    both, changes = make_model(), []
    for path, scale in zip(paths, (0.5, -0.25)):
        one = make_model()
        merge_lora(one, path, scale)
        merge_lora(both, path, scale)
        changes.append({name: tensor - before[name] for name, tensor in weights(one).items()})
    for name, tensor in weights(both).items():
        expected = before[name] + changes[0][name] + changes[1][name]
        torch.testing.assert_close(tensor, expected, msg=name)


def test_lora_of_fewstep_merges_as_from_a_file(tmp_path):
    model, path = make_model(), tmp_path / "a.safetensors"
    with_lora = make_model().unet
    add_lora(with_lora, RANK)
    pairs = {}
    for name, module in with_lora.named_modules():
        if hasattr(module, "down"):
            nn.init.normal_(module.up.weight)
            pairs[f"unet.{name}"] = module.down.weight.data, module.up.weight.data
    save_file(peft_tensors(pairs), path)
    merge_lora(model, path)
    for name, tensor in merged(with_lora).state_dict().items():
        torch.testing.assert_close(model.unet.state_dict()[name], tensor, msg=name)


@pytest.mark.parametrize("text, path, scale", [
    ("a.safetensors", "a.safetensors", 1.0), ("a.safetensors:0.8", "a.safetensors", 0.8),
    ("b/a.safetensors:-1", "b/a.safetensors", -1.0), ("a:b:2", "a:b", 2.0), (":0.5", ":0.5", 1.0),
    (r"C:\a.safetensors", r"C:\a.safetensors", 1.0), ("a:nan", "a:nan", 1.0), ("a:", "a:", 1.0),
    (r"C:\a.safetensors:1e-1", r"C:\a.safetensors", 0.1),
])
def test_parse_lora_splits_at_the_last_colon(text, path, scale):
    assert parse_lora(text) == (path, scale)


# --------------------------------------------------------------------------------------------------
# Refused files


TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TO_K = TO_Q.replace("attn1_to_q", "attn2_to_k")


def pair(stem, down=(4, 32), up=(32, 4)):
    return {f"{stem}.lora_down.weight": torch.zeros(down),
            f"{stem}.lora_up.weight": torch.zeros(up)}


REFUSED = {
    "DoRA": (pair(TO_Q) | {f"{TO_Q}.dora_scale": torch.zeros(1)}, f"{TO_Q}.dora_scale: a DoRA"),
    "DoRA of PEFT": ({"unet.conv_in.lora_magnitude_vector": torch.zeros(1)}, "a DoRA"),
    "LoHa": ({f"{TO_Q}.hada_w1_a": torch.zeros(1)}, f"{TO_Q}.hada_w1_a: a LoHa"),
    "LoKr": ({f"{TO_Q}.lokr_w1": torch.zeros(1)}, f"{TO_Q}.lokr_w1: a LoKr"),
    "SDXL's second text encoder": (
        pair("lora_te2_text_model_encoder_layers_0_self_attn_q_proj"), "a LoRA for SDXL"),
    "PEFT's second text encoder": (
        {"text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.zeros(4, 32)},
        "text_encoder_2.text_model.*fc1.lora_A.weight: a LoRA for SDXL"),
    "SDXL's depth": (pair(TO_Q.replace("blocks_0_attn1", "blocks_1_attn1")), "a LoRA for SDXL"),
    "SDXL's context": (pair(TO_K, down=(4, 2048)), f"{TO_K}.lora_down.weight: a LoRA for SDXL"),
    "SDXL's context in PEFT": (
        {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight":
             torch.zeros(4, 2048)}, "a LoRA for SDXL"),
    "SD 2's context": (pair(TO_K, down=(4, 1024)), "a LoRA for Stable Diffusion 2.x"),
    "a checkpoint's key": ({"model.diffusion_model.out.2.bias": torch.zeros(4)},
                           "model.diffusion_model.out.2.bias: not the key of a LoRA"),
    "a bias": ({"unet.conv_in.lora_B.bias": torch.zeros(4)}, "not the key of a LoRA"),
    "another layer": (pair("lora_unet_double_blocks_0_img_mlp_0"),
                      "double_blocks_0_img_mlp_0.lora_down.weight: the model has no such layer"),
    "no up": ({f"{TO_Q}.lora_down.weight": torch.zeros(4, 32)},
              r"its tensors \(down \[4, 32\]\) or their alpha do not fit the model's \[32, 32\]"),
    "alpha alone": ({f"{TO_Q}.alpha": torch.tensor(1.0)}, r"its tensors \(alpha \[\]\) or"),
    "two ranks": (pair(TO_Q, up=(32, 8)), r"down \[4, 32\], up \[32, 8\]\) or their alpha"),
    "another width": (pair(TO_Q, down=(4, 320), up=(320, 4)), r"do not fit the model's \[32, 32\]"),
    "too few dimensions": (pair(TO_Q, down=(4,)), r"do not fit the model's \[32, 32\]"),
    "rank 0": (pair(TO_Q, down=(0, 32), up=(32, 0)), "do not fit the model's"),
    "many alphas": (pair(TO_Q) | {f"{TO_Q}.alpha": torch.zeros(2)}, "do not fit the model's"),
    "a linear map for 3 x 3": (pair("lora_unet_conv_in", down=(4, 4)),
                               r"do not fit the model's \[32, 4, 3, 3\]"),
    "empty": ({}, "holds no tensors"),
}


@pytest.mark.parametrize("tensors, words", REFUSED.values(), ids=REFUSED)
def test_refused_lora_is_a_one_line_error(tmp_path, tensors, words):
    model, path = make_model(), tmp_path / "lora.safetensors"
    before = weights(model)
    good = {"unet.conv_out.lora_A.weight": torch.ones(2, 32, 3, 3),
            "unet.conv_out.lora_B.weight": torch.ones(4, 2, 1, 1)}
    save_file(good | tensors if tensors else {}, path)
    with pytest.raises(BadInput, match=words) as problem:
        merge_lora(model, path)
    assert str(problem.value).startswith(f"{path}: ") and "\n" not in str(problem.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_weights_that_are_not_finite_are_refused(tmp_path):
    save_file(pair(TO_Q) | {f"{TO_Q}.alpha": torch.tensor(torch.nan)}, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match="a.safetensors: makes a weight that is not finite in fp32"):
        merge_lora(make_model(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("metadata", ["{", "3", '{"unet.lora_alpha": "x"}',
                                      '{"unet.alpha_pattern": 3}'])
def test_malformed_peft_metadata_is_refused(tmp_path, metadata):
    save_file(peft_tensors({"unet.conv_in": (torch.zeros(2, 4, 3, 3), torch.zeros(32, 2, 1, 1))}),
              tmp_path / "a.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(BadInput, match="a.safetensors: .*(malformed|do not fit)") as problem:
        merge_lora(make_model(), tmp_path / "a.safetensors")
    assert "\n" not in str(problem.value)


def test_other_files_and_stacked_models_are_refused(tmp_path):
    for name, words in (("a.ckpt", "converts it"), ("a.bin", "converts it"), ("a.txt", "is there"),
                        ("b.safetensors", "no .safetensors file"), ("", "not its folder")):
        with pytest.raises(BadInput, match=words):
            merge_lora(make_model(), tmp_path / name)
    (tmp_path / "a.safetensors").write_bytes(b"garbage" * 100)
    with pytest.raises(BadInput, match="not a complete safetensors file"):
        merge_lora(make_model(), tmp_path / "a.safetensors")
    stacked = make_model()
    stacked.unet = stack(stacked.unet)
    with pytest.raises(BadInput, match="a stacked model of two U-Nets"):
        merge_lora(stacked, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match="a stacked model of two U-Nets"):
        add_difference(stacked, make_model(), make_model())


# --------------------------------------------------------------------------------------------------
# Differences


def test_finetune_minus_base_turns_base_into_finetune():
    finetune, base, model = make_model(seed=1), make_model(seed=0), make_model(seed=0)
    add_difference(model, finetune, base)
    expected = weights(finetune)
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    assert all(torch.equal(a, b) for a, b in zip(model.vae.parameters(), base.vae.parameters()))


def test_difference_is_added_to_another_model():
    finetune, base, model = make_model(seed=1), make_model(seed=0), make_model(seed=0)
    for parameter in model.unet.parameters():
        parameter.data.mul_(1.5)
    before, tuned, start = weights(model), weights(finetune), weights(base)
    add_difference(model, finetune, base)
    for name, tensor in weights(model).items():
        expected = before[name] + tuned[name] - start[name]
        torch.testing.assert_close(tensor, expected, msg=name)


def test_difference_fits_a_model_that_started_from_the_negated_teacher():
    finetune, base, model = make_model(seed=1), make_model(seed=0), make_model(seed=0)
    initial_student(model.unet, "negated", "diffusion", 0)
    add_difference(model, finetune, base)
    initial_student(finetune.unet, "negated", "diffusion", 0)
    expected = weights(finetune)
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_difference_of_another_architecture_is_refused():
    with pytest.raises(BadInput, match="emoji_instaflow.*unet is not built like that of"):
        add_difference(make_model(), make_model(), checkpoint.load(TINY_ONE_STEP))


# --------------------------------------------------------------------------------------------------
# The commands


SAMPLE = ["--num-images", 2, "--prompt", "red apple", "--device", "cpu"]


@pytest.fixture
def lora_file(tmp_path):
    """A weak LoRA for the shipped one-step model."""
    path = tmp_path / "lora.safetensors"
    save_file(kohya_tensors(random_lora(checkpoint.load(TINY_ONE_STEP)), alpha=0.6), path)
    return path


def pixels(path):
    with Image.open(path) as image:
        return torch.tensor(np.array(image.convert("RGB"), dtype=int)), image.text


def test_a_baked_lora_gives_the_images_of_the_flag(tmp_path, call, lora_file):
    model = ["--model", TINY_ONE_STEP]
    lora = ["--lora", f"{lora_file}:0.5", "--lora", f"{lora_file}:0.25"]
    code, _, err = call(checkpoint.main, TINY_ONE_STEP, "baked.safetensors", *lora)
    assert (code, err) == (0, "")
    runs = {"plain": model, "flag": [*model, *lora], "baked": ["--model", "baked.safetensors"]}
    images = {}
    for name, arguments in runs.items():
        out = f"{name}.png"
        code, _, err = call(sample.main, *arguments, *SAMPLE, "--dtype", "fp32", "--out", out)
        assert (code, err) == (0, "")
        images[name], about = pixels(out)
    # The baked file is rounded to fp16.
    assert (images["flag"] - images["baked"]).abs().max() <= 2
    assert (images["flag"] - images["plain"]).abs().max() > 20
    assert lora_file.name in pixels("flag.png")[1]["lora"] and "lora" not in about
    merged_in_fp32 = checkpoint.load(TINY_ONE_STEP)
    merge_lora(merged_in_fp32, lora_file, 0.5)
    merge_lora(merged_in_fp32, lora_file, 0.25)
    expected = weights(merged_in_fp32)
    for name, tensor in weights(checkpoint.load("baked.safetensors")).items():
        assert torch.equal(tensor, expected[name].half().float()), name


def test_commands_add_a_difference(tmp_path, call, lora_file):
    finetune = ["finetune.safetensors", "--lora", lora_file]
    assert call(checkpoint.main, TINY_ONE_STEP, *finetune)[0] == 0
    difference = ["--add-difference", "finetune.safetensors", TINY_ONE_STEP]
    assert call(checkpoint.main, TINY_ONE_STEP, "same.safetensors", *difference)[0] == 0
    finetuned, same = load_file("finetune.safetensors"), load_file("same.safetensors")
    assert all(relative_error(same[key], finetuned[key]) < 1e-3 for key in finetuned)
    for out, arguments in (("a.png", ["--model", TINY_ONE_STEP, *difference]),
                           ("b.png", ["--model", "finetune.safetensors"])):
        code, _, err = call(sample.main, *arguments, *SAMPLE, "--dtype", "fp32", "--out", out)
        assert (code, err) == (0, "")
    assert (pixels("a.png")[0] - pixels("b.png")[0]).abs().max() <= 1


def test_command_refuses_in_one_line(tmp_path, call, lora_file):
    save_file(pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "xl.safetensors")
    for main, arguments in ((sample.main, ["--model", TINY_ONE_STEP]),
                            (checkpoint.main, [TINY_ONE_STEP, "out.safetensors"])):
        for more, words in ((["--lora", "xl.safetensors:0.5"], "xl.safetensors: lora_te2_"),
                            (["--lora", "none.safetensors"], "no .safetensors file"),
                            (["--add-difference", "none.safetensors", TINY_ONE_STEP],
                             "none.safetensors: no such file")):
            code, _, err = call(main, *arguments, *more)
            assert code == 2 and err.startswith("error: ") and words in err and "\n" not in err
    code, _, err = call(checkpoint.main, TINY_ONE_STEP, lora_file, "--lora", lora_file)
    assert code == 2 and "would overwrite the input" in err


def test_lora_everywhere_merges_into_what_it_computes(tmp_path, monkeypatch):
    """Convolutions too: the network with LoRA, its merged copy, and a file of it agree."""
    monkeypatch.chdir(tmp_path)
    model, plain = make_model(), make_model()
    generator = torch.Generator().manual_seed(0)
    add_lora(model.unet, RANK, everywhere=True)
    tensors = {}
    for name, module in model.unet.named_modules():
        if hasattr(module, "up"):
            nn.init.normal_(module.up.weight, std=0.02, generator=generator)
            tensors[f"unet.{name}.lora_A.weight"] = module.down.weight.detach()
            tensors[f"unet.{name}.lora_B.weight"] = module.up.weight.detach()
    inner = [name for name in layers(plain) if name.startswith("unet.")
             and name not in ("unet.conv_in", "unet.conv_out")]
    assert len(tensors) == 2 * len(inner)
    save_file(tensors, "everywhere.safetensors")
    merge_lora(plain, "everywhere.safetensors")
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3.0, 900.0])
    context = plain.encode_prompts(["a", "b"])
    wanted = model.unet(x, t, context)
    assert relative_error(merged(model.unet)(x, t, context), wanted) < 1e-5
    assert relative_error(plain.unet(x, t, context), wanted) < 1e-5


def test_lora_style_trains_merges_and_measures(call, monkeypatch):
    images = 2 * torch.rand(len(emoji.rows()), 3, 32, 32) - 1
    monkeypatch.setattr(emoji, "pictures", lambda: images)
    flow = checkpoint.load(TOY / "tiny_emoji.safetensors")
    flow.kind = "flow"
    checkpoint.save(flow, "2rf.safetensors")
    arguments = ["--flow", "2rf.safetensors", "--iterations", 2, "--num-samples", 4]
    code, out, err = call(lora_style.main, *arguments)
    assert code == 0, err
    with open("runs/lora_style.json") as file:
        rows = json.load(file)
    assert [(row["model"], row["steps"], row["LoRA"]) for row in rows] == [
        (*which, scale) for which in (("teacher", 8), ("2-RF", 8), ("2-RF", 1),
                                      ("one-step model", 1)) for scale in (0, 1)]
    assert all(0 <= row["in_style"] <= 1 and 0 <= row["right"] <= 1 for row in rows)
    assert np.asarray(Image.open("runs/lora_style.png").convert("L")).std() > 3
    assert len(load_file("runs/lora_style.safetensors")) > 100


def test_no_caption_of_the_style_is_one_to_measure_on():
    captions = lora_style.style_captions(20 * emoji.training_rows(), random.Random(0))
    assert captions.count("") < 0.2 * len(captions)
    assert not any(map(emoji.is_for_measuring, filter(None, captions)))


def test_a_layer_under_two_names_is_refused(tmp_path, call):
    model = make_model()
    weight = model.unet.mid_block.attentions[0].proj_in.weight
    tensors = {}
    name = "mid_block.attentions.0.proj_in"
    for prefix in ("lora_unet_" + name.replace(".", "_"), f"unet.{name}"):
        tensors[f"{prefix}.lora_down.weight"] = torch.zeros(2, weight.shape[1], 1, 1)
        tensors[f"{prefix}.lora_up.weight"] = torch.zeros(weight.shape[0], 2, 1, 1)
    save_file(tensors, tmp_path / "twice.safetensors")
    with pytest.raises(BadInput, match="under another name too"):
        merge_lora(model, tmp_path / "twice.safetensors")
