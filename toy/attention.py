"""Where the tiny model reads which word: its cross-attention maps, as runs/attention.png.

    python toy/attention.py          seconds

In cross-attention every place of the latent compares its query with the key of every token. The
softmax of these products says how much the place reads each token:

    weights = softmax(q kᵀ / √d)                   (B, heads, places, tokens), unet.Attention

The figure shows the weights of two nouns beside the teacher's image: means over the layers, the
heads, four timesteps and eight noises. The tiny model's attention sees 4 x 4 places.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
from command import TINY_TEACHER, Parser, check_output, run, write_atomically
from diffusion import NoiseSchedule
from formats.images import check_image_ending, to_bytes
from sample import noise_from_seeds, sample_latents

SHOWN = {  # captions, and two of their words
    "a red circle above a blue square": ("circle", "square"),
    "a green triangle left of a yellow circle": ("triangle", "circle"),
}
TIMESTEPS, NOISES = (200.0, 400.0, 600.0, 800.0), 8


def attention_weights(attention, x: Tensor, context: Tensor) -> Tensor:
    """Mean over the heads of softmax(q kᵀ / √d): (B, places, tokens)."""
    q, k = (y.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for y in (attention.to_q(x), attention.to_k(context)))  # (B, heads, ..., d)
    return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1).mean(1)


@torch.no_grad()
def attention_map(model, latent: Tensor, caption: str) -> Tensor:
    """How much each of 4 x 4 places reads each token, (4, 4, tokens), for one latent."""
    weights = []
    hook = lambda attention, inputs: weights.append(attention_weights(attention, *inputs).mean(0))
    layers = [layer for name, layer in model.unet.named_modules() if name.endswith("attn2")]
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    noise = noise_from_seeds(range(NOISES), model.latent_shape())
    context = model.encode_prompts([caption] * NOISES)
    for s in torch.tensor(TIMESTEPS):
        alpha, sigma = NoiseSchedule().alpha_sigma(s)
        model.unet(alpha * latent + sigma * noise, s.expand(NOISES), context)
    for handle in handles:
        handle.remove()
    return torch.stack(weights).mean(0).unflatten(0, (4, 4))


def main():
    parser = Parser("Cross-attention maps of the tiny model.")
    parser.add_argument("--out", default="runs/attention.png")
    args = parser.parse_args()
    check_image_ending(args.out.rstrip("/"))
    check_output(args.out)
    model = checkpoint.load(TINY_TEACHER, "cpu")
    figure = Figure(figsize=(10, 2.1), layout="constrained")
    axes = iter(figure.subplots(1, 3 * len(SHOWN)))
    for seed, (caption, words) in enumerate(SHOWN.items(), 3):
        latent = sample_latents(model, [caption], [seed])
        weights, axis = attention_map(model, latent, caption), next(axes)
        axis.imshow(to_bytes(model.vae.decode(latent))[0])
        axis.set_title(caption.replace(" above", "\nabove").replace(" left", "\nleft"), fontsize=8)
        for word in words:
            token = 1 + caption.split().index(word)  # after the start token
            axis = next(axes)
            axis.imshow(weights[:, :, token], cmap="viridis")
            axis.set_title(f"“{word}”", fontsize=10)
    for axis in figure.axes:
        axis.set_axis_off()
    write_atomically(args.out, lambda file: figure.savefig(file, dpi=120))
    print(args.out)


if __name__ == "__main__":
    run(main)
