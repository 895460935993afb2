# `make help` lists the targets. Everything runs from the virtual environment in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Nothing that runs here reports to its makers.
export RAY_USAGE_STATS_ENABLED := 0
# With usage statistics off, Ray still reports once that they are off: to nobody.
export RAY_USAGE_STATS_REPORT_URL := http://127.0.0.1:9/
export MLFLOW_DISABLE_TELEMETRY := true
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-all lint types format clean \
	safety regress bench-pinned ab-branch gate monitoring docs tutorials

# Recipes read these from the environment, so that a value is never read as shell.
export BASE ?= origin/main
export BENCH_CONFIG ?= configs/baselines/pinned.yaml
export PHASE ?=
export MEASURED ?=

help: ## list these targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' \
		| while IFS="$$(printf '\t')" read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

install: $(STAMP) ## create .venv and install Esper with its tested dependencies

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python must be 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
			"install a newer one and name it: make install PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); \
		echo "a virtual environment could not be created; on Debian and Ubuntu:" \
			"apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	@touch $@

demo: install ## run the paired experiment on the two spirals and print its verdict
	$(BIN)/esper ab configs/sweeps/ab_spirals.yaml

# two at a time: a file's tests stay together, and Ray's processes need room beside them
test: lint types ## lint, check types, run the quick tests
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

test-all: lint types ## lint, check types, run all tests
	$(BIN)/python -m pytest

lint: install ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## check types
	$(BIN)/mypy

safety: install ## check flags and their record of changes, and that rollouts roll back what is broken
	$(BIN)/esper flags validate
	$(BIN)/esper flags audit
	$(BIN)/python -m pytest tests/esper/release -m 'not slow'

regress: install ## the regression suite, legacy against new; build/regress.json
	@mkdir -p build
	$(BIN)/esper regress --report build/regress.json

bench-pinned: install ## measure this commit and the one in .ci/pinned-commit, interleaved; build/bench
	rm -rf build/bench
	@# undecided is no failure, or noisy machines would always fail; the verdict says what it is
	$(BIN)/python experiments/benchmarks/bench_commits.py "$$BENCH_CONFIG" --out build/bench \
		|| { test $$? -eq 30 && echo "INCONCLUSIVE: neither slower nor as fast was shown"; }

ab-branch: install ## compare this commit with BASE in 16 pairs of a tiny run; build/ab
	rm -rf build/ab
	$(BIN)/python experiments/benchmarks/ab_commits.py "$$BASE" HEAD --out build/ab

gate: install ## judge stored evidence alone: make gate PHASE=0 MEASURED=FILE
	@$(BIN)/esper gate --phase "$$PHASE" --measured "$$MEASURED"

monitoring: install ## write the Grafana dashboards anew, and say how to point Prometheus and Grafana at them
	$(BIN)/python -m esper.monitoring.dashboards configs/monitoring/grafana
	@echo "Prometheus: prometheus --config.file=configs/monitoring/prometheus.yml (its paths are examples)"
	@echo "Grafana: Dashboards > New > Import > configs/monitoring/grafana/*.json, and choose the Prometheus"
	@echo "all of it: docs/monitoring.md"

docs: install ## build the documentation site, strictly; build/site
	@rm -rf build/site
	$(BIN)/properdocs build --strict
	@echo "open build/site/index.html; with search: python -m http.server --directory build/site"

tutorials: install ## follow every tutorial in an empty folder, and check what the site tells
	$(BIN)/python -m pytest tests/docs

format: install ## format the code and fix what can be fixed safely
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and build results; runs/ and mlflow.db stay
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
	find platform kernels experiments serve_apps tests -name __pycache__ -type d -prune -exec rm -rf {} +
