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

from command import BadInput
from diffusion import diffusion_velocity
from fewstep import consistency, freeflow, hipa, meanflow, perflow, progressive, rectified_diffusion
from fewstep.steps import SCHEDULE
from rectified_flow import flow_velocity
from stable_diffusion import FewStep
from training import TrainingOptions


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
    learning_rate: float = 1e-6  # for Stable Diffusion; reflow's where none is published

    @property
    def init(self) -> str:
        """The default of --init."""
        return "negated" if self.kind == "flow" else "teacher"

    def velocity(self, unet) -> Callable:
        """The student's network as the velocity that the loss takes."""
        if self.second_time:
            return meanflow.mean_velocity(unet)
        return flow_velocity(unet) if self.kind == "flow" else diffusion_velocity(unet, SCHEDULE)


METHODS = {method.name: method for method in (
    Method("perflow", perflow.loss, perflow.draw, "diffusion", "images",
           FewStep("euler", 4, tuple(range(4, 101, 4))), learning_rate=8e-5),
    Method("progressive", progressive.loss, progressive.draw, "flow", "images",
           FewStep("euler", 1, (1,))),
    Method("lcm", consistency.lcm, consistency.draw_lcm, "diffusion", "images",
           FewStep("renoise", 4), target="ema"),
    Method("mlcm", consistency.mlcm_segments, consistency.draw_mlcm, "diffusion", "prompts",
           FewStep("renoise", 4, (1, 2, 4, 8)), target="student"),
    Method("scott", consistency.scott, consistency.draw_scott, "diffusion", "images",
           FewStep("renoise", 4), target="ema"),
    Method("rectified-diffusion", rectified_diffusion.loss, rectified_diffusion.draw, "diffusion",
           "pairs", FewStep("euler", 4), teacher=False, learning_rate=5e-6),
    Method("re-meanflow", meanflow.loss, meanflow.draw, "flow", "pairs", FewStep("mean", 1),
           teacher=False, target="student", second_time=True),
    # Its LoRA starts at zero, so the weights have further to go.
    Method("hipa", hipa.loss, lambda count, generator: (), "diffusion", "pairs",
           FewStep("euler", 1, (1,)), teacher=False, learning_rate=1e-4),
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


def rounds_of(method: Method, options: TrainingOptions) -> list[Round]:
    """The rounds of a method, which share `options.iterations` and its warm-up."""
    parts = {method.name: method}
    if method.name == "progressive":
        parts = {f"{n} steps": replace(
            method, loss=partial(method.loss, steps=n, diffusion=n == progressive.ROUNDS[0]),
            few_step=FewStep("euler", n, (n,))) for n in progressive.ROUNDS}
    elif method.name == "mlcm":
        parts = {"segments": method, "edges": replace(method, loss=consistency.mlcm_edges)}
    each, left = divmod(options.iterations, len(parts))
    if not each:
        raise BadInput(f"--iterations {options.iterations}: {method.name} trains in {len(parts)} "
                       "rounds; give at least one iteration for each")
    warmup, rounds = options.warmup_samples // len(parts), []
    for k, (name, part) in enumerate(parts.items()):
        iterations = each + left * (k == len(parts) - 1)
        own = replace(options, iterations=iterations, warmup_samples=warmup, name=name)
        folder = name.replace(" ", "-") if len(parts) > 1 else ""
        suffix = f"-{part.few_step.steps}" if part.few_step != method.few_step else ""
        rounds.append(Round(part, own, folder, suffix, k * each))
    return rounds
