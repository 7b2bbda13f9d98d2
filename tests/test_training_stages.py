"""The stages of the scenes recipes: what their batches hold and what their losses mean."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clipflow.scenes import Scene, random_scene
from clipflow.scenes.world import SceneObject
from clipflow.training import blip3o_scenes, optim
from clipflow.training.recipe import Recipe, find_recipe
from clipflow.training.run import SCENES, SCENES_BLIP3O, stage_of
from clipflow.training.scenes_model import untrained
from clipflow.training.stages.alignment import Alignment
from clipflow.training.stages.drawn_pools import prompted_pool
from clipflow.training.stages.naming import COLORS, FORMS, Naming, QueryNaming
from clipflow.training.stages.reconstruction import moments, picture_loss
from clipflow.training.stages.scene_data import IGNORED, SceneText, pack, pixel_values
from clipflow.training.stages.understanding import answer_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return untrained(seed=3).eval()


@pytest.fixture(scope="module")
def text(model):
    return SceneText(model.config)


def small(name: str) -> Recipe:
    """The packaged recipe with the least data that it can run on."""
    recipe = Recipe.load(find_recipe(name))
    sizes = {key: 6 for key in ("pictures", "edits") if key in recipe.options}
    rows = {"queries": [2, 2]} if "queries" in recipe.options else {}
    return replace(recipe, batch_size=3, options={**recipe.options, **sizes, **rows})


@pytest.mark.parametrize("name", (*SCENES, *SCENES_BLIP3O))
class TestEveryRecipe:
    def started(self, name, tmp_path):
        make = untrained if name in SCENES else blip3o_scenes.untrained
        model, recipe = make(seed=3), small(name)
        trained = optim.select_trainable(model.train(), recipe.trainable)
        stage = stage_of(recipe)
        stage.setup(model, recipe, tmp_path, CPU)
        return stage, trained

    def test_trains_what_it_names(self, name, tmp_path):
        """The untrained model is frozen in places by its zeros, never in a whole part."""
        stage, trained = self.started(name, tmp_path)
        loss, metrics = stage.loss(stage.batch(0), 0)
        loss.backward()
        assert loss.isfinite() and metrics is not None
        moved = {n.split(".")[0] for n, p in trained.items() if p.grad is not None}
        assert moved == {n.split(".")[0] for n in trained}

    def test_a_batch_depends_on_its_step_alone(self, name, tmp_path):
        stage, _ = self.started(name, tmp_path)
        first, other, again = (flat(stage.batch(step)) for step in (4, 5, 4))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert any(
            a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, other, strict=True)
        )


def flat(batch) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch
    return [tensor for part in parts if part is not None for tensor in flat(part)]


class TestPackedConversations:
    ASKED = (("what colour is the circle?", "red"), ("is there a blue star?", "no"))

    def test_packed_loss_is_that_of_questions_one_by_one(self, model, text):
        rng = np.random.default_rng(0)
        pixels = pixel_values([random_scene(rng)], rng, model.config)
        with torch.no_grad():
            features = model.encode_image(pixels)
            packed = answer_loss(model, self.packed(text, self.ASKED), features, CPU)
            alone = [
                answer_loss(model, self.packed(text, [pair]), features, CPU) for pair in self.ASKED
            ]
        torch.testing.assert_close(packed, torch.stack(alone).mean(), rtol=1e-5, atol=1e-6)

    def test_only_answers_are_learned(self, text):
        labels = self.packed(text, self.ASKED)["labels"]
        said = text.ids("red<|im_end|>no<|im_end|>")
        assert labels[labels != IGNORED].tolist() == list(said)

    @staticmethod
    def packed(text, asked):
        return pack([text.conversation(asked)], text)


class TestNaming:
    SCENE = Scene("sand", (SceneObject("star", "blue", 2, (52, 12), 15),))

    def test_labels_stand_where_the_objects_are(self, model, text):
        labels = Naming(model, text).labels([self.SCENE]).view(8, 8, 2)
        star = (COLORS.index("blue"), FORMS.index("star"))
        rows, columns = np.nonzero((labels == torch.tensor(star)).all(-1).numpy())
        assert set(rows) == {0, 1, 2}
        assert set(columns) == {5, 6, 7}
        elsewhere = labels[3:].reshape(-1, 2).unique(dim=0).tolist()
        assert elsewhere == [[COLORS.index("sand"), FORMS.index("background")]]

    def test_places_grade_from_side_to_side(self, model, text):
        places = Naming(model, text).places().view(8, 8, 2, 2)
        torch.testing.assert_close(places.sum(-1), torch.ones(8, 8, 2))
        left, top = places[..., 0, 0], places[..., 1, 0]
        assert (left.diff(dim=1) < 0).all() and (left.diff(dim=0) == 0).all()
        assert (top.diff(dim=0) < 0).all() and (top.diff(dim=1) == 0).all()

    def test_loss_is_small_where_features_say_the_words(self, model, text):
        naming = Naming(model, text)
        labels = naming.labels([self.SCENE])
        words = model.lm_head.weight.detach()
        words = words / words.norm(dim=-1, keepdim=True)
        sharp = naming_model(words)
        pairs = words[naming.sides]  # "left", "right"; "top", "bottom"
        right = (
            words[naming.colors[labels[..., 0]]]
            + words[naming.forms[labels[..., 1]]]
            + (naming.places().log()[..., None] * pairs / 16).sum((1, 2))
        )
        losses = [
            naming.loss(sharp, features, labels)
            for features in (
                right,
                right - words[naming.forms[labels[..., 1]]],
                right - words[naming.colors[labels[..., 0]]],
                right - 2 * pairs[0, 0],
            )
        ]
        assert all(1.2 * losses[0] < wrong for wrong in losses[1:]), losses


class TestQueryNaming:
    def test_labels_are_the_words_and_nothing_after(self, model, text):
        labels = QueryNaming(model, text).labels(["a red star", None])
        assert labels.shape == (2, model.config.n_query)
        assert labels[0, :3].tolist() == list(text.ids("a red star"))
        assert (labels[0, 3:] == IGNORED).all() and (labels[1] == IGNORED).all()

    def test_loss_reads_the_last_positions(self, model, text):
        naming = QueryNaming(model, text)
        with pytest.raises(RuntimeError, match="must run before"):
            naming.loss(model, naming.labels(["a red star"]))
        hidden = torch.randn(1, 40, 128)
        naming._keep(model.llm_connector, (), hidden)
        labels = naming.labels(["a red star"])
        wanted = F.cross_entropy(model.head(hidden[0, -16:-13]), labels[0, :3])
        torch.testing.assert_close(naming.loss(model, labels), wanted)
        naming._keep(model.llm_connector, (), hidden)
        assert naming.loss(model, naming.labels([None])) == 0


def naming_model(words):
    """Only the head of a model."""

    class Head:
        @staticmethod
        def head(features):
            return 2 * F.linear(features, words)

    return Head


class TestReconstructionLosses:
    def test_picture_loss(self):
        wanted = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        loss, mse = picture_loss(wanted, wanted)
        assert loss == 0 and mse == 0
        loss, mse = picture_loss(wanted + 0.5, wanted)
        torch.testing.assert_close(mse, torch.tensor(0.25))  # no edge differs
        torch.testing.assert_close(loss, torch.tensor(0.25 + 0.5 * 0.5))

    def test_moments_are_zero_for_standardized_latents(self):
        latents = torch.randn(4, 5, 6, 6, generator=torch.Generator().manual_seed(0))
        mean = latents.mean(dim=(0, 2, 3), keepdim=True)
        standard = (latents - mean) / latents.std(dim=(0, 2, 3), keepdim=True)
        assert moments(standard) < 1e-10
        torch.testing.assert_close(moments(standard + 2), torch.tensor(4.0))


class TestGeneration:
    def test_pool_holds_what_the_model_encodes(self, model):
        tags = {"colors": 1.0, "position": 2.0}
        pool = prompted_pool(model, np.random.default_rng(1), 5, tags, CPU)
        assert len(pool.texts) == 5 and pool.features is None
        with torch.no_grad():
            latents = model.clip_down(pool.targets.float()) * model.config.unilip_factor
        torch.testing.assert_close(pool.latents, latents, rtol=0, atol=2e-2)  # targets are halves

    def test_alignment_is_zero_where_the_block_says_the_features(self, model):
        dit, features = model.dit, torch.randn(6, 64, 128)
        aligned = Alignment(dit, 2, features)
        with pytest.raises(RuntimeError, match="must run before"):
            aligned.loss(features)
        wanted = (features - aligned.mean) / aligned.std
        aligned._keep(dit, (wanted @ torch.linalg.pinv(aligned.projection).T,))
        assert aligned.loss(features).abs() < 1e-5

    def test_alignment_reads_what_its_block_hands_on(self, model):
        dit = model.dit
        latents, condition = torch.randn(2, 16, 8, 8), torch.randn(2, 5, 128)
        aligned = Alignment(dit, dit.config.num_layers - 1, torch.randn(2, 64, 128))
        dit(latents, torch.tensor([3, 500]), condition)
        assert aligned.loss(torch.randn(2, 64, 128)).requires_grad
