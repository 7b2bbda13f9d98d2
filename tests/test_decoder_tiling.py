"""Decoding in tiles, and the bytes it is chosen by."""

import copy
import weakref

import pytest
import tiny_dc_ae as tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import clipflow
from clipflow.errors import InputError
from clipflow.models.dc_ae import decoder as module
from clipflow.models.dc_ae.memory import WORK_BYTES, choose_parts, decode_bytes
from clipflow.models.dc_ae.tiling import decode_tiled


class Peak(TorchDispatchMode):
    """The most bytes of tensors made inside that lived at a time."""

    def __init__(self):
        super().__init__()
        self.holders, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor)
        return result

    def _hold(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.holders:
            self.holders[key] = 0
            self.now += size
            self.most = max(self.most, self.now)
        self.holders[key] += 1
        weakref.finalize(tensor, self._let_go, key, size)

    def _let_go(self, key, size):
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key]
            self.now -= size


STOCK = {
    "interpolate": {},
    "pixel_shuffle": {"upsample_block_type": "pixel_shuffle"},
    "no first stage": {"layers_per_block": (0, 1, 1)},
    "no attention": {"block_type": "ResBlock"},
}


@pytest.mark.parametrize("config", STOCK.values(), ids=STOCK)
@torch.no_grad()
def test_tiles_make_the_whole_picture_exactly(config):
    """In float64 a missing neighbor cannot hide behind rounding."""
    decoder = tiny.decoder(block_out_channels=(16, 32, 32), latent_channels=4, **config).double()
    latents = torch.randn(2, 4, 8, 5, dtype=torch.float64)
    whole = decoder(latents)
    for tile_size in (7, 16, 400):
        tiled = decode_tiled(decoder, latents, tile_size)
        torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-6)  # diffusers norms in float32


@torch.no_grad()
def test_tile_size_of_decode():
    decoder = tiny.pixel_decoder()
    latents = torch.randn(2, 8, 16, 12)
    whole = decoder.decode(latents)
    torch.testing.assert_close(decoder.decode(latents, tile_size=32), whole, rtol=0, atol=5e-5)
    with pytest.raises(InputError, match="tile_size must be at least 1, got 0"):
        decoder.decode(latents, tile_size=0)


@torch.no_grad()
def test_budget_chooses_the_parts(monkeypatch):
    decoder = tiny.pixel_decoder()
    latents = torch.randn(2, 8, 16, 16)
    whole = decoder.decode(latents)
    tiles = []

    def spy(module, part, tile_size):
        tiles.append((len(part), tile_size))
        return decode_tiled(module, part, tile_size)

    monkeypatch.setattr(module, "decode_tiled", spy)
    one = decode_bytes(decoder.config, 16, 16)
    decoder.decode_budget = one
    torch.testing.assert_close(decoder.decode(latents), whole, rtol=0, atol=5e-5)
    assert tiles == []
    decoder.decode_budget = one - 1
    torch.testing.assert_close(decoder.decode(latents), whole, rtol=0, atol=5e-5)
    assert tiles == [(1, 32)] * 2
    with torch.enable_grad():
        assert decoder.decode(latents).requires_grad
    assert len(tiles) == 2


def test_parts_follow_the_budget():
    config = tiny.CONFIG
    one = decode_bytes(config, 32, 32) - WORK_BYTES
    f32 = torch.float32
    assert choose_parts(config, (8, 32, 32), f32, 8 * one + WORK_BYTES) == (8, None)
    assert choose_parts(config, (8, 32, 32), f32, 3 * one + WORK_BYTES) == (3, None)
    rows, tile = choose_parts(config, (8, 32, 32), f32, one + WORK_BYTES - 1)
    assert rows == 1
    assert tile == 64
    rows, tile = choose_parts(config, (8, 32, 32), f32, 0)  # the attention stages alone take more
    least = decode_bytes(config, 32, 32, tile_size=16)
    assert decode_bytes(config, 32, 32, tile_size=tile) == least < decode_bytes(config, 32, 32)
    assert decode_bytes(config, 32, 32, dtype=torch.bfloat16) < decode_bytes(config, 32, 32)


@torch.no_grad()
def test_decode_bytes_bound_the_peak_and_tiles_take_less():
    decoder = tiny.pixel_decoder()
    latents = torch.randn(1, 8, 24, 24)
    decoder.decode(latents)  # transforms the kernels
    most = {}
    for tile_size in (None, 24):
        estimate = decode_bytes(decoder.config, 24, 24, tile_size=tile_size)
        with Peak() as peak:
            decoder.decode(latents, tile_size=tile_size)
        most[tile_size] = peak.most
        assert 0.5 * (estimate - WORK_BYTES) <= peak.most <= estimate
    assert most[24] < 0.8 * most[None]


@torch.no_grad()
def test_decoder_is_accelerated_and_keeps_its_names():
    decoder = tiny.pixel_decoder()
    latents = torch.randn(1, 8, 8, 8)
    twin = copy.deepcopy(decoder)
    clipflow.Acceleration.of(twin.decoder).undo()
    assert twin.state_dict().keys() == decoder.state_dict().keys()
    torch.testing.assert_close(decoder.decode(latents), twin.decode(latents), rtol=0, atol=5e-5)
    own, ours = tiny.errors(twin.decoder, decoder.decoder, latents)
    assert ours <= 2 * own


@torch.no_grad()
def test_an_unknown_diffusers_decodes_as_stock(monkeypatch):
    def refuse(decoder):
        raise clipflow.AccelerationError("accelerate: another version")

    latents = torch.randn(1, 8, 8, 8)
    expected = tiny.pixel_decoder().decode(latents)
    monkeypatch.setattr(module, "accelerate", refuse)
    with pytest.warns(UserWarning, match="accelerate: another version"):
        decoder = tiny.pixel_decoder()
    assert clipflow.Acceleration.of(decoder.decoder) is None
    torch.testing.assert_close(decoder.decode(latents), expected, rtol=0, atol=5e-5)
