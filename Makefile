# Two commands matter: `make lab` opens the explorer in JupyterLab, `make test` checks everything. `make help` lists the rest.
# Both install into .venv, which sees nothing of the machine's other Python packages.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt

# A search path or pip setting of the user's must not leak into the environment or the tests.
unexport PYTHONPATH PYTHONHOME
export PIP_USER := 0
export PYTHONNOUSERSITE := 1

# The user's own Jupyter and IPython settings, and prunelab's cache, stay out of a run: `$(APART) command`.
APART = apart=$$(mktemp -d) && trap 'rm -rf "$$apart"' EXIT && \
	env JUPYTER_CONFIG_DIR="$$apart/config" JUPYTER_DATA_DIR="$$apart/data" \
	JUPYTER_RUNTIME_DIR="$$apart/runtime" IPYTHONDIR="$$apart/ipython" PRUNELAB_CACHE="$$apart/cache"

FIND_CHROMIUM = { test -x "$$PRUNELAB_CHROMIUM" || command -v chromium || command -v chromium-browser || \
	command -v google-chrome || command -v google-chrome-stable; } > /dev/null

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help lab test lint types unit notebooks outputs browser pictures bench bench-structure bench-profile coverage fuzz chromium format clean

help:
	@echo "make lab        install, then open the explorer in JupyterLab (options: make lab LAB='--no-browser --port 9000')"
	@echo "make test       install, then run lint, types, unit, notebooks and browser"
	@echo "make lint       ruff: rules and layout        make format     let ruff repair both"
	@echo "make types      mypy --strict"
	@echo "make unit       the unit tests"
	@echo "make notebooks  run every notebook from top to bottom"
	@echo "make outputs    run the notebooks and keep what they show, for a commit (some: make outputs NOTEBOOKS=notebooks/01-*)"
	@echo "make browser    drive the explorer in a headless Chromium"
	@echo "make bench      timings, printed and checked against their budgets"
	@echo "make bench-structure  Torch-Pruning and prunelab on the same networks; rewrites the README's table (minutes)"
	@echo "make bench-profile    what a profile costs against a plain forward pass, as a table (minutes)"
	@echo "make coverage   every classification model of torchvision, cut to half; rewrites its table (half an hour)"
	@echo "make fuzz       the property tests again, with many more examples"
	@echo "make pictures   draw ResNet-20 and take the screenshots of the explorer again, into notebooks/pictures"
	@echo "make clean      remove .venv and everything built (your notebooks in playground/ stay)"

lab: $(VENV)/.lab
	@$(PY) -m prunelab lab --folder playground $(LAB)

test: $(VENV)/.test chromium lint types unit notebooks browser
	@echo "Everything passed."

lint: $(VENV)/.test
	@echo "Lint: rules, then layout."
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(VENV)/.test
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

types: $(VENV)/.test
	@echo "Types: mypy --strict."
	@$(PY) -m mypy --strict prunelab

unit: $(VENV)/.test
	@echo "Unit tests."
	@$(APART) $(PY) -m pytest

notebooks: $(VENV)/.test
	@echo "Notebooks, each from top to bottom."
	@$(APART) $(PY) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=900 notebooks

NOTEBOOKS ?= notebooks/*.ipynb
outputs: $(VENV)/.test
	@$(APART) $(PY) tests/support/outputs.py $(NOTEBOOKS)

browser: $(VENV)/.test chromium
	@echo "Browser tests."
	@$(APART) $(PY) -m pytest tests/browser

pictures: $(VENV)/.test chromium
	@$(APART) $(PY) -c 'import torch, prunelab as pl; \
		pl.trace(pl.zoo.resnet20(shortcut="projection"), torch.randn(2, 3, 32, 32)).draw().save("notebooks/pictures/network.svg")'
	@$(APART) PRUNELAB_PICTURES="$$PWD/notebooks/pictures" $(PY) -m pytest tests/browser/test_explorer.py -k fits

bench: $(VENV)/.test
	@$(APART) $(PY) -m pytest -s tests/bench

bench-structure: $(VENV)/.bench
	@$(APART) $(PY) tests/bench/structure.py

bench-profile: $(VENV)/.test
	@$(APART) $(PY) tests/bench/profiling.py

coverage: $(VENV)/.test
	@$(APART) $(PY) tests/bench/coverage.py

fuzz: $(VENV)/.test
	@$(APART) HYPOTHESIS_PROFILE=fuzz $(PY) -m pytest tests/fuzz

chromium:
	@if $(FIND_CHROMIUM); then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "Installing Chromium for the browser tests."; \
		apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y chromium || true; \
	fi
	@if $(FIND_CHROMIUM); then :; \
	elif [ "$$CI" = true ]; then \
		echo "Chromium is missing and could not be installed, so the browser tests cannot run."; exit 1; \
	else \
		echo "Chromium was not found, so the browser tests will be skipped; install Chromium or Google Chrome," \
			"or name its executable in PRUNELAB_CHROMIUM."; \
	fi

# The stamps make a second run quick: pip is asked again only when the requirements have changed.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "prunelab needs Python 3.11 or later; name one with: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || \
		{ echo "$(PYTHON) could not make a virtual environment; on Debian and Ubuntu install python3-venv."; exit 1; }
	@touch $@

$(VENV)/.lab: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing prunelab into $(VENV): several GB with PyTorch, a few minutes the first time."
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing prunelab and its test tools into $(VENV): several GB with PyTorch, a few minutes the first time."
	@$(PIP_INSTALL) --editable '.[test]'
	@touch $(VENV)/.lab $@

$(VENV)/.bench: $(VENV)/.test
	@$(PIP_INSTALL) --editable '.[test,bench]'
	@touch $@

clean:
	@rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find prunelab tests data notebooks -name __pycache__ -prune -exec rm -rf {} + 2> /dev/null || true
