# make demo   set up .venv and train the default net on the handwritten digits
# make test   set up .venv and pass the linter, the type checker and the tests
# make clients   install the packages of others that fusemlp is tested with, and write the table of docs/clients.md
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clients
demo: .venv/installed
	$(BIN)/python -m fusemlp.mlp --threads 1 --overwrite --out runs/demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -n 2

clients: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[clients]'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/mlp/test_clients.py --client-table docs/clients.md

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
