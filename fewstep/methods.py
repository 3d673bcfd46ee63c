"""The methods beside InstaFlow, as a table: what each trains on, what its loss calls, its sampler.

    perflow               straighten the path window by window, from images
    progressive           one step learns what two steps do, in rounds of 8, 4, 2 and 1 steps
    lcm, mlcm, scott      consistency: every point of a path must give the same end
    rectified-diffusion   reflow that keeps Stable Diffusion's noise prediction and schedule
    re-meanflow           the mean velocity of a whole step, on pairs; a second time as input
    hipa                  a LoRA for a single step, with a loss on high frequencies
    freeflow              follow the teacher's path from noise alone

All of them distill the teacher's guidance, so their models are sampled without guidance.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from command import BadInput
from diffusion import diffusion_velocity
from fewstep import consistency, freeflow, hipa, meanflow, perflow, progressive, rectified_diffusion
from fewstep.steps import SCHEDULE
from rectified_flow import flow_velocity
from reflow import CAPTION_DROPOUT
from stable_diffusion import FewStep
from training import TrainingOptions


class Part(NamedTuple):
    """A round of a method's training, by what differs from the method's other rounds."""

    name: str  # of its folder in OUT.state
    loss: Callable
    share: int = 1  # of the iterations, beside the other rounds' shares
    rate: float = 1.0  # its learning rate, in units of the method's
    few_step: FewStep | None = None  # of its model, where that is saved too
    teaches: bool = False  # is its student the next round's teacher?


@dataclass(frozen=True)
class Method:
    name: str
    loss: Callable  # loss(student, x0, x1, context, *random, teacher=, target=): (B,)
    draw: Callable  # draw(count, generator): the random numbers of each sample, beside its noise
    kind: str  # what the student predicts: noise ("diffusion") or velocity ("flow")
    data: str  # "pairs", "images" X1 with fresh noise, or "prompts" alone
    few_step: FewStep  # how its model is sampled
    teacher: bool = True  # does the loss call the frozen teacher?
    target: str = ""  # a network without gradients that it calls: the "student" or its "ema"
    second_time: bool = False
    matched: bool = False  # refit the teacher's time embedding to the flow's time?
    critic: bool = False  # does one train beside the student (critic.py)?
    guidance: float | None = None  # of the teacher in the loss; None: the pairs'
    dropout: float = 0.0  # fraction of the captions left out, so that the student can be guided
    lora: str = ""  # where a LoRA trains in place of all weights: "attention" or "everywhere"
    learning_rate: float = 1e-6  # for Stable Diffusion; reflow's where we found none published
    rounds: tuple[Part, ...] = ()  # (): a single one, with `loss`

    @property
    def init(self) -> str:
        """The default of --init."""
        return "negated" if self.kind == "flow" else "teacher"

    def velocity(self, unet) -> Callable:
        """The student's network as the velocity that the loss takes."""
        if self.second_time:
            return meanflow.mean_velocity(unet)
        return flow_velocity(unet) if self.kind == "flow" else diffusion_velocity(unet, SCHEDULE)


def halvings(loss: Callable) -> tuple[Part, ...]:
    """The rounds of progressive distillation; those to 2 and 1 steps take twice as long."""
    return tuple(Part(f"{n}-steps", partial(loss, steps=n, diffusion=n == progressive.ROUNDS[0]),
                      share=1 + (n <= 2), few_step=FewStep("euler", n, (n,)), teaches=n > 1)
                 for n in progressive.ROUNDS)


METHODS = {method.name: method for method in (
    Method("perflow", perflow.loss, perflow.draw, "diffusion", "images",
           FewStep("euler", 4, tuple(range(4, 101, 4))), learning_rate=8e-5),
    Method("progressive", progressive.loss, progressive.draw, "diffusion", "images",
           FewStep("euler", 1, (1,)), rounds=halvings(progressive.loss)),
    Method("lcm", consistency.lcm, consistency.draw_lcm, "diffusion", "images",
           FewStep("renoise", 4), target="ema", learning_rate=8e-6),
    Method("mlcm", consistency.mlcm_segments, consistency.draw_mlcm, "diffusion", "prompts",
           FewStep("renoise", 4, (1, 2, 4, 8)), target="student", learning_rate=1e-4,
           # TLCM: 12,000 and 2,000 iterations at 1e-4 and 1e-5
           rounds=(Part("segments", consistency.mlcm_segments, share=6),
                   Part("edges", consistency.mlcm_edges, rate=0.1))),
    Method("scott", consistency.scott, consistency.draw_scott, "diffusion", "images",
           FewStep("renoise", 4), target="ema", critic=True, learning_rate=8e-6),
    Method("rectified-diffusion", rectified_diffusion.loss, rectified_diffusion.draw, "diffusion",
           "pairs", FewStep("euler", 4), teacher=False, dropout=CAPTION_DROPOUT,
           learning_rate=5e-6),
    Method("re-meanflow", meanflow.loss, meanflow.draw, "flow", "pairs", FewStep("mean", 1),
           teacher=False, target="student", second_time=True, matched=True,
           dropout=meanflow.DROPOUT, learning_rate=2e-4),
    # Its LoRA starts at zero, so the weights have further to go.
    Method("hipa", hipa.loss, lambda count, generator: (), "diffusion", "pairs",
           FewStep("euler", 1, (1,)), teacher=False, lora="attention", learning_rate=1e-4),
    Method("freeflow", freeflow.loss, freeflow.draw, "flow", "prompts", FewStep("mean", 1, (1,)),
           target="student", second_time=True),
)}


@dataclass(frozen=True)
class Round:
    """One training of a method; most methods have one."""

    method: Method  # with this round's loss and sampler
    options: TrainingOptions
    folder: str  # of its state, in OUT.state
    suffix: str  # of its model's name, if another round makes OUT
    before: int  # iterations of earlier rounds
    teaches: bool  # is its student the next round's teacher?


def rounds_of(method: Method, options: TrainingOptions) -> list[Round]:
    """The rounds of a method, which share `options.iterations` and its warm-up.

    BadInput: too few iterations for all rounds.
    """
    parts = method.rounds or (Part("", method.loss),)
    total, rounds = sum(part.share for part in parts), []
    ends = [options.iterations * done // total for done in accumulate(p.share for p in parts)]
    for part, start, end in zip(parts, [0, *ends], ends):
        if start == end:
            raise BadInput(f"--iterations {options.iterations}: {method.name} trains in "
                           f"{len(parts)} rounds; give at least {total}")
        few_step = part.few_step or method.few_step
        own = replace(options, iterations=end - start, name=part.name or method.name,
                      learning_rate=options.learning_rate * part.rate,
                      warmup_samples=options.warmup_samples * part.share // total)
        suffix = f"-{few_step.steps}" if few_step != method.few_step else ""
        rounds.append(Round(replace(method, loss=part.loss, few_step=few_step), own, part.name,
                            suffix, start, part.teaches))
    return rounds
