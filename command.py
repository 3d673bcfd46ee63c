"""What the commands share and the method does not need: one-line errors, whole files, processes.

`run(main)` turns every foreseeable failure into one line on stderr and exit code 2. `write_whole`
makes a file appear complete or not at all, so that a run killed at any moment leaves nothing half
written behind. `refuse_other` keeps two different things out of one folder.
"""

import argparse
import errno
import functools
import json
import os
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
# What every command uses when no model is named, and the one-step model that is made of it.
TINY_TEACHER = str(HERE / "toy" / "tiny_sd.safetensors")
TINY_EMOJI = str(HERE / "toy" / "tiny_emoji.safetensors")
TINY_ONE_STEP = str(HERE / "toy" / "tiny_emoji_instaflow.safetensors")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of --dtype


# --------------------------------------------------------------------------------------------------
# Errors and arguments


class BadInput(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do."""


@functools.cache
def note(message: str) -> None:
    """Tell the user something once, on stderr."""
    if rank() == 0:
        print(f"note: {message}", file=sys.stderr)


def first_line(problem: Exception) -> str:
    return (str(problem).strip() or repr(problem)).splitlines()[0]


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


def at_least(least: int | float, below: float = float("inf"), why: str = "") -> Callable:
    """argparse type: a number of the type of `least`, from there to `below`."""
    number = type(least)

    def parse(text: str):
        try:
            value = number(text)
        except ValueError:
            value = below
        if not least <= value < below:
            whole = "whole " if number is int else ""
            limit = f" and below {below:,}{why}" if below < float("inf") else ""
            raise argparse.ArgumentTypeError(
                f"must be a {whole}number of at least {least:g}{limit}, got {text!r}"
            )
        return value

    return parse


positive, not_negative, not_below_zero = at_least(1), at_least(0), at_least(0.0)
share = at_least(0.0, below=1.0)
solver_steps = at_least(1, below=1001, why=", the steps of Stable Diffusion's noise schedule")


@dataclass(frozen=True)
class ByModel:
    """A default that depends on the model: Stable Diffusion's, and the tiny one's of toy/."""

    full: object
    tiny: object

    def __str__(self) -> str:
        full = "" if self.full is None else f"{self.full}, "
        return f"{full}tiny model {self.tiny}"


def settle(args: argparse.Namespace, tiny: bool) -> None:
    """Replace every ByModel among the arguments by the value for this model."""
    for name, value in vars(args).items():
        if isinstance(value, ByModel):
            setattr(args, name, value.tiny if tiny else value.full)


def run(main: Callable[[], object]) -> None:
    """Run a command's main; failures a user can mend become one line on stderr and exit code 2."""
    # Numbers near zero that no longer fit the float format make CPU arithmetic 50 times slower.
    torch.set_flush_denormal(True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
    except BadInput as problem:
        message = str(problem)
    except KeyboardInterrupt:
        message = "interrupted; run the same command again to continue"
    except torch.OutOfMemoryError:
        message = ("out of GPU memory; draw fewer at once (sample.py's --batch-size, "
                   "--teacher-batch-size)")
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES,
                                 errno.EROFS):
            raise
        message = (f"{problem.filename or 'output'}: {problem.strerror}; what was whole is kept, "
                   "make room and run again")
    else:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    finally:
        let_others_in()
    where = f" (process {rank()} of {world_size()})" if world_size() > 1 else ""
    print(f"error: {message}{where}", file=sys.stderr)
    sys.exit(2)


# --------------------------------------------------------------------------------------------------
# The machine and its processes, as torchrun starts them: each computes its share, the first writes


def add_machine_options(parser: argparse.ArgumentParser, seed: Callable) -> None:
    """--device, --dtype and --seed, the same for every command. seed: its argparse type."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    group.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES],
        help="of the networks; auto: bf16 where the hardware multiplies it, else fp32"
    )
    group.add_argument("--seed", type=seed, default=0, help="the run is a function of it")


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is cuda, else mps, else cpu. BadInput where there is none.

    Under torchrun each process takes a GPU of its own, and finds the others.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as problem:
        raise BadInput(
            f"--device {name}: not usable on this machine ({first_line(problem)}); try --device cpu"
        ) from None
    join_processes(torch.device(name))
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bf16 where the hardware multiplies it, else fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":  # Ampere is the first with tensor cores for it
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        cpu = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        native = device.type == "cpu" and cpu
    return torch.bfloat16 if native else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """What --dtype calls it."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def rank() -> int:
    """The number of this process, 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@functools.cache
def patient_group() -> dist.ProcessGroup:
    """All processes, for waiting: one may be hours late, and NCCL gives up after ten minutes."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if dist.is_initialized():
        dist.barrier(group=patient_group())


def from_all_processes(items: list) -> list:
    """The items of every process, in the order of their ranks."""
    if world_size() == 1:
        return items
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, items, group=patient_group())
    return [item for part in gathered for item in part]


def join_processes(device: torch.device) -> None:
    """Find the others by torchrun's environment; only the first speaks on stdout and shows bars."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        patient_group()
        if rank():
            sys.stdout = open(os.devnull, "w")


# --------------------------------------------------------------------------------------------------
# Files


def write_whole(path: str | os.PathLike, write: Callable[[str], object], every_rank=False) -> None:
    """Call write(temporary name beside path), flush it to the disk, then rename it to path.

    Of many processes only the first writes, unless each has a file of its own.
    """
    if rank() and not every_rank:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # killed runs leave one at most
    try:
        write(str(temporary))
        settle_file(temporary)
        os.replace(temporary, path)
    except SafetensorError as problem:  # it wraps the system's error
        raise BadInput(f"{path}: could not be written ({first_line(problem)}); what was whole is "
                       "kept, make room and run again") from None
    finally:
        temporary.unlink(missing_ok=True)


def settle_file(path: Path) -> None:
    """Give a file the mode of the umask, as safetensors does not, and flush it to the disk."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_folder_whole(folder: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Call write(temporary folder), flush its files, then rename it. The folder must be new."""
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


def write_json(path: str | os.PathLike, content) -> None:
    """Write a JSON file whole, to be read by people too."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def refuse_other(path: str | os.PathLike, now: dict, what: str, remedy: str) -> None:
    """BadInput where the JSON file at `path`, which says what made a folder, says other than `now`.

    Whoever makes the folder writes it with `write_json`. what, remedy: for the line of the error.
    """
    path = Path(path)
    if not path.exists():
        return
    try:
        changed = differences(dict(json.loads(path.read_text())), now)
    except (ValueError, TypeError):
        raise BadInput(f"{path}: damaged; {remedy}") from None
    if changed:
        raise BadInput(f"{path.parent}: holds {what} ({changed}); {remedy}")


def differences(before: dict, now: dict) -> str:
    """What `now` holds that `before` does not, for an error message; empty if nothing differs."""
    found = []
    for key, value in now.items():
        old = before.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            found.append(differences(old, value))
        elif old != value:
            found.append(f"{key} was {old!r}, now {value!r}")
    return "; ".join(filter(None, found))


LOCKED = {}  # folder -> its open lock file, until its work is done, `run` returns or we are killed


def keep_others_out(folder: str | os.PathLike) -> None:
    """Make the folder, and be the only run that works in it. BadInput where another one does.

    The lock is the system's own and ends with its process, however that ends. Of many processes the
    first takes it, and all are refused.
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
            refused = (
                f"{folder}: another run works in this folder; wait for it, or name another one"
            )
        except OSError as problem:
            if LOCKED[key] is None:
                refused = f"{folder}: cannot be written ({problem.strerror}); choose another place"
            else:
                note(f"{folder}: its disk has no locks ({problem.strerror}); see to it that one "
                     "run works there at a time")
    refused = from_all_processes([refused])[0]
    if refused:
        let_others_in(folder)
        raise BadInput(refused)


def let_others_in(folder: str | os.PathLike | None = None) -> None:
    """The work in this folder is done, or in all of them."""
    for key in list(LOCKED) if folder is None else [Path(folder).resolve()]:
        file = LOCKED.pop(key, None)
        if file is not None:
            file.close()


def refuse_overwriting(out: str | os.PathLike, inputs: dict[str, str]) -> None:
    """BadInput where the file to write is one that is read, by the flags of those."""
    for flag, path in inputs.items():
        if Path(path).exists() and Path(path).resolve() == Path(out).resolve():
            raise BadInput(f"--out {out}: would overwrite {flag}; name another file")


def check_output(path: str | os.PathLike, needed: int = 0) -> None:
    """Find out before the work whether `needed` bytes can be written beside path, else BadInput."""
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():
            raise BadInput(f"{path}: is a folder; name a file to write")
        probe = folder / f".can-write-{os.getpid()}"
        write_text(probe, "yes")
        probe.unlink(missing_ok=True)
    except OSError as problem:
        why = problem.strerror
        raise BadInput(f"{path}: cannot be written ({why}); choose another place") from None
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BadInput(f"{path}: needs {needed / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are "
                       "free; make room first")
