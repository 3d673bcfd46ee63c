"""Lists of prompts: a prompt a line, a column of a .tsv, .csv, .json or .jsonl, a small grammar."""

import csv
import io
import json
import re
from pathlib import Path

import torch

from command import BadInput, first_line, note


def read_prompts(path: str | Path, column: str = "Prompt") -> list[str]:
    """A prompt a line, or the named column or key of a .tsv, .csv, .json or .jsonl; no blanks."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        if "\n" not in text:  # old Macs'
            text = text.replace("\r", "\n")
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not UTF-8 text; save it as UTF-8, a prompt a line") from None
    except OSError as problem:
        raise BadInput(
            f"{path}: cannot be read ({problem.strerror}); give a text file with a prompt a line"
        ) from None
    ending = path.suffix.lower()
    if ending in (".tsv", ".csv"):
        lines = read_column(path, text, column)
    elif ending in (".json", ".jsonl"):
        lines = read_json_prompts(path, text, column)
    else:  # splitlines() would also split at other characters, which captions contain
        lines = text.split("\n")[: -1 if text.endswith("\n") else None]
    breaks = str.maketrans("\n\r", "  ")
    prompts = [line.translate(breaks).strip() for line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"{path}: holds no prompt; write one a line")
    broken = next((prompt for prompt in prompts if re.search("[\ud800-\udfff]", prompt)), None)
    if broken is not None:  # half of a character that .json writes in two halves
        raise BadInput(f"{path}: not Unicode text: {broken!r}; repair or delete this prompt")
    name = r"(\w+[,;\t])*(prompt|caption|text)([,;\t]\w+)*$"
    if ending not in (".tsv", ".csv", ".json", ".jsonl") and (
            prompts[0][0] in "{[" or len(prompts) > 1 and re.match(name, prompts[0].lower())):
        note(f"{path}: its first line looks like a table or JSON, and each line is taken for a "
             "prompt; name it .csv, .tsv or .jsonl if it is one")
    if len(prompts) < len(lines):
        note(f"{path}: {len(lines) - len(prompts)} blank lines are skipped")
    return prompts


def read_column(path: Path, text: str, column: str) -> list[str]:
    """The fields of one column of a table with a header."""
    if path.suffix.lower() == ".tsv":  # captions may begin with a quote that never closes
        rows = [[unquote(field) for field in line.split("\t")]
                for line in text.split("\n") if line]
    else:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            rows = [row for row in reader if row]
        except csv.Error as problem:
            raise BadInput(f"{path}: not a .csv table up to line {reader.line_num} ({problem}); "
                           "fix its quotes") from None
    header = rows[0] if rows else []
    if column not in header:
        raise BadInput(
            f"{path}: has no column {column!r} but {header}; name one with --prompt-column"
        )
    number = header.index(column)
    return [row[number] if number < len(row) else "" for row in rows[1:]]


def read_json_prompts(path: Path, text: str, column: str) -> list[str]:
    """The prompts of JSON lines, or of a list: strings, or objects with a key for the prompt."""
    try:
        rows = json.loads(text) if path.suffix.lower() == ".json" else [
            json.loads(line) for line in text.split("\n") if line.strip()]
        rows, found = list(rows.values()) if isinstance(rows, dict) else rows, []
        if not isinstance(rows, list):
            raise ValueError("neither a list nor an object")
        for row in rows:
            if isinstance(row, dict):
                row = next(row[key] for key in (column, "text", "caption", "prompt") if key in row)
            found.append(row)
        if not all(isinstance(prompt, str) for prompt in found):
            raise ValueError("a prompt that is no text")
    except (ValueError, StopIteration) as problem:
        why = first_line(problem) if str(problem) else "an entry without a prompt"
        raise BadInput(f"{path}: not a list of prompts ({why}); give strings, or objects with a "
                       "key text, caption or prompt, or name it with --prompt-column") from None
    return found


def unquote(field: str) -> str:
    """A .tsv field without the quotes that some programs put around it."""
    inner = field[1:-1]
    whole = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else field


# For Stable Diffusion without --prompts: enough to try the method, not to train a good model.
MEDIA = ["a photo of", "an oil painting of", "a watercolor of", "a pencil sketch of",
         "a 3d render of", "a poster of"]
LOOKS = ["a small", "an old", "a colorful", "a wooden", "a broken", "a shiny", "a snow-covered",
         "a giant"]
SUBJECTS = ["house", "cat", "dog", "bicycle", "boat", "teapot", "robot", "tree", "bridge", "car",
            "chair", "horse", "lighthouse", "clock", "guitar", "castle"]
PLACES = ["on a beach", "in a forest", "in a busy street", "on a table", "under a starry sky",
          "in the desert", "beside a lake", "in an empty room"]


def built_in_prompts() -> list[str]:
    """Every sentence of a small grammar, shuffled."""
    every = [f"{a} {b} {c} {d}" for a in MEDIA for b in LOOKS for c in SUBJECTS for d in PLACES]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    return [every[i] for i in order]


def split_prompts(prompts: list[str]) -> tuple[list[str], list[str]]:
    """(training, held out): the last hundredth of a list is never trained on.

    Nothing is held out from a list that is too short, or repeats itself too much.
    """
    held_out = prompts[len(prompts) - len(prompts) // 100 :]
    never = set(held_out)
    training = [prompt for prompt in prompts if prompt not in never]
    return (training, held_out) if training else (prompts, [])
