# `make` lists the targets. Every target sets up what it needs; nothing needs root.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules

PYTHON ?= python3.11 python3
export DATA ?=
ARGS ?=

# Settings of other projects must not leak into the virtual environment, and bytecode must be kept: every process that
# imports Composer without it takes 17 s, with it 8 s.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX PYTHONDONTWRITEBYTECODE

# glibc returns large freed blocks to the kernel, and the page faults that follow made a training step on a CPU up to ten
# times slower. Read when a process starts, so it is set here. 32 MiB is the largest threshold that glibc accepts.
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TRIM_THRESHOLD_ := 8589934592
export MALLOC_TOP_PAD_ := 1073741824

# One stamp for each state of the pins and each place of the checkout (the scripts in .venv/bin hold absolute paths).
STAMP := .venv/.stamp-$(shell (cat requirements.txt; pwd -P) | sha256sum | cut -c1-16)

.PHONY: help setup test test-all lint format demo learn ablations studio requirements clean FORCE

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

setup: $(STAMP)  ## create .venv with everything pinned (about 7 GB; once)

# A virtual environment whose interpreter is gone is no virtual environment.
$(STAMP): $(if $(wildcard .venv/bin/python),,FORCE)
	@mkdir -p .setup
	exec 9> .setup/lock; flock 9
	if [ -e $@ ] && [ -x .venv/bin/python ]; then exit 0; fi  # another make did it while this one waited
	fail() { echo "error: $$*" >&2; exit 1; }
	python=
	for candidate in $(PYTHON); do
		python=$$("$$candidate" -c 'import sys; print(sys.executable if sys.version_info[:2] == (3, 11) else "")' 2> /dev/null) || true
		if [ -n "$$python" ]; then break; fi
	done
	[ -n "$$python" ] || fail "Python 3.11 not found (tried: $(PYTHON)); install it or name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.11"

	# uv: the one on PATH, or the pinned one from a private folder. A Debian without python3-venv still has pip, or the reverse.
	uv=uv
	if ! uv --version > /dev/null 2>&1; then
		uv=.setup/uv/bin/uv
		if ! "$$uv" --version > /dev/null 2>&1; then
			echo "setup: fetching uv"
			sed -n '/^uv==/,/^ *# via/p' requirements.txt > .setup/uv.txt
			pip=(-m pip --disable-pip-version-check install --quiet --root-user-action ignore --require-hashes -r .setup/uv.txt)
			rm -rf .setup/uv
			if "$$python" -m venv .setup/uv > /dev/null 2>&1; then
				.setup/uv/bin/python "$${pip[@]}" || fail "could not install uv: see above"
			else
				rm -rf .setup/uv
				"$$python" -m pip --version > /dev/null 2>&1 || fail "$$python has neither pip nor venv; install one (Debian: python3-venv), or uv"
				"$$python" "$${pip[@]}" --target .setup/uv || fail "could not install uv: see above"
			fi
		fi
	fi

	# The certificates of the system, where it has any: a company's proxy is in there.
	if [ -e /etc/ssl/certs/ca-certificates.crt ]; then export UV_SYSTEM_CERTS=1; fi

	# Hard links from uv's cache where it can; a cache on another file system is copied from without a warning.
	cache=$$("$$uv" cache dir)
	mkdir -p "$$cache"
	if [ -z "$${UV_LINK_MODE:-}" ] && [ "$$(stat -c %d "$$cache")" != "$$(stat -c %d .)" ]; then export UV_LINK_MODE=copy; fi

	# Start again (from uv's cache) after an interruption, when half a package looks installed; when the checkout has moved, because
	# scripts hold its path; and when the interpreter is another.
	if [ -e .venv/.incomplete ] || ! grep -qsF "$$(pwd -P)/.venv" .venv/bin/activate \
			|| ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2> /dev/null; then
		rm -rf .venv
		echo "setup: creating .venv with $$python"
		"$$uv" venv --quiet --python "$$python" .venv
	fi
	touch .venv/.incomplete
	rm -f .venv/.stamp-*
	echo "setup: installing the pinned packages (7 GB; a few minutes the first time)"
	# The same file constrains what the one source package (pyspark) is built with.
	"$$uv" pip sync --python .venv/bin/python --require-hashes --build-constraints requirements.txt requirements.txt
	"$$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
	echo "setup: checking that everything imports (half a minute)"
	.venv/bin/python -c 'import av, composer, matplotlib.pyplot, mlflow, pandas, pyspark.sql, streaming, transformers, webdataset'
	rm .venv/.incomplete
	touch $@
	echo "setup: done"

test: lint  ## lint, then the quick tests
	@$(PYTEST) -m "not slow"

test-all: lint  ## lint, then all tests
	@$(PYTEST)

# Two workers, each from its own end of the list; one that is done early takes over from the other. Whole files at a time
# (loadfile) would leave the last long file to one worker.
PYTEST = .venv/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: setup  ## ruff (lint and format) and mypy
	@.venv/bin/ruff check --quiet .
	.venv/bin/ruff format --check --quiet .
	.venv/bin/mypy --no-error-summary

format: setup  ## rewrite the sources in the house format
	@.venv/bin/ruff check --quiet --fix .
	.venv/bin/ruff format .

demo: setup  ## raw videos to generated clips; DATA=folder takes your own videos and images
	@.venv/bin/python -m pipelines.demo yamls/demo/demo.yaml $${DATA:+"data=$$DATA"} $(ARGS)

learn: setup  ## proof that it learns: a benchmark with a known truth, from raw videos to figures (docs/learning.md); resumes
	@.venv/bin/python -m pipelines.learn yamls/learn/learn.yaml $(ARGS)

ablations: setup  ## the paper's ablations on the data of make learn; hours (docs/learning.md); resumes
	@.venv/bin/python -m pipelines.ablations yamls/learn/ablations.yaml $(ARGS)

STUDIO ?= yamls/demo/studio.yaml
studio: setup  ## a web page: sample, compare models, browse shards, run a user study; STUDIO=yaml for other models than the demo's
	@.venv/bin/python -m pipelines.studio $(STUDIO) $(ARGS)

requirements: setup  ## pin anew what requirements.in and requirements-dev.in ask for; UPGRADE=1 takes the newest
	@uv=.venv/bin/uv
	"$$uv" pip compile --quiet requirements.in requirements-dev.in --python-version 3.11 --generate-hashes --no-emit-index-url \
		--custom-compile-command "make requirements" $(if $(UPGRADE),--upgrade) --output-file requirements.txt

clean:  ## remove .venv and caches; runs/ stays
	@rm -rf .venv .setup .pytest_cache .mypy_cache .ruff_cache snapvideo.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
