# make demo        the whole method on the tiny model, from nothing but python, make and a network
# make test        lint and tests, in an environment of their own
# make test-no-browser    the same but for the page's tests, which need Chromium
# make quick       what a commit needs, in a minute;  make test-slow    fifty kills, a quarter of an hour
# make notebook    minimal.ipynb from minimal.py, executed, in three minutes
# All build .venv when it is missing or older than the requirements, and may be run again at any time.

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test test-no-browser chromium quick test-slow notebook lint clean tests-a-e tests-f-z

demo: .venv/installed
	RUN=$(BIN)/python sh recipes/laptop.sh

# Two processes of one thread each: a single one keeps one core busy, whatever its threads.
test: .venv/installed-dev lint chromium
	@$(MAKE) --no-print-directory -j2 tests-a-e tests-f-z

tests-a-e tests-f-z: tests-%:
	@echo "tests/test_[$*]*: output at the end"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(if $(MARK),-m "$(MARK)") tests/test_[$*]*.py > .venv/tests-$*.log 2>&1; \
		status=$$?; cat .venv/tests-$*.log; exit $$status

test-no-browser: .venv/installed-dev lint
	@$(MAKE) --no-print-directory -j2 tests-a-e tests-f-z MARK="not slow and not browser"

chromium:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get; then \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; \
	else \
		echo "error: the page's tests need Chromium: sudo apt-get install chromium;" \
			"without it: make test-no-browser" >&2; exit 1; \
	fi

quick: .venv/installed-dev lint
	$(BIN)/python -m pytest -q tests/test_method.py tests/test_rectified_flow.py tests/test_models.py \
		tests/test_training.py tests/test_pairs.py

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow tests

notebook: .venv/installed-dev
	TQDM_DISABLE=1 PYTHONWARNINGS=ignore $(BIN)/python -c "import jupytext, nbclient; book = jupytext.read('minimal.py'); \
		nbclient.NotebookClient(book, timeout=3600, kernel_name='python3').execute(); \
		jupytext.write(book, 'minimal.ipynb')"

lint: .venv/installed-dev
	$(BIN)/ruff check .

.venv/installed: requirements.txt
	@echo "Installing into .venv: 6 GB, for torch with CUDA. The CPU build takes 1 GB:"
	@echo "    make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet torch torchvision --index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt requirements-app.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs
