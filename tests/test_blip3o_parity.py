"""BLIP3-o's language model, vision transformer and training against the recorded reference.

In float32; the bar is 1e-5 of the largest recorded value. CLIPFLOW_PARITY_DIR names another
recording.
"""

import copy

import pytest
import torch
from blip3o_fixture import QUERY, own_ids, recorded, recorded_model
from test_blip3o_dit_parity import assert_close
from torch import Tensor
from torch.nn import functional as F

from clipflow.models.blip3o.eva import pooled_grid
from clipflow.models.blip3o.qwen import patches_of
from clipflow.models.condition import Condition
from clipflow.sampling import (
    draw_uniform_times,
    drop_conditions,
    euler_schedule,
    flow_matching_loss,
    interpolate,
    sample,
)
from clipflow.sampling.flow_matching import times_from_uniform

IMAGE_START = 151665


def with_start(ids: Tensor) -> Tensor:
    """Recorded prompts are without the marker that follows them."""
    return own_ids(F.pad(ids, (0, 1), value=IMAGE_START))[None]


def condition(tag: str, features: Tensor | None = None) -> Condition:
    ids = with_start(recorded()[f"{tag}.input_ids"])
    return recorded_model().encode_condition(ids, torch.ones_like(ids), features)


def drawn(given: Condition, noise: Tensor) -> Tensor:
    """30 steps at guidance 3 from recorded noise, as rows of features [B, N, C]."""
    model = recorded_model()
    rows = torch.cat([model.null_condition().expand_as(given.hidden), given.hidden])
    mask = torch.cat([given.mask, given.mask])
    features = sample(
        lambda x, times: model.dit(x, times, rows[-len(x) :], mask[-len(x) :]),
        noise,
        euler_schedule(model.config.default_steps, shift=model.config.flow_shift),
        solver="euler",
        guidance_scale=model.config.default_guidance_scale,
    )
    return features.flatten(2).transpose(1, 2)


@torch.no_grad()
def test_text_to_features():
    io, model = recorded(), recorded_model()
    ids = with_start(io["e2e.text.input_ids"])
    given = torch.cat([model.embed_prompt(ids), model.latent_queries], dim=1)
    assert_close(given, io["e2e.text.inputs_embeds"])
    found = condition("e2e.text")
    assert_close(found.hidden, io["e2e.text.query_hidden"])
    assert found.mask.dtype == torch.bool and found.mask.all()
    assert found.mask.shape == found.hidden.shape[:2]
    assert_close(drawn(found, io["e2e.text.noise"]), io["e2e.text.features"])


@torch.no_grad()
def test_picture_to_features():
    io, model = recorded(), recorded_model()
    features = model.encode_patches(io["e2e.image.pixel_values"], io["e2e.image.grid_thw"])
    assert_close(features, io["e2e.image.visual_out"])
    found = condition("e2e.image", features[None])
    assert_close(found.hidden, io["e2e.image.query_hidden"])
    assert_close(drawn(found, io["e2e.image.noise"]), io["e2e.image.features"])


@torch.no_grad()
def test_pixels_are_patched_as_they_were_recorded():
    """The recorded patches, put together to a picture, are patched as they were."""
    io, model = recorded(), recorded_model()
    vision, patches = model.config.vision, io["e2e.image.pixel_values"]
    cells = patches.view(2, 2, 2, 2, 3, vision.temporal_patch_size, 14, 14)[:, :, :, :, :, 0]
    picture = cells.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, 56, 56)
    found, grid = patches_of(picture, vision)
    assert torch.equal(grid, io["e2e.image.grid_thw"])
    one_frame = patches.unflatten(1, (3, 2, -1))[:, :, :1].expand(-1, -1, 2, -1)
    assert torch.equal(found, one_frame.flatten(1))
    both = model.encode_image(torch.cat([picture, picture.flip(-1)]))
    alone = model.encode_image(picture.flip(-1))
    assert_close(both[1:], alone)


def training_rows(kind: str) -> tuple[Tensor, Tensor]:
    """Recorded rows [prompt, queries, padding] as [prompt, padding], and their mask."""
    io, count = recorded(), recorded_model().config.n_query
    ids, mask = io["train.input_ids"], io["train.attention_mask"][:, count:]
    for row, start in zip(ids, io["train.i_s_pos"].tolist(), strict=True):
        assert (row[start : start + count] == QUERY).all()
    ids = torch.where(mask == 1, ids[:, :-count], IMAGE_START)
    return own_ids(ids), mask


@pytest.mark.parametrize("kind", ["train", "train_drop"])
def test_a_training_step(kind):
    io, model = recorded(), copy.deepcopy(recorded_model())
    trained = (
        model.latent_queries,
        model.dit.layers[0].gate,
        model.dit.layers[1].attn2.to_k.weight,
    )
    for parameter in trained:
        parameter.requires_grad_(True)
    times = times_from_uniform(io[f"{kind}.u"])
    assert_close(times.timesteps.float(), io[f"{kind}.dit.timestep"])
    data, noise = target_features(kind), io[f"{kind}.noise"]
    given = model.encode_condition(*training_rows(kind))
    hidden = given.hidden * (1 - io[f"{kind}.drop_mask"])[:, None, None]
    assert_close(hidden, io[f"{kind}.dit.z_latents"])
    noisy, target = interpolate(data, noise, times.sigmas)
    assert_close(noisy, io[f"{kind}.dit.x"])
    velocity = model.dit(noisy, times.timesteps, hidden, given.mask)
    assert_close(velocity, io[f"{kind}.dit.out"])
    loss = flow_matching_loss(velocity, target)
    torch.testing.assert_close(loss, io[f"{kind}.loss"], rtol=1e-5, atol=0)
    loss.backward()
    names = ("latent_queries", "dit.layers.0.gate", "dit.layers.1.attn2.to_k")
    for name, parameter in zip(names, trained, strict=True):
        assert_close(parameter.grad, io[f"{kind}.grad.{name}"])


def target_features(kind: str) -> Tensor:
    """The pooled features, or where the recording holds some channels of them, out of the noise."""
    io = recorded()
    whole = io.get("train.clip_features")
    if whole is not None:
        return pooled_grid(whole, 4)
    sigma = times_from_uniform(io[f"{kind}.u"]).sigmas[:, None, None, None]
    data = (io[f"{kind}.dit.x"] - sigma * io[f"{kind}.noise"]) / (1 - sigma)
    assert_close(data[:, ::16], pooled_grid(io["train.clip_features.sample16"], 4))
    return data


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = recorded_model()
    short, long = (with_start(recorded()["e2e.text.input_ids"])[:, start:] for start in (9, 0))
    missing = long.shape[1] - short.shape[1]
    pads = (missing, 0) if side == "left" else (0, missing)
    ids = torch.cat([F.pad(short, pads, value=model.config.tokens.pad), long])
    mask = torch.cat([F.pad(torch.ones_like(short), pads), torch.ones_like(long)])
    together = model.encode_condition(ids, mask)
    for row, alone in enumerate((short, long)):
        wanted = model.encode_condition(alone, torch.ones_like(alone))
        assert_close(together.hidden[row : row + 1], wanted.hidden)
        assert together.mask.all()


def test_uniform_times_and_dropped_conditions():
    dice = torch.Generator().manual_seed(0)
    times = draw_uniform_times(4000, generator=dice)
    assert abs(times.sigmas.mean().item() - 0.5) < 0.02 and times.timesteps.max() <= 1000
    hidden = drop_conditions(torch.ones(4000, 2, 3), generator=dice)
    dropped = (hidden == 0).flatten(1)
    assert torch.equal(dropped.any(1), dropped.all(1))
    assert abs(dropped[:, 0].float().mean().item() - 0.1) < 0.02
