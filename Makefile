# make reports | make test | make test-all | make bench | make lab | make teachers: each builds .venv by itself when it is missing or out of date.
# Plain GNU make 3.81 and a POSIX shell are enough, so that macOS needs nothing else.

VENV := .venv
RUN := $(VENV)/bin/python
# Written last and removed first: no stamp, no finished environment.
STAMP := $(VENV)/installed.lock
USABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# The first that really runs: the shim of a version manager can exist and fail.
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3; do \
	if $$name -c '$(USABLE)' >/dev/null 2>&1; then echo $$name; break; fi; done)

.PHONY: help reports test test-all lint bench lab teachers clean
.DEFAULT_GOAL := help

help:
	@echo "make reports   run every notebook and write reports/ (half an hour to an hour on two cores)"
	@echo "make test      lint and run the tests, offline (five to ten minutes on two cores)"
	@echo "make test-all  the same, and the slow ones: every profile, the built wheel, whole workflows"
	@echo "make bench     run the suites of benchmarks/ on quiet cores; SUITES=\"relations student\" some"
	@echo "make lab       open the notebooks in JupyterLab"
	@echo "make teachers  train the embedded teachers again from nothing (hours without a GPU)"
	@echo "make clean     remove .venv and caches; runs/ and reports/ stay"
	@echo "Each builds .venv first when it is missing or requirements.lock changed; PYTHON=python3.12 picks an interpreter."

reports: $(STAMP)
	@$(RUN) -m distill_utils report --all

lint: $(STAMP)
	@$(RUN) -m ruff check --quiet .

# Two processes, each takes one file of tests after the other, so that fixtures of a module are built once.
TESTS := -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10

test: lint
	@$(RUN) $(TESTS) -m "not slow"

# The slow ones go to whichever process is free: they share nothing, and one file of them takes half the time.
test-all: test
	@$(RUN) -m pytest -n 2 --dist load --durations=10 -m slow

SUITES ?= kd_step relations loss_memory pseudo_labels student end_to_end growth two_processes
PACKAGES := benchmarks/.packages

# A suite that fails does not stop the next.
bench: $(STAMP) $(PACKAGES)/installed.txt
	@failed=; \
	for suite in $(SUITES); do \
		echo "== $$suite"; \
		$(RUN) benchmarks/$$suite.py || failed="$$failed $$suite"; \
	done; \
	$(RUN) -c "from distill_utils.report import index; index.update_readme()"; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

# TextBrewer and torchdistill, seen by their own forms of kd_step alone.
$(PACKAGES)/installed.txt: benchmarks/requirements.txt $(STAMP)
	@rm -rf $(PACKAGES)
	@$(RUN) -m pip install -q --disable-pip-version-check --no-deps --target $(PACKAGES) -r $<
	@cp $< $@

lab: $(STAMP)
	@$(RUN) -m jupyterlab notebooks

teachers: $(STAMP)
	@$(RUN) -m distill_utils teachers

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache

# A finished environment is updated in place, anything else is built anew.
$(STAMP): requirements.lock pyproject.toml
	@set -e; \
	if [ -f $(STAMP) ] && $(RUN) -c '$(USABLE)' >/dev/null 2>&1; then \
		echo "updating $(VENV): requirements.lock or pyproject.toml changed"; \
		rm -f $(STAMP); \
	else \
		python="$(PYTHON)"; \
		if [ -z "$$python" ]; then \
			echo "no Python 3.11, 3.12 or 3.13 (with venv) found: install one, or name it: make PYTHON=/path/to/python3" >&2; \
			exit 1; \
		fi; \
		if ! "$$python" -c '$(USABLE)' >/dev/null 2>&1; then \
			echo "PYTHON=$$python is no working Python 3.11 to 3.13 (with venv): name another, or leave PYTHON out" >&2; \
			exit 1; \
		fi; \
		echo "building $(VENV) with $$python: about 2 minutes and the downloads, once"; \
		"$$python" -m venv --clear $(VENV); \
	fi; \
	log=$(VENV)/install.log; \
	: > $$log; \
	install() { \
		echo "  $$1"; shift; \
		$(RUN) -m pip install --disable-pip-version-check "$$@" >> $$log 2>&1 || { \
			tail -n 12 $$log >&2; \
			echo "the installation failed, the whole log is in $$log; the next make starts again" >&2; \
			exit 1; \
		}; \
	}; \
	install "1 of 3: torch, the largest download" -c requirements.lock torch; \
	install "2 of 3: the other packages of requirements.lock" -r requirements.lock; \
	install "3 of 3: distill_utils from this folder" --no-deps --no-build-isolation -e .; \
	cp requirements.lock $(STAMP)
