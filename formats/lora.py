"""LoRA files for SD 1.x and differences of fine-tunes, merged into a model's weights.

    W  ->  W + scale * alpha / rank * B A       down: A (rank, in), up: B (out, rank)
    W  ->  W + W_finetune - W_base              InstaFlow's way to restyle a one-step model

    python sample.py --lora style.safetensors:0.8 --prompt "a lighthouse"
    python checkpoint.py instaflow.safetensors styled.safetensors --lora style.safetensors

Files name a layer as kohya's sd-scripts do, `lora_unet_mid_block_attentions_0_proj_in`, or as
diffusers does, `unet.mid_block.attentions.0.proj_in`. With _ for each dot, only prefixes and a few
parts differ; `layers_by_name` lists them. Source: Hu et al. 2021 (arXiv 2106.09685).
"""

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from command import BadInput, dtype_name, first_line
from formats.single_file import PICKLES, UNET_PREFIX, original_names, single_file_names, unread
from formats.weights import MALFORMED, open_safetensors
from stable_diffusion import StableDiffusion

# A layer, then a role: to_q.lora_down.weight, to_q.alpha (kohya); to_q.lora_A.weight (PEFT);
# to_q.lora.down.weight, processor.to_q_lora.down.weight, q_proj.lora_linear_layer.down.weight.
KEY = re.compile(r"(.+?)(?:\.(alpha)|[._]lora(?:_linear_layer)?[._](down|up|mid|A|B)\.weight)")
PEFT_ROLES = {"A": "down", "B": "up"}
OTHER_METHODS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa",
                 "lokr_": "LoKr"}
SDXL_KEY = re.compile(r"lora_te[12]_|text_encoder_2\.|\d[._]transformer_blocks[._][1-9]|"
                      "label_emb|add_embedding")
CONTEXT_KEY = re.compile(r"attn2.*to_[kv].*(down|A)\.weight")  # its second size is the context's
OTHER_CONTEXTS = {(1024,): "Stable Diffusion 2.x", (2048,): "SDXL"}  # SD 1.x has 768
REMEDY = "give a LoRA that was made for SD 1.x"


def add_lora_options(parser) -> None:
    """--lora and --add-difference, the same in every command that has them."""
    add = parser.add_argument_group("merged into the weights").add_argument
    add("--lora", type=parse_lora, action="append", metavar="FILE[:SCALE]",
        help="a LoRA for SD 1.x, as style.safetensors:0.8; default scale: 1; may be repeated")
    add("--add-difference", nargs=2, metavar=("FINETUNE", "BASE"),
        help="add the weights of a fine-tuned checkpoint minus those of its base")


def parse_lora(text: str) -> tuple[str, float]:
    """(path, scale) of "FILE:0.8"; scale 1 without a number after the last colon."""
    path, _, number = text.rpartition(":")
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    return (path, scale) if path and math.isfinite(scale) else (text, 1.0)


def lora_inputs(args) -> dict[str, str]:
    """The files of these flags, for `check_not_overwriting`."""
    paths = [path for path, _ in args.lora or ()] + list(args.add_difference or ())
    return {f"the input {path}": path for path in paths}


def apply_lora_options(model: StableDiffusion, args, *difference: StableDiffusion) -> None:
    """Merge what the flags name, in place. difference: the models of --add-difference, loaded."""
    for path, scale in args.lora or ():
        merge_lora(model, path, scale)
    if difference:
        add_difference(model, *difference)


# --------------------------------------------------------------------------------------------------
# Merging


@torch.no_grad()
def merge_lora(model: StableDiffusion, path: str | Path, scale: float = 1.0) -> None:
    """Add a LoRA to the linear maps and convolutions of U-Net and text encoder, in place.

    Computed in fp32. alpha: the file's own, by layer or in PEFT's settings, else the rank.
    BadInput, before any change: another method or architecture, or shapes that do not fit. BadInput
    on the way: a weight that is no longer finite.
    """
    check_one_unet(model)
    path, layers, checked = Path(path), layers_by_name(model), []
    files, keys_by_layer, settings = read_lora(path)
    for layer, keys in keys_by_layer.items():
        key = next(iter(keys.values()))
        flat_name = layer.replace(".processor", "").replace(".", "_")
        if flat_name not in layers:
            raise BadInput(f"{path}: {key}: the model has no such layer; {REMEDY}")
        name, weight = layers[flat_name]
        parts = {role: files[key].get_tensor(key) for role, key in keys.items()}
        try:
            shape = low_rank_product({role: part.to("meta") for role, part in parts.items()}).shape
            factor = scale * alpha_over_rank(name, parts, settings)
        except MALFORMED:  # one of two tensors, two ranks, too few dimensions
            shape = None
        if shape != weight.flatten(1).shape:
            found = ", ".join(f"{role} {list(part.shape)}" for role, part in parts.items())
            raise BadInput(f"{path}: {key}: its tensors ({found}) or their alpha do not fit "
                           f"the model's {list(weight.shape)}; {REMEDY}")
        if any(weight is other for other, _, _ in checked):
            raise BadInput(f"{path}: {key}: names a layer that the file has under another name "
                           f"too; {REMEDY}")
        checked.append((weight, keys, factor))
    for weight, keys, factor in checked:
        parts = {role: files[key].get_tensor(key).to(weight.device) for role, key in keys.items()}
        add_in_fp32(weight, factor * low_rank_product(parts).reshape(weight.shape), path)


@torch.no_grad()
def add_difference(
    model: StableDiffusion, finetune: StableDiffusion, base: StableDiffusion,
) -> None:
    """Add finetune - base to the weights of U-Net and text encoder, in place, in fp32.

    A model that started from the negated teacher (`initial_student`) has the opposite sign in its
    last convolution; there the difference is subtracted. BadInput: other sizes than the model's.
    """
    check_one_unet(model)
    sizes = lambda network: vars(network.config) | {"sample_size": None}
    for other in (finetune, base):
        for part in ("unet", "text_encoder"):
            if sizes(getattr(other, part)) != sizes(getattr(model, part)):
                raise BadInput(f"{other.path}: its {part} is not built like that of {model.path}; "
                               "give a fine-tune and its base, both built like the model")
    weight, start = model.unet.conv_out.weight, base.unet.conv_out.weight
    last_sign = -1 if (weight.to(start) * start).sum() < 0 else 1
    for part in ("unet", "text_encoder"):
        tuned, start = getattr(finetune, part).state_dict(), getattr(base, part).state_dict()
        for name, weight in getattr(model, part).state_dict().items():
            sign = last_sign if name.startswith("conv_out.") else 1
            add_in_fp32(weight, sign * (tuned[name].float() - start[name].float()), finetune.path)


def low_rank_product(parts: dict[str, Tensor]) -> Tensor:
    """B A of one layer, (out, in * kernel height * kernel width), in fp32."""
    down, up = parts["down"].float(), parts["up"].float()
    if "mid" in parts:  # LoCon's three convolutions: 1 x 1 down, 3 x 3 at the rank, 1 x 1 up
        down = torch.einsum("rs...,si->ri...", parts["mid"].float(), down.flatten(1))
    return up.flatten(1) @ down.flatten(1)


def alpha_over_rank(name: str, parts: dict[str, Tensor], settings: dict) -> float:
    """The LoRA's own factor. settings: PEFT's configuration, as diffusers stores it."""
    rank, (network, _, layer) = len(parts["down"]), name.partition(".")
    alpha = settings.get(f"{network}.lora_alpha", rank)
    for ending, own in (settings.get(f"{network}.alpha_pattern") or {}).items():
        if f".{layer}".endswith("." + ending.removeprefix("^")):
            alpha = own
    rank_stabilised = settings.get(f"{network}.use_rslora")
    return float(parts.get("alpha", alpha)) / (rank**0.5 if rank_stabilised else rank)


def add_in_fp32(weight: Tensor, change: Tensor, path: str | Path) -> None:
    merged = (weight.float() + change.to(weight.device)).to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise BadInput(f"{path}: makes a weight that is not finite in {dtype_name(weight.dtype)}; "
                       "try --dtype fp32 or bf16, else the file is damaged")
    weight.copy_(merged)


def check_one_unet(model: StableDiffusion) -> None:
    if model.unet.config.stacked:
        raise BadInput(f"{model.path}: a stacked model of two U-Nets, which takes no LoRA and no "
                       "difference; give one with a single U-Net")


# --------------------------------------------------------------------------------------------------
# Names


def layers_by_name(model: StableDiffusion) -> dict[str, tuple[str, Tensor]]:
    """Every name that a file may give a layer, with _ for each dot -> our name and the weight."""
    table, layers = original_names(model.unet.config, model.vae.config), {}
    for network, prefixes in (("unet", ("lora_unet_", "unet_", "")),
                              ("text_encoder", ("lora_te_", "text_encoder_"))):
        for name, module in getattr(model, network).named_modules():
            if not isinstance(module, (nn.Linear, nn.Conv2d)):
                continue
            original = single_file_names(network, [f"{name}."], table[network])[f"{name}."]
            spellings = (
                name, original.removeprefix(UNET_PREFIX).removesuffix("."),
                name.replace("to_out.0", "to_out"),  # diffusers' until 2023, as the next
                re.sub("(q|k|v|out)_proj$", r"to_\1", name),
                name.removeprefix("text_model."),  # since transformers 5
            )
            for prefix in prefixes:
                for spelling in spellings:
                    layers[prefix + spelling.replace(".", "_")] = f"{network}.{name}", module.weight
    return layers


def read_lora(path: Path) -> tuple[dict, dict[str, dict[str, str]], dict]:
    """Key -> open file; layer as the file names it -> role -> key; PEFT's settings.

    Roles are "down", "up", "mid" and "alpha". BadInput: something else than a LoRA for SD 1.x.
    """
    if path.suffix.lower() in PICKLES:
        raise BadInput(f"{path}: {unread(path)}")
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        raise BadInput(f"{path}: no .safetensors file is there; give a LoRA's, not its folder")
    files, layers = open_safetensors([path]), {}
    for key, file in files.items():
        method = next((method for part, method in OTHER_METHODS.items() if part in key), None)
        if method:
            raise BadInput(f"{path}: {key}: a {method}; only plain LoRA is merged, {REMEDY}")
        shape = file.get_slice(key).get_shape() if CONTEXT_KEY.search(key) else ()
        family = "SDXL" if SDXL_KEY.search(key) else OTHER_CONTEXTS.get(tuple(shape[1:2]))
        if family:
            raise BadInput(f"{path}: {key}: a LoRA for {family}; {REMEDY}")
        match = KEY.fullmatch(key)
        if not match:
            raise BadInput(f"{path}: {key}: not the key of a LoRA; {REMEDY}")
        layer, alpha, role = match.groups()
        layers.setdefault(layer, {})[alpha or PEFT_ROLES.get(role, role)] = key
    if not layers:
        raise BadInput(f"{path}: holds no tensors; {REMEDY}")
    metadata = next(iter(files.values())).metadata() or {}
    try:
        return files, layers, dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
    except MALFORMED as problem:
        raise BadInput(f"{path}: its lora_adapter_metadata is malformed ({first_line(problem)}); "
                       "get the file again") from None
