# make demo, make demo-smollm2, make test, make test-long; BUILD.md has the rest. Needs python3 (3.11 or later) with pip and a package index.
PYTHON ?= python3
VENV ?= .venv
# PARITY=0 leaves PyTorch and peft out; the tests that compare with them are then skipped.
PARITY ?= 1
# Where PyTorch comes from, such as its own CPU index; empty is pip's index.
TORCH_INDEX ?=
# Test processes; more than the machine has cores only costs time.
JOBS ?= 2
# Arguments of pytest (ARGS="tests/data -k poison") or of a demo.
ARGS ?=

RUN = $(VENV)/bin/python -m
INSTALL = $(RUN) pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: venv demo demo-smollm2 test test-long lint wheel clean

venv: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "found no $(PYTHON), expected Python 3.11 or later: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info < (3, 11) and sys.exit(f"$(PYTHON): found Python {v}, expected 3.11 or later: make PYTHON=...")'
	@echo "Installing into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[test]'
	@touch $@

$(VENV)/.installed-parity: $(VENV)/.installed
	@echo "Installing PyTorch and peft into $(VENV), for the parity tests; PARITY=0 leaves them out"
	$(if $(TORCH_INDEX),$(INSTALL) --no-deps --index-url $(TORCH_INDEX) torch)
	$(INSTALL) -e '.[test,parity]'
	@touch $@

demo: $(VENV)/.installed
	$(RUN) experiments.demo $(ARGS)

demo-smollm2: $(VENV)/.installed
	$(RUN) experiments.demo_smollm2 $(ARGS)

# On the CPU, where float32 is float32, and from local files alone. No test is in neither of the two.
PYTEST = JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 $(RUN) pytest -n $(JOBS) --dist loadfile
TESTED = $(VENV)/.installed $(if $(filter-out 0,$(PARITY)),$(VENV)/.installed-parity)

test: $(TESTED)
	$(PYTEST) -m "not long" $(ARGS)

test-long: $(TESTED)
	$(PYTEST) -m long $(ARGS)

lint: $(VENV)/.installed
	$(RUN) ruff check .
	$(VENV)/bin/lint-imports --no-logo --no-cache

# build/ may hold modules that are gone.
wheel: $(VENV)/.installed
	rm -rf build dist
	$(RUN) pip wheel -qq --disable-pip-version-check --no-deps -w dist .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find jaxvaccine experiments tests -name __pycache__ -type d -exec rm -rf {} +
