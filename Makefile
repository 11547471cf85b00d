# Every target does all the set-up it needs; PYTHON chooses the environment it is done in. pip compiles no bytecode,
# which would take half a minute: Python does so for what is imported, and nothing forbids it here.
PYTHON ?= python
PIP = $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE =

.PHONY: help build demo lint test mutants clean
help:      ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/ -/'

build:     ## install requirements.txt and compile the deformable attention operator
	$(PIP) -r requirements.txt
	$(PYTHON) -m deform_attn_cuda.build

demo: build  ## train the tiny model on synthetic shapes, evaluate it and draw its predictions (12 minutes, 2 cores)
	$(PYTHON) train.py --data shapes --preset tiny --out runs/demo --resume
	$(PYTHON) evaluate.py --ckpt runs/demo/last.pt --draw 12 --json runs/demo/metrics.json

lint: build  ## check style and format, and change nothing
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

# A file goes to one process, as its tests share what they trained. One thread each: two would wait for one another.
test: export OMP_NUM_THREADS = 1
test: build  ## run the specification, in two processes
	$(PYTHON) -m pytest -n 2 --dist loadfile

mutants: export OMP_NUM_THREADS = 1
mutants: build  ## change the program in one place at a time and list what no test notices (hours; SAMPLE=300: a sample)
	$(PIP) mutmut==3.8.1
	$(PYTHON) -m tests.mutants "$(or $(MUTANTS),*)" $(if $(SAMPLE),--sample $(SAMPLE))

clean:     ## remove the compiled operator, caches, and nothing that was trained or downloaded
	rm -rf deform_attn_cuda/build .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
