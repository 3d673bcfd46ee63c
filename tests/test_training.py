"""The loop: resuming equals not having stopped, and it stops where it must."""

import json
import os
import signal

import pytest
import torch
from torch import nn

import training
from command import BadInput
from training import TrainingOptions, generator_for, shuffled, train


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 2))


def run(folder, network=None, iterations=20, settings=None, spoil=None, **changes):
    """Learn to rotate points; returns the network. spoil(step) may break the loss."""
    network = network or make_network()
    options = TrainingOptions(**{"iterations": iterations, "batch_size": 8, "learning_rate": 1e-2, "warmup_samples": 40,
                                 "ema_half_life": 100, "save_every": 5, "log_every": 2} | changes)  # fmt: skip
    step = [0]

    def draw(samples, generator):
        step[0] = int(samples[0]) // options.batch_size
        return torch.randn(len(samples), 2, generator=generator), torch.rand(len(samples), generator=generator)

    def loss(x, t):
        error = network(x) - x.flip(1)
        if spoil:
            error = error * spoil(step[0])
        return error.square().mean(1), t

    train(network, draw, loss, options, folder, settings or {}, "test")
    return network


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_seconds(folder):
    return [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in rows(folder)]


def test_what_is_practical_does_not_change_the_run(tmp_path):
    plain = run(tmp_path / "plain")
    assert torch.equal(weights(plain), weights(run(tmp_path / "practical", ema_device="cpu", shard_optimizer=True)))
    run(tmp_path / "mixed", iterations=10)
    assert torch.equal(weights(plain), weights(run(tmp_path / "mixed", ema_device="cpu", save_every=3)))


def test_it_learns_and_reports(tmp_path):
    run(tmp_path, iterations=300)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[-1] < 0.05 * losses[0]
    assert rows(tmp_path)[-1]["samples"] == 2400
    assert len(rows(tmp_path)[-1]["loss_by_t"]) == training.TIME_BINS
    training.plot_loss(tmp_path)
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    whole = run(tmp_path / "a")

    def killed(step):
        if step == 12:
            raise RuntimeError("as if the machine had gone")
        return 1.0

    with pytest.raises(RuntimeError, match="gone"):
        run(tmp_path / "b", spoil=killed)
    assert training.saved_step(tmp_path / "b") == 10
    resumed = run(tmp_path / "b")
    assert torch.equal(weights(whole), weights(resumed))
    assert without_seconds(tmp_path / "a") == without_seconds(tmp_path / "b")


def test_continued_equals_longer_run(tmp_path):
    run(tmp_path / "a", iterations=10)
    assert torch.equal(weights(run(tmp_path / "a", iterations=20)), weights(run(tmp_path / "b", iterations=20)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_resume_in_either_order_in_memory(tmp_path, memory_format):
    def convolve(folder, iterations):
        torch.manual_seed(0)
        network = nn.Conv2d(3, 3, 3, padding=1).to(memory_format=memory_format)
        draw = lambda samples, generator: (torch.randn(len(samples), 3, 5, 5, generator=generator),)
        loss = lambda x: ((network(x) - x).square().flatten(1).mean(1), None)
        train(network, draw, loss, TrainingOptions(iterations, 4, learning_rate=0.1), folder, {})
        return network.weight.detach()

    convolve(tmp_path / "a", 5)
    resumed = convolve(tmp_path / "a", 10)
    assert torch.equal(resumed, convolve(tmp_path / "b", 10))
    assert resumed.is_contiguous(memory_format=memory_format)


def test_accumulation_is_the_same_batch(tmp_path):
    torch.testing.assert_close(weights(run(tmp_path / "a", accumulate=3)), weights(run(tmp_path / "b")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_saves_and_says_how_to_go_on(tmp_path, number):
    def interrupt(step):
        if step == 7:
            os.kill(os.getpid(), number)
        return 1.0

    with pytest.raises(BadInput, match="stopped after step 8, which is saved; run the same command again"):
        run(tmp_path / "a", spoil=interrupt)
    assert training.saved_step(tmp_path / "a") == 8
    assert torch.equal(weights(run(tmp_path / "a")), weights(run(tmp_path / "b")))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(BadInput, match="not finite at step 7, samples 56 to 63; the state of step 5 is kept"):
        run(tmp_path, spoil=lambda step: float("nan") if step == 7 else 1.0)
    assert training.saved_step(tmp_path) == 5


def test_other_settings_are_refused_by_name(tmp_path):
    run(tmp_path, settings={"pairs": "one"})
    with pytest.raises(BadInput, match="pairs was 'one', now 'two'"):
        run(tmp_path, settings={"pairs": "two"})
    with pytest.raises(BadInput, match="learning_rate was 0.01, now 0.1"):
        run(tmp_path, settings={"pairs": "one"}, learning_rate=0.1)


def test_a_damaged_state_is_named(tmp_path):
    run(tmp_path, iterations=5)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(BadInput, match="state.safetensors: damaged"):
        run(tmp_path)


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("", (), {"free": 100}))
    with pytest.raises(BadInput, match="GB are free"):
        run(tmp_path)


def test_what_is_on_the_disk_already_is_not_asked_for_again(tmp_path, monkeypatch):
    state = training.BYTES_PER_PARAMETER * sum(weight.numel() for weight in make_network().parameters())
    free = {"free": 2 * state}
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("", (), free))
    run(tmp_path, iterations=10)
    free["free"] = state  # the first state takes up the other half
    run(tmp_path, iterations=20)
    assert rows(tmp_path)[-1]["step"] == 20


def test_only_what_is_trainable_is_trained_and_saved(tmp_path):
    network = make_network()
    network[0].requires_grad_(False)
    before = network[0].weight.clone()
    run(tmp_path, network)
    assert torch.equal(network[0].weight, before)
    with training.safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert not any("weights.0." in name for name in file.keys())


def test_average_and_warm_up_are_counted_in_samples(tmp_path):
    """The average of a network that moves evenly lags by its half-life / ln 2, at any batch size."""
    lags = []
    for batch_size in (4, 16):
        network = nn.Linear(1, 1, bias=False)
        network.weight.data.zero_()
        options = TrainingOptions(
            8000 // batch_size, batch_size, learning_rate=1e-3 * batch_size, ema_half_life=200, save_every=10**6, seed=0
        )
        # A constant gradient: Adam moves by the learning rate every step, that is 1e-3 a sample.
        draw = lambda samples, generator: (torch.ones(len(samples), 1),)  # noqa: E731
        train(network, draw, lambda x: (-network(x)[:, 0], None), options, tmp_path / str(batch_size), {})
        lags.append(8.0 - network.weight.item())
    expected = 1e-3 * 200 / 0.6931
    assert lags == pytest.approx([expected, expected], rel=0.1)
    run(tmp_path / "warm", iterations=10, warmup_samples=40, log_every=1)
    rates = [row["learning_rate"] for row in rows(tmp_path / "warm")]
    assert rates[:5] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2]) and rates[9] == 1e-2


def test_cooldown_ends_at_zero(tmp_path):
    run(tmp_path, iterations=20, warmup_samples=0, cooldown=0.5, log_every=1)
    rates = [row["learning_rate"] for row in rows(tmp_path)]
    assert rates[:11] == pytest.approx([1e-2] * 11) and rates[-1] == pytest.approx(1e-3)


def test_shuffled_sees_everything_once_an_epoch():
    first = shuffled(torch.arange(0, 100), 50, seed=3)
    assert sorted(first[:50].tolist()) == list(range(50)) and sorted(first[50:].tolist()) == list(range(50))
    assert not torch.equal(first[:50], first[50:])
    assert torch.equal(first[40:60], shuffled(torch.arange(40, 60), 50, seed=3))
    assert not torch.equal(first, shuffled(torch.arange(0, 100), 50, seed=4))
    a, b = (torch.rand(3, generator=generator_for(1, step)) for step in (2, 3))
    assert not torch.equal(a, b)


def test_half_precision_training_stays_finite(tmp_path):
    network = make_network()
    options = TrainingOptions(30, 8, learning_rate=1e-2)
    draw = lambda samples, generator: (torch.randn(len(samples), 2, generator=generator),)  # noqa: E731
    loss = lambda x: ((network(x) - x).float().square().mean(1), None)  # noqa: E731
    train(network, draw, loss, options, tmp_path, {}, "bf16", torch.bfloat16)
    assert torch.isfinite(weights(network)).all() and network[0].weight.dtype == torch.float32
