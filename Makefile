# Two commands do everything on a fresh machine: `make demo` and `make test`.
# They need Python 3.10 or newer, make and a C compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TEST_PROCESSES ?= 3
DOCS_VENV := .venv-docs
DOCS_BIN := $(DOCS_VENV)/bin
DOCS_INSTALLED := $(DOCS_VENV)/.installed
FLASH_VENV := .venv-flash
FLASH_BIN := $(FLASH_VENV)/bin
FLASH_INSTALLED := $(FLASH_VENV)/.installed
FLASH_LOG := $(FLASH_VENV).log
FLASH_PINS := constraints.txt tests/flash/constraints.txt
# With WHEELHOUSE given, `make gpu-test` has a venv of its own over the torch of PYTHON, without a network.
WHEELHOUSE ?= build/wheelhouse
GPU_VENV := .venv-gpu-test
FROM_WHEELHOUSE := $(filter-out file,$(origin WHEELHOUSE))
GPU_BIN := $(if $(FROM_WHEELHOUSE),$(GPU_VENV),$(VENV))/bin
GPU_INSTALLED := $(if $(FROM_WHEELHOUSE),$(GPU_VENV)/.installed,$(INSTALLED))
OUT ?= build/gpu-test
PARTS ?=
MINUTES ?= 8
AGAIN ?=
LOCKS := requirements
PIP_LOCKED := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes
# yes: only files whose SHA-256 is in requirements/, as CI does. Wheels of another index, such as torch
# for another CUDA, have other hashes.
HASHES ?= no
FUZZ_SECONDS ?= 60
UV_VERSION := 0.13.9
# make wheelhouse: the Python that it is for, and extras of megaback to add
PYTHON_VERSION ?= 3.12
EXTRAS ?=

# Images of containers set it; without bytecode every process of the tests compiles our modules.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test pytest gpu-test fuzz fuzz-properties flash-test lint format reference docs lock wheelhouse clean help

help:
	@echo "make demo        text to shards to training to a backward sample, in minutes"
	@echo "make test        linters, type checker and every test that this machine can run, in three"
	@echo "                 processes; TEST_PROCESSES=N for more"
	@echo "make pytest      the tests of make test alone"
	@echo "make gpu-test    check and measure what only a GPU can show, in $(MINUTES) minutes; the report is"
	@echo "                 $(OUT)/report.md; OUT=DIR, PARTS=a,b, MINUTES=N, AGAIN=yes,"
	@echo "                 WHEELHOUSE=DIR to install from there, for the torch of PYTHON"
	@echo "make fuzz        fuzz readers of files and requests, $(FUZZ_SECONDS) s each;"
	@echo "                 FUZZ_SECONDS=N; INPUT=FILE repeats a failed input"
	@echo "make fuzz-properties  property tests with random examples"
	@echo "make flash-test  flash-attn's kernels on a CPU; part of make test"
	@echo "make lint        ruff, mypy, the words of the prose, and whether docs/reference/ is current"
	@echo "make format      format the code with ruff"
	@echo "make reference   regenerate docs/reference/ after a change of help, config or API"
	@echo "make docs        the documentation site, in build/site"
	@echo "make lock        regenerate the hashes in requirements/ after a change of constraints.txt"
	@echo "make wheelhouse  wheels to install megaback without a network beside a torch, in"
	@echo "                 $(WHEELHOUSE); WHEELHOUSE=DIR, PYTHON_VERSION=3.12, EXTRAS=wandb,gguf"
	@echo "make clean       remove the demo's output"

$(INSTALLED): setup.py constraints.txt $(if $(filter yes,$(HASHES)),$(wildcard $(LOCKS)/*.txt))
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "megaback needs Python 3.10 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
ifeq ($(HASHES),yes)
	$(PIP_LOCKED) --only-binary :all: -r $(LOCKS)/locked-build.txt
	$(PIP_LOCKED) --no-build-isolation -r $(LOCKS)/locked.txt
	(! command -v nvidia-smi && $(PIP_LOCKED) -r $(LOCKS)/locked-cpu.txt) || $(PIP_LOCKED) -r $(LOCKS)/locked-cuda.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
else
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
endif
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m tools.demo

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m docs.generate --check
	$(BIN)/python -m tests.helpers.words

reference: $(INSTALLED)
	$(BIN)/python -m docs.generate

# mkdocs in an environment of its own, so that tests need not install it.
$(DOCS_INSTALLED): setup.py constraints.txt $(LOCKS)/locked-docs.txt
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_BIN)/python -m pip install --quiet --disable-pip-version-check \
		$(if $(filter yes,$(HASHES)),--no-deps --require-hashes -r $(LOCKS)/locked-docs.txt,-c constraints.txt mkdocs-material)
	touch $@

docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(DOCS_BIN)/mkdocs build --quiet --strict
	@echo "docs: build/site/index.html"

test: lint
	$(MAKE) --no-print-directory pytest
	$(MAKE) --no-print-directory flash-test

# A test that fails is run once more, and shown with its first failure even if it then passes.
pytest: $(INSTALLED)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --durations=60 --reruns 1 --rerun-show-tracebacks

# A venv made by another venv sees only the packages of the Python below both, so it gets a .pth file.
$(GPU_VENV)/.installed: $(wildcard $(WHEELHOUSE)/*.whl)
	$(PYTHON) -m venv --clear --system-site-packages $(GPU_VENV)
	$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		>"$$($(GPU_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	$(GPU_VENV)/bin/python -c 'import torch' || \
		{ echo "$(PYTHON) has no torch; set PYTHON to one that has"; exit 1; }
	$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-index \
		--find-links $(WHEELHOUSE) --no-deps -r $(WHEELHOUSE)/requirements.txt
	touch $@

gpu-test: $(GPU_INSTALLED)
	$(GPU_BIN)/python -m benchmarks.gpu_test --out "$(OUT)" --minutes $(MINUTES) \
		$(if $(PARTS),--parts $(PARTS)) $(if $(filter yes,$(AGAIN)),--again)

fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz/run.py $(if $(INPUT),--input $(INPUT),--seconds $(FUZZ_SECONDS))

fuzz-properties: $(INSTALLED)
	$(BIN)/python -m pytest --hypothesis-profile=fuzz tests/unit

# flash-attn without its CUDA part, which must reach neither the main venv nor pip's cache of wheels,
# from where `pip install '.[flash]'` would take it.
$(FLASH_INSTALLED): $(FLASH_PINS)
	$(PYTHON) -m venv --clear $(FLASH_VENV)
	$(FLASH_BIN)/python -m pip install --quiet --disable-pip-version-check $(FLASH_PINS:%=-c %) \
		torch triton numpy einops ninja packaging psutil setuptools wheel pytest pytest-timeout
	FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE \
		$(FLASH_BIN)/python -m pip install --quiet --disable-pip-version-check $(FLASH_PINS:%=-c %) \
		--no-cache-dir --no-build-isolation --no-deps flash-attn
	touch $@

# Where that venv cannot be made, these tests are skipped; where it can, they must pass.
flash-test:
	@test -e $(FLASH_INSTALLED) || echo "flash-test: setting up $(FLASH_VENV)"
	@if $(MAKE) $(FLASH_INSTALLED) >$(FLASH_LOG) 2>&1; then \
		CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE \
		$(FLASH_BIN)/python -m pytest --confcutdir=tests/flash tests/flash; \
	else \
		echo "flash-test: skipped flash-attn on a CPU, as $(FLASH_VENV) could not be set up:" \
			"$$(grep -v '[*][*][*]' $(FLASH_LOG) | grep -i -m 1 -e error -e 'no such file')" \
			"(see $(FLASH_LOG))"; \
	fi

lock: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/python $(LOCKS)/lock.py

wheelhouse: $(INSTALLED)
	$(BIN)/python $(LOCKS)/wheelhouse.py --out "$(WHEELHOUSE)" --python-version "$(PYTHON_VERSION)" --extras "$(EXTRAS)"

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf demo/tokenizer demo/shards demo/run demo/model
	rmdir demo 2>/dev/null || true
