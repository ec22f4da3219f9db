# Each target sets itself up: all it needs is Python 3.11 or newer and pip. `make help` lists them.
PYTHON ?= python3
ARGS ?=

RUN := .venv/bin/python
TEST := JAX_PLATFORMS=cpu $(RUN) -m pytest -n 2 --dist worksteal -q
INSTALL := PIP_DISABLE_PIP_VERSION_CHECK=1 $(RUN) -m pip install -qq

.PHONY: help train test test-all chaos lint notebooks clean

help:
	@echo 'make train     train a small language model            ARGS="--plan data=2,tensor=one_d:2 --steps 100"'
	@echo 'make test      the quick tests, on simulated devices   ARGS="-k norms"'
	@echo 'make test-all  the slow tests as well'
	@echo 'make chaos     kill a run 50 times at random, lose nothing; about six minutes'
	@echo 'make lint      ruff: rules and formatting'
	@echo 'make notebooks run the sources in colab/ again and keep what they print'
	@echo 'make clean     remove .venv and caches; runs and data stay'

train: .venv/.stamp
	@$(RUN) -m experiments.lm $(ARGS)

test: .venv/.stamp
	@$(TEST) $(ARGS)

test-all: .venv/.stamp
	@$(TEST) -m "" $(ARGS)

chaos: .venv/.stamp
	@$(RUN) tests/chaos.py $(ARGS)

lint: .venv/.stamp
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

notebooks: .venv/.stamp
	@$(INSTALL) jupytext==1.19.6 nbclient==0.11.0 ipykernel==7.4.0
	@JAX_PLATFORMS=cpu $(RUN) tests/notebooks.py colab/*.py

clean:
	@rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist src/*.egg-info
	@find src tests experiments benchmarks colab -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# The stamp is written last, so that an interrupted install is taken up again. Only wheels: nothing but jaxpar itself is
# built here. Byte code is written afterwards, by all cores: pip would do it on one and take half as long again.
.venv/.stamp: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "jaxpar needs Python 3.11 or newer, and $(PYTHON) is not. Name one that is: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; \
	  exit 2; }
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv >/dev/null || { \
	  rm -rf .venv; \
	  echo "$(PYTHON) -m venv failed. On Debian and Ubuntu: apt install python3-venv, then the same command again." >&2; \
	  exit 2; }
	@echo "jaxpar: installing $$(grep -c == requirements.lock) packages into .venv, about a minute, once"
	@$(INSTALL) --no-compile --require-hashes --only-binary :all: -r requirements.lock && \
	  $(INSTALL) --no-deps --no-build-isolation --editable . || { \
	  echo "jaxpar: the install stopped at the message above; mend it and run the same command again." >&2; \
	  exit 2; }
	@$(RUN) -m compileall -qq -j 0 .venv/lib || true
	@touch .venv/.stamp
