"""diffusers' DC-AE accelerated: the same pictures, the same state dict, and back."""

import copy
import pickle

import pytest
import tiny_dc_ae as tiny
import torch
from torch import nn
from torch.nn import functional as F

import clipflow
from clipflow.nn import conv3x3 as convolution


def both(stock):
    fused = copy.deepcopy(stock)
    return stock, fused, clipflow.accelerate(fused)


DECODERS = {
    "interpolate": {},
    "pixel_shuffle": {"upsample_block_type": "pixel_shuffle"},
    "two scales": {"qkv_multiscales": ((), (), (3, 5))},
    "other repeats": {"block_out_channels": (24, 96, 128)},
    "no first stage": {"layers_per_block": (0, 1, 1)},
    "no shortcut": {"in_shortcut": False},
    "batch norm": {"norm_type": ("batch_norm", "rms_norm", "rms_norm"), "act_fn": "relu"},
}


@pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)
def test_decoder_error_is_that_of_diffusers(config):
    stock, fused, _ = both(tiny.decoder(**config))
    own, ours = tiny.errors(stock, fused, torch.randn(1, 8, 8, 8))
    assert ours <= 2 * own


@pytest.mark.parametrize("downsample", ["pixel_unshuffle", "conv"])
@pytest.mark.parametrize("layers", [(1, 1, 1), (0, 1, 1)])
def test_encoder_error_is_that_of_diffusers(downsample, layers):
    stock, fused, _ = both(tiny.encoder(downsample_block_type=downsample, layers_per_block=layers))
    own, ours = tiny.errors(stock, fused, torch.randn(2, 3, 24, 16))
    assert ours <= 2 * own


@pytest.mark.parametrize("size", [(3, 2), (7, 5)])
def test_few_tokens_and_odd_sides(size):
    stock, fused, _ = both(tiny.decoder())
    own, ours = tiny.errors(stock, fused, torch.randn(1, 8, *size))
    assert ours <= 2 * own


@torch.no_grad()
def test_bfloat16_is_as_exact_as_eager():
    stock, fused, _ = both(tiny.decoder())
    z = torch.randn(1, 8, 8, 8).bfloat16()
    truth = copy.deepcopy(stock).bfloat16().double()(z.double())
    own, ours = ((m.bfloat16()(z).double() - truth).norm() / truth.norm() for m in (stock, fused))
    assert ours <= 2 * own


@torch.no_grad()
def test_whole_autoencoder_and_undo():
    stock, fused, acceleration = both(tiny.autoencoder())
    pictures = torch.randn(2, 3, 32, 32)
    latents = stock.encode(pictures).latent
    torch.testing.assert_close(fused.encode(pictures).latent, latents, rtol=0, atol=5e-5)
    expected = stock.decode(latents).sample
    torch.testing.assert_close(fused.decode(latents).sample, expected, rtol=0, atol=5e-5)
    assert fused.decode(latents).sample.is_contiguous()
    assert fused.state_dict().keys() == stock.state_dict().keys()
    assert acceleration.replaced == {
        "Encoder.forward": 1, "Decoder.forward": 1, "ResBlock.forward": 4,
        "SanaMultiscaleLinearAttention.forward": 2, "GLUMBConv.forward": 2,
        "DCUpBlock2d.forward": 2, "DCDownBlock2d.forward": 2,
    }  # fmt: skip
    acceleration.undo()
    assert torch.equal(fused.decode(latents).sample, expected)
    assert not any("forward" in part.__dict__ for part in fused.modules())


def test_blocks_with_batch_norm_stay_stock():
    _, _, acceleration = both(tiny.decoder(norm_type=("batch_norm", "rms_norm", "rms_norm")))
    assert acceleration.replaced["ResBlock.forward"] == 1


@torch.no_grad()
def test_every_block_hands_on_channels_last_memory():
    _, fused, _ = both(tiny.decoder())
    seen = []
    for stage in fused.up_blocks:
        stage.register_forward_hook(lambda module, args, output: seen.append(output))
    fused(torch.randn(2, 8, 8, 8))
    assert len(seen) == 3
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_gradients_are_those_of_diffusers():
    stock, fused, _ = both(tiny.decoder(block_out_channels=(24, 32, 32), latent_channels=4))
    z = torch.randn(1, 4, 4, 4)
    for module in (stock, fused):
        module(z).square().mean().backward()
    for (name, a), b in zip(stock.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=name)


@torch.no_grad()
def test_new_weights_are_seen():
    stock, fused, _ = both(tiny.decoder())
    weights = copy.deepcopy(stock.state_dict())
    z = torch.randn(1, 8, 8, 8)
    fused(z)
    other = tiny.decoder(in_shortcut=True)
    for parameter in other.parameters():
        parameter.mul_(1.1)
    expected = other(z)
    fused.load_state_dict(other.state_dict())
    torch.testing.assert_close(fused(z), expected, rtol=0, atol=1e-4)
    fused.load_state_dict(stock.state_dict(), assign=True)
    torch.testing.assert_close(fused(z), stock(z), rtol=0, atol=5e-5)
    fused.bfloat16().float()  # the memory may be the same again
    torch.testing.assert_close(fused(z), stock.bfloat16().float()(z), rtol=0, atol=5e-5)
    fused.load_state_dict(weights)
    torch._foreach_mul_(list(fused.parameters()), 1.1)
    torch.testing.assert_close(fused(z), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_copies_and_pickles_work_alone():
    _, fused, acceleration = both(tiny.decoder())
    z = torch.randn(1, 8, 8, 8)
    expected = fused(z)
    twins = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))]
    acceleration.undo()
    for parameter in fused.parameters():
        parameter.zero_()
    for twin in twins:
        assert torch.equal(twin(z), expected)
        assert clipflow.Acceleration.of(twin) is not None
    twins[0].double()
    assert twins[0](z.double()).dtype is torch.float64


@torch.no_grad()
def test_hooks_and_layers_put_in_later_run():
    stock, fused, _ = both(tiny.decoder())
    z = torch.randn(1, 8, 8, 8)
    for module in (stock, fused):
        block = module.up_blocks[0][1]
        block.conv1.register_forward_hook(lambda layer, args, output: 2 * output)
        inner = module.up_blocks[2][0].conv_out
        inner.conv_point = nn.Sequential(inner.conv_point, nn.Identity())
    torch.testing.assert_close(fused(z), stock(z), rtol=0, atol=5e-5)


@torch.no_grad()
def test_autocast_and_the_eager_backend():
    stock, fused, _ = both(tiny.decoder())
    z = torch.randn(1, 8, 8, 8)
    expected = stock(z)
    with clipflow.use_backend("eager"):
        torch.testing.assert_close(fused(z), expected, rtol=0, atol=5e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(z).float(), expected, rtol=0.1, atol=0.1)


def test_a_decoder_of_another_model_is_refused():
    from diffusers.models.autoencoders.vae import Decoder

    with pytest.raises(clipflow.AccelerationError, match=r"autoencoder_dc\.Decoder"):
        clipflow.accelerate(Decoder(norm_num_groups=1, block_out_channels=(4,)))


@pytest.mark.parametrize("shape", [(32, 40), (44, 36), (33, 34), (4, 400)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_convolutions(shape, bias):
    """Off-center inputs, as activations are; the plain sum's own error is the measure."""
    torch.manual_seed(0)
    x = F.silu(torch.randn(2, *shape, 128) + 1)
    weight, b = torch.randn(160, 128, 3, 3) / 34, torch.randn(160) if bias else None
    images = x.permute(0, 3, 1, 2)
    wide = None if b is None else b.double()

    def error(y, truth):
        return float((y.permute(0, 3, 1, 2).double() - truth).norm() / truth.norm())

    truth = F.conv2d(images.double(), weight.double(), wide, padding=1)
    plain = error(F.conv2d(images, weight, b, padding=1).permute(0, 2, 3, 1), truth)
    assert error(convolution.conv3x3(x, weight, b), truth) <= 2 * plain
    silu = convolution.conv3x3(x, weight, b, silu=True)
    assert error(silu, F.silu(truth)) <= 4 * plain
    large = F.interpolate(images.double(), scale_factor=2)
    truth = F.conv2d(large, weight.double(), wide, padding=1)
    assert error(convolution.repeated_conv3x3(x, weight, b), truth) <= 2 * plain


@torch.no_grad()
def test_convolutions_of_a_batch_are_those_of_its_pictures():
    x, weight = torch.randn(3, 32, 32, 128), torch.randn(128, 128, 3, 3)
    for call in (convolution.conv3x3, convolution.repeated_conv3x3):
        together = call(x, weight, None)
        for index in range(3):
            assert torch.equal(call(x[index : index + 1], weight, None)[0], together[index])
