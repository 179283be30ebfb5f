# make demo    the whole path on a simulated cohort; COHORT=FOLDER runs it on your own tables
# make test    the tests (make test-slow: those marked slow; make test-hub: whole releases)
# make lint    ruff and mypy
# make ablations         the cells of training/configs/ablations that have no result yet (JOBS= at once)
# make ablations-report  their tables in evaluation/RESULTS.md
# make bench   cost of the codec beside a plain transformer (CODEC= a checkpoint or a configuration)
# make bench-data  extraction of regions beside nilearn; with COHORT= of `prepare` also reading windows
# make test-browser  the page to try a checkpoint, in headless Chromium (make chromium installs it)
# PYTHON=      the interpreter that creates .venv when there is none

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
COHORT ?=
SEED ?= 0
SUBJECTS ?= 1300
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ROOMS := modeling tokenization cohorts evaluation training inference model_cards
CLI := $(BIN)/cortexicon

# A simulated cohort is written into the run; a real one stays where it is.
ifeq ($(strip $(COHORT)),)
DATA := $(RUN)/cohort
CONFIGS := demo
SCHEME := holdout
else
DATA := $(COHORT)
CONFIGS := abide
SCHEME := hash
endif

# Two busy threads per process on two cores make everything slower, not faster.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo test test-slow lint format clean install
.DEFAULT_GOAL := help
.PHONY: help
help:
	@sed -n '1,9p' Makefile | sed 's/^# //'

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing cortexicon and its tested dependencies into $(VENV) (one to three minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
		-e '.[dev,all]' -c constraints.txt
	@touch $(STAMP)

demo: $(STAMP)
	@mkdir -p $(RUN)
ifeq ($(strip $(COHORT)),)
	$(CLI) simulate --out $(DATA) --num-subjects $(SUBJECTS) --seed $(SEED)
endif
	$(CLI) split $(DATA) --out $(RUN)/split.json --scheme $(SCHEME) --seed $(SEED)
	$(CLI) train text training/configs/$(CONFIGS)_text.yaml --set output=$(RUN)/text
	$(CLI) train avq training/configs/$(CONFIGS)_avq.yaml \
		--set cohort=$(DATA) split=$(RUN)/split.json text_model=$(RUN)/text output=$(RUN)/avq
	$(CLI) train lm training/configs/$(CONFIGS)_lm.yaml \
		--set cohort=$(DATA) split=$(RUN)/split.json \
		text_model=$(RUN)/text avq=$(RUN)/avq output=$(RUN)/lm
	$(CLI) evaluate $(RUN)/lm $(DATA) --split $(RUN)/split.json --baselines \
		--json $(RUN)/evaluation/reconstruction.json --predictions $(RUN)/predictions
	$(CLI) report $(RUN)
	@echo "report   $(RUN)/report.html"
	@echo "results  $(RUN)/results.json"

.PHONY: ablations ablations-report
CELLS ?= $(wildcard training/configs/ablations/*.yaml)
JOBS ?= 1

ablations: $(STAMP)
	$(CLI) ablate $(CELLS) --jobs $(JOBS) $(if $(strip $(COHORT)),--cohort $(COHORT))

ablations-report: $(STAMP)
	$(CLI) ablate $(CELLS) --report

.PHONY: bench
CODEC ?= training/configs/abide_avq.yaml

bench: $(STAMP)
	$(CLI) speed $(CODEC) --json runs/speed/$(basename $(notdir $(CODEC))).json

.PHONY: bench-data
bench-data: $(STAMP)
	@mkdir -p runs/speed
	$(BIN)/python -m cortexicon.evaluation.extraction_speed --json runs/speed/extraction.json
ifneq ($(strip $(COHORT)),)
	$(BIN)/python -m cortexicon.evaluation.reading_speed $(COHORT) --json runs/speed/reading.json
endif

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow"

# The checkpoint in the box, from nothing but the cohort: text model, codecs of both streams, scores,
# checks. About 20 minutes on one core; what is there already is kept. Its code files are links to the
# rooms. The text model learns from what text lies here, so weights made anew have other last bits.
.PHONY: checkpoints
RELEASE ?= runs/release
BOX := checkpoints/avq_abide_cc200
BOX_COHORT := $(if $(strip $(COHORT)),$(COHORT),../shared/data/abide1_cc200)
TRAIN_BOX = $(CLI) train avq $(1) --set cohort=$(BOX_COHORT) output=$(RELEASE)/$(2)

runs/abide/split.json: | $(STAMP)
	$(CLI) split $(BOX_COHORT) --out $@ --scheme hash

runs/abide/text/model.safetensors: | $(STAMP)
	$(CLI) train text training/configs/abide_text.yaml

$(RELEASE)/avq/model.safetensors: | runs/abide/split.json runs/abide/text/model.safetensors
	$(call TRAIN_BOX,training/configs/abide_avq.yaml,avq) model.num_connectivity_codes=8192

$(RELEASE)/connectome/model.safetensors: | runs/abide/split.json runs/abide/text/model.safetensors
	$(call TRAIN_BOX,training/configs/abide_connectome_box.yaml,connectome)
	$(CLI) protect $(RELEASE)/connectome

checkpoints: $(RELEASE)/avq/model.safetensors $(RELEASE)/connectome/model.safetensors
	$(CLI) evaluate $(RELEASE)/avq $(BOX_COHORT) --split runs/abide/split.json --baselines \
		--json $(RELEASE)/evaluation/reconstruction.json
	$(CLI) report $(RELEASE)
	$(CLI) publish $(RELEASE) cortexicon/avq-abide-cc200 --data abide1 --dry-run --out $(BOX)
	for file in $(BOX)/*.py; do name=$$(basename $$file); for room in modeling tokenization; do \
		test ! -f $$room/$$name || ln -sf ../../$$room/$$name $$file; done; done

.PHONY: test-hub
test-hub: $(STAMP)
	$(BIN)/python -m pytest -q -m hub tests/hub

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) -m slow

# The Space in headless Chromium. SCREENSHOT=docs/space.png keeps the picture of the page.
.PHONY: chromium test-browser
chromium:
	@command -v chromium || { apt-get update -qq && apt-get install -y --no-install-recommends chromium; }

test-browser: $(STAMP)
	$(if $(SCREENSHOT),CORTEXICON_SCREENSHOT=$(abspath $(SCREENSHOT))) \
		$(BIN)/python -m pytest -q -m browser tests/model_cards

# mypy reads a folder of links: the rooms have their real names only inside `cortexicon`.
lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@rm -rf $(VENV)/typecheck && mkdir -p $(VENV)/typecheck/cortexicon
	@for path in cortexicon/*.py cortexicon/py.typed $(ROOMS); do \
		ln -s "$(CURDIR)/$$path" $(VENV)/typecheck/cortexicon/; done
	cd $(VENV)/typecheck && MYPYPATH=. ../bin/python -m mypy \
		--config-file "$(CURDIR)/pyproject.toml" -p cortexicon

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -type d -prune -exec rm -rf {} +
