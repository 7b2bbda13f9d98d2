# make demo    set up (.venv), build, and draw, edit, ask, classify and reconstruct into demo/
# make test    the tests; make bench, bench-short, wheel, format, clean: as they say
#
# Another Python: make PYTHON=python3.12.  An environment you already have: make VENV=/path/to/it.

PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
# PyTorch's CPU build where pip finds one. A machine with a GPU: make TORCH=torch==2.13.0.
TORCH ?= torch==2.13.0$(if $(filter Linux,$(shell uname -s)),+cpu)
# What a wheel is compiled for: every architecture if nvcc is there, else none.
WHEEL_CUDA_ARCHS ?= $(if $(shell command -v nvcc),80;86;89;90a;100a;120)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TOOLS := setuptools wheel cmake ninja pybind11 numpy
READY := $(VENV)/.clipflow-ready
SOURCES := setup.py pyproject.toml constraints.txt CMakeLists.txt \
    $(wildcard csrc/*.cpp csrc/common/* csrc/cpu/* csrc/cuda/*)

.PHONY: demo test bench bench-short wheel format clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/clipflow demo -o $(DEMO)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto \
	    tests/test_ops.py tests/test_ops_out.py tests/test_ops_properties.py \
	    tests/test_pictures_of_backends.py \
	    tests/triton_interpret

bench: $(READY)
	$(BIN)/python benchmarks/ops.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/sampling.py --growth
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/readme_table.py

bench-short: $(READY)
	$(BIN)/python benchmarks/report.py --short --out build/bench

# PyTorch first and by itself, so that no later step can pull in another build of it.
$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null \
	    || $(PIP) install -c constraints.txt "$(TORCH)" \
	    || $(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt $(TOOLS)
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[triton,test]"
	touch $@

# The wheel is tried in a fresh environment that holds nothing but it and, by a path file, the
# dependencies installed above.
wheel: $(READY)
	rm -rf dist build/wheel-venv
	CLIPFLOW_CUDA_ARCHS="$(WHEEL_CUDA_ARCHS)" \
	    $(PIP) wheel --no-build-isolation --no-deps -w dist .
	$(BIN)/python -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install --disable-pip-version-check --no-deps dist/*.whl
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
	    > "$$(build/wheel-venv/bin/python -c \
	    "import sysconfig; print(sysconfig.get_paths()['purelib'])")/dependencies.pth"
	cd build/wheel-venv && bin/python ../../tests/wheel_smoke.py

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	command -v clang-format && clang-format -i csrc/*.cpp csrc/*/*.[ch]* || true

clean:
	rm -rf build dist demo *.egg-info clipflow/_C*.so $(READY)
