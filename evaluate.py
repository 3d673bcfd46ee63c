"""Evaluation: how well models draw what captions say, at how many steps, and how straight their paths are.

    python evaluate.py                                  teacher, 2-RF and the one-step model, side by side
    python evaluate.py --model runs/2rf.safetensors --steps 1,4,25 --guidance 1,1.5,2.5 --repeats 5

All models draw the same captions from the same noises, which nothing was trained on: noises have a world of seeds of their
own (command.seeds_in), and captions are in no list that pairs are made from. (The tiny teacher alone has seen them all.)
Writes beside each other

    evaluate.json     a row for each model, guidance and number of steps (a figure that does not apply is null)
    evaluate.md       the same as a table
    evaluate.png      the pictures, a row for each, and  evaluate-curves.png  the figures against steps

caption_accuracy   share of pictures that show everything their caption says, as the reader reads them
frechet            Fréchet distance between the reader's features of drawn and of generated pictures:
                   ‖m1 - m2‖² + tr(C1 + C2 - 2 (C1 C2)^½)   (Heusel et al. 2017, 1706.08500); the row "drawn" is
                   its floor, two sets of drawn pictures against each other
precision, recall  share of generated pictures that lie among the drawn ones, and of drawn among the generated:
                   a model that forgets variety loses recall (Kynkäänniemi et al. 2019, 1904.06991)
straightness       S of rectified_flow.py along the model's own path at 25 steps, where any of --steps is more than 1;
                   relative: S / E‖Z1 - Z0‖²

A figure ± an interval is a mean with its 95 % confidence interval, over --repeats sets of captions and noises (for
straightness over samples). In evaluate.json it is called <figure>_interval.

fid, clip_score    against real images, with --coco or --images: evaluation/real_images.py

Captions, drawn pictures and the reader come from a judge, a Python file such as toy/shapes.py. Models without one
(Stable Diffusion) get straightness, seconds and pictures, and with real images to compare with, the paper's two figures:

    python evaluate.py --model sd14.safetensors runs/instaflow.safetensors --coco coco --steps 25
"""

import importlib.util
import itertools
import json
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import scipy.stats
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import checkpoint
from command import (
    HERE,
    TINY_TEACHER,
    BadInput,
    Parser,
    add_machine_options,
    add_model_options,
    check_output,
    dtype_name,
    not_below_zero,
    pick_device,
    positive,
    run,
    seeds_in,
    solver_steps,
    write_text,
    write_whole,
)  # fmt: skip
from evaluation.real_images import Gallery, caption_score, feature_distance, read_coco, read_images
from pairs import (
    NUMBERS_PER_BATCH,
    built_in_prompts,
    default_guidance,
    draw_latents,
    drawn_at_once,
    parts_of,
    read_prompts,
)
from rectified_flow import as_flow, noise_from_seeds, straightness
from training import seed_of
from vae import to_bytes

JUDGE = ("measuring_captions", "drawn", "load_reader", "right")  # what a judge's file is asked for
TINY_JUDGE = str(HERE / "toy" / "shapes.py")
STRAIGHTNESS_STEPS = 25
STRAIGHTNESS_SAMPLES = 256  # at most; 16 at 512 px, as whole paths are held at once
PICTURED = 8  # captions in the comparison picture
NORMAL_95 = 1.96  # standard errors of a 95 % interval
NEIGHBOURS = 3  # of precision and recall, as in their paper
GRADES = ("caption_accuracy", "frechet", "precision", "recall")
ON_IMAGES = ("fid", "clip_score")
STRAIGHT = ("straightness", "relative_straightness", "transport_cost")


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between normal distributions fitted to two sets of features (N, D) and (M, D)."""
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr (C1 C2)^½ is the sum of the roots of C1 C2's eigenvalues, which are those of C1^½ C2 C1^½, a symmetric matrix.
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * product).item()


def precision_recall(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """Shares of the generated features (N, D) among the real ones (M, D), and of the real among the generated.

    "Among" is: nearer to one of them than that one's k-th nearest neighbour in its own set. Kynkäänniemi et al. 2019.
    """

    def share(points: Tensor, among: Tensor) -> float:
        reach = torch.cdist(among, among).kthvalue(NEIGHBOURS + 1, dim=1).values  # the nearest to a point is itself
        return (torch.cdist(points, among) <= reach).any(1).double().mean().item()

    return share(generated, real), share(real, generated)


def load_judge(path: str):
    """The judge: a module with measuring_captions(n, seed), which are in no list to train on, drawn(captions, seed),
    load_reader() and right(reader, pictures, captions), whose reader has .features(pictures)."""
    if not Path(path).is_file():
        raise BadInput(f"--judge {path}: no such file; give a Python file such as toy/shapes.py")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    judge = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = judge  # dataclasses look their module up
    spec.loader.exec_module(judge)
    missing = [name for name in JUDGE if not hasattr(judge, name)]
    if missing:
        raise BadInput(f"--judge {path}: has no {missing[0]}; a judge has {', '.join(JUDGE)}, as toy/shapes.py does")
    return judge


@torch.inference_mode()
def draw_pictures(model, prompts: list[str], seeds: list[int], steps: int, guidance: float, batch: int, bar) -> Tensor:
    """Pictures (N, 3, H, W), fp32 on the CPU."""
    null_context, pictures = model.encode_prompts([""]), []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        context = model.encode_prompts(prompts[part])
        latents = draw_latents(model, context, seeds[part], steps, guidance, "dpm", null_context)
        pictures.append(model.vae.decode(latents).float().cpu())
        bar.update(len(latents))
    return torch.cat(pictures)


@torch.inference_mode()
def measure_straightness(model, prompts: list[str], seeds: list[int], guidance: float):
    """S along the model's own path. A diffusion is looked at as a flow, on the part of [0, 1] that it covers."""
    x = noise_from_seeds(seeds, model.latent_shape()).to(model.device)
    context, null_context = model.encode_prompts(prompts), model.encode_prompts([""])
    velocity, start, times = as_flow(model.unet, model.kind, x, STRAIGHTNESS_STEPS, null_context, guidance)
    return straightness(velocity, start, STRAIGHTNESS_STEPS, context, times)


# ---------------------------------------------------------------------------------------------------------------
# What is written


def with_interval(figures: list[float | None]) -> tuple[float | None, float | None]:
    """The mean over repeats and its 95 % confidence interval (half its width), by Student's t."""
    count = len(figures)
    if None in figures:
        return None, None
    mean = statistics.fmean(figures)
    if count == 1:
        return mean, None
    return mean, scipy.stats.t.ppf(0.975, count - 1).item() * statistics.stdev(figures) / count**0.5


def rounded(value, interval: float | None = None) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if interval is None else f"{text} ± {float(f'{interval:.2g}'):g}"  # 100, where .2g alone says 1e+02


def grouped(rows: list[dict], names: tuple[str, ...]) -> dict[tuple, list[dict]]:
    """The rows that agree in the figures of these names, by their values."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def markdown_table(rows: list[dict]) -> str:
    """Rows with the same keys; lists are left out, and <name>_interval is joined to <name>."""
    names = [
        name for name in rows[0] if not name.endswith("_interval") and not any(isinstance(row[name], list) for row in rows)
    ]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(rounded(row[name], row.get(f"{name}_interval")) for name in names) + " |")
    return "\n".join(lines) + "\n"


def in_steps(number: int) -> str:
    return f"{number} step{'s' * (number > 1)}"


def label_of(row: dict, guidance: bool = False) -> str:
    """A model's name, with its number of steps if it has one, and with its guidance if asked."""
    label = row["model"].replace(".safetensors", "")
    if guidance and row["guidance"] is not None:
        label += f"\nguidance {row['guidance']:g}"
    return label + ("" if row["steps"] is None else "\n" + in_steps(row["steps"]))


def save_comparison(path: str, rows: list[tuple[str, Tensor]], captions: list[str]) -> None:
    """A picture with a row for each (label, pictures) and a column for each caption."""
    height, width = rows[0][1].shape[-2:]
    gap = max(1, width // 24)
    down, right = height + gap, width + gap  # from one picture to the next
    sheet = torch.full((len(rows) * down, len(captions) * right, 3), 255, dtype=torch.uint8)
    for y, (_, pictures) in enumerate(rows):
        for x, picture in enumerate(to_bytes(F.interpolate(pictures[: len(captions)], (height, width)))):
            sheet[y * down : y * down + height, x * right : x * right + width] = picture
    figure = Figure(figsize=(1.25 * len(captions) + 1.2, 1.25 * len(rows) + 0.6))
    axis = figure.add_subplot()
    axis.imshow(sheet.numpy(), interpolation="nearest")
    columns = [x * right + width / 2 for x in range(len(captions))]
    lines = [y * down + height / 2 for y in range(len(rows))]
    axis.set_xticks(columns, [textwrap.fill(caption, 15) for caption in captions], fontsize=7.5)
    axis.set_yticks(lines, [label for label, _ in rows], fontsize=9)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=150, bbox_inches="tight"))


def save_curves(path: str, rows: list[dict]) -> None:
    """The grades against the number of steps, and how bent paths are against t; a line for each model and guidance."""
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    axes = dict(zip((*GRADES, "profile"), figure.subplots(1, len(GRADES) + 1)))
    drawn = next((row for row in rows if row["kind"] is None), None)
    steps = sorted({row["steps"] for row in rows if row["steps"]})
    lines = list(dict.fromkeys((row["model"], row["guidance"]) for row in rows if row["kind"]))
    for line, marker in zip(lines, itertools.cycle("osD^v<>P")):
        mine = [row for row in rows if (row["model"], row["guidance"]) == line]
        label = f"{line[0].replace('.safetensors', '')}, guidance {line[1]:g}"
        for name in GRADES:
            if mine[0][name] is not None:
                bars = [row[f"{name}_interval"] or 0 for row in mine]
                axes[name].errorbar(
                    [row["steps"] for row in mine], [row[name] for row in mine], bars, marker=marker, label=label
                )
        if mine[0]["straightness_profile"]:
            axes["profile"].plot(*zip(*mine[0]["straightness_profile"]), label=label)
    for name in GRADES:
        if drawn:
            axes[name].axhline(drawn[name], color="gray", linestyle=":", label="drawn pictures")
        axes[name].set(xscale="log", xlabel="steps", title=name.replace("_", " "), xticks=steps, xticklabels=steps)
        axes[name].minorticks_off()
    axes["frechet"].set_yscale("log")
    axes["profile"].set(xlabel="t  (0 noise, 1 data)", yscale="log", title="bend / squared length")
    for axis in axes.values():
        if axis.has_data():
            axis.legend(fontsize=6)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=150))


# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Questions:
    """What every model is asked: prompts and seeds, and how its pictures are graded."""

    prompts: list[str]
    seeds: list[int]
    grade: Callable[[Tensor], dict]  # pictures -> a figure for each of GRADES
    drawn: list[Tensor]  # two sets of drawn pictures where a judge can draw; empty where none can
    seed: int  # the --seed that all this comes from


def questions_of(judge_path: str | None, count: int | None, seed: int, repeat: int) -> Questions:
    """A judge's captions; without a judge built-in prompts that nothing was trained on, and no grades."""
    count = count or (8 if judge_path is None else 1000)
    seeds = seeds_in("evaluation", seed, count, start=repeat * count)
    if judge_path is None:
        _, source = parts_of(built_in_prompts())
        prompts = [source[k % len(source)] for k in range(count)]
        return Questions(prompts, list(seeds), lambda pictures: dict.fromkeys(GRADES), [], seed)
    judge = load_judge(judge_path)
    return judged(judge, judge.measuring_captions(count, seeds[0]), seeds, seed)


def judged(judge, captions: list, seeds: range, seed: int) -> Questions:
    """These captions and seeds of noises, which come from the --seed, graded by a judge."""
    reader = judge.load_reader()
    drawn = [judge.drawn(captions, seed_of(seeds[0], k)) for k in range(2)]
    with torch.no_grad():
        real = reader.features(drawn[0])

    @torch.no_grad()
    def grade(pictures: Tensor) -> dict:
        features = reader.features(pictures)
        accuracy = sum(judge.right(reader, pictures, captions)) / len(captions)
        return dict(zip(GRADES, (accuracy, frechet_distance(real, features), *precision_recall(real, features))))

    return Questions([str(caption) for caption in captions], list(seeds), grade, drawn, seed)


def evaluate(
    model, questions: list[Questions], steps: list[int], guidance: float, gallery: Gallery | None = None
) -> Iterator[tuple[dict, Tensor]]:
    """A row and the first questions' pictures for each number of steps; a one-step model takes one.

    With a gallery the questions are its captions, and pictures are drawn into its folder.
    """
    first, straight = questions[0], {}
    batch = drawn_at_once(model.latent_shape())
    if model.kind != "one-step" and max(steps) > 1:
        count = min(STRAIGHTNESS_SAMPLES, max(1, NUMBERS_PER_BATCH // torch.Size(model.latent_shape()).numel()))
        s = measure_straightness(model, first.prompts[:count], first.seeds[:count], guidance)
        straight = {
            "straightness": s.value, "straightness_interval": NORMAL_95 * s.standard_error,
            "relative_straightness": s.relative, "relative_straightness_interval": NORMAL_95 * s.relative_standard_error,
            "transport_cost": s.transport_cost, "straightness_profile": s.profile,
        }  # fmt: skip
    for number in steps if model.kind != "one-step" else [1]:
        draw = lambda prompts, seeds, bar: draw_pictures(model, prompts, seeds, number, guidance, batch, bar)
        name, started = f"{Path(model.path).stem}, {in_steps(number)}", time.perf_counter()
        if gallery is None:
            count, pictures = sum(len(each.prompts) for each in questions), []
            with tqdm(total=count, desc=name, unit="picture", leave=False, dynamic_ncols=True) as bar:
                for each in questions:
                    pictures.append(draw(each.prompts, each.seeds, bar))
            seconds, shown = (time.perf_counter() - started) / count, pictures[0]
            grades = graded(questions, pictures)
        else:
            about = {"model": Path(model.path).name, "hash": model.fingerprint(), "kind": model.kind, "steps": number,
                     "guidance": guidance, "first_seed": first.seeds[0], "dtype": dtype_name(model.dtype),
                     "prompts": first.prompts}  # fmt: skip
            folder = gallery.draw(f"{Path(model.path).stem}-{number}-{guidance:g}", about, draw, first.seeds[0], batch)
            grades, shown = gallery.score(folder), gallery.first(folder, PICTURED)
            seconds = None  # some of the pictures may be of an earlier run
        yield row_of(Path(model.path).name, model.kind, number, questions, guidance, seconds, grades | straight), shown


def graded(questions: list[Questions], pictures: list[Tensor]) -> dict:
    """The grades of one set of pictures for each of the questions, as means with intervals."""
    each, figures = [asked.grade(drawn) for asked, drawn in zip(questions, pictures)], {}
    for name in GRADES:
        figures[name], figures[f"{name}_interval"] = with_interval([grade[name] for grade in each])
    return figures


def row_of(
    model: str, kind: str | None, steps: int | None, questions: list[Questions], guidance: float | None,
    seconds: float | None, figures: dict,
) -> dict:  # fmt: skip
    """A row of evaluate.json: every figure by name, null where it does not apply."""
    row = {"model": model, "kind": kind, "steps": steps, "guidance": guidance}
    for name in (*GRADES, *ON_IMAGES, *STRAIGHT):
        row |= {name: figures.get(name), f"{name}_interval": figures.get(f"{name}_interval")}
    row |= {"straightness_profile": figures.get("straightness_profile"), "seconds_per_image": seconds}
    return row | {"samples": len(questions[0].prompts), "repeats": len(questions), "seed": questions[0].seed}


def steps_list(text: str) -> list[int]:
    """argparse type: numbers of solver steps, with commas."""
    return [solver_steps(part) for part in text.split(",")]


def guidance_list(text: str) -> list[float]:
    """argparse type: numbers of at least 0, with commas."""
    return [not_below_zero(part) for part in text.split(",")]


def gallery_of(args, device: torch.device) -> Gallery | None:
    """The real images that a command's arguments name, if they do."""
    if not args.coco and not args.images:
        return None
    if args.coco and args.images:
        raise BadInput("--coco and --images: give one of them")
    if args.images and not args.prompts:
        raise BadInput("--images: needs --prompts too, a file with captions to draw")
    if args.repeats > 1:
        raise BadInput("--repeats: FID is measured once; leave it away with --coco and --images")
    if args.coco:
        prompts, images, side = read_coco(args.coco, args.num_samples)
    else:
        prompts = read_prompts(args.prompts, args.prompt_column)[: args.num_samples]
        images, side = read_images(args.images), 512
    fid, clip = feature_distance(args.feature_extractor, device), caption_score(args.clip, device)
    return Gallery(prompts, images, args.image_size or side, Path(args.out.removesuffix(".json") + "-pictures"), fid, clip)


def main():
    parser = Parser("Measure models and set them side by side.")
    parser.add_argument(
        "--model", nargs="+", default=[TINY_TEACHER, "runs/2rf.safetensors", "runs/instaflow.safetensors"],
        help="one or more checkpoints",
    )  # fmt: skip
    parser.add_argument("--steps", type=steps_list, default="25,8,4,2,1", help="numbers of steps; a one-step model takes 1")
    parser.add_argument("--guidance", type=guidance_list, help="one or more, for all; default: each kind's own")
    parser.add_argument("--num-samples", type=positive, help="pictures for each row; default: 1000 with a judge, else 8")
    parser.add_argument("--repeats", type=positive, default=1, help="times that many, for confidence intervals")
    parser.add_argument("--judge", help="Python file that draws and reads captions; default: toy/shapes.py for the tiny model")
    group = parser.add_argument_group("real images, for FID and CLIP score")
    group.add_argument("--coco", help="COCO's folder, with annotations/ and val2017/ (5,000 captions) or val2014/ (30,000)")
    group.add_argument("--images", help="another folder of images, with --prompts")
    group.add_argument(
        "--prompts", help="text file with a prompt a line, or .tsv/.csv, to draw with --images; others than those of the pairs"
    )
    group.add_argument("--prompt-column", default="Prompt", help="column of a .tsv or .csv that holds the prompts")
    group.add_argument("--image-size", type=positive, help="pixels at which images are compared; default: COCO's protocol, 512")
    group.add_argument("--feature-extractor", help="TorchScript file instead of Inception: uint8 images to features")
    group.add_argument("--clip", default="openai/clip-vit-large-patch14", help="CLIP of the score: a folder or a hub id")
    parser.add_argument("--out", default="runs/evaluate.json", help="the rows; table and pictures land beside it")
    add_model_options(parser, several=True)
    add_machine_options(parser)
    args = parser.parse_args()

    missing = [path for path in args.model if not Path(path).exists()]
    if missing:
        raise BadInput(f"{missing[0]}: no such checkpoint; make it with reflow.py and distill.py, or name others with --model")
    kinds = args.kind or ["auto"] * len(args.model)
    if len(kinds) != len(args.model):
        raise BadInput(
            f"--kind: {len(kinds)} given for {len(args.model)} models; give one for each, in order (auto: as its file says)"
        )
    check_output(args.out)
    device = pick_device(args.device)
    rows, pictures, questions, gallery = [], [], [], gallery_of(args, device)
    if gallery is not None:
        seeds = seeds_in("evaluation", args.seed, len(gallery.prompts))
        questions = [Questions(gallery.prompts, list(seeds), lambda pictures: {}, [], args.seed)]
    for path, kind in zip(args.model, kinds):
        model = checkpoint.load_as_asked(path, args, device, None if kind == "auto" else kind)
        if not questions:  # the first model decides what all are asked
            judge = args.judge or (TINY_JUDGE if model.captions is not None else None)
            for repeat in range(args.repeats):
                questions.append(questions_of(judge, args.num_samples, args.seed, repeat))
            if questions[0].drawn:
                grades = graded(questions, [asked.drawn[1] for asked in questions])
                rows.append(row_of("drawn", None, None, questions, None, None, grades))
                pictures.append(("drawn", questions[0].drawn[0][:PICTURED]))
        for guidance in args.guidance or [default_guidance(model)]:
            for row, drawn in evaluate(model, questions, args.steps, guidance, gallery):
                rows.append(row)
                pictures.append((label_of(row, guidance=args.guidance is not None), drawn[:PICTURED]))

    stem = args.out.removesuffix(".json")
    write_text(f"{stem}.json", json.dumps(rows, indent=2) + "\n")
    write_text(f"{stem}.md", markdown_table(rows))
    save_comparison(f"{stem}.png", pictures, questions[0].prompts[:PICTURED])
    save_curves(f"{stem}-curves.png", rows)
    print(markdown_table(rows), end="")
    print(f"comparison picture: {stem}.png")


if __name__ == "__main__":
    run(main)
