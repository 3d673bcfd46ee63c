"""The three networks agree with diffusers and transformers on random weights."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL as ReferenceVAE
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import unet
from conftest import relative_error
from formats.diffusers_folder import text_to_transformers, unet_to_diffusers, vae_to_diffusers
from text_encoder import TextEncoder, TextEncoderConfig
from stacked_unet import StackedUNet, stack
from unet import LONG, Attention, UNet, UNetConfig, attention_by_parts
from vae import AutoencoderKL, VAEConfig

# Together they have every kind of block: with and without attention on the way down and up,
# changing and equal widths, one to three layers, and a first level without attention, as in the
# tiny model.
UNETS = {
    "like SD": UNetConfig(4, 4, (32, 64, 64), (True, True, False), 2, 4, 48, 8, 16),
    "attention below": UNetConfig(4, 4, (32, 64), (False, True), 1, 2, 24, 16, 16),
    "three layers": UNetConfig(4, 4, (16, 16, 32), (True, False, True), 3, 2, 24, 8, 16),
}
VAES = {
    "like SD": VAEConfig(block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=8),
    "one layer": VAEConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8),
}
TEXT = TextEncoderConfig(100, 12, 32, 64, 2, 4)


def reference_unet(config: UNetConfig) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(unet_to_diffusers(config))


def reference_vae(config: VAEConfig) -> ReferenceVAE:
    return ReferenceVAE.from_config(vae_to_diffusers(config))


def reference_text(config: TextEncoderConfig) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**text_to_transformers(config), attn_implementation="sdpa"))


def shapes_of(module) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (9, 13)], ids=str)
def test_unet_agrees_with_diffusers(config, size):
    torch.manual_seed(0)
    reference, unet = reference_unet(config).eval(), UNet(config).eval()
    unet.load_state_dict(reference.state_dict())
    x, context = torch.randn(3, 4, *size), torch.randn(3, 7, config.cross_attention_dim)
    timestep = torch.tensor([0.0, 333.25, 999.0])
    expected, output = reference(x, timestep, context).sample, unet(x, timestep, context)
    assert relative_error(output, expected) < 1e-5

    target = torch.randn_like(x)
    (expected - target).square().mean().backward()
    (output - target).square().mean().backward()
    ours, theirs = dict(unet.named_parameters()), dict(reference.named_parameters())
    a = torch.cat([ours[name].grad.flatten() for name in theirs])
    b = torch.cat([theirs[name].grad.flatten() for name in theirs])
    assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("config", VAES.values(), ids=VAES)
def test_vae_agrees_with_diffusers(config):
    torch.manual_seed(0)
    reference, vae = reference_vae(config).eval(), AutoencoderKL(config).eval()
    vae.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 24, 32)
    expected, (mean, logvar) = reference.encode(images).latent_dist, vae.encode(images)
    assert relative_error(mean, expected.mean) < 1e-5
    assert relative_error(logvar, expected.logvar) < 1e-5
    expected_decoded = reference.decode(expected.mean).sample
    decoded = vae.decode(mean * config.scaling_factor)
    assert relative_error(decoded, expected_decoded) < 1e-5

    (expected_decoded.square().mean() + expected.kl().mean() / 1000).backward()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)
    (decoded.square().mean() + kl.mean() / 1000).backward()
    ours, theirs = dict(vae.named_parameters()), dict(reference.named_parameters())
    a = torch.cat([ours[name].grad.flatten() for name in theirs])
    b = torch.cat([theirs[name].grad.flatten() for name in theirs])
    assert relative_error(a, b) < 1e-4


def test_text_encoder_agrees_with_transformers():
    torch.manual_seed(0)
    reference, text = reference_text(TEXT).eval(), TextEncoder(TEXT).eval()
    text.text_model.load_state_dict(
        {k.removeprefix("text_model."): v for k, v in reference.state_dict().items()}
    )
    token_ids = torch.randint(0, 98, (3, 12))
    expected, output = reference(token_ids).last_hidden_state, text(token_ids)
    assert output.shape == (3, 12, 32)
    assert relative_error(output, expected) < 1e-5
    expected.square().sum().backward()
    output.square().sum().backward()
    ours = {name.removeprefix("text_model."): p for name, p in text.named_parameters()}
    theirs = {name.removeprefix("text_model."): p for name, p in reference.named_parameters()}
    a = torch.cat([ours[name].grad.flatten() for name in theirs])
    b = torch.cat([theirs[name].grad.flatten() for name in theirs])
    # A layer norm's output has a constant sum of squares, so gradients are small. They agree up to
    # the rounding of the forward pass.
    assert relative_error(a, b) < 1e-4


def test_full_size_names_and_shapes_are_those_of_diffusers():
    with torch.device("meta"):
        assert shapes_of(UNet(UNetConfig())) == shapes_of(reference_unet(UNetConfig()))
        assert shapes_of(AutoencoderKL(VAEConfig())) == shapes_of(reference_vae(VAEConfig()))
        ours = shapes_of(TextEncoder(TextEncoderConfig()))
        theirs = shapes_of(reference_text(TextEncoderConfig()))
    strip = lambda shapes: {
        name.removeprefix("text_model."): shape for name, shape in shapes.items()
    }
    assert strip(ours) == strip(theirs)
    assert len(ours) == 196


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    unet, vae = UNet(UNETS["like SD"]), AutoencoderKL(VAES["like SD"])
    x, context, timestep = (
        torch.randn(2, 4, 8, 8), torch.randn(2, 5, 48), torch.tensor([10.0, 900.0])
    )
    gradients = []
    for switch in (False, True):
        unet.gradient_checkpointing = vae.decoder.gradient_checkpointing = switch
        unet.zero_grad()
        vae.decode(unet(x, timestep, context)).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_channels_last_is_close_to_fp32(dtype):
    torch.manual_seed(0)
    config = UNETS["like SD"]
    unet, vae, text = UNet(config), AutoencoderKL(VAES["like SD"]), TextEncoder(TEXT)
    x, context, timestep = (
        torch.randn(2, 4, 8, 8), torch.randn(2, 5, 48), torch.tensor([10.0, 900.0])
    )
    tokens, images = torch.randint(0, 98, (2, 12)), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        exact = unet(x, timestep, context), vae.decode(x), vae.encode(images)[0], text(tokens)
        for network in (unet, vae, text):
            network.to(dtype)
        unet.to(memory_format=torch.channels_last)
        half = unet(x, timestep, context), vae.decode(x), vae.encode(images)[0], text(tokens)
    for a, b in zip(half, exact):
        assert a.dtype == dtype
        assert relative_error(a.float(), b) < 0.05


def test_attention_by_parts_is_attention():
    torch.manual_seed(0)
    # 700 queries: the second part is shorter. Transposed views, as Attention makes them.
    q, k, v = (torch.randn(2, tokens, 3, 16).bfloat16().transpose(1, 2) for tokens in (700, 77, 77))
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative_error(attention_by_parts(q, k, v).double(), wanted) < 1e-2  # bf16 has 8 bits
    assert relative_error(attention_by_parts(q.double(), k.double(), v.double()), wanted) < 1e-12
    sharp = 8 * q  # products of up to 100, rounded to bf16
    wanted = F.scaled_dot_product_attention(sharp.double(), k.double(), v.double())
    assert relative_error(attention_by_parts(sharp, k, v).double(), wanted) < 5e-2
    torch.library.opcheck(attention_by_parts, (q, k, v))  # that torch.compile can take it


def test_long_attention_in_bf16_is_by_parts_only_without_gradients(monkeypatch):
    torch.manual_seed(0)
    calls, layer = [], Attention(16, 16, 2).bfloat16()
    monkeypatch.setattr(unet, "attention_by_parts",
                        lambda *given: calls.append(given) or attention_by_parts(*given))
    x = torch.randn(1, LONG, 16).bfloat16()
    trained = layer(x)
    trained.float().square().mean().backward()
    assert not calls and layer.to_q.weight.grad.abs().sum() > 0
    with torch.no_grad():
        sampled = layer(x)
        layer(x[:, :-1])  # shorter
        layer.float()(x.float())
    assert len(calls) == 1 and relative_error(sampled.float(), trained.float()) < 2e-2


def test_each_sample_has_its_own_timestep():
    torch.manual_seed(0)
    unet = UNet(UNETS["like SD"]).eval()
    x, context, timestep = (
        torch.randn(2, 4, 8, 8), torch.randn(2, 5, 48), torch.tensor([10.0, 900.0])
    )
    together = unet(x, timestep, context)
    apart = torch.cat([
        unet(x[k : k + 1], timestep[k : k + 1], context[k : k + 1]) for k in range(2)
    ])
    assert relative_error(together, apart) < 1e-5


# --------------------------------------------------------------------------------------------------
# The stacked U-Net


def test_stacked_unet_is_two_in_series_without_shared_weights():
    torch.manual_seed(0)
    unet = UNet(UNETS["like SD"]).eval()
    stacked = stack(unet)
    x, timestep, context = (
        torch.randn(2, 4, 9, 13), torch.tensor([3.0, 700.0]), torch.randn(2, 7, 48)
    )
    features = unet.body(unet.body(unet.read_in(x), timestep, context), timestep, context)
    assert torch.equal(stacked(x, timestep, context), unet.read_out(features))

    # The halves share no weight with each other or with the original U-Net.
    with torch.no_grad():
        for weight in stacked.first.parameters():
            weight.zero_()
    assert not torch.equal(stacked(x, timestep, context), unet.read_out(features))
    assert all(torch.equal(weight, unet.state_dict()[name])
               for name, weight in stacked.second.state_dict().items())


def test_gradients_of_the_stacked_unet_are_its_slopes():
    torch.manual_seed(0)
    stacked = stack(UNet(UNETS["attention below"])).double()
    x, timestep, context = (
        torch.randn(2, 4, 4, 4).double(), torch.tensor([3.0, 700.0]),
        torch.randn(2, 5, 24).double(),
    )
    loss = lambda: stacked(x, timestep, context).square().mean()
    for checkpointing in (False, True):
        for half in (stacked.first, stacked.second):
            half.gradient_checkpointing = checkpointing
        stacked.zero_grad()
        loss().backward()
        for name, weight in stacked.named_parameters():
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name
        # Along a random direction in all weights, the gradient is the slope.
        direction = [torch.randn_like(weight) for weight in stacked.parameters()]
        slope = sum((weight.grad * d).sum() for weight, d in zip(stacked.parameters(), direction))
        values = []
        with torch.no_grad():
            for step in (1e-5, -2e-5, 1e-5):  # there, to the other side, and back
                for weight, d in zip(stacked.parameters(), direction):
                    weight += step * d
                values.append(loss())
        assert abs((values[0] - values[1]) / 2e-5 - slope) < 1e-4 * abs(slope)


def test_docstring_states_the_size_of_the_stacked_unet():
    with torch.device("meta"):
        count = sum(weight.numel() for weight in StackedUNet(UNetConfig(stacked=True)).parameters())
    assert f"{count:,}" in StackedUNet.__doc__
