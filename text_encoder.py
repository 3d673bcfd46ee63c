"""CLIP's text transformer (ViT-L/14): prompts to the context that the U-Net's attention reads.

    prompts            ->  tokenize            start token, words in parts, end tokens  ->  (B, 77)
    token_ids (B, 77)  ->  embeddings + positions  ->  12 causal transformer layers  ->  layer norm
                                                                                ->  (B, 77, 768)

Causal: a token sees only those before it, so the end token alone has read the whole prompt. Stable
Diffusion uses every token's final state, those of the padding behind the end token included, and no
attention mask. The tokenizer is transformers'; the transformer is ours, with its names.

Source: Radford et al. 2021 (arXiv 2103.00020).
"""

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from command import BadInput, first_line, note

# The one that Stable Diffusion 1.x was trained with.
HUB_TOKENIZER = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the text transformer; the defaults are CLIP ViT-L/14, Stable Diffusion 1.x's."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77  # tokens of a prompt, start and end token included
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12


def lookup_table(rows: int, channels: int) -> nn.Embedding:
    """nn.Embedding with its random start; none on the meta device, for two seconds' imports."""
    weight = torch.empty(rows, channels)
    return nn.Embedding.from_pretrained(
        weight if weight.is_meta else weight.normal_(), freeze=False
    )


class Embeddings(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.token_embedding = lookup_table(config.vocab_size, config.hidden_size)
        self.position_embedding = lookup_table(config.max_position_embeddings, config.hidden_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        positions = self.position_embedding.weight[: token_ids.shape[1]]
        return self.token_embedding(token_ids) + positions


class CausalSelfAttention(nn.Module):
    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            # (B, L, C) -> (B, heads, L, C / heads)
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(h.transpose(1, 2).flatten(2))  # (B, L, C)


class MLP(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))  # CLIP's fast approximation of GELU


class EncoderLayer(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.self_attn = CausalSelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Layers(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TextTransformer(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(token_ids)))


class TextEncoder(nn.Module):
    """text_encoder(token_ids (B, L) int64, L <= max_position_embeddings) -> (B, L, hidden_size)."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        # A level that all published checkpoints' names have.
        self.text_model = TextTransformer(config)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.text_model(token_ids)


# --------------------------------------------------------------------------------------------------
# The tokenizer


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str], length: int) -> Tensor:
    """(B, length) int64, padded with the end token. Longer prompts are cut; the end token stays."""
    rows = []
    for ids in tokenizer(list(prompts))["input_ids"]:
        if len(ids) > length:
            ids = ids[: length - 1] + [tokenizer.eos_token_id]
            note(f"prompts are cut to {length} tokens; a longer one's end is not seen")
        rows.append(ids + [tokenizer.pad_token_id] * (length - len(ids)))
    return torch.tensor(rows)


def tokenizer_from(vocabulary: dict[str, int], merges: Iterable[str]) -> CLIPTokenizer:
    """A tokenizer from its vocabulary and its merges, each "left right"."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(folder, "merges.txt").write_text(merges_text(merges), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder)


def merges_text(merges: Iterable[str]) -> str:
    return "".join(line + "\n" for line in ["#version: 0.2", *merges])


def tokenizer_parts(tokenizer: CLIPTokenizer) -> tuple[dict[str, int], list[str]]:
    """The inverse: (vocabulary in the order of its numbers, merges)."""
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
    except Exception as problem:  # the tokenizers library raises its own, without a class for them
        why = first_line(problem)
        raise BadInput(f"{folder}: not a CLIP tokenizer ({why}); get the folder again") from None


def hub_tokenizer(vocab_size: int) -> CLIPTokenizer:
    """Stable Diffusion's, from the hub or its cache."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(HUB_TOKENIZER)
    except Exception:  # what is raised offline differs between causes
        tokenizer = None
    # Where it finds no file, transformers may also return a tokenizer without vocabulary.
    if tokenizer is None or len(tokenizer.get_vocab()) != vocab_size:
        raise BadInput(f"the checkpoint has no tokenizer and {HUB_TOKENIZER} could not be fetched; "
                       "give --tokenizer DIR, a folder with vocab.json and merges.txt")
    return tokenizer
