"""One block of each published transformer at its true width, against diffusers and transformers."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.blip3o_models import dit_config, random_dit
from benchmarks.peers.lumina_reference import ReferenceLumina
from benchmarks.sampling_models import randomize, relative_error, stock_transformer
from clipflow.models.dits.sana import SanaTransformer
from clipflow.models.unilip.connector import Connector
from clipflow.models.unilip.published import unilip_1b_config, unilip_3b_config

CONFIGS = {"1b": unilip_1b_config, "3b": unilip_3b_config}
SIZES = pytest.mark.parametrize("size", CONFIGS)


@SIZES
@torch.no_grad()
def test_a_block_of_the_diffusion_transformer(size):
    """Error against diffusers in float64 at most twice that of diffusers in float32."""
    config = replace(CONFIGS[size]().dit, num_layers=1)
    stock = stock_transformer(config)
    randomize(stock)
    with torch.device("meta"):
        ours = SanaTransformer(config).eval()
    ours.load_state_dict(stock.state_dict(), assign=True)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, config.in_channels, 16, 16, generator=generator)
    hidden = torch.randn(2, 20, config.caption_channels, generator=generator)
    mask = torch.ones(2, 20)
    mask[0, :5] = 0
    times = torch.tensor([700, 700])
    found = ours(latents, times, hidden, mask)
    theirs = stock(latents, hidden, times, encoder_attention_mask=mask, return_dict=False)[0]
    exact = stock.double()(
        latents.double(), hidden.double(), times, encoder_attention_mask=mask, return_dict=False
    )[0]
    assert relative_error(found, exact) <= 2 * relative_error(theirs, exact)


@SIZES
@torch.no_grad()
def test_a_layer_of_the_connector(size):
    """The same against transformers' Qwen2 with a mask that hides nothing."""
    text = CONFIGS[size]().text
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
    )
    stock = Qwen2Model(config).eval()
    randomize(stock)
    ours = Connector(config, 1).eval()
    ours.load_state_dict({k: v for k, v in stock.state_dict().items() if "embed_tokens" not in k})
    hidden = torch.randn(2, 40, text.hidden_size, generator=torch.Generator().manual_seed(0))

    def run(model: Qwen2Model, given: torch.Tensor) -> torch.Tensor:
        seen = torch.zeros(2, 1, 40, 40, dtype=given.dtype)
        return model(inputs_embeds=given, attention_mask={"full_attention": seen}).last_hidden_state

    found, theirs = ours(hidden), run(stock, hidden)
    exact = run(stock.double(), hidden.double())
    assert relative_error(found, exact) <= 2 * relative_error(theirs, exact)


@torch.no_grad()
def test_a_block_of_the_transformer_of_blip3o():
    """The same against the reference's chain of plain ops: width 1792, feed-forward 4864."""
    ours = random_dit(dit_config("4b", blocks=1))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 1792, 8, 8, generator=generator)
    condition = torch.randn(2, 16, 2048, generator=generator)
    condition[0] = 0  # the null condition
    times = torch.tensor([966, 700])
    found, theirs = (
        ours(latents, times, condition),
        ReferenceLumina(ours)(latents, times, condition),
    )
    exact = ReferenceLumina(ours.double())(latents.double(), times, condition.double())
    assert relative_error(found, exact) <= 2 * relative_error(theirs, exact)
