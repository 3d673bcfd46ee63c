"""The methods beside InstaFlow: their identities, and each through its command."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

import checkpoint
import evaluate
import fewstep.train
import reflow
import sample
import unet
import validation
from command import TINY_TEACHER
from conftest import ROOT, relative_error
from diffusion import diffusion_start, diffusion_velocity
from evaluation.perceptual import perceptual_distance
from evaluation import figures
from fewstep import (
    compare, consistency, freeflow, hipa, lora, meanflow, perflow, progressive, rectified_diffusion,
    steps,
)
from fewstep.meanflow import mean_velocity
from fewstep.methods import METHODS, rounds_of
from formats.weights import FEW_STEP_OF_METHOD
from rectified_flow import broadcast_over, interpolate, reflow_loss, squared
from sample import sample_latents
from stable_diffusion import FewStep, initial_student
from training import TrainingOptions, ema_copy, generator_for, read_metrics, train

B = 6
GENERATOR = torch.Generator().manual_seed(0)
X0, X1, AWAY = torch.randn(3, B, 4, 8, 8, generator=GENERATOR, dtype=torch.float64)
CONTEXT = torch.randn(B, 3, generator=GENERATOR)
TIMES = torch.linspace(0.1, 0.8, B, dtype=torch.float64)


def away(x, t, context):
    """A straight flow: everything moves by the same vector, each sample's is in its context."""
    return broadcast_over(context[:, 0], x).expand_as(x)


def bent(x, t, context):
    return away(x, t, context) * broadcast_over(t, x) + 0.3 * x.sin()


def test_the_schedules_times_are_those_of_its_samplers():
    for count in (1, 4, 8, 50):
        grid = steps.schedule_time(torch.arange(count + 1) / count)
        torch.testing.assert_close(grid, steps.SCHEDULE.sampling_times(count))
    # PeRFlow's windows, as its authors' on Stable Diffusion.
    edges = steps.schedule_time(torch.arange(5) / 4)
    torch.testing.assert_close(
        edges, torch.tensor([0.064, 0.197, 0.383, 0.591, 1]).double(), atol=5e-4, rtol=0
    )


def test_errors_of_ends_are_errors_of_velocities():
    """‖end - y‖² = (1 - t)² ‖v - v*‖², v* the velocity to y at time 1."""
    v = bent(X0, TIMES, CONTEXT)
    wanted = (X1 - X0) / broadcast_over(1 - TIMES, X0)
    ends = squared(steps.end(bent, X0, TIMES, CONTEXT), X1)
    torch.testing.assert_close(ends, (1 - TIMES).square() * squared(v, wanted))


def test_a_step_of_a_diffusion_is_ddim():
    """Also with new noise: η = 0.5, and 1; two steps are progressive distillation's target."""
    scheduler = DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(5)  # 800, 600, ...
    s = [torch.full((B,), float(number)) for number in (800, 600, 400)]
    times = [steps.SCHEDULE.time(one) for one in s]
    predict = lambda x, s: 0.4 * x.sin() + 0.1
    velocity = diffusion_velocity(lambda x, s, context: predict(x, s), steps.SCHEDULE)
    size = lambda k: broadcast_over(sum(steps.SCHEDULE.alpha_sigma(s[k])), X0)  # X = x_s / (α + σ)
    for eta in (0.0, 0.5, 1.0):
        expected = scheduler.step(predict(X0, s[0]), 800, X0, eta=eta, variance_noise=AWAY)
        found = steps.noisy_step(velocity, X0 / size(0), times[0], times[1], CONTEXT, eta, AWAY)
        torch.testing.assert_close(found * size(1), expected.prev_sample, rtol=1e-5, atol=1e-5)
    middle = scheduler.step(predict(X0, s[0]), 800, X0).prev_sample
    last = scheduler.step(predict(middle, s[1]), 600, middle).prev_sample
    found = progressive.two_steps(velocity, X0 / size(0), *times, CONTEXT)
    torch.testing.assert_close(found * size(2), last, rtol=1e-5, atol=1e-5)


def test_a_step_with_all_noise_renewed_is_the_consistency_samplers():
    t, u = TIMES, TIMES + 0.1
    ends = steps.end(bent, X0, t, CONTEXT)
    # ρ = 1 where nothing is kept: from the beginning, r_t = 0.
    found = steps.noisy_step(bent, X0, torch.zeros_like(t), u, CONTEXT, 1.0, AWAY)
    first = steps.end(bent, X0, torch.zeros_like(t), CONTEXT)
    torch.testing.assert_close(found, interpolate(AWAY, first, u))
    torch.testing.assert_close(
        steps.noisy_step(bent, X0, t, torch.ones_like(t), CONTEXT, 1.0, AWAY), ends
    )
    euler = steps.step(bent, X0, t, u, CONTEXT)
    torch.testing.assert_close(steps.noisy_step(bent, X0, t, u, CONTEXT, 0.0, AWAY), euler)


def losses(student) -> dict:
    """Every loss on the straight flow `away`, as a function of the student's velocity."""
    random = lambda draw: draw(B, torch.Generator().manual_seed(1))
    mean = lambda x, t, until, context: student(x, t, context) + 0 * x  # it has a derivative, 0
    straight = X0 + away(X0, None, CONTEXT)
    seeds = consistency.draw_scott(B, GENERATOR)
    frozen = {"teacher": away, "target": student}
    rectified = random(rectified_diffusion.draw)
    return {
        "reflow": reflow_loss(student, X0, straight, TIMES, CONTEXT),
        "perflow": perflow.loss(student, X0, X1, CONTEXT, *random(perflow.draw), teacher=away),
        "progressive": progressive.loss(student, X0, X1, CONTEXT, *random(progressive.draw),
                                        teacher=away, steps=4, diffusion=False),
        "lcm": consistency.lcm(student, X0, X1, CONTEXT, *random(consistency.draw_lcm), **frozen),
        "mlcm, segments": consistency.mlcm_segments(
            student, X0, None, CONTEXT, *random(consistency.draw_mlcm), **frozen),
        "mlcm, edges": consistency.mlcm_edges(
            student, X0, None, CONTEXT, *random(consistency.draw_mlcm), **frozen),
        "scott": consistency.scott(student, X0, X1, CONTEXT, *seeds, eta=0.0, **frozen),
        "rectified diffusion": rectified_diffusion.loss(student, X0, straight, CONTEXT, *rectified),
        "of a flow, squared": rectified_diffusion.loss(
            student, X0, straight, CONTEXT, *rectified, distance=squared, times=lambda t: t),
        "meanflow": meanflow.loss(mean, X0, straight, CONTEXT,
                                  *(c.double() for c in random(meanflow.draw)), target=mean),
        "freeflow": freeflow.loss(mean, X0, None, CONTEXT, *random(freeflow.draw), teacher=away,
                                  target=mean, diffusion=False),
    }


def test_on_a_straight_flow_every_loss_is_zero_at_its_velocity_alone():
    for name, loss in losses(away).items():
        assert loss.shape == (B,) and loss.abs().max() < 1e-9, name
    slower = lambda x, t, context: 0.5 * away(x, t, context) + 0.2 * x * broadcast_over(t, x)
    for name, loss in losses(slower).items():
        assert loss.max() > 1e-4, name


def test_perflow_with_one_window_is_reflow_on_its_pairs():
    """Up to the length of the window, in which the student's time runs."""
    window, place = torch.zeros(B, dtype=torch.int64), torch.rand(B, generator=GENERATOR)
    found = perflow.loss(bent, X0, X1, CONTEXT, window, place, teacher=bent, windows=1)
    a = torch.full((B,), steps.FIRST_TIME).double()
    start = interpolate(X0, X1, a)
    stop = steps.euler_steps(bent, start, window, window + 1, perflow.TEACHER_STEPS, CONTEXT)
    length = 1 - steps.FIRST_TIME
    inside = lambda x, t, context: length * bent(x, steps.FIRST_TIME + length * t, context)
    expected = reflow_loss(inside, start, stop, place.double(), CONTEXT) / length**2
    torch.testing.assert_close(found, expected)


def test_scott_without_noise_in_one_step_is_lcm():
    place = torch.rand(B, generator=GENERATOR)
    place[0] = 0.99  # its step ends at the data
    frozen = {"teacher": away, "target": bent}
    found = consistency.scott(bent, X0, X1, CONTEXT, place, torch.arange(B), eta=0.0, steps=1,
                              **frozen)
    t, u = steps.schedule_time(place), steps.schedule_time(place + consistency.NOISY_GAP)
    assert u[0] == 1
    x = interpolate(X0, X1, t)
    y = steps.step(away, x, t, u, CONTEXT)
    torch.testing.assert_close(found, consistency.same_end(bent, bent, x, t, y, u, CONTEXT))
    noisy = consistency.scott(bent, X0, X1, CONTEXT, place, torch.arange(B), **frozen)
    assert (noisy - found).abs().max() > 1e-3


def test_progressive_distillation_by_hand():
    """Target, weight and times, sample by sample; the diffusion is taken up at its first time."""
    place = torch.tensor([0.1, 0.3, 0.6, 0.9, 0.2, 0.8]).double()
    ahead = lambda x, t, context: bent(x, t, context) + broadcast_over(t.square(), x)
    found = progressive.loss(ahead, X0, X1, CONTEXT, place, teacher=bent, steps=4, diffusion=True)
    time = lambda t: torch.tensor([t]).double()
    for k, t in enumerate((0.0, 0.25, 0.5, 0.75, 0.0, 0.75)):
        x0, x1, context = (given[k : k + 1] for given in (X0, X1, CONTEXT))
        x, u, since = (1 - t) * x0 + t * x1, t + 0.25, t or steps.FIRST_TIME
        y = x if t else diffusion_start(x, steps.SCHEDULE)
        middle = (since + u) / 2
        y = y + (middle - since) * bent(y, time(since), context)
        y = y + (u - middle) * bent(y, time(middle), context)
        expected = max(t**2, (1 - t) ** 2) * squared(ahead(x, time(t), context), (y - x) / 0.25)
        torch.testing.assert_close(found[k : k + 1], expected, rtol=1e-6, atol=1e-9)


def test_freeflow_by_hand():
    ends = torch.tensor([0.08, 0.11, 0.3, 0.5, 0.8, 1.0]).double()
    student = lambda x, t, until, context: bent(x, t, context) + broadcast_over(until, x) * x
    target = lambda x, t, until, context: 0.9 * student(x, t, until, context)
    found = freeflow.loss(student, X0, None, CONTEXT, ends, teacher=bent, target=target)
    time = lambda t: torch.tensor([t]).double()
    for k, e in enumerate(ends.tolist()):
        x0, context = X0[k : k + 1], CONTEXT[k : k + 1]
        if e - 0.05 > steps.FIRST_TIME:
            d = e - 0.05
            x = x0 + d * target(x0, time(0.0), time(d), context)
        else:  # where the diffusion begins
            d, x = steps.FIRST_TIME, diffusion_start(x0, steps.SCHEDULE)
        y = x + (e - d) * bent(x, time(d), context)
        expected = squared(student(x0, time(0.0), time(e), context), (y - x0) / e)
        torch.testing.assert_close(found[k : k + 1], expected, rtol=1e-6, atol=1e-9)


def test_few_steps_are_sampled_by_hand():
    """To the end and back with new noise; or the mean velocity between two times."""
    def unet(x, s, context, until=None):
        waves = broadcast_over((s / 300).sin() + (0 if until is None else (until / 200).cos()), x)
        return 0.3 * x.sin() + waves

    x0, again = X0.float(), sample.noise_from_seeds(range(B), (2, 4, 8, 8))
    time = lambda t: torch.full((B,), t)
    draw = partial(sample.few_step_sample, noise=x0, steps=2, context=CONTEXT, seeds=range(B))
    t0, t1, _ = steps.SCHEDULE.sampling_times(2).tolist()
    v = diffusion_velocity(unet, steps.SCHEDULE)
    x = diffusion_start(x0, steps.SCHEDULE)
    x = x + (1 - t0) * v(x, time(t0), CONTEXT)
    x = t1 * x + (1 - t1) * again[:, 1]
    x = x + (1 - t1) * v(x, time(t1), CONTEXT)
    lcm = SimpleNamespace(few_step=FewStep("renoise", 4), kind="diffusion", unet=unet)
    torch.testing.assert_close(draw(lcm), x)
    u = mean_velocity(unet)
    x = x0 + 0.5 * u(x0, time(0.0), time(0.5), CONTEXT)
    x = x + 0.5 * u(x, time(0.5), time(1.0), CONTEXT)
    meanflows = SimpleNamespace(few_step=FewStep("mean", 1), kind="flow", unet=unet)
    torch.testing.assert_close(draw(meanflows), x)


def test_fresh_noise_keeps_points_on_the_teachers_marginal():
    """With data of ±1 in one dimension and the flow's own noise, the middle would be empty."""
    count = 20_000
    x0 = torch.randn(count, generator=GENERATOR)
    x1 = torch.randn(count, generator=GENERATOR).sign()
    near = lambda x0: (((x0 + x1) / 2).abs() < 0.25).double().mean().item()
    assert near(x0.abs() * x1) == 0  # the flow carries each half of the noise to its side
    assert near(x0) == pytest.approx(0.2417, abs=0.01)  # P(|N(1, 1)| < 1/2) = Φ(-.5) - Φ(-1.5)


# --------------------------------------------------------------------------------------------------
# Networks with a second time, and with LoRA


@pytest.fixture(scope="module")
def teacher():
    return checkpoint.load(TINY_TEACHER)


def inputs(count: int, dtype=torch.float64):
    x, v = torch.randn(2, count, 4, 8, 8, generator=GENERATOR, dtype=dtype)
    t = torch.rand(count, generator=GENERATOR, dtype=dtype) / 2
    context = torch.randn(count, 16, 128, generator=GENERATOR, dtype=dtype)
    return x, v, t, t + 0.3, context


def test_a_second_time_begins_unheeded(teacher):
    x, _, t, r, context = inputs(2, torch.float32)
    two = meanflow.with_second_time(teacher.unet)
    one = teacher.unet(x, 1000 * (1 - t), context)
    torch.testing.assert_close(mean_velocity(two)(x, t, r, context), one)
    torch.nn.init.normal_(two.until_embedding.linear_2.weight, std=0.1, generator=GENERATOR)
    later = mean_velocity(two)(x, t, r, context)
    assert relative_error(later, mean_velocity(two)(x, t, t, context)) > 1e-3
    torch.testing.assert_close(two(x, 1000 * (1 - t), context),
                               mean_velocity(two)(x, t, t, context))  # alone it is until itself


def test_the_forward_derivative_is_that_of_finite_differences(teacher, monkeypatch):
    """The loss of MeanFlow, whose target is made of u and du/dt, from two values of u."""
    def in_double(timestep, channels):  # the network's own is in fp32, too coarse for differences
        powers = torch.arange(channels // 2, dtype=torch.float64) / (channels // 2)
        angles = timestep[:, None] * 10_000**-powers
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    monkeypatch.setattr(unet, "timestep_embedding", in_double)
    two = meanflow.with_second_time(teacher.unet).double()
    torch.nn.init.normal_(two.until_embedding.linear_2.weight, std=0.05, generator=GENERATOR)
    u = mean_velocity(two)
    x0, x1, t, r, context = inputs(3)
    found = meanflow.loss(u, x0, x1, context, t, r, target=u, derivative=meanflow.exact_derivative)
    x, v, h = interpolate(x0, x1, t), x1 - x0, 1e-6
    with torch.no_grad():
        ahead, behind = (u(x + s * v, t + s, r, context) for s in (h, -h))
        wanted = v + broadcast_over(r - t, x) * (ahead - behind) / (2 * h)
        error = squared(u(x, t, r, context), wanted)
        expected = error / (error + meanflow.WEIGHT_OFFSET).sqrt()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    found.sum().backward()  # through u alone
    assert two.conv_in.weight.grad.abs().sum() > 0
    short = meanflow.loss(u, x0, x1, context, t, r, target=u,
                          longest=squared(x0, x1).min().item())
    assert (short > 0).sum() == 1


def test_fast_waves_of_time_count_little_in_the_difference():
    """u = x (t + r) + sin(1000 t) / 10: the derivative is the wave's, which is up to 100 steep."""
    x, v, t, r, _ = inputs(64)
    wave = lambda t: (1000 * t).sin() / 10
    u = lambda x, t, r, context: x * broadcast_over(t + r, x) + broadcast_over(wave(t), x)
    slow = v * broadcast_over(t + r, x) + x  # d/dt of x (t + r)
    near, exact = (way(u, x, v, t, r, None)
                   for way in (meanflow.finite_difference, meanflow.exact_derivative))
    torch.testing.assert_close(exact, slow + broadcast_over(100 * (1000 * t).cos(), x))
    assert (near - slow).abs().max() < 2 * 0.1 / meanflow.DELTA_T + 0.1 < (exact - slow).abs().max()
    # A step shorter than the difference ends where it ends.
    r = t + meanflow.DELTA_T / 4
    whole = broadcast_over(r - t, x) * meanflow.finite_difference(u, x, v, t, r, None)
    torch.testing.assert_close(
        whole, u(x + broadcast_over(r - t, x) * v, r, r, None) - u(x, t, r, None),
        rtol=1e-9, atol=1e-9)


def test_lora_merged_is_lora_applied(teacher):
    x, _, t, _, context = inputs(2, torch.float32)
    student = copy.deepcopy(teacher.unet)
    lora.add_lora(student)
    before = teacher.unet(x, 1000 * t, context)
    torch.testing.assert_close(student(x, 1000 * t, context), before)  # it begins as it was
    for module in student.modules():
        if isinstance(module, lora.LoRA):
            torch.nn.init.normal_(module.up.weight, std=0.05, generator=GENERATOR)
    applied = student(x, 1000 * t, context)
    assert relative_error(applied, before) > 1e-3
    plain = lora.merged(student)
    torch.testing.assert_close(plain(x, 1000 * t, context), applied, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in plain.named_parameters()} == {
        name for name, _ in teacher.unet.named_parameters()
    }
    learned = {name for name, p in student.named_parameters() if p.requires_grad}
    assert learned and all(".up." in name or ".down." in name for name in learned)


def test_loras_size_on_stable_diffusion_is_hipas():
    with torch.device("meta"):
        large = unet.UNet(unet.UNetConfig())
        lora.add_lora(large)
    assert sum(p.numel() for p in large.parameters() if p.requires_grad) == 3_188_736


def test_high_frequencies_are_what_a_blur_takes():
    flat = torch.full((2, 3, 32, 32), 0.3)
    assert hipa.high_pass(flat).abs().max() < 1e-6 and hipa.edges(flat).max() < -0.998
    board = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1).expand(2, 3, 32, 32)
    torch.testing.assert_close(hipa.high_pass(board), board)
    step = torch.ones(1, 3, 32, 32)
    step[..., 16:] = -1
    found = hipa.edges(step)
    torch.testing.assert_close(found[..., 15:17], torch.full((1, 3, 32, 2), 2**0.5 - 1))
    assert found[..., :14].max() < -0.998


# --------------------------------------------------------------------------------------------------
# A method's trainings


def new_student(teacher, method):
    """The method's student as its training begins; the teacher stays as it is."""
    network = initial_student(copy.deepcopy(teacher.unet), method.init, teacher.kind, 0)
    return fewstep.train.student_of(replace(teacher, unet=network), method, 0)


class Numbered:
    """Pairs whose noise and image say which sample they are of."""

    def __len__(self):
        return 1000

    def __getitem__(self, indices):
        return self.batch(indices, 0)

    def batch(self, samples, seed):
        x0 = broadcast_over(samples.float(), torch.empty(1, 1, 1, 1)).expand(-1, 4, 8, 8)
        return x0, x0 + 0.5, ["a shape"] * len(samples)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_whose_noise_a_method_learns_from(method):
    """The pair's own, or fresh: other noise in every iteration of every round."""
    rounds = rounds_of(method, TrainingOptions(8, 4, warmup_samples=16))
    batches, starts = [], []
    for round_ in rounds:
        assert round_.options.warmup_samples == 16 // len(rounds)
        for k in range(2):
            samples, generator = torch.arange(4 * k, 4 * k + 4), generator_for(0, k)
            batches.append(fewstep.train.batch(round_, Numbered(), (4, 8, 8), samples, slice(1, 3),
                                               generator))
            starts.append(4 * (round_.before + k))
    for (x0, x1, prompts, *random), start in zip(batches, starts, strict=True):
        assert x1[:, 0, 0, 0].tolist() == [start + 1.5, start + 2.5] and len(prompts) == 2
        assert all(len(numbers) == 2 for numbers in random)
        assert torch.equal(x0, x1 - 0.5) == (method.data == "pairs")
    noises = torch.cat([batch[0] for batch in batches]).flatten(1)
    assert len(noises.unique(dim=0)) == len(noises)


def test_the_averaged_target_follows_the_student(teacher, tmp_path):
    x, _, t, _, context = inputs(2, torch.float32)
    seen = []

    def loss(student, *batch, target, **more):
        with torch.no_grad():
            seen.append((student(x, t, context), target(x, t, context)))
        return consistency.lcm(student, *batch, target=target, **more)

    method = replace(METHODS["lcm"], loss=loss)
    student = new_student(teacher, method)
    ema = ema_copy(student.unet)
    [round_] = rounds_of(method, TrainingOptions(3, 4, ema_half_life=8))
    given = {"teacher": steps.guided_velocity(teacher, 1.0)}
    train(student.unet, ema, partial(fewstep.train.batch, round_, Numbered(), (4, 8, 8)),
          partial(fewstep.train.loss, method, student.encode_prompts, ema, given), round_.options,
          tmp_path, {})
    (begun, target), *_, (last, later) = seen
    assert torch.equal(begun, target)
    behind, moved = relative_error(later, last), relative_error(later, begun)
    assert behind > 0.1 * moved and moved > 0.1 * relative_error(last, begun)


# Passes of a sample: the teacher's are guided and count 2, the student's with gradients 3.
COSTS = {"perflow": 8 * 2 + 3, "progressive": 2 * 2 + 3, "lcm": 2 + 1 + 3,
         "mlcm": pytest.approx(4.5 * 2 + 2 + 1 + 3, rel=0.2),  # by the segment, one to eight steps
         "scott": 3 * 2 + 1 + 3, "rectified-diffusion": 3,
         "re-meanflow": pytest.approx(3 + 2 / 4, rel=0.1),  # one sample in four asks a derivative
         "hipa": 3, "freeflow": 1 + 2 + 3}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_a_method_costs(method, teacher):
    student, pairs = new_student(teacher, method), Numbered()
    ema, before = ema_copy(student.unet), copy.deepcopy(student.unet.state_dict())
    lpips = perceptual_distance("random", student.device) if method.name == "hipa" else None
    given = fewstep.train.loss_inputs(method, student, steps.guided_velocity(teacher, 2.5), pairs,
                                      lpips)
    first, *later = rounds_of(method, TrainingOptions(4, 16))

    def cost(round_, given):
        batch = partial(fewstep.train.batch, round_, pairs, (4, 8, 8))
        loss = partial(fewstep.train.loss, round_.method, student.encode_prompts, ema, given)
        return compare.passes_of(student.unet, batch, loss, round_.options)

    assert cost(first, given) == COSTS[method.name]
    if method.name == "progressive":  # the teacher of a later round has learned guidance
        assert cost(later[0], fewstep.train.next_inputs(given, student, first)) == 2 + 3
    after = student.unet.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


# --------------------------------------------------------------------------------------------------
# The command


FEW = ["--num-pairs", 40, "--teacher-steps", 2, "--batch-size", 4, "--validation-pairs", 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fewstep")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """untrained(method): the file of its model as its training begins."""
    folder = tmp_path_factory.mktemp("untrained")

    def path_of(method: str) -> Path:
        path = folder / f"{method}.safetensors"
        model = new_student(checkpoint.load(TINY_TEACHER), METHODS[method])
        checkpoint.save(fewstep.train.finished(model), path, None)
        return path

    return path_of


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(validation, "STEPS", (1, 2, 4))
    monkeypatch.setattr(validation, "NUM_PROMPTS", 2)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_resumes_and_is_sampled(method, call, folder, few_images):
    out, pairs = folder / f"{method}.safetensors", folder / "pairs"
    ask = ["--method", method, "--pairs", pairs, "--out", out, *FEW, "--iterations", 4,
           "--cooldown", 0, "--save-every", 2]
    code, said, err = call(fewstep.train.main, *ask)
    assert code == 0, err
    assert f"a model by {method}" in said
    first = out.read_bytes()
    state = Path(f"{out}.state")
    assert list(state.glob("samples/*.png"))
    model = checkpoint.load(out)
    assert model.few_step == METHODS[method].few_step and model.guidance == 1
    start = checkpoint.load(TINY_TEACHER)
    changed = {name for name, weight in model.unet.state_dict().items()
               if name not in start.unet.state_dict()
               or not torch.equal(weight, start.unet.state_dict()[name])}
    assert changed
    assert model.unet.config.second_time == METHODS[method].second_time
    if METHODS[method].second_time:
        assert model.unet.until_embedding.linear_2.weight.abs().max() > 0  # trained
    for number in (1, 2, 4, 8):
        if model.allows(number):
            latents = sample_latents(model, ["a shape", "a red circle"], [0, 1], number)
            assert latents.isfinite().all()
            torch.testing.assert_close(
                sample_latents(model, ["a red circle"], [1], number), latents[1:],
                rtol=1e-3, atol=1e-3,
            )
    # Without its model it is made again from its states; the same to the byte.
    out.unlink()
    assert call(fewstep.train.main, *ask)[0] == 0 and out.read_bytes() == first
    code, said, _ = call(fewstep.train.main, *ask)
    assert code == 0 and "finished already" in said
    # A part of the way, then all of it.
    if method not in ("progressive", "mlcm"):  # whose rounds' lengths depend on all of it
        again = folder / f"{method}-again.safetensors"
        two = [again if word == out else word for word in ask] + ["--validation-pairs", 0]
        assert call(fewstep.train.main, *two, "--iterations", 2)[0] == 0
        assert call(fewstep.train.main, *two)[0] == 0
        assert again.read_bytes() == first


def test_progressive_distillation_keeps_the_model_of_every_round(call, folder, few_images):
    out = folder / "rounds.safetensors"
    ask = ["--method", "progressive", "--pairs", folder / "pairs", "--out", out, *FEW,
           "--iterations", 5, "--validation-pairs", 0]
    assert call(fewstep.train.main, *ask)[0] == 0
    states = {}
    for steps_, name in ((8, "rounds-8"), (4, "rounds-4"), (2, "rounds-2"), (1, "rounds")):
        made = load_file(folder / f"{name}.safetensors")
        states[steps_] = made["model.diffusion_model.out.2.weight"]
        model = checkpoint.load(folder / f"{name}.safetensors")
        assert model.steps == steps_
        assert [n for n in (1, 2, 4, 8, 16) if model.allows(n)] == [steps_]
        rows = read_metrics(Path(f"{out}.state") / f"{steps_}-steps")
        assert rows[-1]["step"] == (2 if steps_ == 1 else 1)
    assert len({tensor.numpy().tobytes() for tensor in states.values()}) == 4


def test_what_the_models_refuse(call, untrained):
    for method, wrong in (("perflow", 2), ("hipa", 2), ("freeflow", 4), ("mlcm", 3),
                          ("progressive", 8)):
        code, _, err = call(sample.main, "--model", untrained(method), "--steps", wrong)
        assert code == 2 and "a few-step model" in err
    path = untrained("lcm")
    code, _, err = call(sample.main, "--model", path, "--guidance", 3)
    assert code == 2 and "its teacher's guidance" in err
    code, _, err = call(reflow.main, "--teacher", path)
    assert code == 2 and "a few-step model" in err
    code, _, err = call(fewstep.train.main, "--method", "progressive", "--iterations", 3)
    assert code == 2 and "4 rounds" in err
    code, _, err = call(fewstep.train.main, "--method", "lcm", "--ema-device", "cpu")
    assert code == 2 and "--ema-device" in err
    code, _, err = call(fewstep.train.main, "--method", "lcm", "--init", "negated")
    assert code == 2 and "predicts noise" in err
    code, _, err = call(fewstep.train.main, "--method", "lcm", "--teacher",
                        untrained("freeflow"))
    assert code == 2 and "of kind flow" in err


def test_evaluation_takes_the_steps_that_a_method_knows(call, untrained):
    models = [untrained(method) for method in ("perflow", "hipa", "lcm")]
    code, _, err = call(evaluate.main, "--model", *models, "--steps", "1,2,4", "--num-samples", 8)
    assert code == 0, err
    rows = json.loads(Path("runs/evaluate.json").read_text())
    taken = [(row["model"], row["steps"]) for row in rows if row["steps"]]
    assert taken == [("perflow.safetensors", 4), ("hipa.safetensors", 1),
                     ("lcm.safetensors", 1), ("lcm.safetensors", 2), ("lcm.safetensors", 4)]


def test_re_noising_is_the_same_at_any_batch_size(untrained):
    model = checkpoint.load(untrained("lcm"))
    prompts, seeds = ["a shape"] * 5, range(5)
    torch.testing.assert_close(sample_latents(model, prompts, seeds, 4, batch_size=2),
                               sample_latents(model, prompts, seeds, 4), rtol=1e-3, atol=1e-3)
    once, twice = (sample_latents(model, prompts, seeds, n) for n in (1, 2))
    assert relative_error(twice, once) > 1e-2


# --------------------------------------------------------------------------------------------------
# Side by side


def test_passes_are_counted_where_they_are_computed(teacher):
    x, v, t, r, context = inputs(5, torch.float32)
    two = meanflow.with_second_time(teacher.unet)
    with compare.counted_passes() as passes:
        teacher.unet.requires_grad_(True)(x, 1000 * t, context)
        assert passes == [15]
        with torch.no_grad():
            teacher.unet(x, 1000 * t, context)
        assert passes == [20]
        u = mean_velocity(two.requires_grad_(True))
        r[3:] = t[3:]  # where no derivative is needed
        meanflow.loss(u, x, v, context, t, r, target=u)
        assert passes == [20 + 15 + 3 * 2]  # two without gradients
        passes[0] = 0
        meanflow.loss(u, x, v, context, t, r, target=u, derivative=meanflow.exact_derivative)
    assert passes == [15 + 3 * 2]
    with compare.counted_passes() as passes:
        pass
    teacher.unet(x, 1000 * t, context)
    assert passes == [0]


def test_rows_of_one_cost(call, monkeypatch):
    monkeypatch.setattr(figures, "STRAIGHTNESS_STEPS", 3)
    rows = ["2-RF + distill", "progressive", *compare.VARIANTS]
    ask = ["--rows", *rows, "--passes", 160, "--num-pairs", 12, "--num-samples", 8,
           "--batch-size", 2, "--teacher-steps", 2, "--num-seeds", 1, "--out", "runs/few"]
    code, _, err = call(compare.main, *ask)
    assert code == 0, err
    made = json.loads(Path("runs/few/compare.json").read_text())
    taken = {row: [one["steps"] for one in made if one["row"] == row] for row in ("drawn", *rows)}
    variants = dict.fromkeys(compare.VARIANTS, [1, 2, 4, 8])
    assert taken == {"drawn": [None], "2-RF + distill": [1], "progressive": [8, 4, 2, 1]} | variants
    rounds = [one["passes"] for one in made if one["row"] == "progressive"]
    assert rounds == sorted(rounds) and rounds[0] < rounds[-1] / 2
    for one in made:
        if one["row"] in rows and (one["row"], one["steps"]) not in (
                ("progressive", 8), ("progressive", 4), ("progressive", 2)):
            assert 135 <= one["passes"] <= 185, one
    assert all(Path("runs/few", f"compare{end}").exists()
               for end in (".md", ".png", "-losses.png", "-pictures-0.png"))
    before = Path("runs/few/compare.json").read_bytes()
    assert call(compare.main, *ask)[0] == 0
    assert Path("runs/few/compare.json").read_bytes() == before
    for other in (("--passes", 400), ("--learning-rate", 0.005)):
        code, _, err = call(compare.main, *ask, *other)
        assert code == 2 and "another study" in err


def test_losses_are_drawn_of_the_rows_that_were_trained(tmp_path):
    path, widths = tmp_path / "losses.png", []
    compare.save_losses(path, range(2))
    assert not path.exists()
    for row in ("lcm", "velocity, picture loss"):
        folder = tmp_path / "seed-1" / compare.folder_of(row)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"step": 10, "loss": 0.5}\n')
        compare.save_losses(path, range(2))
        widths.append(Image.open(path).width)
    assert widths[1] == pytest.approx(2 * widths[0], abs=2)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_in_two_processes(tmp_path, method):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                ROOT / "fewstep" / "train.py", "--method", method, *FEW, "--iterations", 8,
                "--save-every", 4, "--accumulate", 2]
    answer = subprocess.run([*map(str, torchrun)], cwd=tmp_path, capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count(f"a model by {method}") == 1
    model = checkpoint.load(tmp_path / f"runs/{method}.safetensors")
    assert model.few_step == METHODS[method].few_step


def test_rounds_do_not_go_on_from_others_of_another_length(call, folder):
    """A round that began after another number of updates is another run."""
    ask = ["--method", "mlcm", "--pairs", folder / "pairs", "--out", folder / "longer.safetensors",
           *FEW, "--cooldown", 0, "--validation-pairs", 0, "--iterations"]
    assert call(fewstep.train.main, *ask, 2)[0] == 0
    code, _, err = call(fewstep.train.main, *ask, 4)
    assert code == 2 and "before" in err


def test_held_out_noise_is_none_of_training(monkeypatch):
    """Nor where a method has fresh noise."""
    method, shape = METHODS["lcm"], (4, 4, 8, 8)
    plain = [(None, (torch.zeros(shape), torch.zeros(shape), ["a"] * 4))] * 3
    monkeypatch.setattr(fewstep.train, "held_out_batches", lambda reference: plain)
    batches = fewstep.train.validation_batches(method, 0, None)
    for step in range(3):
        noise = torch.randn(shape, generator=generator_for(0, step))
        assert all((batch[0] - noise).abs().max() > 0.1 for _, batch in batches)


def test_the_table_of_older_files_is_that_of_the_methods():
    for method in METHODS.values():
        assert FEW_STEP_OF_METHOD[method.name] == method.few_step
        for round_ in rounds_of(method, TrainingOptions(4, 4)):
            assert FEW_STEP_OF_METHOD[method.name + round_.suffix] == round_.method.few_step


def test_the_derivative_under_autocast(teacher):
    """Large networks train in bf16: a difference would divide its rounding by DELTA_T, and autocast
    does not pass the forward derivative.
    """
    x, v, t, r, context = inputs(4, torch.float32)
    u = mean_velocity(meanflow.with_second_time(teacher.unet))
    for way in (meanflow.finite_difference, meanflow.exact_derivative):
        wanted = way(u, x, v, t, r, context)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(way(u, x, v, t, r, context), wanted)
