# make demo        the whole method on the tiny model, from nothing but python, make and a network
# make test        lint and tests, in an environment of their own
# make quick       what a commit needs, in a minute;  make test-slow    fifty kills, a quarter of an hour
# All build .venv when it is missing or older than the requirements, and may be run again at any time.

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test quick test-slow lint clean

demo: .venv/installed
	@echo "1/5  a picture now, by the one-step model that is shipped: runs/shipped.png"
	$(BIN)/python sample.py --model toy/tiny_instaflow.safetensors --out runs/shipped.png
	@echo "2/5  pairs of the teacher, and reflow: the paths become straight"
	$(BIN)/python reflow.py
	@echo "3/5  pairs of the flow, and distillation: one step lands where the flow ends"
	$(BIN)/python distill.py
	@echo "4/5  a picture by the one-step model that was just made: runs/sample.png"
	$(BIN)/python sample.py --out runs/sample.png
	@echo "5/5  teacher, flow and one step side by side"
	if test runs/evaluate.json -nt runs/instaflow.safetensors; \
	then cat runs/evaluate.md; else $(BIN)/python evaluate.py --steps 8,4,2,1; fi
	@echo "Look at runs/evaluate.png and runs/sample.png, and go on with"
	@echo "    $(BIN)/python sample.py --prompt \"a red circle above a blue square\" --num-images 8"
	@echo "    $(BIN)/python toy/demo.py      the same in the plane, with its paths"

test: .venv/installed-dev lint
	$(BIN)/python -m pytest tests

quick: .venv/installed-dev lint
	$(BIN)/python -m pytest -q tests/test_method.py tests/test_rectified_flow.py tests/test_models.py \
		tests/test_training.py tests/test_pairs.py

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow tests

lint: .venv/installed-dev
	$(BIN)/ruff check .

.venv/installed: requirements.txt
	@echo "Installing into .venv: 6 GB, for torch with CUDA. The CPU build takes 1 GB:"
	@echo "    make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet torch torchvision --index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs
