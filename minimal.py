# %% [markdown]
# # InstaFlow on one page
# Noise X0 is t = 0, data X1 is t = 1. The straight path between them is X_t = (1 - t) X0 + t X1,
# so the velocity to learn is X1 - X0. All of this takes three minutes on two CPU cores.

# %%
import copy
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import checkpoint
from diffusion import NoiseSchedule, dpm_solver
from evaluation.plots import save_comparison
from rectified_flow import distill_loss, euler, flow_velocity, guided, one_step, reflow_loss
from toy import shapes

PAIRS, STEPS, BATCH, LEARNING_RATE = 4000, 300, 64, 5e-4
torch.manual_seed(0)
torch.set_flush_denormal(True)  # subnormal numbers make CPU arithmetic 50 times slower
started = time.time()
say = lambda text: print(f"{time.time() - started:4.0f} s  {text}")

# %% [markdown]
# ## 1. The teacher generates pairs
# A tiny Stable Diffusion maps noise X0 and a caption T to a latent X1. It predicts the noise ε in a
# noisy latent. Guidance uses ε(∅) + 2.5 (ε(T) - ε(∅)), where ∅ is the empty caption.

# %%
sd = checkpoint.load(Path(checkpoint.__file__).parent / "toy" / "tiny_sd.safetensors")
null = sd.encode_prompts([""])  # (1, 16, 128)

@torch.inference_mode()
def sample(sampler, x0, captions):  # -> latents (N, 4, 8, 8), in batches of 128
    parts = tqdm([slice(k, k + 128) for k in range(0, len(x0), 128)], leave=False)
    return torch.cat([sampler(x0[part], sd.encode_prompts(captions[part])) for part in parts])


def teacher(x0, context, steps=8):
    *_, x1 = dpm_solver(guided(sd.unet, null, 2.5), x0, steps, NoiseSchedule(), context)
    return x1

captions = [str(caption) for caption in shapes.training_captions(PAIRS, seed=0)]
x0 = torch.randn(PAIRS, 4, 8, 8)  # pair k: captions[k], x0[k], x1[k]
x1 = sample(teacher, x0, captions)
say(f"{PAIRS} pairs of the teacher")

# %% [markdown]
# ## 2. One training loop
# AdamW, with a warm-up, a learning rate that falls to 0, and gradient clipping.

# %%
def train(unet, loss, name):  # loss(indices of pairs) -> (B,)
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=0.0, fused=True)
    for step in tqdm(range(STEPS), name, leave=False):
        warm, left = (step + 1) / 50, (STEPS - step) / (0.6 * STEPS)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, warm, left)
        value = loss(torch.randint(PAIRS, (BATCH,))).mean()
        value.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    say(f"{name}: the loss of the last batch is {value.item():.4f}")

# %% [markdown]
# ## 3. Reflow: min E ‖(X1 - X0) - v(X_t, t | T)‖², t ~ U[0, 1]
# The velocity contains -X0 and the teacher predicts X0, so the flow starts as the negated teacher.
# A tenth of the captions becomes ∅, so that the result, 2-Rectified Flow (2-RF), can be guided.

# %%
flow = copy.deepcopy(sd.unet)
for parameter in flow.conv_out.parameters():
    parameter.data.neg_()


def reflow(i):
    context = sd.encode_prompts([captions[k] if torch.rand(()) > 0.1 else "" for k in i])
    return reflow_loss(flow_velocity(flow), x0[i], x1[i], torch.rand(BATCH), context)

train(flow, reflow, "reflow")

# %% [markdown]
# ## 4. Distillation: min E ‖X0 + v(X0, 0 | T) - X1‖²
# New pairs: 2-RF follows dZ/dt = v(Z, t) from new noise in 4 Euler steps, guidance scale 1.5. The
# student must reach their ends in one step, without guidance: the pairs already contain it.

# %%
def two_rf(x0, context, steps=4):
    *_, x1 = euler(guided(flow_velocity(flow), null, 1.5), x0, steps, context)
    return x1

z0 = torch.randn(PAIRS, 4, 8, 8)
z1 = sample(two_rf, z0, captions)
say(f"{PAIRS} pairs of 2-RF")
student = copy.deepcopy(flow)
train(student, lambda i: distill_loss(
    flow_velocity(student), z0[i], z1[i], sd.encode_prompts([captions[k] for k in i])), "distill")

# %% [markdown]
# ## 5. One forward pass makes an image
# Every row uses the same held-out captions and noises. A classifier reads what each image shows.

# %%
held_out, rows, classifier = shapes.measuring_captions(200, seed=0), [], shapes.load_reader()
texts, noise = [str(caption) for caption in held_out], torch.randn(200, 4, 8, 8)
for label, sampler in (
    ("teacher, 8 steps", teacher), ("teacher, 1 step", lambda *x: teacher(*x, steps=1)),
    ("2-RF, 1 step", lambda *x: two_rf(*x, steps=1)),
    ("one-step model", lambda *x: one_step(flow_velocity(student), *x)),
):
    with torch.inference_mode():
        images = sd.vae.decode(sample(sampler, noise, texts))
        correct = shapes.right(classifier, classifier.features(images), held_out)
    say(f"{label}: {sum(correct) / 200:.1%} of 200 held-out captions read back correctly")
    rows.append((label.replace(", ", "\n"), images[:8]))
save_comparison("runs/minimal.png", rows, texts[:8])
Image.open("runs/minimal.png")  # noqa: B018 (the notebook shows it)
