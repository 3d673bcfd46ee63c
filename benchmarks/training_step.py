"""What training costs: pairs and gradients against diffusers, and every stage by itself.

Samples a second of every stage, and peak memory of every update:

    python benchmarks/training_step.py --stages pairs gradients --teacher-steps 2
        against diffusers; minutes on a CPU
    python benchmarks/training_step.py --device cuda --batch-size 16
        all stages, for benchmarks/cost.py --rates

Stable Diffusion's size at 512 px, random weights and random data. "pairs" draws latents with
guidance by DPM-Solver, beside diffusers' pipeline and its DPM-Solver; "gradients" is the forward
and backward pass of reflow, beside the same with diffusers' U-Net. The other stages are whole
updates as training.py makes them: text encoder, loss, backward, clip, AdamW and EMA; "rest" is
such an update with a loss that touches every weight once, all but forward and backward. Writes
benchmarks/results/training_step-<dtype>-<device>.json.
"""

import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training
from command import pick_device, pick_dtype, run, solver_steps
from diffusers_folder import unet_to_diffusers
from diffusion import NoiseSchedule, dpm_solver
from distill import perceptual
from make_checkpoint import make_model
from rectified_flow import distill_loss, flow_velocity, guided, reflow_loss
from stable_diffusion import FAMILIES
from timing import TOKENS, forget_peak, peak_memory, report, side_by_side, timing_parser

GUIDANCE = FAMILIES["sd"].guidance["diffusion"]
STAGES = ("pairs", "gradients", "reflow", "l2", "lpips", "rest")


def diffusers_unet(unet, device: torch.device, dtype: torch.dtype):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(unet_to_diffusers(unet.config))
    theirs.load_state_dict(
        {name: tensor.clone() for name, tensor in unet.state_dict().items()}, assign=True
    )
    return theirs.to(device, dtype).eval()


def diffusers_pairs(unet, steps: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """diffusers' pipeline from noise and encoded prompts to latents."""
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
    """lpips on VGG, as in the paper.

    Its trained weights, which take no more time, would have to be downloaded.
    """
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
                        help="updates without channels last, the order in memory that is taken")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype, batch, rows = pick_dtype(args.dtype, device), args.batch_size, []
    autocast = torch.autocast(
        device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False
    )

    shape = (batch, 4, args.latent_size, args.latent_size)
    x0, x1, t = (
        torch.randn(shape, device=device), torch.randn(shape, device=device),
        torch.rand(batch, device=device),
    )
    tokens = torch.randint(49000, (batch, TOKENS), device=device)
    context, null = (
        torch.randn(batch, TOKENS, 768, device=device),
        torch.randn(1, TOKENS, 768, device=device),
    )

    def measure(stage: str, mine: Callable, peer: Callable) -> None:
        row = side_by_side(stage, mine, "diffusers", peer, args.rounds, device)
        rows.append(
            {"stage": stage, "samples_per_second": batch / row["ours, s"]} | row
            | {"peak GB": None}
        )

    if "pairs" in args.stages:
        forget_peak(device)
        unet = make_model("full", args.seed).unet
        peer = diffusers_pairs(diffusers_unet(unet, device, dtype), args.teacher_steps)
        unet = unet.to(device, dtype, memory_format=torch.channels_last).eval()
        half_context, half_null = context.to(dtype), null.to(dtype).expand(batch, -1, -1)

        @torch.inference_mode()
        def draw() -> Tensor:
            predict_noise = guided(unet, half_null, GUIDANCE)
            *_, latents = dpm_solver(
                predict_noise, x0, args.teacher_steps, NoiseSchedule(), half_context
            )
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
            # So that the two sides' gradients are never held at once.
            network.zero_grad(set_to_none=True)
            return first

        measure("gradients", lambda: gradients(unet, flow_velocity(unet)),
                lambda: gradients(theirs, their_velocity))
        del unet, theirs, their_velocity

    updates = [stage for stage in args.stages if stage not in ("pairs", "gradients")]
    if updates:
        model = make_model("full", args.seed)
        order = torch.contiguous_format if args.contiguous else torch.channels_last
        unet = model.unet.to(device, memory_format=order).train()
        unet.gradient_checkpointing = args.gradient_checkpointing
        model.vae.decoder.gradient_checkpointing = args.gradient_checkpointing
        text = model.text_encoder.to(device).requires_grad_(False)
        model.vae.to(device)
        distance = perceptual(model.vae, untrained_vgg().to(device)) if "lpips" in updates else None
        losses = {
            "reflow": lambda unet: reflow_loss(flow_velocity(unet), x0, x1, t, text(tokens)),
            "l2": lambda unet: distill_loss(flow_velocity(unet), x0, x1, text(tokens)),
            "lpips": lambda unet: distill_loss(flow_velocity(unet), x0, x1, text(tokens), distance),
            "rest": lambda unet: sum(weight.flatten()[0] for weight in unet.parameters()),
        }
        training.save_state = lambda run: None  # the loop itself is timed, without its saves
        for stage in updates:
            forget_peak(device)
            options = training.TrainingOptions(
                args.rounds + 1, batch, learning_rate=1e-6, log_every=1
            )
            loss = lambda unet, stage=stage: (losses[stage](unet).reshape(-1), None)
            with tempfile.TemporaryDirectory() as folder:
                training.train(unet, lambda *batch: (), loss, options, folder, {}, stage, dtype)
                spent = [row["seconds_per_step"] for row in training.read_metrics(folder)[1:]]
            row = {"stage": stage, "samples_per_second": batch / statistics.median(spent)}
            row |= {"ours, s": statistics.median(spent)}
            row |= dict.fromkeys(("diffusers, s", "ratio", "quartiles", "differ by"))
            rows.append(row | {"peak GB": peak_memory(device)})
    about = {"batch": batch, "teacher_steps": args.teacher_steps,
             "gradient_checkpointing": args.gradient_checkpointing,
             "channels_last": not args.contiguous}
    report("training_step" + "-contiguous" * args.contiguous, device, dtype, rows, **about)


if __name__ == "__main__":
    run(main)
