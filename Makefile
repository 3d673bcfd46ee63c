# make demo    the whole method on the tiny model, from nothing but python, make and a network to the package index
# make test    lint and tests, in an environment of their own
# Both build .venv when it is missing or older than the requirements, and both may be run again at any time.

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/python reflow.py
	$(BIN)/python distill.py
	$(BIN)/python sample.py --out runs/sample.png
	if test runs/evaluate.json -nt runs/instaflow.safetensors; \
	then cat runs/evaluate.md; echo "comparison picture: runs/evaluate.png"; \
	else $(BIN)/python evaluate.py; fi

test: .venv/installed-dev lint
	$(BIN)/python -m pytest tests

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs
