"""BLIP3o-NEXT's image tokens: drawn as transformers would, read once, the same in any batch."""

import copy
import dataclasses

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from clipflow.errors import InputError, ShapeError
from clipflow.models.blip3o_next import BLIP3oNextModel, image_tokens
from clipflow.models.blip3o_next.image_tokens import TokenDraw, draw_image_tokens
from clipflow.models.blip3o_next.loading import materialize_rotary
from clipflow.models.blip3o_next.token_steps import FixedSteps
from clipflow.models.language.kept_keys import KeptKeys
from clipflow.models.language.layers import rope_table
from clipflow.models.language.token_sampling import TokenSampling, row_dice
from clipflow.testing import next_config
from clipflow.testing.random_weights import RandomWeights

COUNT = 12
GREEDY = TokenSampling()


def random_model(*, tied=True):
    config = dataclasses.replace(next_config("tiny", tied=tied), tokens_per_image=COUNT)
    model, weights = BLIP3oNextModel(config), RandomWeights(0)
    state = {n: weights.tensor(n, tuple(t.shape), t.dtype) for n, t in model.state_dict().items()}
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model():
    return random_model()


def prompt(model, *words):
    """Ids of a prompt that begins with `words` and ends as B.4 says."""
    tokens = model.config.tokens
    return [*words, tokens.image_start, tokens.scale]


def rows(model, *prompts, side="left"):
    """(ids, mask) of prompts, padded on one side."""
    width, pad = max(map(len, prompts)), model.config.tokens.pad
    ids, mask = [], []
    for one in prompts:
        fill = [pad] * (width - len(one))
        ids.append(fill + one if side == "left" else one + fill)
        real = [1] * len(one)
        mask.append([0] * len(fill) + real if side == "left" else real + [0] * len(fill))
    return torch.tensor(ids), torch.tensor(mask)


def draw(model, ids, mask, *, sampling=GREEDY, seed=0, **more):
    dice = row_dice([torch.Generator().manual_seed(seed + i) for i in range(len(ids))], len(ids))
    given = {"sampling": sampling, "dice": dice, "count": COUNT}
    return draw_image_tokens(model, ids, mask, TokenDraw(**given | more))


def states_of(model, ids):
    """Final states of transformers' own forward over all of `ids`."""
    return model.language_model(input_ids=ids, use_cache=False).last_hidden_state


def plain_draw(model, ids, first, count):
    """Greedy tokens of forwards over everything so far, of `count` from `first` on."""
    for _ in range(COUNT):
        logits = model.head(states_of(model, ids)[:, -1])[:, first : first + count]
        ids = torch.cat([ids, first + logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("any_token", [False, True])
def test_greedy_tokens_are_those_of_plain_forwards(model, any_token):
    tokens = model.config.tokens
    ids, mask = rows(model, prompt(model, 3, 1, 4, 1, 5))
    first, count = (0, model.config.text.vocab_size) if any_token else (310, 64)
    assert (tokens.first_image, tokens.image_count) == (310, 64)
    with torch.no_grad():
        wanted = plain_draw(model, ids, first, count)
    found = draw(model, ids, mask, allow_any_token=any_token)
    assert torch.equal(torch.cat([ids, found.tokens], dim=1), wanted)


@torch.no_grad()
def test_kept_states_are_those_of_a_second_forward(model):
    """The reference reads prompt and tokens again: the same, with one step more for the last."""
    ids, mask = rows(model, prompt(model, 3, 1, 4, 1, 5))
    found = draw(model, ids, mask, sampling=TokenSampling(temperature=1.0))
    again = states_of(model, torch.cat([ids, found.tokens], dim=1))
    assert found.hidden.shape == (1, 1 + COUNT, 64) and bool(found.mask.all())
    torch.testing.assert_close(found.hidden, again[:, 6:], atol=2e-6, rtol=2e-5)
    condition = model.encode_condition(ids, mask, temperature=0)
    greedy = draw(model, ids, mask)
    torch.testing.assert_close(condition.hidden, model.diffusion_connector(greedy.hidden))


def test_only_image_tokens_unless_any_is_allowed(model):
    ids, mask = rows(model, *(prompt(model, word) for word in range(20)))
    hot = TokenSampling(temperature=5.0)
    tokens = model.config.tokens
    drawn = draw(model, ids, mask, sampling=hot).tokens
    assert ((drawn >= 310) & (drawn < 310 + tokens.image_count)).all()
    drawn = draw(model, ids, mask, sampling=hot, allow_any_token=True).tokens
    assert (drawn < 310).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_what_it_is_alone(model, side):
    prompts = [prompt(model, 7, 8, 9, 10, 11, 12), prompt(model, 5), prompt(model, 3, 1, 4)]
    ids, mask = rows(model, *prompts, side=side)
    sampling = TokenSampling(temperature=1.0, top_p=0.95, top_k=50)
    together = draw(model, ids, mask, sampling=sampling)
    for row, one in enumerate(prompts):
        alone = draw(model, *rows(model, one), sampling=sampling, seed=row)
        assert torch.equal(together.tokens[row], alone.tokens[0])
        torch.testing.assert_close(together.hidden[row], alone.hidden[0], atol=2e-6, rtol=2e-5)


@torch.no_grad()
def test_generators(model):
    ids, mask = rows(model, prompt(model, 1, 2), prompt(model, 1, 2))

    def condition(*seeds):
        dice = [torch.Generator().manual_seed(seed) for seed in seeds]
        return model.encode_condition(ids, mask, generators=dice).hidden

    same = condition(1, 1)
    assert torch.equal(same[0], same[1])
    other = condition(1, 2)
    torch.testing.assert_close(other[0], same[0])
    assert not torch.allclose(other[1], same[1])
    one = model.encode_condition(ids, mask, generators=torch.Generator().manual_seed(3)).hidden
    assert not torch.allclose(one[0], one[1])
    with pytest.raises(InputError, match="list of 2"):
        condition(1, 2, 3)


def test_a_step_is_one_program(model):
    """What a CUDA graph would replay, traced once: nothing on the host decides about a step."""
    ids, mask = rows(model, prompt(model, 7, 8, 9), prompt(model, 5))
    found = draw(model, ids, mask, sampling=TokenSampling(temperature=1.0))
    ids = ids.gather(1, mask.argsort(dim=-1, descending=True, stable=True))
    lm, T = model.language_model, ids.shape[1]
    table = rope_table(lm.rotary_emb, torch.arange(T + COUNT))
    kept = KeptKeys(lm)
    with torch.no_grad():
        prompts = tuple(part[:T] for part in table)
        kept.begin(lm.embed_tokens(ids), prompts, room=COUNT, lengths=mask.sum(-1))
        steps = FixedSteps(model, kept, table, any_token=False)
        traced = make_fx(lambda: steps._write(0))()
        kept.lengths.copy_(mask.sum(-1))
        called = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
        assert not [name for name in called if "local_scalar" in name or "nonzero" in name]
        for place in range(COUNT):
            steps._tokens.copy_(found.tokens[:, place])
            traced()
            wanted = found.hidden[:, 1 + place]
            torch.testing.assert_close(steps._states, wanted, atol=2e-6, rtol=2e-5)
    wanted = model.image_logits(found.hidden[:, -1])
    torch.testing.assert_close(steps._logits, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("any_token", [False, True])
def test_steps_of_one_kind_draw_the_same(model, any_token, monkeypatch):
    ids, mask = rows(model, prompt(model, 7, 8, 9), prompt(model, 5))
    sampling = TokenSampling(temperature=1.0, top_k=50)
    wanted = draw(model, ids, mask, sampling=sampling, allow_any_token=any_token)
    monkeypatch.setattr(image_tokens, "takes_fixed_steps", lambda device: True)
    found = draw(model, ids, mask, sampling=sampling, allow_any_token=any_token)
    assert torch.equal(found.tokens, wanted.tokens) and torch.equal(found.mask, wanted.mask)
    torch.testing.assert_close(found.hidden, wanted.hidden, atol=2e-6, rtol=2e-5)


@torch.no_grad()
def test_bfloat16(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    materialize_rotary(half)
    ids, mask = rows(model, prompt(model, 7, 8, 9), prompt(model, 5))
    found = draw(half, ids, mask, sampling=TokenSampling(temperature=1.0))
    assert found.hidden.dtype == torch.bfloat16
    for row, length in enumerate(mask.sum(-1).tolist()):
        whole = torch.cat([ids[row, -length:], found.tokens[row]])[None]
        wanted = states_of(model, whole)[0, length - 1 :]
        error = (found.hidden[row].float() - wanted).norm() / wanted.norm()
        assert error < 2e-2
    assert half.encode_condition(ids, mask).hidden.dtype == torch.bfloat16


def test_progress(model):
    steps = []
    model.encode_condition(*rows(model, prompt(model, 1)), progress=steps.append)
    assert steps == [1] * COUNT


def test_a_token_that_ends_a_text_ends_its_row_alone():
    """A head that ends each row where the state says: rows of several lengths."""
    model = random_model(tied=False)
    (end,) = model.config.tokens.eos
    ids, mask = rows(model, *(prompt(model, word) for word in range(8)))
    free = draw(model, ids, mask, allow_any_token=True)
    # The end is what looks most like the state after 3 tokens of the first row.
    with torch.no_grad():
        direction = free.hidden[0, 3]
        model.lm_head.weight[end] = 3 * direction / direction.norm()
    found = draw(model, ids, mask, allow_any_token=True)
    lengths = found.mask.sum(-1)
    ended = (found.tokens == end).any(-1)
    assert bool(ended[0]) and len(set(lengths.tolist())) > 1
    close = {"rtol": 2e-5, "atol": 2e-6}
    for row in range(len(ids)):
        n = int(lengths[row]) - 1  # <S0> is selected, too
        assert (found.tokens[row, :n] == end).sum() == int(ended[row])
        alone = draw(model, ids[row : row + 1], mask[row : row + 1], allow_any_token=True)
        assert torch.equal(alone.tokens[0, :n], found.tokens[row, :n])
        torch.testing.assert_close(
            alone.hidden[0], found.hidden[row, : n + 1], rtol=2e-5, atol=2e-6
        )
        again = states_of(model, torch.cat([ids[row], alone.tokens[0]])[None])
        torch.testing.assert_close(alone.hidden, again[:, 2:], **close)


@torch.no_grad()
def test_the_null_condition(model):
    assert model.null_condition().shape == (1, 48)
    zeros = model.diffusion_connector(torch.zeros(730, 64))
    torch.testing.assert_close(model.null_condition().expand(730, -1), zeros)


def test_logits_of_image_tokens_are_part_of_all(model):
    states = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.image_logits(states), model.head(states)[:, 310:374])


def test_refusals(model):
    ids, mask = rows(model, prompt(model, 1), [1, 2, 3])
    with pytest.raises(ShapeError, match=r"<im_start>\), got none in rows \[1\]"):
        model.encode_condition(ids, mask)
    with pytest.raises(InputError, match="TA-Tok"):
        model.encode_image(torch.zeros(1, 3, 8, 8))
