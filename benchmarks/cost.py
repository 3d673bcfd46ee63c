"""What InstaFlow's full recipe costs: GPU-days, wall-clock days, disk and network traffic.

    python benchmarks/cost.py                      on 8 A100, at the speeds of the paper's A100-days
    python benchmarks/cost.py --rates benchmarks/results/training_step-bf16-cuda.json \\
                              --gpus 4 --price 2.5

The recipe is that of InstaFlow-0.9B (arXiv 2309.06380, table of training costs): 3.2 million pairs,
two stages of reflow, distillation in L2 and in LPIPS; 199.2 A100-days. --rates takes the results
of benchmarks/training_step.py: samples a second of one GPU in each stage. The table counts

    disk       a pair is a latent in fp16 and a seed; a training state is weights, EMA and two
               moments in fp32, twice while one state replaces another
    network    each iteration sums the gradients: in a ring of N GPUs each sends 2 (N - 1) / N
               times their 4 bytes a parameter

A second table compares each of our savings with the cost without it.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command import BadInput, Parser, at_least, non_negative, positive, run
from evaluation.plots import markdown_table

DAY = 24 * 3600
PARAMETERS = 859_520_964  # of the U-Net
BYTES_PER_PARAMETER = 16  # of a training state: weights, EMA and two moments in fp32
LATENT = 4 * 64 * 64  # numbers of a latent at 512 px
IMAGE = 3 * 512 * 512  # bytes of an image
PAPER_DAYS = 199.2


@dataclass
class Stage:
    """One stage of the recipe: the paper's A100-days for `samples` in iterations of `batch`."""

    name: str
    samples: int
    batch: int  # 0: no training
    a100_days: float

    @property
    def rate(self) -> float:
        """Samples a second of one A100."""
        return self.samples / (self.a100_days * DAY)


RECIPE = {
    "pairs": Stage("pairs, 25 steps with guidance", 3_200_000, 0, 16.0),
    "reflow": Stage("reflow", 64 * 70_000, 64, 11.2),
    "reflow large batch": Stage("reflow, large batch", 1024 * 25_000, 1024, 64.0),
    "l2": Stage("distillation, L2", 1024 * 21_500, 1024, 54.4),
    "lpips": Stage("distillation, LPIPS", 1024 * 18_000, 1024, 53.6),
}


def rates_from(path: str | None) -> dict[str, float]:
    """Samples a second of one GPU in each stage: the paper's A100, or measured rates.

    Both stages of reflow have the same rate.
    """
    if path is None:
        return {name: stage.rate for name, stage in RECIPE.items()}
    try:
        measured = {row["stage"]: row["samples_per_second"]
                    for row in json.loads(Path(path).read_text())["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise BadInput(
            f"--rates {path}: not a result of benchmarks/training_step.py ({problem!r})"
        ) from None
    stages = {name: name.removesuffix(" large batch") for name in RECIPE}
    missing = [stage for stage in stages.values() if stage not in measured]
    if missing:
        raise BadInput(f"--rates {path}: has no stage {missing[0]}; run "
                       "benchmarks/training_step.py without --stages")
    return {name: measured[stage] for name, stage in stages.items()}


def bill(rates: dict[str, float], gpus: int, price: float | None) -> list[dict]:
    """A row for each stage, and their sum. price: of a GPU-hour."""
    rows = []
    for name, stage in RECIPE.items():
        gpu_days = stage.samples / rates[name] / DAY
        row = {"stage": stage.name, "samples": f"{stage.samples:,}",
               "samples a second, one GPU": rates[name]}
        row |= {"GPU-days": gpu_days, f"days on {gpus}": gpu_days / gpus}
        iterations = stage.samples / stage.batch if stage.batch else 0
        row["TB sent by each GPU"] = iterations * 4 * PARAMETERS * 2 * (gpus - 1) / gpus / 1e12
        rows.append(row)
    total = {"stage": "all", "samples": "", "samples a second, one GPU": None}
    rows.append(total | {key: sum(row[key] for row in rows) for key in list(rows[0])[3:]})
    if price is not None:
        for row in rows:
            row["price"] = row["GPU-days"] * 24 * price
    return rows


def savings(rates: dict[str, float], reflow_share: float | None) -> list[dict]:
    """A row for each saving: the cost with it and without it."""
    pairs, tera, giga = RECIPE["pairs"].samples, 1e12, 1e9
    rows = [
        {"saving": "latents, not images", "with": f"{pairs * LATENT * 2 / giga:.0f} GB on disk",
         "without": f"{pairs * IMAGE / tera:.1f} TB of pixels"},
        {"saving": "seeds, not noise", "with": f"{pairs * 8 / giga:.2f} GB",
         "without": f"{pairs * LATENT * 4 / giga:.0f} GB in fp32"},
        {"saving": "prompts, not text embeddings",
         "with": f"{pairs * 60 / giga:.1f} GB at 60 letters each",
         "without": f"{pairs * 77 * 768 * 2 / giga:.0f} GB in fp16"},
        {"saving": "caption dropout, no second network for guidance",
         "with": f"{4 * PARAMETERS / giga:.1f} GB of weights",
         "without": f"{8 * PARAMETERS / giga:.1f} GB, and twice the training"},
    ]
    if reflow_share is not None:
        days = sum(RECIPE[name].samples / rates[name] / DAY
                   for name in ("reflow", "reflow large batch"))
        rows.append({
            "saving": "a start closer to the flow (reflow.py --init negated)",
            "with": f"{days * reflow_share:.1f} GPU-days of reflow, if the tiny model's share of "
                    "samples holds here",
            "without": f"{days:.1f} GPU-days",
        })
    return rows


def main():
    parser = Parser("Count GPU-days, disk and network traffic of InstaFlow's full recipe.")
    parser.add_argument("--gpus", type=positive, default=8)
    parser.add_argument("--rates",
                        help="results of benchmarks/training_step.py; default: the paper's A100")
    parser.add_argument("--price", type=non_negative, help="of a GPU-hour, in any currency")
    parser.add_argument("--reflow-share", type=at_least(0.0, below=1.0001),
                        help="fraction of the paper's reflow samples that is needed, e.g. 0.33")
    args = parser.parse_args()

    rates = rates_from(args.rates)
    rows = bill(rates, args.gpus, args.price)
    print(markdown_table(rows))
    state = BYTES_PER_PARAMETER * PARAMETERS / 1e9
    disk = RECIPE["pairs"].samples * (LATENT * 2 + 8) / 1e9
    print(f"Disk: {disk:.0f} GB of pairs, {2 * state:.0f} GB for a training state while it is "
          "replaced, 3.4 GB for a checkpoint.")
    print(f"The paper: {PAPER_DAYS} A100-days; this: {rows[-1]['GPU-days']:.1f} GPU-days.\n")
    print(markdown_table(savings(rates, args.reflow_share)), end="")


if __name__ == "__main__":
    run(main)
