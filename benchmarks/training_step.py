"""What training costs: samples a second of each stage, and peak memory of training iterations.

    python benchmarks/training_step.py --stages pairs gradients --teacher-steps 2
        against diffusers; minutes on a CPU
    python benchmarks/training_step.py --device cuda --batch-size 16
        all stages, for benchmarks/cost.py --rates

Stable Diffusion's size at 512 px, random weights and random data. The stages are

    pairs              latents by DPM-Solver++ with guidance, against diffusers' pipeline
    gradients          forward and backward pass of reflow, against diffusers' U-Net
    reflow, l2, lpips  whole iterations of training.py: text encoder, loss, backward, clip, AdamW,
                       EMA
    rest               such an iteration without forward and backward pass: its loss is a sum of one
                       number of each weight

Writes benchmarks/results/training_step-<dtype>-<device>.json.
"""

import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training
from benchmarks.timing import (
    TOKENS, full_size_model, peak_memory, report, reset_peak_memory, side_by_side, timing_parser,
)
from command import BadInput, pick_device, pick_dtype, run, solver_steps
from diffusion import NoiseSchedule, dpm_solver
from distill import perceptual
from formats.diffusers_folder import unet_to_diffusers
from rectified_flow import distill_loss, flow_velocity, guided, reflow_loss, squared
from stable_diffusion import FAMILIES

GUIDANCE = FAMILIES["sd"].guidance["diffusion"]
STAGES = ("pairs", "gradients", "reflow", "l2", "lpips", "rest")


def diffusers_unet(unet, device: torch.device, dtype: torch.dtype):
    """diffusers' U-Net with a copy of the weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(unet_to_diffusers(unet.config))
    theirs.load_state_dict(
        {name: tensor.clone() for name, tensor in unet.state_dict().items()}, assign=True
    )
    return theirs.to(device, dtype).eval()


def diffusers_pairs(unet, steps: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """diffusers' pipeline: noise, context and null context to latents."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        timestep_spacing="trailing", steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipeline.vae_scale_factor = 8
    pipeline.set_progress_bar_config(disable=True)
    return lambda noise, context, null: pipeline(
        prompt_embeds=context, negative_prompt_embeds=null, latents=noise,
        num_inference_steps=steps, output_type="latent", guidance_scale=GUIDANCE,
    ).images


def untrained_vgg() -> torch.nn.Module:
    """LPIPS on VGG as in the paper, with random weights: the trained ones need a download."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision renamed an argument that lpips still uses
        return lpips.LPIPS(
            net="vgg", pnet_rand=True, lpips=False, verbose=False
        ).requires_grad_(False).eval()


def main():
    parser = timing_parser("Time the stages of training.", rounds=3)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--teacher-steps", type=solver_steps, default=25)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--contiguous", action="store_true",
                        help="train without channels last, the default memory format")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype, batch, rows = pick_dtype(args.dtype, device), args.batch_size, []
    if dtype == torch.float16 and set(args.stages) != {"pairs"}:
        raise BadInput("--dtype fp16: is for sampling only; take --stages pairs, or bf16 or fp32")
    autocast = torch.autocast(
        device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False
    )

    shape = (batch, 4, args.latent_size, args.latent_size)
    x0, x1 = torch.randn(shape, device=device), torch.randn(shape, device=device)
    t = torch.rand(batch, device=device)
    tokens = torch.randint(49000, (batch, TOKENS), device=device)
    context = torch.randn(batch, TOKENS, 768, device=device)
    null = torch.randn(1, TOKENS, 768, device=device)

    def compare(stage: str, ours: Callable, theirs: Callable) -> None:
        row = side_by_side(stage, ours, "diffusers", theirs, args.rounds, device)
        rows.append(
            {"stage": stage, "samples_per_second": batch / row["ours, s"]} | row
            | {"peak GB": None}
        )

    if "pairs" in args.stages:
        reset_peak_memory(device)
        unet = full_size_model(args.seed).unet
        peer = diffusers_pairs(diffusers_unet(unet, device, dtype), args.teacher_steps)
        unet = unet.to(device, dtype, memory_format=torch.channels_last).eval()
        half_context, half_null = context.to(dtype), null.to(dtype).expand(batch, -1, -1)

        @torch.inference_mode()
        def sample() -> Tensor:
            predict_noise = guided(unet, half_null, GUIDANCE)
            *_, latents = dpm_solver(
                predict_noise, x0, args.teacher_steps, NoiseSchedule(), half_context
            )
            return latents

        compare("pairs", sample, lambda: peer(x0.to(dtype), half_context, half_null))
        del unet, peer, sample

    if "gradients" in args.stages:
        reset_peak_memory(device)
        unet = full_size_model(args.seed).unet
        theirs = diffusers_unet(unet, device, torch.float32)
        unet = unet.to(device, memory_format=torch.channels_last).train()
        their_velocity = lambda x, t, context: theirs(x, 1000 * (1 - t), context).sample

        def gradients(network, velocity) -> Tensor:
            with autocast:
                loss = reflow_loss(velocity, x0, x1, t, context).mean()
            loss.backward()
            first = network.conv_in.weight.grad
            network.zero_grad(set_to_none=True)  # or the two sides' gradients exist at once
            return first

        compare("gradients", lambda: gradients(unet, flow_velocity(unet)),
                lambda: gradients(theirs, their_velocity))
        del unet, theirs, their_velocity

    trained = [stage for stage in args.stages if stage not in ("pairs", "gradients")]
    if trained:
        model = full_size_model(args.seed)
        memory_format = torch.contiguous_format if args.contiguous else torch.channels_last
        unet = model.unet.to(device, memory_format=memory_format)
        unet.gradient_checkpointing = args.gradient_checkpointing
        model.vae.decoder.gradient_checkpointing = args.gradient_checkpointing
        text = model.text_encoder.to(device).requires_grad_(False)
        model.vae.to(device)
        distances = {"l2": squared}
        if "lpips" in trained:
            distances["lpips"] = perceptual(model.vae, untrained_vgg().to(device))

        def loss(stage: str, unet, x0, x1, t, tokens) -> tuple[Tensor, None]:
            if stage == "rest":
                return sum(weight.flatten()[0] for weight in unet.parameters()).reshape(1), None
            velocity, context = flow_velocity(unet), text(tokens)
            if stage == "reflow":
                return reflow_loss(velocity, x0, x1, t, context), None
            return distill_loss(velocity, x0, x1, context, distances[stage]).reshape(-1), None

        training.save_state = lambda *state: None  # the timed iterations save nothing
        for stage in trained:
            reset_peak_memory(device)
            options = training.TrainingOptions(args.rounds + 1, batch, learning_rate=1e-6,
                                               dtype=dtype, log_every=1, name=stage)
            with tempfile.TemporaryDirectory() as folder:
                training.train(unet, training.ema_copy(unet), lambda *step: (x0, x1, t, tokens),
                               partial(loss, stage), options, folder, {})
                metrics = training.read_metrics(folder)[1:]  # the first warms up
            seconds = statistics.median(row["seconds_per_step"] for row in metrics)
            row = {"stage": stage, "samples_per_second": batch / seconds, "ours, s": seconds}
            row |= dict.fromkeys(("diffusers, s", "ratio", "quartiles", "differ by"))
            rows.append(row | {"peak GB": peak_memory(device)})
    about = {"batch": batch, "teacher_steps": args.teacher_steps,
             "gradient_checkpointing": args.gradient_checkpointing,
             "channels_last": not args.contiguous}
    report("training_step" + "-contiguous" * args.contiguous, device, dtype, rows, **about)


if __name__ == "__main__":
    run(main)
