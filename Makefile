# `make demo` runs the whole job on the bundled checkpoint; `make test` runs everything that must hold.
# Both create .venv on their first run and install nothing anew afterwards.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMPAT := .venv-compat
OLDEST_TRANSFORMERS := 5.15.0

.PHONY: demo test test-compat lint docs
demo: $(VENV)/installed
	$(BIN)/compressor demo

test: $(VENV)/installed-test lint
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Packages written here are verified under the oldest transformers that they claim to load in. Its environment sees
# everything of $(VENV) that this transformers does not replace.
test-compat: $(VENV)/installed-test $(COMPAT)/installed
	rm -rf build/compat
	mkdir -p build/compat
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m tests.compat write build/compat
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=. $(COMPAT)/bin/python -m tests.compat verify build/compat

# The documentation as a site in build/docs; a warning, such as a link that leads nowhere, fails it.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(COMPAT)/installed: $(VENV)/installed-test
	test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > "$$($(COMPAT)/bin/python -c 'import site; print(site.getsitepackages()[0])')/outer.pth"
	$(COMPAT)/bin/python -m pip install --quiet --disable-pip-version-check transformers==$(OLDEST_TRANSFORMERS)
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; say make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@
