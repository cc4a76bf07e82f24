# SPDX-License-Identifier: Apache-2.0
# Every target makes what it needs. `make VENV=... PYTHON=...` uses another environment or interpreter.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?=
SOAK_MINUTES ?= 10

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt
BUILT_FROM := pyproject.toml constraints.txt setup.py $(wildcard csrc/*.* csrc/*/*.*)
SANITIZE := -O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
SANITIZED := build/sanitize
SANITIZED_TESTS := tests/sanitize $(filter-out %compile.py %autograd.py %backend.py %triton.py %cuda_step.py %refused.py, \
	$(wildcard tests/ops/test_wavelet*.py tests/ops/test_noise*.py tests/ops/test_per_sample*.py)) tests/ops/test_small_inputs.py
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test soak sanitize lint types bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

demo: $(VENV)/demo.stamp ## private digits in, synthetic digits out: runs/demo, in minutes on a CPU
	$(BIN)/wavedp demo --out runs/demo

# In two parts, no test in both: the rest, and what holds clipping, noise, ledger and sampler ([tool.coverage] in
# pyproject.toml) to all their branches. Flags may leave tests out, and then there is nothing to hold them to.
COVERING := tests/odd_use $(wildcard $(foreach subject, batches bookkeeping clipping concurrency contents engine \
	histogram ledger noise.py optimizer probe rare_paths sampling statement strict, tests/privacy/test_$(subject)*)) \
	$(filter-out %_triton.py %_cuda.py %_cuda_step.py, $(wildcard tests/ops/test_noise*.py)) \
	tests/ops/test_per_sample_public.py

test: $(VENV)/dev.stamp ## run the test-suite, a process a core; needs no network once installed
ifeq ($(strip $(PYTEST_FLAGS)),)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto $(COVERING:%=--ignore=%); rest=$$?; \
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --cov --cov-report=term-missing $(COVERING) && exit $$rest
else
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto $(PYTEST_FLAGS)
endif

soak: $(VENV)/dev.stamp ## kill the demo's private stage at random for SOAK_MINUTES (10) and check what it left
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/soak.py --minutes $(SOAK_MINUTES)

# The runtime has to be there before Python is, and libstdc++ beside it, whose exceptions it watches; what Python keeps
# to its end is no leak. -s: a report comes when the process ends, and would end with what pytest has captured. Of the
# tests of the ops those that run C++; tests/sanitize is that faults are reported.
sanitize: $(VENV)/dev.stamp ## the C++ library under AddressSanitizer and UndefinedBehaviorSanitizer (needs g++)
	CXX=g++ WAVEDP_CXX_FLAGS="$(SANITIZE)" WAVEDP_BUILD_CUDA=0 WAVEDP_BUILD_NATIVE=1 \
		$(BIN)/python setup.py -q build --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/objects
	CXX="g++ $(SANITIZE)" PYTHONPATH=$(abspath $(SANITIZED))/lib OMP_NUM_THREADS=1 \
		ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(BIN)/pytest -n auto -s -k "not triton and not opcheck" $(SANITIZED_TESTS) $(PYTEST_FLAGS)

lint: $(VENV)/dev.stamp ## ruff (lint and format) and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

types: $(VENV)/dev.stamp ## mypy --strict on an installed copy, where kernels/ is wavedp.kernels
	rm -rf build/types
	$(BIN)/python setup.py -q build_py --build-lib build/types
	cd build/types && $(BIN)/mypy --config-file ../../pyproject.toml -p wavedp

bench: $(VENV)/dev.stamp ## time every op beside its rivals: benchmarks/results, and the tables of the pages
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/plot.py benchmarks/results/*.csv
	$(BIN)/python benchmarks/table.py --write README.md --write docs/private_training.md \
		--write docs/noise.md --write docs/models.md benchmarks/results/*.csv
	$(BIN)/pytest benchmarks --benchmark-enable

clean: ## remove the environment, the build and the caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info wavedp/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted install is taken up again; [dev] contains [demo]. Build isolation
# is off because the build tools just installed are the pinned ones.
$(VENV)/%.stamp: $(BUILT_FROM)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch triton setuptools pybind11 ninja
	$(PIP) --no-build-isolation -e '.[$*]'
	touch $(sort $(VENV)/demo.stamp $@)
