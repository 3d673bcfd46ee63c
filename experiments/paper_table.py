"""The paper's table on the tiny model: does distilling the teacher directly fail? Does reflow help?

    python experiments/paper_table.py                   seeds 0, 1 and 2; hours on 2 CPU cores
    python experiments/paper_table.py --num-seeds 1 --parts direct      some rows; others are kept
    python experiments/paper_table.py --captions emoji                  on the emoji dataset
    python experiments/paper_table.py --captions mixed --asked full     measured on other captions

The captions leave much open ("a shape and a red square"), so many images match one. For each seed:

    part       row
    teacher    drawn                         real images against other real images
               teacher                       at 25, 8, 4, 2, 1 steps of DPM-Solver++
    reflow     2-RF                          at 25, 8, 4, 2, 1 Euler steps; --iterations
               2-RF + distill                after 1/4, 1/2 and 1 times --iterations in L2
               2-RF + distill + LPIPS        then --lpips-iterations
    direct     teacher + distill             after 1/4, 1/2, 1, 2 and 4 times (--budgets)
               teacher + distill + LPIPS     then --lpips-iterations, from 1 time on
    third      3-RF, 3-RF + distill          a second reflow, and one step from it
    stacked    2-RF + distill, stacked       two U-Nets in series (distill.py --student stacked)

The learning rate decays over the last part of each training (--cooldown), so each budget is a
training of its own. Every student starts from its teacher's weights, a diffusion's negated
(stable_diffusion.initial_student). All seeds share the teacher's pairs, of 8 steps: nearly as good
as 25 (the table shows both) at a third of the cost. The number of pairs matters much, because a
student that sees few pairs often memorises them: --num-pairs 3000 is such a study.

Writes study.json (a row for each seed, explained in evaluation/study.py), study.md (means with 95 %
intervals over seeds), study.png (one-step quality against samples) and study-pictures-SEED.png
(every row on the same captions and noises).
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import distill
import reflow
from command import (
    BadInput, non_negative, non_negative_int, pick_device, positive, run, solver_steps,
    write_atomically, write_text,
)
from evaluation.figures import minutes_of, with_interval
from evaluation.perceptual import perceptual_distance
from evaluation.plots import COLOURS, grouped, markdown_table
from evaluation.study import (
    CAPTIONS, COSTS, FIGURES, Study, dataset_of, footer, open_table, save_images, study_of,
    study_parser,
)
from rectified_flow import Distance, squared
from stable_diffusion import StableDiffusion
from training import ema_copy, train
from unet import stack

PARTS = ("teacher", "reflow", "direct", "third", "stacked")
# At L2's 5e-4, the LPIPS of the training pairs rises from the first iterations.
LPIPS_LEARNING_RATE = 1e-4
KEYS = ("row", "updates", "steps")


def reflowed(study: Study, teacher: StableDiffusion, name: str) -> StableDiffusion:
    """The flow of this name: from its file, or trained on the teacher's pairs."""
    path = study.folder / f"{name}.safetensors"
    if not path.exists():
        model, pairs = replace(study.new_student(teacher), kind="flow"), study.pairs_of(teacher)
        options = study.options(model.unet, study.args.iterations, "reflow")
        train(model.unet, ema_copy(model.unet), partial(reflow.batch, pairs, study.seed),
              partial(reflow.loss, model.encode_prompts, squared), options, study.folder / name, {})
        checkpoint.save(model, path, None)
    return study.load(path)


def distilled(
    study: Study, teacher: StableDiffusion, name: str, iterations: int, stacked: bool = False,
) -> StableDiffusion:
    """The one-step model of this name: from its file, or trained in L2 on the teacher's pairs."""
    path = study.folder / f"{name}.safetensors"
    if not path.exists():
        model, pairs = replace(study.new_student(teacher), kind="one-step"), study.pairs_of(teacher)
        if stacked:
            model.unet = stack(model.unet)
        options = study.options(model.unet, iterations, "distill, L2")
        train(model.unet, ema_copy(model.unet), partial(distill.batch, pairs, study.seed, 0),
              partial(distill.loss, model.encode_prompts, squared), options, study.folder / name,
              {})
        checkpoint.save(model, path, None)
    return study.load(path)


def continued_in_lpips(
    study: Study, teacher: StableDiffusion, student: StableDiffusion, name: str, iterations: int,
    lpips: Distance,
) -> StableDiffusion:
    """The model of this name: from its file, or the student, after so many iterations, in LPIPS."""
    path = study.folder / f"{name}.safetensors"
    if not path.exists():
        model, pairs = study.new_student(student), study.pairs_of(teacher)
        options = study.options(model.unet, study.args.lpips_iterations, "distill, LPIPS",
                                LPIPS_LEARNING_RATE)
        distance, seen = distill.perceptual(model.vae, lpips), iterations * options.batch_size
        train(model.unet, ema_copy(model.unet), partial(distill.batch, pairs, study.seed, seen),
              partial(distill.loss, model.encode_prompts, distance), options, study.folder / name,
              {})
        checkpoint.save(model, path, None)
    return study.load(path)


def costs_of(study: Study, before: dict[str, int], own: dict[str, int]) -> dict:
    """The columns of COSTS. before, own: trainings, as folder -> iterations."""
    size, every = study.args.batch_size, before | own
    minutes = sum(minutes_of(study.folder / name, count) for name, count in every.items())
    return {"samples": sum(every.values()) * size, "own_samples": sum(own.values()) * size,
            "minutes": minutes}


def measure_students(
    study: Study, teacher: StableDiffusion, row: str, before: dict[str, int], budgets: list[int],
    lpips: Distance | None = None, stacked: bool = False,
) -> None:
    """Distill the teacher, and measure the students, at each of the budgets of iterations.

    before: the trainings that led to the teacher. lpips: continue in it, from --iterations on.
    """
    name, extra = row.replace(" ", ""), study.args.lpips_iterations
    for iterations in budgets:
        own = {f"{name}-{iterations}": iterations}
        student = distilled(study, teacher, f"{name}-{iterations}", iterations, stacked)
        study.record(row, student, iterations, teacher, **costs_of(study, before, own))
        if lpips and extra and iterations >= study.args.iterations:
            longer = f"{name}-{iterations}-lpips"
            end = continued_in_lpips(study, teacher, student, longer, iterations, lpips)
            costs = costs_of(study, before, own | {longer: extra})
            study.record(f"{row} + LPIPS", end, iterations + extra, teacher, **costs)


def measure_seed(study: Study, lpips: Distance) -> None:
    """Measure every row of one seed, each after the rows that it needs."""
    n, parts = study.args.iterations, study.args.parts
    budgets = sorted(round(n * budget) for budget in study.args.budgets)
    teacher = study.load_teacher()
    if "teacher" in parts:
        study.record_real()
        study.record("teacher", teacher, 0, **costs_of(study, {}, {}))
    if "direct" in parts:
        measure_students(study, teacher, "teacher + distill", {}, budgets, lpips)
    if not {"reflow", "third", "stacked"} & set(parts):
        return
    flow2 = reflowed(study, teacher, "2rf")
    if "reflow" in parts:
        study.record("2-RF", flow2, n, **costs_of(study, {}, {"2rf": n}))
        up_to_n = [iterations for iterations in budgets if iterations <= n]
        measure_students(study, flow2, "2-RF + distill", {"2rf": n}, up_to_n, lpips)
    if "third" in parts:
        flow3 = reflowed(study, flow2, "3rf")
        study.record("3-RF", flow3, 2 * n, **costs_of(study, {"2rf": n}, {"3rf": n}))
        measure_students(study, flow3, "3-RF + distill", {"2rf": n, "3rf": n}, [n])
    if "stacked" in parts:
        measure_students(study, flow2, "2-RF + distill, stacked", {"2rf": n}, [n], stacked=True)


# --------------------------------------------------------------------------------------------------
# What is written


def summary_of(rows: list[dict]) -> list[dict]:
    """A line for each row, updates and steps: means with 95 % intervals over seeds."""
    summary = []
    for key, group in grouped(rows, KEYS).items():
        line = dict(zip(KEYS, key))
        for name in FIGURES:
            line[name], line[f"{name}_interval"] = with_interval([row[name] for row in group])
        line |= {name: with_interval([row[name] for row in group])[0] for name in COSTS}
        summary.append(line | {"seeds": len(group)})
    return summary


def save_curves(path: Path, summary: list[dict]) -> None:
    """One-step quality, and the error on held-out pairs, against training samples."""
    figure = Figure(figsize=(16, 3.8), layout="constrained")
    panels = ("held_out_error", "frechet", "caption_accuracy", "recall")
    thousands = lambda lines, name="samples": [line[name] / 1000 for line in lines]
    one_step = [line for line in summary if line["held_out_error"] is not None]
    axes = figure.subplots(1, len(panels))
    for axis, name in zip(axes, panels):
        markers = iter("*^vPX")
        for (row,), lines in grouped(one_step, ("row",)).items():
            values = [line[name] for line in lines]
            bars = [line[f"{name}_interval"] or 0 for line in lines]
            look = {"color": COLOURS["diffusion" if row.startswith("teacher") else "flow"]}
            if row in ("teacher + distill", "2-RF + distill"):
                axis.errorbar(thousands(lines), values, bars, marker="o", capsize=2, label=row,
                              **look)
            else:
                axis.errorbar(thousands(lines), values, bars, marker=next(markers), ls="", ms=8,
                              label=row, **look)
            if row == "2-RF + distill":
                axis.plot(thousands(lines, "own_samples"), values, ":o", fillstyle="none",
                          label=f"{row}, without reflow's samples", **look)
        axis.set(xlabel="thousand training samples since the teacher",
                 title=name.replace("_", " "))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))


def main():
    parser = study_parser("The paper's table on the tiny model.")
    add = parser.add_argument
    add("--iterations", type=positive, default=256, help="of each reflow; the unit of --budgets")
    add("--held-out", type=positive, default=500, help="pairs that nothing is trained on")
    add("--steps", type=solver_steps, nargs="+", default=[25, 8, 4, 2, 1],
        help="of the teacher and the flows")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="rows to measure")
    add("--budgets", type=non_negative, nargs="+", default=[0.25, 0.5, 1, 2, 4],
        help="iterations of each distillation, in units of --iterations")
    add("--lpips-iterations", type=non_negative_int, default=64)
    add("--asked", choices=CAPTIONS,
        help="measure the same models on these captions, in study-ASKED.json and so on; default: "
             "--captions")
    args = parser.parse_args()
    if args.asked and dataset_of(args.asked) != dataset_of(args.captions):
        raise BadInput(f"--asked {args.asked}: from another dataset than --captions "
                       f"{args.captions}; give captions of one dataset")
    folder, device = Path(args.out), pick_device(args.device)
    suffix = f"-{args.asked}" if args.asked else ""
    name = f"study{suffix}"
    rows, write = open_table(folder / "study.json", args, suffix)
    lpips = perceptual_distance("random", device)
    for seed in range(args.seed, args.seed + args.num_seeds):
        study = study_of(seed, args, device, rows, write, args.asked)
        measure_seed(study, lpips)
        save_images(folder / f"{name}-pictures-{seed}.png", study)

    summary = summary_of(rows)
    table = markdown_table(summary) + footer("experiments/paper_table.py", args, device, rows)
    write_text(folder / f"{name}.md", table)
    save_curves(folder / f"{name}.png", summary)
    print(table + f"{folder}: {name}.json, {name}.md, {name}.png and image sheets")


if __name__ == "__main__":
    run(main)
