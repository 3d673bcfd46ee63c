"""Pairs: the training data of reflow and distillation, drawn from a teacher.

A pair is (prompt, noise X0, latent X1): the teacher's ODE carries X0 to X1 under the prompt, so the pairing is the
teacher's own, and that is what makes straight lines between pairs cross so little. On disk a folder:

    pairs.json                 what made it: teacher and its hash, kind, steps, guidance, solver, prompts, seed ...
    shard-00000.safetensors    latents (n, 4, h, w) fp16, seeds (n,) int64, the prompts as JSON in the metadata
    shard-00001.safetensors    ...

Pair number i has the prompt i (mod their number) and the noise of the first seed + i. The noise is not stored: its seed
makes it again. A shard appears whole or not at all, and a run that was stopped makes only what is missing. At 512 px a
pair is 32 KB; InstaFlow's 1.6 million are 52 GB. The last hundredth of a list of prompts is kept for measuring.
"""

import argparse
import csv
import hashlib
import io
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from command import (
    KNOWN_CAPTIONS,
    BadInput,
    ByModel,
    check_output,
    differences,
    dtype_name,
    keep_others_out,
    let_others_in,
    not_below_zero,
    note,
    positive,
    rank,
    seeds_in,
    solver_steps,
    wait_for_all,
    world_size,
    write_text,
    write_whole,
)
from rectified_flow import noise_from_seeds, sample_path

PAIRS_PER_SHARD = 1000
PAPERS_PAIRS = 1_600_000
GRAMMAR_PAIRS = 50_000  # for Stable Diffusion without captions: each sentence of the built-in grammar eight times
# Guidance when none is asked for. The flow's 1.5 and SD 1.4's 6 are the paper's, which takes 5 for SD 1.5.
GUIDANCE = {"diffusion": ByModel(6.0, 2.5), "flow": ByModel(1.5, 1.5), "one-step": ByModel(1.0, 1.0)}
NUMBERS_PER_BATCH = 2**18  # of latents that are drawn at once: 16 at 512 px
LATENTS_PER_BATCH = 128  # at most, for the tiny model: with guidance 256 pass the U-Net, and more are slower on a CPU


# ---------------------------------------------------------------------------------------------------------------
# Prompts


def read_prompts(path: str | Path, column: str = "Prompt") -> list[str]:
    """A prompt a line from a text file, or the named column of a .tsv or .csv with a header. Blank ones are skipped."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not UTF-8 text; save it as UTF-8, a prompt a line") from None
    except OSError as problem:
        raise BadInput(f"{path}: cannot be read ({problem.strerror}); give a text file with a prompt a line") from None
    if path.suffix in (".tsv", ".csv"):
        lines = column_of(path, text, column)
    else:
        lines = text.split("\n")[: -1 if text.endswith("\n") else None]
    # A line ends at a line feed alone: str.splitlines also cuts at characters that captions from the web are full of.
    prompts = [line.replace("\n", " ").replace("\r", " ").strip() for line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"{path}: holds no prompt; write one a line")
    if len(prompts) < len(lines):
        note(f"{path}: {len(lines) - len(prompts)} blank lines are skipped")
    return prompts


def column_of(path: Path, text: str, column: str) -> list[str]:
    """The fields of one column of a table with a header."""
    if path.suffix == ".tsv":  # quotes do not hide tabs there, and a caption may well begin with one that is never closed
        rows = [line.split("\t") for line in text.split("\n") if line]
    else:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            rows = [row for row in reader if row]
        except csv.Error as problem:
            raise BadInput(f"{path}: not a .csv table up to line {reader.line_num} ({problem}); mend its quotes") from None
    header = [unquoted(name) for name in rows[0]] if rows else []
    if column not in header:
        raise BadInput(f"{path}: has no column {column!r} but {header}; name one with --prompt-column")
    number = header.index(column)
    fields = [row[number] if number < len(row) else "" for row in rows[1:]]
    return [unquoted(field) for field in fields] if path.suffix == ".tsv" else fields


def unquoted(field: str) -> str:
    """A .tsv field without the quotes that some programs put around it."""
    inner = field[1:-1]
    whole = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else field


def parts_of(prompts: list[str]) -> tuple[list[str], list[str]]:
    """(prompts to train on, prompts to measure on): of every list the last hundredth is never trained on.

    Nothing is kept from a list that is too short for it, or says the same over and over.
    """
    kept = prompts[len(prompts) - len(prompts) // 100 :]
    never = set(kept)
    training = [prompt for prompt in prompts if prompt not in never]
    return (training, kept) if training else (prompts, [])


# For Stable Diffusion without a prompt file: what follows is enough to try the method, not to train a good model.
MEDIA = ["a photo of", "an oil painting of", "a watercolor of", "a pencil sketch of", "a 3d render of", "a poster of"]
LOOKS = ["a small", "an old", "a colorful", "a wooden", "a broken", "a shiny", "a snow-covered", "a giant"]
SUBJECTS = ["house", "cat", "dog", "bicycle", "boat", "teapot", "robot", "tree", "bridge", "car", "chair", "horse",
            "lighthouse", "clock", "guitar", "castle"]  # fmt: skip
PLACES = ["on a beach", "in a forest", "in a busy street", "on a table", "under a starry sky", "in the desert",
          "beside a lake", "in an empty room"]  # fmt: skip


def built_in_prompts() -> list[str]:
    """Every sentence of a small grammar, in an order in which neighbours differ."""
    every = [f"{a} {b} {c} {d}" for a in MEDIA for b in LOOKS for c in SUBJECTS for d in PLACES]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    return [every[i] for i in order]


def prompts_for(captions: str | None, path: str | None, column: str = "Prompt") -> tuple[list[str], str]:
    """(prompts, where they are from): a file of the user's, else the model's own captions, else the grammar."""
    if path is not None:
        return read_prompts(path, column), Path(path).name
    if captions is not None:
        return read_prompts(KNOWN_CAPTIONS[captions]), captions
    return built_in_prompts(), "built-in"


# ---------------------------------------------------------------------------------------------------------------
# Making pairs


def default_guidance(model) -> float:
    return GUIDANCE[model.kind].tiny if model.captions is not None else GUIDANCE[model.kind].full


def describe_pairs(
    model, prompts: list[str], prompts_name: str, count: int, steps: int, guidance: float, first_seed: int, solver: str = "dpm"
) -> dict:
    """What decides pairs, as it lies in pairs.json.

    model: a StableDiffusion of kind "diffusion" or "flow", sampled with `steps` and `guidance` (1 is off); solver
    "dpm" or "ddim" for a diffusion, while a flow always takes Euler steps. first_seed: of the first noise.
    """
    return {
        "teacher": Path(model.path).name, "teacher_hash": model.fingerprint(), "kind": model.kind, "steps": steps,
        "guidance": guidance, "solver": solver if model.kind == "diffusion" else "euler", "first_seed": first_seed,
        "dtype": dtype_name(model.dtype), "prompts": prompts_name,
        "prompts_hash": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "latent_shape": list(model.latent_shape()), "pairs_per_shard": PAIRS_PER_SHARD, "count": count,
    }  # fmt: skip


def make_pairs(
    model, prompts: list[str], description: dict, folder: str | Path, batch_size: int | None = None, repair: bool = False
) -> "Pairs":
    """Make what is missing of the pairs of `describe_pairs` in the folder, and open it.

    Of N processes each makes every N-th shard. BadInput: the folder holds pairs of another teacher or setting, another
    run works in it, a shard is damaged (repair makes it again).
    """
    folder, shape, count = Path(folder), tuple(description["latent_shape"]), description["count"]
    sizes = [min(PAIRS_PER_SHARD, count - start) for start in range(0, count, PAIRS_PER_SHARD)]
    absent = sum(size for i, size in enumerate(sizes) if not shard_path(folder, i).exists())
    check_output(folder / "pairs.json", needed=2 * absent * torch.Size(shape).numel())  # fp16
    keep_others_out(folder)
    check_description(folder, description)
    write_text(folder / "pairs.json", json.dumps(description, indent=2) + "\n")
    wait_for_all()

    mine = range(rank(), len(sizes), world_size())
    missing = [i for i in mine if not shard_is_whole(folder, i, sizes[i], shape, repair)]
    batch_size = batch_size or drawn_at_once(shape)
    total = sum(sizes[i] for i in mine)
    done, silent = total - sum(sizes[i] for i in missing), not missing or rank() > 0
    steps, guidance = description["steps"], description["guidance"]
    with tqdm(total=total, initial=done, desc="pairs", unit="pair", dynamic_ncols=True, disable=silent) as bar:
        null_context = model.encode_prompts([""]) if missing else None
        for i in missing:
            numbers = range(i * PAIRS_PER_SHARD, i * PAIRS_PER_SHARD + sizes[i])
            texts = [prompts[number % len(prompts)] for number in numbers]
            seeds = [description["first_seed"] + number for number in numbers]
            latents = []
            for start in range(0, sizes[i], batch_size):
                part = slice(start, start + batch_size)
                context = model.encode_prompts(texts[part])
                drawn = draw_latents(model, context, seeds[part], steps, guidance, description["solver"], null_context)
                latents.append(drawn.cpu())
                bar.update(len(drawn))
            latents = torch.cat(latents)
            if not torch.isfinite(latents).all():
                bad = numbers[(~torch.isfinite(latents).flatten(1).all(1)).nonzero()[0].item()]
                raise BadInput(
                    f"{folder}: the teacher's latent of pair {bad} is not finite; try --dtype fp32 and other --pairs"
                )
            tensors = {"latents": latents.half(), "seeds": torch.tensor(seeds)}
            metadata = {"prompts": json.dumps(texts)}
            write_whole(shard_path(folder, i), lambda path: save_file(tensors, path, metadata), every_rank=True)
    wait_for_all()
    let_others_in(folder)
    for path in (shard_path(folder, i) for i in range(len(sizes))):
        if not path.exists():
            raise BadInput(f"{path}: made by another process and not here; name a --pairs that all nodes share")
    return Pairs(folder)


def drawn_at_once(shape: tuple[int, int, int]) -> int:
    """How many latents of this shape to draw in one batch."""
    return max(1, min(LATENTS_PER_BATCH, NUMBERS_PER_BATCH // torch.Size(shape).numel()))


@torch.inference_mode()
def draw_latents(
    model, context: Tensor, seeds: list[int], steps: int, guidance: float, solver: str, null_context: Tensor,
    shape: tuple[int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Latents (B, 4, h, w), fp32, for encoded prompts and the seeds of the noise. shape: of one, if not the model's."""
    noise = noise_from_seeds(seeds, shape or model.latent_shape()).to(model.device)
    *_, latents = sample_path(model.unet, model.kind, noise, steps, context, null_context, guidance, solver)
    return latents


def check_description(folder: Path, description: dict) -> None:
    if not (folder / "pairs.json").exists():
        return
    try:
        before = dict(json.loads((folder / "pairs.json").read_text()))
    except (ValueError, TypeError):
        raise BadInput(f"{folder / 'pairs.json'}: damaged; delete the folder or name another with --pairs") from None
    changed = differences(before, {name: value for name, value in description.items() if name != "count"})
    if changed:
        raise BadInput(f"{folder}: holds other pairs ({changed}); ask for the same, or name another folder with --pairs")


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def shard_is_whole(folder: Path, number: int, size: int, shape: tuple, repair: bool) -> bool:
    """Is this shard there with `size` pairs? BadInput where it is damaged, unless it is to be repaired.

    A shorter one, the last of a smaller set, is made again. A longer one is the start of the same shard.
    """
    path = shard_path(folder, number)
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            length, *rest = file.get_slice("latents").get_shape()
            prompts = json.loads(file.metadata()["prompts"])
            if tuple(rest) != tuple(shape) or len(prompts) != length or file.get_slice("seeds").get_shape() != [length]:
                raise ValueError("its parts do not fit together")
        return length >= size
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as problem:
        if repair:
            return False
        raise BadInput(f"{path}: damaged ({problem}); --repair makes it again, or delete it") from None


def add_pairs_options(parser: argparse.ArgumentParser, teacher: str, folder: str, tiny_count: int) -> None:
    """The options that `pairs_asked` reads, with the defaults of one command."""
    group = parser.add_argument_group("pairs")
    group.add_argument("--teacher", default=teacher, help="an SD 1.x .safetensors, one of ours, or a diffusers folder")
    group.add_argument("--prompts", help="text file with a prompt a line, or .tsv/.csv; default: the tiny model's captions, "
                       "for SD a built-in grammar")  # fmt: skip
    group.add_argument("--prompt-column", default="Prompt", help="column of a .tsv or .csv that holds the prompts")
    group.add_argument("--pairs", default=folder, help="folder of the pairs; whole shards in it are kept")
    group.add_argument("--num-pairs", type=positive, help=f"default: {PAPERS_PAIRS:,} with --prompts (the paper's), "
                       f"{GRAMMAR_PAIRS:,} of the built-in grammar, tiny model {tiny_count:,}")  # fmt: skip
    group.add_argument("--teacher-steps", type=solver_steps, default=25)
    group.add_argument("--teacher-guidance", type=not_below_zero, help="1 is off; default: 6 for SD (the paper's for SD 1.4; "
                       f"for SD 1.5 it takes 5), {GUIDANCE['diffusion'].tiny} for its tiny model, "
                       f"{GUIDANCE['flow'].full} for a flow")  # fmt: skip
    group.add_argument("--solver", choices=["dpm", "ddim"], default="dpm", help="for a diffusion teacher; flows use Euler")
    group.add_argument("--teacher-batch-size", type=positive, help="pairs drawn at once; default: 16 at 512 px")
    group.add_argument("--repair", action="store_true", help="make damaged shards again")


def pairs_asked(model, args: argparse.Namespace, world: str, tiny_count: int) -> tuple[list[str], dict]:
    """The prompts and the description of the pairs that a command's settled arguments ask for, made of nothing yet.

    BadInput: more pairs than the built-in grammar is good for, or a folder with other pairs.
    """
    prompts, prompts_name = prompts_for(model.captions, args.prompts, args.prompt_column)
    prompts, _ = parts_of(prompts)
    count = args.num_pairs
    if args.prompts is None and model.captions is None:
        where = (
            "captions are to be had as LAION's or COCO's lists or PartiPrompts, and the paper took 1,600,000 of LAION-2B-en; "
            "give a file of them with --prompts"
        )
        count = count or GRAMMAR_PAIRS
        if count > GRAMMAR_PAIRS:
            raise BadInput(f"--num-pairs {count}: the built-in grammar has {len(prompts):,} sentences; {where}")
        note(f"{count:,} pairs of the built-in grammar, {len(prompts):,} sentences: enough to try the method; {where}")
    elif count is None:
        count = tiny_count if model.captions is not None else PAPERS_PAIRS
    guidance = default_guidance(model) if args.teacher_guidance is None else args.teacher_guidance
    first_seed = seeds_in(world, args.seed, count)[0]
    description = describe_pairs(model, prompts, prompts_name, count, args.teacher_steps, guidance, first_seed, args.solver)
    check_description(Path(args.pairs), description)
    return prompts, description


# ---------------------------------------------------------------------------------------------------------------
# Reading pairs


class Pairs:
    """A folder of pairs, read through the memory map. len(pairs); pairs.batch(indices)."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.description = json.loads((folder / "pairs.json").read_text())
        shards = range(-(-self.description["count"] // PAIRS_PER_SHARD))
        self.shards = [load_file(shard_path(folder, i)) for i in shards]
        self.prompts = []
        for i in shards:
            with safe_open(shard_path(folder, i), "pt") as file:
                self.prompts.append(json.loads(file.metadata()["prompts"]))

    def __len__(self) -> int:
        return self.description["count"]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        """X0 and X1 (B, 4, h, w) in fp32 on the CPU, and their prompts."""
        places = [divmod(int(i), PAIRS_PER_SHARD) for i in indices]
        x1 = torch.stack([self.shards[shard]["latents"][row] for shard, row in places]).float()
        x0 = noise_from_seeds([self.shards[shard]["seeds"][row] for shard, row in places], tuple(x1.shape[1:]))
        return x0, x1, [self.prompts[shard][row] for shard, row in places]
