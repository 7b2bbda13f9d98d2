"""Which backend a call takes, and what is said when it cannot."""

import os
import subprocess
import sys

import pytest
import torch

import clipflow
from clipflow import extension, ops, registry
from clipflow.errors import BackendUnavailable

X, SHIFT, SCALE = torch.ones(1, 2, 8), torch.ones(1, 8), torch.ones(1, 8)


def test_auto_takes_the_first_willing_backend_of_the_order():
    for op in ops.all_ops():
        willing = [name for name in op.order if op.refusal(X, name) is None]
        assert op.select(X, "auto") == willing[0]
        assert set(op.order) == set(op.backends)
        assert willing[-1] == "eager"


def test_eager_runs_where_nothing_is_compiled_for():
    assert registry.explain("adaln_norm", X.to("meta")).chosen == "eager"


def test_a_named_backend_never_falls_back():
    with pytest.raises(BackendUnavailable, match="adaln_norm: backend 'triton' needs a CUDA"):
        ops.adaln_norm(X, SHIFT, SCALE, backend="triton")
    weight = ops.quantize_weight(torch.randn(3, 8))
    with pytest.raises(BackendUnavailable, match=r"quantized_linear: .* 'triton' is not one of"):
        ops.quantized_linear(X, weight, backend="triton")


def test_use_backend_holds_within_its_block_and_nests():
    before = registry.explain("adaln_norm", X).chosen
    with clipflow.use_backend("eager"):
        assert registry.explain("adaln_norm", X).chosen == "eager"
        with clipflow.use_backend("auto"):
            assert registry.explain("adaln_norm", X).chosen == before
        with clipflow.use_backend("triton"), pytest.raises(BackendUnavailable):
            ops.adaln_norm(X, SHIFT, SCALE)
        assert registry.explain("adaln_norm", X).chosen == "eager"
    assert registry.explain("adaln_norm", X).chosen == before


def test_use_backend_ends_when_its_block_raises():
    before = registry.explain("adaln_norm", X).chosen
    with pytest.raises(RuntimeError, match="inside"), clipflow.use_backend("eager"):
        raise RuntimeError("inside")
    assert registry.explain("adaln_norm", X).chosen == before


def test_the_argument_goes_before_use_backend():
    with clipflow.use_backend("triton"):
        assert ops.adaln_norm(X, SHIFT, SCALE, backend="eager").shape == X.shape


def test_use_backend_inside_a_compiled_function():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x, shift, scale):
        with clipflow.use_backend("eager"):
            first = ops.adaln_norm(x, shift, scale)
        return first - ops.adaln_norm(x, shift, scale)

    torch.testing.assert_close(both(X, SHIFT, SCALE), torch.zeros_like(X))


def test_unknown_backend():
    with pytest.raises(ValueError, match="must be one of auto, eager, native, triton, got 'gpu'"):
        clipflow.use_backend("gpu")


def test_explain_names_the_choice_and_every_reason():
    explanation = clipflow.explain(ops.adaln_norm, X, SHIFT, SCALE)
    assert explanation.op == "adaln_norm"
    assert explanation.refusals["eager"] is None
    assert "needs a CUDA tensor" in explanation.refusals["triton"]
    assert str(explanation).startswith(f"adaln_norm: runs on {explanation.chosen}")
    with clipflow.use_backend("triton"):
        assert clipflow.explain("adaln_norm", X).chosen is None
    with pytest.raises(ValueError, match="op must be one of adaln_norm"):
        clipflow.explain("adaln", X)


def test_native_says_for_which_devices_it_is_built():
    reason = next(iter(ops.all_ops())).refusal(X.to("meta"), "native")
    devices = sorted(extension.native_devices("adaln_norm"))
    assert reason == f"has no compiled kernel for device 'meta' (built for: {devices})"


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [("eager", 0, "adaln_norm: runs on eager"), ("gpu", 1, "CLIPFLOW_BACKEND must be one of")],
)
def test_environment_variable(value, code, words):
    program = "import torch, clipflow; print(clipflow.explain('adaln_norm', torch.ones(1, 2, 8)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"CLIPFLOW_BACKEND": value},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert words in done.stdout + done.stderr
