# Thin: each target sets up .venv if it must, then runs one command.
PYTHON ?= $(shell for p in python3.11 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3,10),(3,11)))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready
# CUDA libraries come with torch from the package index; nothing here needs a GPU or a compiler.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MPLBACKEND := Agg
# sam2, which monailabel asks for and this project never calls, would otherwise try to compile a CUDA extension.
export SAM2_BUILD_CUDA := 0
# Two processes that compute at once (server and training) stall each other tenfold if waiting threads spin.
export OMP_WAIT_POLICY := passive

.PHONY: help demo serve test test-all test-gpu lint bench bench-gpu clean
help:
	@echo "make demo [STUDIES=path LABELS=a,b]  watch the network being taught through a real server"
	@echo "make serve STUDIES=path LABELS=a,b   serve a folder to 3D Slicer (options: docs/server.md)"
	@echo "    MODALITY PRESET SPACING PATCH WINDOW PRETRAINED TRAIN_MINUTES AUTO_TRAIN LEASE TRAIN_DEVICES"
	@echo "    CACHE CHANNELS HOST PORT SSL_CERT SSL_KEY"
	@echo "make test | test-all | lint | bench  checks; test-all adds slow sweeps and a random order"
	@echo "make test-gpu | bench-gpu            the operator on a GPU [PYTHON_GPU=python3 RESULTS=folder]"

$(READY): pyproject.toml ops/pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "DeformUX Label needs Python 3.10 or 3.11 (found: $$(python3 --version 2>&1))." \
		"Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; fi
	@echo "Setting up .venv with $(PYTHON) (about 8 GB, a few minutes, once) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ./ops --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python -m deformux_label.demo $(if $(STUDIES),--studies "$(STUDIES)") $(if $(LABELS),--labels "$(LABELS)") \
		$(if $(MODALITY),--modality "$(MODALITY)") $(if $(PRETRAINED),--pretrained "$(PRETRAINED)") \
		$(if $(ROUNDS),--rounds "$(ROUNDS)") $(DEMO_OPTIONS)

# Each variable is an option of the command: tests/app/test_declared_options.py compares them.
serve: $(READY)
	$(BIN)/deformux-label serve --studies "$(STUDIES)" $(if $(LABELS),--labels "$(LABELS)") \
		$(if $(MODALITY),--modality "$(MODALITY)") $(if $(PRESET),--preset "$(PRESET)") \
		$(if $(SPACING),--spacing "$(SPACING)") $(if $(PATCH),--patch-size "$(PATCH)") $(if $(WINDOW),--window "$(WINDOW)") \
		$(if $(PRETRAINED),--pretrained "$(PRETRAINED)") $(if $(TRAIN_MINUTES),--train-minutes "$(TRAIN_MINUTES)") \
		$(if $(AUTO_TRAIN),--auto-train "$(AUTO_TRAIN)") \
		$(if $(LEASE),--lease-minutes "$(LEASE)") $(if $(TRAIN_DEVICES),--train-devices "$(TRAIN_DEVICES)") \
		$(if $(CACHE),--cache-gb "$(CACHE)") $(if $(CHANNELS),--image-channels "$(CHANNELS)") \
		$(if $(HOST),--host "$(HOST)") $(if $(PORT),--port "$(PORT)") \
		$(if $(SSL_CERT),--ssl-cert "$(SSL_CERT)") $(if $(SSL_KEY),--ssl-key "$(SSL_KEY)")

# Three files at a time, for the app's tests often wait; in the order of tests/conftest.py, the long ones first.
PYTEST = $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(RUNSLOW)
test: lint
	$(PYTEST) tests

test-all: RUNSLOW := --runslow
test-all: test
	# No test may depend on those before it in its file.
	$(PYTEST) --random-order --random-order-bucket=module tests/app tests/security

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.operator.deform_conv3d_cpu
	$(BIN)/python -m benchmarks.server.inference

# The two targets below need an NVIDIA GPU. PYTHON_GPU names a Python of any version that has torch, cupy, numpy and
# pytest (and monai, for the network; tabulate, for bench-gpu): nothing is installed then, the sources are read where
# they are. Without it they use .venv, and install CuPy there for CUDA 13, or 12 with CUDA=12.
PYTHON_GPU ?=
CUDA ?= 13
DEVICE ?= cuda:0
ON_GPU = PYTHONPATH="$(CURDIR)/ops:$(CURDIR)/training$${PYTHONPATH:+:$$PYTHONPATH}" $(or $(PYTHON_GPU),$(BIN)/python)
CUPY := .venv/.cupy-$(CUDA)

$(CUPY): $(READY)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable './ops[cuda$(CUDA)]'
	@touch $@

test-gpu: $(if $(PYTHON_GPU),,$(CUPY))
	$(ON_GPU) -m pytest tests/ops tests/gpu --device $(DEVICE) $(PYTEST_OPTIONS)

bench-gpu: $(if $(PYTHON_GPU),,$(CUPY))
	$(ON_GPU) -m benchmarks.operator.deform_conv3d_gpu $(if $(RESULTS),--results "$(RESULTS)") $(BENCH_OPTIONS)

clean:
	rm -rf .venv demo runs
