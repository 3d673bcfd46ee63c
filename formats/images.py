"""Image files: a grid of ours out, real images of any kind in."""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from command import BadInput, first_line, note, write_atomically
from vae import to_bytes

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
DESCRIPTION = 0x010E  # the EXIF tag ImageDescription
# Workflows and colour profiles in a PNG exceed Pillow's 1 MB; its pixels are fine.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28


def check_image_ending(path: str) -> None:
    """BadInput, before the work, for an ending that no image is written with."""
    if Path(path).suffix.lower() not in ENDINGS:
        raise BadInput(f"--out {path}: must end in {', '.join(ENDINGS)}")


def save_image(path: str, pixels: np.ndarray, about: dict) -> None:
    """Write (H, W, 3) uint8 with how it was made: as text of a PNG, as EXIF of others."""
    info, exif = PngImagePlugin.PngInfo(), Image.Exif()
    for key, value in about.items():
        info.add_text(key, str(value))
    exif[DESCRIPTION] = json.dumps(about, ensure_ascii=False).encode()
    more = {"pnginfo": info} if path.lower().endswith(".png") else {"exif": exif, "quality": 95}
    write_atomically(path, lambda temporary: Image.fromarray(pixels).save(temporary, **more))


def enlarged(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) by a whole factor to a height of 128 pixels or more."""
    factor = -(-128 // images.shape[2])
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def image_grid(images: Tensor, columns: int, gap: int = 2) -> np.ndarray:
    """Images (N, 3, H, W) in [-1, 1] as one (H', W', 3) uint8, white lines between them."""
    pixels = to_bytes(images).numpy()  # (N, H, W, 3)
    count, height, width, _ = pixels.shape
    if count == 1:
        return pixels[0]
    columns = min(columns, count)
    rows, down, right = -(-count // columns), height + gap, width + gap
    sheet = np.full((rows * down + gap, columns * right + gap, 3), 255, dtype=np.uint8)
    for k, image in enumerate(pixels):
        y, x = k // columns * down + gap, k % columns * right + gap
        sheet[y : y + height, x : x + width] = image
    return sheet


def read_square(path: Path, side: int) -> Tensor:
    """The central square of an image file, (3, side, side) uint8. BadInput: Pillow refuses it."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, of which Pillow would clip all above 255
                gray = np.asarray(image).clip(0, 2**16 - 1) // 257
                image = Image.fromarray(gray.astype("uint8"))
            elif image.mode == "F":
                raise ValueError("floating-point pixels")
            pixels = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    except Exception as problem:  # Pillow raises many kinds
        why = first_line(problem)
        raise BadInput(f"{path}: not a readable image ({why}); delete or replace it") from None
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def decode_finite(model, latents: Tensor, prompts) -> Tensor:
    """Latents to images (N, 3, H, W), fp32 on the CPU, again in fp32 where they overflow.

    BadInput: names the part that is not finite.
    """
    if not torch.isfinite(latents).all():
        text = torch.isfinite(model.encode_prompts(list(prompts))).all()
        raise BadInput(f"the {'U-Net' if text else 'text encoder'} overflows: its output is not "
                       "finite; try --dtype fp32 or bf16")
    images = model.vae.decode(latents).float().cpu()
    if torch.isfinite(images).all():
        return images
    note("the autoencoder overflows in this --dtype; it decodes in fp32")
    images = copy.deepcopy(model.vae).float().decode(latents.float()).cpu()
    if not torch.isfinite(images).all():
        raise BadInput("the autoencoder's images are not finite, in fp32 too; its file is damaged")
    return images
