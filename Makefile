# make run            the whole loop on drawn sample scenes, to a live staging endpoint
# make run DATA=intel.zip [PROFILE=full] [ARGS="--param evaluate.min_accuracy=0.9"]
# make test           all notebooks and tests
# make export         intel_nb/ from nbs/, and clean notebooks
# make lock           pin all dependencies anew
# make clean          remove what the runs and the tests left here, the environment too

PYTHON ?= python3
BIN    := .venv/bin
PINS   := pyproject.toml constraints.txt
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e

.PHONY: run test slow export check lock clean

run: .venv/run.stamp
	@$(BIN)/intel-nb run --approve $(if $(DATA),--data "$(DATA)") $(if $(PROFILE),--profile "$(PROFILE)") $(ARGS)

# The notebooks, then the tests; each on two cores, and a file of tests on one of them.
test: .venv/test.stamp
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && TMPDIR="$$scratch" OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	@$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

slow: .venv/test.stamp
	$(BIN)/pytest -q -m slow

export: .venv/run.stamp
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

# What must hold before a commit: export and clean change nothing, no undefined name.
check: .venv/test.stamp
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	git diff --exit-code --stat -- intel_nb nbs
	test -z "$$(git status --porcelain -- intel_nb nbs)"
	$(BIN)/ruff check intel_nb tests

.venv/run.stamp: $(PINS)
	@echo "Installing into .venv (some minutes, once) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	@$(INSTALL) '.[steps,aws,alibi,dev]'
	@touch $@

.venv/test.stamp: .venv/run.stamp
	@$(INSTALL) '.[ray]'
	@touch $@

lock:
	$(PYTHON) .ci/lock.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
