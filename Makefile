# The two main commands are `make demo` and `make test`. `make help` lists all.
PYTHON ?= python3
RUN = .venv/bin/python
RUFF = $(RUN) -m ruff
# All folders with Python files.
FOLDERS = $(wildcard rl rewards rollout stages recipes benchmarks examples tools tests)

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow lint format lock

help:
	@echo "make demo       train the scale model on the CPU of this machine: recipes/rlvr.yaml --profile cpu"
	@echo "make test       run ruff, the type checker, and all tests that are not slow"
	@echo "make test-slow  run the slow tests, which are complete training runs"
	@echo "make lint       run only ruff and the type checker"
	@echo "make format     let ruff format the code and fix simple errors"
	@echo "make env        create or complete the environment .venv (GPU=1: CUDA builds)"
	@echo "make lock       update tools/constraints-*.txt from pyproject.toml (needs uv)"

env:
	@$(PYTHON) tools/install.py $(if $(GPU),--gpu)

demo: env
	$(RUN) -m rl.run recipes/rlvr.yaml --profile cpu --output runs/demo-$(shell date +%Y%m%d-%H%M%S)

test: lint
	$(RUN) -m pytest -m 'not slow' --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: env
	$(RUN) -m pytest -m slow

lint: env
	$(RUFF) check $(FOLDERS)
	$(RUFF) format --check $(FOLDERS)
	.venv/bin/pyrefly check

format: env
	$(RUFF) check --fix $(FOLDERS)
	$(RUFF) format $(FOLDERS)

lock:
	for kind in cpu gpu; do uv pip compile --universal --python-version 3.11 --upgrade --quiet --no-annotate \
	  --custom-compile-command "make lock" --extra $$kind --extra dev pyproject.toml \
	  --output-file tools/constraints-$$kind.txt || exit 1; done
