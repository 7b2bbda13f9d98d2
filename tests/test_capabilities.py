"""Every cell of the README's table of capabilities is run: a yes works, a no says why."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipflow import CLIPFlowPipeline, FeatureDecoding
from clipflow.errors import InputError
from clipflow.testing import write_blip3o_folder, write_blip3o_next_folder, write_unilip_folder

README = Path(__file__).resolve().parents[1] / "README.md"
WRITERS = {
    "UniLIP": write_unilip_folder,
    "BLIP3-o": write_blip3o_folder,
    "BLIP3o-NEXT": write_blip3o_next_folder,
}
PICTURE = Image.new("RGB", (60, 50), (200, 30, 30))
QUICK = {"num_inference_steps": 2, "output_type": "latent"}


def understand(pipe):
    assert isinstance(pipe.ask(PICTURE, "What is it?", max_new_tokens=2), str)
    said = [{"role": "user", "content": "Hello"}]
    assert "".join(pipe.chat(said, max_new_tokens=2, stream=True)) == pipe.chat(
        said, max_new_tokens=2
    )


def classify(pipe):
    ranking = pipe.classify(PICTURE, ["a fox", "a cat"])
    assert {label for label, _ in ranking} == {"a fox", "a cat"}
    assert sum(chance for _, chance in ranking) == pytest.approx(1)


def generate(pipe):
    seed = torch.Generator().manual_seed(0)
    (latents,) = pipe("a fox", generator=seed, **QUICK).images
    assert latents.isfinite().all() and latents.std() > 0


def edit(pipe):
    if pipe.family.name == "BLIP3-o":
        with pytest.raises(InputError, match=r"edit: .* not to edit"):
            pipe.edit(PICTURE, "make it night")
        object.__setattr__(pipe.model.config, "edits", True)
    pair = [pipe.edit(PICTURE, text, **seeded()).images for text in ("at night", "by day")]
    assert not torch.equal(*pair), "the instruction counts"


def seeded():
    return {"generator": torch.Generator().manual_seed(0), **QUICK}


def reconstruct(pipe):
    other = Image.new("RGB", (50, 60), (10, 200, 30))
    pair = [pipe.reconstruct(one, output_type="latent").images for one in (PICTURE, other)]
    assert pair[0].isfinite().all() and not torch.equal(*pair), "the picture counts"


CALLS = {
    "understand": (understand, "ask"),
    "classify": (classify, "classify"),
    "generate": (generate, "__call__"),
    "edit": (edit, "edit"),
    "reconstruct": (reconstruct, "reconstruct"),
}


def cells():
    """(family, row, what the table says)."""
    table = README.read_text().split("<!-- capabilities")[1].split("\n\n")[1].splitlines()
    families = [name.strip() for name in table[0].strip("|").split("|")][1:]
    for line in table[2:]:
        title, *said = (cell.strip() for cell in line.strip("|").split("|"))
        row = re.match(r"\w+", title)[0]
        for family, cell in zip(families, said, strict=True):
            yield pytest.param(family, row, cell, id=f"{family}-{row}")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            folder = WRITERS[family](tmp_path_factory.mktemp("models") / "model")
            made[family] = CLIPFlowPipeline.from_pretrained(folder)
            made[family].set_progress_bar_config(disable=True)
        return made[family]

    return of


def test_the_table_has_all_families_and_calls():
    found = {(cell.values[0], cell.values[1]) for cell in cells()}
    assert found == {(family, row) for family in WRITERS for row in CALLS}


@pytest.mark.parametrize(("family", "row", "said"), list(cells()))
def test_a_cell(pipelines, family, row, said):
    pipe, (run, call) = pipelines(family), CALLS[row]
    if said.startswith("yes"):
        run(pipe)
        return
    assert said.startswith("no: "), said
    reason = pipe.family.cannot(call, pipe.model)
    assert reason and len(reason) > 20
    with pytest.raises(InputError, match=re.escape(reason)):
        run(pipe)


def test_pixels_of_the_diffusion_decoder(pipelines):
    pipe = pipelines("BLIP3-o")
    decoding = FeatureDecoding(num_inference_steps=2)
    size = {"height": 64, "width": 48, "decoding": decoding, "num_inference_steps": 2}
    assert pipe("a fox", **size).images[0].size == (48, 64)
