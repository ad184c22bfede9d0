# infermesh. `make up` and `make test` need nothing but make and Python; the rest is installed into .venv*/ here.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help up test setup check gguf protos bench traced routing seams peers gateways vllms compat faults images compose constraints clean soak

PYTHON ?=
PY = $(if $(FOUND),$(FOUND),$(error no suitable Python, see above))
FOUND = $(eval FOUND := $(shell PYTHON="$(PYTHON)" sh deploy/setup/find-python))$(FOUND)
SETUP = $(PY) deploy/setup/install.py
BIN = .venv/bin
# What to test: make test T=tests/unit/test_x.py; how: make test ARGS="-x -k name"
T ?=
# Which rows of the fault matrix: make faults ROW=21
ROW ?=
# How long: make soak MINUTES=30
MINUTES ?= 10
ARGS ?=

help: ## show this
	@echo "usage: make TARGET [ARGS='...'] [T=tests/...] [PYTHON=/path/to/python3.12]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' Makefile | while IFS='|' read -r name text; do printf '%-14s %s\n' "$$name" "$$text"; done

up: ## set up what is missing and run the whole mesh on this machine (ARGS="--http 127.0.0.1:8080")
	@$(SETUP) main llm
	@exec $(BIN)/infermesh up $(ARGS)

test: ## set up what is missing and run the tests (T=tests/unit/test_x.py, ARGS="-k name")
	@$(SETUP) main llm protos
	@exec $(BIN)/python -m pytest $(T) $(ARGS)

setup: ## install everything into .venv, .venv-llm and .venv-protos
	@$(SETUP) main llm protos
	@echo "ready: $(BIN)/infermesh, .venv-llm/bin/infermesh"

check: ## format, lint, types, contract lint, stub freshness, walls
	@$(SETUP) main protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint
	.venv-protos/bin/python deploy/setup/protos.py --check
	$(BIN)/python -m deploy.fleet --check
	$(BIN)/python -m pytest -q tests/test_walls.py

protos: ## write infermesh/v1 from protos/
	@$(SETUP) protos
	@.venv-protos/bin/python deploy/setup/protos.py

compat: ## prove that stubs and client work on the oldest and newest protobuf and grpcio they promise
	@$(SETUP) main
	@$(PY) deploy/setup/compat.py

bench: ## what the gateway costs, measured here (ARGS="--write" puts it into docs/bench.md)
	@$(SETUP) main
	@exec $(BIN)/python tests/bench/gateway.py $(ARGS)

routing: ## what routing is worth on a trace, simulated (TRACE=mooncake.jsonl); writes docs/routing.md
	@$(SETUP) main
	@exec $(BIN)/python tests/bench/routing.py --trace $(TRACE) $(ARGS)

traced: ## what spans cost the gateway: none, 1 % and all of them, in turns (ARGS="--requests 4000")
	@$(SETUP) main
	@exec $(BIN)/python -m tests.bench.traced $(ARGS)

faults: ## break things on purpose, a row of the fault matrix each (ROW=21, ROW=1-13; ARGS="--write" for docs/faults.md)
	@$(SETUP) main
	@exec $(BIN)/python -m tests.fault --row "$(ROW)" $(ARGS)

peers: ## stock routers and infermesh in turn before the same scripted engines (TRACE=trace.jsonl ARGS="--write")
	@$(SETUP) main
	@exec $(BIN)/python -m tests.bench.peers --trace "$(TRACE)" $(ARGS)

gateways: ## four gateways that share nothing against one, over real sockets (TRACE=trace.jsonl ARGS="--write")
	@$(SETUP) main
	@exec $(BIN)/python -m tests.bench.gateways --trace "$(TRACE)" $(ARGS)

seams: ## 10,000 random deaths against the vLLM engine's replay (minutes)
	@$(SETUP) main llm
	@d=$$(mktemp -d) && trap 'rm -rf "$$d"' EXIT && .venv-llm/bin/python -P -m services.llm.tiny_model "$$d" && \
	PYTHONPATH=. .venv-llm/bin/python -P tests/kit/replay_seams.py "$$d" 10000 $(ARGS)

vllms: ## two real vLLM instances, one slowed to half, behind the gateway and in turn, beside sim (ARGS="--write")
	@$(SETUP) main llm
	@exec $(BIN)/python -m tests.bench.two_vllms $(ARGS)

gguf: ## a GGUF model over two RPC workers of a real llama.cpp, which is built first (ARGS="--llama FOLDER" has one)
	@$(SETUP) main
	@exec $(BIN)/python -m tests.bench.gguf_workers $(ARGS)

soak: ## random faults, one every 10 to 20 s, for MINUTES=10; memory, descriptors and every answer are judged
	@$(SETUP) main
	@exec $(BIN)/python -m tests.fault.soak --minutes $(MINUTES) $(ARGS)

images: ## build the container images with pip's settings here (ARGS="gateway --base debian" without Docker Hub)
	@case "$(ARGS)" in *debian*) sh deploy/setup/programs debootstrap:debootstrap >&2;; esac
	@exec $(PY) deploy/setup/images.py $(ARGS)

compose: ## the rendered Compose project for real: images, up, an LLM killed under load, down (ARGS="--write --keep")
	@$(SETUP) main
	@exec $(BIN)/python -m tests.container $(ARGS)

constraints: ## resolve constraints/*.txt again, around constraints/pins.txt
	@$(PY) deploy/setup/lock.py

clean: ## remove environments, stamps, caches and what runs left behind
	rm -rf .venv .venv-llm .venv-protos .venv-uv .venv-compat .setup.lock .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
