# Every target that needs .venv brings it up to date first; where it already is, that costs nothing.
# PYTHON=/path/to/python chooses the interpreter, ARGS="..." goes to pytest or to the benchmark.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test lint bench dashboard vbench-env system-deps clean

# "3.11.7 /usr/bin/python3.11" of the first interpreter that runs and is new enough. Its base
# executable, so that a virtual environment which happens to be active does not become the base of ours.
FOUND := $(shell for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	"$$python" -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) and \
	print("%d.%d.%d" % v[:3], sys._base_executable)' 2>/dev/null; done | head -n 1)
PYTHON_VERSION := $(firstword $(FOUND))
INTERPRETER := $(wordlist 2,99,$(FOUND))

VENV_PYTHON := .venv/bin/python
CREATED := .venv/.created-$(PYTHON_VERSION)
DEMO := .venv/.has-demo
DASHBOARD := .venv/.has-dashboard
ALL := .venv/.has-all
VBENCH_PYTHON := .venv-vbench/bin/python
# Of the pins it was built from: other pins build another.
VBENCH := .venv-vbench/.has-$(shell sha256sum evals/vbench-env.txt 2>/dev/null | cut -c 1-12)

help: ## print this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1@\2/p' Makefile | \
		while IFS=@ read -r name does; do printf '%-18s %s\n' "$$name" "$$does"; done

setup: $(ALL) ## install everything (all extras) into .venv
	@echo "setup: .venv is up to date (Python $(PYTHON_VERSION), all extras)"

demo: $(DEMO) ## curate the sample corpus into ./out/demo; installs only what that needs
	@$(VENV_PYTHON) pipelines/curate.py

# In two processes, each with a Ray for the tests that need one; ARGS="-n 0" is one.
test: $(ALL) ## run the test suite, with the tests marked gpu where there is an NVIDIA GPU
	@$(VENV_PYTHON) -m pytest -n 2 --dist loadfile $(if $(shell nvidia-smi --list-gpus 2>/dev/null),-m "") $(ARGS)

lint: $(ALL) ## check style and format with ruff
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .

bench: $(ALL) ## measure speed and memory, and write the table of figures
	@$(VENV_PYTHON) tests/bench.py $(ARGS)

# DATASET=out/mine make dashboard; ARGS="--evaluations out/evals --votes out/votes" and the like
dashboard: $(DASHBOARD) ## show a dataset in the browser, ./out/demo unless DATASET names another
	@$(VENV_PYTHON) -m cluster dashboard $(or $(DATASET),out/demo) $(ARGS)

# What `scene` and, with detectron2, object_class, multiple_objects, color and spatial_relationship
# are measured in. Where github.com cannot be reached: make vbench-env DETECTRON2=/path/to/checkout
vbench-env: $(VBENCH) ## build .venv-vbench, VBench's own environment, for dimensions that need it
	@$(VBENCH_PYTHON) -m evals.environments $(if $(DETECTRON2),"$(DETECTRON2)")

# Debian splits python3-venv off from python3: nothing can be set up without it.
system-deps: ## install the Debian packages that only tests need (ffmpeg, chromium), as root or with sudo
	@missing=; \
	command -v ffmpeg >/dev/null || missing="$$missing ffmpeg"; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	command -v chromedriver >/dev/null || missing="$$missing chromium-driver"; \
	"$(INTERPRETER)" -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	if [ -z "$$missing" ]; then echo "system-deps: nothing to install"; exit; fi; \
	install="apt-get install -y --no-install-recommends$$missing"; \
	if ! command -v apt-get >/dev/null; then \
		echo "system-deps: there is no apt-get here; install by hand:$$missing"; exit; \
	fi; \
	if [ "$$(id -u)" = 0 ]; then root=; else root=sudo; fi; \
	if [ -n "$$root" ] && ! command -v sudo >/dev/null; then \
		echo "system-deps: not root, and there is no sudo; run as root: $$install" >&2; exit 1; \
	fi; \
	echo "system-deps: installing$$missing"; \
	$$root apt-get update -qq && \
	$$root env DEBIAN_FRONTEND=noninteractive $$install -qq >/dev/null

clean: ## remove .venv, .venv-vbench, ./out and what tools cached
	rm -rf .venv .venv-vbench out build dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment in two sizes. The Python version is in a stamp's name, so another version starts
# afresh; a newer pyproject.toml or constraints.txt installs again, which takes seconds.
$(CREATED):
	$(if $(PYTHON_VERSION),,$(error Python 3.11, 3.12 or 3.13 is needed and $(or \
		$(PYTHON),none of python3.11 python3.12 python3.13 python3) is not one; name one: make PYTHON=/path/to/python))
	@echo "setup: creating .venv with Python $(PYTHON_VERSION)"
	@"$(INTERPRETER)" -m venv --clear .venv
	@touch $@

$(DEMO): pyproject.toml constraints.txt $(CREATED)
	@echo "setup: installing what the demo needs into .venv (about a minute; log in .venv/install.log)"
	@$(call install,demo)
	@touch $@

$(DASHBOARD): pyproject.toml constraints.txt $(CREATED)
	@echo "setup: installing what the dashboard needs into .venv (log in .venv/install.log)"
	@$(call install,demo dashboard)
	@touch $(DEMO) $@

$(ALL): pyproject.toml constraints.txt $(CREATED)
	@echo "setup: installing all extras, PyTorch too, into .venv (minutes; log in .venv/install.log)"
	@$(call install)
	@touch $(DEMO) $(DASHBOARD) $@

# The same Python as .venv, where there is one: Ray runs both. `--no-deps`: the pins are the whole
# list, and leave out what vbench asks for and never imports.
$(VBENCH): BASE = $(or $(wildcard $(VENV_PYTHON)),$(INTERPRETER))
$(VBENCH):
	@"$(BASE)" -c "$$CHECK_VBENCH_BASE"
	@echo "vbench-env: building .venv-vbench (minutes, 7 GB; log in .venv-vbench/install.log)"
	@"$(BASE)" -m venv --clear .venv-vbench
	@$(VBENCH_PYTHON) -m pip install --disable-pip-version-check --no-input --no-deps \
		-r evals/vbench-env.txt > .venv-vbench/install.log 2>&1 || \
		{ tail -n 20 .venv-vbench/install.log >&2; exit 1; }
	@touch $@

define CHECK_VBENCH_BASE
import shutil, sys
if sys.version_info[:2] != (3, 11):
    sys.exit("vbench-env: VBench's pins have no wheels for Python %d.%d: they need 3.11, in .venv too"
        "; make clean, then make setup vbench-env PYTHON=python3.11" % sys.version_info[:2])
free = shutil.disk_usage(".").free / 1e9
if free < 10:
    sys.exit(f"vbench-env: needs 10 GB of disk while it is built, and {free:.1f} GB are free")
endef
export CHECK_VBENCH_BASE

# The dependencies only: our packages are imported from this folder, as on a cluster where the
# project was never installed.
define install
$(VENV_PYTHON) -c "$$REQUIREMENTS" $(1) && \
{ { $(PIP_INSTALL) -c constraints.txt -r .venv/requirements.txt && \
	{ [ ! -s .venv/without-dependencies.txt ] || \
		$(PIP_INSTALL) -c constraints.txt --no-deps -r .venv/without-dependencies.txt; }; \
	} > .venv/install.log 2>&1 || { tail -n 20 .venv/install.log >&2; exit 1; }; } && \
$(VENV_PYTHON) -c "$$CHECK_CV2"
endef
PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check --no-input

# Of the extras named as arguments, or of all; what pip is to resolve, and what it would refuse to.
define REQUIREMENTS
import pathlib, sys, tomllib
whole = tomllib.loads(pathlib.Path("pyproject.toml").read_text(encoding="utf-8"))
extras = whole["project"]["optional-dependencies"]
alone = whole.get("tool", {}).get("reelwright", {}).get("without-dependencies", {})
def write(path, lines, found):
    lines += [line for name in sys.argv[1:] or found for line in found.get(name, [])]
    pathlib.Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
write(".venv/requirements.txt", whole["project"]["dependencies"], extras)
write(".venv/without-dependencies.txt", [], alone)
endef
export REQUIREMENTS

# The loader names one missing library at a time; all that cv2 needs are tried, to name them at once.
define CHECK_CV2
import ctypes, re, sys
packages = {
    "libGL.so.1": "libgl1",
    "libglib-2.0.so.0": "libglib2.0-0",
    "libgthread-2.0.so.0": "libglib2.0-0",
    "libxcb.so.1": "libxcb1",
}
def missing(library):
    try:
        ctypes.CDLL(library)
    except OSError:
        return True
    return False
try:
    import cv2
except ImportError as error:
    named = re.findall(r"lib[\w.+-]+\.so[.\d]*", str(error))
    if not named:
        sys.exit(f"setup: cv2 cannot be imported: {error}")
    libraries = sorted({named[0], *filter(missing, packages)})
    wanted = sorted({packages.get(name, f"the package that holds {name}") for name in libraries})
    sys.exit(f"setup: cv2 needs {', '.join(libraries)}; install them: apt-get install {' '.join(wanted)}")
endef
export CHECK_CV2
