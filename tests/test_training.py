"""The training loop: resumed runs equal uninterrupted ones; errors keep the saved state."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import command
import training
from command import BadInput
from conftest import ROOT
from evaluation.plots import plot_loss
from pairs import shuffled
from training import TrainingOptions, ema_copy, generator_for, read_metrics, saved_step


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 2))


def train(network, batch, loss, options, folder, settings=None, ema_device=None):
    training.train(network, ema_copy(network, ema_device), batch, loss, options, folder,
                   settings or {})


def run(
    folder, network=None, iterations=20, settings=None, factor=None, ema_device=None, **changes
):
    """Train a network to swap two numbers, and return it. factor(step) scales the error."""
    network = network or make_network()
    options = TrainingOptions(**{
        "iterations": iterations, "batch_size": 8, "learning_rate": 1e-2, "warmup_samples": 40,
        "ema_half_life": 100, "save_every": 5, "log_every": 2, "name": "test",
    } | changes)

    def make_batch(samples, share, generator):
        x, t = (
            torch.randn(len(samples), 2, generator=generator),
            torch.rand(len(samples), generator=generator),
        )
        return x[share], t[share], samples[share] // options.batch_size

    def loss(network, x, t, steps):
        error = network(x) - x.flip(1)
        if factor:
            error = error * factor(steps[0].item())
        return error.square().mean(1), t

    train(network, make_batch, loss, options, folder, settings, ema_device)
    return network


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_seconds(folder):
    return [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in rows(folder)]


def test_ema_device_and_intervals_change_no_weight(tmp_path):
    plain = run(tmp_path / "plain")
    assert torch.equal(
        weights(plain), weights(run(tmp_path / "practical", ema_device="cpu", log_every=3))
    )
    run(tmp_path / "mixed", iterations=10)
    assert torch.equal(
        weights(plain), weights(run(tmp_path / "mixed", ema_device="cpu", save_every=3))
    )


def test_training_lowers_the_loss_and_logs_it(tmp_path):
    run(tmp_path, iterations=300)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[-1] < 0.05 * losses[0]
    assert rows(tmp_path)[-1]["samples"] == 2400
    assert len(rows(tmp_path)[-1]["loss_by_t"]) == training.TIME_BINS
    plot_loss(tmp_path)
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    uninterrupted = run(tmp_path / "a")

    def killed(step):
        if step == 12:
            raise RuntimeError("as if the machine had gone")
        return 1.0

    with pytest.raises(RuntimeError, match="gone"):
        run(tmp_path / "b", factor=killed)
    assert saved_step(tmp_path / "b") == 10
    resumed = run(tmp_path / "b")
    assert torch.equal(weights(uninterrupted), weights(resumed))
    assert without_seconds(tmp_path / "a") == without_seconds(tmp_path / "b")


def test_extended_run_equals_a_longer_one(tmp_path):
    run(tmp_path / "a", iterations=10)
    assert torch.equal(
        weights(run(tmp_path / "a", iterations=20)), weights(run(tmp_path / "b", iterations=20))
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_resume_in_either_memory_format(tmp_path, memory_format):
    def convolve(folder, iterations):
        torch.manual_seed(0)
        network = nn.Conv2d(3, 3, 3, padding=1).to(memory_format=memory_format)
        make_batch = lambda samples, share, generator: (
            torch.randn(len(samples), 3, 5, 5, generator=generator),
        )
        loss = lambda network, x: ((network(x) - x).square().flatten(1).mean(1), None)
        options = TrainingOptions(iterations, 4, learning_rate=0.1)
        train(network, make_batch, loss, options, folder, {})
        return network.weight.detach()

    convolve(tmp_path / "a", 5)
    resumed = convolve(tmp_path / "a", 10)
    assert torch.equal(resumed, convolve(tmp_path / "b", 10))
    assert resumed.is_contiguous(memory_format=memory_format)


def test_accumulation_gives_the_same_weights(tmp_path):
    torch.testing.assert_close(
        weights(run(tmp_path / "a", accumulate=3)), weights(run(tmp_path / "b"))
    )


def test_interruption_names_the_saved_state_and_the_run_resumes(tmp_path):
    """There is no handler of ours: SIGTERM ends the process at once, as torchrun expects."""
    handlers = []

    def interrupt(step):
        handlers.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
        if step == 7:
            raise KeyboardInterrupt
        return 1.0

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(
        BadInput,
        match="interrupted; the state of step 5 is kept in .*, run the same command again to "
        "continue",
    ):
        run(tmp_path / "a", factor=interrupt)
    assert handlers[0] == before
    assert torch.equal(weights(run(tmp_path / "a")), weights(run(tmp_path / "b")))


def test_state_is_saved_at_a_log_row_after_save_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)  # saves at every row of the log

    def stop(step):
        if step == 3:
            raise RuntimeError("killed")
        return 1.0

    with pytest.raises(RuntimeError):
        run(tmp_path / "a", factor=stop, save_every=1000)
    assert saved_step(tmp_path / "a") == 2
    assert torch.equal(weights(run(tmp_path / "a", save_every=1000)), weights(run(tmp_path / "b")))


def test_out_of_memory_names_flags_with_which_the_run_resumes(tmp_path):
    def out_of_memory(step):
        if step == 7:
            raise torch.OutOfMemoryError
        return 1.0

    with pytest.raises(
        BadInput,
        match=r"state of step 5 is kept.* \(--accumulate\), --gradient-checkpointing or another",
    ):
        run(tmp_path / "a", factor=out_of_memory)
    resumed = run(tmp_path / "a", accumulate=3)  # as the error advises
    torch.testing.assert_close(weights(resumed), weights(run(tmp_path / "b")))


def test_out_of_memory_while_loading_a_state_names_the_state(tmp_path, monkeypatch):
    run(tmp_path, iterations=10)
    with monkeypatch.context() as patch:
        patch.setattr(training, "permuted", lambda *given: raise_error(torch.OutOfMemoryError))
        with pytest.raises(BadInput, match="the state of step 10 is kept.*--accumulate"):
            run(tmp_path)


def raise_error(error):
    raise error


def test_fewer_iterations_than_the_state_has_are_refused(tmp_path):
    run(tmp_path, iterations=10)
    with pytest.raises(BadInput, match="its run is at iteration 10, beyond the 4 asked for"):
        run(tmp_path, iterations=4)


def test_settings_are_written_with_the_first_state(tmp_path):
    with pytest.raises(BadInput, match="not finite at step 2"):
        run(tmp_path, factor=lambda step: float("nan") if step == 2 else 1.0, learning_rate=1.0)
    assert not (tmp_path / "settings.json").exists()
    run(tmp_path)  # without a state, another learning rate may be tried
    (tmp_path / "state.safetensors").unlink()
    run(tmp_path, learning_rate=0.1)  # as if killed between the two files


def test_second_run_in_the_same_folder_is_refused(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import command\n"
    code += f"command.lock_folder({str(tmp_path / 'state')!r})\n"
    code += "print('locked', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(
        BadInput, match="state: another run works in this folder; wait for it, or name another"
    ):
        run(tmp_path / "state")
    other.kill()  # SIGKILL releases the lock
    other.wait()
    run(tmp_path / "state")
    assert saved_step(tmp_path / "state") == 20
    command.unlock_folder()


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(
        BadInput, match="not finite at step 7, samples 56 to 63; the state of step 5 is kept"
    ):
        run(tmp_path, factor=lambda step: float("nan") if step == 7 else 1.0)
    assert saved_step(tmp_path) == 5


def test_gradient_that_is_not_finite_stops_the_run(tmp_path):
    class Steep(torch.autograd.Function):
        """x, but with an infinite gradient, as that of √x at 0."""

        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    network = make_network()

    def loss(network, x, steps):
        error = network(x) - x.flip(1)
        return (Steep.apply(error) if steps[0] == 7 else error).square().mean(1), None

    def make_batch(samples, share, generator):
        return torch.randn(len(samples), 2, generator=generator), samples // 8

    text = "the loss or its gradient is not finite at step 7, samples 56 to 63; the state of step 5"
    with pytest.raises(BadInput, match=text):
        train(network, make_batch, loss, TrainingOptions(20, 8, save_every=5), tmp_path)
    assert saved_step(tmp_path) == 5 and torch.isfinite(weights(network)).all()


def test_changed_settings_are_refused_by_name(tmp_path):
    run(tmp_path, settings={"pairs": "one", "about": {"a": 1, "b": 2}})
    with pytest.raises(BadInput, match="pairs was 'one', now 'two'"):
        run(tmp_path, settings={"pairs": "two"})
    with pytest.raises(BadInput, match=r"\(b was 2, now 3\)"):
        run(tmp_path, settings={"pairs": "one", "about": {"a": 1, "b": 3}})
    with pytest.raises(BadInput, match="learning_rate was 0.01, now 0.1"):
        run(tmp_path, settings={"pairs": "one"}, learning_rate=0.1)


def test_damaged_state_is_named(tmp_path):
    run(tmp_path, iterations=5)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(BadInput, match="state.safetensors: damaged"):
        run(tmp_path)


def test_frozen_weights_are_neither_trained_nor_saved(tmp_path):
    network = make_network()
    network[0].requires_grad_(False)
    before = network[0].weight.clone()
    run(tmp_path, network)
    assert torch.equal(network[0].weight, before)
    with training.safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert not any("weights.0." in name for name in file.keys())


def test_ema_half_life_and_warmup_are_counted_in_samples(tmp_path):
    """The average of a weight that moves evenly lags by half-life / ln 2, at any batch size."""
    lags = []
    for batch_size in (4, 16):
        network = nn.Linear(1, 1, bias=False)
        network.weight.data.zero_()
        options = TrainingOptions(
            8000 // batch_size, batch_size, learning_rate=1e-3 * batch_size, ema_half_life=200,
            save_every=10**6, seed=0,
        )
        # A constant gradient: Adam moves by the learning rate, that is by 1e-3 per sample.
        make_batch = lambda samples, share, generator: (torch.ones(len(samples), 1),)
        train(network, make_batch, lambda network, x: (-network(x)[:, 0], None), options,
              tmp_path / str(batch_size), {})
        lags.append(8.0 - network.weight.item())
    expected = 1e-3 * 200 / 0.6931
    assert lags == pytest.approx([expected, expected], rel=0.1)
    run(tmp_path / "warm", iterations=10, warmup_samples=40, log_every=1)
    learning_rates = [row["learning_rate"] for row in rows(tmp_path / "warm")]
    assert learning_rates[:5] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2])
    assert learning_rates[9] == 1e-2


def test_iterations_of_a_run_with_cooldown_cannot_change(tmp_path):
    run(tmp_path, iterations=10, cooldown=0.5)
    with pytest.raises(BadInput, match="iterations was 10, now 20"):
        run(tmp_path, iterations=20, cooldown=0.5)


def test_cooldown_lowers_the_learning_rate_in_the_second_half(tmp_path):
    run(tmp_path, iterations=20, warmup_samples=0, cooldown=0.5, log_every=1)
    learning_rates = [row["learning_rate"] for row in rows(tmp_path)]
    assert learning_rates[:11] == pytest.approx([1e-2] * 11)
    assert learning_rates[-1] == pytest.approx(1e-3)


def test_shuffled_gives_each_index_once_per_epoch():
    first = shuffled(torch.arange(0, 100), 50, seed=3)
    assert sorted(first[:50].tolist()) == list(range(50))
    assert sorted(first[50:].tolist()) == list(range(50))
    assert not torch.equal(first[:50], first[50:])
    assert torch.equal(first[40:60], shuffled(torch.arange(40, 60), 50, seed=3))
    assert not torch.equal(first, shuffled(torch.arange(0, 100), 50, seed=4))
    a, b = (torch.rand(3, generator=generator_for(1, step)) for step in (2, 3))
    assert not torch.equal(a, b)


def test_training_in_bf16_stays_finite_with_fp32_weights(tmp_path):
    network = make_network()
    options = TrainingOptions(30, 8, learning_rate=1e-2, dtype=torch.bfloat16)
    make_batch = lambda samples, share, generator: (
        torch.randn(len(samples), 2, generator=generator),
    )
    loss = lambda network, x: ((network(x) - x).float().square().mean(1), None)
    train(network, make_batch, loss, options, tmp_path)
    assert torch.isfinite(weights(network)).all() and network[0].weight.dtype == torch.float32


def test_training_in_fp16_is_refused():
    for device in ("cpu", "cuda"):
        with pytest.raises(BadInput, match="--dtype fp16: .*; train in bf16 or fp32"):
            training.autocast_dtype("fp16", torch.device(device), make_network())


def test_changed_dtype_is_refused(tmp_path):
    run(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(BadInput, match="dtype was 'bf16', now 'fp32'"):
        run(tmp_path)


# --------------------------------------------------------------------------------------------------
# The EMA network


def test_ema_shares_frozen_weights_and_follows_trained_ones(tmp_path):
    network = make_network()
    network[0].requires_grad_(False)
    ema = ema_copy(network)
    assert ema[0].weight is network[0].weight and ema[2].weight is not network[2].weight
    distances = []

    def loss(network, x):
        distances.append((network[2].weight - ema[2].weight).abs().max().item())
        return (network(x) - x.flip(1)).square().mean(1), None

    make_batch = lambda samples, share, generator: (
        torch.randn(len(samples), 2, generator=generator),
    )
    options = TrainingOptions(5, 8, learning_rate=1e-2, ema_half_life=100)
    training.train(network, ema, make_batch, loss, options, tmp_path, {})
    assert distances[0] == 0 < distances[1] < distances[4]  # up to date in every iteration
    assert torch.equal(weights(network), weights(ema))  # both end with the averaged weights


# --------------------------------------------------------------------------------------------------
# Runs of earlier versions


def test_state_of_an_earlier_version_resumes(tmp_path):
    """tests/earlier/run: 10 of 20 iterations by code whose train() did not take the EMA network."""
    shutil.copytree(ROOT / "tests/earlier/run", tmp_path / "a")
    assert saved_step(tmp_path / "a") == 10
    resumed, uninterrupted = run(tmp_path / "a"), run(tmp_path / "b")
    # fp32 rounds differently on another processor.
    torch.testing.assert_close(weights(resumed), weights(uninterrupted), rtol=1e-4, atol=1e-5)
    steps = [row["step"] for row in rows(tmp_path / "a")]
    assert steps == [row["step"] for row in rows(tmp_path / "b")]
    names = []
    for name in "ab":
        with training.safe_open(tmp_path / name / "state.safetensors", "pt") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1]


def test_seconds_a_step_are_those_of_the_rows_own_steps(tmp_path):
    """Also of a row at the end of a run or after a resume, which has fewer steps than others."""
    def factor(step):
        time.sleep(0.05)
        return 1

    run(tmp_path, iterations=6, factor=factor, log_every=5, save_every=4)
    run(tmp_path, iterations=11, factor=factor, log_every=5, save_every=4)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [5, 6, 10, 11]
    assert all(row["seconds_per_step"] >= 0.05 for row in rows)
