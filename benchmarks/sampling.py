"""One-step sampling, part by part: ours against diffusers and OpenVINO, in turns.

    python benchmarks/sampling.py               SD's size at 512 px, random weights; minutes
    python benchmarks/sampling.py --dtype bf16 --compile --openvino    pip install openvino
    python benchmarks/sampling.py --dtype bf16 --openvino --int8       pip install openvino nncf
    python benchmarks/sampling.py --device cuda --batch-size 16 --compile
    python benchmarks/sampling.py --defaults    each side's own: diffusers fp32, ours --dtype auto

All sides have the same weights; OpenVINO runs diffusers' networks, with --int8 with weights and
activations in int8 too. "compiled" is ours with torch.compile. The small decoder has TAESD's sizes
(formats/small_decoder.py). "ratio" is our eager seconds over diffusers' in the same round. "of the
limit" is our network's FLOP a second, as a fraction of this machine's in products of large matrices
of that dtype. "differ by" is the largest difference of our outputs from diffusers' over their
largest value. Writes results/sampling-batch<N>-<dtype>-<device>.json; after N come "defaults", if
that flag is given, and the library in LD_PRELOAD, such as another memory allocator.
"""

import gc
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode, flop_registry, register_flop_formula, sdpa_flop_count,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import (
    TOKENS, full_size_model, ratio, relative_difference, report, take_turns, timing_parser,
)
from benchmarks.training_step import diffusers_unet
from command import BadInput, pick_device, pick_dtype, run
from formats.diffusers_folder import text_to_transformers, vae_to_diffusers
from formats.small_decoder import SmallDecoder, SmallDecoderConfig
from formats.weights import set_memory_format
from rectified_flow import flow_velocity, one_step

MATRIX = 4096  # side of the matrices that measure the limit

# torch 2.14 does not count the second, its own attention on CPUs.
for attention in (torch.ops.instaflow.attention_by_parts,
                  torch.ops.aten._scaled_dot_product_flash_attention_for_cpu):
    if attention not in flop_registry:
        register_flop_formula(attention)(lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v))


class TensorFunction(nn.Module):
    """A network as a function of tensors to one tensor, which OpenVINO can trace."""

    def __init__(self, network: nn.Module, call: Callable[..., Tensor]):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.network, *inputs)


def in_openvino(
    network: TensorFunction, inputs: tuple[Tensor, ...], dtype: torch.dtype,
    calibration: list[tuple[Tensor, ...]] | None = None,
) -> Callable[..., Tensor]:
    """The network compiled by OpenVINO for inputs of these shapes.

    calibration: inputs on which NNCF chooses int8's ranges; None: no int8.
    """
    import openvino

    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trace holds for these shapes only, as intended
        graph = openvino.convert_model(network, example_input=inputs)
    graph.reshape({number: list(tensor.shape) for number, tensor in enumerate(inputs)})
    if calibration is not None:
        import nncf

        as_inputs = lambda given: {number: tensor.numpy() for number, tensor in enumerate(given)}
        graph = nncf.quantize(graph, nncf.Dataset(calibration, as_inputs),
                              subset_size=len(calibration),
                              model_type=nncf.ModelType.TRANSFORMER)
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return lambda *given: torch.from_numpy(compiled([tensor.numpy() for tensor in given])[0])


def diffusers_networks(model, small: SmallDecoder, device) -> dict[str, TensorFunction]:
    """The networks of diffusers and transformers with our weights, in fp32."""
    from diffusers import AutoencoderKL, AutoencoderTiny
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = AutoencoderKL.from_config(vae_to_diffusers(model.vae.config))
    vae.load_state_dict(model.vae.state_dict())
    scale = model.vae.config.scaling_factor
    tiny = AutoencoderTiny()
    tiny.load_state_dict(small.state_dict(), strict=False)  # the encoder stays random
    text = CLIPTextModel(CLIPTextConfig(**text_to_transformers(model.text_encoder.config)))
    text.load_state_dict(model.text_encoder.text_model.state_dict())
    decode = lambda network, latents: network.decode(latents, return_dict=False)[0]
    return {
        "text": TensorFunction(text, lambda network, tokens: network(tokens).last_hidden_state),
        "U-Net": TensorFunction(
            diffusers_unet(model.unet, device, torch.float32),
            lambda network, x, t, context: network(x, t, context, return_dict=False)[0],
        ),
        "decoder": TensorFunction(vae, lambda network, latents: decode(network, latents / scale)),
        "small decoder": TensorFunction(tiny, decode),
    }


def in_dtype(network: nn.Module, device: torch.device, dtype: torch.dtype) -> Callable:
    """The network as a function that casts its inputs."""
    network.to(device, dtype).eval()
    cast = lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
    return lambda *given: network(*(cast(tensor) for tensor in given))


def with_images(calls: dict[str, Callable], tokens: Tensor, noise: Tensor) -> dict[str, Callable]:
    """Add one-step sampling of an image, with each decoder."""

    def image(decoder: str) -> Tensor:
        start = one_step(flow_velocity(calls["U-Net"]), noise, calls["text"](tokens))
        return calls[decoder](start)

    return calls | {"image": lambda *_: image("decoder"),
                    "image, small decoder": lambda *_: image("small decoder")}


def limit(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP a second of this machine in products of large matrices."""
    a, b = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
    seconds, _ = take_turns({"matrix product": lambda: a @ b}, 5, device)
    return 2 * MATRIX**3 / statistics.median(seconds["matrix product"])


@torch.inference_mode()
def main():
    parser = timing_parser("Time one-step sampling, ours against diffusers and OpenVINO.", rounds=5)
    add = parser.add_argument
    add("--defaults", action="store_true",
        help="diffusers in fp32, its default, whatever --dtype is")
    add("--compile", action="store_true", help="ours with torch.compile too")
    add("--openvino", action="store_true", help="diffusers' networks in OpenVINO too, on a CPU")
    add("--int8", action="store_true", help="and those in int8")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.openvino and (device.type != "cpu" or not find_spec("openvino")):
        raise BadInput("--openvino: runs on --device cpu, after pip install openvino")
    if args.int8 and not (args.openvino and find_spec("nncf")):
        raise BadInput("--int8: goes with --openvino, after pip install nncf")
    dtype, batch = pick_dtype(args.dtype, device), args.batch_size
    model = full_size_model(args.seed, "one-step")
    small = SmallDecoder(SmallDecoderConfig())

    tokens = torch.randint(49000, (batch, TOKENS), device=device)
    noise = torch.randn(batch, 4, args.latent_size, args.latent_size, device=device)
    time = torch.full((batch,), 1000.0, device=device)
    context = torch.randn(batch, TOKENS, 768, device=device)
    inputs = {"text": (tokens,), "U-Net": (noise, time, context), "decoder": (noise,),
              "small decoder": (noise,)}
    sides, theirs = {}, diffusers_networks(model, small, device)
    if args.openvino:
        sides["OpenVINO"] = {name: in_openvino(network.eval(), inputs[name], dtype)
                             for name, network in theirs.items()}
    if args.int8:
        sides["OpenVINO int8"] = {
            name: in_openvino(network.eval(), inputs[name], dtype, [inputs[name]])
            for name, network in theirs.items()
        }
    their_dtype = torch.float32 if args.defaults else dtype
    sides["diffusers"] = {name: in_dtype(network, device, their_dtype)
                          for name, network in theirs.items()}
    text, unet, vae = (network.to(device, dtype).eval()
                       for network in (model.text_encoder, model.unet, model.vae))
    set_memory_format(unet, vae, dtype)
    small.to(device, dtype, memory_format=torch.channels_last).eval()  # as load_decoder does
    ours = {"text": text, "U-Net": unet, "decoder": vae.decode, "small decoder": small.decode}
    sides["ours"] = ours
    if args.compile:
        sides["compiled"] = {name: torch.compile(call) for name, call in ours.items()}
    sides = {name: with_images(calls, tokens, noise) for name, calls in sides.items()}
    gc.collect()

    peak, rows = limit(dtype, device), []
    for part, call in sides["ours"].items():
        given = inputs.get(part, ())
        with FlopCounterMode(display=False) as counter:
            call(*given)
        flop = counter.get_total_flops()
        calls = {name: partial(calls[part], *given) for name, calls in sides.items()}
        seconds, outputs = take_turns(calls, args.rounds, device)
        row = {"part": part}
        row |= {f"{name}, s": statistics.median(each) for name, each in seconds.items()}
        row |= ratio(seconds["ours"], seconds["diffusers"])
        row["differ by"] = relative_difference(outputs["ours"], outputs["diffusers"])
        row |= {"TFLOP": flop / 1e12, "of the limit": flop / row["ours, s"] / peak}
        rows.append(row)
    library = Path(os.environ.get("LD_PRELOAD", "")).name.partition(".")[0]
    name = "-".join(filter(None, (f"sampling-batch{batch}", "defaults" * args.defaults, library)))
    report(name, device, dtype, rows, limit_tflops=peak / 1e12)


if __name__ == "__main__":
    run(main)
