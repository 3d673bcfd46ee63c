"""Layton's networks: an image to 16 tokens and back, and a caption to tokens.

    image (B, 3, 32, 32) ──encode──▶ (B, 16, 8) ──quantize──▶ tokens (B, 16), each one of 256
    tokens ──context──▶ (B, 16, D) ──cross-attention──▶ U-Net v ──▶ latent X0 + v(X0, 0 | tokens)
    caption ──text encoder──▶ LaytonGen ──▶ tokens, one after the other

Sources: Layton (arXiv 2503.08377); quantisation: van den Oord et al. 2017 (VQ-VAE, 1711.00937), on
unit vectors as in Yu et al. 2021 (2110.04627).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rectified_flow import flow_velocity, squared
from sample import noise_from_seeds, sample_images
from text_encoder import TextEncoderConfig, TextTransformer
from unet import UNet
from vae import Encoder, VAEConfig

TOKENS, CODES, CODE_SIZE = 16, 256, 8  # of an image; entries of the codebook; numbers of an entry
COMMITMENT = 0.25  # β of VQ-VAE
# vae.py's encoder gives 2 x latent_channels numbers at each position: here the 8 of a token, in
# place of a mean and a variance. Four levels halve three times: 32 x 32 pixels to 4 x 4 tokens.
ENCODER = VAEConfig(latent_channels=CODE_SIZE // 2, block_out_channels=(16, 32, 64, 128),
                    layers_per_block=1, norm_num_groups=8)
GEN = TextEncoderConfig(vocab_size=CODES, max_position_embeddings=32, hidden_size=128,
                        intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)


def quantize(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace unit vectors z (B, N, 8) by the nearest entries of the codebook (K, 8), normalised.

    Returns codes (B, N, 8), tokens (B, N) int64 and two terms (B,) of VQ-VAE's equation 3:

        ‖sg(z) - e‖² + β ‖z - sg(e)‖²         sg: no gradient; means over all numbers

    Straight-through: the gradient of the codes goes to z as if nothing had been rounded.
    """
    entries = F.normalize(codebook, dim=-1)
    tokens = torch.cdist(z.detach(), entries.detach()).argmin(-1)
    codes = entries[tokens]
    loss = squared(codes, z.detach()) + COMMITMENT * squared(z, codes.detach())
    return z + (codes - z).detach(), tokens, loss


class Layton(nn.Module):
    """Encoder, codebook and decoder. unet: predicts velocity; reads tokens in place of text."""

    def __init__(self, unet: UNet):
        super().__init__()
        width = unet.config.cross_attention_dim
        self.encoder = Encoder(ENCODER)
        self.codebook = nn.Parameter(torch.randn(CODES, CODE_SIZE))
        self.embedding = nn.Parameter(torch.randn(CODE_SIZE, width))  # unit vectors: unit variance
        self.positions = nn.Parameter(torch.randn(TOKENS, width))  # attention sees no order
        self.norm = nn.LayerNorm(width)  # the text encoder ends in one too
        self.unet = unet

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) in [-1, 1] -> unit vectors (B, 16, 8)."""
        return F.normalize(self.encoder(images).float().flatten(2).transpose(1, 2), dim=-1)

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) in [-1, 1] -> (B, 16) int64."""
        return quantize(self.encode(images), self.codebook)[1]

    def context(self, codes: Tensor) -> Tensor:
        """Codes (B, 16, 8) -> what the U-Net attends to, (B, 16, D)."""
        return self.norm(codes @ self.embedding + self.positions)

    def forward(self, images: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """v(x, t | the images' tokens), shaped like x (B, 4, h, w), and quantize's loss (B,)."""
        codes, _, loss = quantize(self.encode(images), self.codebook)
        return flow_velocity(self.unet)(x, t, self.context(codes)), loss


@torch.no_grad()
def decode(model, network: Layton, tokens: Tensor, seeds: Sequence[int], steps: int) -> Tensor:
    """Images (B, 3, 32, 32) of tokens (B, 16) in so many Euler steps. model: has the VAE."""
    context = network.context(F.normalize(network.codebook, dim=-1)[tokens])
    return sample_images(replace(model, unet=network.unet, kind="flow"), context, seeds, steps, 1.0)


class LaytonGen(TextTransformer):
    """gen(context (B, L, 128), tokens (B, n)) -> logits (B, n + 1, 256): of the tokens, the next.

    The text encoder's causal transformer, on the encoded caption and then the tokens.
    """

    def __init__(self, config: TextEncoderConfig = GEN):
        super().__init__(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, context: Tensor, tokens: Tensor) -> Tensor:
        x = torch.cat([context, self.embeddings.token_embedding(tokens)], dim=1)
        x = x + self.embeddings.position_embedding.weight[: x.shape[1]]
        for layer in self.encoder["layers"]:
            x = layer(x)
        # The caption's last position predicts the first token.
        return self.head(self.final_layer_norm(x[:, context.shape[1] - 1 :]))


@torch.no_grad()
def sample_tokens(
    gen: LaytonGen, context: Tensor, null: Tensor, seeds: Sequence[int], guidance=2.0, top_k=16,
) -> Tensor:
    """Tokens (B, 16) for encoded captions (B, L, 128), a seed each. null (1, L, 128): of "".

    guidance is the paper's; so is top_k, nearly, as a fraction: 1,000 of 16,384 entries.
    """
    normal = noise_from_seeds(seeds, (TOKENS, top_k)).double()  # fp32 would round uniforms to 1
    gumbel = -(-torch.special.ndtr(normal).log()).log().to(context)
    tokens = torch.empty(len(context), 0, dtype=torch.int64, device=context.device)
    for k in range(TOKENS):
        text, no_text = (gen(each, tokens)[:, -1] for each in (context, null.expand_as(context)))
        logits, entries = (no_text + guidance * (text - no_text)).topk(top_k)
        best = (logits + gumbel[:, k]).argmax(1, keepdim=True)  # a sample of the softmax
        tokens = torch.cat([tokens, entries.gather(1, best)], dim=1)
    return tokens
