"""ControlNets agree with diffusers; three layouts load; sample.py; edges; refused files."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import controlnet
import sample
from conftest import relative_error
from controlnet import ControlNet, controlled
from formats.controlnet import original_controlnet_names
from formats.diffusers_folder import unet_to_diffusers
from formats.images import canny
from make_checkpoint import SMALL_UNET, make_model
from rectified_flow import guided
from stable_diffusion import FewStep
from test_models import UNETS, reference_unet, shapes_of
from stacked_unet import stack
from unet import UNet, UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"


def reference_controlnet(config: UNetConfig, seed: int = 0, **more) -> ControlNetModel:
    """diffusers' ControlNet with random weights; no convolution is zero."""
    torch.manual_seed(seed)
    names = unet_to_diffusers(config)
    for name in ("_class_name", "up_block_types", "out_channels", "sample_size"):
        del names[name]
    reference = ControlNetModel(**names, **more).eval()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if name.startswith("controlnet_"):
                weight.normal_(0, 1.5 * weight[0].numel() ** -0.5 if weight.ndim == 4 else 0.1)
    return reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ControlNet for the small model, as diffusers writes it."""
    path = tmp_path_factory.mktemp("controlnet") / "canny"
    reference_controlnet(SMALL_UNET).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model():
    return make_model()


def original_file(folder, path, prefix="control_model."):
    """Write the weights of a diffusers folder in the layout of the original code."""
    tensors = load_file(folder / WEIGHTS)
    names = original_controlnet_names(tensors, SMALL_UNET)
    save_file({prefix + names[name]: tensor for name, tensor in tensors.items()}, path)
    return path


# --------------------------------------------------------------------------------------------------
# The networks


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
@pytest.mark.parametrize("size", [(8, 8), (9, 13)], ids=str)
def test_two_controlnets_agree_with_diffusers(config, size):
    torch.manual_seed(0)
    theirs, unet = reference_unet(config).eval().double(), UNet(config).double()
    unet.load_state_dict(theirs.state_dict())
    x, context = (torch.randn(2, *shape).double()
                  for shape in ((4, *size), (7, config.cross_attention_dim)))
    timestep, controls, down, mid = torch.tensor([3.0, 777.25]), [], None, None
    for seed, scale in ((1, 0.5), (2, 1.3)):
        reference, ours = reference_controlnet(config, seed).double(), ControlNet(config).double()
        ours.load_state_dict(reference.state_dict())
        condition = torch.rand(1, 3, *(8 * side for side in size)).double()
        a, b = reference(x, timestep, context, condition.expand(2, -1, -1, -1), scale,
                         return_dict=False)
        down, mid = (a, b) if seed == 1 else ([p + q for p, q in zip(down, a)], mid + b)
        controls.append((ours, condition, scale))
    with torch.no_grad():
        expected = theirs(x, timestep, context, down_block_additional_residuals=down,
                          mid_block_additional_residual=mid).sample
        assert relative_error(controlled(unet, controls)(x, timestep, context), expected) < 1e-10
        for k in range(2):  # each matters
            assert relative_error(controlled(unet, controls[k:k + 1])(x, timestep, context),
                                  expected) > 1e-3


def test_names_shapes_and_zeros_at_full_size_are_those_of_diffusers():
    with torch.device("meta"):
        ours, theirs = ControlNet(UNetConfig()), ControlNetModel(cross_attention_dim=768)
    assert shapes_of(ours) == shapes_of(theirs)
    count = sum(weight.numel() for weight in ours.parameters())
    assert f"{count:,}" in ControlNet.__doc__
    assert len(set(original_controlnet_names(shapes_of(ours), UNetConfig()).values())) == 340
    zeros = lambda network: {n for n, p in network.named_parameters()
                             if n.startswith("controlnet_") and not p.any()}
    assert zeros(ControlNet(SMALL_UNET)) == zeros(ControlNetModel(
        block_out_channels=(32, 64, 64), down_block_types=("DownBlock2D",) * 3,
        norm_num_groups=16, cross_attention_dim=32))


def test_scale_zero_and_new_controlnets_change_nothing(model, folder):
    network, condition = controlnet.load(folder, model.unet), torch.rand(1, 3, 64, 64)
    x, context, timestep = (
        torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32), torch.tensor([3.0, 700.0])
    )
    with torch.no_grad():
        expected = model.unet(x, timestep, context)
        changed = controlled(model.unet, [(network, condition, 1.0)])(x, timestep, context)
        assert relative_error(changed, expected) > 1e-3
        for unchanged in ([], [(network, condition, 0.0)],
                          [(ControlNet(SMALL_UNET), condition, 1.0)]):
            assert torch.equal(controlled(model.unet, unchanged)(x, timestep, context), expected)


def test_one_condition_serves_the_doubled_batch_of_guidance(model, folder):
    network = controlnet.load(folder, model.unet)
    unet = controlled(model.unet, [(network, torch.rand(1, 3, 64, 64), 1.0)])
    x, context, null = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 32), torch.randn(1, 5, 32)
    timestep = torch.full((3,), 500.0)
    with torch.no_grad():
        a, b = unet(x, timestep, null.expand(3, -1, -1)), unet(x, timestep, context)
        assert relative_error(guided(unet, null, 3.0)(x, timestep, context), a + 3 * (b - a)) < 1e-5


# --------------------------------------------------------------------------------------------------
# Files


def test_every_layout_loads_the_same_weights(model, folder, tmp_path):
    expected = load_file(folder / WEIGHTS)
    shutil.copytree(folder, tmp_path / "fp16")
    (tmp_path / "fp16" / WEIGHTS).rename(
        tmp_path / "fp16" / "diffusion_pytorch_model.fp16.safetensors")
    paths = [folder, tmp_path / "fp16", folder / WEIGHTS,
             original_file(folder, tmp_path / "a.safetensors"),
             original_file(folder, tmp_path / "b.safetensors", prefix=""),
             renamed("shuffled runs/control_v11p_sd15_canny.safetensors")(folder, tmp_path)]
    for path in paths:
        loaded = controlnet.load(path, model.unet)
        assert not loaded.training
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_device_dtype_and_memory_format_are_the_unets(folder):
    unet = make_model().unet.to(torch.bfloat16, memory_format=torch.channels_last)
    weight = controlnet.load(folder, unet).down_blocks[0].resnets[0].conv1.weight
    assert weight.dtype == torch.bfloat16 and weight.stride() == weight.contiguous(
        memory_format=torch.channels_last).stride()


def test_original_names_are_those_of_diffusers_converter(folder, tmp_path):
    tensors = load_file(original_file(folder, tmp_path / "a.safetensors"))
    found, expected = convert_controlnet_checkpoint(
        tensors, {"layers_per_block": 2}), load_file(folder / WEIGHTS)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_channels_of_the_condition_embedding_come_from_the_config(model, tmp_path):
    channels = (8, 16, 24)
    reference = reference_controlnet(SMALL_UNET, conditioning_embedding_out_channels=channels)
    reference.save_pretrained(tmp_path / "a")
    network = controlnet.load(tmp_path / "a", model.unet)
    assert network.downsampling == 4
    assert shapes_of(network) == shapes_of(reference)


def edited(edit):
    """A case of a refused file: edit(tensors) in place, in the original layout."""

    def write(folder, tmp_path):
        path = original_file(folder, tmp_path / "edited.safetensors")
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)
        return path

    return write


def configured(**values):
    """A case of a refused folder: its config.json has these values."""

    def write(folder, tmp_path):
        shutil.copytree(folder, tmp_path / "edited")
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "edited" / "config.json").write_text(json.dumps(config | values))
        return tmp_path / "edited"

    return write


def with_width(width):
    key = "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    return edited(lambda tensors: tensors.update({key: torch.zeros(32, width)}))


def renamed(name):
    def write(folder, tmp_path):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / WEIGHTS, tmp_path / name)
        return tmp_path / name

    return write


def without_config(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "edited")
    (tmp_path / "edited" / "config.json").unlink()
    return tmp_path / "edited"


REFUSED = {
    "missing": (edited(lambda t: t.pop("control_model.zero_convs.3.0.bias")),
                "1 tensors are missing, first control_model.zero_convs.3.0.bias"),
    "unknown": (edited(lambda t: t.update({"difference": torch.zeros(1)})),
                "holds 1 tensors that no SD 1.x network has, first difference"),
    "shape": (edited(lambda t: t.update({"control_model.zero_convs.3.0.bias": torch.zeros(9)})),
              "control_model.zero_convs.3.0.bias is [9] and should be [32]"),
    "SD 2": (with_width(1024), "a ControlNet for Stable Diffusion 2.x"),
    "SDXL": (with_width(2048), "a ControlNet for Stable Diffusion XL"),
    "SD 1 for a small model": (with_width(768), "a ControlNet for Stable Diffusion 1.x: its "
                               "cross_attention_dim is 768, and that of --model is 32"),
    "shuffle in a folder": (configured(global_pool_conditions=True), "its global_pool_conditions"),
    "shuffle in a file": (renamed("control_v11e_sd15_shuffle.safetensors"), "(shuffle)"),
    "shuffle by its folder": (renamed("control_v11e_sd15_shuffle/model.safetensors"), "(shuffle)"),
    "shuffle by a folder, renamed": (renamed("sd15_shuffle/controlnet.safetensors"), "(shuffle)"),
    "BGR": (configured(controlnet_conditioning_channel_order="bgr"), "channel_order is 'bgr'"),
    "another class": (configured(_class_name="ControlNetUnionModel"), "'ControlNetUnionModel'"),
    "another U-Net": (configured(layers_per_block=3),
                      "its layers_per_block is 3, and that of --model is 2"),
    "malformed": (configured(block_out_channels=3), "its configuration is not that of"),
    "malformed channels": (configured(conditioning_embedding_out_channels=["16"]),
                           "its configuration is not that of"),
    "no config": (without_config, "config.json: No such file"),
    "no file": (lambda folder, tmp_path: tmp_path / "edited", "no such file or folder"),
    "pickle": (renamed("control_v11p_sd15_canny.pth"), "only .safetensors is read"),
    "another ending": (renamed("a.gguf"), "GGUF holds quantized weights"),
    "no tensors of one": (edited(lambda t: [t.pop(key) for key in list(t)[1:]]), "are missing"),
}


# --------------------------------------------------------------------------------------------------
# sample.py


@pytest.fixture(scope="module")
def files(model, folder, tmp_path_factory):
    """A folder with a small model of each kind, two ControlNets and two conditions."""
    path = tmp_path_factory.mktemp("files")
    for kind in ("diffusion", "flow", "one-step"):
        model.kind = kind
        checkpoint.save(model, path / f"{kind}.safetensors", torch.float32)
    model.kind = "diffusion"
    few_step = make_model(kind="flow")
    few_step.unet = stack(few_step.unet)
    checkpoint.save(few_step, path / "stacked.safetensors", torch.float32)
    original_file(folder, path / "canny.safetensors")
    reference_controlnet(SMALL_UNET, seed=5).save_pretrained(path / "depth")
    square = np.zeros((80, 100, 3), np.uint8)
    square[20:60, 30:70] = 255
    Image.fromarray(square).save(path / "square.png")
    Image.new("RGB", (64, 64), "gray").save(path / "gray.png")
    return path


def sampled(call, files, kind, *arguments):
    """(pixels, metadata) of the image that sample.py writes."""
    code, _, err = call(sample.main, "--model", files / f"{kind}.safetensors", "--prompt", "a",
                        "--num-images", 2, "--dtype", "fp32", "--device", "cpu",
                        *(["--steps", 2] if kind != "one-step" else []), *arguments)
    assert code == 0, err
    image = Image.open("out.png")
    return np.asarray(image.convert("RGB")).astype(float), image.text


@pytest.mark.parametrize("kind", ["diffusion", "flow", "one-step"])
def test_conditions_change_the_images_of_every_kind(call, files, kind):
    flags = lambda image: ["--controlnet", files / "canny.safetensors", "--control-image",
                           files / image]
    plain, about = sampled(call, files, kind)
    assert "controlnet" not in about
    square, about = sampled(call, files, kind, *flags("square.png"))
    assert about["controlnet"] == "['canny.safetensors']" and about["control_scale"] == "[1.0]"
    gray, _ = sampled(call, files, kind, *flags("gray.png"))
    edges, _ = sampled(call, files, kind, *flags("square.png"), "--canny")
    both, _ = sampled(call, files, kind, *flags("square.png"), "--controlnet", files / "depth",
                      "--control-image", files / "gray.png", "--control-scale", 1,
                      "--control-scale", 0.5)
    images = [plain, square, gray, edges, both]
    assert all(np.abs(a - b).max() >= 2 for k, a in enumerate(images) for b in images[:k])
    off, _ = sampled(call, files, kind, *flags("square.png"), "--control-scale", 0)
    assert (off == plain).all()


def test_other_sizes_and_guidance_run(call, files):
    pixels, _ = sampled(call, files, "flow", "--controlnet", files / "depth", "--control-image",
                        files / "square.png", "--height", 32, "--width", 48, "--guidance", 2)
    assert pixels.shape[:2] == (4 * 32 + 4, 2 * 4 * 48 + 6)


def test_a_model_of_two_times_takes_a_controlnet(folder):
    """The sampler "mean" passes the second time through."""
    model = make_model(kind="flow")
    torch.manual_seed(0)
    model.unet = UNet(UNetConfig(**vars(model.unet.config) | {"second_time": True})).eval()
    model.few_step = FewStep("mean", 2)
    before = sample.sample_latents(model, ["a"], [0])
    network = controlnet.load(folder, model.unet)
    model.unet = controlled(model.unet, [(network, torch.rand(1, 3, 64, 64), 1.0)])
    assert relative_error(sample.sample_latents(model, ["a"], [0]), before) > 1e-3


@pytest.mark.parametrize("write, words", REFUSED.values(), ids=REFUSED)
def test_refused_files_are_one_line(call, files, folder, tmp_path, write, words):
    path = write(folder, tmp_path)
    code, _, err = call(sample.main, "--model", files / "flow.safetensors", "--prompt", "a",
                        "--controlnet", path, "--control-image", files / "gray.png")
    assert code == 2 and words in err and path.name in err and err.count("\n") == 0, err


@pytest.mark.parametrize("flags, words", [
    (["--controlnet", "canny.safetensors"], "given 1, 0 and 0 times"),
    (["--control-image", "gray.png"], "given 0, 1 and 0 times"),
    (["--control-scale", "2"], "given 0, 0 and 1 times"),
    (["--canny"], "--canny needs a ControlNet"),
    (["--controlnet", "canny.safetensors", "--controlnet", "depth", "--control-image", "gray.png"],
     "given 2, 1 and 0 times"),
    (["--controlnet", "canny.safetensors", "--control-image", "gray.png", "--control-scale", "1",
      "--control-scale", "1"], "given 1, 1 and 2 times"),
    (["--controlnet", "canny.safetensors", "--control-image", "gray.png", "--out", "gray.png"],
     "gray.png: would overwrite --control-image"),
    (["--controlnet", "canny.safetensors", "--control-image", "depth/config.json"],
     "config.json: not a readable image"),
    (["--controlnet", "canny.safetensors", "--control-image", "gray.png", "--control-scale", "-1"],
     "--control-scale: must be a number of at least 0"),
])
def test_flags_that_do_not_fit_are_one_line(call, files, flags, words):
    arguments = [files / flag if (files / flag).exists() else flag for flag in flags]
    code, _, err = call(sample.main, "--model", files / "flow.safetensors", "--prompt", "a",
                        *arguments)
    assert code == 2 and words in err and err.count("\n") == 0, err


def test_stacked_students_are_refused(call, files):
    code, _, err = call(sample.main, "--model", files / "stacked.safetensors", "--prompt", "a",
                        "--controlnet", files / "depth", "--control-image", files / "gray.png")
    assert code == 2 and "depth: a ControlNet steers one U-Net, and --model is a stacked" in err


# --------------------------------------------------------------------------------------------------
# Edges


@pytest.mark.parametrize("inside, outside", [
    ((200, 200, 200), (0, 0, 0)), ((220, 60, 40), (60, 138, 60)),
], ids=["white on black", "red on green, equally bright"])
def test_canny_finds_the_outline_of_a_square_alone(inside, outside):
    pixels = np.full((40, 50, 3), outside, np.uint8)
    pixels[10:30, 15:35] = inside
    edges = canny(pixels)
    assert edges.shape == pixels.shape and edges.dtype == np.uint8
    assert set(np.unique(edges)) == {0, 255}
    white = edges[:, :, 0] == 255
    outline = np.zeros((40, 50), bool)
    outline[9:31, 14:36] = True
    outline[11:29, 16:34] = False  # a pixel to each side of the square's border
    assert white.any() and not (white & ~outline).any()
    # One pixel wide along the four sides, which are whole away from the corners.
    assert (white[15:25].sum(1) == 2).all() and (white[:, 20:30].sum(0) == 2).all()


@pytest.mark.parametrize("value", [0, 137, 255])
def test_canny_finds_nothing_on_a_constant_image(value):
    assert not canny(np.full((20, 30, 3), value, np.uint8)).any()


def test_canny_keeps_weak_edges_that_touch_strong_ones():
    weak = np.zeros((40, 60, 3), np.uint8)
    weak[20:] = 35  # between the two thresholds
    assert not canny(weak).any()
    stronger = weak.copy()
    stronger[20:] = np.linspace(35, 200, 60).astype(np.uint8)[:, None]  # to the right
    white = canny(stronger)[:, :, 0] > 0
    assert white[19:21].any(0).all() and white.sum() == 60
    ramp = np.full((60, 60, 3), np.arange(0, 240, 4, np.uint8)[:, None])
    assert not canny(ramp).any()
