# `make` lists the commands. Each works from a fresh clone: it installs what it needs first.

STORE ?= file
ARGS ?=
BIN := .venv/bin
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --custom-compile-command 'make lock' $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak lint format fuzz frameworks bench bench-setup image e2e-k8s lock clean

help: ## List these commands
	@echo "envstore: push an environment once, mount it anywhere"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install system packages, .venv and envstore (PYTHON=... chooses the interpreter)
	@scripts/setup.sh

demo: setup ## Push a real environment, mount it, run in it (STORE=file or STORE=s3)
	$(BIN)/python examples/demo.py --store $(STORE) $(ARGS)

test: lint frameworks ## Check style and types, then run the tests (ARGS="-k push" chooses some)
	scripts/test.sh $(ARGS)

soak: frameworks ## Let pushers, mounts, trainers and collectors be killed, for half an hour (ARGS="--seconds 60")
	$(BIN)/python -m tests.soak $(ARGS)

lint: setup ## Check formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict envstore

format: setup ## Format the code and mend what can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: setup ## Try hostile input on every decoder (ARGS="--target NAME --time 1h --jobs 2"; --list names them)
	@scripts/setup-fuzz.sh
	$(BIN)/python -m tests.fuzz $(ARGS)

bench: bench-setup ## Measure envstore beside its peers (ARGS=... goes to the benchmark)
	$(BIN)/python -m benchmarks $(ARGS)

frameworks: setup ## Install torch and the frameworks that checkpoints plug into, for the tests (200 MB and more)
	@scripts/setup-frameworks.sh

bench-setup: frameworks ## Install the peers and the plotting that only `make bench` needs
	@scripts/setup-bench.sh

image: setup ## Build the container image (ARGS="NAME:TAG ARCHIVE")
	scripts/build-image.sh $(ARGS)

e2e-k8s: setup ## Try all of it on a real Kubernetes, made here of Debian's packages (root; 20 minutes the first time)
	scripts/e2e-k8s.sh $(ARGS)

lock: setup ## Pin every dependency again by version and hash (ARGS=--upgrade for newer ones)
	$(COMPILE) --extra fuse --extra resolver --extra csi --group dev pyproject.toml --output-file requirements.lock
	$(COMPILE) --group build --output-file requirements-build.lock
	$(COMPILE) --extra fuse --extra csi --constraint requirements.lock pyproject.toml --output-file requirements-image.lock
	$(COMPILE) --group bench --constraint requirements.lock --output-file requirements-bench.lock
	$(COMPILE) --group fuzz --constraint requirements.lock --output-file requirements-fuzz.lock
	echo "torch ; python_version < '3'" >.venv/without-torch # see scripts/setup-frameworks.sh
	$(COMPILE) --group frameworks --constraint requirements.lock --override .venv/without-torch --output-file requirements-frameworks.lock
	$(COMPILE) --group peers --override .venv/without-torch --output-file requirements-peers.lock
	@! grep -nE '://|^-' requirements*.lock || { echo "error: a lock file names an index" >&2; exit 1; }

clean: ## Remove .venv and everything that was built or cached here
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis envstore/csi/proto/*_pb2*
	find . -name __pycache__ -prune -exec rm -rf {} +
