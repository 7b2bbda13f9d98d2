"""Memory: estimates equal what is held, what cannot fit is refused, offloading changes no bit."""

import json
import threading

import pytest
import torch
from peak_memory import can_reset_its_peak, measured_by
from tiny_pipeline import tiny_pipeline

from clipflow import CLIPFlowPipeline
from clipflow.cli.main import main
from clipflow.errors import InputError, NotEnoughMemory
from clipflow.models.dc_ae import decoder as dc_ae_decoder
from clipflow.models.dc_ae.memory import decode_bytes
from clipflow.pipelines import offload as offloading
from clipflow.pipelines import placement
from clipflow.pipelines.families.unilip import FAMILY
from clipflow.pipelines.model_folders import find_model
from clipflow.pipelines.offload import CPU, DECODER, LANGUAGE
from clipflow.sampling import FirstBlockCache, memory

GPU = torch.device("cuda", 0)
PROMPT, QUESTION = "a red circle", "what color is the star?"


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.fixture
def picture():
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))


def prompt_tokens(pipe, text=PROMPT):
    return len(pipe.prompts.ids(pipe.prompts.text_to_image(text)))


# Estimates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_parameters(pipe, dtype, tmp_path):
    pipe.save_pretrained(tmp_path)
    pipe.to(dtype)
    estimate = CLIPFlowPipeline.memory_estimate(tmp_path, dtype=dtype)
    assert estimate == pipe.memory_estimate(), "a folder and its pipeline need the same"
    assert estimate.total_weights == sum(p.nbytes for p in pipe.model.parameters())
    assert estimate.weights["DiT"] == sum(p.nbytes for p in pipe.model.dit.parameters())
    resting = [p for group in pipe.offload.groups for p in pipe.offload._tensors(group)]
    queries = pipe.model.latent_queries.nbytes
    buffers = [b for part in ("language_model", "llm_connector")
               for b in getattr(pipe.model, part).buffers()]  # fmt: skip
    held = sum(t.nbytes for t in resting) - sum(b.nbytes for b in buffers) + queries
    assert estimate.resting_weights == held


CALLS = [
    {},
    {"tier": "fast"},
    {"step_cache": FirstBlockCache()},
    {"guidance_scale": 1.0, "num_inference_steps": 2},
    {"solver": "heun", "num_images": 3, "tier": "fast"},
    {"solver": "euler", "height": 32, "width": 96, "num_images": 2, "num_prompts": 2},
]


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_is_as_large_as_estimated(pipe, call, dtype):
    pipe.to(dtype)
    call = {"num_inference_steps": 3, **call}
    estimate = pipe.memory_estimate(prompt_tokens=prompt_tokens(pipe), **call)
    options = dict(call)
    prompts = options.pop("num_prompts", 1)
    options["num_images_per_prompt"] = options.pop("num_images", 1) // prompts
    pipe(["a red circle", "a red square"][:prompts], output_type="latent", **options)
    (plan,) = pipe.plans.plans()
    scalars = 64 if "step_cache" in call else 0
    assert 0 <= plan.nbytes - (estimate.plan + estimate.quantized_weights) <= scalars
    assert bool(estimate.quantized_weights) == (call.get("tier") == "fast")


def test_conditions_of_edits_are_as_large_as_estimated(pipe, picture):
    text = "remove the star"
    written = pipe.prompts.edit(text)
    tokens = len(pipe.prompts.ids(written)) - pipe.model.config.latent_side**2
    estimate = pipe.memory_estimate(edit=True, prompt_tokens=tokens, num_inference_steps=1)
    pipe.edit(picture, text, num_inference_steps=1, output_type="latent")
    held = pipe.condition_cache.statistics().bytes
    assert held <= estimate.conditions < 1.2 * held, "the null prompt is shorter"
    assert estimate.plan == pipe.plans.nbytes


def test_the_peak_is_made_of_its_parts(pipe):
    estimate = pipe.memory_estimate(tier="fast")
    assert list(estimate.weights) == list(FAMILY.shown_parts)
    whole = estimate.total_weights + estimate.kept
    stages = (estimate.language, estimate.sampling, estimate.decode)
    assert estimate.peak == whole + max(stages)
    assert estimate.weights["DiT"] < estimate.peak_with_offload < estimate.peak
    assert json.loads(json.dumps(estimate.as_dict()))["peak"] == estimate.peak
    lines = str(estimate).splitlines()
    assert lines[-2] == f"peak                    {estimate.peak / 2**20:>11,.1f} MiB"
    larger = pipe.memory_estimate(num_images=4, height=128, width=128)
    assert larger.plan > 4 * pipe.memory_estimate().plan
    assert larger.decode > estimate.decode


BAD = {
    "num_images": ({"num_images": 0}, "num_images"),
    "prompts": ({"num_images": 3, "num_prompts": 2}, "multiple of num_prompts 2, got 3"),
    "height": ({"height": 12, "width": 8}, "height must be a multiple"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps"),
    "guidance": ({"guidance_scale": -1.0}, "guidance_scale"),
    "solver": ({"solver": "ddim"}, "solver must be one of"),
    "tier": ({"tier": "quick"}, "tier must be one of"),
    "tokens": ({"prompt_tokens": 0}, "prompt_tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_of_an_estimate_are_refused(pipe, case):
    options, message = BAD[case]
    with pytest.raises(InputError, match=message):
        pipe.memory_estimate(**options)
    with pytest.raises(InputError, match=message):
        CLIPFlowPipeline.memory_estimate("scenes", **options)


# What does not fit


def test_weights_that_do_not_fit_are_not_read(monkeypatch, tmp_path, capsys):
    needed = CLIPFlowPipeline.memory_estimate("scenes").total_weights
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed - 1)
    monkeypatch.setattr("clipflow.pipelines.parts.load_model", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(NotEnoughMemory, match=r"loading scenes needs 0\.02 GiB on cpu, and 0\.02"):
        CLIPFlowPipeline.from_pretrained("scenes")
    assert main(["generate", "a star", "-o", str(tmp_path / "a.png"), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("clipflow: error: loading scenes needs 0.02 GiB")


def place(monkeypatch, mode, gpu, cpu=2**50, device=GPU):
    free = {"cuda": gpu, "cpu": cpu}
    for module in (memory, placement):
        monkeypatch.setattr(module, "available_bytes", lambda device: free[device.type])
    folder = find_model("scenes")
    return placement.should_offload(folder, device, torch.float32, "faithful", mode)


def test_auto_offloads_what_fits_only_so(monkeypatch):
    estimate = CLIPFlowPipeline.memory_estimate("scenes", device="cuda")
    weights = estimate.total_weights
    assert place(monkeypatch, "auto", estimate.peak) is False
    assert place(monkeypatch, "auto", estimate.peak - 1) is True
    assert place(monkeypatch, "auto", estimate.peak_with_offload) is True
    assert place(monkeypatch, "auto", estimate.peak_with_offload - 1) is False
    assert place(monkeypatch, "auto", 2**50, device=CPU) is False
    assert place(monkeypatch, "never", weights) is False
    assert place(monkeypatch, "always", 2**50) is True
    for mode, gpu, cpu in [
        ("auto", weights - 1, 2**50),
        ("never", weights - 1, 2**50),
        ("always", estimate.weights["DiT"] - 1, 2**50),
        ("always", 2**50, estimate.resting_weights - 1),
    ]:
        with pytest.raises(NotEnoughMemory, match="loading scenes needs"):
            place(monkeypatch, mode, gpu, cpu)


def test_decoding_takes_smaller_parts_before_it_is_refused(pipe, monkeypatch):
    latents = torch.randn(3, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    decoder = pipe.model.vae_decoder
    whole = pipe.model.config.decoder
    with torch.no_grad():
        wanted = decoder.decode(latents)
        for rows, tile in [(3, None), (1, None), (1, 64)]:
            needed = decode_bytes(whole, 16, 16, rows, tile_size=tile)
            needed += (3 - rows) * 3 * 128 * 128 * 4
            for module in (memory, dc_ae_decoder):
                monkeypatch.setattr(module, "available_bytes", lambda device, n=needed: n)
            assert decoder._parts(latents) == (rows, tile)
            torch.testing.assert_close(decoder.decode(latents), wanted, atol=1e-4, rtol=1e-4)
        for module in (memory, dc_ae_decoder):
            monkeypatch.setattr(module, "available_bytes", lambda device: 2**20)
        monkeypatch.setattr(decoder, "_draw_tiled", lambda *_: pytest.fail("allocated"))
        with pytest.raises(NotEnoughMemory, match="drawing 3 pictures of 128 x 128 pixels needs"):
            decoder.decode(latents)


def test_bad_places_are_refused(pipe):
    with pytest.raises(InputError, match="offload must be one of auto, never, always"):
        CLIPFlowPipeline.from_pretrained("scenes", offload="sometimes")
    with pytest.raises(InputError, match="other than the CPU"):
        CLIPFlowPipeline.from_pretrained("scenes", offload="always")
    with pytest.raises(InputError, match="other than the CPU, got 'cpu'"):
        pipe.enable_model_cpu_offload("cpu")


# Offloading; the CPU plays the device, too: on it the values are negated, so that a part that runs
# where it rests is found out by its results.


class Device:
    """Moves to a device that holds -x for x, and counts the bytes."""

    def __init__(self, pipe, monkeypatch):
        self.moves, self.pipe = [], pipe
        for group in pipe.offload.groups:
            for tensor in pipe.offload._tensors(group):
                tensor.data = -tensor.data
        pipe.offload.enable(CPU)
        monkeypatch.setattr(offloading, "moved", self.move)

    def move(self, tensor, device):
        self.moves.append(tensor.nbytes)
        return -tensor.detach()

    def brought(self):
        """Names of the groups brought since the last time."""
        groups = self.pipe.offload.groups
        sizes = {g: [t.nbytes for t in self.pipe.offload._tensors(g)] for g in groups}
        found, moves = [], self.moves
        while moves:
            group = next(g for g in groups if moves[: len(sizes[g])] == sizes[g])
            found.append(group)
            moves = moves[len(sizes[group]) :]
        self.moves = []
        return found


def calls(pipe, picture, generator=None):
    options = {"num_inference_steps": 2, "output_type": "pt", "generator": [generator or dice()]}
    return [
        pipe(PROMPT, **options).images,
        pipe.edit(picture, "remove it", **{**options, "generator": [dice()]}).images,
        pipe.reconstruct(picture, output_type="pt").images,
        pipe.ask(picture, QUESTION, max_new_tokens=3),
        "".join(pipe.ask(picture, QUESTION, max_new_tokens=3, stream=True)),
        pipe.classify(picture, ["a red star", "a ring"]),
    ]


def dice():
    return torch.Generator().manual_seed(3)


def equal(first, second):
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_offloading_changes_no_bit_and_brings_each_part_where_it_runs(pipe, picture, monkeypatch):
    wanted = calls(pipe, picture)
    state = {name: -t for name, t in pipe.model.state_dict().items()}
    device = Device(pipe, monkeypatch)
    pipe.condition_cache.clear()
    assert all(map(equal, calls(pipe, picture), wanted))
    assert device.brought() == [
        LANGUAGE, DECODER,  # a picture
        LANGUAGE, DECODER,  # an edit
        LANGUAGE, DECODER,  # a reconstruction
        LANGUAGE,  # an answer
        LANGUAGE, LANGUAGE,  # the prompt of one that is streamed, and the answer
        LANGUAGE,  # labels
    ]  # fmt: skip
    after = pipe.model.state_dict()
    for name in state:
        at_rest = not name.startswith(("dit.", "latent_queries"))
        assert torch.equal(after[name], state[name] if at_rest else -state[name]), name
    pipe(PROMPT, num_inference_steps=1, output_type="latent")
    assert device.brought() == []


def test_conditions_and_plans_outlive_the_moves(pipe, monkeypatch):
    device = Device(pipe, monkeypatch)
    first = pipe(PROMPT, num_inference_steps=2, generator=dice(), output_type="pt").images
    (plan,) = pipe.plans.plans()
    assert device.brought() == [LANGUAGE, DECODER]
    again = pipe(PROMPT, num_inference_steps=2, generator=dice(), output_type="pt").images
    assert torch.equal(first, again)
    assert device.brought() == [DECODER] and pipe.plans.plans() == [plan]
    statistics = pipe.condition_cache.statistics()
    assert (statistics.hits, statistics.misses) == (2, 2)
    with pipe.offload.running(LANGUAGE):  # another thread's
        pipe.conditions.text_to_image([PROMPT])
    assert pipe.condition_cache.statistics().misses == 2
    assert pipe.device == CPU and pipe.dtype == torch.float32


def test_enabling_forgets_nothing(pipe):
    before = pipe.conditions.text_to_image([PROMPT])[0]
    with pipe.conditions.kept():
        for part in (pipe.model.language_model, pipe.model.llm_connector):
            for parameter in part.parameters():
                parameter.data = parameter.data.clone()
    assert pipe.conditions.text_to_image([PROMPT])[0] is before


def test_other_weights_are_noticed_while_offloaded(pipe, monkeypatch):
    Device(pipe, monkeypatch)
    before = pipe.conditions.text_to_image([PROMPT])[0]
    weight = pipe.model.projector.weight
    with torch.no_grad():
        weight.mul_(2)
    changed = pipe.conditions.text_to_image([PROMPT])[0]
    assert not torch.equal(changed, before)
    home = weight.data_ptr()
    monkeypatch.setattr(offloading, "moved", lambda tensor, device: tensor.detach().clone())
    with pipe.offload.running(LANGUAGE), torch.no_grad():
        weight.fill_(0.5)  # on the device
    assert weight.data_ptr() == home and bool((weight == 0.5).all())
    assert not torch.equal(pipe.conditions.text_to_image([PROMPT])[0], changed)


def test_threads_share_what_is_brought(pipe, monkeypatch):
    wanted = pipe(PROMPT, num_inference_steps=2, generator=dice(), output_type="pt").images
    Device(pipe, monkeypatch)
    found, barrier = [], threading.Barrier(4)

    def work():
        barrier.wait()
        for _ in range(3):
            pipe.condition_cache.clear()
            picture = pipe(PROMPT, num_inference_steps=2, generator=dice(), output_type="pt")
            found.append(torch.equal(picture.images, wanted))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 12 and not pipe.offload._away


def test_a_part_that_has_no_room_or_fails_goes_back_to_rest(pipe, picture, monkeypatch):
    wanted = pipe.ask(picture, QUESTION, max_new_tokens=2)
    device = Device(pipe, monkeypatch)
    homes = {name: p.data_ptr() for name, p in pipe.model.named_parameters()}
    monkeypatch.setattr(offloading, "require_bytes", refuse)
    with pytest.raises(NotEnoughMemory, match="the language part"):
        pipe.ask(picture, QUESTION)
    monkeypatch.undo()

    def move(tensor, device_):
        if len(device.moves) == 5:
            raise torch.OutOfMemoryError("no memory")
        return device.move(tensor, device_)

    device.moves = []
    monkeypatch.setattr(offloading, "moved", move)
    with pytest.raises(torch.OutOfMemoryError):
        pipe.ask(picture, QUESTION)
    assert homes == {name: p.data_ptr() for name, p in pipe.model.named_parameters()}
    monkeypatch.setattr(offloading, "moved", device.move)
    assert pipe.ask(picture, QUESTION, max_new_tokens=2) == wanted
    assert homes == {name: p.data_ptr() for name, p in pipe.model.named_parameters()}


def refuse(needed, device, what):
    raise NotEnoughMemory(what)


def test_a_running_part_keeps_the_pipeline_where_it_is(pipe, picture, monkeypatch):
    Device(pipe, monkeypatch)
    answer = pipe.ask(picture, QUESTION, max_new_tokens=4, stream=True)
    if next(answer, None) is not None:
        with pytest.raises(InputError, match="while its language part runs"):
            pipe.to(torch.bfloat16)
    answer.close()
    with pipe.offload.running(DECODER), pytest.raises(InputError, match="decoder part runs"):
        pipe.to("cpu")
    pipe.to(torch.bfloat16)
    assert pipe.offload.device == CPU and pipe.dtype == torch.bfloat16
    pipe.to("cpu")
    assert pipe.offload.device is None


# Truth


@pytest.mark.skipif(not can_reset_its_peak(), reason="the system tells no peak of a process")
def test_a_call_takes_what_is_estimated():
    ratios = measured_by("peak_of_a_call.py")
    assert 0.6 < ratios["sample"] < 1.3 and 0.6 < ratios["all"] < 1.3, ratios
