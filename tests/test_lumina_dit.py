"""The Lumina-Next DiT against the reference's own chain of plain ops: values, gradients, masks."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_dit import CAPTION, CHANNELS, tiny_lumina

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.peers.lumina_reference import ReferenceLumina
from clipflow.errors import ShapeError
from clipflow.models.dits.lumina import LuminaTransformer, feed_forward_width


@pytest.fixture(scope="module")
def dit():
    return tiny_lumina()


def inputs(batch=2, grid=(5, 3), length=7, dtype=torch.float32, channels=CHANNELS):
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(batch, channels, *grid, generator=generator, dtype=torch.float64)
    condition = torch.randn(batch, length, CAPTION, generator=generator, dtype=torch.float64)
    times = torch.tensor([966, 12, 1000][:batch])
    return latents.to(dtype), times, condition.to(dtype)


def error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_plain_ops(dit, dtype):
    model = copy.deepcopy(dit).to(dtype)
    given = inputs(dtype=dtype)
    exact = ReferenceLumina(copy.deepcopy(model).double())(
        given[0].double(), given[1], given[2].double()
    )
    found = model(*given)
    assert found.dtype == dtype
    assert error(found, exact) <= 2 * error(ReferenceLumina(model)(*given), exact)


def test_gradients_are_those_of_plain_ops(dit):
    exact = copy.deepcopy(dit).double()
    latents, times, condition = inputs()
    given = condition.clone().requires_grad_()
    dit(latents, times, given).square().mean().backward()
    wide = condition.double().requires_grad_()
    ReferenceLumina(exact)(latents.double(), times, wide).square().mean().backward()
    assert error(given.grad, wide.grad) < 1e-5
    pairs = list(zip(dit.named_parameters(), exact.parameters(), strict=True))
    typical = torch.stack([wanted.grad.norm() for _, wanted in pairs]).median()
    for (name, parameter), wanted in pairs:
        # The softmax is blind to what all keys have in common: norm_k.bias of attn2 has none.
        size = max(wanted.grad.norm(), 1e-2 * typical)
        assert (parameter.grad - wanted.grad).norm() < 1e-5 * size, name
    dit.zero_grad(set_to_none=True)


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_in_one_graph(masked):
    model = tiny_lumina(layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    mask = torch.ones(2, 7)
    mask[0, 4:] = 0
    given = (*inputs(), mask) if masked else inputs()
    found, wanted = compiled(*given), model(*given)
    torch.testing.assert_close(found, wanted)
    gate = model.layers[0].gate
    grads = [torch.autograd.grad(out.square().sum(), gate)[0] for out in (found, wanted)]
    torch.testing.assert_close(*grads)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_condition_is_what_it_is_alone(dit, side):
    """Neither attention nor the mean of the time embedding sees padding, whatever is in it."""
    latents, times, condition = inputs(length=9)
    real = [9, 4]
    mask = torch.zeros(2, 9, dtype=torch.int64)
    mask[0], mask[1, :4] = 1, 1
    if side == "left":
        condition[1] = condition[1].roll(5, 0)
        mask = mask.flip(1)
    alone = [
        dit(latents[b : b + 1], times[b : b + 1], condition[b : b + 1][:, mask[b] == 1])
        for b in range(2)
    ]
    assert [int(row.sum()) for row in mask] == real
    condition[1][mask[1] == 0] = 1e4
    torch.testing.assert_close(dit(latents, times, condition, mask), torch.cat(alone))


@torch.no_grad()
def test_times_may_be_whole_or_not(dit):
    latents, _, condition = inputs()
    velocities = [
        dit(latents, torch.tensor([time] * 2), condition) for time in (966, 966.0, 966.67)
    ]
    assert torch.equal(velocities[0], velocities[1])
    assert not torch.allclose(velocities[1], velocities[2], atol=1e-4)


@torch.no_grad()
def test_patches(dit):
    """Read channel by channel, written place by place."""
    small = tiny_lumina(in_channels=2, patch_size=2)
    config = replace(small.config, in_channels=8, patch_size=1)
    whole = LuminaTransformer(config)
    whole.load_state_dict(small.state_dict())
    latents, times, condition = inputs(grid=(10, 6), channels=2)
    found = small(latents, times, condition)
    values = whole(torch.nn.functional.pixel_unshuffle(latents, 2), times, condition)
    places = values.unflatten(1, (2, 2, 2)).permute(0, 3, 4, 1, 5, 2)  # [B, C, h, row, w, column]
    torch.testing.assert_close(found, places.flatten(4, 5).flatten(2, 3))


def test_sizes_of_published_checkpoints():
    assert feed_forward_width(1792) == 4864
    with torch.device("meta"):
        published = published_config(2048), published_config(3584)
        counts = [sum(p.numel() for p in LuminaTransformer(c).parameters()) for c in published]
    assert counts == [1_362_257_824, 1_365_010_336]


def published_config(width):
    return replace(
        tiny_lumina().config, in_channels=1792, hidden_size=1792, num_layers=24,
        num_attention_heads=28, num_kv_heads=28, intermediate_size=feed_forward_width(1792),
        condition_channels=width,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, CHANNELS, 4)])
def test_wrong_latents_are_refused(dit, shape):
    with pytest.raises(ShapeError, match=rf"lumina: latents must be \[B, {CHANNELS}, h, w\]"):
        dit(torch.zeros(shape), torch.zeros(2), torch.zeros(2, 3, CAPTION))


def test_grids_that_do_not_fall_into_patches_are_refused():
    dit = tiny_lumina(patch_size=2)
    with pytest.raises(ShapeError, match="2 h, 2 w"):
        dit(torch.zeros(1, CHANNELS, 4, 3), torch.zeros(1), torch.zeros(1, 3, CAPTION))
