# One environment, .venv, made once and re-used until pyproject.toml or constraints.txt change.
#   make test ARGS="tests/test_plots.py -x"      make install PYTHON=python3.12

PYTHON ?= python3
ARGS   ?=
PY     := .venv/bin/python
STAMP  := .venv/.installed
PEFT   := $(shell sed -n 's/^peft==//p' constraints.txt)
TESTS  := .venv/.peft-$(PEFT)-tests

.DEFAULT_GOAL := help
.PHONY: help install demo cards test study-small style quality clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv and install hf_fip with its test tools at the tested versions

# The stamp is the last thing written, so a failed or interrupted install runs again.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

# PEFT's own tests, which tests/peft_suite runs on our tuner, are in its source distribution only.
$(TESTS): $(STAMP)
	$(PY) -m pip download --disable-pip-version-check --no-deps --no-binary peft -d .venv peft==$(PEFT)
	tar -xzf .venv/peft-$(PEFT).tar.gz -C .venv
	@touch $@

demo: $(STAMP)  ## take a backdoor out of a small ViT, by FIP and by Fast FIP, on the handwritten digits
	OMP_NUM_THREADS=1 $(PY) recipes/purify_vit.py --output_dir outputs/fip --overwrite_output_dir $(ARGS)
	OMP_NUM_THREADS=1 $(PY) recipes/purify_vit.py --adapter singular --output_dir outputs/fast_fip \
		--overwrite_output_dir $(ARGS)
	$(PY) recipes/compare_runs.py outputs/fip outputs/fast_fip

cards: demo  ## the demo, and the example cards in model_cards/ written again from it
	$(PY) -m hf_fip.cli card outputs/fip --to model_cards/digits_vit_fip
	$(PY) -m hf_fip.cli card outputs/fast_fip --to model_cards/digits_vit_fast_fip

test: $(STAMP) $(TESTS)  ## run the whole test suite (more arguments: ARGS="-k fisher -x")
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)

study-small: $(STAMP)  ## the study on the handwritten digits, from nothing: under two hours on two cores
	$(PY) benchmarks/study.py --suite digits --results outputs/study_small --work outputs/study_small/victims
	$(PY) benchmarks/study.py --suite digits_benign --results outputs/study_small --work outputs/study_small/victims

style: $(STAMP)  ## format the code and fix what ruff can fix
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

quality: $(STAMP)  ## check format and lint, change nothing
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

clean:  ## remove .venv, builds and caches; outputs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
