"""How much GPU memory training takes at Stable Diffusion's size, derived by counting tensors.

Needs no GPU and little memory.

    python benchmarks/memory.py
    python benchmarks/memory.py --ema-device cpu

The networks are built in torch's FakeTensorMode: every tensor has a shape and a dtype, but no data.
One forward pass under --dtype shows what autograd saves for the backward pass; each storage counts
once. Gradient checkpointing saves the inputs of the blocks, and what the largest block saves while
it is recomputed. In bf16 without checkpointing, autocast's copies of the weights add 2 bytes a
parameter at any batch size. Weights, gradients and EMA take 4 bytes a parameter each, the moments
8; the frozen networks are added.

The sum assumes that all gradients and all activations exist at once. It is therefore slightly above
the true peak, which benchmarks/training_step.py measures. Writes
benchmarks/results/memory-<dtype>.json.
"""

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import TOKENS, full_size_model
from benchmarks.training_step import untrained_vgg
from command import DTYPES, HERE, Parser, run, write_json
from distill import perceptual
from evaluation.plots import markdown_table
from rectified_flow import distill_loss, flow_velocity, reflow_loss
from stacked_unet import StackedUNet, stack

BATCHES = (1, 4, 16, 64)
SIDE = 64  # of the latent, at 512 px


class Kept:
    """The storages that autograd saves while a loss is computed, and the block of each."""

    def __init__(self, blocks: list, frozen: set):
        self.frozen = frozen  # weights, which are counted separately
        self.everything, self.inputs, self.outside, self.inside = {}, {}, {}, {}
        self.block, self.alive = None, []
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(
                lambda module, inputs, number=number: self.enter(number, inputs)
            )
            block.register_forward_hook(lambda module, inputs, output: self.leave())

    def enter(self, number: int, inputs: tuple) -> None:
        self.block = number
        if not torch.is_grad_enabled():  # a frozen target saves nothing
            return
        for value in inputs:
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor):
                    self.count(tensor, self.inputs)

    def leave(self) -> None:
        self.block = None

    def count(self, tensor: torch.Tensor, where: dict) -> None:
        storage = tensor.untyped_storage()
        self.alive.append(tensor)  # or a later storage could get its address
        if storage._cdata not in self.frozen:
            where[storage._cdata] = storage.nbytes()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.count(tensor, self.everything)
        inside = self.block is not None
        self.count(tensor, self.inside.setdefault(self.block, {}) if inside else self.outside)
        return tensor

    def plain(self) -> int:
        """Bytes without gradient checkpointing."""
        return sum(self.everything.values())

    def checkpointed(self) -> int:
        """Bytes with gradient checkpointing, while the largest block is recomputed."""
        between = self.outside | self.inputs
        recomputed = ({key: size for key, size in each.items() if key not in between}
                      for each in self.inside.values())
        return sum(between.values()) + max(sum(each.values()) for each in recomputed)


def kept_by(stage: str, stacked: bool, dtype: torch.dtype, batch: int) -> tuple[Kept, int, int]:
    """(what a batch saves for the backward pass, trained parameters, bytes of frozen networks)."""
    with FakeTensorMode():
        model = full_size_model()
        unet = stack(model.unet) if stacked else model.unet
        halves = [unet.first, unet.second] if isinstance(unet, StackedUNet) else [unet]
        model.vae.requires_grad_(False)
        blocks = [block for half in halves
                  for block in (*half.down_blocks, half.mid_block, *half.up_blocks)]
        frozen_networks = [model.text_encoder.requires_grad_(False)]
        if stage == "LPIPS":
            distance = untrained_vgg()
            frozen_networks += [model.vae, distance]
            blocks += [*model.vae.decoder.up_blocks]
        weights = [weight for network in (unet, *frozen_networks)
                   for weight in network.parameters()]
        kept = Kept(blocks, {weight.untyped_storage()._cdata for weight in weights})
        x0, x1, t = (
            torch.randn(batch, 4, SIDE, SIDE), torch.randn(batch, 4, SIDE, SIDE), torch.rand(batch)
        )
        context, velocity = torch.randn(batch, TOKENS, 768), flow_velocity(unet)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
                if stage == "L2":
                    loss = reflow_loss(velocity, x0, x1, t, context)
                else:
                    loss = distill_loss(
                        velocity, x0, x1, context, perceptual(model.vae, distance)
                    ).mean()
        assert loss.requires_grad
        trained = sum(weight.numel() for weight in unet.parameters())
        return kept, trained, 4 * sum(
            weight.numel() for network in frozen_networks for weight in network.parameters()
        )


def main():
    parser = Parser("Derive the memory of training at full size.")
    parser.add_argument("--ema-device", choices=["cpu"], help="as of reflow.py")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16",
                        help="as of reflow.py; bf16 is autocast")
    args = parser.parse_args()
    rows = []
    for student in ("unet", "stacked"):
        for stage in ("L2", "LPIPS"):
            kept = {}
            for batch in BATCHES:
                kept[batch], trained, frozen = kept_by(
                    stage, student == "stacked", DTYPES[args.dtype], batch
                )
            fixed = (16 + 4 * (args.ema_device is None)) * trained + frozen
            for checkpointing in (False, True):
                name = "reflow and distillation, L2" if stage == "L2" else "distillation, LPIPS"
                row = {"student": student, "stage": name,
                       "checkpointing": "yes" if checkpointing else "no"}
                row["fixed, GB"] = fixed / 1e9
                for batch, each in kept.items():
                    row[f"batch {batch}, GB"] = (
                        fixed + (each.checkpointed() if checkpointing else each.plain())
                    ) / 1e9
                rows.append(row)
    about = {"command": " ".join(["python", *sys.argv]), "torch": torch.__version__, "rows": rows}
    write_json(HERE / "benchmarks" / "results" / f"memory-{args.dtype}.json", about)
    print(markdown_table(rows), end="")


if __name__ == "__main__":
    run(main)
