"""Rectified Diffusion: train on pairs as reflow does, and keep Stable Diffusion as it is.

    X_t = (1 - t) X0 + t X1 of a pair, which is x_s = α X1 + σ X0 with another scale
    min_ε  E H(end(X_t, t), X1)          end: the picture that the predicted noise leads to

Reflow turns a network that predicts noise into one that predicts velocity, on the whole of [0, 1],
and much of its training is spent on that. The paper's claim: what helps is the pairing of noise and
picture, not the straight form; so keep noise prediction and schedule, and nothing is relearned. By
the change of variables of diffusion.py this is reflow in another parametrisation, on t from 0.064,
with another distance: pseudo-Huber of predicted pictures, which counts the noise end more.

Differs from the paper: no dropped prompts, and the second stage (a consistency loss) is not made.

Wang et al. 2024 (arXiv 2410.07303); the loss is that of its released code.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.steps import at, end, huber_each
from rectified_flow import Distance, Velocity, interpolate


def draw(count: int, generator: torch.Generator) -> tuple[Tensor]:
    """A place on the schedule, (count,)."""
    return (torch.rand(count, generator=generator),)


def loss(
    student: Velocity, x0: Tensor, x1: Tensor, context, place: Tensor, *,
    distance: Distance = huber_each, times: Callable = at,
) -> Tensor:
    """(B,). x0 and x1 of a pair; times: of the places, for a flow the places themselves."""
    t = times(place)
    return distance(end(student, interpolate(x0, x1, t), t, context), x1)
