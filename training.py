"""The one training loop: every training of this repository goes through `train`.

Each iteration: fetch a batch, set the learning rate, forward, backward, clip, AdamW, EMA, log,
save, validate. Progress, warm-up and EMA half-life are counted in samples.

Everything random in an iteration comes from a generator seeded by (seed, iteration), and samples
are numbered from 0 over the whole run. A run's position is therefore one number: after `kill -9`
the same command continues, and on a CPU the result equals an uninterrupted run bit for bit.

Under torchrun each process computes its share of each batch, DistributedDataParallel averages the
gradients, and the first process writes; the result is the same up to rounding. Besides activations,
a GPU holds 16 bytes a parameter (weights, gradients, two moments) and 4 of EMA, which --ema-device
cpu moves to main memory. A run's folder: state.safetensors, settings.json, metrics.jsonl.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from command import (
    BadInput, DefaultByModel, NotFinite, all_gather, barrier, check_same_settings, dtype_name,
    fraction, is_out_of_memory, lock_folder, non_negative, non_negative_int, pick_dtype, positive,
    rank, world_size, write_atomically, write_json, write_text,
)

PAPER_WARMUP, PAPER_HALF_LIFE = 1_000, 6_931  # iterations: EMA 0.9999 halves in 6,931
SAVE_SECONDS = 15 * 60  # a state is never older than this when a run is logged
TIME_BINS = 10  # the loss is also logged for each tenth of [0, 1]


@dataclass
class TrainingOptions:
    """How to train. Counts are samples unless the name says iterations."""

    iterations: int
    batch_size: int = 64  # over all micro-batches and processes
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup_samples: int = 0
    cooldown: float = 0.0  # last fraction of the run, in which the learning rate falls to 0
    ema_half_life: int = 500_000
    ema_ramp: float = 0.0  # the half-life is at most this fraction of the samples seen; 0: no limit
    clip_norm: float = 1.0
    seed: int = 0
    dtype: torch.dtype = torch.float32  # of the forward pass; bf16 under autocast
    # These change nothing but rounding, so a run may continue with others:
    accumulate: int = 1  # micro-batches of a batch, over all processes
    save_every: int = 1000  # iterations
    log_every: int = 10  # iterations
    name: str = "training"  # for the progress bar and error lines


# --------------------------------------------------------------------------------------------------
# The loop


def train(
    network: nn.Module, ema: nn.Module, batch: Callable, loss: Callable, options: TrainingOptions,
    folder: str | Path, settings: dict, validate: Callable | None = None,
) -> None:
    """Train the network, resuming from `folder`. Both networks end with the averaged weights.

    ema: of `ema_copy`; it has the averaged weights in every iteration.
    batch(samples, share, generator): this process's share of a batch: tensors and lists with one
        entry a sample. samples (B,) int64 numbers the whole batch, share is a slice of it. Draw
        random numbers for the whole batch, then slice: any number of processes sees the same.
    loss(network, *batch): losses (B,), and their t in [0, 1] (B,) or None; calls network once.
    settings: what else decides the result; a run in the same folder must have the same.
    validate(step, loss): called before the first iteration and after each save of save_every.

    BadInput: a loss or gradient that is not finite, out of memory, Ctrl-C (each names the state
    that is kept); a damaged state, or one of another run; another run at work in the folder.
    """
    folder, size = Path(folder), options.batch_size
    weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    averages = {name: weight for name, weight in ema.named_parameters() if name in weights}
    device = next(iter(weights.values())).device
    autocast = torch.autocast(device.type, options.dtype, cache_enabled=False,
                              enabled=options.dtype != torch.float32)
    share = slice(rank() * size // world_size(), (rank() + 1) * size // world_size())
    micro = math.ceil(size / options.accumulate)

    def fetch(step: int) -> tuple:
        samples = torch.arange(step * size, (step + 1) * size)
        return batch(samples, share, generator_for(options.seed, step))

    with errors_name_the_state(options, folder), ThreadPoolExecutor(1) as prefetch:
        optimizer = torch.optim.AdamW(weights.values(), weight_decay=options.weight_decay,
                                      fused=device.type in ("cpu", "cuda"))
        state = {}  # all tensors that training changes, by their keys on disk
        for name, weight in weights.items():
            moments = {"exp_avg": torch.zeros_like(weight.data),
                       "exp_avg_sq": torch.zeros_like(weight.data)}
            optimizer.state[weight] = {"step": torch.zeros((), device=device)} | moments
            tensors = {"weights": weight.data, "ema": averages[name].data} | moments
            state |= {f"{kind}.{name}": tensor for kind, tensor in tensors.items()}
        first = open_run(folder, options, settings, state)
        for moments in optimizer.state.values():
            moments["step"].fill_(first)
        model = network
        if world_size() > 1:
            model = DistributedDataParallel(network, gradient_as_bucket_view=True)
        network.train()
        coming = prefetch.submit(fetch, first)
        if validate and (first % options.save_every == 0 or first == options.iterations):
            with autocast:
                validate(first, loss)
        losses, times, logged = [], [], first  # logged: the step of the last row
        saved = clock = time.monotonic()
        bar = tqdm(range(first, options.iterations), options.name, options.iterations,
                   initial=first, unit="it", dynamic_ncols=True, disable=rank() > 0)
        for step in bar:
            inputs = [x.to(device) if isinstance(x, Tensor) else x for x in coming.result()]
            if step + 1 < options.iterations:  # prepared while this iteration computes
                coming = prefetch.submit(fetch, step + 1)

            warm = (step + 1) * size / max(options.warmup_samples, 1)
            left = (1 - step / options.iterations) / options.cooldown if options.cooldown else 1.0
            learning_rate = options.learning_rate * min(1.0, warm, left)
            optimizer.param_groups[0]["lr"] = learning_rate

            for start in range(0, len(inputs[0]), micro):
                # Processes average the gradients of the last micro-batch only.
                sync = world_size() == 1 or start + micro >= len(inputs[0])
                with contextlib.nullcontext() if sync else model.no_sync():
                    with autocast:
                        each, t = loss(model, *(x[start : start + micro] for x in inputs))
                    (each.sum() * (world_size() / size)).backward()
                losses.append(each.detach())
                times.append(t)

            norm = nn.utils.clip_grad_norm_(weights.values(), options.clip_norm).item()
            if not math.isfinite(norm):  # and has not reached the weights
                raise FloatingPointError(f"the loss or its gradient is not finite at step {step}, "
                                         f"samples {step * size} to {(step + 1) * size - 1}")
            optimizer.step()
            # DDP's gradients are views of its buckets, so they are zeroed in place.
            optimizer.zero_grad(set_to_none=world_size() == 1)

            half_life = options.ema_half_life
            if options.ema_ramp:
                half_life = min(half_life, options.ema_ramp * step * size)
            decay = 0.5 ** (size / max(1.0, half_life))
            latest = [weights[name].detach().to(mean.device) for name, mean in averages.items()]
            torch._foreach_lerp_(list(averages.values()), latest, 1 - decay)

            step += 1  # iterations done
            is_last, overdue = step == options.iterations, False
            if step % options.log_every == 0 or is_last:
                seconds = (time.monotonic() - clock) / (step - logged)
                row = {"step": step, "samples": step * size, "loss": None, "gradient_norm": norm,
                       "learning_rate": learning_rate, "seconds_per_step": seconds}
                overdue = log(folder, row, losses, times, time.monotonic() - saved >= SAVE_SECONDS)
                bar.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
                losses, times, logged, clock = [], [], step, time.monotonic()
            if step % options.save_every == 0 or is_last or overdue:
                save_state(folder, step, options, settings, state)
                saved = time.monotonic()
            if validate and (step % options.save_every == 0 or is_last):
                started = time.monotonic()
                with autocast:
                    validate(step, loss)
                clock += time.monotonic() - started

    optimizer.zero_grad(set_to_none=True)
    for name, weight in weights.items():
        weight.data.copy_(averages[name])
    network.eval()


def ema_copy(network: nn.Module, device: str | torch.device | None = None) -> nn.Module:
    """A copy to average the weights in, on `device`; weights that do not train are shared."""
    frozen = {id(w): w for w in network.parameters() if not w.requires_grad}
    ema = copy.deepcopy(network, frozen)
    for weight in ema.parameters():
        if id(weight) not in frozen:
            weight.requires_grad_(False)
            weight.data = weight.data.to(device or weight.device)
    return ema.eval()


@contextlib.contextmanager
def errors_name_the_state(options: TrainingOptions, folder: Path):
    """What stops a run as one line, which says what of the run is kept."""
    kind = BadInput
    try:
        yield
        return
    except FloatingPointError as problem:
        kind, what = NotFinite, str(problem)
        remedy = ("; try another run, with another --out, at a lower learning rate or in --dtype "
                  "fp32")
    except KeyboardInterrupt:
        what, remedy = "interrupted", ", run the same command again to continue"
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        flag = "--lpips-accumulate" if "LPIPS" in options.name else "--accumulate"
        what, remedy = "out of memory", (
            f", continue it with more micro-batches than {options.accumulate} ({flag}), "
            "--gradient-checkpointing or another flag of --help that saves memory")
    step = saved_step(folder)
    kept = f"the state of step {step} is kept in {folder}" if step else "no state is saved yet"
    raise kind(f"{options.name}: {what}; {kept}{remedy}")


# --------------------------------------------------------------------------------------------------
# Randomness that depends on the position in the run alone


def seed_of(*numbers: int) -> int:
    """A seed from integers, e.g. (seed, step): well mixed, the same on every machine."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch's generators take 63 bits


def generator_for(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*numbers))


# --------------------------------------------------------------------------------------------------
# The state on disk


def run_settings(options: TrainingOptions, settings: dict) -> dict:
    """What decides a run's result. Its length does so only with a cooldown."""
    decisive = settings | asdict(options) | {"dtype": dtype_name(options.dtype)}
    for name in ("accumulate", "save_every", "log_every", "name"):
        del decisive[name]
    return decisive if options.cooldown else {k: decisive[k] for k in decisive if k != "iterations"}


def check_run(folder: str | Path, options: TrainingOptions, settings: dict) -> bool:
    """Is this run finished? BadInput: the folder holds another run, or this one beyond its end."""
    if options.batch_size < world_size():
        raise BadInput(f"--batch-size {options.batch_size}: smaller than the number of processes, "
                       f"{world_size()}")
    step = saved_step(folder)
    if not step:  # settings.json without a state: killed before the first save
        return False
    check_same_settings(Path(folder, "settings.json"), run_settings(options, settings),
                        "another run", f"give another --out or delete {folder}")
    if step > options.iterations:
        raise BadInput(f"{folder}: its run is at iteration {step}, beyond the {options.iterations} "
                       "asked for; ask for at least as many, or give another --out")
    return step == options.iterations


def open_run(folder: Path, options: TrainingOptions, settings: dict, state: dict) -> int:
    """Lock and check the folder, load its state, drop later metrics; the iterations done."""
    lock_folder(folder)
    check_run(folder, options, settings)
    step = load_state(folder, state)
    if len(set(all_gather([step]))) > 1:
        raise BadInput(f"{folder}: the processes find states of different steps in it; name an "
                       "--out that all nodes share")
    rows = [row for row in read_metrics(folder, "step") if 0 < step >= row["step"]]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return step


def save_state(folder: Path, step: int, options: TrainingOptions, settings: dict, state: dict):
    """Write settings.json and state.safetensors; the other processes wait."""
    write_json(folder / "settings.json", run_settings(options, settings))
    if rank() == 0:
        # Kernels lie on disk as (O, H, W, I): of a large network in memory, so nothing is copied.
        tensors = {key: permuted(tensor, 0, 2, 3, 1).contiguous() for key, tensor in state.items()}
        progress = {"progress": json.dumps({"step": step})}
        write_atomically(folder / "state.safetensors",
                         lambda path: save_file(tensors, path, progress))
    barrier()


def load_state(folder: Path, state: dict) -> int:
    """Copy the saved state into the run's; the iterations done, 0 without a state."""
    path, step = folder / "state.safetensors", saved_step(folder)
    try:
        for start in range(0, len(state) if step else 0, 4):
            with safe_open(path, "pt") as file:  # opened for a few: what is read stays mapped
                for key in list(state)[start : start + 4]:
                    state[key].copy_(permuted(file.get_tensor(key), 0, 3, 1, 2))
    except (SafetensorError, RuntimeError) as problem:
        if is_out_of_memory(problem):
            raise
        raise BadInput(f"{path}: damaged or of another model ({problem}); delete {folder} to start "
                       "again") from None
    return step


def permuted(tensor: Tensor, *order: int) -> Tensor:
    return tensor.permute(order) if tensor.ndim == 4 else tensor


def saved_step(folder: str | Path) -> int:
    """Iterations done by the run in this folder, 0 without a state."""
    path = Path(folder) / "state.safetensors"
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["progress"])["step"]
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: damaged, or not a state; delete {folder} to start again") from None


def log(folder: Path, row: dict, losses: list, times: list, late: bool) -> bool:
    """Add mean losses to the row and append it; is a save overdue for the first process?"""
    by_t = times[0] is not None
    mine = torch.cat(losses).float().cpu(), torch.cat(times).float().cpu() if by_t else None, late
    losses, times, late = zip(*all_gather([mine]))
    losses = torch.cat(losses)
    row |= {"loss": losses.mean().item(), "loss_by_t": []}
    if by_t:
        bins = (torch.cat(times) * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        row["loss_by_t"] = [losses[bins == k].mean().item() if (bins == k).any() else None
                            for k in range(TIME_BINS)]
    append_metrics(folder, row)
    return late[0]


def append_metrics(folder: Path, row: dict) -> None:
    if rank() == 0:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(folder: str | Path, having: str = "loss") -> list[dict]:
    """Rows of metrics.jsonl with this key: "loss" of training, "held_out_loss" of validation."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may cut the last
    return [row for row in rows if having in row]


def add_training_options(
    parser: argparse.ArgumentParser, out: str, batch_size=64,
    starts="teacher, negated (a diffusion's output), random or a CHECKPOINT",
) -> None:
    """The flags of every training command, but for its iterations. starts: values of --init."""
    add, either = parser.add_argument_group("training").add_argument, DefaultByModel
    add("--batch-size", type=positive, default=batch_size, help="samples of an iteration")
    add("--init", default=either("teacher", "negated"),
        help=f"initial weights: {starts}")
    add("--learning-rate", type=non_negative, default=either(None, 5e-4),
        help="peak; in reflow of Stable Diffusion 1e-06, of a flow 1e-07")
    add("--cooldown", type=fraction, default=either(0.0, 0.6),
        help="last fraction of a stage, in which the learning rate falls to 0")
    add("--warmup-samples", type=non_negative_int, default=either(None, 3_200),
        help="samples until the full learning rate; for SD 1,000 times the batch")
    add("--ema-half-life", type=positive, default=either(None, 10_000),
        help="samples in which the EMA halves; for SD 6,931 times the batch")
    add("--ema-ramp", type=fraction, default=either(0.0, 0.05),
        help="limit the half-life to this fraction of the samples seen; 0: no limit")
    add("--accumulate", type=positive, default=either(None, 1),
        help="micro-batches of a batch; for SD as 80 GB need them")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
        default=either(True, False), help="less memory, a third more time")
    add("--ema-device", choices=["cpu"], help="keep the EMA in main memory")
    add("--compile", action="store_true", help="torch.compile: minutes at the start, then faster")
    add("--save-every", type=positive, default=500, help="iterations; 15 minutes at most")
    add("--out", default=out, help="the model; OUT.state/ has its training state")


def training_options(
    args: argparse.Namespace, name: str, iterations: int, batch_size: int, learning_rate: float,
    accumulate: int | None, fits: int, dtype: torch.dtype,
) -> TrainingOptions:
    """The options of one stage from resolved flags. fits: samples that 80 GB hold at once."""
    warmup = PAPER_WARMUP * batch_size if args.warmup_samples is None else args.warmup_samples
    return TrainingOptions(
        iterations, batch_size, learning_rate, warmup_samples=warmup, cooldown=args.cooldown,
        ema_half_life=args.ema_half_life or PAPER_HALF_LIFE * batch_size, ema_ramp=args.ema_ramp,
        seed=args.seed, dtype=dtype, accumulate=accumulate or math.ceil(batch_size / fits),
        save_every=args.save_every, log_every=max(1, min(10, 640 // batch_size)), name=name,
    )


def autocast_dtype(name: str, device: torch.device, network: nn.Module) -> torch.dtype:
    """The dtype to train in. "auto": small networks on a CPU stay in fp32, which is faster."""
    small = sum(p.numel() for p in network.parameters()) < 50_000_000
    slow = name == "auto" and device.type == "cpu" and small
    dtype = torch.float32 if slow else pick_dtype(name, device)
    if dtype == torch.float16:  # gradients would underflow
        raise BadInput("--dtype fp16: is for sampling only; train in bf16 or fp32")
    return dtype
