"""CLIP's text transformer (ViT-L/14): token ids to the context that the U-Net's attention reads.

    token_ids (B, 77)  ->  embeddings + positions  ->  12 causal transformer layers  ->  layer norm  ->  (B, 77, 768)

Causal: a token sees only those before it, so the end token alone has read the whole prompt. Stable Diffusion
uses every token's final state, those of the padding behind the end token included, and no attention mask.

Source: Radford et al. 2021 (arXiv 2103.00020). Attributes carry transformers' names.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the text transformer; the defaults are CLIP ViT-L/14, which Stable Diffusion 1.x uses."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77  # tokens of a prompt, start and end token included
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12


def lookup_table(rows: int, channels: int) -> nn.Embedding:
    """nn.Embedding with its usual random start; none on the meta device, where it would cost two seconds of imports."""
    weight = torch.empty(rows, channels)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(), freeze=False)


class Embeddings(nn.Module):
    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.token_embedding = lookup_table(config.vocab_size, config.hidden_size)
        self.position_embedding = lookup_table(config.max_position_embeddings, config.hidden_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.token_embedding(token_ids) + self.position_embedding.weight[: token_ids.shape[1]]


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
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, C) -> (B, heads, L, C / heads)
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
    """text_encoder(token_ids): (B, L) int64 with L <= max_position_embeddings -> (B, L, hidden_size)."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)  # the level that every published checkpoint's names have

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.text_model(token_ids)
