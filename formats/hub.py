"""Models by their name on the Hugging Face hub, such as `XCLIU/instaflow_0_9B_from_sd_1_5`.

The safetensors, configurations and tokenizer of a diffusers folder are fetched, with progress bars,
into huggingface_hub's cache, where they are found offline too. A local file or folder of the same
name wins.
"""

import os
import re
from pathlib import Path

from command import BadInput, first_line

NAME = re.compile(r"[\w.-]+/[\w.-]+")  # org/name
NETWORKS = ("unet", "vae", "text_encoder")
SETTINGS = ["model_index.json", "*/config.json", "scheduler/*.json", "tokenizer/*"]
VARIANTS = ["*.fp16.*", "*.non_ema.*"]  # fetched only where a network has nothing else


def is_hub_name(path: str | Path) -> bool:
    """Could this be a model on the hub: org/name, and nothing on this disk?"""
    path = Path(path)
    return bool(NAME.fullmatch(path.as_posix())) and not (
        path.exists() or path.parent.exists() or path.suffix == ".safetensors")


def local_path(path: str | Path) -> Path:
    """The path, or the folder in the cache if it is the name of a hub model; fetches that."""
    return fetch(str(path)) if is_hub_name(path) else Path(path)


def name_of(path: str | Path) -> str:
    """The name of a model's file or folder, or org/name where the hub's cache holds it."""
    path = Path(os.path.abspath(path))
    repository = path.parent.parent.name  # models--org--name/snapshots/commit
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name


def fetch(name: str) -> Path:
    """The folder of a hub model in the cache. BadInput: unknown, or offline and not cached."""
    from huggingface_hub import snapshot_download  # slow to import, and few models need it
    from huggingface_hub.errors import (
        HfHubHTTPError, HFValidationError, LocalEntryNotFoundError,
    )

    try:
        weights = [f"{part}/*.safetensors*" for part in NETWORKS]
        folder = Path(snapshot_download(name, allow_patterns=SETTINGS + weights,
                                        ignore_patterns=VARIANTS))
        lacking = [each for each in weights if not list(folder.glob(each))]
        if lacking:
            folder = Path(snapshot_download(name, allow_patterns=SETTINGS + lacking))
        return folder
    except LocalEntryNotFoundError:
        raise BadInput(f"{name}: no such file or folder, and not in the hub's cache while the hub "
                       "cannot be reached; go online once, or give a local path") from None
    except (HfHubHTTPError, HFValidationError) as problem:
        raise BadInput(f"{name}: no such file or folder, and the hub refuses it "
                       f"({first_line(problem)}); check the name, or log in with `hf auth login`"
                       ) from None
    except Exception as problem:  # its packages for downloads have their own errors
        if isinstance(problem, OSError) and problem.errno:  # of the disk
            raise
        raise BadInput(f"{name}: the download broke off ({first_line(problem)}); run the same "
                       "command again to continue it") from None
