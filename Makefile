# Each target does all its own set-up in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs clean

demo: .venv/demo
	clip=$$($(BIN)/storm setup-demo | tee /dev/stderr | sed -n 's/^clip:  //p' | tail -n 1) && \
	$(BIN)/storm ask "$$clip" "What happens in this video?" --max-new-tokens 48

test: .venv/dev lint docs
	$(BIN)/storm setup-demo
	# One thread for each of two workers: small tensors gain nothing from more.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet src
	$(BIN)/lint-imports
	$(BIN)/codespell src tests docs benchmarks examples README.md CONTRIBUTING.md CHANGELOG.md

docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

.venv/dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# The reference that the demo's encoder is checked against; its own dependencies include torchvision.
	$(BIN)/python -m pip install --quiet --no-deps geffnet==1.0.2
	touch $@ .venv/demo

clean:
	rm -rf .venv
