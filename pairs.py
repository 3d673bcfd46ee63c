"""Pairs: the training data of reflow and distillation, drawn from a teacher and kept on disk.

A pair is (prompt, noise X0, latent X1): the teacher's ODE carries X0 to X1 under the prompt, so the
pairing is the teacher's own, and that is what makes straight lines between pairs cross so little.

    pairs.json                 what made it: teacher and its hash, kind, steps, guidance, solver ...
    shard-00000.safetensors    latents (n, 4, h, w) fp16, seeds (n,) int64, prompts in the metadata
    shard-00001.safetensors    ...

Pair number i has the prompt i (mod their number) and the noise of the first seed + i. The noise is
not stored: its seed makes it again. A shard appears whole or not at all, and a run that was stopped
makes only what is missing. At 512 px a pair is 32 KB; InstaFlow's 1.6 million are 52 GB.
"""

import argparse
import functools
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from command import (
    BadInput, check_output, dtype_name, from_all_processes, keep_others_out, let_others_in, note,
    pick_dtype, rank, refuse_other, wait_for_all, world_size, write_json, write_whole,
)
from sample import draw_latents, noise_from_seeds, prompts_of, read_prompts, seeds_in
from stable_diffusion import StableDiffusion, fingerprint
from training import shuffled

PAIRS_PER_SHARD = 1000
PAPERS_PAIRS = 1_600_000
GRAMMAR_PAIRS = 50_000  # for Stable Diffusion without captions: each sentence below eight times


# --------------------------------------------------------------------------------------------------
# What to draw


def parts_of(prompts: list[str]) -> tuple[list[str], list[str]]:
    """(prompts to train on, to measure on): the last hundredth of every list is never trained on.

    Nothing is kept from a list that is too short for it, or says the same over and over.
    """
    kept = prompts[len(prompts) - len(prompts) // 100 :]
    never = set(kept)
    training = [prompt for prompt in prompts if prompt not in never]
    return (training, kept) if training else (prompts, [])


# For Stable Diffusion without a prompt file: enough to try the method, not to train a good model.
MEDIA = ["a photo of", "an oil painting of", "a watercolor of", "a pencil sketch of",
         "a 3d render of", "a poster of"]
LOOKS = ["a small", "an old", "a colorful", "a wooden", "a broken", "a shiny", "a snow-covered",
         "a giant"]
SUBJECTS = ["house", "cat", "dog", "bicycle", "boat", "teapot", "robot", "tree", "bridge", "car",
            "chair", "horse", "lighthouse", "clock", "guitar", "castle"]
PLACES = ["on a beach", "in a forest", "in a busy street", "on a table", "under a starry sky",
          "in the desert", "beside a lake", "in an empty room"]


def built_in_prompts() -> list[str]:
    """Every sentence of a small grammar, in an order in which neighbours differ."""
    every = [f"{a} {b} {c} {d}" for a in MEDIA for b in LOOKS for c in SUBJECTS for d in PLACES]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    return [every[i] for i in order]


def prompts_for(
    model: StableDiffusion, path: str | None, column: str,
) -> tuple[list[str], list[str], str]:
    """(prompts to train on, held out, where from): the user's, the model's own, or the grammar."""
    if path is not None:
        every, source = read_prompts(path, column), Path(path).name
    elif model.is_tiny:
        every, source = prompts_of(model), model.family
    else:
        every, source = built_in_prompts(), "built-in"
    return *parts_of(every), source


def count_for(model: StableDiffusion, asked: int | None, with_prompts: bool, tiny: int) -> int:
    """How many pairs to make. BadInput: more than the built-in grammar is good for."""
    if with_prompts or model.is_tiny:
        return asked or (tiny if model.is_tiny else PAPERS_PAIRS)
    where = ("captions are to be had as LAION's or COCO's lists or PartiPrompts, and the paper "
             f"took {PAPERS_PAIRS:,} of LAION-2B-en; give a file of them with --prompts")
    count = asked or GRAMMAR_PAIRS
    if count > GRAMMAR_PAIRS:
        raise BadInput(
            f"--num-pairs {count}: the built-in grammar is good for {GRAMMAR_PAIRS:,}; {where}"
        )
    note(f"{count:,} pairs of the built-in grammar, enough to try the method; {where}")
    return count


def describe_pairs(
    model: StableDiffusion, prompts: list[str], source: str, count: int, steps: int,
    guidance: float | None, solver: str, dtype: torch.dtype, world: str, seed: int,
) -> dict:
    """What decides pairs, as it lies in pairs.json.

    model: of kind "diffusion" or "flow", drawn from with `steps`, `guidance` (None: its own) and
    dtype; solver "dpm" or "ddim" for a diffusion. world and seed: of the noises (`seeds_in`).
    """
    return {
        "teacher": Path(model.path).name, "teacher_hash": fingerprint(model.path),
        "kind": model.kind, "steps": steps,
        "guidance": model.guidance if guidance is None else guidance,
        "solver": solver if model.kind == "diffusion" else "euler", "dtype": dtype_name(dtype),
        "first_seed": seeds_in(world, seed, count)[0], **described_prompts(prompts, source),
        "latent_shape": list(model.latent_shape()), "pairs_per_shard": PAIRS_PER_SHARD,
        "count": count,
    }


def described_prompts(prompts: list[str], source: str) -> dict:
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return {"prompts": source, "prompts_hash": digest}


def check_pairs(folder: str | Path, description: dict) -> None:
    """BadInput where the folder holds other pairs; more or fewer of the same are welcome."""
    same = {name: value for name, value in description.items() if name != "count"}
    remedy = "ask for the same, name another folder with --pairs, or delete this one"
    refuse_other(Path(folder) / "pairs.json", same, "other pairs", remedy)


def pairs_asked(
    model: StableDiffusion, args: argparse.Namespace, world: str, tiny: int,
) -> tuple[list[str], list[str], dict]:
    """Prompts, held-out prompts and description of the pairs that a command is asked for, checked.

    args: settled. tiny: how many the command takes of a tiny model. Nothing is made yet.
    """
    if model.method:
        raise BadInput(f"{model.path}: made by {model.method}, no teacher any more; give a "
                       "diffusion or a flow as --teacher")
    prompts, held_out, source = prompts_for(model, args.prompts, args.prompt_column)
    if not held_out and args.validation_pairs:
        note("too few prompts to hold a hundredth of them back; what is watched is drawn for "
             "prompts of training, on noises of its own")
    count = count_for(model, args.num_pairs, args.prompts is not None, tiny)
    description = describe_pairs(
        model, prompts, source, count, args.teacher_steps, args.teacher_guidance, args.solver,
        pick_dtype(args.dtype, model.device), world, args.seed,
    )
    check_pairs(args.pairs, description)
    return prompts, held_out, description


# --------------------------------------------------------------------------------------------------
# Making them


def make_pairs(
    model: StableDiffusion, prompts: list[str], description: dict, folder: str | Path,
    batch_size: int | None = None, repair: bool = False,
) -> "Pairs":
    """Make what is missing of the pairs of `describe_pairs` in the folder, and open it.

    Of N processes each makes every N-th shard. BadInput: the folder holds other pairs, another run
    works in it, a shard is damaged (repair makes it again).
    """
    folder, shape = Path(folder), tuple(description["latent_shape"])
    count, first_seed = description["count"], description["first_seed"]
    sizes = [min(PAIRS_PER_SHARD, count - start) for start in range(0, count, PAIRS_PER_SHARD)]
    absent = sum(size for i, size in enumerate(sizes) if not shard_path(folder, i).exists())
    check_output(folder / "pairs.json", needed=2 * absent * torch.Size(shape).numel())  # fp16
    keep_others_out(folder)
    check_pairs(folder, description)
    write_json(folder / "pairs.json", description)
    wait_for_all()

    mine = range(rank(), len(sizes), world_size())
    missing = [i for i in mine if not shard_is_whole(folder, i, sizes[i], shape, repair)]
    todo = sum(from_all_processes([sum(sizes[i] for i in missing)]))
    how = (description["steps"], description["guidance"], "", description["solver"])
    with tqdm(total=count, initial=count - todo, desc="pairs", unit="pair", dynamic_ncols=True,
              disable=not missing or rank() > 0) as bar:
        # Every process draws as many as this one, so all are counted.
        everyones = SimpleNamespace(update=lambda done: bar.update(
            min(done * world_size(), bar.total - bar.n)))
        for i in missing:
            numbers = range(i * PAIRS_PER_SHARD, i * PAIRS_PER_SHARD + sizes[i])
            texts = [prompts[number % len(prompts)] for number in numbers]
            seeds = [first_seed + number for number in numbers]
            latents = draw_latents(
                model, texts, seeds, *how, batch_size=batch_size, bar=everyones
            ).cpu()
            finite = torch.isfinite(latents).flatten(1).all(1)
            if not finite.all():
                bad = numbers[(~finite).nonzero()[0].item()]
                raise BadInput(f"{folder}: the teacher's latent of pair {bad} is not finite; try "
                               "--dtype fp32 and other --pairs")
            tensors = {"latents": latents.half(), "seeds": torch.tensor(seeds)}
            write = functools.partial(save_file, tensors, metadata={"prompts": json.dumps(texts)})
            write_whole(shard_path(folder, i), write, every_rank=True)
    wait_for_all()
    let_others_in(folder)
    for path in (shard_path(folder, i) for i in range(len(sizes))):
        if not path.exists():
            raise BadInput(
                f"{path}: made by another process and not here; name a --pairs that all nodes share"
            )
    return Pairs(folder)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def shard_is_whole(folder: Path, number: int, size: int, shape: tuple, repair: bool) -> bool:
    """Is this shard there with `size` pairs? BadInput where it is damaged, unless to be repaired.

    A shorter one, the last of a smaller set, is made again. A longer one is the start of the same.
    """
    path = shard_path(folder, number)
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            length, *rest = file.get_slice("latents").get_shape()
            texts = json.loads(file.metadata()["prompts"])
            seeds = file.get_slice("seeds").get_shape()
        if tuple(rest) != shape or len(texts) != length or seeds != [length]:
            raise ValueError("its parts do not fit together")
        return length >= size
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as problem:
        if repair:
            return False
        raise BadInput(
            f"{path}: damaged ({problem}); --repair makes it again, or delete it"
        ) from None


# --------------------------------------------------------------------------------------------------
# Reading them


class Pairs:
    """A folder of pairs, read through the memory map: pairs[indices], or shuffled pairs.batch()."""

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

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        """X0 and X1 (B, 4, h, w) in fp32 on the CPU, and their prompts."""
        places = [divmod(int(i), PAIRS_PER_SHARD) for i in indices]
        x1 = torch.stack([self.shards[shard]["latents"][row] for shard, row in places]).float()
        seeds = [self.shards[shard]["seeds"][row] for shard, row in places]
        x0 = noise_from_seeds(seeds, tuple(x1.shape[1:]))
        return x0, x1, [self.prompts[shard][row] for shard, row in places]

    def batch(self, samples: Tensor, seed: int) -> tuple[Tensor, Tensor, list[str]]:
        """The pairs of these samples of a run, numbered from 0: in a new order every epoch."""
        return self[shuffled(samples, len(self), seed)]
