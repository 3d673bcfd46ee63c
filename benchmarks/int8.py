"""Do a one-step model's images survive int8? Measured on the tiny models, whose quality shows.

    python benchmarks/int8.py    3 seeds, minutes on a CPU; pip install openvino nncf; emoji needs
                                 python toy/emoji.py

OpenVINO runs the U-Net, or the U-Net and the decoder, with weights and activations in int8; NNCF
chooses the ranges on training captions and noises of their own. The same held-out captions and
noises are sampled in fp32 too; psnr compares the two images, in dB. Writes
results/int8-fp32-cpu.json (means with 95 % intervals over seeds; "- fp32" is the paired difference)
and results/int8-<captions>.png.
"""

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from benchmarks.sampling import TensorFunction, in_openvino
from benchmarks.timing import report
from command import HERE, BadInput, Parser, positive, run
from editing import psnr
from evaluate import NUM_SHOWN
from evaluation.figures import GRADES, paired_differences, with_intervals
from evaluation.judge import EvaluationSet, judged_set
from evaluation.plots import save_comparison
from evaluation.study import ONE_STEP, captions_of, dataset_of
from rectified_flow import flow_velocity, one_step
from sample import batch_slices, noise_from_seeds, seed_range
from stable_diffusion import TOY, StableDiffusion

BATCH = 100  # images at a time; two such batches choose int8's ranges
FIGURES = (*GRADES, "psnr")


def batches(model: StableDiffusion, prompts: list[str], seeds: range) -> Iterator[tuple]:
    """(noise, contexts) of BATCH images at a time."""
    for part in batch_slices(len(prompts), BATCH):
        yield (noise_from_seeds(seeds[part], model.latent_shape()),
               model.encode_prompts(prompts[part]))


def in_int8(model: StableDiffusion, captions: str) -> tuple[Callable, Callable]:
    """(U-Net, decoder) of the model in int8."""
    seeds = seed_range("validation", 0, 2 * BATCH)
    chosen = captions_of(captions, len(seeds), seeds[0], measuring=False)
    given = [(noise, torch.full((BATCH,), 1000.0), contexts)
             for noise, contexts in batches(model, [str(each) for each in chosen], seeds)]
    velocity = flow_velocity(model.unet)
    latents = [(one_step(velocity, noise, contexts),) for noise, _, contexts in given]
    unet = TensorFunction(model.unet, lambda network, *inputs: network(*inputs))
    decoder = TensorFunction(model.vae, lambda network, latent: network.decode(latent))
    return tuple(in_openvino(network.eval(), inputs[0], torch.float32, inputs)
                 for network, inputs in ((unet, given), (decoder, latents)))


def images_of(model, unet: Callable, decode: Callable, asked: EvaluationSet) -> Tensor:
    """One-step images (N, 3, H, W) in [-1, 1]."""
    velocity = flow_velocity(unet)
    return torch.cat([decode(one_step(velocity, noise, contexts)).clamp(-1, 1)
                      for noise, contexts in batches(model, asked.prompts, asked.seeds)])


@torch.inference_mode()
def main():
    parser = Parser("Quality of one-step images in int8 against fp32, on tiny models.")
    parser.add_argument("--num-seeds", type=positive, default=3, help="evaluations, from seed 0 on")
    parser.add_argument("--num-samples", type=positive, default=1000, help="images for each")
    args = parser.parse_args()
    if not (find_spec("openvino") and find_spec("nncf")):
        raise BadInput("int8: needs pip install openvino nncf")
    if args.num_samples % BATCH:
        raise BadInput(f"--num-samples {args.num_samples}: not a multiple of {BATCH}")
    table = []
    for data, captions in (("shapes", "mixed"), ("emoji", "emoji")):
        model = checkpoint.load(TOY / ONE_STEP[data])
        unet, decode = in_int8(model, captions)
        sides = {"fp32": (model.unet, model.vae.decode), "U-Net": (unet, model.vae.decode),
                 "U-Net, decoder": (unet, decode)}
        rows = {name: [] for name in sides}
        for seed in range(args.num_seeds):
            seeds = seed_range("evaluation", seed, args.num_samples)
            measured = captions_of(captions, args.num_samples, seeds[0], measuring=True)
            asked = judged_set(dataset_of(captions)[0], measured, seeds, seed)
            images = {name: images_of(model, *side, asked) for name, side in sides.items()}
            for name, made in images.items():
                close = None if name == "fp32" else psnr(made, images["fp32"]).mean().item()
                rows[name].append({"seed": seed, "psnr": close} | asked.grade(made))
            if seed == 0:
                sheet = [(name if name == "fp32" else f"{name}\nin int8", made)
                         for name, made in images.items()]
                save_comparison(HERE / "benchmarks" / "results" / f"int8-{data}.png", sheet,
                                asked.prompts[:NUM_SHOWN])
        for name, group in rows.items():
            table.append({"captions": data, "in int8": "nothing" if name == "fp32" else name}
                         | with_intervals(group, FIGURES))
            if name != "fp32":
                table.append({"captions": data, "in int8": f"{name} - fp32"}
                             | with_intervals(paired_differences(group, rows["fp32"], FIGURES),
                                              FIGURES))
    report("int8", torch.device("cpu"), torch.float32, table, seeds=args.num_seeds,
           num_samples=args.num_samples)


if __name__ == "__main__":
    run(main)
