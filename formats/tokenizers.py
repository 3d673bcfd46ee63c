"""Read and write CLIP tokenizers, in a folder or as a vocabulary in a file's metadata."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from transformers import AddedToken, CLIPTokenizer

from command import BadInput, first_line


def tokenizer_from(
    vocabulary: dict[str, int], merges: Iterable[str], added: Iterable[dict] = (),
    pad_token: str | None = None,
) -> CLIPTokenizer:
    """A tokenizer of this vocabulary and these merges, each "left right".

    added: tokens beyond them (textual inversion), as arguments of AddedToken.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(folder, "merges.txt").write_text(merges_text(merges), encoding="utf-8")
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(**token) for token in added])
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    return tokenizer


def added_tokens(tokenizer: CLIPTokenizer) -> dict[int, dict]:
    """Tokens that no merge makes, beside the start and the end: id -> arguments of AddedToken."""
    names = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    return {number: {name: getattr(token, name) for name in names}
            for number, token in sorted(tokenizer.added_tokens_decoder.items())
            if str(token) not in (tokenizer.bos_token, tokenizer.eos_token)}


def merges_text(merges: Iterable[str]) -> str:
    return "".join(line + "\n" for line in ["#version: 0.2", *merges])


def tokenizer_parts(tokenizer: CLIPTokenizer) -> tuple[dict[str, int], list[str]]:
    """The inverse of `tokenizer_from`: (vocabulary ordered by id, merges)."""
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return vocabulary, [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]


def tokenizer_in(folder: str | Path) -> CLIPTokenizer:
    """The tokenizer in a folder with vocab.json and merges.txt, or tokenizer.json."""
    if not any(Path(folder, name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise BadInput(f"{folder}: holds no tokenizer (vocab.json and merges.txt); give a folder "
                       "that does with --tokenizer")
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as problem:  # the tokenizers library has no class of its own errors
        why = first_line(problem)
        raise BadInput(f"{folder}: not a CLIP tokenizer ({why}); get the folder again") from None
