"""Metrics with their confidence intervals, on features of images and on a model's paths.

    frechet            ‖m1 - m2‖² + tr(C1 + C2 - 2 (C1 C2)^½)       Heusel et al. 2017 (1706.08500)
    precision, recall  fraction of one set that falls among the other    Kynkäänniemi et al. 2019
    straightness       S along the model's own path                  rectified_flow.py
"""

import math
import platform
import statistics
from pathlib import Path

import torch
from torch import Tensor

from command import BadInput
from diffusion import as_flow
from rectified_flow import straightness
from sample import noise_from_seeds
from training import read_metrics

GRADES = ("caption_accuracy", "frechet", "precision", "recall")
NEIGHBOURS = 3  # k of precision and recall, as in their paper
FEWEST_SAMPLES = NEIGHBOURS + 2  # that precision and recall need
STRAIGHTNESS_STEPS = 25
STRAIGHT = ("straightness", "relative_straightness", "transport_cost")


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The distance between Gaussians fitted to two sets of features, (N, D) and (M, D)."""
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr (C1 C2)^½ is the sum of the roots of C1 C2's eigenvalues. The symmetric C1^½ C2 C1^½ has
    # the same eigenvalues.
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * product).item()


def precision_recall(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """Fraction of generated features (N, D) among real ones (M, D), and of real among generated.

    A point lies among a set if it is closer to some member than that member's k-th nearest
    neighbour in the set. Duplicates count once: a duplicate would be its own neighbour.
    """

    def fraction_among(points: Tensor, members: Tensor) -> float:
        members = members.unique(dim=0)
        # k + 1, since the nearest member is the member itself; fewer where a model repeats itself.
        k = min(NEIGHBOURS + 1, len(members))
        radius = torch.cdist(members, members).kthvalue(k, dim=1).values
        return (torch.cdist(points, members) <= radius).any(1).double().mean().item()

    return fraction_among(generated, real), fraction_among(real, generated)


@torch.inference_mode()
def straightness_figures(model, prompts: list[str], seeds, guidance: float) -> dict:
    """S of the model's own path, S / E‖Z1 - Z0‖², the transport cost E‖Z1 - Z0‖², and S by t.

    A diffusion is treated as a flow, on the part of [0, 1] that its schedule covers. Intervals are
    over samples.
    """
    steps = STRAIGHTNESS_STEPS
    noise = noise_from_seeds(seeds, model.latent_shape()).to(model.device)
    null_context, context = model.encode_prompts([""]), model.encode_prompts(prompts)
    velocity, start, times = as_flow(model.unet, model.kind, noise, steps, null_context, guidance)
    each, deviations, cost = straightness(velocity, start, steps, context, times)
    mean, interval = with_interval(each.tolist())
    ratio = each.mean() / cost.mean()
    # Of a ratio of means, to first order.
    _, ratio_interval = with_interval(((each - ratio * cost) / cost.mean()).tolist())
    profile = (deviations.mean(1) / cost.mean()).tolist()
    return {
        "straightness": mean, "straightness_interval": interval,
        "relative_straightness": ratio.item(), "relative_straightness_interval": ratio_interval,
        "transport_cost": cost.mean().item(),
        "straightness_profile": list(zip(times.tolist(), profile)),
    }


def with_interval(values: list[float | None]) -> tuple[float | None, float | None]:
    """The mean over repeats, and half the width of its 95 % interval by Student's t.

    None for values that are missing; NaN, without an interval, for infinite ones.
    """
    count = len(values)
    if None in values:
        return None, None
    if not all(map(math.isfinite, values)):
        return math.nan, None
    mean = statistics.fmean(values)
    if count == 1:
        return mean, None
    from scipy import stats  # slow to import, and only repeats need it

    width = stats.t.ppf(0.975, count - 1).item()
    return mean, width * statistics.stdev(values) / count**0.5


def with_intervals(rows: list[dict], names=GRADES) -> dict:
    """The mean of each of these columns over the rows, and its interval as <name>_interval."""
    means = {}
    for name in names:
        means[name], means[f"{name}_interval"] = with_interval([row[name] for row in rows])
    return means


def paired_differences(rows: list[dict], others: list[dict], names=GRADES) -> list[dict]:
    """These columns of rows minus those of others, paired by seed: a row for each seed in both."""
    by_seed = {row["seed"]: row for row in others}
    minus = lambda a, b: None if a is None or b is None else a - b
    return [{name: minus(row[name], by_seed[row["seed"]][name]) for name in names}
            for row in sorted(rows, key=lambda row: row["seed"]) if row["seed"] in by_seed]


def machine_name(device: torch.device) -> str:
    """The GPU, or the CPU and its threads, for reports of measurements."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def minutes_of(folder: Path, steps: int | None = None) -> float:
    """Minutes that a training takes, or its first steps: by its median seconds a step.

    Pauses do not count. BadInput: its metrics are lost.
    """
    rows = read_metrics(folder)
    if not rows:
        raise BadInput(f"{folder}: its metrics.jsonl is missing, so its minutes are unknown; "
                       "delete the model that was trained there, to train it again")
    seconds = statistics.median(row["seconds_per_step"] for row in rows)
    return round((steps or rows[-1]["step"]) * seconds / 60, 1)
