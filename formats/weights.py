"""Load tensors of foreign files into our networks, for the other files of this folder."""

import itertools
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from command import BadInput, dtype_name, note
from stable_diffusion import FAMILIES, KINDS, FewStep
from text_encoder import TextEncoder
from stacked_unet import StackedUNet, build_unet
from unet import UNet
from vae import AutoencoderKL

# What reading a configuration that somebody else wrote may raise.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError,
             RuntimeError)
OURS = "this project reads SD 1.4, 1.5 and fine-tunes of them"
# Channels from which bf16 convolutions are faster with channels last: SD's decoder 2.2 times on a
# CPU. In fp32 all are.
WIDE = 128
# Of CLIP and of the autoencoder's training; they do not change what the networks compute.
KNOWN_UNUSED = ("position_ids", "text_projection.weight", "text_projection", "logit_scale")


def open_safetensors(paths: list[Path]) -> dict:
    """Tensor name -> the open file that holds it."""
    found = {}
    for path in paths:
        try:
            file = safe_open(path, "pt")
        except (SafetensorError, OSError) as problem:
            raise BadInput(
                f"{path}: not a complete safetensors file ({problem}); get or make it again"
            ) from None
        found |= dict.fromkeys(file.keys(), file)
    return found


def check_metadata(path: Path, about) -> dict:
    """What a file or folder says of itself, if kind, family and sampler are known here."""
    if not isinstance(about, dict):
        what = type(about).__name__
        raise BadInput(f"{path}: its metadata is malformed (a {what}, not an object); get it again")
    if about.get("method") or "captions" in about and "family" not in about:
        raise BadInput(f"{path}: its metadata is of an earlier version; make it again")
    for name, known in (("kind", KINDS), ("family", tuple(FAMILIES)),
                        ("sampler", ("", "euler", "renoise", "mean"))):
        if about.get(name) is not None and about[name] not in known:
            raise BadInput(f"{path}: its metadata names the {name} {about[name]!r}; known are "
                           f"{', '.join(known)}")
    if about.get("sampler"):
        steps, allowed = about.get("steps"), about.get("allowed_steps")
        is_count = lambda n: type(n) is int and 1 <= n <= 1000
        if not (is_count(steps) and isinstance(allowed, list) and all(map(is_count, allowed))
                and (not allowed or steps in allowed)):
            raise BadInput(f"{path}: its metadata is malformed (steps {steps!r}, allowed_steps "
                           f"{allowed!r}); get it again")
    return about


def identity_of(path: Path, about: dict, unet: nn.Module) -> dict:
    """Checked metadata as arguments of StableDiffusion."""
    few_step = None
    if about.get("sampler"):
        few_step = FewStep(about["sampler"], about["steps"], tuple(about["allowed_steps"]))
    if few_step and few_step.sampler == "mean" and not unet.config.second_time:
        raise BadInput(f"{path}: its metadata is malformed (its sampler needs a second time in the "
                       "U-Net); get it again")
    return {"family": about.get("family") or "sd", "few_step": few_step}


def in_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight to write, on the CPU; in fp32 where it does not fit fp16, with a note."""
    other = tensor.detach().to("cpu", dtype, memory_format=torch.contiguous_format)
    if torch.isfinite(other).all():
        return other
    if not torch.isfinite(tensor).all():
        raise BadInput(f"{name}: is not finite; the model is damaged and is not written")
    note(f"{name}: does not fit {dtype_name(dtype)}, written in fp32")
    return tensor.detach().to("cpu", torch.float32, memory_format=torch.contiguous_format)


def metadata_of(model) -> dict:
    """The inverse of `identity_of`."""
    few_step = model.few_step._asdict() if model.few_step else {}
    return {"kind": model.kind, "family": model.family} | few_step


def empty_networks(where: str, configs, dtype: torch.dtype) -> dict[str, nn.Module]:
    """U-Net, autoencoder and text encoder on the meta device, in the memory format for `dtype`.

    configs(): reads their three configurations. BadInput: they are not Stable Diffusion's.
    """
    try:
        unet, vae, text = configs()
        for name, value in itertools.chain(*(vars(config).items() for config in (unet, vae, text))):
            numbers = value if isinstance(value, tuple) else (value,)
            known = (int, float) if name == "scaling_factor" else (int, bool)
            if not all(type(n) in known and (n > 0 or n is False) for n in numbers):
                raise ValueError(f"{name} is {value!r}")
        attended = [n for n, here in zip(unet.block_out_channels, unet.attention_levels) if here]
        if (any(n % unet.attention_heads for n in (*attended, unet.block_out_channels[-1]))
                or text.hidden_size % text.num_attention_heads):
            raise ValueError("its widths are not multiples of its attention heads")
        if unet.in_channels != vae.latent_channels:
            what = "an inpainting model" if unet.in_channels == 9 else "another model"
            raise BadInput(f"{where}: {what} ({unet.in_channels} channels in, not "
                           f"{vae.latent_channels}); give one that takes a prompt alone")
        with torch.device("meta"):
            networks = {"unet": build_unet(unet), "vae": AutoencoderKL(vae),
                        "text_encoder": TextEncoder(text)}
    except MALFORMED as problem:
        raise BadInput(
            f"{where}: its configuration is not that of an SD 1.x model ({problem!r}); get it again"
        ) from None
    set_memory_format(networks["unet"], networks["vae"], dtype)
    return networks


def set_memory_format(unet: UNet | StackedUNet, vae: AutoencoderKL, dtype: torch.dtype) -> None:
    """Give convolutions the memory format that is fastest in this dtype, in place."""
    fast = dtype == torch.float32 or unet.config.block_out_channels[0] >= WIDE
    unet.to(memory_format=torch.channels_last if fast else torch.contiguous_format)
    # In fp32, channels last makes the norms of the autoencoder round four times as coarsely.
    if fast and dtype != torch.float32:
        vae.to(memory_format=torch.channels_last)


def load_weights(
    module: nn.Module, what: str, keys: dict[str, str], files: dict, where: str, device, dtype,
) -> None:
    """Fill a module on the meta device. keys: our name -> the file's; files: that name -> file.

    Tensors go one by one through the memory map into their dtype and device. Strict: BadInput names
    missing tensors and wrong shapes.
    """
    wanted = module.state_dict()
    missing = [keys[name] for name in wanted if keys[name] not in files]
    if missing:
        raise BadInput(f"{where}: {len(missing)} tensors are missing, first "
                       f"{', '.join(missing[:3])}; not a complete SD 1.x {what}")
    tensors, wrong = {}, []
    for name, empty in wanted.items():
        file, expected = files[keys[name]], list(empty.shape)
        shape = list(file.get_slice(keys[name]).get_shape())
        # Single files store the linear maps of the autoencoder's attention as 1 x 1 convolutions.
        if shape != expected and shape != [*expected, 1, 1]:
            wrong.append(f"{keys[name]} is {shape} and should be {expected}")
        elif not wrong:
            tensor = file.get_tensor(keys[name])
            if not tensor.is_floating_point():
                raise BadInput(f"{where}: {keys[name]} is {tensor.dtype}, quantized; get the model "
                               "in fp32, fp16 or bf16")
            new = torch.empty_strided(empty.shape, empty.stride(), dtype=dtype, device=device)
            tensors[name] = new.copy_(tensor.reshape(empty.shape))
            if new.device.type != "meta" and not torch.isfinite(new).all():
                raise BadInput(f"{where}: {keys[name]} is not finite in {dtype_name(dtype)}; try "
                               "--dtype fp32 or bf16, else the file is damaged")
    if wrong:
        raise BadInput(f"{where}: {len(wrong)} tensors have the wrong shape: "
                       f"{'; '.join(wrong[:3])}; not an SD 1.x {what}")
    module.load_state_dict(tensors, assign=True)


def check_unused_tensors(where: Path, names: set[str], prefixes: tuple[str, ...]) -> None:
    """Tensors that a file holds beyond the model: an error within a network, else a note.

    A tensor that our network does not have changes what the network computes: quantization scales,
    the guidance embedding of a latent consistency model, adapters.
    """
    unknown = sorted(name for name in names if not name.endswith(KNOWN_UNUSED))
    within = [name for name in unknown if name.startswith(prefixes)]
    if within:
        raise BadInput(f"{where}: holds {len(within)} tensors that no SD 1.x network has, first "
                       f"{', '.join(within[:3])}; not a plain SD 1.x model")
    if unknown:
        first = ", ".join(unknown[:3])
        note(f"{where}: {len(unknown)} unknown tensors are not used, first {first}")


def kind_by_name(path: Path, names: tuple[str, ...], flow: bool = False) -> str:
    """The kind of a model that does not store it, by its names, with a note. flow: it is a flow."""
    text = " ".join(names).lower()
    if not flow and not re.search("instaflow|rectified.?flow|(?<![a-z0-9])[23].?rf(?![a-z])", text):
        return "diffusion"
    kind = "one-step" if "instaflow" in text else "flow"
    note(f"{path}: by its name a rectified flow, of kind {kind}; --kind overrides it")
    return kind
