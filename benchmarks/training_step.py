"""What training costs: pairs and gradients against diffusers, samples a second of every stage, peak memory of every update.

    python benchmarks/training_step.py --stages pairs gradients --teacher-steps 2     against diffusers; minutes on a CPU
    python benchmarks/training_step.py --device cuda --batch-size 16                  all stages, for benchmarks/cost.py --rates

Stable Diffusion's size at 512 px, random weights and random data. "pairs" draws latents with guidance by DPM-Solver, beside
diffusers' pipeline and its DPM-Solver; "gradients" is the forward and backward pass of reflow, beside the same with diffusers'
U-Net. The other stages are whole updates as training.py makes them: text encoder, loss, backward, clip, AdamW and EMA.
Writes benchmarks/results/training_step-<dtype>-<device>.json.
"""

import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import unet_to_diffusers
from command import pick_device, pick_dtype, run, solver_steps
from make_checkpoint import make_model
from pairs import GUIDANCE
from rectified_flow import distill_loss, flow_velocity, one_step, reflow_loss, sample_path
from timing import TOKENS, forget_peak, peak_memory, report, side_by_side, take_turns, timing_parser
from training import TrainingOptions, adamw, named_parameters

STAGES = ("pairs", "gradients", "reflow", "l2", "lpips")


def diffusers_unet(unet, device: torch.device, dtype: torch.dtype):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(unet_to_diffusers(unet.config))
    theirs.load_state_dict({name: tensor.clone() for name, tensor in unet.state_dict().items()}, assign=True)
    return theirs.to(device, dtype).eval()


def diffusers_pairs(unet, steps: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """diffusers' pipeline from noise and encoded prompts to latents."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing", steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.vae_scale_factor = 8
    pipeline.set_progress_bar_config(disable=True)
    return lambda noise, context, null: pipeline(
        prompt_embeds=context, negative_prompt_embeds=null, latents=noise, num_inference_steps=steps, output_type="latent",
        guidance_scale=GUIDANCE["diffusion"].full,
    ).images  # fmt: skip


def untrained_vgg() -> torch.nn.Module:
    """lpips on VGG, as in the paper; its trained weights, which take no more time, would have to be downloaded."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision renamed an argument that lpips still uses
        return lpips.LPIPS(net="vgg", pnet_rand=True, lpips=False, verbose=False).requires_grad_(False).eval()


def main():
    parser = timing_parser("Time the stages of training.", rounds=3)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--teacher-steps", type=solver_steps, default=25)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype, batch, rows = pick_dtype(args.dtype, device), args.batch_size, []
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)

    shape = (batch, 4, args.latent_size, args.latent_size)
    x0, x1, t = torch.randn(shape, device=device), torch.randn(shape, device=device), torch.rand(batch, device=device)
    tokens = torch.randint(49000, (batch, TOKENS), device=device)
    context, null = torch.randn(batch, TOKENS, 768, device=device), torch.randn(1, TOKENS, 768, device=device)

    def measure(stage: str, mine: Callable, peer: Callable | None = None) -> None:
        if peer:
            row = side_by_side(stage, mine, "diffusers", peer, args.rounds, device)
        else:
            seconds, _ = take_turns({stage: mine}, args.rounds, device)
            row = {"ours, s": statistics.median(seconds[stage])}
            row |= dict.fromkeys(("diffusers, s", "ratio", "quartiles", "differ by"))
        row = {"stage": stage, "samples_per_second": batch / row["ours, s"]} | row
        row["peak GB"] = None if peer else peak_memory(device)  # where there is a peer, it would count too
        rows.append(row)

    if "pairs" in args.stages:
        forget_peak(device)
        unet = make_model("full", args.seed).unet
        peer = diffusers_pairs(diffusers_unet(unet, device, dtype), args.teacher_steps)
        unet = unet.to(device, dtype, memory_format=torch.channels_last).eval()
        half_context, half_null = context.to(dtype), null.to(dtype).expand(batch, -1, -1)

        @torch.inference_mode()
        def draw() -> Tensor:
            guidance = GUIDANCE["diffusion"].full
            *_, latents = sample_path(unet, "diffusion", x0, args.teacher_steps, half_context, half_null, guidance)
            return latents

        measure("pairs", draw, lambda: peer(x0.to(dtype), half_context, half_null))
        del unet, peer, draw

    if "gradients" in args.stages:
        forget_peak(device)
        unet = make_model("full", args.seed).unet
        theirs = diffusers_unet(unet, device, torch.float32)
        unet = unet.to(device, memory_format=torch.channels_last).train()
        their_velocity = lambda x, t, context: theirs(x, 1000 * (1 - t), context).sample

        def gradients(network, velocity) -> Tensor:
            with autocast:
                loss = reflow_loss(velocity, x0, x1, t, context).mean()
            loss.backward()
            first = network.conv_in.weight.grad
            network.zero_grad(set_to_none=True)  # so that the two sides' gradients are never held at once
            return first

        measure("gradients", lambda: gradients(unet, flow_velocity(unet)), lambda: gradients(theirs, their_velocity))
        del unet, theirs, their_velocity

    updates = [stage for stage in args.stages if stage in ("reflow", "l2", "lpips")]
    if updates:
        model = make_model("full", args.seed)
        unet = model.unet.to(device, memory_format=torch.channels_last).train()
        unet.gradient_checkpointing = model.vae.decoder.gradient_checkpointing = args.gradient_checkpointing
        text = model.text_encoder.to(device).requires_grad_(False)
        decode = model.vae.to(device).requires_grad_(False).decode
        velocity, weights = flow_velocity(unet), named_parameters(unet)
        optimizer = adamw(weights, TrainingOptions(1, learning_rate=1e-6))
        ema = [weight.detach().clone() for weight in weights.values()]
        distance = untrained_vgg().to(device) if "lpips" in updates else None

        def perceptual() -> Tensor:
            latents = one_step(velocity, x0, text(tokens))
            with torch.autocast(device.type, enabled=False):
                with torch.no_grad():
                    target = decode(x1)
                return distance(decode(latents.float()), target)

        losses = {
            "reflow": lambda: reflow_loss(velocity, x0, x1, t, text(tokens)),
            "l2": lambda: distill_loss(velocity, x0, x1, text(tokens)),
            "lpips": perceptual,
        }

        def update(loss: Callable[[], Tensor]) -> None:
            optimizer.zero_grad(set_to_none=True)
            with autocast:
                per_sample = loss()
            per_sample.mean().backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            torch._foreach_lerp_(ema, [weight.detach() for weight in weights.values()], 1e-4)

        for stage in updates:
            forget_peak(device)
            measure(stage, lambda: update(losses[stage]))
    about = {"batch": batch, "teacher_steps": args.teacher_steps, "gradient_checkpointing": args.gradient_checkpointing}
    report("training_step", device, dtype, rows, **about)


if __name__ == "__main__":
    run(main)
