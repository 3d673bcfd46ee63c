"""The one training loop: the teacher, reflow, both distillation stages and the toys are all trained by `train`.

In order: draw a batch, warm up the learning rate, forward, backward, clip, AdamW, average the weights (EMA), log,
save. Progress, warm-up and EMA half-life are counted in samples.

Everything random in a step is drawn from a generator seeded by (seed, step), and samples are numbered from 0 over
the whole run. So the position in the run is one number, and a run that was killed and started again computes,
bit for bit on a CPU, what it would have computed without stopping.

Under torchrun every process computes its share of each batch, gradients are summed once an update, and the first process
writes. The same batch at any number of processes gives the same run up to rounding, so the number may change between stops.
What a GPU holds beside activations is, for each parameter, 4 bytes of weights, 4 of gradients, 8 of moments and 4 of EMA:
--ema-device cpu moves the EMA into main memory.

The state (weights, EMA, both AdamW moments, under fp16 the loss's scale) is one safetensors file that appears whole or not
at all, in a folder beside the output: `<out>.state/state.safetensors`, with `settings.json` and `metrics.jsonl`, which
`plot_loss` draws. It is written every --save-every iterations, and whenever a run is logged 15 minutes after the last time; a
run that was killed, however, goes on there.
"""

import argparse
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from command import (
    STARTS,
    BadInput,
    ByModel,
    check_output,
    differences,
    dtype_name,
    keep_others_out,
    not_below_zero,
    not_negative,
    note,
    pick_dtype,
    positive,
    rank,
    wait_for_all,
    world_size,
    write_text,
    write_whole,
)

TIME_BINS = 10  # the loss is also reported for each tenth of [0, 1]
PAPERS_WARMUP, PAPERS_HALF_LIFE = 1_000, 6_931  # updates, at any batch: EMA 0.9999 halves in 6,931
MUCH = 0.2  # of the averaged weights; the paper's shortest stage, 18,000 updates, leaves 0.17 of them at the start's
LOG_SAMPLES, LOG_UPDATES = 640, 10  # a run is logged after so many samples or updates, whichever come first
SAVE_SECONDS = 15 * 60  # a state is never older than that when a run is logged
LEAST_SCALE = 2**-10  # of fp16's losses; a gradient that is not finite below it is so for other reasons
BYTES_PER_PARAMETER = 16  # of a saved state: weights, EMA and two moments in fp32


@dataclass
class TrainingOptions:
    """How to train. Counts are samples unless the name says iterations."""

    iterations: int
    batch_size: int = 64  # samples of one update, over all accumulation steps
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup_samples: int = 0
    cooldown: float = 0.0  # share of the run, at its end, over which the learning rate falls to 0
    ema_half_life: int = 500_000
    ema_ramp: float = 0.0  # the half-life is at most this share of the samples seen; 0: it is the same throughout
    clip_norm: float = 1.0
    seed: int = 0
    # What does not change the result, but for rounding:
    accumulate: int = 1  # parts of a batch that pass forward and backward by themselves, over all processes
    save_every: int = 1000  # iterations
    log_every: int = 10  # iterations
    ema_device: str | None = None  # where the averaged weights lie; None: beside the weights


# A run may go on with others of these.
PRACTICAL = ("iterations", "accumulate", "save_every", "log_every", "ema_device")
AUTOCAST_FROM = 50_000_000  # parameters; below, casting costs more time on a CPU than bf16 products save


def initial_weights(text: str) -> str:
    """argparse type: one of STARTS, or a checkpoint."""
    if text not in STARTS and not Path(text).exists():
        raise argparse.ArgumentTypeError(f"must be {', '.join(STARTS)} or a checkpoint that exists, got {text!r}")
    return text


def add_training_options(parser: argparse.ArgumentParser, batch_size: ByModel, learning_rate: str):
    """The options that `options_from` reads, with the defaults of one command. Returns their group.

    learning_rate: what its default is, in words; the command sets it.
    """
    group = parser.add_argument_group("training")
    group.add_argument(
        "--init", type=initial_weights, default=ByModel("teacher", "negated"), metavar="{teacher,negated,random,CHECKPOINT}",
        help="weights to start from; negated: those of a diffusion with the sign of its output changed",
    )  # fmt: skip
    group.add_argument("--batch-size", type=positive, default=batch_size, help="samples of one update")
    group.add_argument("--accumulate", type=positive, help="parts that a batch is split into, over all processes; more "
                       "need less memory and change rounding alone; default: as a GPU of 80 GB needs them for SD")  # fmt: skip
    group.add_argument("--learning-rate", type=not_below_zero, help=f"default: {learning_rate}")
    group.add_argument("--warmup-samples", type=not_negative, default=ByModel(None, 6_400),
                       help=f"samples until the full learning rate; for SD {PAPERS_WARMUP:,} times the batch")  # fmt: skip
    group.add_argument("--ema-half-life", type=positive, default=ByModel(None, 10_000),
                       help=f"samples until a weight counts half; for SD {PAPERS_HALF_LIFE:,} times the batch")  # fmt: skip
    group.add_argument("--ema-ramp", type=not_below_zero, default=ByModel(0.0, 0.05), help="the half-life is at most this "
                       "share of the samples seen: short runs forget their start; 0, the paper's: no limit")  # fmt: skip
    group.add_argument(
        "--save-every", type=positive, default=500, help="iterations between saved states; about 15 minutes at most"
    )
    group.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=ByModel(True, False),
        help="recompute activations in the backward pass: less memory, a third more time",
    )  # fmt: skip
    group.add_argument("--ema-device", choices=["cpu"], help="keep the averaged weights in main memory: 4 bytes a parameter "
                       "less on the GPU, and the weights are copied over in every update")  # fmt: skip
    return group


def options_from(
    args: argparse.Namespace, iterations: int, batch_size: int, accumulate: int | None, fits: int | None, learning_rate: float
) -> TrainingOptions:
    """TrainingOptions of one stage, from settled arguments and what the stage has of its own.

    fits: samples that pass at once where accumulate is not given; None: all.
    """
    warmup = PAPERS_WARMUP * batch_size if args.warmup_samples is None else args.warmup_samples
    half_life = args.ema_half_life or PAPERS_HALF_LIFE * batch_size
    left = 0.5 ** (iterations * batch_size / half_life)
    if left > MUCH and iterations and not args.ema_ramp:
        note(f"after {iterations:,} iterations {left:.0%} of the averaged weights are still the start's, by --ema-half-life "
             f"{half_life:,}; --ema-ramp 0.05 forgets it sooner")  # fmt: skip
    return TrainingOptions(
        iterations, batch_size, learning_rate, warmup_samples=warmup, ema_half_life=half_life, ema_ramp=args.ema_ramp,
        seed=args.seed, accumulate=accumulate or math.ceil(batch_size / (fits or batch_size)), save_every=args.save_every,
        log_every=max(1, min(LOG_UPDATES, LOG_SAMPLES // batch_size)), ema_device=args.ema_device,
    )  # fmt: skip


def autocast_dtype(name: str, device: torch.device, network: nn.Module) -> torch.dtype:
    """The dtype to train in: --dtype's; under "auto" a small network on a CPU stays in fp32."""
    small = sum(p.numel() for p in network.parameters()) < AUTOCAST_FROM
    return torch.float32 if name == "auto" and device.type == "cpu" and small else pick_dtype(name, device)


# ---------------------------------------------------------------------------------------------------------------
# Randomness that depends on the position in the run alone


def seed_of(*numbers: int) -> int:
    """A seed from several integers, e.g. (seed, step): well mixed, the same on every machine."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch's generators take no more than 63 bits


def generator_for(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*numbers))


@functools.lru_cache(maxsize=2)
def permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator_for(seed, epoch))


def shuffled(samples: Tensor, size: int, seed: int) -> Tensor:
    """Sample numbers of the run -> indices into a data set of `size`, in a new order every epoch."""
    epochs, indices = samples // size, torch.empty_like(samples)
    for epoch in epochs.unique().tolist():
        mine = epochs == epoch
        indices[mine] = permutation(size, seed, epoch)[samples[mine] % size]
    return indices


# ---------------------------------------------------------------------------------------------------------------
# The state on disk


def named_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def channels_last(tensor: Tensor) -> Tensor:
    """(O, I, H, W) -> (O, H, W, I): the order in memory of a large network, which so is written without a copy."""
    return (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).contiguous()


def channels_second(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor


def adamw(weights: dict, options: TrainingOptions) -> torch.optim.Optimizer:
    """AdamW on these weights."""
    fused = next(iter(weights.values())).device.type in ("cpu", "cuda")  # one kernel, without copies of all moments
    settings = {"lr": options.learning_rate, "weight_decay": options.weight_decay, "fused": fused}
    return torch.optim.AdamW(weights.values(), **settings)


def save_state(
    folder: Path, step: int, weights: dict, ema: dict, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Write the state of a run."""
    if rank():  # before the copies that only the first process would write
        return
    tensors, updates = {}, 0
    for name, weight in weights.items():
        # Under fp16 every update so far may have been passed over; then there are no moments, which is as if they were 0.
        moments = optimizer.state.get(weight) or {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")} | {
            "step": 0
        }
        kept = {
            "weights": weight.detach(),
            "ema": ema[name],
            "exp_avg": moments["exp_avg"],
            "exp_avg_sq": moments["exp_avg_sq"],
        }
        tensors |= {f"{kind}.{name}": channels_last(tensor) for kind, tensor in kept.items()}
        updates = int(moments["step"])
    # In one entry, since safetensors writes several in any order and runs would differ.
    progress = json.dumps({"step": step, "updates": updates, "scaler": scaler.state_dict()})
    write_whole(folder / "state.safetensors", lambda path: save_file(tensors, path, {"progress": progress}))


def load_state(folder: Path, weights: dict, ema: dict, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
    """Copy a saved state into the given tensors; the step it was saved at, 0 where there is none."""
    progress, path = saved_progress(folder), folder / "state.safetensors"
    if not progress["step"]:
        return 0
    kinds = ("weights", "ema", "exp_avg", "exp_avg_sq")
    try:
        for name, weight in weights.items():
            with safe_open(path, "pt") as file:  # opened for each, since what is read stays mapped until it is closed
                saved = {kind: channels_second(file.get_tensor(f"{kind}.{name}")) for kind in kinds}
                weight.data.copy_(saved["weights"])
                ema[name].copy_(saved["ema"])
                moments = {kind: torch.empty_like(weight).copy_(saved[kind]) for kind in kinds[2:]}
                optimizer.state[weight] = moments | {"step": torch.tensor(float(progress["updates"]), device=weight.device)}
    except (SafetensorError, RuntimeError) as problem:
        raise BadInput(f"{path}: damaged or of another model ({problem}); delete {folder} to start again") from None
    if scaler.is_enabled():
        scaler.load_state_dict(progress["scaler"])
    return progress["step"]


def saved_progress(folder: str | Path) -> dict:
    """How far the run whose state lies in this folder is: {"step", "updates", "scaler"}; step 0 where there is none.

    updates: those that the optimizer made, fewer than the steps where fp16's scale was too large for some.
    """
    path = Path(folder) / "state.safetensors"
    if not path.exists():
        return {"step": 0}
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["progress"])
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: damaged, or not a state; delete {folder} to start again") from None


def saved_step(folder: str | Path) -> int:
    """The iteration at which the state in this folder was saved; 0 where there is none."""
    return saved_progress(folder)["step"]


def decisive(options: TrainingOptions, settings: dict, dtype: torch.dtype) -> dict:
    """What decides a run's result. Its length is left out: a finished run may be continued, unless its rate fell to 0."""
    result = settings | {k: v for k, v in asdict(options).items() if k not in PRACTICAL} | {"dtype": dtype_name(dtype)}
    return result | {"iterations": options.iterations} if options.cooldown else result


def compare_settings(folder: str | Path, settings: dict) -> None:
    """BadInput that names the differences, where the folder holds a run with other settings."""
    path = Path(folder) / "settings.json"
    if path.exists():
        try:
            changed = differences(dict(json.loads(path.read_text())), settings)
        except (ValueError, TypeError):
            raise BadInput(f"{path}: damaged; give another --out or delete {folder}") from None
        if changed:
            raise BadInput(f"{folder}: holds another run ({changed}); give another --out or delete it")


def write_settings(folder: str | Path, settings: dict) -> None:
    write_text(Path(folder) / "settings.json", json.dumps(settings, indent=2) + "\n")


def check_stage(folder: str | Path, options: TrainingOptions, settings: dict, dtype: torch.dtype) -> bool:
    """Is this very run finished? To be asked for every stage of a command before any work.

    BadInput where the folder holds another run, or this run beyond the iterations that are asked for, and where there are
    more processes than samples in a batch.
    """
    if options.batch_size < world_size():
        raise BadInput(f"--batch-size {options.batch_size}: smaller than the number of processes, {world_size()}")
    step = saved_step(folder)
    if not step:  # settings alone are of a run that was killed before its first state
        return False
    compare_settings(folder, decisive(options, settings, dtype))
    if step > options.iterations:
        raise BadInput(
            f"{folder}: its run is at iteration {step}, beyond the {options.iterations} asked for; ask for at least as many, "
            "or give another --out"
        )
    return step == options.iterations


# ---------------------------------------------------------------------------------------------------------------
# What a run reports


def read_metrics(folder: str | Path) -> list[dict]:
    """The rows of metrics.jsonl; a last line that a killed run left unfinished is passed over."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def plot_loss(folder: str | Path) -> None:
    """loss.png from metrics.jsonl: the loss over samples, and over t where it has one."""
    rows = read_metrics(folder)
    if not rows:
        return
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    axes[0].plot([row["samples"] for row in rows], [row["loss"] for row in rows], linewidth=1, color="tab:blue")
    positive_losses = all(row["loss"] > 0 for row in rows)
    axes[0].set(xlabel="samples seen", ylabel="loss", yscale="log" if positive_losses else "linear", title="training loss")
    late = [row["loss_by_t"] for row in rows[-max(1, len(rows) // 5) :] if row["loss_by_t"]]
    if late:
        means = [[by_t[k] for by_t in late if by_t[k] is not None] for k in range(TIME_BINS)]
        centres = [(k + 0.5) / TIME_BINS for k in range(TIME_BINS)]
        axes[1].bar(centres, [sum(m) / len(m) if m else 0 for m in means], width=0.9 / TIME_BINS, color="tab:orange")
        axes[1].set(xlabel="t  (0 noise, 1 data)", ylabel="loss", title="loss by t, last fifth of the run")
    else:
        axes[1].set_visible(False)
    write_whole(Path(folder) / "loss.png", lambda path: figure.savefig(path, dpi=120))


def mean_by_time(losses: list[Tensor], times: list[Tensor]) -> list[float | None]:
    """The mean loss in each tenth of [0, 1]; None where no t fell. Empty when the loss has no t."""
    if not times:
        return []
    loss, bins = torch.cat(losses), (torch.cat(times) * TIME_BINS).long().clamp(0, TIME_BINS - 1)
    return [loss[bins == k].mean().item() if (bins == k).any() else None for k in range(TIME_BINS)]


# ---------------------------------------------------------------------------------------------------------------
# Between processes


def sum_over_processes(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over all processes. Once for each update, however many passes it is made of."""
    if world_size() > 1:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def from_all_processes(items: list) -> list:
    """The items of every process, in the order of their ranks."""
    if world_size() == 1:
        return items
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


# ---------------------------------------------------------------------------------------------------------------
# The loop


def learning_rate_at(step: int, options: TrainingOptions) -> float:
    """Rising over the warm-up's samples, then constant, then falling to 0 over the cooldown's share of the run."""
    warm = (step + 1) * options.batch_size / max(options.warmup_samples, 1)
    left = (1 - step / options.iterations) / options.cooldown if options.cooldown else 1.0
    return options.learning_rate * min(1.0, warm, left)


def train(
    network: nn.Module,
    draw: Callable,
    loss: Callable,
    options: TrainingOptions,
    folder: str | Path,
    settings: dict,
    name: str = "training",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Train the network in place, resuming from `folder`; it ends with its averaged (EMA) weights.

    draw(samples, generator): a batch, as a tuple of tensors and lists with one entry a sample. samples (B,) int64
        are the global numbers of the samples; all randomness comes from the generator.
    loss(*batch): the loss of each sample (B,), and their t in [0, 1] (B,) or None; called on parts of a batch
        when gradients are accumulated.
    settings: what else decides the result (data, teacher ...); a run in the same folder must have the same. They are
        written with the first state: until then nothing is lost by changing them.
    dtype: bf16 or fp16 runs the forward pass under autocast; weights, moments and EMA stay fp32.

    BadInput: a loss or gradient that is not finite, no memory left, Ctrl-C (each names the state that is kept); a damaged
    state, one of other settings or beyond the iterations asked for, another run at work in the folder, no room for the state.
    """
    folder = Path(folder)
    weights = named_parameters(network)
    device = next(iter(weights.values())).device
    count = sum(weight.numel() for weight in weights.values())
    # Room for two, because the old state is replaced only when the new one is whole.
    state = folder / "state.safetensors"
    check_output(state, needed=(1 if state.exists() else 2) * BYTES_PER_PARAMETER * count)
    keep_others_out(folder)
    check_stage(folder, options, settings, dtype)
    wait_for_all()
    first = saved_step(folder)
    if len(set(from_all_processes([first]))) > 1:
        raise BadInput(f"{folder}: the processes find states of different steps in it; name an --out that all nodes share")
    metrics = folder / "metrics.jsonl"
    rows = [row for row in read_metrics(folder) if row["step"] <= first]
    write_text(metrics, "".join(json.dumps(row) + "\n" for row in rows))

    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
    network.train()
    # Each process takes its share of the batch. All draw the whole of it, so that the same samples are seen by any number.
    share = range(rank() * options.batch_size // world_size(), (rank() + 1) * options.batch_size // world_size())
    part = math.ceil(options.batch_size / options.accumulate)
    bar = tqdm(total=options.iterations, initial=first, desc=name, unit="it", dynamic_ncols=True, disable=rank() > 0)
    losses, times, started, saved, saved_at = [], [], time.monotonic(), first, time.monotonic()
    kept = lambda: f"the state of step {saved} is kept in {folder}" if saved else "no state is saved yet"
    try:
        optimizer = adamw(weights, options)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        ema_device = options.ema_device or device
        ema = {key: weight.detach().to(ema_device, copy=True) for key, weight in weights.items()}
        load_state(folder, weights, ema, optimizer, scaler)
        for step in range(first, options.iterations):
            seen = step * options.batch_size
            samples = torch.arange(seen, seen + options.batch_size)
            batch = draw(samples, generator_for(options.seed, step))

            rate = learning_rate_at(step, options)
            for group in optimizer.param_groups:
                group["lr"] = rate

            optimizer.zero_grad(set_to_none=True)
            for start in range(share.start, share.stop, part):
                end = min(start + part, share.stop)
                with autocast:
                    per_sample, t = loss(*(column[start:end] for column in batch))
                scaler.scale(per_sample.sum() / options.batch_size).backward()
                losses.append(per_sample.detach().float().cpu())
                if t is not None:
                    times.append(t.detach().float().cpu())
                if not torch.isfinite(losses[-1]).all():
                    raise BadInput(
                        f"{name}: the loss is not finite at step {step}, samples {seen + start} to {seen + end - 1}; {kept()}; "
                        "try another run, with another --out, at a lower learning rate or in --dtype fp32"
                    )

            sum_over_processes([weight.grad for weight in weights.values()])
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(weights.values(), options.clip_norm).item()
            # Under fp16 the scaler passes over such an update and lowers its scale, which is how it finds the right one.
            if not math.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() < LEAST_SCALE):
                raise BadInput(
                    f"{name}: the gradient is not finite at step {step}, though the loss is; {kept()}; try another run, with "
                    "another --out, at a lower learning rate or in --dtype fp32"
                )
            scaler.step(optimizer)
            scaler.update()

            half_life = min(options.ema_half_life, options.ema_ramp * seen) if options.ema_ramp else options.ema_half_life
            now = [weight.detach().to(ema_device) for weight in weights.values()]
            torch._foreach_lerp_(list(ema.values()), now, 1 - 0.5 ** (options.batch_size / max(1.0, half_life)))

            bar.update()
            done, overdue = step + 1, False
            if done % options.log_every == 0 or done == options.iterations:
                losses, times = from_all_processes(losses), from_all_processes(times)
                overdue = from_all_processes([time.monotonic() - saved_at >= SAVE_SECONDS])[0]  # as the first process finds
                row = {
                    "step": done,
                    "samples": done * options.batch_size,
                    "loss": torch.cat(losses).mean().item(),
                    "gradient_norm": norm if math.isfinite(norm) else None,
                    "learning_rate": rate,
                    "seconds_per_step": (time.monotonic() - started) / options.log_every,
                    "loss_by_t": mean_by_time(losses, times),
                }
                if rank() == 0:
                    with open(metrics, "a") as file:
                        file.write(json.dumps(row) + "\n")
                bar.set_postfix(loss=f"{row['loss']:.4g}")
                losses, times, started = [], [], time.monotonic()
            if done % options.save_every == 0 or done == options.iterations or overdue:
                if not saved:
                    write_settings(folder, decisive(options, settings, dtype))
                save_state(folder, done, weights, ema, optimizer, scaler)
                wait_for_all()  # for the first, which may write for minutes
                saved, saved_at = done, time.monotonic()
    except KeyboardInterrupt:
        raise BadInput(f"{name}: interrupted; {kept()}, run the same command again to continue") from None
    except torch.OutOfMemoryError:
        raise BadInput(
            f"{name}: out of GPU memory; {kept()}, and the run goes on with what needs less: more parts of a batch than "
            f"{options.accumulate} (--accumulate, in LPIPS --lpips-accumulate), --gradient-checkpointing, --ema-device cpu"
        ) from None
    finally:
        bar.close()
    optimizer.zero_grad(set_to_none=True)
    for key, weight in weights.items():
        weight.data.copy_(ema[key])
    network.eval()
