# make demo   makes the environment, fine-tunes the embedded tiny Flux with LeapAlign, says where its pictures are
# make test   makes the environment, runs the linters, the type checker and all tests
# make test-oldest  runs the core's tests with the oldest releases that pyproject.toml allows, in .venv-oldest
# make docs   builds the documentation site into site/; warnings are errors
# make study        the paper's Table 2 on the embedded world, eight rows and five seeds: about two hours; goes on if interrupted
# make study-quick  its core, four methods and two seeds with the rates that the study chose, in under 20 minutes
# make ablations    Fig. 4, Fig. 6 and Table 5, three seeds: under two hours; goes on if interrupted

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := outputs/leapalign_flux
OLDEST := .venv-oldest/bin/python
CORE := $(addprefix tests/,plans surgery methods testing pipelines rewards training)

# Nothing here needs a model hub, and a test that asks for one must fail at once rather than wait.
export HF_HUB_OFFLINE := 1

.PHONY: test test-oldest lint demo docs environment study study-quick ablations

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-oldest: .venv-oldest/.installed
	$(OLDEST) -m pytest -n $(WORKERS) $(CORE)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

demo: $(STAMP)
	$(BIN)/python recipes/leapalign_flux.py
	@echo "Pictures: $(DEMO)/samples.png (before | after), $(DEMO)/reward.png, $(DEMO)/plan.svg"

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

study: $(STAMP)
	$(BIN)/python -m benchmarks.study.study

study-quick: $(STAMP)
	$(BIN)/python -m benchmarks.study.study --methods refl draft_lv drtune leapalign --seeds 0 1 --stages 225 \
		--chosen benchmarks/study/results/study_rates.json --runs outputs/study_quick --output outputs/study_quick
	@echo "Table and pictures: outputs/study_quick/study.md, study.png, study_samples.png"

ablations: $(STAMP)
	$(BIN)/python -m benchmarks.study.ablations

environment: $(STAMP)

# torch and torchvision are built for each other: named together and first, so that no other package picks one of them.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv-oldest/.installed: pyproject.toml constraints/oldest.txt
	test -x $(OLDEST) || $(PYTHON) -m venv .venv-oldest
	$(OLDEST) -m pip install --quiet --constraint constraints/oldest.txt torch torchvision
	$(OLDEST) -m pip install --quiet --constraint constraints/oldest.txt --editable '.[test,judges]'
	touch $@
