"""Rectified Diffusion: train on pairs as reflow does, but keep Stable Diffusion's prediction.

    X_t = (1 - t) X0 + t X1 of a pair, which is x_s = α X1 + σ X0 with another scale
    min_ε  E H(end(X_t, t), X1)          end: the data prediction from the predicted noise

Reflow turns a noise-predicting network into one that predicts velocity on all of [0, 1], and spends
much of its training on this change. The paper claims that the pairing of noise and image helps, not
the straight form. So the network keeps noise prediction and its schedule. After
diffusion.py's change of variables this is reflow on t >= 0.064 with another distance: pseudo-Huber
on data predictions, which gives the noise end more weight.

A tenth of the captions is left out, so that the student can be guided too; compare.py measures it
both ways. Differs from the paper: its second stage, a consistency loss, is not implemented; the
fraction of captions left out is reflow's, because the released code does not give its own; that
code also replaces Stable Diffusion's schedule by one with linear β.

Wang et al. 2024 (arXiv 2410.07303); the distance is the one in its released code.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.steps import elementwise_huber, end, schedule_time
from rectified_flow import Distance, Velocity, interpolate


def draw(count: int, generator: torch.Generator) -> tuple[Tensor]:
    """A fraction of the schedule, (count,)."""
    return (torch.rand(count, generator=generator),)


def loss(
    student: Velocity, x0: Tensor, x1: Tensor, context, fraction: Tensor, *,
    distance: Distance = elementwise_huber, times: Callable = schedule_time,
) -> Tensor:
    """(B,). x0 and x1 of a pair; times(fraction): t; for a flow, the fraction itself."""
    t = times(fraction)
    return distance(end(student, interpolate(x0, x1, t), t, context), x1)
