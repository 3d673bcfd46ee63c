"""What every command shares: one-line errors, devices and processes, atomic files, locks."""

import argparse
import errno
import functools
import json
import os
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
except ImportError:  # Windows has no such locks: there two runs in one folder go unnoticed
    fcntl = None

HERE = Path(__file__).resolve().parent
TINY_TEACHER = str(HERE / "toy" / "tiny_sd.safetensors")  # the default teacher
TINY_ONE_STEP = str(HERE / "toy" / "tiny_emoji_instaflow.safetensors")  # if there is no other
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of --dtype


# --------------------------------------------------------------------------------------------------
# Errors and arguments


class BadInput(Exception):
    """Something the user can fix. The message says what is wrong, where, and what to do."""


class NotFinite(BadInput):
    """A training or a model gave infinity or NaN."""


@functools.cache
def note(message: str) -> None:
    """Print a note to stderr, once."""
    if rank() == 0:
        print(f"note: {message}", file=sys.stderr)


def is_out_of_memory(problem: Exception) -> bool:
    """On a CPU torch raises RuntimeError."""
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(problem, known) or "DefaultCPUAllocator" in str(problem)


def first_line(problem: Exception) -> str:
    return (str(problem).strip() or repr(problem)).splitlines()[0]


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        off = action.default in (None, "", []) or action.default is False
        return action.help if off else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Shows defaults, takes no abbreviated flags, reports errors in one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)

    def error(self, message: str):
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def at_least(least: int | float, below: float = float("inf"), why: str = "") -> Callable:
    """argparse type: an int or float (the type of `least`) in [least, below)."""
    number = type(least)

    def parse(text: str):
        try:
            value = number(text)
        except ValueError:
            value = below
        if least <= value < below:
            return value
        whole = "whole " if number is int else ""
        limit = f" and below {below:,}{why}" if below < float("inf") else ""
        raise argparse.ArgumentTypeError(
            f"must be a {whole}number of at least {least:g}{limit}, got {text!r}")

    return parse


positive, non_negative_int, non_negative = at_least(1), at_least(0), at_least(0.0)
fraction = at_least(0.0, below=1.0)
solver_steps = at_least(1, below=1001, why=", the steps of Stable Diffusion's noise schedule")


@dataclass(frozen=True)
class DefaultByModel:
    """A default that depends on the model: Stable Diffusion's, and the tiny models' of toy/."""

    full: object
    tiny: object

    def __str__(self) -> str:
        full = "" if self.full is None else f"{self.full}, "
        return f"{full}tiny model {self.tiny}"


def resolve_defaults(args: argparse.Namespace, tiny: bool) -> None:
    """Replace each DefaultByModel in args by its value for this model."""
    for name, value in vars(args).items():
        if isinstance(value, DefaultByModel):
            setattr(args, name, value.tiny if tiny else value.full)


def run(main: Callable[[], object]) -> None:
    """Run a command's main; a failure that the user can fix is one line and exit code 2."""
    torch.set_flush_denormal(True)  # subnormal numbers make CPU arithmetic 50 times slower
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except BadInput as problem:
        message = str(problem)
    except KeyboardInterrupt:
        message = "interrupted" + "; run the same command again to continue" * bool(LOCKS)
    except UnicodeEncodeError as problem:
        message = f"{problem.object!r}: not Unicode text; set the terminal to UTF-8"
    except OSError as problem:
        remedy = "check the path and its permissions"
        if problem.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            remedy = "finished files are kept, free some space and run again"
        message = f"{problem.filename or 'output'}: {problem.strerror or problem}; {remedy}"
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        message = "out of memory; sample fewer or smaller images at once, see --help"
    finally:
        unlock_folder()
    where = f" (process {rank()} of {world_size()})" if world_size() > 1 else ""
    print(f"error: {message}{where}", file=sys.stderr)
    sys.exit(2)


# --------------------------------------------------------------------------------------------------
# Devices and processes: under torchrun each process computes its share, and the first one writes


def add_machine_options(parser: argparse.ArgumentParser, seed: Callable) -> None:
    """--device, --dtype and --seed, the same in every command. seed: its argparse type."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    add("--dtype", default="auto", choices=["auto", *DTYPES],
        help="of the networks; auto: bf16 where the hardware multiplies it, else fp32")
    add("--seed", type=seed, default=0, help="fixes everything random")


def pick_device(name: str) -> torch.device:
    """The device of that name, under torchrun a GPU of its own; joins the other processes."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name).item()  # of "meta" it fails
    except (RuntimeError, AssertionError) as problem:
        why = first_line(problem)
        raise BadInput(f"--device {name}: not usable here ({why}); try --device cpu") from None
    device = torch.device(name)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        patient_group()
        if rank():  # only the first process prints
            sys.stdout = open(os.devnull, "w")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bf16 where the hardware multiplies it, else fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":  # tensor cores multiply bf16 from Ampere on
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        cpu = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        native = device.type == "cpu" and cpu
    return torch.bfloat16 if native else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@functools.cache
def patient_group() -> dist.ProcessGroup:
    """All processes, with a long timeout: one may be hours late, NCCL gives up in ten minutes."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier(group=patient_group())


def all_gather(items: list) -> list:
    """The items of all processes, by rank."""
    if world_size() == 1:
        return items
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, items, group=patient_group())
    return [item for part in gathered for item in part]


# --------------------------------------------------------------------------------------------------
# Files


def write_atomically(path: str | os.PathLike, write: Callable[[str], object], every_rank=False):
    """Call write(temporary path), flush to disk, rename; by the first process unless every_rank."""
    if rank() and not every_rank:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")  # killed runs leave at most one
    try:
        write(str(temporary))
        flush_to_disk(temporary)
        os.replace(temporary, path)
    except SafetensorError as problem:  # wraps the system's error
        raise BadInput(f"{path}: could not be written ({first_line(problem)}); finished files are "
                       "kept, free some space and run again") from None
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Flush a file to disk, with the permissions of the umask, which safetensors ignores."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_text(path: str | os.PathLike, text: str) -> None:
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike, content) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_our_json(path: str | os.PathLike, missing, remedy="delete it to start again"):
    """What `write_json` wrote; `missing`, of the same type, without a file. BadInput: damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return missing
    except ValueError:
        content = None
    if type(content) is not type(missing):
        raise BadInput(f"{path}: damaged; {remedy}")
    return content


def check_same_settings(path: str | os.PathLike, now: dict, what: str, remedy: str) -> None:
    """BadInput if the JSON file at `path` has other settings. what, remedy: for the error line."""
    changed = differences(read_our_json(path, now, remedy), now)
    if changed:
        raise BadInput(f"{Path(path).parent}: holds {what} ({changed}); {remedy}")


def differences(before: dict, now: dict) -> str:
    """The values of `now` that differ from `before`, for an error line; "" if none does."""
    found = []
    for key, value in now.items():
        if key in ("teacher", "prompts"):  # names of files, which hashes beside them identify
            continue
        old = before.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            found.append(differences(old, value))
        elif old != value:
            found.append(f"{key} was {old!r}, now {value!r}")
    return "; ".join(filter(None, found))


LOCKS = {}  # folder -> its open lock file


def lock_folder(folder: str | os.PathLike) -> None:
    """Make the folder and lock it for this run, all processes. BadInput: another run has it.

    The operating system releases the lock when the process ends, however it ends.
    """
    key, refused = Path(folder).resolve(), None
    if key in LOCKS or fcntl is None:
        return
    LOCKS[key] = None
    if rank() == 0:
        try:
            key.mkdir(parents=True, exist_ok=True)
            LOCKS[key] = open(key / ".lock", "w")
            fcntl.flock(LOCKS[key], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refused = f"{folder}: another run works in this folder; wait for it, or name another"
        except OSError as problem:
            if LOCKS[key] is None:
                refused = f"{folder}: cannot be written ({problem.strerror}); choose another place"
            else:
                note(f"{folder}: its disk has no locks; start only one run at a time there")
    refused = all_gather([refused])[0]
    if refused:
        unlock_folder(folder)
        raise BadInput(refused)


def unlock_folder(folder: str | os.PathLike | None = None) -> None:
    """Unlock this folder, or all of them."""
    for key in list(LOCKS) if folder is None else [Path(folder).resolve()]:
        if file := LOCKS.pop(key, None):
            file.close()


def check_not_overwriting(out: str | os.PathLike, inputs: dict[str, str | None]) -> None:
    """BadInput if the output is one of the inputs. inputs: flag -> path."""
    for flag, path in inputs.items():
        if path and Path(path).exists() and Path(path).resolve() == Path(out).resolve():
            raise BadInput(f"{out}: would overwrite {flag}; name another file")


def check_output(path: str | os.PathLike) -> None:
    """BadInput, before the work, if no file can be written at `path`."""
    try:
        if Path(path).is_dir():
            raise BadInput(f"{path}: is a folder; name a file to write")
        # Not `write_atomically`'s name, which another run may be writing.
        probe = Path(path).with_name(f".{Path(path).name}.new")
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as problem:
        why = problem.strerror
        raise BadInput(f"{path}: cannot be written ({why}); choose another place") from None
