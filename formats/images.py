"""Image files: write generated images and grids of them; read real images of any kind."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from command import (
    BadInput, NotFinite, first_line, lock_folder, note, read_our_json, unlock_folder,
    write_atomically, write_json,
)

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
DESCRIPTION = 0x010E  # the EXIF tag ImageDescription
LONGEST_EXIF = 60_000  # bytes; EXIF has room for 65,533
LARGEST = {".webp": 16_383, ".jpg": 65_500, ".jpeg": 65_500}  # pixels to a side
# Workflows and colour profiles in a PNG exceed Pillow's 1 MB; its pixels are fine.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28


def check_image_ending(path: str) -> None:
    """BadInput, before the work, for an ending that no image is written with. "DIR/" is fine."""
    if not path.endswith("/") and Path(path).suffix.lower() not in ENDINGS:
        raise BadInput(f"--out {path}: must end in {', '.join(ENDINGS)}")


def check_grid_size(path: str, size: tuple[int, int], rows: int, columns: int) -> None:
    """BadInput, before the work, for a grid of images of this size that the format cannot hold."""
    scale, limit = -(-128 // size[0]), LARGEST.get(Path(path).suffix.lower(), 2**31)
    if max(rows * (scale * size[0] + 2), columns * (scale * size[1] + 2)) + 2 > limit:
        raise BadInput(f"--out {path}: {rows} x {columns} images do not fit, its format ends at "
                       f"{limit:,} pixels; take .png, or DIR/ for a file an image")


def to_bytes(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 on the CPU."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()


def save_image(path: str, pixels: np.ndarray, about: dict) -> None:
    """Write (H, W, 3) uint8 with how it was made: as text of a PNG, as EXIF of others."""
    info, exif = PngImagePlugin.PngInfo(), Image.Exif()
    readable = lambda text: text.encode(errors="replace")  # names of files may be no Unicode
    for key, value in about.items():
        info.add_text(key, readable(str(value)).decode())
    exif[DESCRIPTION] = readable(json.dumps(about, ensure_ascii=False))[:LONGEST_EXIF]
    more = {"pnginfo": info} if path.lower().endswith(".png") else {"exif": exif, "quality": 95}
    write_atomically(path, lambda temporary: Image.fromarray(pixels).save(temporary, **more))


def save_each(
    folder: Path, prompts: list[str], seeds: list[int], about: dict, identity: dict,
    batch_size: int, generate: Callable,
) -> int:
    """Write an image for each prompt and seed, as 000000-SEED.png and so on; how many are new.

    about: metadata of the images; identity: what else decides them. generate(prompts, seeds):
    images (N, 3, H, W) in [-1, 1]. Images that are there stay, so that an interrupted run
    continues. BadInput: the folder holds other images, or another run works in it.
    """
    settings = {key: value for key, value in about.items() if key not in ("prompt", "seed")}
    settings = json.loads(json.dumps(settings | identity | {"prompts": prompts, "seeds": seeds}))
    paths = [folder / f"{k:06d}-{seed}.png" for k, seed in enumerate(seeds)]
    lock_folder(folder)
    record = folder / "settings.json"
    before = read_our_json(record, {})
    other = [key for key in before | settings if before.get(key) != settings.get(key)]
    if other and (before or any(path.exists() for path in paths)):
        raise BadInput(f"{folder}: holds other images ({', '.join(other)} differ); name another "
                       "folder with --out")
    write_json(record, settings)
    missing = [k for k, path in enumerate(paths) if not path.exists()]
    for start in range(0, len(missing), batch_size):
        chosen = missing[start : start + batch_size]
        images = generate([prompts[k] for k in chosen], [seeds[k] for k in chosen])
        for k, pixels in zip(chosen, to_bytes(images).numpy()):
            one = about | {"prompt": prompts[k], "seed": seeds[k]}
            save_image(str(paths[k]), pixels, {"parameters": parameters_of(one, pixels), **one})
    unlock_folder(folder)
    return len(missing)


def parameters_of(about: dict, pixels: np.ndarray) -> str:
    """The text under "parameters" of a PNG by which AUTOMATIC1111 and its successors read it."""
    height, width, _ = pixels.shape
    samplers = {"dpm": "DPM++ 2M", "ddim": "DDIM", "renoise": "LCM"}
    sampler = samplers.get(about["solver"], "Euler")
    negative = about["negative_prompt"] and f"\nNegative prompt: {about['negative_prompt']}"
    return (f"{about['prompt']}{negative}\nSteps: {about['steps']}, Sampler: {sampler}, "
            f"CFG scale: {about['guidance']:g}, Seed: {about['seed']}, Size: {width}x{height}, "
            f"Model: {about['model'].removesuffix('.safetensors')}")


def save_gif(path: str | Path, images: Tensor, milliseconds: int = 120) -> None:
    """Write images (N, 3, H, W) in [-1, 1] as an endless animation. milliseconds: a frame."""
    first, *others = map(Image.fromarray, to_bytes(images).numpy())
    write_atomically(path, lambda temporary: first.save(
        temporary, save_all=True, append_images=others, duration=milliseconds, loop=0))


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


def read_image(path: str | Path, height: int, width: int) -> Tensor:
    """An image file, resized and cropped: (3, height, width) uint8. BadInput: Pillow refuses it."""
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16 bits, of which Pillow would clip all above 255
                gray = np.asarray(image).clip(0, 2**16 - 1) // 257
                image = Image.fromarray(gray.astype("uint8"))
            elif image.mode == "F":
                raise ValueError("floating-point pixels")
            if image.has_transparency_data:  # on white
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            pixels = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    except Exception as problem:  # Pillow raises many kinds
        why = first_line(problem)
        raise BadInput(f"{path}: not a readable image ({why}); delete or replace it") from None
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def read_condition(path: str | Path, height: int, width: int, edges: bool) -> Tensor:
    """An image file for a ControlNet, or its edges: (1, 3, height, width) in [0, 1], fp32."""
    image = read_image(path, height, width)
    if edges:
        image = torch.from_numpy(canny(image.permute(1, 2, 0).numpy())).permute(2, 0, 1)
    return image[None] / 255


def canny(pixels: np.ndarray, low: float = 65, high: float = 130) -> np.ndarray:
    """(H, W, 3) uint8 to its edges, same shape and dtype: white, one pixel wide, on black.

    low, high: hysteresis thresholds of the strongest channel's Sobel gradient. Steps of 26 and 51
    exceed them; in OpenCV, which does not smooth, these exceed 100 and 200. Canny 1986 (PAMI 8).
    """
    from scipy import ndimage  # slow to import, and only edges need it

    channels = ndimage.gaussian_filter(pixels.astype(float), (1, 1, 0)).transpose(2, 0, 1)
    slopes = np.array([[ndimage.sobel(channel, axis) for channel in channels] for axis in (0, 1)])
    strongest = np.hypot(*slopes).argmax(0)
    down, right = np.take_along_axis(slopes, strongest[None, None], 1)[:, 0]  # (H, W) each
    gradient = np.hypot(down, right)
    around = np.pad(gradient, 1)
    # Non-maximum suppression: compare with both neighbours along the gradient, to 45 degrees.
    direction, ridge = np.rint(np.arctan2(down, right) / (np.pi / 4)) % 4, gradient < 0
    for k, (y, x) in enumerate([(0, 1), (1, 1), (1, 0), (1, -1)]):
        behind, ahead = (np.roll(around, (n * y, n * x), (0, 1))[1:-1, 1:-1] for n in (1, -1))
        ridge |= (direction == k) & (gradient > behind) & (gradient >= ahead)
    # Hysteresis: of connected pixels above `low`, keep those that touch one above `high`.
    labels, _ = ndimage.label(ridge & (gradient > low), np.ones((3, 3)))
    edges = np.isin(labels, labels[ridge & (gradient > high)])
    return np.repeat(np.uint8(255) * edges[:, :, None], 3, axis=2)


def decode_finite(model, latents: Tensor, prompts) -> Tensor:
    """Latents to images (N, 3, H, W), fp32 on the CPU, again in fp32 where they overflow.

    BadInput: names the part that is not finite.
    """
    if not torch.isfinite(latents).all():
        text = torch.isfinite(model.encode_prompts(prompts)).all()
        raise NotFinite(f"the {'U-Net' if text else 'text encoder'} overflows: its output is not "
                       "finite; try --dtype fp32 or bf16")
    images = model.vae.decode(latents).float().cpu()
    if torch.isfinite(images).all():
        return images
    note("the autoencoder overflows in this --dtype; it decodes in fp32")
    images = copy.deepcopy(model.vae).float().decode(latents.float()).cpu()
    if not torch.isfinite(images).all():
        raise BadInput("the autoencoder's images are not finite, in fp32 too; its file is damaged")
    return images
