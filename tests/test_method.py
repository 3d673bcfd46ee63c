"""The method as a specification: its properties, on two noises A, B and two targets P, Q.

The points are narrow Gaussians, so that the best velocity E[X1 - X0 | X_t] has a closed form.
"""

import pytest
import torch

from diffusion import NoiseSchedule, diffusion_start, diffusion_velocity
from rectified_flow import (
    distill_loss, euler, guided, interpolate, one_step, reflow_loss, straightness,
)

NOISES, TARGETS = torch.tensor([[-1.0, 1], [-1, -1]]), torch.tensor([[1.0, 1], [1, -1]])
WIDTH = 0.15


def best_velocity(pairs):
    """E[X1 - X0 | X_t = x]: the average direction of the lines through x at time t."""

    def velocity(x, t, context):
        t = t[:, None]
        spread = (1 - t) ** 2 + t**2
        directions, weights = [], []
        for x0, x1 in pairs:
            offset = x - interpolate(x0[None], x1[None], t[:, 0])
            directions.append(x1 - x0 + (2 * t - 1) / spread * offset)
            weights.append(-offset.square().sum(1) / (2 * WIDTH**2 * spread[:, 0]))
        return (torch.stack(weights).softmax(0)[..., None] * torch.stack(directions)).sum(0)

    return velocity


def sample_pairs(pairs, count=4000):
    """Noises (N, 2), targets (N, 2) and times (N,) of random pairs."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(len(pairs), (count,), generator=generator)
    x0, x1 = (
        torch.stack(ends)[indices] + WIDTH * torch.randn(count, 2, generator=generator)
        for ends in zip(*pairs)
    )
    return x0, x1, torch.rand(count, generator=generator)


CROSSING = [(x0, x1) for x0 in NOISES for x1 in TARGETS]
FLOW = best_velocity(CROSSING)
*_, ENDS = euler(FLOW, NOISES, 1000)
REFLOWED = best_velocity(list(zip(NOISES, ENDS)))


def test_a_straight_flow_is_exact_in_one_step():
    straight = lambda x, t, context: TARGETS - NOISES
    for steps in (1, 3, 10):
        *_, end = euler(straight, NOISES, steps)
        torch.testing.assert_close(end, TARGETS)
    torch.testing.assert_close(one_step(straight, NOISES), TARGETS)
    assert straightness(straight, NOISES, 10)[0].max() < 1e-12


def test_reflow_loss_is_least_at_the_average_velocity():
    x0, x1, t = sample_pairs(CROSSING)
    minimum = reflow_loss(FLOW, x0, x1, t).mean()
    for other in (
        lambda x, t, context: 1.1 * FLOW(x, t, context),
        lambda x, t, context: FLOW(x, t, context) + 0.2,
    ):
        assert reflow_loss(other, x0, x1, t).mean() > minimum


def test_one_step_of_the_average_velocity_is_a_blur():
    torch.testing.assert_close(
        one_step(FLOW, NOISES[:1]), torch.tensor([[1.0, 0.0]]), atol=1e-3, rtol=0
    )


def test_flow_pairs_noises_and_targets_without_crossing():
    torch.testing.assert_close(ENDS, TARGETS, atol=0.05, rtol=0)  # A to P and B to Q


def test_reflow_straightens_paths_and_lowers_the_transport_cost():
    cost = lambda pairs: torch.stack([(x1 - x0).square().sum() for x0, x1 in pairs]).mean().item()
    assert (
        cost(CROSSING) == pytest.approx(6)
        and cost(zip(NOISES, ENDS)) == pytest.approx(4, abs=0.2)
    )
    before, after = straightness(FLOW, NOISES, 1000)[0], straightness(REFLOWED, NOISES, 100)[0]
    assert after.mean() < 1e-4 < before.mean()


def test_one_step_after_reflow_lands_where_many_steps_do():
    torch.testing.assert_close(one_step(REFLOWED, NOISES), ENDS, atol=1e-4, rtol=0)
    assert (
        distill_loss(REFLOWED, NOISES, ENDS).max() < 1e-8
        < distill_loss(FLOW, NOISES, ENDS).min()
    )


def test_guidance_1_is_off_and_0_is_unconditional():
    network, text, null = lambda x, t, context: x + context, torch.ones(2, 2), torch.zeros(1, 2)
    output = lambda scale: guided(network, null, scale)(NOISES, torch.zeros(2), text)
    assert torch.equal(output(1), NOISES + 1) and torch.equal(output(0), NOISES)
    assert torch.equal(output(3), NOISES + 3)


def test_ddim_is_euler_on_the_flow_of_the_diffusion():
    """Compared with DDIM as in its paper, equation 12 with η = 0."""
    schedule, predict_noise = NoiseSchedule(), lambda x, s, context: torch.sin(x + s[:, None] / 400)
    timesteps, x = schedule.sampling_timesteps(7), NOISES
    alphas, sigmas = (
        v.tolist() + [end] for v, end in zip(schedule.alpha_sigma(timesteps), (1.0, 0.0))
    )
    for k, s in enumerate(timesteps):
        noise = predict_noise(x, s.repeat(2), None)
        x = alphas[k + 1] * (x - sigmas[k] * noise) / alphas[k] + sigmas[k + 1] * noise
    velocity, start = diffusion_velocity(predict_noise, schedule), diffusion_start(NOISES, schedule)
    *_, end = euler(velocity, start, 7, None, schedule.sampling_times(7))
    torch.testing.assert_close(end, x, atol=1e-4, rtol=1e-4)
