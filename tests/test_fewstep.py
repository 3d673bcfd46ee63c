"""The few-step methods beside InstaFlow: their identities, and each method's command."""

import copy
import json
import math
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
from command import TINY_TEACHER, BadInput, NotFinite
from conftest import ROOT, relative_error
from diffusion import diffusion_start, diffusion_velocity
from evaluation.perceptual import perceptual_distance
from evaluation import figures, study
from fewstep import (
    compare, consistency, critic, freeflow, hipa, lora, meanflow, perflow, progressive,
    rectified_diffusion, steps,
)
from fewstep.meanflow import mean_velocity
from fewstep.methods import METHODS, rounds_of
from rectified_flow import broadcast_over, interpolate, reflow_loss, squared
from sample import sample_latents
from stable_diffusion import FewStep, initial_student
from training import TrainingOptions, ema_copy, generator_for, read_metrics, train

B = 6
GENERATOR = torch.Generator().manual_seed(0)
X0, X1, FRESH = torch.randn(3, B, 4, 8, 8, generator=GENERATOR, dtype=torch.float64)
CONTEXT = torch.randn(B, 3, generator=GENERATOR)
TIMES = torch.linspace(0.1, 0.8, B, dtype=torch.float64)


def straight(x, t, context):
    """A straight flow: all elements of a sample move by the first number of its context."""
    return broadcast_over(context[:, 0], x).expand_as(x)


def curved(x, t, context):
    """A flow with curved paths."""
    return straight(x, t, context) * broadcast_over(t, x) + 0.3 * x.sin()


def test_schedule_time_gives_the_sampling_times():
    for count in (1, 4, 8, 50):
        grid = steps.schedule_time(torch.arange(count + 1) / count)
        torch.testing.assert_close(grid, steps.SCHEDULE.sampling_times(count))
    # The edges of PeRFlow's windows, as in its authors' code for Stable Diffusion.
    edges = steps.schedule_time(torch.arange(5) / 4)
    torch.testing.assert_close(
        edges, torch.tensor([0.064, 0.197, 0.383, 0.591, 1]).double(), atol=5e-4, rtol=0
    )


def test_squared_error_of_the_end_is_the_scaled_velocity_error():
    """‖end - y‖² = (1 - t)² ‖v - v*‖², where v* leads to y at time 1."""
    v = curved(X0, TIMES, CONTEXT)
    target = (X1 - X0) / broadcast_over(1 - TIMES, X0)
    ends = squared(steps.end(curved, X0, TIMES, CONTEXT), X1)
    torch.testing.assert_close(ends, (1 - TIMES).square() * squared(v, target))


def test_a_step_of_a_diffusion_is_a_ddim_step():
    """Also with fresh noise, η = 0.5 and 1. Two steps are progressive distillation's target."""
    scheduler = DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(5)  # 800, 600, ...
    s = [torch.full((B,), float(number)) for number in (800, 600, 400)]
    times = [steps.SCHEDULE.time(one) for one in s]
    predict = lambda x, s: 0.4 * x.sin() + 0.1
    velocity = diffusion_velocity(lambda x, s, context: predict(x, s), steps.SCHEDULE)
    scale = lambda k: broadcast_over(sum(steps.SCHEDULE.alpha_sigma(s[k])), X0)  # X = x_s / (α + σ)
    for eta in (0.0, 0.5, 1.0):
        expected = scheduler.step(predict(X0, s[0]), 800, X0, eta=eta, variance_noise=FRESH)
        result = steps.noisy_step(velocity, X0 / scale(0), times[0], times[1], CONTEXT, eta, FRESH)
        torch.testing.assert_close(result * scale(1), expected.prev_sample, rtol=1e-5, atol=1e-5)
    middle = scheduler.step(predict(X0, s[0]), 800, X0).prev_sample
    last = scheduler.step(predict(middle, s[1]), 600, middle).prev_sample
    result = progressive.two_steps(velocity, X0 / scale(0), *times, CONTEXT)
    torch.testing.assert_close(result * scale(2), last, rtol=1e-5, atol=1e-5)


def test_a_step_with_fully_fresh_noise_is_the_consistency_samplers():
    t, u = TIMES, TIMES + 0.1
    ends = steps.end(curved, X0, t, CONTEXT)
    # From t = 0, where r_t = 0, all noise is renewed: ρ = 1.
    result = steps.noisy_step(curved, X0, torch.zeros_like(t), u, CONTEXT, 1.0, FRESH)
    first = steps.end(curved, X0, torch.zeros_like(t), CONTEXT)
    torch.testing.assert_close(result, interpolate(FRESH, first, u))
    torch.testing.assert_close(
        steps.noisy_step(curved, X0, t, torch.ones_like(t), CONTEXT, 1.0, FRESH), ends
    )
    euler = steps.step(curved, X0, t, u, CONTEXT)
    torch.testing.assert_close(steps.noisy_step(curved, X0, t, u, CONTEXT, 0.0, FRESH), euler)


def losses(student) -> dict:
    """Every loss of this student velocity by name, on the flow `straight`."""
    random = lambda sampler: sampler(B, torch.Generator().manual_seed(1))
    mean = lambda x, t, until, context: student(x, t, context) + 0 * x  # differentiable in x
    ends = X0 + straight(X0, None, CONTEXT)
    seeds = consistency.draw_scott(B, GENERATOR)
    frozen = {"teacher": straight, "target": student}
    rectified = random(rectified_diffusion.draw)
    return {
        "reflow": reflow_loss(student, X0, ends, TIMES, CONTEXT),
        "perflow": perflow.loss(student, X0, X1, CONTEXT, *random(perflow.draw), teacher=straight),
        "progressive": progressive.loss(student, X0, X1, CONTEXT, *random(progressive.draw),
                                        teacher=straight, steps=4, diffusion=False),
        "lcm": consistency.lcm(student, X0, X1, CONTEXT, *random(consistency.draw_lcm), **frozen),
        "mlcm, segments": consistency.mlcm_segments(
            student, X0, None, CONTEXT, *random(consistency.draw_mlcm), **frozen),
        "mlcm, edges": consistency.mlcm_edges(
            student, X0, None, CONTEXT, *random(consistency.draw_mlcm), **frozen),
        "scott": consistency.scott(student, X0, X1, CONTEXT, *seeds, eta=0.0, **frozen),
        "rectified diffusion": rectified_diffusion.loss(student, X0, ends, CONTEXT, *rectified),
        "of a flow, squared": rectified_diffusion.loss(
            student, X0, ends, CONTEXT, *rectified, distance=squared, times=lambda t: t),
        "meanflow": meanflow.loss(mean, X0, ends, CONTEXT,
                                  *(c.double() for c in random(meanflow.draw)), target=mean),
        "freeflow": freeflow.loss(mean, X0, None, CONTEXT, *random(freeflow.draw), teacher=straight,
                                  target=mean, diffusion=False),
    }


def test_on_a_straight_flow_only_its_velocity_has_zero_loss():
    for name, loss in losses(straight).items():
        assert loss.shape == (B,) and loss.abs().max() < 1e-9, name
    slower = lambda x, t, context: (
        0.5 * straight(x, t, context) + 0.2 * x * broadcast_over(t, x)
    )
    for name, loss in losses(slower).items():
        assert loss.max() > 1e-4, name


def test_perflow_with_one_window_is_reflow_on_its_pairs():
    """Up to the window's length: inside the window, reflow's time runs from 0 to 1."""
    window, place = torch.zeros(B), torch.rand(B, generator=GENERATOR).double()
    loss = perflow.loss(curved, X0, X1, CONTEXT, place, teacher=curved, windows=1)
    a = torch.full((B,), steps.FIRST_TIME).double()
    start = interpolate(X0, X1, a)
    stop = steps.euler_steps(curved, start, window, window + 1, perflow.TEACHER_STEPS, CONTEXT)
    length = 1 - steps.FIRST_TIME
    inside = lambda x, t, context: length * curved(x, steps.FIRST_TIME + length * t, context)
    expected = reflow_loss(inside, start, stop, place, CONTEXT) / length**2
    t = steps.FIRST_TIME + length * place
    torch.testing.assert_close(loss, t.square() * expected)


def test_perflow_loss_equals_a_computation_by_hand():
    """The squared error of the noise, in each window; from a noised image or the teacher's path."""
    place = torch.tensor([0.1, 0.3, 0.6, 0.9, 0.2, 0.8]).double()
    noise = lambda x, s, context: 0.4 * x.sin() + broadcast_over(s / 2000, x)
    velocity = diffusion_velocity(noise, steps.SCHEDULE)
    teacher = lambda x, t, context: velocity(x, t, context) + 0.1
    losses = [perflow.loss(velocity, X0, X1, CONTEXT, place, teacher=teacher, **options)
              for options in ({}, {"on_path": True}, {"cosine": 0.5})]
    grid = lambda count: steps.schedule_time(torch.arange(count + 1) / count).tolist()
    time = lambda t: torch.tensor([t]).double()

    def walk(x, times):
        for now, then in zip(times, times[1:]):
            x = x + (then - now) * teacher(x, time(now), None)
        return x

    for k, fraction in enumerate(place.tolist()):
        x0, x1, window = X0[k : k + 1], X1[k : k + 1], int(4 * fraction)
        a, b = grid(4)[window : window + 2]
        noised = (1 - a) * x0 + a * x1
        own = walk(diffusion_start(x0, steps.SCHEDULE), grid(8)[: 2 * window + 1])
        for xa, loss in zip((noised, own), losses):
            xb = walk(xa, grid(32)[8 * window : 8 * window + 9])
            wanted, position = (xb - xa) / (b - a), 4 * fraction - window
            t, x = a + (b - a) * position, xa + position * (xb - xa)
            scale = (t**2 + (1 - t) ** 2) ** 0.5
            s = steps.SCHEDULE.timestep(time(t))
            expected = squared(noise(x / scale, s, None), x - t * wanted)
            torch.testing.assert_close(loss[k : k + 1], expected, rtol=1e-6, atol=1e-9)
            if xa is noised:
                v = velocity(x, time(t), None).flatten()
                angle = 1 - v @ wanted.flatten() / v.norm() / wanted.norm()
                torch.testing.assert_close(losses[2][k] - loss[k], 0.5 * angle)


def test_captions_are_dropped_for_teacher_and_student_alike(teacher):
    """PeRFlow's published guidance: one context for both, and a teacher without guidance."""
    method = compare.VARIANTS["perflow, guided"]
    [round_] = rounds_of(method, TrainingOptions(8, 500))
    batch = fewstep.train.batch(round_, Numbered(), (4, 8, 8), torch.arange(500), slice(100, 400),
                                generator_for(0, 0))
    plain = fewstep.train.batch(replace(round_, method=METHODS["perflow"]), Numbered(), (4, 8, 8),
                                torch.arange(500), slice(100, 400), generator_for(0, 0))
    assert 15 <= batch[2].count("") <= 50 and set(batch[2]) == {"", "a shape"}
    assert torch.equal(batch[0], plain[0]) and torch.equal(batch[3], plain[3])
    student = new_student(teacher, method)
    extras = fewstep.train.loss_inputs(method, student, teacher, 2.5, Numbered(), None)
    x, _, t, _, context = inputs(2, torch.float32)
    torch.testing.assert_close(
        extras["teacher"](x, t, context),
        diffusion_velocity(teacher.unet, steps.SCHEDULE)(x, t, context))


def test_scott_with_one_step_and_no_noise_is_lcm():
    place = torch.rand(B, generator=GENERATOR)
    place[0] = 0.99  # its step ends at the data
    frozen = {"teacher": straight, "target": curved}
    loss = consistency.scott(curved, X0, X1, CONTEXT, place, torch.arange(B), place, eta=0.0,
                             steps=1, **frozen)
    t, u = steps.schedule_time(place), steps.schedule_time(place + consistency.NOISY_GAP)
    assert u[0] == 1
    x = interpolate(X0, X1, t)
    y = steps.step(straight, x, t, u, CONTEXT)
    expected = consistency.same_end(curved, curved, x, t, y, u, CONTEXT)
    torch.testing.assert_close(loss, expected)
    noisy_loss = consistency.scott(curved, X0, X1, CONTEXT, place, torch.arange(B), place, **frozen)
    assert (noisy_loss - loss).abs().max() > 1e-3
    judged = consistency.scott(
        curved, X0, X1, CONTEXT, place, torch.arange(B), place, eta=0.0, steps=1, **frozen,
        critic=lambda fake, real, context, place, noise: squared(fake, real) + place)
    torch.testing.assert_close(judged, loss + squared(steps.end(curved, x, t, CONTEXT), X1) + place)


def test_progressive_student_in_its_teachers_form_equals_a_computation_by_hand():
    """Also: a student that copies a straight teacher has no loss, in any round."""
    place = torch.tensor([0.1, 0.3, 0.6, 0.9, 0.2, 0.8]).double()
    student = lambda x, t, context: curved(x, t, context) + broadcast_over(t.square(), x)
    loss = progressive.loss(student, X0, X1, CONTEXT, place, teacher=curved, steps=4,
                            diffusion=True)
    grid = steps.schedule_time(torch.arange(9) / 8).tolist()
    time = lambda t: torch.tensor([t]).double()
    for k, index in enumerate((0, 1, 2, 3, 0, 3)):
        x0, x1, context = (batch[k : k + 1] for batch in (X0, X1, CONTEXT))
        t, middle, u = grid[2 * index : 2 * index + 3]
        y = x = (1 - t) * x0 + t * x1
        y = y + (middle - t) * curved(y, time(t), context)
        y = y + (u - middle) * curved(y, time(middle), context)
        weight, wanted = max(t**2, (1 - t) ** 2), (y - x) / (u - t)
        expected = weight * squared(student(x, time(t), context), wanted)
        torch.testing.assert_close(loss[k : k + 1], expected, rtol=1e-6, atol=1e-9)
    for count in progressive.ROUNDS:
        same = progressive.loss(straight, X0, X1, CONTEXT, place, teacher=straight, steps=count,
                                diffusion=count == 8)
        assert same.abs().max() < 1e-9


def test_progressive_velocity_loss_equals_a_computation_by_hand():
    """Target, weight and times of each sample; the diffusion starts at its first time."""
    place = torch.tensor([0.1, 0.3, 0.6, 0.9, 0.2, 0.8]).double()
    student = lambda x, t, context: curved(x, t, context) + broadcast_over(t.square(), x)
    loss = progressive.loss(student, X0, X1, CONTEXT, place, teacher=curved, steps=4,
                            diffusion=True, times=lambda fraction: fraction)
    time = lambda t: torch.tensor([t]).double()
    for k, t in enumerate((0.0, 0.25, 0.5, 0.75, 0.0, 0.75)):
        x0, x1, context = (batch[k : k + 1] for batch in (X0, X1, CONTEXT))
        x, u, start = (1 - t) * x0 + t * x1, t + 0.25, t or steps.FIRST_TIME
        y = x if t else diffusion_start(x, steps.SCHEDULE)
        middle = max(t + 0.125, start)
        y = y + (middle - start) * curved(y, time(start), context)
        y = y + (u - middle) * curved(y, time(middle), context)
        expected = max(t**2, (1 - t) ** 2) * squared(student(x, time(t), context), (y - x) / 0.25)
        torch.testing.assert_close(loss[k : k + 1], expected, rtol=1e-6, atol=1e-9)


def test_mlcms_first_part_is_the_error_of_stable_diffusions_x():
    """A segment's two jumps by hand, compared as x_s = αx1 + σx0, the coordinates of the paper."""
    segment, position, seeds = consistency.draw_mlcm(B, torch.Generator().manual_seed(1))
    student = lambda x, t, context: curved(x, t, context) + broadcast_over(t.square(), x)
    loss = consistency.mlcm_segments(student, X0, None, CONTEXT, segment, position, seeds,
                                     teacher=curved, target=student)
    time = lambda t: t.reshape(1)
    for k in range(B):
        n, context = int(segment[k]), CONTEXT[k : k + 1]
        here = n / 8 + position[k].double() * (1 / 8 - 1 / 48)
        path = [here * j / (n + 1) for j in range(n + 2)]  # the teacher's steps, of the schedule
        t, u, e = (steps.schedule_time(place) for place in
                   (here, here + 1 / 48, torch.tensor((n + 1) / 8).double()))
        x = diffusion_start(X0[k : k + 1], steps.SCHEDULE)
        for now, then in zip(path, path[1:]):
            now, then = (steps.schedule_time(torch.as_tensor(place)) for place in (now, then))
            x = x + (then - now) * curved(x, time(now), context)
        y = x + (u - t) * curved(x, time(t), context)
        jump = x + (e - t) * student(x, time(t), context)
        goal = y + (e - u) * student(y, time(u), context)
        norm = (e**2 + (1 - e) ** 2).sqrt()  # e / norm and (1 - e) / norm are α and σ
        torch.testing.assert_close(loss[k : k + 1], squared(jump / norm, goal / norm), rtol=1e-5,
                                   atol=1e-9)


def test_mlcm_continues_from_the_students_own_samples():
    """The second half's loss by hand: sample in four steps, add noise, three teacher steps."""
    segment, seeds = torch.tensor([0, 1, 3, 5, 6, 7]), torch.arange(B)
    student = lambda x, t, context: curved(x, t, context) + broadcast_over(t.square(), x)
    target = lambda x, t, context: 0.9 * student(x, t, context)
    loss = consistency.mlcm_edges(student, X0, None, CONTEXT, segment, None, seeds, teacher=curved,
                                  target=target)
    edges = steps.schedule_time(torch.arange(9) / 8).tolist()
    fine = steps.schedule_time(torch.arange(25) / 24).tolist()
    time = lambda t: torch.tensor([t]).double()
    for k, first in enumerate(segment.tolist()):
        noises = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(k)).double()
        x, context = diffusion_start(X0[k : k + 1], steps.SCHEDULE), CONTEXT[k : k + 1]
        for number, edge in enumerate((0, 2, 4, 6)):
            t = edges[edge]
            if number:
                x = t * x + (1 - t) * noises[number - 1]
            x = x + (1 - t) * target(x, time(t), context)
        t, u = edges[first], edges[first + 1]
        y = x = t * x + (1 - t) * noises[3]
        for now, then in zip(fine[3 * first :], fine[3 * first + 1 : 3 * first + 4]):
            y = y + (then - now) * curved(y, time(now), context)
        goal = y + (1 - u) * target(y, time(u), context)
        expected = squared(x + (1 - t) * student(x, time(t), context), goal)
        torch.testing.assert_close(loss[k : k + 1], expected, rtol=1e-6, atol=1e-9)


def test_rounds_share_iterations_and_learning_rate_as_published():
    """MLCM: 12,000 iterations at 1e-4, then 2,000 at 1e-5. Progressive: equal parts."""
    about = lambda name, iterations: [
        (round_.before, round_.options.iterations, round_.options.learning_rate) for round_ in
        rounds_of(METHODS[name], TrainingOptions(iterations, learning_rate=1e-4))]
    assert about("mlcm", 14_000) == [(0, 12_000, 1e-4), (12_000, 2_000, pytest.approx(1e-5))]
    assert about("progressive", 9) == [(0, 1, 1e-4), (1, 2, 1e-4), (3, 3, 1e-4), (6, 3, 1e-4)]
    assert about("lcm", 9) == [(0, 9, 1e-4)]
    assert [METHODS[name].learning_rate for name in ("scott", "mlcm", "re-meanflow", "perflow")
            ] == [8e-6, 1e-4, 2e-4, 8e-5]


def test_freeflow_loss_equals_a_computation_by_hand():
    ends = torch.tensor([0.08, 0.11, 0.3, 0.5, 0.8, 1.0]).double()
    student = lambda x, t, until, context: curved(x, t, context) + broadcast_over(until, x) * x
    target = lambda x, t, until, context: 0.9 * student(x, t, until, context)
    loss = freeflow.loss(student, X0, None, CONTEXT, ends, teacher=curved, target=target)
    time = lambda t: torch.tensor([t]).double()
    for k, e in enumerate(ends.tolist()):
        x0, context = X0[k : k + 1], CONTEXT[k : k + 1]
        if e - 0.05 > steps.FIRST_TIME:
            d = e - 0.05
            x = x0 + d * target(x0, time(0.0), time(d), context)
        else:  # where the diffusion starts
            d, x = steps.FIRST_TIME, diffusion_start(x0, steps.SCHEDULE)
        y = x + (e - d) * curved(x, time(d), context)
        expected = squared(student(x0, time(0.0), time(e), context), (y - x0) / e)
        torch.testing.assert_close(loss[k : k + 1], expected, rtol=1e-6, atol=1e-9)


def test_few_step_samplers_equal_a_computation_by_hand():
    """To the end and back with fresh noise; or with the mean velocity between two times."""
    def unet(x, s, context, until=None):
        waves = broadcast_over((s / 300).sin() + (0 if until is None else (until / 200).cos()), x)
        return 0.3 * x.sin() + waves

    x0, noises = X0.float(), sample.noise_from_seeds(range(B), (2, 4, 8, 8))
    time = lambda t: torch.full((B,), t)
    sampled = partial(sample.few_step_sample, noise=x0, steps=2, context=CONTEXT, seeds=range(B))
    t0, t1, _ = steps.SCHEDULE.sampling_times(2).tolist()
    v = diffusion_velocity(unet, steps.SCHEDULE)
    x = diffusion_start(x0, steps.SCHEDULE)
    x = x + (1 - t0) * v(x, time(t0), CONTEXT)
    x = t1 * x + (1 - t1) * noises[:, 1]
    x = x + (1 - t1) * v(x, time(t1), CONTEXT)
    lcm = SimpleNamespace(few_step=FewStep("renoise", 4), kind="diffusion", unet=unet)
    torch.testing.assert_close(sampled(lcm), x)
    u = mean_velocity(unet)
    x = x0 + 0.5 * u(x0, time(0.0), time(0.5), CONTEXT)
    x = x + 0.5 * u(x, time(0.5), time(1.0), CONTEXT)
    meanflows = SimpleNamespace(few_step=FewStep("mean", 1), kind="flow", unet=unet)
    torch.testing.assert_close(sampled(meanflows), x)


def test_fresh_noise_keeps_points_on_the_teachers_marginal():
    """For data ±1 in one dimension, the flow's own noise would leave the middle empty."""
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
    """Random x, v, times t < r and contexts for the tiny network."""
    x, v = torch.randn(2, count, 4, 8, 8, generator=GENERATOR, dtype=dtype)
    t = torch.rand(count, generator=GENERATOR, dtype=dtype) / 2
    context = torch.randn(count, 16, 128, generator=GENERATOR, dtype=dtype)
    return x, v, t, t + 0.3, context


def test_second_time_starts_without_effect(teacher):
    x, _, t, r, context = inputs(2, torch.float32)
    two = meanflow.with_second_time(teacher.unet)
    one = teacher.unet(x, 1000 * (1 - t), context)
    torch.testing.assert_close(mean_velocity(two)(x, t, r, context), one)
    torch.nn.init.normal_(two.until_embedding.linear_2.weight, std=0.1, generator=GENERATOR)
    later = mean_velocity(two)(x, t, r, context)
    assert relative_error(later, mean_velocity(two)(x, t, t, context)) > 1e-3
    torch.testing.assert_close(two(x, 1000 * (1 - t), context),
                               mean_velocity(two)(x, t, t, context))  # without a second time, r = t


def test_meanflow_loss_agrees_with_finite_differences(teacher, monkeypatch):
    """MeanFlow's target contains du/dt, here a central difference of u."""
    def embedding_in_fp64(timestep, channels):  # the network's fp32 is too coarse for differences
        powers = torch.arange(channels // 2, dtype=torch.float64) / (channels // 2)
        angles = timestep[:, None] * 10_000**-powers
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    monkeypatch.setattr(unet, "timestep_embedding", embedding_in_fp64)
    two = meanflow.with_second_time(teacher.unet).double()
    torch.nn.init.normal_(two.until_embedding.linear_2.weight, std=0.05, generator=GENERATOR)
    u = mean_velocity(two)
    x0, x1, t, r, context = inputs(3)
    loss = meanflow.loss(u, x0, x1, context, t, r, target=u)
    x, v, h = interpolate(x0, x1, t), x1 - x0, 1e-6
    with torch.no_grad():
        ahead, behind = (u(x + s * v, t + s, r, context) for s in (h, -h))
        target = v + broadcast_over(r - t, x) * (ahead - behind) / (2 * h)
        error = squared(u(x, t, r, context), target)
        expected = error / (error + meanflow.WEIGHT_OFFSET).sqrt()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    loss.sum().backward()  # gradients flow through u only
    assert two.conv_in.weight.grad.abs().sum() > 0
    masked = meanflow.loss(u, x0, x1, context, t, r, target=u,
                           longest=squared(x0, x1).min().item())
    assert (masked > 0).sum() == 1


def test_refitted_time_embedding_is_slow_and_keeps_its_values(teacher):
    """The waves of Stable Diffusion's embedding dominate its derivative; without them, a difference
    over 0.02 of time agrees with the derivative."""
    t = torch.linspace(0.02, 0.95, 200)
    channels = teacher.unet.config.block_out_channels[0]
    refitted = copy.deepcopy(teacher.unet).requires_grad_(True)
    meanflow.match_times(refitted, steps.SCHEDULE, meanflow.SLOW)

    def embedding(network, x, t, *_):
        return network.time_embedding(unet.timestep_embedding(1000 * (1 - t), channels))

    roughness = []
    for network in (teacher.unet, refitted):
        u = partial(embedding, network)
        exact, near = (derivative(u, t[:, None], t[:, None], t, t + 0.5, None) for derivative in (
            meanflow.exact_derivative, meanflow.finite_difference))
        roughness.append(relative_error(exact, near))
    assert roughness[0] > 2 and roughness[1] < 0.3
    meant = unet.timestep_embedding(steps.SCHEDULE.timestep(t).float(), channels)
    wanted = teacher.unet.time_embedding(meant)
    assert relative_error(embedding(refitted, None, t), wanted) < 0.2
    student = new_student(teacher, METHODS["re-meanflow"]).unet.time_embedding
    assert torch.equal(student.linear_2.weight, refitted.time_embedding.linear_2.weight)
    student(unet.timestep_embedding(1000 * (1 - t), channels)).square().sum().backward()
    fast = (student.linear_1.weight == 0).all(0)
    assert fast.any() and not student.linear_1.weight.grad[:, fast].any()
    assert student.linear_1.weight.grad[:, ~fast].any()
    negated = replace(teacher, unet=copy.deepcopy(teacher.unet))
    # A flow as the start has the right times, but loses its fast waves too.
    kept = fewstep.train.student_of(negated, METHODS["re-meanflow"], "runs/2rf.safetensors", 0)
    own = teacher.unet.time_embedding(unet.timestep_embedding(1000 * (1 - t), channels))
    assert relative_error(embedding(kept.unet, None, t), own) < 0.2
    assert torch.equal((kept.unet.time_embedding.linear_1.weight == 0).all(0), fast)


def test_times_of_re_meanflow_are_the_authors():
    t, r = meanflow.draw(100_000, torch.Generator().manual_seed(0))
    assert (t >= 0).all() and (r >= t).all() and (r <= 1).all()
    mean = lambda condition: condition.double().mean().item()
    assert mean(r == t) == pytest.approx(0.75, abs=0.01)
    # ∫ cosh(4 (t - 1/2)) over [0, 0.2], divided by the same over [0, 1]
    near = 0.5 - math.sinh(4 * 0.3) / (2 * math.sinh(2))
    assert mean(t < 0.2) == pytest.approx(near, abs=0.01)
    jumps = (r > t) & (t < 0.2)
    assert not (jumps & (r > 0.6) & (r < 1)).any()
    # From t = 0, r - t > 0.6 if a standard normal exceeds 0.8 + log(0.6 / 0.4).
    first = (r > t) & (t < 0.01)
    likely = torch.special.ndtr(torch.tensor(-0.8 - math.log(1.5))).item()
    assert mean(r[first] == 1) == pytest.approx(likely, abs=0.05)
    assert METHODS["re-meanflow"].dropout == METHODS["rectified-diffusion"].dropout == 0.1


def test_finite_difference_damps_fast_waves_of_time():
    """u = x (t + r) + sin(1000 t) / 10: the sine, up to 100 steep, dominates the derivative."""
    x, v, t, r, _ = inputs(64)
    wave = lambda t: (1000 * t).sin() / 10
    u = lambda x, t, r, context: x * broadcast_over(t + r, x) + broadcast_over(wave(t), x)
    slow = v * broadcast_over(t + r, x) + x  # d/dt of x (t + r)
    near, exact = (derivative(u, x, v, t, r, None)
                   for derivative in (meanflow.finite_difference, meanflow.exact_derivative))
    torch.testing.assert_close(exact, slow + broadcast_over(100 * (1000 * t).cos(), x))
    assert (near - slow).abs().max() < 2 * 0.1 / meanflow.DELTA_T + 0.1 < (exact - slow).abs().max()
    # If r is closer than DELTA_T, the difference ends at r.
    r = t + meanflow.DELTA_T / 4
    change = broadcast_over(r - t, x) * meanflow.finite_difference(u, x, v, t, r, None)
    torch.testing.assert_close(
        change, u(x + broadcast_over(r - t, x) * v, r, r, None) - u(x, t, r, None),
        rtol=1e-9, atol=1e-9)


def test_merged_lora_equals_applied_lora(teacher):
    x, _, t, _, context = inputs(2, torch.float32)
    student = copy.deepcopy(teacher.unet)
    lora.add_lora(student)
    before = teacher.unet(x, 1000 * t, context)
    torch.testing.assert_close(student(x, 1000 * t, context), before)  # LoRA starts without effect
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


def test_hipas_lora_lies_on_attention_or_also_on_convolutions(teacher):
    """Parameters of rank 16 on the tiny model: on attention, and on all inner layers."""
    def trained(method):
        weights = new_student(teacher, method).unet.named_parameters()
        return {name: weight.numel() for name, weight in weights if weight.requires_grad}

    attention = trained(METHODS["hipa"])
    everywhere = trained(compare.VARIANTS["hipa, convolutions"])
    assert sum(attention.values()) == 131_072 and all("attn" in name for name in attention)
    assert sum(everywhere.values()) == 702_464 and attention.keys() < everywhere.keys()
    assert "down_blocks.0.resnets.0.conv1.down.weight" in everywhere


def test_critic_and_student_learn_from_one_loss_but_not_from_each_others(teacher):
    """Its value and both gradients by hand, with the critic's features and scores."""
    frozen = copy.deepcopy(teacher.unet).requires_grad_(False)
    heads, generator = critic.make_heads(frozen.config), torch.Generator().manual_seed(0)
    fake, real, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
    fraction, context = torch.tensor([0.2, 0.7]), torch.randn(2, 16, 128, generator=generator)
    fake.requires_grad_(True)
    loss = critic.adversarial_loss(frozen, heads, fake, real, context, fraction, noise)
    gradients = torch.autograd.grad(loss.sum(), [fake, *heads.parameters()])

    s = 1000 * (1 - fraction) - 1
    alpha, sigma = (broadcast_over(each, fake) for each in steps.SCHEDULE.alpha_sigma(s))
    score = lambda x: heads(frozen.body(frozen.read_in(alpha * x + sigma * noise), s, context))
    mean = lambda x: x.flatten(1).mean(1)
    of_critic = mean((1 - score(real)).relu() + (1 + score(fake)).relu())
    of_student = -0.4 * mean(score(fake))
    torch.testing.assert_close(loss, of_critic + of_student, rtol=1e-4, atol=1e-5)
    expected = [*torch.autograd.grad(of_student.sum(), fake),
                *torch.autograd.grad(of_critic.sum(), list(heads.parameters()))]
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)
    student = new_student(teacher, METHODS["scott"])
    saved = fewstep.train.finished(student).unet.state_dict().keys()
    assert saved == teacher.unet.state_dict().keys() and hasattr(student.unet, "critic")


def test_lora_on_stable_diffusion_has_hipas_parameter_count():
    with torch.device("meta"):
        large = unet.UNet(unet.UNetConfig())
        lora.add_lora(large)
    assert sum(p.numel() for p in large.parameters() if p.requires_grad) == 3_188_736


def test_high_pass_and_edges_respond_to_what_a_blur_removes():
    flat = torch.full((2, 3, 32, 32), 0.3)
    assert hipa.high_pass(flat).abs().max() < 1e-6 and hipa.edges(flat).max() < -0.998
    checks = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1).expand(2, 3, 32, 32)
    torch.testing.assert_close(hipa.high_pass(checks), checks)
    edge = torch.ones(1, 3, 32, 32)
    edge[..., 16:] = -1
    response = hipa.edges(edge)
    torch.testing.assert_close(response[..., 15:17], torch.full((1, 3, 32, 2), 2**0.5 - 1))
    assert response[..., :14].max() < -0.998


# --------------------------------------------------------------------------------------------------
# Training by each method


def new_student(teacher, method):
    """The method's student before training; the teacher does not change."""
    network = copy.deepcopy(teacher.unet).requires_grad_(True)  # a critic freezes its teacher
    network = initial_student(network, method.init, teacher.kind, 0)
    return fewstep.train.student_of(replace(teacher, unet=network), method, method.init, 0)


class Numbered:
    """Pairs whose noise and image encode the number of their sample."""

    def __len__(self):
        return 1000

    def __getitem__(self, indices):
        return self.batch(indices, 0)

    def batch(self, samples, seed):
        x0 = broadcast_over(samples.float(), torch.empty(1, 1, 1, 1)).expand(-1, 4, 8, 8)
        return x0, x0 + 0.5, ["a shape"] * len(samples)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_each_method_trains_on_the_pairs_noise_or_on_fresh_noise(method):
    """Fresh noise differs in every iteration of every round."""
    rounds = rounds_of(method, TrainingOptions(12, 4, warmup_samples=16))
    batches, starts = [], []
    warmups = {"mlcm": [13, 2], "progressive": [2, 2, 5, 5]}.get(method.name, [16])
    assert [round_.options.warmup_samples for round_ in rounds] == warmups
    for round_ in rounds:
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


def test_ema_target_lags_behind_the_student(teacher, tmp_path):
    x, _, t, _, context = inputs(2, torch.float32)
    outputs = []

    def loss(student, *batch, target, **kwargs):
        with torch.no_grad():
            outputs.append((student(x, t, context), target(x, t, context)))
        return consistency.lcm(student, *batch, target=target, **kwargs)

    method = replace(METHODS["lcm"], loss=loss)
    student = new_student(teacher, method)
    ema = ema_copy(student.unet)
    [round_] = rounds_of(method, TrainingOptions(3, 4, ema_half_life=8))
    extras = {"teacher": steps.guided_velocity(teacher, 1.0)}
    train(student.unet, ema, partial(fewstep.train.batch, round_, Numbered(), (4, 8, 8)),
          partial(fewstep.train.loss, method, student.encode_prompts, ema, extras), round_.options,
          tmp_path, {})
    (first, target), *_, (last, last_target) = outputs
    assert torch.equal(first, target)
    lag, movement = relative_error(last_target, last), relative_error(last_target, first)
    assert lag > 0.1 * movement and movement > 0.1 * relative_error(last, first)


# Passes per sample: a guided pass of the teacher counts 2, the student's with gradients 3, the
# critic's 1 for an image and 2 for the student's, with gradients of the input.
COSTS = {"perflow": 8 * 2 + 3, "progressive": 2 * 2 + 3, "lcm": 2 + 1 + 3,
         "mlcm": pytest.approx(4.5 * 2 + 2 + 1 + 3, rel=0.2),  # one to eight steps, by segment
         "scott": 3 * 2 + 1 + 3 + 3, "rectified-diffusion": 3,
         "re-meanflow": pytest.approx(3 + 2 / 4, rel=0.1),  # one sample in four needs a derivative
         "hipa": 3, "freeflow": 1 + 2 + 3}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_passes_per_sample_of_each_method(method, teacher):
    student, pairs = new_student(teacher, method), Numbered()
    ema, before = ema_copy(student.unet), copy.deepcopy(student.unet.state_dict())
    lpips = perceptual_distance("random", student.device) if method.name == "hipa" else None
    extras = fewstep.train.loss_inputs(method, student, teacher, 2.5, pairs, lpips)
    first, *later = rounds_of(method, TrainingOptions(6, 16))

    def cost(round_, extras):
        batch = partial(fewstep.train.batch, round_, pairs, (4, 8, 8))
        loss = partial(fewstep.train.loss, round_.method, student.encode_prompts, ema, extras)
        return compare.passes_of(student.unet, batch, loss, round_.options)

    assert cost(first, extras) == COSTS[method.name]
    if method.name == "progressive":  # a later round's teacher has learned guidance
        assert cost(later[0], fewstep.train.next_inputs(extras, student, first)) == 2 + 3
    if method.name == "mlcm":  # its own sample, three guided steps, target, student
        assert cost(later[0], extras) == 4 + 3 * 2 + 1 + 3
    after = student.unet.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


# --------------------------------------------------------------------------------------------------
# The command


FEW = ["--num-pairs", 40, "--teacher-steps", 2, "--batch-size", 4, "--validation-pairs", 6]


def few_of(method: str) -> list:
    return FEW[2:] if METHODS[method].data == "prompts" else FEW


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fewstep")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """untrained(method): the file of its model before training."""
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
def test_each_method_trains_resumes_and_samples(method, call, folder, few_images):
    out, pairs = folder / f"{method}.safetensors", folder / "pairs"
    iterations = 6 if method == "progressive" else 4  # at least one for each round
    flags = ["--method", method, "--pairs", pairs, "--out", out, *few_of(method),
             "--iterations", iterations, "--cooldown", 0, "--save-every", 2]
    code, output, err = call(fewstep.train.main, *flags)
    assert code == 0, err
    assert f"a model by {method}" in output
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
    # A missing model is made again from the states, to the byte.
    out.unlink()
    assert call(fewstep.train.main, *flags)[0] == 0 and out.read_bytes() == first
    code, output, _ = call(fewstep.train.main, *flags)
    assert code == 0 and "finished already" in output
    # Stop half way, then resume.
    if method not in ("progressive", "mlcm"):  # lengths of their rounds depend on --iterations
        other_out = folder / f"{method}-again.safetensors"
        other_flags = [other_out if flag == out else flag for flag in flags]
        other_flags += ["--validation-pairs", 0]
        assert call(fewstep.train.main, *other_flags, "--iterations", 2)[0] == 0
        assert call(fewstep.train.main, *other_flags)[0] == 0
        assert other_out.read_bytes() == first


def test_progressive_distillation_saves_a_model_for_every_round(call, folder, few_images):
    out = folder / "rounds.safetensors"
    flags = ["--method", "progressive", "--pairs", folder / "pairs", "--out", out, *FEW,
             "--iterations", 6, "--validation-pairs", 0]
    assert call(fewstep.train.main, *flags)[0] == 0
    states = {}
    for steps_, name in ((8, "rounds-8"), (4, "rounds-4"), (2, "rounds-2"), (1, "rounds")):
        tensors = load_file(folder / f"{name}.safetensors")
        states[steps_] = tensors["model.diffusion_model.out.2.weight"]
        model = checkpoint.load(folder / f"{name}.safetensors")
        assert model.steps == steps_
        assert [n for n in (1, 2, 4, 8, 16) if model.allows(n)] == [steps_]
        rows = read_metrics(Path(f"{out}.state") / f"{steps_}-steps")
        assert rows[-1]["step"] == (2 if steps_ <= 2 else 1)
    assert len({tensor.numpy().tobytes() for tensor in states.values()}) == 4
    lost = folder / "rounds-4.safetensors"
    lost.unlink()
    assert call(fewstep.train.main, *flags)[0] == 0 and lost.exists()


def test_a_part_without_a_model_of_its_own_never_becomes_the_model(call, tmp_path, monkeypatch):
    """MLCM's first part, on a resume after which the second one is killed."""
    few = [*few_of("mlcm"), "--iterations", 7, "--validation-pairs", 0]
    flags = ["--method", "mlcm", *few, "--out", "m.safetensors"]
    assert call(fewstep.train.main, *flags)[0] == 0
    Path("m.safetensors").unlink()
    train = fewstep.train.train

    def killed(unet, ema, batch, loss, options, folder, *more):
        if folder.name == "edges":
            raise KeyboardInterrupt
        return train(unet, ema, batch, loss, options, folder, *more)

    monkeypatch.setattr(fewstep.train, "train", killed)
    assert call(fewstep.train.main, *flags)[0] == 2
    assert not Path("m.safetensors").exists()


def test_studies_run_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # each process would count its share of the passes alone
    with pytest.raises(BadInput, match="without torchrun"):
        study.open_table(tmp_path / "a.json", SimpleNamespace())


def test_unsupported_steps_guidance_teachers_and_flags_are_refused(call, untrained):
    for method, count in (("perflow", 2), ("hipa", 2), ("freeflow", 4), ("mlcm", 3),
                          ("progressive", 8)):
        code, _, err = call(sample.main, "--model", untrained(method), "--steps", count)
        assert code == 2 and "a few-step model" in err
    path = untrained("lcm")
    code, _, err = call(sample.main, "--model", path, "--guidance", 3)
    assert code == 2 and "its teacher's guidance" in err
    code, _, err = call(reflow.main, "--teacher", path)
    assert code == 2 and "a few-step model" in err
    code, _, err = call(fewstep.train.main, "--method", "progressive", "--iterations", 3)
    assert code == 2 and "4 rounds" in err
    code, _, err = call(fewstep.train.main, "--method", "mlcm", "--num-pairs", 30)
    assert code == 2 and "--num-pairs: mlcm trains on prompts alone" in err
    code, _, err = call(fewstep.train.main, "--method", "lcm", "--lpips-net", "vgg")
    assert code == 2 and "--lpips-net: is for hipa" in err
    code, _, err = call(fewstep.train.main, "--method", "lcm", "--ema-device", "cpu")
    assert code == 2 and "--ema-device" in err
    code, _, err = call(fewstep.train.main, "--method", "lcm", "--init", "negated")
    assert code == 2 and "predicts noise" in err
    flow = Path(TINY_TEACHER).with_name("tiny_instaflow.safetensors")
    for method, start, word in (("lcm", flow, "predicts noise"),
                                ("freeflow", TINY_TEACHER, "predicts velocity")):
        code, _, err = call(fewstep.train.main, "--method", method, "--init", start)
        assert code == 2 and f"--init {start}" in err and word in err
    code, _, err = call(fewstep.train.main, "--method", "re-meanflow", "--compile")
    assert code == 2 and "forward derivative" in err
    code, _, err = call(fewstep.train.main, "--method", "lcm", "--teacher",
                        untrained("freeflow"))
    assert code == 2 and "of kind flow" in err


def test_evaluation_takes_only_the_steps_that_a_method_supports(call, untrained):
    models = [untrained(method) for method in ("perflow", "hipa", "lcm")]
    code, _, err = call(evaluate.main, "--model", *models, "--steps", "1,2,4", "--num-samples", 8)
    assert code == 0, err
    rows = json.loads(Path("runs/evaluate.json").read_text())
    evaluated = [(row["model"], row["steps"]) for row in rows if row["steps"]]
    assert evaluated == [("perflow.safetensors", 4), ("hipa.safetensors", 1),
                         ("lcm.safetensors", 1), ("lcm.safetensors", 2), ("lcm.safetensors", 4)]


def test_renoising_does_not_depend_on_the_batch_size(untrained):
    model = checkpoint.load(untrained("lcm"))
    prompts, seeds = ["a shape"] * 5, range(5)
    torch.testing.assert_close(sample_latents(model, prompts, seeds, 4, batch_size=2),
                               sample_latents(model, prompts, seeds, 4), rtol=1e-3, atol=1e-3)
    once, twice = (sample_latents(model, prompts, seeds, n) for n in (1, 2))
    assert relative_error(twice, once) > 1e-2


# --------------------------------------------------------------------------------------------------
# Comparison of the methods


def test_counted_passes_of_known_computations(teacher):
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
        meanflow.loss(u, x, v, context, t, r, target=u, derivative=meanflow.finite_difference)
        assert passes == [20 + 15 + 3 * 2]  # two without gradients
        passes[0] = 0
        meanflow.loss(u, x, v, context, t, r, target=u)
    assert passes == [15 + 3 * 2]
    with compare.counted_passes() as passes:
        pass
    teacher.unet(x, 1000 * t, context)
    assert passes == [0]


def test_an_exact_consistency_function_ends_where_the_teachers_walk_does(teacher):
    """In one step by LCM's sampler; and a guided U-Net in the U-Net's place is guidance."""
    prompts, seeds = ["a red circle", "a shape"], [0, 1]
    exact = replace(teacher, few_step=FewStep("renoise", 4),
                    unet=compare.ExactConsistency(teacher, 2.5))
    latents = sample_latents(exact, prompts, seeds, 1)
    zero = torch.zeros(2)
    start = diffusion_start(sample.noise_from_seeds(seeds, (4, 8, 8)), steps.SCHEDULE)
    context = teacher.encode_prompts(prompts)
    with torch.no_grad():
        walked = steps.euler_steps(steps.guided_velocity(teacher, 2.5), start, zero, zero + 1,
                                   consistency.GRID, context)
    torch.testing.assert_close(latents, walked, rtol=1e-3, atol=1e-3)
    assert relative_error(sample_latents(exact, prompts, seeds, 2), latents) > 1e-2
    wrapped = compare.Guided(teacher.unet, teacher.encode_prompts([""]), 2.5)
    few = replace(teacher, few_step=FewStep("euler", 4), unet=wrapped)
    torch.testing.assert_close(sample_latents(few, prompts, seeds, 4),
                               sample_latents(teacher, prompts, seeds, 4, 2.5, solver="ddim"),
                               rtol=1e-3, atol=1e-3)


def test_tied_rows_share_a_rank_and_cost_limits_the_rivals():
    def row(name, seed, frechet, passes, with_pairs, nfe=4):
        return dict.fromkeys(figures.GRADES, 0.5) | {
            "row": name, "seed": seed, "frechet": frechet, "passes": passes, "steps": nfe,
            "with_pairs": with_pairs, "nfe": nfe, "iterations": 1, "minutes": 1.0,
            "learning_rate": 5e-4}

    table = [row(name, seed, value, 80_000 + seed, with_pairs) for name, values, with_pairs in (
        ("lcm", (30, 31, 32), 240_000), ("scott", (32, 30, 31), 240_000),
        ("perflow", (50, 51, 53), 240_000), ("mlcm", (90, 91, 92), 80_000),
        ("hipa, convolutions", (1, 1, 1), 80_000)) for seed, value in enumerate(values)]
    table += [row("freeflow", seed, 1, 80_000, 80_000, nfe=1) for seed in range(3)]
    # What all rounds cost counts, not what the round of these steps had cost.
    table += [row("progressive", seed, 50, spent, spent, nfe=nfe) for seed in range(3)
              for nfe, spent in ((4, 40_000), (1, 80_000))]
    ranks = {line["row"]: (line["rank_by_passes"], line["rank_by_with_pairs"])
             for line in compare.summary_of(table)}
    assert ranks == {"lcm": (1, 1), "scott": (1, 1), "perflow": (3, 3), "mlcm": (5, 2),
                     "freeflow": (1, 1), "hipa, convolutions": (None, None),
                     "progressive": (3, 1)}  # in 4 steps


def test_compare_trains_all_rows_at_one_cost_and_resumes(call, monkeypatch):
    monkeypatch.setattr(figures, "STRAIGHTNESS_STEPS", 3)
    monkeypatch.setattr(study, "RATES", (5e-4,))  # at the edge, so one more is tried
    monkeypatch.setattr(consistency, "GRID", 4)
    models_of, dtypes = compare.models_of, set()

    def spy(one_seed, row, teacher):
        dtypes.add(teacher.dtype)
        return models_of(one_seed, row, teacher)

    monkeypatch.setattr(compare, "models_of", spy)
    own_steps = {"2-RF + distill": [1], "progressive": [8, 4, 2, 1], "exact consistency": [1, 2, 4],
                 "rectified-diffusion, guided": [1, 2, 4, 8], "perflow, guided": [4, 8],
                 "perflow, halving": [2, 4, 8], "progressive, velocity": [8, 4, 2, 1],
                 "scott, no noise": [1, 2, 4, 8], "re-meanflow, difference": [1, 2, 4, 8]}
    flags = ["--rows", *own_steps, "--passes", 160, "--num-pairs", 12, "--num-samples", 8,
             "--batch-size", 2, "--teacher-steps", 2, "--num-seeds", 1, "--out", "runs/few"]
    code, _, err = call(compare.main, *flags)
    assert code == 0, err
    assert dtypes == {torch.float32}
    table = json.loads(Path("runs/few/compare.json").read_text())
    reported = [entry for entry in table if entry["seed"] == 0]
    assert {row: [entry["steps"] for entry in reported if entry["row"] == row]
            for row in ("real", *own_steps)} == {"real": [None]} | own_steps
    # Tuned on another seed, at the method's own number of steps; a variant takes its method's.
    for row, base, steps_ in (("perflow, halving", "perflow", 4), ("progressive", None, 1),
                              ("rectified-diffusion, guided", "rectified-diffusion", 4)):
        tuned = {entry["learning_rate"]: entry["frechet"] for entry in table
                 if entry["seed"] == compare.TUNING_SEED and entry["row"] == (base or row)
                 and entry["steps"] == steps_}
        assert tuned.keys() == {5e-4, study.HIGHER}
        assert {entry["learning_rate"] for entry in reported if entry["row"] == row} == {
            min(tuned, key=tuned.get)}
    assert str(compare.TUNING_SEED) not in Path("runs/few/compare.md").read_text().split()
    for entry in reported:
        of_pairs = 0 if entry["row"] == "exact consistency" else 12 * 2 * 2
        if entry["row"] in own_steps:
            assert entry["with_pairs"] == entry["passes"] + of_pairs
        if entry["row"] in own_steps and not entry["row"].startswith(("progressive", "exact")):
            assert 130 <= entry["passes"] <= 190, entry
        if entry["row"].startswith("progressive") and entry["steps"] == 1:
            assert 135 <= entry["passes"] <= 185, entry
    round_passes = [entry["passes"] for entry in reported if entry["row"] == "progressive"]
    assert round_passes == sorted(round_passes) and round_passes[0] < round_passes[-1] / 2
    nfe = {entry["row"]: entry["nfe"] for entry in reported if entry["steps"] == 4}
    assert nfe["perflow, guided"] == nfe["rectified-diffusion, guided"] == 8
    assert nfe["perflow, halving"] == 4 and nfe["exact consistency"] is None
    assert all(Path("runs/few", f"compare{end}").exists()
               for end in (".md", ".png", "-losses.png", "-images-0.png"))
    before = Path("runs/few/compare.json").read_bytes()
    assert call(compare.main, *flags)[0] == 0
    assert Path("runs/few/compare.json").read_bytes() == before
    # A lost cell is measured again from its states, to the same figures.
    kept = [entry for entry in table if entry["row"] != "scott, no noise"]
    Path("runs/few/compare.json").write_text(json.dumps(kept))
    assert call(compare.main, *flags)[0] == 0
    again = json.loads(Path("runs/few/compare.json").read_text())
    by_key = lambda entry: [entry[name] or 0 for name in ("row", "seed", "steps", "learning_rate")]
    assert sorted(again, key=by_key) == sorted(table, key=by_key)
    code, _, err = call(compare.main, *flags, "--passes", 400)
    assert code == 2 and "another study" in err
    code, _, err = call(compare.main, *flags, "--seed", 99, "--num-seeds", 3)
    assert code == 2 and "seed 100 chooses the learning rates" in err


def test_a_rate_whose_training_is_not_finite_is_not_chosen(monkeypatch):
    one_seed = SimpleNamespace(seed=100, rows_with=lambda key: [{"frechet": 1 / rows[-1]}])
    rows = []

    def measure_cell(one_seed, row, rate, steps):
        rows.append(rate)
        if rate > 5e-4:
            raise NotFinite("the loss is not finite")

    monkeypatch.setattr(compare, "measure_cell", measure_cell)
    assert compare.tuned_rate(one_seed, "lcm") == 5e-4 and rows == [1e-4, 5e-4, 2e-3]


def test_loss_figure_has_one_panel_per_trained_row(tmp_path):
    path, widths, rows = tmp_path / "losses.png", [], []
    compare.save_losses(path, [{"row": "teacher", "seed": 1, "file": None}])
    assert not path.exists()
    for row in ("lcm", "velocity, image loss"):
        rows.append({"row": row, "seed": 1, "file": "cell/model.safetensors"})
        folder = tmp_path / "cell" / compare.folder_of(row)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"step": 10, "loss": 0.5}\n')
        compare.save_losses(path, rows)
        widths.append(Image.open(path).width)
    assert widths[1] == pytest.approx(2 * widths[0], abs=2)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_in_two_processes(tmp_path, method):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                ROOT / "fewstep" / "train.py", "--method", method, *few_of(method),
                "--iterations", 8, "--save-every", 4, "--accumulate", 2]
    result = subprocess.run([*map(str, torchrun)], cwd=tmp_path, capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"a model by {method}") == 1
    model = checkpoint.load(tmp_path / f"runs/{method}.safetensors")
    assert model.few_step == METHODS[method].few_step


def test_rounds_of_another_length_are_refused(call, folder):
    """A round that starts after another number of iterations is another run."""
    flags = ["--method", "mlcm", "--pairs", folder / "pairs", "--out",
             folder / "longer.safetensors", *few_of("mlcm"), "--cooldown", 0,
             "--validation-pairs", 0, "--iterations"]
    assert call(fewstep.train.main, *flags, 2)[0] == 0
    code, _, err = call(fewstep.train.main, *flags, 4)
    assert code == 2 and "before" in err


def test_held_out_noise_differs_from_training_noise(monkeypatch):
    """Also for a method that trains on fresh noise."""
    method, shape = METHODS["lcm"], (4, 4, 8, 8)
    plain = [(torch.zeros(shape), torch.zeros(shape), ["a"] * 4)] * 3
    monkeypatch.setattr(fewstep.train, "held_out_batches", lambda reference: plain)
    batches = fewstep.train.validation_batches(method, 0, None)
    for step in range(3):
        noise = torch.randn(shape, generator=generator_for(0, step))
        assert all((batch[0] - noise).abs().max() > 0.1 for batch in batches)


def test_derivatives_do_not_change_under_autocast(teacher):
    """Large networks train in bf16, where a difference would divide the rounding by DELTA_T.

    Autocast does not pass the forward derivative.
    """
    x, v, t, r, context = inputs(4, torch.float32)
    u = mean_velocity(meanflow.with_second_time(teacher.unet))
    for derivative in (meanflow.finite_difference, meanflow.exact_derivative):
        expected = derivative(u, x, v, t, r, context)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(derivative(u, x, v, t, r, context), expected)


def test_u_shaped_times_have_their_density():
    t = meanflow.u_shaped(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert 0 <= t.min() and t.max() <= 1 and abs(t.mean() - 0.5) < 0.005
    # For a density ∝ cosh(4 (t - 1/2)), the fraction below x is
    # (sinh(2) + sinh(4 (x - 1/2))) / (2 sinh(2)).
    for x in (0.1, 0.3, 0.5, 0.8):
        fraction = (math.sinh(2) + math.sinh(4 * (x - 0.5))) / (2 * math.sinh(2))
        assert (t < x).double().mean().item() == pytest.approx(fraction, abs=0.005)
