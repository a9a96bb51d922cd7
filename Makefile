# Everything the lab does, one word each. Every target sets up .venv once and is quick afterwards.

PYTHON ?= python3
DEMO_SECONDS ?= 180
BIN := .venv/bin

# The environment's stamp carries a checksum of what it is made from: when that changes, it is brought up to date.
SOURCES := requirements.lock settings.ini setup.py pyproject.toml
READY := .venv/ready-$(shell cat $(SOURCES) | cksum | cut -d ' ' -f 1)

.PHONY: help demo test docs bench soak lab browser lock
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## eight small decoders learn real text, watched live (DEMO_SECONDS=180)
	$(BIN)/sdalab demo --page dashboards/live.py --seconds $(DEMO_SECONDS)

test: $(READY) browser ## notebooks in sync and running, pytest, the pages in a real browser, the docs
	$(BIN)/python -m pytest tests/test_sync.py
	$(BIN)/python docs/build.py notebooks
	$(BIN)/python docs/build.py site
	$(BIN)/python -m pytest --ignore=tests/test_sync.py --durations=8

docs: $(READY) ## the chapters as a searchable site in _docs/
	$(BIN)/python docs/build.py site

bench: $(READY) ## speed and memory against their targets: a table, and bench.json
	$(BIN)/python -m bench

soak: $(READY) ## the long campaigns: 200 kills at random moments, 10,000 damaged files, 200 viewers (about half an hour)
	SDALAB_SOAK=1 $(BIN)/python -m pytest tests/test_codec.py tests/test_checkpoints.py tests/test_lab.py --durations=4

lab: $(READY) ## JupyterLab with the chapters
	PANEL_INLINE=true $(BIN)/jupyter lab --notebook-dir nbs

FRESH := build/lock
lock: ## requirements.lock anew, from the newest versions that settings.ini allows
	rm -rf $(FRESH)
	$(PYTHON) -m venv $(FRESH)
	$(FRESH)/bin/python -m pip install "torch==2.13.0" "setuptools>=77" wheel ".[dev,docs,test]"
	sed -n '/^#/p' requirements.lock > $(FRESH)/lock
	$(FRESH)/bin/python -m pip freeze --all --exclude sdalab --exclude pip | sed 's/+cpu$$//' | sort -f >> $(FRESH)/lock
	mv $(FRESH)/lock requirements.lock
	rm -rf $(FRESH)

$(READY):
	@$(PYTHON) -c 'import sys; sys.exit("sdalab needs Python 3.11 or newer, and $(PYTHON) is %d.%d: say which to use with PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps -e .
	@rm -f .venv/ready-*
	@touch $@

# The browser tests need a Chromium: the system's package is installed where that is allowed.
APT := env DEBIAN_FRONTEND=noninteractive apt-get
browser:
	@for name in "$$CHROMIUM" chromium chromium-browser google-chrome google-chrome-stable; do \
	  if test -n "$$name" && command -v "$$name" >/dev/null; then exit 0; fi; done; \
	if command -v apt-get >/dev/null && test "$$(id -u)" = 0; then $(APT) update && $(APT) install -y chromium; \
	elif command -v apt-get >/dev/null && sudo -n true 2>/dev/null; then sudo $(APT) update && sudo $(APT) install -y chromium; \
	else echo "The browser tests need Chromium, and it cannot be installed from here. Debian and Ubuntu: sudo apt-get install" \
	  "chromium; macOS: brew install --cask chromium; or name one already there with CHROMIUM=/path/to/it."; exit 1; fi
