"""The one training loop: the tiny teacher, reflow and both stages of distillation use `train`.

In order: fetch a batch, set the learning rate, forward, backward, clip, AdamW, average the weights
(EMA), log, save. Progress, warm-up and EMA half-life are counted in samples.

Everything random in a step is drawn from a generator seeded by (seed, step), and samples are
numbered from 0 over the whole run. So the position in the run is one number, and a run that was
killed and started again computes, bit for bit on a CPU, what it would have without stopping.

Under torchrun every process computes its share of each batch, DistributedDataParallel averages the
gradients while the backward pass still runs, and the first process writes. The same batch at any
number of processes gives the same run up to rounding, so the number may change between stops. A GPU
holds, beside activations, 4 bytes a parameter of weights, 4 of gradients, 8 of moments and 4 of
EMA, which ema_device moves into main memory.

The state is one file that appears whole or not at all, `<out>.state/state.safetensors`, beside
`settings.json` and `metrics.jsonl`, which `plot_loss` draws. It is written every `save_every`
iterations, and whenever a run is logged 15 minutes after the last time. Before the first update and
after each state a callback may look at the averaged weights (watch.py).
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from command import (
    BadInput, check_output, dtype_name, from_all_processes, keep_others_out, note, pick_dtype, rank,
    refuse_other, wait_for_all, world_size, write_json, write_text, write_whole,
)

PAPERS_WARMUP, PAPERS_HALF_LIFE = 1_000, 6_931  # updates: EMA 0.9999 halves in 6,931
LOG_SAMPLES, LOG_UPDATES = 640, 10
SAVE_SECONDS = 15 * 60  # a state is never older than that when a run is logged
LEAST_SCALE = 2**-10  # of fp16's losses; below it a gradient is not finite for other reasons
BYTES_PER_PARAMETER = 16  # of a saved state: weights, EMA and two moments in fp32
TIME_BINS = 10  # the loss is also reported for each tenth of [0, 1]


@dataclass
class TrainingOptions:
    """How to train. Counts are samples unless the name says iterations."""

    iterations: int
    batch_size: int = 64  # samples of one update, over all parts and processes
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup_samples: int = 0
    cooldown: float = 0.0  # share of the run, at its end, over which the rate falls to 0
    ema_half_life: int = 500_000
    ema_ramp: float = 0.0  # the half-life is at most this share of the samples seen; 0: no limit
    clip_norm: float = 1.0
    seed: int = 0
    # What does not change the result, but for rounding; a run may go on with others of these:
    accumulate: int = 1  # parts of a batch that pass by themselves, over all processes
    save_every: int = 1000  # iterations
    log_every: int | None = None  # iterations; None: 640 samples or 10 updates, what comes first
    ema_device: str | None = None  # where the averaged weights lie; None: beside the weights

    def __post_init__(self):
        if self.log_every is None:
            self.log_every = max(1, min(LOG_UPDATES, LOG_SAMPLES // self.batch_size))


def options_from(
    args: argparse.Namespace, iterations: int, batch: int, rate: float, accumulate: int | None,
    fits: int,
) -> TrainingOptions:
    """Those of one stage, from what reflow.py or distill.py is asked for.

    fits: samples that pass at once where accumulate is None.
    """
    warmup, half_life = args.warmup_samples, args.ema_half_life
    return TrainingOptions(
        iterations, batch, rate, cooldown=args.cooldown,
        warmup_samples=PAPERS_WARMUP * batch if warmup is None else warmup,
        ema_half_life=half_life or PAPERS_HALF_LIFE * batch, ema_ramp=args.ema_ramp,
        accumulate=accumulate or math.ceil(batch / fits),
        seed=args.seed, save_every=args.save_every, ema_device=args.ema_device,
    )


# --------------------------------------------------------------------------------------------------
# The loop


def train(
    network: nn.Module, draw: Callable, loss: Callable, options: TrainingOptions,
    folder: str | Path, settings: dict, name: str = "training", dtype: torch.dtype = torch.float32,
    watch: Callable | None = None, averaged: nn.Module | None = None,
) -> None:
    """Train the network in place, resuming from `folder`; it ends with its averaged (EMA) weights.

    draw(samples, share, generator): this process's share of a batch, a tuple of tensors and lists
        with an entry a sample. samples (B,) int64 are the numbers of the whole batch's samples and
        share a slice of them; what is random is drawn for the whole batch and then sliced, so that
        any number of processes sees the same.
    loss(network, *batch): the loss of each sample (B,), and their t in [0, 1] (B,) or None. It
        calls the network that it is given, once, and gets a part of a batch at a time.
    settings: what else decides the result; a run in the same folder must have the same.
    dtype: bf16 or fp16 runs the forward pass under autocast; weights, moments, EMA stay fp32.
    watch(step, loss): called by the first process while the network has its averaged weights; what
        it returns, a dictionary of figures, goes to metrics.jsonl.
    averaged: a copy of the network that shall have the averaged weights at every step, for a loss
        whose target it is.

    BadInput: a loss or gradient that is not finite, no memory left, Ctrl-C (each names the state
    that is kept); a damaged state, one of other settings or beyond the iterations asked for,
    another run at work in the folder, no room for the state.
    """
    guard = functools.partial(explained, name, Path(folder), options)
    with guard():
        run = open_run(network, options, Path(folder), settings, name, dtype)
        shared = shared_by_processes(network)
        for key, weight in averaged.named_parameters() if averaged else ():
            weight.data = run.ema.get(key, weight.data)  # the same memory
    share = slice(*(r * options.batch_size // world_size() for r in (rank(), rank() + 1)))

    def fetch(step: int) -> tuple:
        samples = torch.arange(step * options.batch_size, (step + 1) * options.batch_size)
        return draw(samples, share, generator_for(options.seed, step))

    network.train()
    losses, times = [], []
    with guard(), ThreadPoolExecutor(1) as ahead, progress_bar(run) as bar:
        coming = ahead.submit(fetch, run.step)
        if is_looked_at(run):  # at its start, or where a killed run had no time for it
            look(run, watch, loss)
        last_log = time.monotonic()
        for step in range(run.step, options.iterations):
            batch = to_device(coming.result(), run.device)
            if step + 1 < options.iterations:  # fetched while this one is computed
                coming = ahead.submit(fetch, step + 1)

            rate = learning_rate_at(step, options)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            update_losses, update_times, norm = update(run, shared, loss, batch)
            losses, times = losses + update_losses, times + update_times

            run.step = step + 1
            last, overdue = run.step == options.iterations, False
            if run.step % options.log_every == 0 or last:
                seconds = (time.monotonic() - last_log) / options.log_every
                mean, overdue = log(run, losses, times, norm, rate, seconds)
                losses, times, last_log = [], [], time.monotonic()
                bar.set_postfix(loss=f"{mean:.4g}", refresh=False)
            if run.step % options.save_every == 0 or last or overdue:
                save_state(run)
                last_log += look(run, watch, loss) if is_looked_at(run) else 0.0
            bar.update()
    run.optimizer.zero_grad(set_to_none=True)
    for key, weight in run.weights.items():
        weight.data.copy_(run.ema[key])
    network.eval()


def shared_by_processes(network: nn.Module) -> nn.Module:
    """The network, under several processes with its gradients averaged over them."""
    if world_size() == 1:
        return network
    return DistributedDataParallel(network, gradient_as_bucket_view=True)


def update(run: "Run", shared: nn.Module, loss: Callable, batch: tuple) -> tuple[list, list, float]:
    """One update of the weights from this process's share of a batch: losses, t, gradient's norm.

    shared: the network, or DistributedDataParallel around it.
    """
    options, mine = run.options, len(batch[0]) if batch else 1
    part = math.ceil(options.batch_size / options.accumulate)
    scale = world_size() / options.batch_size  # the processes' gradients are averaged
    half = run.dtype != torch.float32
    autocast = torch.autocast(run.device.type, run.dtype, enabled=half, cache_enabled=False)
    # Buckets of several processes are the gradients' own memory: those are kept and zeroed.
    run.optimizer.zero_grad(set_to_none=world_size() == 1)
    losses, times = [], []
    for start in range(0, mine, part):
        alone = world_size() > 1 and start + part < mine  # only the last part is averaged
        with shared.no_sync() if alone else contextlib.nullcontext():
            with autocast:
                per_sample, t = loss(shared, *(c[start : start + part] for c in batch))
            run.scaler.scale(per_sample.sum() * scale).backward()
        losses.append(per_sample.detach())
        times.append(t)

    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.weights.values(), options.clip_norm).item()
    check_finite(run, norm, losses)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    average(run)
    return losses, times, norm


def learning_rate_at(step: int, options: TrainingOptions) -> float:
    """Rising over the warm-up's samples, constant, falling to 0 over the cooldown's share."""
    warm = (step + 1) * options.batch_size / max(options.warmup_samples, 1)
    left = (1 - step / options.iterations) / options.cooldown if options.cooldown else 1.0
    return options.learning_rate * min(1.0, warm, left)


def to_device(batch: tuple, device: torch.device) -> tuple:
    return tuple(c.to(device) if isinstance(c, Tensor) else c for c in batch)


def average(run: "Run") -> None:
    """Move the averaged weights towards the new ones: half the way in a half-life's samples."""
    options, half_life = run.options, run.options.ema_half_life
    if options.ema_ramp:
        half_life = min(half_life, options.ema_ramp * run.step * options.batch_size)
    kept = 0.5 ** (options.batch_size / max(1.0, half_life))
    now = [weight.detach().to(run.ema_device) for weight in run.weights.values()]
    torch._foreach_lerp_(list(run.ema.values()), now, 1 - kept)


def check_finite(run: "Run", norm: float, losses: list[Tensor]) -> None:
    """BadInput where the gradient is not finite, before it reaches the weights.

    Under fp16 the scaler passes over such an update and lowers its scale, until that is right.
    """
    if math.isfinite(norm):
        return
    finite = all(from_all_processes([torch.isfinite(torch.cat(losses)).all().item()]))
    if finite and run.scaler.is_enabled() and run.scaler.get_scale() >= LEAST_SCALE:
        return
    size, step = run.options.batch_size, run.step
    what = "the loss is not finite"
    if finite:
        what = "the gradient is not finite, though the loss is,"
    raise BadInput(
        f"{run.name}: {what} at step {step}, samples {step * size} to {(step + 1) * size - 1}; "
        f"{kept(run.folder)}; try another run, with another --out, at a lower learning rate or in "
        "--dtype fp32"
    )


@contextlib.contextmanager
def explained(name: str, folder: Path, options: TrainingOptions):
    """One line for what stops a run from outside, which names what of it is kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise BadInput(
            f"{name}: interrupted; {kept(folder)}, run the same command again to continue"
        ) from None
    except torch.OutOfMemoryError:
        raise BadInput(
            f"{name}: out of GPU memory; {kept(folder)}, and the run goes on with what needs less: "
            f"more parts of a batch than {options.accumulate} (--accumulate, in LPIPS "
            "--lpips-accumulate), --gradient-checkpointing, --ema-device cpu, --validation-pairs 0"
        ) from None


def kept(folder: Path) -> str:
    """What of a run is not lost."""
    step = saved_progress(folder)["step"]
    return f"the state of step {step} is kept in {folder}" if step else "no state is saved yet"


# --------------------------------------------------------------------------------------------------
# Randomness that depends on the position in the run alone


def seed_of(*numbers: int) -> int:
    """A seed from integers, e.g. (seed, step): well mixed, the same on every machine."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch's generators take no more than 63 bits


def generator_for(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*numbers))


@functools.lru_cache(maxsize=2)
def permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator_for(seed, epoch))


def shuffled(samples: Tensor, size: int, seed: int) -> Tensor:
    """Sample numbers of the run -> indices into data of `size`, in a new order every epoch."""
    epochs, indices = samples // size, torch.empty_like(samples)
    for epoch in epochs.unique().tolist():
        mine = epochs == epoch
        indices[mine] = permutation(size, seed, epoch)[samples[mine] % size]
    return indices


# --------------------------------------------------------------------------------------------------
# A run and its state on disk


@dataclass
class Run:
    """What training changes, and where it lies on the disk."""

    name: str
    folder: Path
    options: TrainingOptions
    settings: dict  # what decides the result
    weights: dict[str, nn.Parameter]
    ema: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    dtype: torch.dtype  # of the forward pass
    step: int = 0  # iterations done
    saved: int = 0  # at the last state on the disk
    saved_at: float = 0.0

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    @property
    def ema_device(self) -> torch.device:
        return next(iter(self.ema.values())).device


def new_run(
    network: nn.Module, options: TrainingOptions, folder: Path, settings: dict, name: str, dtype,
) -> Run:
    """A run at its start. Nothing is read or written."""
    weights = {key: weight for key, weight in network.named_parameters() if weight.requires_grad}
    device = next(iter(weights.values())).device
    fused = device.type in ("cpu", "cuda")  # one kernel, without copies of all moments
    return Run(
        name, folder, options, decisive(options, settings, dtype), weights,
        ema={key: w.detach().to(options.ema_device or device, copy=True)
             for key, w in weights.items()},
        optimizer=torch.optim.AdamW(weights.values(), options.learning_rate,
                                    weight_decay=options.weight_decay, fused=fused),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        dtype=dtype, saved_at=time.monotonic(),
    )


def open_run(
    network: nn.Module, options: TrainingOptions, folder: Path, settings: dict, name: str, dtype,
) -> Run:
    """The run in this folder, where it stands, or a new one. BadInput as in `train`."""
    count = sum(w.numel() for w in network.parameters() if w.requires_grad)
    state = folder / "state.safetensors"
    # Room for two, because the old state is replaced only when the new one is whole.
    check_output(state, needed=(1 if state.exists() else 2) * BYTES_PER_PARAMETER * count)
    keep_others_out(folder)
    check_stage(folder, options, settings, dtype)
    wait_for_all()
    run = new_run(network, options, folder, settings, name, dtype)
    load_state(run)
    if len(set(from_all_processes([run.step]))) > 1:
        raise BadInput(f"{folder}: the processes find states of different steps in it; name an "
                       "--out that all nodes share")
    # Those of a run that has no state yet may be of other settings.
    rows = [json.dumps(row) + "\n" for row in read_metrics(folder, "step")
            if 0 < run.step >= row["step"]]
    write_text(folder / "metrics.jsonl", "".join(rows))
    return run


def check_stage(folder: str | Path, options: TrainingOptions, settings: dict, dtype) -> bool:
    """Is this very run finished? To be asked for every stage of a command before any work.

    BadInput where the folder holds another run, or this run beyond the iterations that are asked
    for, and where there are more processes than samples in a batch.
    """
    if options.batch_size < world_size():
        raise BadInput(
            f"--batch-size {options.batch_size}: smaller than the number of processes, "
            f"{world_size()}"
        )
    step = saved_progress(folder)["step"]
    if not step:  # settings alone are of a run that was killed before its first state
        return False
    remedy = f"give another --out or delete {folder}"
    refuse_other(
        Path(folder, "settings.json"), decisive(options, settings, dtype), "another run", remedy
    )
    if step > options.iterations:
        raise BadInput(f"{folder}: its run is at iteration {step}, beyond the {options.iterations} "
                       "asked for; ask for at least as many, or give another --out")
    return step == options.iterations


def is_finished(
    out: str | Path, stages: list[tuple[Path, TrainingOptions, dict]], dtype: torch.dtype,
) -> bool:
    """Are all stages of a command at their end, and is its model newer than their states?

    stages: folder, options and settings of each. All are checked, as by `check_stage`.
    """
    ended = [check_stage(folder, options, settings, dtype) for folder, options, settings in stages]
    out, last = Path(out), stages[-1][0] / "state.safetensors"
    # A run that looks at its states writes a model with each, so that one may be of an earlier one.
    newer = out.exists() and last.exists() and out.stat().st_mtime_ns >= last.stat().st_mtime_ns
    return from_all_processes([all(ended) and newer])[0]


def decisive(options: TrainingOptions, settings: dict, dtype: torch.dtype) -> dict:
    """What decides a run's result. Its length does not, unless its rate is to fall to 0."""
    practical = {"accumulate", "save_every", "log_every", "ema_device"}
    practical |= set() if options.cooldown else {"iterations"}
    chosen = {key: value for key, value in asdict(options).items() if key not in practical}
    return settings | chosen | {"dtype": dtype_name(dtype)}


def save_state(run: Run) -> None:
    """Write the state, and with the first the settings; the others wait for the first process."""
    if not run.saved:
        write_json(run.folder / "settings.json", run.settings)
    if rank() == 0:
        tensors, updates = {}, 0
        for name, weight in run.weights.items():
            # Under fp16 every update so far may have been passed over: no moments are as zeros.
            zeros = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight),
                     "step": 0}
            moments = run.optimizer.state.get(weight) or zeros
            updates = int(moments["step"])
            for kind, tensor in (("weights", weight.detach()), ("ema", run.ema[name]),
                                 ("exp_avg", moments["exp_avg"]),
                                 ("exp_avg_sq", moments["exp_avg_sq"])):
                tensors[f"{kind}.{name}"] = channels_last(tensor)
        # In one entry, since safetensors writes several in any order and runs would differ.
        progress = json.dumps(
            {"step": run.step, "updates": updates, "scaler": run.scaler.state_dict()}
        )
        write_whole(run.folder / "state.safetensors",
                    functools.partial(save_file, tensors, metadata={"progress": progress}))
    wait_for_all()  # for the first, which may write for minutes
    run.saved, run.saved_at = run.step, time.monotonic()


def load_state(run: Run) -> None:
    """Copy the saved state, if there is one, into the run."""
    path, progress = run.folder / "state.safetensors", saved_progress(run.folder)
    if not progress["step"]:
        return
    try:
        for name, weight in run.weights.items():
            with safe_open(path, "pt") as file:  # what is read stays mapped until then
                saved = {kind: channels_second(file.get_tensor(f"{kind}.{name}"))
                         for kind in ("weights", "ema", "exp_avg", "exp_avg_sq")}
                weight.data.copy_(saved["weights"])
                run.ema[name].copy_(saved["ema"])
                moments = {kind: torch.empty_like(weight).copy_(saved[kind])
                           for kind in ("exp_avg", "exp_avg_sq")}
            step = torch.tensor(float(progress["updates"]), device=weight.device)
            run.optimizer.state[weight] = moments | {"step": step}
    except (SafetensorError, RuntimeError) as problem:
        raise BadInput(
            f"{path}: damaged or of another model ({problem}); delete {run.folder} to start again"
        ) from None
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(progress["scaler"])
    run.step = run.saved = progress["step"]


def saved_progress(folder: str | Path) -> dict:
    """How far the run in this folder is: {"step", "updates", "scaler"}; step 0 where there is none.

    updates: those that the optimizer made, fewer than the steps where fp16's scale was too large.
    """
    path = Path(folder) / "state.safetensors"
    if not path.exists():
        return {"step": 0}
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["progress"])
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: damaged, or not a state; delete {folder} to start again") from None


def channels_last(tensor: Tensor) -> Tensor:
    """(O, I, H, W) -> (O, H, W, I): a large network's order in memory, written without a copy."""
    return (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).contiguous()


def channels_second(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor


def autocast_dtype(name: str, device: torch.device, network: nn.Module) -> torch.dtype:
    """The dtype to train in: --dtype's; under "auto" a small network on a CPU stays in fp32.

    There casting costs more time than products in bf16 save.
    """
    small = sum(p.numel() for p in network.parameters()) < 50_000_000
    fp32 = name == "auto" and device.type == "cpu" and small
    return torch.float32 if fp32 else pick_dtype(name, device)


# --------------------------------------------------------------------------------------------------
# What a run reports


def progress_bar(run: Run) -> tqdm:
    return tqdm(total=run.options.iterations, initial=run.step, desc=run.name, unit="it",
                dynamic_ncols=True, disable=rank() > 0)


def log(
    run: Run, losses: list, times: list, norm: float, rate: float, seconds: float,
) -> tuple[float, bool]:
    """Add a row to metrics.jsonl; the mean loss, and if the first process finds a save overdue."""
    late = time.monotonic() - run.saved_at >= SAVE_SECONDS
    t = [] if times[0] is None else [torch.cat(times).float().cpu()]
    everyone = from_all_processes([(torch.cat(losses).float().cpu(), t, late)])
    losses = torch.cat([losses for losses, _, _ in everyone])
    times = [t[0] for _, t, _ in everyone if t]
    row = {
        "step": run.step,
        "samples": run.step * run.options.batch_size,
        "loss": losses.mean().item(),
        "gradient_norm": norm if math.isfinite(norm) else None,
        "learning_rate": rate,
        "seconds_per_step": seconds,
        "loss_by_t": mean_by_time(losses, torch.cat(times)) if times else [],
    }
    add_metrics(run, row)
    return row["loss"], everyone[0][2]


def add_metrics(run: Run, row: dict) -> None:
    if rank() == 0:
        with open(run.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


def is_looked_at(run: Run) -> bool:
    """Not at states that are written for their age alone: looking is dear."""
    return run.step % run.options.save_every == 0 or run.step == run.options.iterations


def look(run: Run, watch: Callable | None, loss: Callable) -> float:
    """Have `watch` look at the averaged weights, unless it has at this step; the seconds it took.

    A run that was killed meanwhile finds its state, and looks again.
    """
    if watch is None:
        return 0.0
    seen = any(row["step"] == run.step for row in read_metrics(run.folder, "held_out_loss"))
    if from_all_processes([seen])[0]:
        return 0.0
    started = time.monotonic()
    if world_size() == 1:
        run.optimizer.zero_grad(set_to_none=True)  # room for what is looked at
    half = run.dtype != torch.float32
    if rank() == 0:
        trained = {name: w.detach().to("cpu", copy=True) for name, w in run.weights.items()}
        for name, weight in run.weights.items():
            weight.data.copy_(run.ema[name])
        with torch.autocast(run.device.type, run.dtype, enabled=half):
            figures = watch(run.step, loss)
        for name, weight in run.weights.items():
            weight.data.copy_(trained[name])
        samples = run.step * run.options.batch_size
        add_metrics(run, {"step": run.step, "samples": samples} | figures)
        plot_loss(run.folder)
    wait_for_all()  # for the first, which may draw for minutes
    return time.monotonic() - started


def mean_by_time(losses: Tensor, times: Tensor) -> list[float | None]:
    """The mean loss in each tenth of [0, 1]; None where no t fell."""
    bins = (times * TIME_BINS).long().clamp(0, TIME_BINS - 1)
    return [losses[bins == k].mean().item() if (bins == k).any() else None
            for k in range(TIME_BINS)]


def tell_what_is_kept(options: TrainingOptions) -> None:
    """Say it where a short run's averaged weights are still much its start's."""
    left = 0.5 ** (options.iterations * options.batch_size / options.ema_half_life)
    # The paper's shortest stage, 18,000 updates, leaves 0.17 of them.
    if left > 0.2 and options.iterations and not options.ema_ramp:
        note(f"after {options.iterations:,} iterations {left:.0%} of the averaged weights are "
             f"still the start's, by --ema-half-life {options.ema_half_life:,}; --ema-ramp 0.05 "
             "forgets it sooner")


def read_metrics(folder: str | Path, having: str = "loss") -> list[dict]:
    """The rows of metrics.jsonl with this key: "loss" of updates, "held_out_loss" of watch.py.

    A last line that a killed run left unfinished is passed over.
    """
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if having in row]


def plot_loss(folder: str | Path) -> None:
    """loss.png from metrics.jsonl: the loss over samples, and over t where it has one.

    With what watch.py saw: the loss on pairs that nothing is trained on.
    """
    rows, held_out = read_metrics(folder), read_metrics(folder, "held_out_loss")
    if not rows:
        return
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for label, key, part, style in (("training", "loss", rows, {"linewidth": 1}),
                                    ("held out", "held_out_loss", held_out, {"marker": "o"})):
        if part:
            axes[0].plot([row["samples"] for row in part], [row[key] for row in part],
                         label=label, **style)
    scale = "log" if all(row["loss"] > 0 for row in rows) else "linear"
    axes[0].set(xlabel="samples seen", ylabel="loss", yscale=scale, title="loss")
    axes[0].legend()
    late = [row["loss_by_t"] for row in rows[-max(1, len(rows) // 5) :] if row["loss_by_t"]]
    if late:
        means = [[by_t[k] for by_t in late if by_t[k] is not None] for k in range(TIME_BINS)]
        centres = [(k + 0.5) / TIME_BINS for k in range(TIME_BINS)]
        heights = [sum(m) / len(m) if m else 0 for m in means]
        axes[1].bar(centres, heights, width=0.9 / TIME_BINS, color="tab:blue",
                    label="training, last fifth of the run")
        if held_out and held_out[-1]["held_out_loss_by_t"]:
            axes[1].plot(centres, held_out[-1]["held_out_loss_by_t"], "o", color="tab:orange",
                         label="held out")
        axes[1].set(xlabel="t  (0 noise, 1 data)", ylabel="loss", title="loss by t")
        axes[1].legend()
    else:
        axes[1].set_visible(False)
    write_whole(Path(folder) / "loss.png", lambda path: figure.savefig(path, dpi=120))
