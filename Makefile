# `make demo` runs the main job, `make test` passes the tests. Both set up .venv first.
#   make demo MODEL=dir   runs a real Hugging Face MoE checkpoint instead of a small random one
#   make test JOBS=8      in eight processes; the kernels of the Triton plugin run on a GPU, or else in the interpreter
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
MODEL  ?=
PROMPT ?=
ARGS   ?=
JOBS   ?= 2
PLUGINS := $(wildcard plugins/*/pyproject.toml)
# Plugins are installed without their dependencies: the vendors' packages need their hardware.
EDITABLE := $(foreach p,$(PLUGINS),-e $(patsubst %/pyproject.toml,%,$(p)))

.PHONY: demo test check format wheels bench setup setup-dev clean

# torch comes first, by itself: make demo TORCH="torch --index-url URL" takes another build (the CPU wheels of pytorch.org
# spare a machine without a GPU some gigabytes), and one that is in $(VENV) already is kept.
$(VENV)/.core: pyproject.toml $(PLUGINS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q "hatchling>=1.27" -e ".[transformers]"
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation $(EDITABLE)
	touch $@

$(VENV)/.dev: $(VENV)/.core requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

setup: $(VENV)/.core
setup-dev: $(VENV)/.dev

demo: $(VENV)/.core
	$(BIN)/moe-core run $(if $(MODEL),--model "$(MODEL)") $(if $(PROMPT),--prompt "$(PROMPT)") $(ARGS)

test: $(VENV)/.dev
	$(BIN)/pytest -m "not wheels" -n $(JOBS) $(ARGS)

wheels: $(VENV)/.dev
	$(BIN)/pytest -m wheels $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/cpu_experts.py $(ARGS)

clean:
	rm -rf $(VENV) .demo dist build
