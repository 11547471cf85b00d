# Every target installs what it needs into the Python environment that is there: the one that PYTHON=... names, the active
# virtualenv or conda environment, or a Python >= 3.11 that pip may install into. Where there is none, it makes .venv.
RECENT = -c "import sys; sys.exit(sys.version_info < (3, 11))"
ifndef PYTHON
ifneq ($(VIRTUAL_ENV)$(CONDA_PREFIX),)
PYTHON := python
else
PYTHON := $(shell for p in python python3; do \
	if $$p $(RECENT) && $$p -m pip install --quiet --dry-run pip; then echo $$p; exit; fi; done 2> /dev/null; \
	echo .venv/bin/python)
endif
endif

# pip compiles no bytecode, which takes half a minute: Python does so for what is imported, and nothing forbids it here.
PIP = $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE =
ifeq ($(PYTHON),.venv/bin/python)
ENVIRONMENT := .venv/bin/pip
ADVICE = @echo "Everything is installed in .venv. To use it in this shell: source .venv/bin/activate"
endif

.PHONY: help build demo lint test mutants clean installed
help:      ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/ -/'

build: installed  ## install requirements.txt and compile the deformable attention operator
	$(ADVICE)

# As the paper starts from a backbone trained on ImageNet, the demo starts from that of docs/shapes.pt, which it freezes.
# Operators are so small here that two threads spend a third of their time waiting for one another: they sleep, not spin.
demo: export OMP_WAIT_POLICY = passive
demo: installed  ## train the tiny model on synthetic shapes for 2 epochs, evaluate it and draw its predictions
	$(PYTHON) train.py --epochs 2 --batch-size 4 --lr 3e-3 --backbone-weights docs/shapes.pt --set backbone_lr=0 \
		--set denoising=32 --set label_noise=1.0 --set mask_points=128 --out runs/demo --resume
	$(PYTHON) evaluate.py --ckpt runs/demo/last.pt --draw 8 --json runs/demo/metrics.json
	$(ADVICE)

lint: installed  ## check style and format, and change nothing
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

# A file goes to one process, as its tests share what they trained; tests/conftest.py says which come first. One thread
# each: two would wait for one another.
test: export OMP_NUM_THREADS = 1
test: installed  ## run the specification, in two processes
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(ADVICE)

mutants: export OMP_NUM_THREADS = 1
mutants: installed  ## change the program in one place at a time and list what no test notices (hours; SAMPLE=300: a sample)
	$(PIP) mutmut==3.8.1
	$(PYTHON) -m tests.mutants "$(or $(MUTANTS),*)" $(if $(SAMPLE),--sample $(SAMPLE))

clean:     ## remove the compiled operator, caches, and nothing that was trained or downloaded
	rm -rf deform_attn_cuda/build .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

installed: $(ENVIRONMENT)
	@$(PYTHON) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m ensurepip  # an environment of uv has no pip
	$(PIP) -r requirements.txt
	$(PYTHON) -m deform_attn_cuda.build

.venv/bin/pip:
	@python3 $(RECENT) || { echo "Python 3.11 or newer is needed: make PYTHON=..., or an active environment" >&2; exit 1; }
	python3 -m venv .venv || { echo "No .venv without venv. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
