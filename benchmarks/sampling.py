"""One-step sampling against diffusers, part by part, at the same dtype and sizes, and how far each is from the machine's limit.

    python benchmarks/sampling.py                 Stable Diffusion's size at 512 px, random weights; minutes on a CPU
    python benchmarks/sampling.py --device cuda --batch-size 16
    python benchmarks/sampling.py --defaults      each side's own default: diffusers fp32, ours as --dtype auto says

Both sides hold the same weights. "of the limit" is the counted work of U-Net and decoder over the time they take, as a share
of what this machine reaches in products of large matrices at that dtype. Writes results/sampling-<device>.json.
"""

import statistics
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import text_to_transformers, vae_to_diffusers
from command import pick_device, pick_dtype, run
from make_checkpoint import make_model
from rectified_flow import flow_velocity, one_step
from timing import TOKENS, ratio, report, take_turns, timing_parser
from training_step import diffusers_unet

MATRIX = 4096  # side of the matrices that give the limit


def peers_of(model, dtype: torch.dtype, device: torch.device):
    """diffusers' and transformers' networks with the same weights."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = AutoencoderKL.from_config(vae_to_diffusers(model.vae.config))
    text = CLIPTextModel(CLIPTextConfig(**text_to_transformers(model.text_encoder.config)))
    vae.load_state_dict(model.vae.state_dict())
    return [diffusers_unet(model.unet, device, dtype), vae.to(device, dtype).eval(), text.to(device, dtype).eval()]


def limit(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP a second in products of large matrices."""
    a, b = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))
    seconds = take_turns({"matrix product": lambda: a @ b}, 5, device)["matrix product"]
    return 2 * MATRIX**3 / statistics.median(seconds)


@torch.inference_mode()
def main():
    parser = timing_parser("Time one-step sampling against diffusers.", rounds=5)
    parser.add_argument("--defaults", action="store_true", help="diffusers in fp32, its default, whatever --dtype is")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype, batch = pick_dtype(args.dtype, device), args.batch_size
    model = make_model("full", args.seed, "one-step")
    their_unet, their_vae, their_text = peers_of(model, torch.float32 if args.defaults else dtype, device)
    unet, vae, text = (network.to(device, dtype).eval() for network in (model.unet, model.vae, model.text_encoder))
    unet.to(memory_format=torch.channels_last)  # as checkpoint.load does
    if dtype != torch.float32:
        vae.to(memory_format=torch.channels_last)

    tokens = torch.randint(49000, (batch, TOKENS), device=device)
    noise, time = torch.randn(batch, 4, args.latent_size, args.latent_size, device=device), torch.full((batch,), 1000.0)
    context = torch.randn(batch, TOKENS, 768, device=device)
    time, theirs = time.to(device), lambda tensor: tensor.to(their_unet.dtype)

    def their_picture():
        context = their_text(tokens).last_hidden_state
        latents = theirs(noise) + their_unet(theirs(noise), time, context).sample
        return their_vae.decode(latents / model.vae.config.scaling_factor).sample

    parts = {
        "text": (lambda: text(tokens), lambda: their_text(tokens)),
        "U-Net": (lambda: unet(noise, time, context), lambda: their_unet(theirs(noise), time, theirs(context))),
        "decoder": (lambda: vae.decode(noise), lambda: their_vae.decode(theirs(noise) / model.vae.config.scaling_factor)),
        "picture": (lambda: vae.decode(one_step(flow_velocity(unet), noise, text(tokens))), their_picture),
    }
    peak, rows = limit(dtype, device), []
    for name, (ours, peer) in parts.items():
        seconds = take_turns({f"{name}, ours": ours, f"{name}, diffusers": peer}, args.rounds, device)
        mine, others = seconds.values()
        with FlopCounterMode(display=False) as counter:
            ours()
        rate = counter.get_total_flops() / statistics.median(mine)
        row = {"part": name, "ours, s": statistics.median(mine), "diffusers, s": statistics.median(others)}
        rows.append(row | ratio(mine, others) | {"TFLOP": counter.get_total_flops() / 1e12, "of the limit": rate / peak})
    about = {"diffusers_dtype": str(their_unet.dtype).removeprefix("torch."), "batch": batch, "limit_tflops": peak / 1e12}
    report("sampling", device, dtype, rows, **about)


if __name__ == "__main__":
    run(main)
