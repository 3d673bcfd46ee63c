"""Stable Diffusion 1.x as one object: three networks, a tokenizer, and what the model is.

    prompt ──tokenizer, text_encoder──▶ context (B, 77, 768) ──▶ unet(x, timestep, context)
    image (B, 3, 512, 512) ◀──vae.decode── latent (B, 4, 64, 64)

kind says what the U-Net predicts: "diffusion" the noise; "flow" a velocity; "one-step" a velocity,
trained at t = 0 alone. `checkpoint.load` makes this object.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from command import HERE, note
from stacked_unet import StackedUNet, build_unet
from text_encoder import TextEncoder, hub_tokenizer, tokenize
from unet import UNet
from vae import AutoencoderKL

KINDS = ("diffusion", "flow", "one-step")
INITS = ("teacher", "negated", "random")  # of --init, beside checkpoints


@dataclass(frozen=True)
class Family:
    """What a group of models was trained on."""

    captions: Path | None  # file of the captions that they know; None: any
    judge: Path | None  # Python file that grades their images (evaluation/judge.py)
    example: str  # a prompt
    guidance: dict[str, float]  # default guidance scale by kind; 1 is off


TOY = HERE / "toy"
TINY_GUIDANCE = {"diffusion": 2.5, "flow": 1.5, "one-step": 1.0}
SD_GUIDANCE = {"diffusion": 6.0, "flow": 1.5, "one-step": 1.0}  # the paper's; 5 with SD 1.5
FAMILIES = {
    "sd": Family(None, None, "a photo of a small house on a beach", SD_GUIDANCE),
    "shapes": Family(TOY / "captions.txt", TOY / "shapes.py", "a red circle above a blue square",
                     TINY_GUIDANCE),
    "emoji": Family(TOY / "emoji_captions.txt", TOY / "emoji.py", "red apple", TINY_GUIDANCE),
}


class FewStep(NamedTuple):
    """How a few-step model of fewstep/ is sampled, always without guidance (sample.py)."""

    sampler: str  # "euler", "renoise" or "mean"
    steps: int  # by default
    allowed_steps: tuple[int, ...] = ()  # (): any number


@dataclass
class StableDiffusion:
    unet: UNet | StackedUNet
    vae: AutoencoderKL
    text_encoder: TextEncoder
    tokenizer: CLIPTokenizer | None  # None: the hub's, fetched at the first prompt
    kind: str  # one of KINDS
    family: str = "sd"  # one of FAMILIES
    path: str = ""  # where it was loaded from
    few_step: FewStep | None = None

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def is_tiny(self) -> bool:
        return self.family != "sd"

    @property
    def has_path(self) -> bool:
        """Does it follow an ODE's path, which a student can learn and metrics can measure?"""
        return self.kind != "one-step" and not self.few_step

    @property
    def guidance(self) -> float:
        """The default guidance scale."""
        return 1.0 if self.few_step else FAMILIES[self.family].guidance[self.kind]

    def guidance_for(self, scale: float | None) -> float:
        """The guidance scale to sample with. None: the default; a one-step model takes 0 as off.

        Few-step models are always sampled without guidance.
        """
        if self.few_step:
            return 1.0
        if scale == 0 and self.kind == "one-step":
            note("--guidance 0: off, as 1 is, since a one-step model has no unconditional mode")
            return 1.0
        return self.guidance if scale is None else scale

    @property
    def steps(self) -> int:
        """The default number of steps."""
        by_kind = 1 if self.kind == "one-step" else 25
        return self.few_step.steps if self.few_step else by_kind

    def allows(self, steps: int) -> bool:
        if self.few_step:
            return not self.few_step.allowed_steps or steps in self.few_step.allowed_steps
        return self.kind != "one-step" or steps == 1

    def allowed_steps(self, numbers: Sequence[int]) -> list[int]:
        """The numbers of steps among these that the model allows; if there are none, its own."""
        return [number for number in numbers if self.allows(number)] or [self.steps]

    @property
    def image_side(self) -> int:
        """Height and width, in pixels, of the images that the model was trained on."""
        return self.unet.config.sample_size * self.vae.config.downsampling

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(channels, h, w) of a latent. size: (height, width) of the image in pixels."""
        side, factor = self.unet.config.sample_size, self.vae.config.downsampling
        h, w = (side, side) if size is None else (pixels // factor for pixels in size)
        return self.unet.config.in_channels, h, w

    def encode_prompts(self, prompts: list[str] | Tensor) -> Tensor:
        """The context (B, L, D) that the U-Net attends to, without gradients."""
        if isinstance(prompts, Tensor):  # a context already
            return prompts
        length = self.text_encoder.config.max_position_embeddings
        token_ids = tokenize(self.get_tokenizer(), prompts, length)
        with torch.no_grad():
            return self.text_encoder(token_ids.to(self.device))

    def get_tokenizer(self) -> CLIPTokenizer:
        """The checkpoint's tokenizer, or the hub's, kept from then on."""
        if self.tokenizer is None:
            self.tokenizer = hub_tokenizer(self.text_encoder.config.vocab_size)
        return self.tokenizer

    def compile(self, backend: str = "inductor") -> None:
        """torch.compile U-Net and decoder, in place; the first call of each takes minutes."""
        for network in (self.unet, self.vae.decoder):
            network.compile(backend=backend)


def initial_student(unet: UNet, init: str | UNet, kind: str, seed: int) -> UNet:
    """The network that training starts from; may change `unet` in place.

    init: "teacher" for `unet` as it is (the paper's start), "negated", "random", or a network.
    "negated" flips the sign of what a diffusion predicts; a flow stays as it is. The velocity is
    X1 - X0, and at t = 0 the noise prediction is X0: the paper's start points away from its target,
    the negated one half way towards it. On the tiny model, after 300 iterations of 64, the reflow
    loss is 0.06 negated and 0.95 from the paper's start, which needs 1400 for 0.07 (seed 0).
    """
    weight = next(unet.parameters())
    if isinstance(init, nn.Module):
        return init.to(weight.device)
    if init == "random":
        torch.manual_seed(seed)
        return build_unet(unet.config).to(weight)
    if init == "negated" and kind == "diffusion":
        for parameter in unet.conv_out.parameters():
            parameter.data.neg_()
    return unet
