"""Figures of merit: what is measured on features of pictures, and on paths. With their intervals.

    frechet            ‖m1 - m2‖² + tr(C1 + C2 - 2 (C1 C2)^½)       Heusel et al. 2017 (1706.08500)
    precision, recall  shares of one set of features among the other  Kynkäänniemi et al. 2019
    straightness       S along a model's own path                     rectified_flow.py
"""

import platform
import statistics
from pathlib import Path

import scipy.stats
import torch
from torch import Tensor

from rectified_flow import path_bends
from sample import as_path

GRADES = ("caption_accuracy", "frechet", "precision", "recall")
NEIGHBOURS = 3  # of precision and recall, as in their paper
NORMAL_95 = 1.96  # standard errors of a 95 % interval
STRAIGHTNESS_STEPS = 25
STRAIGHT = ("straightness", "relative_straightness", "transport_cost")


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between normal distributions fitted to two sets of features (N, D) and (M, D)."""
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr (C1 C2)^½ is the sum of the roots of C1 C2's eigenvalues, which are those of C1^½ C2 C1^½,
    # a symmetric matrix.
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * product).item()


def precision_recall(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """Shares of the generated features (N, D) among the real ones (M, D), and the other way round.

    "Among" is: nearer to one of them than that one's k-th nearest neighbour in its own set, where a
    point that is there more than once counts as one: it would have itself for a neighbour.
    """

    def share(points: Tensor, among: Tensor) -> float:
        among = among.unique(dim=0)
        # The nearest to a point is itself. A model that draws the same always has no neighbours.
        rank = min(NEIGHBOURS + 1, len(among))
        reach = torch.cdist(among, among).kthvalue(rank, dim=1).values
        return (torch.cdist(points, among) <= reach).any(1).double().mean().item()

    return share(generated, real), share(real, generated)


@torch.inference_mode()
def straightness_figures(model, prompts: list[str], seeds, guidance: float) -> dict:
    """S of the model's own path, S / E‖Z1 - Z0‖², the transport cost E‖Z1 - Z0‖², and S by t.

    A diffusion is looked at as a flow, on the part of [0, 1] that it covers. Intervals are over
    samples.
    """
    velocity, start, times, context = as_path(model, prompts, seeds, STRAIGHTNESS_STEPS, guidance)
    bends, cost = path_bends(velocity, start, STRAIGHTNESS_STEPS, context, times)
    bend = times.diff() / (times[-1] - times[0]) @ bends  # (B,)
    ratio, root = bend.mean() / cost.mean(), max(len(bend) - 1, 1) ** 0.5
    # The standard error of a ratio of means, to first order.
    ratio_error = (bend - ratio * cost).square().mean().sqrt() / cost.mean() / root
    profile = (bends.mean(1) / cost.mean()).tolist()
    return {
        "straightness": bend.mean().item(),
        "straightness_interval": NORMAL_95 * bend.std(correction=0).item() / root,
        "relative_straightness": ratio.item(),
        "relative_straightness_interval": NORMAL_95 * ratio_error.item(),
        "transport_cost": cost.mean().item(),
        "straightness_profile": list(zip(times.tolist(), profile)),
    }


def with_interval(figures: list[float | None]) -> tuple[float | None, float | None]:
    """The mean over repeats and its 95 % interval (half its width), by Student's t."""
    count = len(figures)
    if None in figures:
        return None, None
    mean = statistics.fmean(figures)
    if count == 1:
        return mean, None
    width = scipy.stats.t.ppf(0.975, count - 1).item()
    return mean, width * statistics.stdev(figures) / count**0.5


def machine_name(device: torch.device) -> str:
    """What a measured figure is said to be measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"
