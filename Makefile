# make run            the whole loop on drawn sample scenes, to a live staging endpoint
# make run DATA=intel.zip [PROFILE=full] [ARGS="--param evaluate.min_accuracy=0.9"]
#                     make itself ends with 2 whatever went wrong; the status of the command is in the last line but one
# make test           every notebook, and the tests that take seconds
# make slow           the tests that kill, wait or rehearse: within an hour
# make long           the tests that take longer still
# make sample         make executed/sample/ anew: one run on drawn scenes, to look at; after a change of a step
# make export         write intel_nb/ from nbs/, and clean the notebooks
# make check          what must hold before a commit: nothing left to export, ruff, mypy
# make hooks          check all of that at each commit, and merge notebooks cell by cell
# make image          build the images intel-nb:serve and intel-nb:steps with docker, podman or buildah
# make lock           pin what is new in pyproject.toml [ARGS=--upgrade: everything anew]
# make sbom           list what the images hold, as CycloneDX, in dist/
# make clean          remove the environment, build outputs and caches; workspace/ and executed/ stay

PYTHON ?= python3
BIN    := .venv/bin
PINS   := pyproject.toml $(wildcard locks/*.txt)
PIP     = $(BIN)/pip install --quiet --disable-pip-version-check
LOCKED  = $(PIP) --require-hashes -c locks/cuda.txt
# torch's CPU build takes 0.2 GB, the public wheel for Linux with CUDA 3 GB: TORCH_INDEX= takes the latter
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: run test slow long sample export check hooks image lock sbom clean

run: .venv/run.stamp
	@$(BIN)/intel-nb run --approve $(if $(filter undefined,$(origin DATA)),,--data "$(DATA)") \
	  $(if $(filter undefined,$(origin PROFILE)),,--profile "$(PROFILE)") $(ARGS) || { \
	  status=$$?; case $$status in \
	    1) why="the work failed or was declined";; 2) why="the input was wrong";; 3) why="waiting for a decision";; \
	    130) why="interrupted";; *) why="it was ended";; esac; \
	  echo "intel-nb ended with $$status: $$why" >&2; exit $$status; }

# The notebooks, then the tests; each on two cores, and a file of tests on one of them.
test: .venv/test.stamp
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && TMPDIR="$$scratch" OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	@$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

slow: .venv/test.stamp
	$(BIN)/pytest -q -m slow -n 2 --dist loadfile --no-loadscope-reorder

long: .venv/test.stamp
	$(BIN)/pytest -q -m long

sample: .venv/run.stamp
	@$(BIN)/python .ci/sample.py

export: .venv/run.stamp
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

check: .venv/test.stamp
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	git diff --exit-code --stat -- intel_nb nbs
	test -z "$$(git status --porcelain -- intel_nb nbs)"
	$(BIN)/ruff check .
	$(BIN)/mypy

hooks: .venv/run.stamp
	$(BIN)/pre-commit install
	git config merge.nbdev-merge.name "merge notebooks cell by cell"
	git config merge.nbdev-merge.driver "$(BIN)/nbdev_merge %O %A %B %P"

.venv/run.stamp: $(PINS)
	@echo "Installing into .venv (some minutes, once) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(LOCKED) -r locks/build.txt
	@$(if $(TORCH_INDEX),log=$$(mktemp); $(LOCKED) --no-deps --retries 0 --extra-index-url $(TORCH_INDEX) -r locks/cpu.txt >$$log 2>&1 \
	  || { if grep -q "HASHES" $$log; then cat $$log; exit 1; fi; \
	       echo "torch's CPU build is not to be had here; taking the public wheel"; }; rm -f $$log)
	@$(LOCKED) -r locks/run.txt
	@PYTHONWARNINGS=ignore $(PIP) --no-deps --no-build-isolation -e .
	@touch $@

.venv/test.stamp: .venv/run.stamp
	@$(LOCKED) -c locks/run.txt -r locks/test.txt
	@touch $@

# BUILD_ARGS: such as --build-arg BASE=…
BUILDER ?= $(firstword $(foreach tool,docker podman buildah,$(shell $(tool) info >/dev/null 2>&1 && echo $(tool))))
image:
	@test -n "$(BUILDER)" || { echo "make image needs docker, podman or buildah" >&2; exit 2; }
	for target in serve steps; do \
	  BUILDX_NO_DEFAULT_ATTESTATIONS=1 $(BUILDER) build $(if $(filter docker,$(BUILDER)),,--format docker) $(BUILD_ARGS) \
	    --target $$target --tag intel-nb:$$target . || exit; done

lock:
	$(PYTHON) .ci/lock.py $(ARGS)

sbom: .venv/run.stamp
	$(BIN)/python .ci/sbom.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
