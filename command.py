"""What the commands share and the method does not need: options, one-line errors, files written whole.

`run(main)` turns every foreseeable failure into one line on stderr and exit code 2. `write_whole` makes a file
appear complete or not at all, so that a run killed at any moment leaves nothing half written behind.
"""

import argparse
import errno
import functools
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows has no such locks; there nobody is kept out
    fcntl = None

HERE = Path(__file__).resolve().parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # what --dtype calls them
KINDS = ("diffusion", "flow", "one-step")  # what a checkpoint's U-Net predicts; see checkpoint.py
STARTS = ("teacher", "negated", "random")  # what --init knows beside checkpoints; see unet.started_from
KNOWN_CAPTIONS = {"toy/captions.txt": HERE / "toy" / "captions.txt"}  # what a checkpoint's metadata may call its captions
TINY_TEACHER = str(HERE / "toy" / "tiny_sd.safetensors")  # what every command uses when no model is named


class BadInput(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do."""


@functools.cache
def note(message: str) -> None:
    """Tell the user something once, on stderr."""
    if rank() == 0:
        print(f"note: {message}", file=sys.stderr)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every option that has one of its own; the others say theirs in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults and complains in one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)

    def error(self, message: str):
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.lstrip("-").isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def solver_steps(text: str) -> int:
    """argparse type: a number of solver steps; Stable Diffusion's noise schedule has no more than 1000 to take."""
    if positive(text) > 1000:
        raise argparse.ArgumentTypeError(f"must be at most 1000, the timesteps of the noise schedule, got {text!r}")
    return int(text)


def not_negative(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    if not text.lstrip("-").isdigit() or int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


@dataclass(frozen=True)
class ByModel:
    """A default that depends on the model: Stable Diffusion's, and the tiny one's of toy/."""

    full: object
    tiny: object

    def __str__(self) -> str:
        return f"{self.full}, tiny model {self.tiny}" if self.full is not None else f"tiny model {self.tiny}"


def settle(args: argparse.Namespace, tiny: bool) -> None:
    """Replace every ByModel among the arguments by the value for this model."""
    for name, value in vars(args).items():
        if isinstance(value, ByModel):
            setattr(args, name, value.tiny if tiny else value.full)


def not_below_zero(text: str) -> float:
    """argparse type: a number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


# ---------------------------------------------------------------------------------------------------------------
# Seeds


WORLDS = {"reflow": 1, "distillation": 2, "validation": 3, "evaluation": 4, "second reflow": 5}
WORLD, RUN = 2**48, 2**24  # seeds in a world, and in what one --seed has of it


def seeds_in(world: str, seed: int, count: int, start: int = 0) -> range:
    """Seeds of noises number `start` to `start + count` for this --seed: those of no other world and no other --seed.

    A model is measured on noises that nothing was trained on, and a teacher is never sampled where it was trained; so
    pairs for reflow (from a diffusion; "second reflow" from a flow), pairs for distillation, validation and evaluation
    each have a world. Below the first world lie the seeds that users ask for. A third flow's own pairs share the world
    "second reflow" with those it was made from: give another --seed for a fourth. BadInput: more noises than a --seed has.
    """
    if seed >= RUN:
        raise BadInput(f"--seed {seed}: there are {RUN:,}; take a smaller one")
    if start + count > RUN:
        raise BadInput(f"{start + count:,} noises: one --seed has {RUN:,}; ask for fewer, or give the rest another --seed")
    first = WORLDS[world] * WORLD + seed * RUN + start
    return range(first, first + count)


def run_seed(text: str) -> int:
    """argparse type: the --seed of a run."""
    if not_negative(text) >= RUN:
        raise argparse.ArgumentTypeError(f"must be below {RUN:,}, got {text!r}")
    return int(text)


def noise_seed(text: str) -> int:
    """argparse type: the seed of a noise, as a user may ask for it."""
    if not_negative(text) >= WORLD - RUN:
        raise argparse.ArgumentTypeError(f"must be below {WORLD - RUN:,}, got {text!r}")
    return int(text)


# ---------------------------------------------------------------------------------------------------------------
# The machine


def add_machine_options(parser: argparse.ArgumentParser, seed: Callable = run_seed) -> None:
    """--device, --dtype and --seed, the same for every command. seed: its argparse type."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    group.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES],
        help="of the networks; auto: bf16 where the hardware multiplies it natively, else fp32",
    )  # fmt: skip
    group.add_argument("--seed", type=seed, default=0, help="the run is a function of it")


def add_model_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """How to read a checkpoint, where the file itself does not say, and whether to compile it. several: checkpoints."""
    group = parser.add_argument_group("reading the checkpoint")
    group.add_argument("--tokenizer", help="folder with vocab.json and merges.txt, for checkpoints without their own")
    if several:
        group.add_argument("--kind", choices=["auto", *KINDS], nargs="+", help="what the U-Net of each --model predicts, in "
                           "their order; auto: as its file says")  # fmt: skip
    else:
        group.add_argument("--kind", choices=KINDS, help="what the U-Net predicts; default: as the file says")
    group.add_argument("--use-ema", action="store_true", help="read the averaged U-Net of a full training checkpoint")
    group.add_argument("--compile", action="store_true", help="torch.compile: minutes at each new size, faster after them")


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is cuda, else mps, else cpu. BadInput where it does not exist.

    Under torchrun each process takes a GPU of its own, and finds the others.
    """
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise BadInput(f"--device {name}: not usable on this machine ({reason}); try --device cpu") from None
    join_processes(torch.device(name))
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bf16 where the hardware multiplies it natively, else fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere: the first with bf16 tensor cores
    else:
        native = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if native else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """What --dtype calls it."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def machine_name(device: torch.device) -> str:
    """What a measured figure is said to be measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------------------------
# Many processes, as torchrun starts them: each computes its share, the first writes


def rank() -> int:
    """The number of this process, 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@functools.cache
def patient_group() -> dist.ProcessGroup:
    """All processes, for waiting: one with a shard more to draw may be hours late, and NCCL gives up after ten minutes."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if dist.is_initialized():
        dist.barrier(group=patient_group())


def join_processes(device: torch.device) -> None:
    """Find the other processes by torchrun's environment; only the first one speaks on stdout and shows bars."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        patient_group()
        if rank():
            sys.stdout = open(os.devnull, "w")


# ---------------------------------------------------------------------------------------------------------------
# Files


def write_whole(path: str | os.PathLike, write: Callable[[str], object], every_rank: bool = False) -> None:
    """Call write(temporary name beside path), flush it to the disk, then rename it to path.

    Of many processes only the first writes, unless each has a file of its own.
    """
    if rank() and not every_rank:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # one name, so that killed runs leave one file at most
    try:
        try:
            write(str(temporary))
        except SafetensorError as problem:  # it wraps the error of the system, as "... (os error 28)"
            number = re.search(r"(?:os error |code: )(\d+)", str(problem))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        settle_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def settle_file(path: Path) -> None:
    """Give a written file the mode that the user's umask wants, which safetensors does not, and flush it to the disk."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_folder_whole(folder: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Call write(temporary folder beside folder), flush its files to the disk, then rename it. The folder must be new."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                settle_file(path)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file whole."""
    write_whole(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def differences(before: dict, now: dict) -> str:
    """What `now` holds that `before` does not, for an error message; empty where nothing differs."""
    found = []
    for key, value in now.items():
        old = before.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            found.append(differences(old, value))
        elif old != value:
            found.append(f"{key} was {old!r}, now {value!r}")
    return "; ".join(filter(None, found))


LOCKED = {}  # folder -> its open lock file, until the work in it is done, `run` returns or this process ends


def keep_others_out(folder: str | os.PathLike) -> None:
    """Make the folder, and be the only run that works in it. BadInput, in every process, where another one does.

    The lock is the system's own and ends with its process, however that ends. Of many processes the first takes it.
    """
    key, refused = Path(folder).resolve(), None
    if key in LOCKED or fcntl is None:
        return
    LOCKED[key] = None
    if rank() == 0:
        try:
            key.mkdir(parents=True, exist_ok=True)
            LOCKED[key] = open(key / ".lock", "w")
            fcntl.flock(LOCKED[key], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refused = f"{folder}: another run works in this folder; wait for it, or name another one"
        except OSError as problem:
            if LOCKED[key] is None:
                refused = f"{folder}: cannot be written ({problem.strerror}); choose another place"
            else:
                note(f"{folder}: its disk has no locks ({problem.strerror}); see to it that one run works there at a time")
    if world_size() > 1:
        answer = [refused]
        dist.broadcast_object_list(answer, src=0, group=patient_group())
        refused = answer[0]
    if refused:
        let_others_in(folder)
        raise BadInput(refused)


def let_others_in(folder: str | os.PathLike | None = None) -> None:
    """The work in this folder is done, or in all of them."""
    for key in list(LOCKED) if folder is None else [Path(folder).resolve()]:
        file = LOCKED.pop(key, None)
        if file is not None:
            file.close()


def check_output(path: str | os.PathLike, needed: int = 0) -> None:
    """Find out before the work whether `needed` bytes can be written beside path. BadInput where not."""
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():
            raise BadInput(f"{path}: is a folder; name a file to write")
        probe = folder / f".can-write-{os.getpid()}"
        write_text(probe, "yes")
        probe.unlink(missing_ok=True)
    except OSError as problem:
        raise BadInput(f"{path}: cannot be written ({problem.strerror}); choose another place") from None
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BadInput(f"{path}: needs {needed / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free; make room first")


def run(main: Callable[[], object]) -> None:
    """Run a command's main; failures a user can mend become one line on stderr and exit code 2."""
    # Numbers near zero that no longer fit the float format make CPU arithmetic up to 50 times slower.
    torch.set_flush_denormal(True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
    except BadInput as problem:
        message = str(problem)
    except KeyboardInterrupt:
        message = "interrupted; run the same command again to continue"
    except torch.OutOfMemoryError:
        message = "out of GPU memory; draw fewer at once (--batch-size of sample.py, --teacher-batch-size of pairs)"
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        message = f"{problem.filename or 'output'}: {problem.strerror}; what was whole is kept, make room and run again"
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    finally:
        let_others_in()
    print(f"error: {message}" + f" (process {rank()} of {world_size()})" * (world_size() > 1), file=sys.stderr)
    sys.exit(2)
