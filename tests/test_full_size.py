"""At Stable Diffusion 1.4's size: agreement with diffusers, and the memory that loading needs.

The tests need 10 GB of memory.
"""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL as ReferenceVAE
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

import checkpoint
from conftest import ROOT, relative_error
from formats.diffusers_folder import text_to_transformers, unet_to_diffusers, vae_to_diffusers
from formats.lora import merge_lora
from make_checkpoint import make_model, write_single_file
from sample import noise_from_seeds, sample_latents


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A full-size single file in fp16, as published, with random weights."""
    path = tmp_path_factory.mktemp("full") / "sd14.safetensors"
    write_single_file(make_model("full"), path)
    yield path
    path.unlink()  # 2 GB


@torch.no_grad()
def test_networks_agree_with_diffusers_in_fp32(path):
    model = checkpoint.load(path)

    def reference(make, state):
        with torch.device("meta"):
            network = make()
        network.load_state_dict(state, assign=True)
        return network.eval()

    torch.manual_seed(1)
    x, context, timestep = torch.randn(1, 4, 64, 64), torch.randn(1, 77, 768), torch.tensor([501.5])
    config = unet_to_diffusers(model.unet.config)
    unet = reference(lambda: UNet2DConditionModel.from_config(config), model.unet.state_dict())
    assert relative_error(
        model.unet(x, timestep, context), unet(x, timestep, context).sample
    ) <= 1e-5
    del unet

    vae = reference(
        lambda: ReferenceVAE.from_config(vae_to_diffusers(model.vae.config)),
        model.vae.state_dict(),
    )
    images = torch.rand(1, 3, 256, 256) * 2 - 1
    latent = vae.encode(images).latent_dist.mean
    assert relative_error(model.vae.encode(images)[0], latent) <= 1e-5
    scaled = latent * model.vae.config.scaling_factor
    # Divide as our decoder does: random weights magnify the rounding.
    decoded = vae.decode(scaled / model.vae.config.scaling_factor).sample
    assert relative_error(model.vae.decode(scaled), decoded) <= 1e-5

    config = CLIPTextConfig(
        **text_to_transformers(model.text_encoder.config), attn_implementation="sdpa"
    )
    text = CLIPTextModel(config).eval()
    text.load_state_dict({
        k.removeprefix("text_model."): v
        for k, v in model.text_encoder.text_model.state_dict().items()
    })
    token_ids = torch.randint(0, 49406, (2, 77))
    assert relative_error(model.text_encoder(token_ids), text(token_ids).last_hidden_state) <= 1e-5


LOADING = """
import json, sys, threading, time
sys.path.insert(0, sys.argv[1])
import torch, checkpoint
# Private memory. Linux's own peak also counts pages mapped from the file, which the system can
# reclaim at any time.
def private_memory():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])
before, peak, done = private_memory(), [0], []
def track_peak():
    while not done:
        peak[0] = max(peak[0], private_memory())
        time.sleep(0.002)
tracker = threading.Thread(target=track_peak)
tracker.start()
model = checkpoint.load(sys.argv[2], dtype=torch.bfloat16)
done.append(True)
tracker.join()
parts = (model.unet, model.vae, model.text_encoder)
size = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
print(json.dumps({"peak": max(peak[0], private_memory()) - before, "size": size}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_loading_needs_little_more_memory_than_the_model(path):
    result = subprocess.run([sys.executable, "-c", LOADING, str(ROOT), str(path)],
                            capture_output=True, text=True, check=True)
    measured = json.loads(result.stdout)
    assert 2.1e9 < measured["size"] < 2.2e9
    assert measured["peak"] < 1.3 * measured["size"]


@pytest.mark.slow
@torch.no_grad()
def test_one_step_with_a_lora_is_diffusers_image(path, tmp_path):
    """A random kohya LoRA in a full-size model, one step at 512 px: images differ by < 1/255."""
    model = checkpoint.load(path, kind="one-step")
    # Contexts are given, but for the empty prompt's, which guidance would need.
    model.encode_prompts = lambda prompts: torch.zeros(1, 77, 768) if prompts == [""] else prompts
    generator, lora = torch.Generator().manual_seed(2), {}
    for name, module in model.unet.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn" in name:
            key = "lora_unet_" + name.replace(".", "_")
            down = torch.randn(4, module.in_features, generator=generator)
            lora[f"{key}.lora_down.weight"] = (down * module.weight.std() / 4).half()
            lora[f"{key}.lora_up.weight"] = torch.randn(module.out_features, 4,
                                                        generator=generator).half()
            lora[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(lora, tmp_path / "kohya.safetensors")

    config = unet_to_diffusers(model.unet.config)
    with torch.device("meta"):
        reference = UNet2DConditionModel.from_config(config)
    reference.load_state_dict({k: v.clone() for k, v in model.unet.state_dict().items()},
                              assign=True)
    noise = noise_from_seeds([0], (4, 64, 64))
    context = torch.randn(1, 77, 768, generator=generator)
    before = reference(noise, torch.tensor([1000.0]), context).sample
    state, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path / "kohya.safetensors")
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, reference)
    reference.fuse_lora(lora_scale=0.8)
    after = reference(noise, torch.tensor([1000.0]), context).sample
    del reference

    merge_lora(model, tmp_path / "kohya.safetensors", 0.8)
    latents = sample_latents(model, context, noise, 1)
    wanted, unmerged = noise + after, noise + before
    image = lambda x: model.vae.decode(x).clamp(-1, 1) / 2 + 0.5
    assert (image(latents) - image(wanted)).abs().mean() < 1 / 255
    assert (latents - unmerged).abs().mean() > 100 * (latents - wanted).abs().mean()
