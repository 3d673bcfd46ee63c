"""From a Stable Diffusion 1.x file to its first one-step image, against diffusers.

Seconds and peak memory, in new processes:

    python benchmarks/loading.py            writes a full-size fp16 file first; 15 GB of memory
    python benchmarks/loading.py --dtype bf16 --load-only

diffusers needs configuration files, which it would download from the hub; they are written here
from our own configs. Both sides load to --dtype on the CPU: diffusers the U-Net and the
autoencoder, ours the text encoder too. Unless --load-only is given, each side then runs one Euler
step at 512 px from an encoded prompt, and the decoder. Imports are not counted. Memory is read from
/proc, on Linux only. Writes benchmarks/results/loading-<dtype>-cpu.json.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import ratio, report
from command import DTYPES, HERE, BadInput, Parser, pick_dtype, positive, run
from formats.diffusers_folder import unet_to_diffusers, vae_to_diffusers
from unet import UNetConfig
from vae import VAEConfig

MEASURE = """
import json, pathlib, sys, time
sys.path.insert(0, {root!r})
import torch
{imports}
# GB of this process alone; resource.getrusage would start from the peak of its parent.
def peak():
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9
def spent():
    return [time.perf_counter() - started, peak() - before]
started, before = time.perf_counter(), peak()
{load}
figures = spent()
if {with_image}:
    noise = torch.randn(1, 4, 64, 64, dtype={dtype})
    context = torch.randn(1, 77, 768, dtype={dtype})
    with torch.inference_mode():
        {sample}
    figures += spent()
print(json.dumps(figures))
"""
OURS = (
    "import checkpoint\nfrom rectified_flow import flow_velocity, one_step",
    "model = checkpoint.load({path!r}, dtype={dtype})",
    "model.vae.decode(one_step(flow_velocity(model.unet), noise, context))",
)
THEIRS = (
    "from diffusers import AutoencoderKL, UNet2DConditionModel",
    "unet = UNet2DConditionModel.from_single_file({path!r}, config={config!r}, subfolder='unet', "
    "torch_dtype={dtype})\n"
    "vae = AutoencoderKL.from_single_file({path!r}, config={config!r}, subfolder='vae', "
    "torch_dtype={dtype})",
    "vae.decode((noise + unet(noise, 1000, context).sample) / vae.config.scaling_factor)",
)
FIGURES = ("loading, s", "loading, GB at the peak", "and the first image, s",
           "and the first image, GB at the peak")


def measure(
    side: tuple[str, str, str], path: str, config: str, dtype: torch.dtype, with_image: bool
) -> list[float]:
    """The FIGURES of one new process, without an image the first two.

    Memory is counted beyond that of the imports.
    """
    imports, load, sample = side
    load = load.format(path=path, config=config, dtype=dtype)
    code = MEASURE.format(root=str(HERE), imports=imports, load=load, sample=sample, dtype=dtype,
                          with_image=with_image)
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return json.loads(out.splitlines()[-1])


def main():
    parser = Parser("Time loading a single file against diffusers.")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the loaded weights")
    parser.add_argument("--load-only", action="store_true", help="generate no image")
    args = parser.parse_args()
    if not Path("/proc/self/status").exists():
        raise BadInput(
            "loading.py: reads memory from /proc, which this system lacks; run it on Linux"
        )
    device = torch.device("cpu")
    dtype = pick_dtype(args.dtype, device)
    with tempfile.TemporaryDirectory() as folder:
        path, config = str(Path(folder) / "sd14.safetensors"), str(Path(folder) / "config")
        write_file = [sys.executable, str(HERE / "tests" / "make_checkpoint.py"), path]
        subprocess.run(write_file, check=True)  # full size, fp16, random weights
        for name, settings in (
            ("unet", unet_to_diffusers(UNetConfig())), ("vae", vae_to_diffusers(VAEConfig())),
        ):
            (Path(config) / name).mkdir(parents=True)
            (Path(config) / name / "config.json").write_text(json.dumps(settings))
        sides = {"ours": [], "diffusers": []}
        for number in range(args.rounds + 1):  # the first fills the disk cache
            for name, side in (("ours", OURS), ("diffusers", THEIRS)):
                result = measure(side, path, config, dtype, not args.load_only)
                if number:
                    sides[name].append(result)
    rows = []
    # Two of the FIGURES with --load-only, else four.
    for what, ours, theirs in zip(FIGURES, zip(*sides["ours"]), zip(*sides["diffusers"])):
        row = {"what": what, "ours": statistics.median(ours),
               "diffusers": statistics.median(theirs)}
        rows.append(row | ratio(ours, theirs))
    report("loading", device, dtype, rows)


if __name__ == "__main__":
    run(main)
