"""Flows, samplers and losses with known answers."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch.overrides import TorchFunctionMode

from conftest import relative_error
from diffusion import (
    NoiseSchedule, as_flow, diffusion_start, diffusion_velocity, dpm_solver, noise_loss,
)
from evaluation.figures import straightness_figures
from rectified_flow import (
    distill_loss, euler, flow_velocity, guided, interpolate, one_step, pseudo_huber, reflow_loss,
    straightness,
)
from sample import noise_from_seeds, sample_latents

SCHEDULE = NoiseSchedule()
HUBER = 0.00054  # of the iCT paper


def dummy_network(x, s, context):
    """A smooth function of x and s, in place of a noise-predicting U-Net."""
    return 0.9 * torch.sin(1.3 * x + s[:, None] / 400)


def toy_model(kind, network=dummy_network, device="cpu"):
    """What sampling uses of a StableDiffusion, with contexts of seven zeros."""
    return SimpleNamespace(
        unet=network, kind=kind, steps=4, device=device, few_step=None,
        guidance_for=lambda scale: scale,
        latent_shape=lambda size=None: (7,),
        encode_prompts=lambda prompts: torch.zeros(len(prompts), 7, device=device),
    )


def ddim(network, x, steps, schedule, context=None):
    """All states of DDIM, as Euler's method on the diffusion's flow."""
    velocity, start, times = as_flow(network, "diffusion", x, steps, None)
    return euler(velocity, start, steps, context, times)


def gaussian_velocity(mean, std):
    """The exact velocity from N(0, I) to N(mean, std² I), E[X1 - X0 | X_t = x]."""

    def velocity(x, t, context):
        t = t[:, None]
        variance = (1 - t) ** 2 + t**2 * std**2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


def points(count=5, dim=7, seed=0):
    return torch.randn(
        count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def test_straight_flow_is_exact_in_one_step():
    x0, x1 = points(seed=1), points(seed=2)
    velocity = lambda x, t, context: x1 - x0
    for steps in (1, 3, 10):
        *_, end = euler(velocity, x0, steps)
        torch.testing.assert_close(end, x1)
    torch.testing.assert_close(one_step(velocity, x0), x1)
    bend, _, cost = straightness(velocity, x0, 10)
    assert bend.max() < 1e-12
    torch.testing.assert_close(cost, (x1 - x0).square().sum(1))


def test_euler_yields_every_state():
    states = list(euler(lambda x, t, context: torch.ones_like(x), torch.zeros(2, 3), 4))
    assert [state[0, 0].item() for state in states] == [0, 0.25, 0.5, 0.75, 1]


def test_gaussian_flow_agrees_with_its_closed_form():
    mean, std, dim = 3.0, 0.4, 50
    x0 = points(400, dim)
    velocity = gaussian_velocity(mean, std)
    *_, end = euler(velocity, x0, 4000)
    assert relative_error(end, mean + std * x0) < 1e-3
    # Along Z_t = t m + γ(t) Z_0 the velocity is m + γ'(t) Z_0, so S = ∫ (std - 1 - γ')² dt E‖Z_0‖².
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    slope = (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2).sqrt()
    expected = torch.trapezoid((std - 1 - slope) ** 2, t).item() * dim
    assert straightness(velocity, x0, 1000)[0].mean().item() == pytest.approx(expected, rel=0.05)


def test_straightness_intervals_agree_with_the_spread_of_repeats():
    model = toy_model(
        "flow", lambda x, s, context: gaussian_velocity(1.0, 0.2)(x, 1 - s / 1000, context)
    )
    repeats = [straightness_figures(model, [""] * 64, range(64 * k, 64 * k + 64), 1.0)
               for k in range(200)]
    for name in ("straightness", "relative_straightness"):
        spread = torch.tensor([result[name] for result in repeats]).std().item()
        reported = torch.tensor([result[f"{name}_interval"] for result in repeats]).mean().item()
        assert 0.8 < 1.96 * spread / reported < 1.25


def test_straightness_needs_two_steps():
    with pytest.raises(AssertionError, match="always straight"):
        straightness(gaussian_velocity(0.0, 1.0), points(), 1)


def test_losses_have_known_values():
    x0, x1, t = (
        points(seed=1).float(), points(seed=2).float(), torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    )
    torch.testing.assert_close(interpolate(x0, x1, t)[0], x0[0])
    torch.testing.assert_close(interpolate(x0, x1, t)[4], x1[4])
    calls = []

    def velocity(x, time, context):
        calls.append((x, time, context))
        return x1 - x0 + 0.5

    torch.testing.assert_close(reflow_loss(velocity, x0, x1, t, "text"), torch.full((5,), 0.25))
    torch.testing.assert_close(calls[0][0], interpolate(x0, x1, t))
    assert calls[0][1] is t and calls[0][2] == "text"
    torch.testing.assert_close(distill_loss(velocity, x0, x1), torch.full((5,), 0.25))
    assert torch.equal(calls[1][0], x0) and torch.equal(calls[1][1], torch.zeros(5))
    # (√(‖e‖² + c²) - c) / d, ‖e‖² = d / 4, c = HUBER d, d = 7
    expected = (7 / 4 + (7 * HUBER) ** 2) ** 0.5 / 7 - HUBER
    torch.testing.assert_close(
        reflow_loss(velocity, x0, x1, t, None, pseudo_huber), torch.full((5,), expected)
    )


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away():
    error = torch.zeros(3, 4, 8, 8)
    c = HUBER * 256
    error[0, 0, 0, 0], error[1, 0, 0, 0], error[2, 0, 0, 0] = c / 100, c / 50, 100 * c
    small, twice, large = (pseudo_huber(error, torch.zeros(3, 4, 8, 8)) * 256).tolist()
    assert twice / small == pytest.approx(4, rel=0.01) and large == pytest.approx(99 * c, rel=0.01)


def test_guidance_scales_the_difference_to_the_unconditional_output():
    network = lambda x, t, context: x * t[:, None] + context
    x, t, context, null = (
        points(4), torch.rand(4).double(), torch.full((4, 7), 2.0).double(),
        torch.zeros(1, 7).double(),
    )
    assert guided(network, null, 1.0) is network
    torch.testing.assert_close(guided(network, null, 0.0)(x, t, context), network(x, t, null))
    expected = network(x, t, null) + 3 * (network(x, t, context) - network(x, t, null))
    torch.testing.assert_close(guided(network, null, 3.0)(x, t, context), expected)


def test_guidance_is_combined_in_fp32():
    """In fp32 the difference of bf16 outputs is exact; bf16 would round the sum to eighths."""
    # Without text, with text.
    outputs = torch.tensor([[1.0, -3.0], [1.0078125, -2.984375]], dtype=torch.bfloat16)
    velocity = guided(lambda x, t, context: outputs, torch.zeros(1, 2), 15.0)(
        torch.zeros(1, 2), torch.zeros(1), torch.ones(1, 2)
    )
    assert velocity.dtype == torch.float32 and velocity.tolist() == [
        [1 + 15 * 0.0078125, -3 + 15 * 0.015625]
    ]


def test_large_seeds_give_distinct_noise():
    """torch's generator alone gives the same noise to seeds that agree in their last 32 bits."""
    seeds = [5, 5 + 2**32, 5 + 2**48, 5 + 2 * 2**48, 5 + 2**48 + 2**24]
    noises = noise_from_seeds(seeds, (4, 8, 8))
    # Uncorrelated, over 256 elements each.
    assert (torch.corrcoef(noises.flatten(1)) - torch.eye(5)).abs().max() < 0.25
    assert noises.dtype == torch.float32 and noises[1:].std().item() == pytest.approx(1, abs=0.1)
    # As in diffusers.
    assert torch.equal(noises[0], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(noises[2], noise_from_seeds(torch.tensor(seeds), (4, 8, 8))[2])


def test_noise_depends_only_on_its_seed():
    together = noise_from_seeds([3, 4, 5], (4, 8, 8))
    assert torch.equal(together[1], noise_from_seeds([4], (4, 8, 8))[0])
    assert not torch.equal(together[0], together[1])
    assert abs(noise_from_seeds(range(200), (4, 8, 8)).std().item() - 1) < 0.01


def test_flow_velocity_passes_the_published_timestep():
    timesteps = []
    flow_velocity(lambda x, s, context: timesteps.append(s) or x)(
        torch.zeros(4, 2), torch.tensor([0.0, 0.25, 0.5, 0.75]), None
    )
    assert timesteps[0].tolist() == [1000, 750, 500, 250]


# Diffusion


def test_schedule_is_stable_diffusions():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha, sigma = SCHEDULE.alpha_sigma(torch.arange(1000))
    torch.testing.assert_close(alpha**2, torch.cumprod(1 - betas, 0))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64))
    assert SCHEDULE.time(torch.tensor([999.0, 0.0])).tolist() == pytest.approx(
        [0.0640, 0.9717], abs=1e-4
    )


def test_timestep_and_time_are_inverse():
    s = torch.linspace(0, 999, 333, dtype=torch.float64)
    torch.testing.assert_close(SCHEDULE.timestep(SCHEDULE.time(s)), s, atol=1e-7, rtol=0)
    t = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    assert SCHEDULE.timestep(t).tolist() == pytest.approx(
        [914.17, 673.16, 353.89, 95.31, 12.93], abs=0.01
    )


@pytest.mark.parametrize("steps", [1, 2, 7, 25])
def test_ddim_is_euler_in_straight_coordinates(steps):
    """Compared with DDIM as in its paper, equation 12 with η = 0."""
    x = expected = points()
    timesteps = SCHEDULE.sampling_timesteps(steps)
    alphas, sigmas = SCHEDULE.alpha_sigma(timesteps)
    grid = list(zip(alphas.tolist(), sigmas.tolist())) + [(1.0, 0.0)]
    for s, (alpha, sigma), (alpha_next, sigma_next) in zip(timesteps, grid, grid[1:]):
        noise = dummy_network(expected, s.repeat(len(x)).double(), None)
        expected = alpha_next * (expected - sigma * noise) / alpha + sigma_next * noise
    velocity, times = diffusion_velocity(dummy_network, SCHEDULE), SCHEDULE.sampling_times(steps)
    *_, end = euler(velocity, diffusion_start(x, SCHEDULE), steps, None, times)
    assert relative_error(end, expected) < 1e-6


def test_diffusion_velocity_of_a_gaussian_is_exact():
    """The best noise prediction for data N(m, std² I) must give the closed-form velocity."""
    mean, std = 0.7, 0.4

    def best_noise(x, s, context):
        alpha, sigma = (v[:, None] for v in SCHEDULE.alpha_sigma(s))
        return sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    x, t = points(), torch.tensor([0.07, 0.2, 0.5, 0.8, 0.97], dtype=torch.float64)
    velocity = diffusion_velocity(best_noise, SCHEDULE)(x, t, None)
    torch.testing.assert_close(velocity, gaussian_velocity(mean, std)(x, t, None))


# Divisors of 1000: otherwise diffusers' DDIM rounds unevenly.
@pytest.mark.parametrize("steps", [1, 2, 4, 10, 20, 25])
@pytest.mark.parametrize(
    "ours, reference", [(ddim, DDIMScheduler), (dpm_solver, DPMSolverMultistepScheduler)]
)
def test_samplers_agree_with_diffusers(steps, ours, reference):
    settings = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                    timestep_spacing="trailing")
    if reference is DDIMScheduler:
        settings |= dict(clip_sample=False, set_alpha_to_one=True)
    scheduler = reference(num_train_timesteps=1000, **settings)
    scheduler.set_timesteps(steps)
    x = points()
    expected = x
    for s in scheduler.timesteps:
        noise = dummy_network(expected, torch.full((len(x),), float(s), dtype=x.dtype), None)
        expected = scheduler.step(noise, s, expected).prev_sample
    states = list(ours(dummy_network, x, steps, SCHEDULE))
    assert len(states) == steps + 1
    assert relative_error(states[-1], expected) < 1e-4


def test_noise_loss_is_the_squared_error_of_the_noise():
    x1, noise, s = (
        points(seed=1), points(seed=2), torch.tensor([0.0, 10.0, 500.0, 900.0, 999.0]).double()
    )
    alpha, sigma = (v[:, None] for v in SCHEDULE.alpha_sigma(s))

    def network(x, timestep, context):
        torch.testing.assert_close(x, alpha * x1 + sigma * noise)
        return noise + 2.0

    torch.testing.assert_close(
        noise_loss(network, SCHEDULE, x1, noise, s, None), torch.full((5,), 4.0).double()
    )


def test_each_kind_is_sampled_with_its_solver():
    seeds = range(3)
    x, prompts = noise_from_seeds(seeds, (7,)), [""] * 3
    sampled = lambda kind, *args, **kwargs: sample_latents(
        toy_model(kind), prompts, seeds, *args, **kwargs
    )
    *_, expected = dpm_solver(dummy_network, x, 5, SCHEDULE)
    torch.testing.assert_close(sampled("diffusion", 5, 1.0), expected)
    *_, expected = ddim(dummy_network, x, 5, SCHEDULE)
    torch.testing.assert_close(sampled("diffusion", 5, 1.0, solver="ddim"), expected)
    *_, expected = euler(flow_velocity(dummy_network), x, 5)
    torch.testing.assert_close(sampled("flow", 5, 1.0), expected)
    *_, expected = euler(flow_velocity(dummy_network), x, 4)  # the model's own steps
    torch.testing.assert_close(sampled("flow", None, 1.0), expected)


# --------------------------------------------------------------------------------------------------
# A device without float64, like Apple's


class OnMps(torch.Tensor):
    """A tensor that reports mps as its device."""


def is_mps(value):
    return (
        isinstance(value, torch.device) and value.type == "mps"
        or isinstance(value, str) and value == "mps"
    )


class WithoutFloat64(TorchFunctionMode):
    """Run calls for mps on the CPU and return their results as OnMps; float64 raises, as on mps."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == torch.Tensor.device.__get__ and isinstance(args[0], OnMps):
            return torch.device("mps")
        leaves, structure = torch.utils._pytree.tree_flatten((args, kwargs))
        marked = any(isinstance(leaf, OnMps) or is_mps(leaf) for leaf in leaves)
        leaves = [torch.device("cpu") if is_mps(leaf) else leaf for leaf in leaves]
        leaves = [leaf.as_subclass(torch.Tensor) if isinstance(leaf, OnMps) else leaf
                  for leaf in leaves]
        args, kwargs = torch.utils._pytree.tree_unflatten(leaves, structure)
        result = function(*args, **kwargs)
        if not marked or function is torch.Tensor.cpu:
            return result
        return torch.utils._pytree.tree_map(self.mark, result)

    @staticmethod
    def mark(value):
        if not isinstance(value, torch.Tensor):
            return value
        if value.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
                "float64"
            )
        return value.as_subclass(OnMps)


def test_simulated_mps_refuses_float64():
    with WithoutFloat64():
        x = torch.zeros(2, device="mps")
        assert (
            isinstance(x + 1, OnMps) and not isinstance(x.cpu(), OnMps)
            and x.cpu().double().dtype == torch.float64
        )
        for make_float64 in (
            lambda: x.double(), lambda: torch.zeros(2).double().to(x.device),
            lambda: x.to(torch.float64),
        ):
            with pytest.raises(TypeError, match="float64"):
                make_float64()


def test_losses_and_samplers_run_without_float64():
    x1, noise, t = (
        points(seed=1).float(), points(seed=2).float(), torch.tensor([0.07, 0.1, 0.5, 0.9, 0.97])
    )

    def results(device):
        x, y, times = x1.to(device), noise.to(device), t.to(device)
        context, null = torch.zeros(5, 7, device=device), torch.zeros(1, 7, device=device)
        velocity = diffusion_velocity(dummy_network, SCHEDULE)
        yield reflow_loss(velocity, y, x, times)
        yield reflow_loss(velocity, y, x, times, None, pseudo_huber)
        yield distill_loss(lambda x, t, context: 0.1 * x, y, x)
        yield noise_loss(dummy_network, SCHEDULE, x, y, 999 * times, None)
        yield noise_loss(dummy_network, SCHEDULE, x, y, (999 * t).round(), None)
        for kind, solver in (("diffusion", "dpm"), ("diffusion", "ddim"), ("flow", "dpm")):
            model = toy_model(kind, device=device)
            yield sample_latents(model, [""] * 5, range(5), 4, 2.0, solver=solver)
        for kind in ("diffusion", "flow"):
            velocity, start, grid = as_flow(dummy_network, kind, y, 4, null, 2.0)
            yield from straightness(velocity, start, 4, context, grid)[1:]

    expected = list(results("cpu"))
    for device, mode in (("cpu", nullcontext()), ("mps", WithoutFloat64())):
        with mode:
            actual = [result.cpu() for result in results(device)]
        assert len(actual) == len(expected) == 12
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a, b)
