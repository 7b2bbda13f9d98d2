"""The scenes BLIP3-o before training: what it takes over from the finished UniLIP-scenes."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clipflow.models.blip3o.qwen import plain_positions
from clipflow.scenes import draw_edit, random_scene, render_batch
from clipflow.scenes.tokenizer import make_blip3o_tokenizer, make_tokenizer
from clipflow.training.blip3o_scenes import untrained
from clipflow.training.inheritance import inherit_decoder
from clipflow.training.stages.distillation import Distillation
from clipflow.training.stages.naming import COLORS, FORMS
from clipflow.training.stages.query_lessons import cell_labels
from clipflow.training.stages.scene_data import SceneText, left_padded, normalize, pack
from clipflow.training.stages.seeing import first_layers
from clipflow.training.stages.target import drawn_channels, wanted_targets
from clipflow.training.teacher import load_teacher, picture_lessons, see


@pytest.fixture(scope="module")
def teacher():
    return load_teacher()


@pytest.fixture(scope="module")
def model():
    return untrained().eval()


@pytest.fixture(scope="module")
def text(model):
    return SceneText(model.config)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(5)
    return torch.from_numpy(render_batch([random_scene(rng) for _ in range(3)], rng))


def error(found, wanted):
    return ((found - wanted).square().mean() / wanted.var()).item()


@torch.no_grad()
def test_vision_tower_sees_as_the_teacher_without_positions(model, teacher, pictures):
    table = teacher.vision_tower.embeddings.position_embedding
    kept = table.clone()
    try:
        table[:, 1:] = table[:, 1:].mean(1, keepdim=True)
        wanted = teacher.encode_image(normalize(pictures, teacher.config))
    finally:
        table.copy_(kept)
    found = model.encode_image(normalize(pictures, model.config))
    assert error(found, wanted) < 0.05  # no class token, rotated queries, another GELU


@torch.no_grad()
def test_language_model_reads_text_as_the_teacher(model, teacher, text):
    words = "a red star on a sand background"
    ids = torch.tensor([text.ids(words)])
    teachers = torch.tensor([SceneText(teacher.config).ids(words)])
    found = model.read(model.embed_prompt(ids), torch.ones_like(ids))
    wanted = teacher.read(teacher.embed_prompt(teachers), torch.ones_like(ids))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_tokenizers_agree_on_the_words_of_the_world():
    ours, theirs = make_blip3o_tokenizer(), make_tokenizer()
    words = set(theirs.get_vocab()) - set(theirs.all_special_tokens)
    assert words < set(ours.get_vocab())
    prompt = "Please generate image based on the following caption: a red star"
    assert ours.unk_token_id not in ours(prompt)["input_ids"]


def test_positions_of_packed_rows_are_the_models(model, text):
    packed = pack([text.conversation([("what colour is the circle?", "red")])], text)
    ids = packed["input_ids"]
    wanted = model.positions(ids, torch.ones_like(ids), [(8, 8)])
    assert torch.equal(packed["position_ids"], wanted)


@torch.no_grad()
def test_first_layers_change_nothing_at_first(model, text):
    first, ids = first_layers(model, 1), torch.tensor([text.ids("a red star")])
    given = model.embed_prompt(ids)
    positions = plain_positions(torch.ones_like(ids))
    mask = {"full_attention": None}
    read = first(inputs_embeds=given, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(read.last_hidden_state, given)


@torch.no_grad()
def test_targets_are_drawn_by_the_teachers_decoder(model, teacher, pictures, tmp_path):
    pool = picture_lessons(teacher, 4, np.random.default_rng(0), tmp_path)
    again = picture_lessons(teacher, 4, np.random.default_rng(1), tmp_path)  # as cached
    assert all(torch.equal(a, b) for a, b in zip(pool, again, strict=True))
    targets = wanted_targets(pool, model.config.target)
    assert targets.shape == (4, *model.latent_shape) and drawn_channels(pool) == 64
    torch.testing.assert_close(see(teacher, pool.pictures)[1], pool.latents)
    decoder = inherit_decoder(teacher, model.config)
    assert decoder.native_size == 64
    drawn = decoder.draw(targets.float())
    torch.testing.assert_close(drawn, teacher.decode(pool.latents.float()), rtol=0, atol=1e-5)


@torch.no_grad()
def test_teachers_velocity_is_that_of_its_own_latents(teacher):
    teaching = Distillation(teacher)
    condition = teaching.condition(*teaching.rows(["a red star"], editing=False), None)
    latents, times = torch.randn(2, 16, 8, 8), torch.tensor([400, 1000])
    noisy = torch.cat([F.pixel_unshuffle(latents, 2), torch.randn(2, 32, 4, 4)], dim=1)
    found = teaching.velocity(noisy, times, condition)
    hidden, mask = (part.repeat_interleave(2, 0) for part in condition)
    wanted = teacher.dit(latents, times.clamp(max=999), hidden, mask)
    torch.testing.assert_close(F.pixel_shuffle(found, 2), wanted)


def test_cells_say_what_stands_after_an_edit():
    edit = draw_edit(np.random.default_rng(4), "recolor")
    labels = cell_labels(edit.after)
    for thing in edit.after.objects:
        assert labels[thing.cell].tolist() == [COLORS.index(thing.color), FORMS.index(thing.shape)]
    empty = [COLORS.index(edit.after.background), FORMS.index("background")]
    assert sum(row == empty for row in labels.tolist()) == 9 - len(edit.after.objects)


def test_left_padded_rows_keep_their_ids(text):
    ids, mask = left_padded([[5, 6, 7], [8]], text.pad)
    assert ids.tolist() == [[5, 6, 7], [text.pad, text.pad, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
