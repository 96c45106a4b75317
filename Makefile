# Every target sets up what it needs in .venv, once, and again when what it was made from has changed.
# Another Python: make PYTHON=python3.12 TARGET.  More options for the command behind a target: make demo ARGS="--minutes 1".
PYTHON ?= python3
ARGS ?=
RUN ?= $(patsubst %/report.html,%,$(firstword $(shell ls -td runs/*/report.html 2>/dev/null)))
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
NATIVE := CMakeLists.txt $(shell find csrc -type f -not -path 'csrc/tests/*' 2>/dev/null)
CMAKE := $(or $(shell command -v cmake),$(BIN)/cmake)
HAS_CMAKE := $(if $(shell command -v cmake),,.venv/torch)

# Where there is a compiler, kernels that do not build are an error; where there is none, plain torch does.
ifneq (,$(foreach name,$(CXX) c++ clang++,$(shell command -v $(name) 2>/dev/null)))
export RAREFY_REQUIRE_NATIVE := 1
endif

# Runs a command in silence; if it fails, shows the end of what it said.
quiet = @mkdir -p build; echo "$(1) ..."; { $(2); } >build/make.log 2>&1 || { tail -n 40 build/make.log; echo "failed; all of it: build/make.log"; exit 1; }

.PHONY: help demo test test-gpu check lint bench readme wheel wheel-check report-check sanitize kernels-check neon clean

help:           ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 14

demo: .venv/rarefy  ## train a language model sparse, beside its dense twin: three minutes, then a table and a report
	@$(BIN)/rarefy train text $(ARGS)

# Several processes share the cores, so a thread that waits for others sleeps.
test: .venv/dev     ## all tests
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q --numprocesses=auto --maxprocesses=4 --dist=worksteal --durations=15 $(ARGS)

test-gpu: .venv/dev ## the Triton kernels' tests on this machine's NVIDIA GPU, compiled, not interpreted
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no NVIDIA GPU here"; exit 1; }
	@$(BIN)/python -m pytest -q tests/test_triton.py tests/test_two_four.py $(ARGS)

check: lint         ## before a push: lint and the fast tests
	@$(BIN)/python -m pytest -q -m "not slow and not browser and not data" $(ARGS)

lint: .venv/dev     ## ruff and pyright
	@$(BIN)/ruff check src tests tools
	@$(BIN)/ruff format --check src tests tools
	@$(BIN)/pyright

bench: .venv/rarefy ## sparse against dense on this machine, per shape and density
	@$(BIN)/rarefy bench $(ARGS)

readme: .venv/dev   ## run what README.md tells people to run
	@$(BIN)/python tools/readme_commands.py

# libgomp.so.1 stays out: the kernels must use the copy that torch has loaded, so that torch.set_num_threads holds.
wheel: .venv/dev    ## a wheel in dist/ that needs no compiler where it is installed
	@rm -rf build/wheel dist && mkdir -p dist
	$(call quiet,building the wheel,RAREFY_REQUIRE_NATIVE=1 $(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir build/wheel .)
ifeq ($(shell uname -s),Linux)
	$(call quiet,naming the systems it runs on,PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl)
else
	@cp build/wheel/*.whl dist/
endif
	@ls dist/*.whl

wheel-check: wheel  ## install the wheel in a new environment without compilers and train with it
	@$(BIN)/python tools/check_wheel.py dist/*.whl

report-check: .venv/dev ## open a run's report in headless Chromium (the newest run, or RUN=runs/...)
	@test -n "$(RUN)" || { echo "no run with a report in runs/: make demo writes one"; exit 1; }
	@tools/system_package.sh chromium
	@$(BIN)/python tools/check_report.py "$(RUN)/report.html" $(ARGS)

# The kernels are unrolled far: with checks in line, or variables tracked for a debugger, g++ needs many minutes for them.
SANITIZED := -DRAREFY_SANITIZE=ON -DCMAKE_BUILD_TYPE=Sanitize \
	-DCMAKE_CXX_FLAGS="-O1 -fno-var-tracking --param asan-instrumentation-with-call-threshold=0"
sanitize: .venv/dev ## the kernels alone, under the address and undefined-behaviour sanitizers (g++)
	$(call quiet,building the kernels with sanitizers,$(BIN)/cmake -S . -B build/sanitize $(SANITIZED) && $(BIN)/cmake --build build/sanitize --parallel)
	@RAREFY_LIBRARY=build/sanitize/librarefy_kernels.so LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(BIN)/python -m pytest -q -p no:faulthandler tests/test_kernels_c.py $(ARGS)

# Warnings are errors here; both need neither torch nor Python where the system has CMake.
CHECKED := -DRAREFY_TESTS=ON -DRAREFY_WERROR=ON
kernels-check: $(HAS_CMAKE) ## the kernels alone against plain double loops, on every instruction set of this CPU
	$(call quiet,building the kernels and their check,$(CMAKE) -S . -B build/check $(CHECKED) && $(CMAKE) --build build/check --parallel)
	@build/check/check_kernels $(ARGS)
	@build/check/check_images $(ARGS)
	@build/check/check_passes $(ARGS)

neon: build/neon/checked ## the same for 64-bit ARM: cross compiled, then run under qemu; installs both (Debian, as root)
	@cat $<

build/neon/checked: $(NATIVE) $(wildcard csrc/tests/*) tools/aarch64.cmake | $(HAS_CMAKE)
	@tools/system_package.sh aarch64-c++
	@tools/system_package.sh qemu-aarch64
	$(call quiet,building the kernels for 64-bit ARM,$(CMAKE) -S . -B build/neon -DCMAKE_TOOLCHAIN_FILE=tools/aarch64.cmake $(CHECKED) && $(CMAKE) --build build/neon --parallel)
	@echo "checking them under qemu: a minute ..."
	@for check in check_kernels check_images check_passes; do \
		OMP_WAIT_POLICY=passive qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/$$check neon portable; \
	done >build/neon/checking && ! grep -q FAILED build/neon/checking || { cat build/neon/checking; exit 1; }
	@mv build/neon/checking $@

clean:          ## remove what was built; runs/ and .venv stay
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "rarefy needs Python 3.11 or newer, $(PYTHON) is none; try: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv .venv

# torch first, as constraints.txt pins it; the build tools join it, since a build in place needs no network then.
.venv/torch: constraints.txt | .venv/bin/python
	$(call quiet,installing torch into .venv,$(PIP) torch scikit-build-core cmake ninja)
	@touch $@

.venv/rarefy: .venv/torch pyproject.toml $(NATIVE)
	$(call quiet,building rarefy,$(PIP) --no-build-isolation --editable .)
	@touch $@

.venv/dev: .venv/rarefy
	$(call quiet,installing the tools for development,$(PIP) --no-build-isolation --editable '.[dev]')
	@touch $@
