"""One-step sampling against diffusers, part by part, at the same dtype and sizes.

    python benchmarks/sampling.py               SD's size at 512 px, random weights; minutes
    python benchmarks/sampling.py --device cuda --batch-size 16 --compile
    python benchmarks/sampling.py --defaults    each side's own: diffusers fp32, ours --dtype auto
    python benchmarks/sampling.py --peer openvino --compile
        diffusers' networks in OpenVINO (pip install openvino; 17 GB of memory in fp32)

Both sides have the same weights. "of the limit" is our network's FLOP a second, as a fraction of
this machine's in products of large matrices of that dtype. "differ by" is the largest difference of
the outputs over their largest value. Writes results/sampling-<peer>-batch<N>-<dtype>-<device>.json,
with "-defaults" and "-compiled" after N if these flags are given.
"""

import gc
import statistics
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import (
    TOKENS, full_size_model, report, side_by_side, take_turns, timing_parser,
)
from benchmarks.training_step import diffusers_unet
from command import BadInput, pick_device, pick_dtype, run
from formats.diffusers_folder import text_to_transformers, vae_to_diffusers
from formats.weights import set_memory_format
from rectified_flow import flow_velocity, one_step

MATRIX = 4096  # side of the matrices that measure the limit


class TensorFunction(nn.Module):
    """A network as a function of tensors to one tensor, which OpenVINO can trace."""

    def __init__(self, network: nn.Module, call: Callable[..., Tensor]):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.network, *inputs)


def in_openvino(
    network: TensorFunction, inputs: tuple[Tensor, ...], dtype: torch.dtype
) -> Callable[..., Tensor]:
    """The network compiled by OpenVINO for inputs of these shapes."""
    import openvino

    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trace holds for these shapes only, as intended
        graph = openvino.convert_model(network, example_input=inputs)
    graph.reshape({number: list(tensor.shape) for number, tensor in enumerate(inputs)})
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return lambda *given: torch.from_numpy(compiled([tensor.numpy() for tensor in given])[0])


def peers_of(
    model, peer: str, dtype: torch.dtype, device: torch.device, inputs: dict[str, tuple]
) -> dict[str, Callable]:
    """The networks of diffusers and transformers with the same weights, as functions of tensors."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = AutoencoderKL.from_config(vae_to_diffusers(model.vae.config))
    vae.load_state_dict(model.vae.state_dict())
    scale = model.vae.config.scaling_factor
    text = CLIPTextModel(CLIPTextConfig(**text_to_transformers(model.text_encoder.config)))
    text.load_state_dict(model.text_encoder.text_model.state_dict())
    networks = {
        "text": TensorFunction(text, lambda network, tokens: network(tokens).last_hidden_state),
        "U-Net": TensorFunction(
            diffusers_unet(model.unet, device, dtype),
            lambda network, x, t, context: network(x, t, context, return_dict=False)[0],
        ),
        "decoder": TensorFunction(
            vae, lambda network, latents: network.decode(latents / scale, return_dict=False)[0]
        ),
    }
    if peer == "openvino":
        return {name: in_openvino(networks.pop(name).eval(), inputs[name], dtype)
                for name in list(networks)}
    cast = lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
    calls = {}
    for name, network in networks.items():
        network.to(device, dtype).eval()
        calls[name] = lambda *given, network=network: network(*(cast(tensor) for tensor in given))
    return calls


def limit(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP a second of this machine in products of large matrices."""
    a, b = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
    seconds, _ = take_turns({"matrix product": lambda: a @ b}, 5, device)
    return 2 * MATRIX**3 / statistics.median(seconds["matrix product"])


@torch.inference_mode()
def main():
    parser = timing_parser("Time one-step sampling against diffusers.", rounds=5)
    parser.add_argument("--peer", choices=["diffusers", "openvino"], default="diffusers")
    parser.add_argument("--defaults", action="store_true",
                        help="the peer in fp32, diffusers' default, whatever --dtype is")
    parser.add_argument("--compile", action="store_true",
                        help="ours with torch.compile, as --compile of sample.py")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.peer == "openvino" and (device.type != "cpu" or not find_spec("openvino")):
        raise BadInput("--peer openvino: runs on --device cpu, after pip install openvino")
    dtype, batch = pick_dtype(args.dtype, device), args.batch_size
    their_dtype = torch.float32 if args.defaults else dtype
    model = full_size_model(args.seed, "one-step")

    tokens = torch.randint(49000, (batch, TOKENS), device=device)
    noise = torch.randn(batch, 4, args.latent_size, args.latent_size, device=device)
    time = torch.full((batch,), 1000.0, device=device)
    context = torch.randn(batch, TOKENS, 768, device=device)
    inputs = {"text": (tokens,), "U-Net": (noise, time, context), "decoder": (noise,)}
    theirs = peers_of(model, args.peer, their_dtype, device, inputs)
    gc.collect()  # the networks that OpenVINO compiled

    unet, vae, text = (
        network.to(device, dtype).eval() for network in (model.unet, model.vae, model.text_encoder)
    )
    set_memory_format(unet, vae, dtype)
    ours = {"text": text, "U-Net": unet, "decoder": vae.decode}

    def image(text: Callable, velocity: Callable, decode: Callable) -> Tensor:
        return decode(one_step(velocity, noise, text(tokens)))

    calls = {name: (partial(ours[name], *given), partial(theirs[name], *given))
             for name, given in inputs.items()}
    calls["picture"] = (
        lambda: image(text, flow_velocity(unet), vae.decode),
        lambda: image(theirs["text"], flow_velocity(theirs["U-Net"]), theirs["decoder"]),
    )
    flop = {}
    for name, (mine, _) in calls.items():
        with FlopCounterMode(display=False) as counter:
            mine()
        flop[name] = counter.get_total_flops()
    if args.compile:
        model.compile()
    peak, rows = limit(dtype, device), []
    for name, (mine, peer) in calls.items():
        row = side_by_side(name, mine, args.peer, peer, args.rounds, device)
        of_the_limit = flop[name] / row["ours, s"] / peak
        rows.append(
            {"part": name} | row | {"TFLOP": flop[name] / 1e12, "of the limit": of_the_limit}
        )
    name = f"sampling-{args.peer}-batch{batch}"
    name += "-defaults" * args.defaults + "-compiled" * args.compile
    report(name, device, dtype, rows, limit_tflops=peak / 1e12)


if __name__ == "__main__":
    run(main)
