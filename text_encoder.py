"""CLIP's text transformer (ViT-L/14): prompts to the context that the U-Net's attention reads.

    prompts            ->  tokenize            start token, word pieces, end tokens     ->  (B, 77)
    token_ids (B, 77)  ->  embeddings + positions  ->  12 causal transformer layers  ->  layer norm
                                                                                ->  (B, 77, 768)

Attention is causal: a token sees only the tokens before it, so only the end token has read the
whole prompt. Stable Diffusion uses the final state of every token, padding included, without an
attention mask. The tokenizer is transformers'; the transformer is ours, with transformers'
attribute names. Source: Radford et al. 2021 (arXiv 2103.00020).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from command import BadInput, note

HUB_TOKENIZER = "openai/clip-vit-large-patch14"  # Stable Diffusion 1.x's


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
    """nn.Embedding, not initialised on the meta device: that would import torch._dynamo (2 s)."""
    weight = torch.empty(rows, channels)
    weight = weight if weight.is_meta else weight.normal_()
    return nn.Embedding.from_pretrained(weight, freeze=False)


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
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        # (B, L, C) -> (B, heads, L, C / heads)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
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


class TextTransformer(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embeddings(token_ids)
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.final_layer_norm(x)


class TextEncoder(nn.Module):
    """text_encoder(token_ids (B, L) int64, L <= max_position_embeddings) -> (B, L, hidden_size)."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)  # the level that published names have

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.text_model(token_ids)


# --------------------------------------------------------------------------------------------------
# The tokenizer


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str], length: int) -> Tensor:
    """(B, length) int64, filled up with pad tokens. A longer prompt is cut before its end token."""
    "".join(prompts).encode()  # UnicodeEncodeError here, not a TypeError in the tokenizer
    rows = []
    for ids in tokenizer(list(prompts))["input_ids"]:
        if len(ids) > length:
            ids = ids[: length - 1] + [tokenizer.eos_token_id]
            note(f"prompts are truncated to {length} tokens")
        rows.append(ids + [tokenizer.pad_token_id] * (length - len(ids)))
    return torch.tensor(rows)


def hub_tokenizer(vocab_size: int) -> CLIPTokenizer:
    """Stable Diffusion's tokenizer, from the hub or its cache. BadInput: neither has it."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(HUB_TOKENIZER)
    except Exception:  # being offline raises many kinds
        tokenizer = None
    # Without files, transformers may also return a tokenizer without vocabulary.
    if tokenizer is None or len(tokenizer.get_vocab()) != vocab_size:
        raise BadInput(f"the checkpoint has no tokenizer and {HUB_TOKENIZER} could not be fetched; "
                       "give --tokenizer DIR, a folder with vocab.json and merges.txt")
    return tokenizer
