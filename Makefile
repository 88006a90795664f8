# `make demo` and `make test` do all the set-up. PYTHON and PIP_ARGS pass through, as in `make demo PYTHON=python3.12`.
PYTHON ?= python3
PIP_ARGS ?=
# Half of the tests' time is waiting for processes to start: two workers serve two cores.
TEST_JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
export CPLAB_HOME ?= $(CURDIR)/.cplab

.PHONY: demo dashboard test test-hosts test-jobs test-gpu lint types clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "CP Lab needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -e '.[test]' -c constraints.txt $(PIP_ARGS)
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__, "CUDA" if torch.version.cuda else "CPU", "build")'
	@echo "environment: $$(du -sh $(VENV) | cut -f1) in $(VENV)"
	@touch $@

demo: $(STAMP)
	$(BIN)/cplab doctor
	$(BIN)/cplab run quickstart
	@echo
	@echo "To look at it in MLflow: make dashboard"
	@echo "Its page as one HTML file: CPLAB_HOME=$(CPLAB_HOME) $(BIN)/cplab report last"

dashboard: $(STAMP)
	$(BIN)/cplab dashboard

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# A file is one worker's, since its tests share a cluster or a sweep; in the order of the files, so that the long ones do not come last.
test: $(STAMP) lint types
	$(BIN)/pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

# As root: ranks on links that the kernel paces, and ray_cluster.yaml on three hosts (namespaces) over SSH. Minutes; a missing piece is named.
test-hosts: $(STAMP)
	$(BIN)/pytest -m hosts

# Whole runs through `ray job submit`, a few minutes.
test-jobs: $(STAMP)
	$(BIN)/pytest -m jobs

# On a machine with an NVIDIA GPU, and a torch build for it.
test-gpu: $(STAMP)
	$(BIN)/pytest -m gpu

clean:
	rm -rf $(VENV)
