"""The connector against transformers' own Qwen2 layers, called with a full mask."""

import copy

import pytest
import torch
from torch import nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)

from clipflow.models.unilip.connector import Connector

LENGTH, LAYERS = 37, 2
FIRST = torch.arange(LENGTH) < 20
MASKS = {
    "all real": torch.ones(2, LENGTH, dtype=torch.int64),
    "left": torch.stack([FIRST.flip(0), ~FIRST]).long(),
    "right": torch.stack([FIRST, torch.ones(LENGTH, dtype=torch.bool)]).long(),
    "gaps": torch.stack([torch.arange(LENGTH) % 3 > 0, torch.arange(LENGTH) % 7 != 2]).long(),
}


class Reference(nn.Module):
    """The layers as transformers runs them, told by a [B, 1, L, L] mask to see all real keys."""

    def __init__(self, config, num_layers):
        super().__init__()
        self.layers = nn.ModuleList(Qwen2DecoderLayer(config, i) for i in range(num_layers))
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config)

    def forward(self, hidden, mask):
        L = hidden.shape[1]
        allowed = mask.bool()[:, None, None, :].expand(-1, 1, L, L)
        rotation = self.rotary_emb(hidden, (mask.cumsum(-1) - 1).clamp(min=0))
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=allowed, position_embeddings=rotation)
        return self.norm(hidden)


@pytest.fixture(scope="module")
def pair():
    """(ours, the reference) with the same random weights, strictly loaded."""
    config = Qwen2Config(
        hidden_size=96,
        intermediate_size=200,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    ours, reference = Connector(config, LAYERS), Reference(config, LAYERS)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def hidden_states(dtype=torch.float32):
    return torch.randn(2, LENGTH, 96, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_as_exact_as_transformers(pair, kind, dtype):
    mask = MASKS[kind]
    ours, reference = (copy.deepcopy(module).to(dtype) for module in pair)
    for module in (ours, reference):
        module.rotary_emb = copy.deepcopy(pair[1].rotary_emb)  # always float32
    real, hidden = mask.bool(), hidden_states(dtype)
    truth = copy.deepcopy(reference).double()(hidden.double(), mask)[real]

    def error(output):
        return (output[real].double() - truth).norm() / truth.norm()

    found = ours(hidden, None if mask.all() else mask)
    assert found.dtype == dtype and found.isfinite().all()
    assert error(found) <= 2 * error(reference(hidden, mask))
    if mask.all():
        torch.testing.assert_close(ours(hidden, mask), found)


def test_gradients_are_those_of_transformers(pair):
    ours, reference = pair
    mask = MASKS["left"]
    real = mask.bool()
    weight = torch.randn(int(real.sum()), 96, generator=torch.Generator().manual_seed(2))
    gradients = []
    for module in (ours, reference):
        hidden = hidden_states().requires_grad_()
        loss = (module(hidden, mask)[real] * weight).sum()
        gradients.append(torch.autograd.grad(loss, [hidden, *module.parameters()]))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_is_padded_changes_nothing(pair):
    mask, hidden = MASKS["gaps"], hidden_states()
    real = mask.bool()
    other = torch.where(real[..., None], hidden, 100.0)
    assert torch.equal(pair[0](hidden, mask)[real], pair[0](other, mask)[real])
