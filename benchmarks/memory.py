"""How much GPU memory training takes at Stable Diffusion's size, derived by counting tensors.

Needs no GPU and little memory.

    python benchmarks/memory.py
    python benchmarks/memory.py --ema-device cpu

The networks are built without their numbers (torch's FakeTensorMode): every tensor has its shape
and dtype and no data. One forward pass under --dtype then shows what is kept for the backward pass,
each storage counted once. With gradient checkpointing that is the inputs of the blocks and, while
one block is computed again, what the largest of them keeps. In bf16 autocast's copies of the
weights are part of it: 2 bytes a parameter at any batch, without checkpointing. Added are 4 bytes a
parameter for weights, gradients and EMA each, 8 for the moments, and the frozen networks.

The sum is what has to fit while gradients and activations are both there, so it is a little more
than the true peak; benchmarks/training_step.py measures that. Writes
benchmarks/results/memory-<dtype>.json.
"""

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command import DTYPES, HERE, Parser, run, write_json
from distill import perceptual
from evaluation.plots import markdown_table
from make_checkpoint import make_model
from rectified_flow import distill_loss, flow_velocity, reflow_loss
from timing import TOKENS
from training_step import untrained_vgg
from unet import StackedUNet, stack

BATCHES = (1, 4, 16, 64)
SIDE = 64  # of the latent, at 512 px


class Kept:
    """What autograd keeps while a loss is computed, and which block it is kept for."""

    def __init__(self, blocks: list, frozen: set):
        self.frozen = frozen  # weights are counted apart
        self.everything, self.inputs, self.outside, self.inside = {}, {}, {}, {}
        self.block, self.alive = None, []
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(
                lambda module, inputs, number=number: self.enter(number, inputs)
            )
            block.register_forward_hook(lambda module, inputs, output: self.leave())

    def enter(self, number: int, inputs: tuple) -> None:
        self.block = number
        if not torch.is_grad_enabled():  # a frozen target: nothing of it is kept
            return
        for value in inputs:
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor):
                    self.count(tensor, self.inputs)

    def leave(self) -> None:
        self.block = None

    def count(self, tensor: torch.Tensor, where: dict) -> None:
        storage = tensor.untyped_storage()
        self.alive.append(tensor)  # so that no later storage gets its address
        if storage._cdata not in self.frozen:
            where[storage._cdata] = storage.nbytes()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.count(tensor, self.everything)
        self.count(
            tensor,
            self.outside if self.block is None else self.inside.setdefault(self.block, {}),
        )
        return tensor

    def plain(self) -> int:
        return sum(self.everything.values())

    def checkpointed(self) -> int:
        between = self.outside | self.inputs
        again = ({key: size for key, size in each.items() if key not in between}
                 for each in self.inside.values())
        return sum(between.values()) + max(sum(each.values()) for each in again)


def kept_by(stage: str, stacked: bool, dtype: torch.dtype, batch: int) -> tuple[Kept, int, int]:
    """What a batch keeps for the backward pass, trained parameters, bytes of frozen networks."""
    with FakeTensorMode():
        model = make_model("full")
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
    parser.add_argument("--ema-device", choices=["cpu"], help="as in training.py")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16",
                        help="as in training.py; bf16 is autocast")
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
