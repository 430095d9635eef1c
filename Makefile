# `make` lists the targets. Everything happens inside this folder: the environment is .venv, what shopai writes is .shopai.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN    := .venv/bin
STAMP  := .venv/stamp
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo test lab hooks prepare readme docs lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamp says what .venv was made from, so that a second run costs nothing. Its content is compared, since a checkout touches the times of files.
setup: ## make the environment in .venv [PYTHON=python3.11]
	@"$(PYTHON)" -c 'import sys; ok = (3, 11) <= sys.version_info[:2] < (3, 13); print(end="" if ok else f"shopai needs Python 3.11 or 3.12, and $(PYTHON) is {sys.version.split()[0]}: make setup PYTHON=python3.11\n"); sys.exit(not ok)'
	@{ pwd; "$(PYTHON)" --version; cksum requirements.lock pyproject.toml; } | cmp -s - $(STAMP) || { set -e; \
	  echo "Setting up .venv: some minutes the first time"; \
	  rm -f $(STAMP); "$(PYTHON)" -m venv .venv; \
	  export PIP_DISABLE_PIP_VERSION_CHECK=1; \
	  $(BIN)/python -m pip install -qq -r requirements.lock; \
	  $(BIN)/python -m pip install -qq --no-deps --editable .; \
	  { pwd; "$(PYTHON)" --version; cksum requirements.lock pyproject.toml; } > $(STAMP); }

demo: setup ## run the main job and serve its model [DATA=FILE PROFILE=smoke|default|gpu PORT=8000]
	$(BIN)/shopai demo $(if $(DATA),--data "$(DATA)") $(if $(PROFILE),--profile $(PROFILE)) $(if $(PORT),--port $(PORT))

# Tests marked `alone` measure times, so nothing may run beside them.
test: setup ## lint, then every test
	$(BIN)/ruff check .
	$(PYTEST) -q -n 2 -m "not alone and not gpu"
	$(PYTEST) -q -m alone

lab: hooks ## open JupyterLab; notebooks are cleaned when saved and merged cell by cell [ARGS="--port 9000"]
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (shopai)" > /dev/null
	SHOPAI_HOME="$${SHOPAI_HOME:-$(CURDIR)/.shopai}" SHOPAI_PROJECT="$(CURDIR)" $(BIN)/jupyter lab --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter $(ARGS)

# Does what matters of nbdev_install_hooks, which would also write to ~/.jupyter and put a .gitconfig here.
hooks: setup
	@git config --local merge.nbdev-merge.name "merge notebooks cell by cell"
	@git config --local merge.nbdev-merge.driver "'$(CURDIR)/$(BIN)/nbdev_merge' %O %A %B %P"

prepare: setup ## after an edit: export the notebooks, clean them, write README.md, run them
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/docs.py readme
	$(PYTEST) -q -n 2 tests/test_notebooks.py tests/test_notebook_rules.py

readme: setup ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/docs.py readme

docs: setup ## build the documentation into site/
	$(BIN)/python tools/docs.py site

lock: setup ## rewrite requirements.lock and environment.yml from pyproject.toml [UPGRADE="name name"]
	$(BIN)/python tools/lock.py $(UPGRADE)

clean: ## remove what is built; .venv and .shopai stay
	rm -rf build dist site _proc _docs .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
