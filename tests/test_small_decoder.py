"""The small decoder: agreement with TAESD and diffusers, training, sampling, refused files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
import evaluate
import sample
import small_decoder
from command import TINY_ONE_STEP, TINY_TEACHER, BadInput
from conftest import relative_error
from experiments import small_decoders
from formats.images import decode_finite
from formats.single_file import METADATA
from formats.small_decoder import SmallDecoder, SmallDecoderConfig, load_decoder, save_decoder
from make_checkpoint import make_model, write_single_file
from pairs import make_pair_spec, make_pairs, shard_path
from processes import start_two_processes
from sample import sample_images
from training import read_metrics, saved_step

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
TINY = SmallDecoderConfig("shapes", 4, 8, 2)
STATE = Path("runs/small_decoder.safetensors.state")


@pytest.fixture(scope="module")
def model():
    """Stable Diffusion's latents, at a small size."""
    return make_model()


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder)
    return folder


def write_pairs(folder, count=16):
    teacher, prompts = checkpoint.load(TINY_TEACHER), ["a red circle", "a blue square"]
    spec = make_pair_spec(teacher, prompts, "shapes", count, 1, 1.0, "dpm", "reflow", 0)
    make_pairs(teacher, prompts, spec, folder)


def small(folder, *more):
    """Arguments of a run of seconds, whose length may change."""
    return ["--pairs", folder, "--batch-size", 4, "--width", 8, "--save-every", 2, "--cooldown", 0,
            "--warmup-samples", 0, "--ema-half-life", 1, "--learning-rate", 3e-3, *more]


def save_tiny(path, config=TINY):
    torch.manual_seed(0)
    decoder = SmallDecoder(config)
    save_decoder(decoder, path)
    return decoder


# --------------------------------------------------------------------------------------------------
# Agreement with TAESD and diffusers


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(
            convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x):
        return (x + self.conv(x)).relu()


class Clamp(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


def taesd(width=64, channels=4, doublings=3):
    """TAESD's decoder as published: one Sequential, whose images are in [0, 1]."""
    layers = [Clamp(), nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    for _ in range(doublings):
        layers += [Residual(width), Residual(width), Residual(width), nn.Upsample(scale_factor=2),
                   nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, Residual(width), nn.Conv2d(width, 3, 3, padding=1))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_taesds_file_loads_as_published(model, tmp_path, dtype):
    torch.manual_seed(0)
    reference, latents = taesd(), 3 * torch.randn(2, 4, 6, 9)
    assert list(reference.state_dict())[:3] == ["1.weight", "1.bias", "3.conv.0.weight"]
    save_file(reference.state_dict(), tmp_path / "taesd_decoder.safetensors")
    decoder = load_decoder(tmp_path / "taesd_decoder.safetensors", model, dtype)
    images = decoder.decode(latents)
    assert images.shape == (2, 3, 48, 72) and images.dtype == dtype
    expected = 2 * reference.to(dtype)(latents.to(dtype)) - 1
    assert relative_error(images, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_autoencoder_tiny_folder_loads_as_it_is(model, tmp_path, dtype):
    torch.manual_seed(0)
    reference, latents = AutoencoderTiny(), 3 * torch.randn(2, 4, 6, 9)
    reference.save_pretrained(tmp_path / "taesd")
    decoder = load_decoder(tmp_path / "taesd", model, dtype)
    expected = reference.to(dtype).decode(latents.to(dtype)).sample
    assert relative_error(decoder.decode(latents), expected) < TOLERANCE[dtype]
    # Its weights as a single file, without the configuration.
    file = tmp_path / "taesd" / "diffusion_pytorch_model.safetensors"
    assert torch.equal(load_decoder(file, model, dtype).decode(latents), decoder.decode(latents))


def test_other_sizes_agree_with_diffusers_too():
    torch.manual_seed(0)
    reference = AutoencoderTiny(
        encoder_block_out_channels=(16,) * 3, decoder_block_out_channels=(16,) * 3,
        num_encoder_blocks=(1, 3, 3), num_decoder_blocks=(3, 3, 1))
    decoder, latents = SmallDecoder(SmallDecoderConfig("sd", 4, 16, 2)), torch.randn(2, 4, 8, 8)
    decoder.decoder.load_state_dict(reference.decoder.state_dict())
    images = decoder.decode(latents)
    assert images.shape == (2, 3, 32, 32)
    assert relative_error(images, reference.decode(latents).sample) < 1e-5


def test_parameters_and_names_are_those_of_taesd():
    with torch.device("meta"):
        ours, reference = SmallDecoder(SmallDecoderConfig()), AutoencoderTiny()
    assert sum(weight.numel() for weight in ours.parameters()) == 1_222_531
    shapes = {name: weight.shape for name, weight in reference.state_dict().items()
              if name.startswith("decoder.")}
    assert {name: weight.shape for name, weight in ours.state_dict().items()} == shapes


def test_images_are_in_our_range():
    """TAESD's own range is [0, 1]: a last layer that gives 0 and 1 must decode to -1 and 1."""
    decoder, latents = SmallDecoder(TINY), torch.randn(1, 4, 8, 8)
    last = decoder.decoder.layers[-1]
    for value, expected in ((0.0, -1.0), (0.5, 0.0), (1.0, 1.0)):
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, value)
        assert torch.equal(decoder.decode(latents), torch.full((1, 3, 32, 32), expected))
    # The tanh bounds latents by 3.
    decoder = SmallDecoder(TINY)
    assert torch.equal(decoder.decode(1e3 * latents.sign()), decoder.decode(1e6 * latents.sign()))


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    decoder, latents, gradients = SmallDecoder(TINY), torch.randn(2, 4, 8, 8), []
    for switch in (False, True):
        decoder.decoder.gradient_checkpointing = switch
        decoder.zero_grad()
        decoder(latents).square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in decoder.parameters()]))
    assert torch.equal(*gradients)


def test_own_file_is_read_back_with_its_configuration(tmp_path):
    decoder, tiny = save_tiny(tmp_path / "a.safetensors"), checkpoint.load(TINY_TEACHER)
    loaded = load_decoder(tmp_path / "a.safetensors", tiny)
    assert loaded.config == TINY and loaded.config.downsampling == 4 and not loaded.training
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, decoder.state_dict()[name].half().float())


# --------------------------------------------------------------------------------------------------
# Training


def test_crop_equals_the_crop_of_the_whole_target():
    model, generator = checkpoint.load(TINY_TEACHER), torch.Generator().manual_seed(0)
    latents, seen = torch.randn(3, 4, 8, 8, generator=generator), {}
    corners = torch.tensor([[0, 0], [4, 1], [2, 4]])

    def network(part):
        seen["latents"] = part
        return torch.zeros(3, 3, 16, 16)

    def lpips(images, wanted):
        seen["wanted"] = wanted
        return torch.zeros(3)

    each, t = small_decoder.loss(model.vae, lpips, 4, network, latents, corners)
    whole = model.vae.decode(latents).clamp(-1, 1)
    for k, (y, x) in enumerate(corners.tolist()):
        assert torch.equal(seen["latents"][k], latents[k, :, y : y + 4, x : x + 4])
        expected = whole[k, :, 4 * y : 4 * y + 16, 4 * x : 4 * x + 16]
        assert torch.equal(seen["wanted"][k], expected)
        assert each[k].item() == pytest.approx(expected.abs().mean().item())
        # The decoder sees the whole latent, so the image of the cropped latent is another.
        alone = model.vae.decode(latents[k : k + 1, :, y : y + 4, x : x + 4]).clamp(-1, 1)
        assert relative_error(alone[0], expected) > 0.01
    assert t is None and not seen["wanted"].requires_grad


def test_batches_have_no_held_out_latent_and_every_corner():
    class Numbered(list):
        """Latent k is full of the number k."""

        def __getitem__(self, indices):
            return None, indices[:, None, None, None].expand(-1, 4, 8, 6).float(), None

    latents, corners = small_decoder.batch(
        Numbered(), 297, 5, 0, torch.arange(600), slice(0, 600), torch.Generator().manual_seed(0))
    assert sorted(latents[:297, 0, 0, 0].tolist()) == list(range(297))
    assert latents.max() < 297
    assert corners[:, 0].unique().tolist() == [0, 1, 2, 3]
    assert corners[:, 1].unique().tolist() == [0, 1]


def test_training_lowers_the_loss_and_samples_end_to_end(call, pairs_folder):
    code, out, err = call(small_decoder.main, *small(pairs_folder, "--iterations", 40,
                                                     "--save-every", 20))
    assert code == 0 and not err, err
    assert "15 latents of" in out and "40 iterations of 4" in out
    rows, held_out = read_metrics(STATE), read_metrics(STATE, "psnr")
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert [row["step"] for row in held_out] == [0, 20, 40]
    assert held_out[-1]["l1"] < held_out[0]["l1"] and held_out[-1]["psnr"] > held_out[0]["psnr"]
    images = sorted(STATE.glob("samples/*.png"))
    assert [path.stem for path in images] == ["0000000", "0000020", "0000040"]
    assert Image.open(images[0]).size == (2 * 128 + 6, 128 + 4)  # one held-out latent: full, small
    assert (STATE / "loss.png").exists()

    # The last row is of the file that is written, up to its fp16.
    model = checkpoint.load(TINY_TEACHER, decoder="runs/small_decoder.safetensors")
    full = checkpoint.load(TINY_TEACHER).vae
    latents = load_file(shard_path(pairs_folder, 0))["latents"][15:].float()
    with torch.no_grad():
        error = model.vae.decode(latents).clamp(-1, 1) - full.decode(latents).clamp(-1, 1)
    assert held_out[-1]["l1"] == pytest.approx(error.abs().mean().item(), rel=1e-2)
    psnr = 10 * torch.log10(4 / error.square().mean()).item()
    assert held_out[-1]["psnr"] == pytest.approx(psnr, abs=0.05)

    few = ["--model", TINY_TEACHER, "--steps", 1, "--num-images", 2]
    assert call(sample.main, *few)[0] == 0
    without = Image.open("out.png")
    code, _, err = call(sample.main, *few, "--decoder", "runs/small_decoder.safetensors")
    assert code == 0, err
    image = Image.open("out.png")
    assert image.size == without.size and image.tobytes() != without.tobytes()
    assert "decoder" not in without.text and image.text["decoder"] == "small_decoder.safetensors"

    assert "finished already" in call(
        small_decoder.main, *small(pairs_folder, "--iterations", 40, "--save-every", 20))[1]
    code, _, err = call(small_decoder.main, *small(pairs_folder, "--iterations", 50, "--crop", 5))
    assert code == 2 and "crop was 0, now 5" in err


def test_stopped_run_resumes_bit_for_bit(call, pairs_folder, monkeypatch):
    arguments = small(pairs_folder, "--iterations", 6, "--crop", 5)
    assert call(small_decoder.main, *arguments, "--out", "runs/calm.safetensors")[0] == 0

    class Killed(BaseException):
        pass

    original, calls = small_decoder.loss, []

    def kill(*inputs):
        calls.append(inputs)
        if len(calls) == 4:
            raise Killed
        return original(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(small_decoder, "loss", kill)
        with pytest.raises(Killed):
            call(small_decoder.main, *arguments)
    assert saved_step(STATE) == 2 and not Path("runs/small_decoder.safetensors").exists()
    code, _, err = call(small_decoder.main, *arguments)
    assert code == 0, err
    calm, resumed = Path("runs/calm.safetensors"), Path("runs/small_decoder.safetensors")
    assert calm.read_bytes() == resumed.read_bytes()
    states = [load_file(f"{out}.state/state.safetensors") for out in (calm, resumed)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    held_out = [read_metrics(f"{out}.state", "psnr") for out in (calm, resumed)]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 4


def test_two_processes_train_as_one(call, pairs_folder, tmp_path):
    arguments = small(pairs_folder, "--iterations", 2, "--crop", 5, "--learning-rate", 1e-4)
    assert call(small_decoder.main, *arguments)[0] == 0
    processes = start_two_processes([tmp_path / "two"], "small_decoder", arguments)
    codes = [process.wait() for process in processes]
    assert codes == [0, 0], (tmp_path / "two" / "log").read_text()
    one, two = (load_file(folder / STATE / "state.safetensors")
                for folder in (tmp_path, tmp_path / "two"))
    for name in one:
        if name.startswith("weights."):
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5)


def test_init_starts_from_a_small_decoder(call, pairs_folder):
    decoder = save_tiny("start.safetensors")
    still = [*small(pairs_folder, "--iterations", 1), "--learning-rate", 0]
    code, _, err = call(small_decoder.main, *still, "--init", "start.safetensors")
    assert code == 0, err
    trained = load_file("runs/small_decoder.safetensors")
    assert all(torch.equal(trained[name], weight.half())
               for name, weight in decoder.state_dict().items())
    code, _, err = call(small_decoder.main, *still, "--init", "start.safetensors", "--width", 16)
    assert code == 2 and "--width 16: --init has 8" in err


def test_defaults_for_stable_diffusion(call, model, pairs_folder, monkeypatch):
    write_single_file(model, "sd.safetensors")
    shutil.copytree(pairs_folder, "runs/pairs")

    def stop(network, ema, batch, loss, options, *more):
        assert sum(weight.numel() for weight in network.parameters()) == 1_222_531
        assert network.decoder.gradient_checkpointing and loss.args[2] == 32 == batch.args[2]
        assert (options.iterations, options.batch_size, options.accumulate) == (50_000, 16, 1)
        assert options.learning_rate == 3e-4
        raise BadInput("enough")

    monkeypatch.setattr(small_decoder, "train", stop)
    monkeypatch.setattr(small_decoder, "perceptual_distance", lambda net, device: torch.add)
    code, _, err = call(small_decoder.main, "--model", "sd.safetensors")
    assert code == 2 and "--crop 32: larger than the latents" in err
    spec = json.loads(Path("runs/pairs/pairs.json").read_text())
    spec["latent_shape"] = [4, 64, 64]
    Path("runs/pairs/pairs.json").write_text(json.dumps(spec))
    shard = load_file("runs/pairs/shard-00000.safetensors")
    with safe_open("runs/pairs/shard-00000.safetensors", "pt") as file:
        metadata = file.metadata()
    shard["latents"] = torch.zeros(16, 4, 64, 64).half()
    save_file(shard, "runs/pairs/shard-00000.safetensors", metadata)
    code, _, err = call(small_decoder.main, "--model", "sd.safetensors")
    assert code == 2 and err.endswith("error: enough"), err
    assert "made by tiny_sd.safetensors, which must have the autoencoder of sd.safetensors" in err


# --------------------------------------------------------------------------------------------------
# In place of the model's decoder


def test_evaluate_takes_a_small_decoder(call):
    save_tiny("a.safetensors")
    few = ["--model", TINY_TEACHER, "--steps", 1, "--num-samples", 8]
    code, _, err = call(evaluate.main, *few, "--decoder", "a.safetensors")
    assert code == 0, err
    real, row = json.loads(Path("runs/evaluate.json").read_text())
    assert (real["decoder"], row["decoder"]) == (None, "a.safetensors")
    assert call(evaluate.main, *few)[0] == 0
    plain = json.loads(Path("runs/evaluate.json").read_text())[1]
    assert "decoder" not in plain and plain["frechet"] != row["frechet"]


def test_images_on_disk_are_of_one_decoder(call, tmp_path, monkeypatch):
    """The folder of a model's images has the hash of both files, so no folder mixes decoders."""
    save_tiny("a.safetensors")
    save_tiny("b.safetensors", SmallDecoderConfig("shapes", 4, 4, 2))
    hashes = []

    class Gallery:
        prompts = ["a red circle", "a blue square"]

        def generate(self, model, weights_hash, *more):
            hashes.append(weights_hash)

        def score(self, folder):
            return {}

        def first_images(self, folder, count):
            return torch.zeros(2, 3, 32, 32)

    monkeypatch.setattr(evaluate, "load_gallery", lambda args, device: Gallery())
    arguments = ["--model", TINY_TEACHER, "--images", tmp_path, "--prompts", "p", "--steps", 1]
    for decoder in ([], ["--decoder", "a.safetensors"], ["--decoder", "b.safetensors"]):
        code, _, err = call(evaluate.main, *arguments, *decoder)
        assert code == 0, err
    assert hashes[0] == checkpoint.fingerprint(TINY_TEACHER) and len(set(hashes)) == 3
    AutoencoderTiny().save_pretrained("taesd")
    weights = Path("taesd/diffusion_pytorch_model.safetensors")
    assert checkpoint.fingerprint("taesd") == checkpoint.fingerprint(weights)


def test_small_decoder_has_what_the_models_own_has(tmp_path):
    save_tiny(tmp_path / "a.safetensors")
    model = checkpoint.load(TINY_TEACHER, decoder=tmp_path / "a.safetensors")
    assert model.latent_shape((64, 32)) == (4, 16, 8)
    images = sample_images(model, ["a red circle"], [0], 1)
    assert images.shape == (1, 3, 32, 32)
    for encode in (model.vae.encode, model.vae.encode_latents):
        with pytest.raises(BadInput, match="a small decoder has no encoder"):
            encode(images)
    model.compile(backend="eager")
    assert torch.equal(sample_images(model, ["a red circle"], [0], 1), images)

    model = checkpoint.load(TINY_TEACHER, decoder=tmp_path / "a.safetensors")
    latents = torch.randn(1, 4, 8, 8)
    nn.init.constant_(model.vae.decoder.layers[0].bias, 6e4)
    assert not torch.isfinite(model.vae.half().decode(latents)).all()
    with torch.no_grad():
        assert torch.isfinite(decode_finite(model, latents, ["a red circle"])).all()


# --------------------------------------------------------------------------------------------------
# What is refused


def save_with(path, change=lambda tensors: None, **about):
    """A small decoder's file with changed tensors and metadata."""
    save_tiny(path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {METADATA: json.dumps(about)} if about else None)


def sizes(**changed):
    return {"small_decoder": vars(TINY) | changed}


def test_wrong_decoder_files_are_a_one_line_error(call, model):
    write_single_file(model, "sd.safetensors")
    save_file(taesd(16).state_dict(), "narrow.safetensors")
    save_file(taesd(64, 16).state_dict(), "taesd3_decoder.safetensors")
    save_file(taesd().state_dict(), "taesdxl_decoder.safetensors")
    save_file(taesd().state_dict(), "taesd_decoder.safetensors")
    save_file({"0.weight": torch.zeros(64, 3, 3, 3), "1.conv.0.weight": torch.zeros(1)},
              "taesd_encoder.safetensors")
    Path("taesd_decoder.pth").write_bytes(b"PK")
    Path("cut.safetensors").write_bytes(Path("taesd_decoder.safetensors").read_bytes()[:1000])
    AutoencoderTiny(latent_channels=16).save_pretrained("taef1")
    AutoencoderTiny(num_decoder_blocks=(3, 3, 2, 1)).save_pretrained("other")
    AutoencoderTiny(act_fn="gelu").save_pretrained("gelu")
    AutoencoderTiny().save_pretrained("hub/models--madebyollin--taesdxl/snapshots/0")
    AutoencoderKL(block_out_channels=(32,)).save_pretrained("vae")
    Path("empty").mkdir()
    save_tiny("tiny.safetensors")
    save_with("more.safetensors", lambda t: t.update(extra=torch.zeros(1)), **sizes())
    save_with("less.safetensors", lambda t: t.pop("decoder.layers.2.conv.2.bias"), **sizes())
    save_with("wide.safetensors", **sizes(width=9))
    save_with("text.safetensors", **sizes(width="x"))
    save_with("none.safetensors", **sizes(doublings=0))
    save_with("odd.safetensors", **sizes(depth=3))
    save_with("list.safetensors", small_decoder=[1])
    save_with("nan.safetensors", lambda t: t["decoder.layers.0.bias"].fill_(torch.nan), **sizes())
    of_sd = {
        "missing.safetensors": "no such file or folder",
        TINY_TEACHER: "not a small decoder", "taesd_encoder.safetensors": "not a small decoder",
        "narrow.safetensors": "1.weight is [16, 4, 3, 3] and should be [64, 4, 3, 3]",
        "taesd3_decoder.safetensors": "1.weight is [64, 16, 3, 3]",
        "taesdxl_decoder.safetensors": "for Stable Diffusion XL",
        "hub/models--madebyollin--taesdxl/snapshots/0": "for Stable Diffusion XL",
        "taesd_decoder.pth": "only .safetensors is read", "cut.safetensors": "not a complete",
        "taef1": "decodes latents of sd with 16 channels", "other": "num_decoder_blocks is",
        "gelu": "its act_fn is 'gelu'", "vae": "its _class_name is 'AutoencoderKL'",
        "empty": "holds no config.json", "tiny.safetensors": "decodes latents of shapes",
    }
    of_tiny = {
        "taesd_decoder.safetensors": "decodes latents of sd with 4 channels and 8 pixels",
        "more.safetensors": "holds 1 tensors that no SD 1.x network has, first extra",
        "less.safetensors": "1 tensors are missing, first decoder.layers.2.conv.2.bias",
        "wide.safetensors": "have the wrong shape", "text.safetensors": "not a small decoder's",
        "none.safetensors": "not a small decoder's", "odd.safetensors": "not a small decoder's",
        "list.safetensors": "not a small decoder's", "nan.safetensors": "is not finite",
    }
    for main, model, cases in ((sample.main, "sd.safetensors", of_sd),
                               (evaluate.main, TINY_TEACHER, of_tiny)):
        for name, words in cases.items():
            code, _, err = call(main, "--model", model, "--decoder", name)
            assert code == 2 and words in err and err.count("\n") == 0, (name, err)
    code, _, err = call(sample.main, "--model", "tiny.safetensors")
    assert code == 2 and "holds no U-Net" in err


def test_wrong_requests_are_a_one_line_error(call, pairs_folder, monkeypatch):
    shutil.copytree(pairs_folder, "pairs")
    shutil.copy(TINY_TEACHER, "tiny.safetensors")
    for arguments, words in (
        ([], "runs/pairs: holds no pairs; make them: python reflow.py"),
        (["--pairs", "pairs", "--crop", 9], "--crop 9: larger than the latents"),
        (["--pairs", "pairs", "--crop", 4], "--crop 4: too small for --lpips-net random"),
        (["--model", TINY_ONE_STEP], "--teacher ITS-TEACHER --pairs runs/pairs"),
        (["--pairs", "pairs", "--init", "teacher"], "teacher: no such file or folder"),
        (["--pairs", "pairs", "--dtype", "fp16"], "--dtype fp16: is for sampling only"),
        (["--pairs", "pairs", "--out", "a.bin"], "must end in .safetensors"),
        (["--pairs", "pairs", "--model", "tiny.safetensors", "--out", "tiny.safetensors"],
         "would overwrite --model"),
        (["--pairs", "pairs", "--model", "nowhere"], "nowhere: no such file or folder"),
    ):
        code, _, err = call(small_decoder.main, *arguments)
        assert code == 2 and words in err and err.count("\n") == 0, (arguments, err)
    shard = shard_path("pairs", 0)
    shard.write_bytes(shard.read_bytes()[:200])
    code, _, err = call(small_decoder.main, "--pairs", "pairs")
    assert code == 2 and "damaged" in err
    shard.unlink()
    code, _, err = call(small_decoder.main, "--pairs", "pairs")
    assert code == 2 and "pairs: shard 0 is missing; let reflow.py finish these pairs" in err


def test_study_compares_both_decoders_and_resumes(call, monkeypatch):
    flags = ["--iterations", 2, "--batch-size", 4, "--num-pairs", 8, "--teacher-steps", 2,
             "--num-samples", 12, "--num-seeds", 2, "--width", 8]
    code, out, err = call(small_decoders.main, *flags)
    assert code == 0, err
    folder = Path("runs/small-decoders/shapes")
    rows = json.loads((folder / "small_decoders.json").read_text())
    assert [(row["decoder"], row["seed"]) for row in rows] == [
        ("full", 0), ("small", 0), ("full", 1), ("small", 1)]
    assert [row["psnr"] is None for row in rows] == [True, False, True, False]
    summary = small_decoders.summary_of(rows)
    gains = [rows[1]["frechet"] - rows[0]["frechet"], rows[3]["frechet"] - rows[2]["frechet"]]
    assert summary[2]["frechet"] == pytest.approx(sum(gains) / 2)
    assert np.asarray(Image.open(folder / "small_decoders.png").convert("L")).std() > 3
    assert (folder / "small_decoders.md").read_text() in out
    monkeypatch.setattr(small_decoders, "run_command", None)  # nothing is trained again
    assert call(small_decoders.main, *flags)[0] == 0
    assert json.loads((folder / "small_decoders.json").read_text()) == rows
