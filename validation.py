"""Validate a run at every save.

    held_out_loss          the run's own loss on held-out captions and noises, also by t
    straightness           of the paths on the validation prompts (evaluation/figures.py)
    OUT.state/samples/     the same prompts and seeds in 1, 4 and 25 steps, beside the teacher
    OUT                    the model so far, for sample.py and evaluate.py

The held-out captions are the last hundredth of the list; their pairs are in PAIRS/held-out/. The
averaged (EMA) weights are validated, before the first iteration and at every --save-every.
"""

import argparse
import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
from command import BadInput, DefaultByModel, barrier, non_negative_int, rank, write_atomically
from evaluation.figures import straightness_figures
from evaluation.plots import plot_loss, save_comparison, steps_label
from formats.prompts import read_prompts
from pairs import Pairs, make_pairs, prompt_spec
from sample import sample_images, seed_range
from stable_diffusion import StableDiffusion
from training import TIME_BINS, TrainingOptions, append_metrics, read_metrics

STEPS = (1, 4, 25)  # of the images; a one-step model takes 1
NUM_PROMPTS = 8
VALIDATION_PAIRS = DefaultByModel(64, 128)


def add_validation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("validation").add_argument
    add("--validation-pairs", type=non_negative_int, default=VALIDATION_PAIRS,
        help="held-out pairs to measure the loss on at every save; 0: no validation")
    add("--validation-prompts", help="file whose first prompts are sampled at every save")
    add("--keep", type=non_negative_int, default=0,
        help="models of earlier saves to keep in OUT.state/models/, beside the last")


# --------------------------------------------------------------------------------------------------
# Before the run


def validation_prompts(args: argparse.Namespace, captions: list[str]) -> list[str]:
    """What to sample at every save. BadInput: no such file, too many pairs, useless flags."""
    if not args.validation_pairs:
        if args.validation_prompts or args.keep:
            flag = "--validation-prompts" if args.validation_prompts else "--keep"
            raise BadInput(f"{flag}: needs validation, which --validation-pairs 0 turns off")
        return []
    seed_range("validation", args.seed, args.validation_pairs + NUM_PROMPTS)
    if args.validation_prompts:
        return read_prompts(args.validation_prompts, args.prompt_column)[:NUM_PROMPTS]
    count = min(NUM_PROMPTS, len(captions))
    return [captions[k * len(captions) // count] for k in range(count)]


@dataclass
class Reference:
    """What a run is validated against: held-out pairs, and the teacher's images."""

    pairs: Pairs
    prompts: list[str]
    seeds: range
    images: Tensor  # (N, 3, H, W), the teacher's
    teacher_steps: int
    out: str
    keep: int
    batch_size: int | None  # of images, beside a training; None: as when sampling


def validation_data(
    teacher: StableDiffusion, captions: list[str], prompts: list[str], spec: dict,
    args: argparse.Namespace,
) -> Reference | None:
    """Held-out pairs of `captions` and the teacher's images of `prompts`; None: no validation."""
    count = args.validation_pairs
    if not count:
        return None
    held_out = spec | prompt_spec(captions, f"{spec['prompts']}, held out")
    held_out |= {"first_seed": seed_range("validation", args.seed, count)[0], "count": count}
    pairs = make_pairs(teacher, captions, held_out, Path(args.pairs) / "held-out",
                       args.teacher_batch_size, args.repair)
    seeds = seed_range("validation", args.seed, len(prompts), start=count)
    batch_size = None if teacher.is_tiny else 1  # a training leaves little memory
    images = sample_images(teacher, prompts, seeds, spec["steps"], spec["guidance"],
                           batch_size=batch_size)
    return Reference(pairs, prompts, seeds, images, spec["steps"], args.out, args.keep, batch_size)


def held_out_batches(reference: Reference) -> list[tuple]:
    """The held-out pairs as distillation's loss takes them: (x0, x1, prompts)."""
    size = 4 if reference.batch_size else 64
    indices = torch.arange(len(reference.pairs))
    return [reference.pairs[part] for part in indices.split(size)]


def batches_by_t(reference: Reference) -> list[tuple]:
    """As reflow's loss takes them, at fixed t: (x0, x1, t, prompts)."""
    times = [(k + 0.5) / TIME_BINS for k in range(TIME_BINS)]
    return [(x0, x1, torch.full((len(x0),), t), prompts)
            for x0, x1, prompts in held_out_batches(reference) for t in times]


# --------------------------------------------------------------------------------------------------
# During the run


@torch.no_grad()
def validate(
    student: StableDiffusion, ema: nn.Module, reference: Reference,
    batches: list[tuple], options: TrainingOptions, folder: Path, step: int, loss: Callable,
    before: int = 0, finish: Callable = lambda model: model,
) -> None:
    """Measure, sample and save the averaged weights; add a row to the folder's metrics.jsonl.

    batches: held-out data for the loss, at most one t in each. before: iterations of earlier
    stages. finish(model): the model as it is saved. The first process works, the others wait.
    """
    seen = any(row["step"] == step for row in read_metrics(folder, "held_out_loss"))
    if rank() == 0 and not seen:  # seen: a killed run continues at a validated state
        model, done = replace(student, unet=on_device(ema, student.device)), before + step
        figures = held_out_loss(model.unet, batches, loss, model.device)
        model = finish(model)
        state = Path(reference.out + ".state")
        if step or not before:  # else the last stage's images stay
            rows = [(f"teacher\n{steps_label(reference.teacher_steps)}", reference.images)]
            for steps in model.allowed_steps(STEPS):
                images = sample_images(model, reference.prompts, reference.seeds, steps,
                                       batch_size=reference.batch_size)
                rows.append((f"{done:,} iterations\n{steps_label(steps)}", images))
            save_comparison(str(state / "samples" / f"{done:07d}.png"), rows, reference.prompts)
        if model.has_path:
            straight = straightness_figures(model, reference.prompts, reference.seeds,
                                            model.guidance)
            figures["relative_straightness"] = straight["relative_straightness"]
        if step:
            checkpoint.save(model, reference.out)
            keep_model(reference, state / "models", done)
        append_metrics(folder, {"step": step, "samples": step * options.batch_size} | figures)
        plot_loss(folder)
    barrier()


def held_out_loss(unet, batches: list[tuple], loss: Callable, device: torch.device) -> dict:
    """Mean loss over held-out batches, also for each t."""
    by_t = {}
    for batch in batches:
        each, t = loss(unet, *(x.to(device) if isinstance(x, Tensor) else x for x in batch))
        by_t.setdefault(t if t is None else t[0].item(), []).append(each.float().cpu())
    means = [torch.cat(losses).mean().item() for losses in by_t.values()]
    return {"held_out_loss": sum(means) / len(means),
            "held_out_loss_by_t": [] if None in by_t else means}


def on_device(ema: nn.Module, device: torch.device) -> nn.Module:
    """The EMA network; with --ema-device cpu, a copy of it on the device."""
    is_there = all(weight.device == device for weight in ema.parameters())
    return ema if is_there else copy.deepcopy(ema).to(device)


def keep_model(reference: Reference, folder: Path, done: int) -> None:
    """Copy OUT as the model of this iteration, and delete all but the last --keep + 1 copies."""
    if reference.keep:
        write_atomically(folder / f"{done:07d}.safetensors",
                         lambda path: shutil.copyfile(reference.out, path))
        for old in sorted(folder.glob("*.safetensors"))[: -reference.keep - 1]:
            old.unlink()

