# itemvec: `make` says what there is. Everything runs in .venv, which is made on first use.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# A Python to use; without it the first of python3, python3.13, python3.12, python3.11 that is recent enough.
PYTHON ?=
# More arguments for pip, such as an index with CPU builds of torch.
PIP_ARGS ?=
# More arguments for `itemvec demo` and for pytest.
DEMO_ARGS ?=
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format bench constraints clean

help: ## list what make can do
	@printf 'make demo     train on the film table and serve it on http://127.0.0.1:8000 until Ctrl-C\n'
	@printf 'make test     all checks: format, lint, types, import contracts, tests\n'
	@printf 'make check    the same without the tests\n'
	@printf 'make format   rewrite the code in the format that the checks want\n'
	@printf 'make setup    only make the environment in $(VENV)\n'
	@printf 'make bench    list the benchmarks\n'
	@printf 'make clean    remove the environment, the caches and the data of the demo\n'
	@printf 'make constraints   resolve constraints.txt again, from the newest releases that fit pyproject.toml\n'

setup: $(STAMP)

# $(1) is a name or path; it will do if it runs, is a Python in range and can make an environment.
define find_python
for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; \
	then found=$$python; break; else found=; fi; \
done; \
if [ -z "$$found" ]; then \
	echo "itemvec needs Python 3.11, 3.12 or 3.13, and $(or $(PYTHON),python3) is none of them: install one, or name it with make PYTHON=/path/to/python3.12" >&2; exit 1; \
fi; \
if ! $$found -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	echo "$$found has no venv module: install it (on Debian and Ubuntu: apt-get install python3-venv), or name another with make PYTHON=..." >&2; exit 1; \
fi
endef

# The stamp is written last: an installation that was cut short is taken up again, a whole one is reused. pip would
# compile the modules one by one; here all cores do, without the tests of others. A file that is no Python is no error.
$(STAMP): pyproject.toml constraints.txt
	@$(find_python); \
	if ! $(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then \
		echo "making $(VENV) with $$($$found --version)"; rm -rf $(VENV); $$found -m venv $(VENV) || exit 1; \
	fi
	@echo "installing into $(VENV) (about 2 GB the first time, a few minutes) ..."
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile $$(test -t 1 || echo --quiet) \
		$(PIP_ARGS) --constraint constraints.txt --editable '.[all,dev]'
	@$(BIN)/python -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

demo: $(STAMP)
	@exec $(BIN)/itemvec demo $(DEMO_ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Fast tests are spread over the cores, but over four processes at most, since each loads torch. Slow ones start Rays,
# which are several processes already: one after the other, and types, which need one core for a while, beside them.
test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -m 'not slow' -n logical --maxprocesses 4 --dist worksteal $(PYTEST_ARGS) || [ $$? -eq 5 ]
	$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest -m slow --durations=12 $(PYTEST_ARGS) || [ $$? -eq 5 ] || { wait $$types; exit 1; }; \
	wait $$types
	@echo 'make test: format, lint, types, import contracts and tests are all right'

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench:
	@echo 'Each benchmark prints a table and leaves DIR/results.json:'
	@for file in benchmarks/[a-z]*.py; do \
		name=$$(basename $$file .py); data=; [ $$name = quality ] && data=' --data DATA'; \
		echo "  $(BIN)/python -m benchmarks.$$name$$data --out DIR"; done
	@echo 'DATA holds tables of which two are not in the repository; benchmarks/README.md says which.'

# In an environment of its own, so that nothing installed by hand gets in. TORCH is held because a newer one is a
# decision: its wheels are large, and the version decides which CUDA comes with it.
TORCH ?= 2.13.0
constraints:
	@set -e; $(find_python); fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$$found -m venv $$fresh/venv; \
	$$fresh/venv/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) torch==$(TORCH) --editable '.[all,dev]'; \
	{ sed -n '/^#/p' constraints.txt; \
	  $$fresh/venv/bin/python -m pip freeze --exclude-editable | sed -E 's/\+[A-Za-z0-9.]+$$//'; } > $$fresh/new; \
	mv $$fresh/new constraints.txt

clean:
	rm -rf $(VENV) .itemvec build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
