# `make demo` and `make test` set up everything they need on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
# One release of torch for everybody who compares figures. On Linux the registry's wheel brings CUDA along; set
# PIP_INDEX_URL to PyTorch's CPU index, or PIP_FIND_LINKS to a folder with the CPU wheel, to do without.
export TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo ablation test test-quick test-oldest test-newest test-upstream lint site benchmark constraints clean

demo: $(VENV)/.ready
	$(BIN)/python -m examples.demo --output demo-output

# The paper's tables 4 and 5 and sweeps in the embedded world: 45 runs of a minute or so on two
# cores (ONLY=tables: 21 of them). It goes on where it was interrupted.
ablation: $(VENV)/.ready
	$(BIN)/python -m examples.scenes.ablation --output ablation-output $(if $(ONLY),--only $(ONLY))

# The whole suite on both supported majors of transformers, each in its own environment, then the linters.
test: $(VENV)/.ready
	$(BIN)/tox run --notest -e lint,tf4,tf5
	$(BIN)/tox run --skip-pkg-install -e lint,tf4,tf5

# The quick tests on the oldest supported releases, and the whole suite on whatever the registry has today.
test-oldest test-newest: test-%: $(VENV)/.ready
	$(BIN)/tox run -e tf4-$*,tf5-$*

# The quick tests in the demo's environment: what to run while working.
test-quick: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# transformers' own common model tests against our classes: none that stock CLIP passes may fail.
test-upstream: $(VENV)/.ready
	$(BIN)/tox exec -e tf4 -- python tests/upstream/run.py
	$(BIN)/tox exec -e tf5 -- python tests/upstream/run.py

lint: $(VENV)/.ready
	$(BIN)/tox run -e lint

# The site of mkdocs.yml, to build/site.
site: $(VENV)/.ready
	$(BIN)/tox run -e docs

benchmark: $(VENV)/.ready
	$(BIN)/python -m benchmarks.stretch_cost

# The releases that all of the above install, resolved anew: constraints/*.txt.
constraints:
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet uv
	.uv/bin/python constraints/resolve.py

$(VENV)/.ready: setup.cfg pyproject.toml constraints/tf5.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints/tf5.txt "$(TORCH)" --editable ".[dev,train,evaluate]"
	touch $@

clean:
	rm -rf $(VENV) .uv .tox .upstream demo-output ablation-output build dist *.egg-info
