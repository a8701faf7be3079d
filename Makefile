# Everything a checkout can do. Each target makes .venv and installs what it needs by itself.
# ARGS goes to the command:  make demo ARGS="--port 9000",  make test ARGS="-k snapshot"

BOOTSTRAP := sh tools/bootstrap.sh
RUN := .venv/bin/python -m

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test faults bench lint types format clean dev system

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile | expand -t 16

demo: ## a private Redis, a simulated feed and the ticker page on port 8008; Ctrl-C ends all of it
	@$(BOOTSTRAP) demo
	@.venv/bin/quotepush demo $(ARGS)

test: system lint types ## lint, types and the test suite, but for what takes long
	$(RUN) pytest -n 4 --dist worksteal $(ARGS)

faults: system ## the tests that kill, pause or cut something, and all that take long
	$(RUN) pytest -m "fault or long" $(ARGS)

bench: dev ## measure speed and memory on this machine, e.g. ARGS="--load market --pin"; docs/performance.md
	@.venv/bin/python tools/bench.py $(ARGS)

lint: dev ## ruff: rules and format
	$(RUN) ruff check
	$(RUN) ruff format --check

types: dev ## mypy --strict
	$(RUN) mypy --strict quotepush

format: dev ## let ruff format the code and fix what it can
	$(RUN) ruff format
	$(RUN) ruff check --fix

clean: ## remove .venv and everything built or cached
	rm -rf .venv tests/browser/node_modules build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

dev:
	@$(BOOTSTRAP) dev

system:
	@$(BOOTSTRAP) test
