"""Layton: quantisation, the causal transformer, tokens to images and back, the command."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import checkpoint
import layton.train
from command import TINY_TEACHER
from conftest import relative_error
from evaluation.study import dataset_of
from layton.model import CODES, TOKENS, Layton, LaytonGen, decode, quantize, sample_tokens
from sample import noise_from_seeds
from toy import shapes
from training import TrainingOptions, ema_copy, read_metrics, saved_step

STAGES = ("tokenizer", "one-step", "laytongen")


@pytest.fixture(scope="module")
def teacher():
    return checkpoint.load(TINY_TEACHER)


@pytest.fixture
def network(teacher):
    torch.manual_seed(0)
    return Layton(teacher.unet).eval()


@pytest.fixture
def gen():
    torch.manual_seed(0)
    return LaytonGen().eval()


@pytest.fixture
def small(monkeypatch):
    """Sizes of a run of seconds."""
    for name, value in (("BATCH_SIZE", 2), ("SAVE_EVERY", 2), ("CENSUS", 20), ("CAPTIONED", 20)):
        monkeypatch.setattr(layton.train, name, value)


def images_of(count):
    return shapes.real_images(shapes.random_captions(count, 0), 0)


# --------------------------------------------------------------------------------------------------
# Quantisation


def test_quantisation_by_hand():
    z = torch.tensor([[[0.6, 0.8], [1.0, 0.0]]])
    codebook = torch.tensor([[2.0, 0.0], [0.0, 0.5], [-3.0, 0.0]])
    codes, tokens, loss = quantize(z, codebook)
    assert tokens.tolist() == [[1, 0]]  # 0.8 > 0.6: lengths of entries do not count
    torch.testing.assert_close(codes, torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))
    # (1 + 0.25) times the mean of 0.6², 0.2², 0 and 0
    torch.testing.assert_close(loss, torch.tensor([1.25 * (0.36 + 0.04) / 4]))


def test_gradient_goes_straight_through():
    z = F.normalize(torch.randn(2, 3, 8), dim=-1).requires_grad_()
    codebook = torch.randn(5, 8, requires_grad=True)
    codes, tokens, loss = quantize(z, codebook)
    weights = torch.randn(2, 3, 8)
    (codes * weights).sum().backward(retain_graph=True)
    assert torch.equal(z.grad, weights) and codebook.grad is None

    z.grad = None
    loss.sum().backward()
    entries = F.normalize(codebook, dim=-1)[tokens]
    torch.testing.assert_close(z.grad, 0.25 * 2 * (z - entries).detach() / 24)
    unused = sorted(set(range(5)) - set(tokens.flatten().tolist()))
    assert codebook.grad[unused].eq(0).all() and codebook.grad[tokens].ne(0).any(-1).all()


def test_unused_entries_restart(network, small, tmp_path):
    ema, options = ema_copy(network), (dataset_of("shapes")[0], 10, 0, tmp_path)
    restart = lambda step: layton.train.restart_unused(network, ema, *options, step, None)
    restart(0)
    first = network.codebook.clone()
    assert torch.equal(ema.codebook, first) and len(first.unique(dim=0)) == CODES
    torch.testing.assert_close(first.norm(dim=1), torch.ones(CODES))  # outputs of the encoder

    network.codebook.data[:100] = -network.encode(images_of(20)).mean((0, 1))  # far from all
    before = network.codebook.clone()
    restart(4)
    moved = (network.codebook != before).any(1)
    used = [row["used"] for row in read_metrics(tmp_path, "used")]
    assert moved[:100].sum() >= 99 and moved.float().mean().item() == pytest.approx(1 - used[1])
    again = network.codebook.clone()
    network.codebook.data.copy_(before)
    restart(4)  # as when the run resumes there
    assert torch.equal(network.codebook, again) and len(read_metrics(tmp_path, "used")) == 2
    restart(5)  # the learning rate falls
    assert torch.equal(network.codebook, again)


# --------------------------------------------------------------------------------------------------
# Tokens and images


@torch.no_grad()
def test_tokens_to_image_to_tokens(teacher, network):
    images, seeds = images_of(3), [5, 6, 7]
    tokens = network.tokens(images)
    assert tokens.shape == (3, TOKENS) and tokens.dtype == torch.int64
    assert 0 <= tokens.min() and tokens.max() < CODES
    made = decode(teacher, network, tokens, seeds, 1)
    assert made.shape == images.shape
    assert network.tokens(made).shape == tokens.shape

    # One step from the tokens is the forward pass that training sees.
    x0 = noise_from_seeds(seeds, teacher.latent_shape())
    velocity, _ = network(images, x0, torch.zeros(3))
    assert relative_error(made, teacher.vae.decode(x0 + velocity)) < 1e-4
    assert relative_error(decode(teacher, network, tokens[1:2], [6], 1), made[1:2]) < 1e-4
    assert relative_error(decode(teacher, network, tokens, seeds, 2), made) > 1e-3
    assert relative_error(decode(teacher, network, tokens.flip(1), seeds, 1), made) > 1e-3


@torch.no_grad()
def test_laytongen_is_causal(gen):
    context, tokens = torch.randn(2, 16, 128), torch.randint(CODES, (2, TOKENS - 1))
    logits = gen(context, tokens)
    assert logits.shape == (2, TOKENS, CODES)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % CODES
    others = gen(context, changed)
    torch.testing.assert_close(others[:, :8], logits[:, :8])  # predicted before token 7 is known
    assert (others[:, 8:] - logits[:, 8:]).abs().amax((0, 2)).min() > 1e-3
    torch.testing.assert_close(gen(context, tokens[:, :3]), logits[:, :4])
    assert (gen(context.roll(1, 0), tokens)[:, 0] - logits[:, 0]).abs().max() > 1e-3


def test_sampled_tokens_follow_the_guided_softmax(gen):
    context, null = torch.randn(4, 16, 128), torch.randn(1, 16, 128)
    tokens = sample_tokens(gen, context, null, range(4))
    assert tokens.shape == (4, TOKENS) and tokens.dtype == torch.int64
    assert torch.equal(sample_tokens(gen, context[2:], null, [2, 3]), tokens[2:])

    def fixed(context, tokens):  # the same logits at each position: of the caption, or of ""
        row = torch.full((CODES,), -20.0)
        row[:3] = torch.tensor([0.0, 1.0, 2.0] if context.mean() > 0 else [0.0, 0.0, 2.0])
        return row.expand(len(context), tokens.shape[1] + 1, CODES)

    ones = torch.ones(400, 1, 1)
    sampled = sample_tokens(fixed, ones, -ones[:1], range(400), guidance=2.0)
    expected = torch.tensor([0.0, 2.0, 2.0]).softmax(0)  # without + 2 (with - without)
    frequencies = sampled.flatten().bincount(minlength=3)[:3] / sampled.numel()
    assert (frequencies - expected).abs().max() < 4 * math.sqrt(0.25 / sampled.numel())
    assert sample_tokens(fixed, ones, -ones[:1], range(400), 1.0, top_k=1).eq(2).all()


# --------------------------------------------------------------------------------------------------
# The command


class Killed(BaseException):
    pass


def killing(function, at):
    """The function; its call number `at` is the kill."""
    calls = []

    def wrapped(*inputs, **more):
        calls.append(inputs)
        if len(calls) == at:
            raise Killed
        return function(*inputs, **more)

    return wrapped


def run_layton(call, out, *more, iterations=(5, 3, 3)):
    return call(layton.train.main, "--iterations", *iterations, "--out", out, *more)


def test_killed_runs_resume_bit_for_bit_and_are_measured(call, small, monkeypatch):
    code, out, err = run_layton(call, "calm")
    assert code == 0 and not err and out.count(": trained") == 3, err
    distance = layton.train.perceptual_distance
    for stage, (where, name, new) in zip(STAGES, (
        (layton.train, "interpolate", killing(layton.train.interpolate, 4)),
        (layton.train, "perceptual_distance", lambda *a: killing(distance(*a), 3)),
        (F, "cross_entropy", killing(F.cross_entropy, 3)),
    )):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, new)
            with pytest.raises(Killed):
                run_layton(call, "killed")
        assert saved_step(f"killed/seed-0/{stage}") == 2
    assert run_layton(call, "killed")[0] == 0
    for stage in STAGES:
        states = [load_file(f"{out}/seed-0/{stage}/state.safetensors")
                  for out in ("calm", "killed")]
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    used = [read_metrics(f"{out}/seed-0/tokenizer", "used") for out in ("calm", "killed")]
    assert used[0] == used[1] and [row["step"] for row in used[0]] == [0, 2, 4, 5]
    # Stage 2 trains the U-Net alone.
    assert all(name.split(".", 1)[1].startswith("unet.")
               for name in load_file("calm/seed-0/one-step/state.safetensors"))

    code, _, err = run_layton(call, "calm", iterations=(6, 3, 3))
    assert code == 2 and "iterations was 5, now 6" in err and err.count("\n") == 0
    code, _, err = run_layton(call, "calm", iterations=(5, 3, 2))
    assert code == 2 and err.count("\n") == 0

    code, _, err = run_layton(call, "calm", "--num-samples", 8)
    assert code == 0, err
    rows = json.loads(Path("calm/reconstruction.json").read_text())
    assert [row["row"] for row in rows][:2] == ["VAE alone", "tokens, 25 diffusion steps"]
    assert len(rows) == 4 and rows[0]["psnr"] > 30 > max(row["psnr"] for row in rows[1:])
    for net in ("random", "efficientnet"):
        assert 0 < rows[0][f"lpips_{net}"] < min(row[f"lpips_{net}"] for row in rows[1:])
    others = json.loads(Path("calm/generation.json").read_text())
    assert [row["row"] for row in others][:2] == ["real", "teacher, 25 steps"] and len(others) == 5
    assert others[1]["caption_accuracy"] >= 0.5 and others[1]["nearest"] is None
    assert 0 < others[3]["nearest"] == others[4]["nearest"] <= 1  # the same tokens, decoded twice
    assert rows[0]["used"] is None and 0 < rows[1]["used"] <= 1
    assert "| LaytonGen, one step | 1 |" in Path("calm/generation.md").read_text()
    assert Image.open("calm/generation-0.png").size[0] > 1000

    Path("calm/reconstruction.json").write_text(json.dumps(rows[:3]))
    graded = []
    monkeypatch.setattr(layton.train, "psnr", lambda *a: graded.append(a) or torch.zeros(1))
    assert run_layton(call, "calm", "--num-samples", 8)[0] == 0
    again = json.loads(Path("calm/reconstruction.json").read_text())
    assert again[:3] == rows[:3] and again[3] == rows[3] | {"psnr": 0.0} and len(graded) == 2
    code, _, err = run_layton(call, "calm", "--num-samples", 9)
    assert code == 2 and "num_samples was 8, now 9" in err and err.count("\n") == 0


def test_the_model_that_comes_back_is_the_trained_one(call, small, monkeypatch, teacher):
    returned = []
    original = layton.train.train_layton
    monkeypatch.setattr(layton.train, "train_layton",
                        lambda *a: returned.append(original(*a)) or returned[-1])
    for _ in range(2):
        assert run_layton(call, "out", iterations=(2, 2, 2))[0] == 0
    (_, tokenizer, one_step, gen, seen), loaded = returned
    assert torch.equal(seen, loaded[-1]) and seen.shape[1] == 16
    for before, after in zip((tokenizer, one_step, gen), loaded[1:]):
        for one, other in zip(before.state_dict().values(), after.state_dict().values()):
            assert torch.equal(one, other)
    images = images_of(2)
    assert torch.equal(tokenizer.tokens(images), one_step.tokens(images))
    assert not torch.equal(tokenizer.unet.conv_out.weight, one_step.unet.conv_out.weight)
    model = replace(teacher, unet=None)  # decode takes the U-Net of the network
    decode(model, one_step, one_step.tokens(images), [0, 1], 1)


def test_batches_are_shared_out_and_no_caption_is_one_to_measure_on(call, small, monkeypatch):
    batches = []
    monkeypatch.setattr(layton.train, "train", lambda net, ema, batch, *_: batches.append(batch))
    monkeypatch.setattr(layton.train, "CAPTIONED", 40)
    assert call(layton.train.main)[0] == 0
    for batch in batches:
        whole, part = (batch(torch.arange(100), share, torch.Generator().manual_seed(0))
                       for share in (slice(None), slice(20, 30)))
        for all_of_it, some in zip(whole, part):
            same = torch.equal if isinstance(some, torch.Tensor) else list.__eq__
            assert same(all_of_it[20:30], some) and len(all_of_it) == 100
    captions = set(whole[1])
    assert "" in captions and len(captions) > 10
    assert not any(map(shapes.is_for_measuring, captions))
    assert any(map(shapes.is_for_measuring, shapes.random_captions(40, 0)))


def test_defaults(monkeypatch, call):
    class Enough(Exception):
        pass

    def stop(network, ema, batch, loss, options: TrainingOptions, folder, settings, validate):
        assert (options.iterations, options.batch_size, options.save_every) == (4000, 64, 100)
        assert str(folder) == "runs/layton/shapes/seed-0/tokenizer" and validate
        raise Enough

    monkeypatch.setattr(layton.train, "train", stop)
    with pytest.raises(Enough):
        call(layton.train.main)


def test_wrong_requests_are_a_one_line_error(call, small, monkeypatch, tmp_path):
    emoji = dataset_of("emoji")[0]
    monkeypatch.setattr(emoji, "PICTURES", tmp_path / "none")
    emoji.pictures.cache_clear()
    Path("file").write_text("")
    for arguments, words in (
        (["--dataset", "emoji"], "none: missing or damaged; download the images"),
        (["--dataset", "faces"], "invalid choice: 'faces'"),
        (["--iterations", 1, 2], "expected 3 arguments"),
        (["--iterations", 0, 1, 1], "must be a whole number of at least 1"),
        (["--num-samples", 4], "at least 5, got '4'"),
        (["--dtype", "fp16"], "--dtype fp16: is for sampling only"),
        (["--device", "nowhere"], "--device nowhere: not usable here"),
        (["--out", "file"], "file"),
    ):
        code, _, err = call(layton.train.main, *arguments)
        assert code == 2 and words in err and err.count("\n") == 0, (arguments, err)
