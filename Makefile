# make demo     set everything up, then train a network twice: stock PyTorch and fastremedy
# make test     set everything up, then run the tests
# make bench    measure into benchmarks/results/, then print the numbers into README.md
# make lint     ruff, mypy, clang-format
# make wheel    the sdist and the wheel of this Python into dist/; needs nvcc, or ARGS=--cpu
#
# ARGS='--epochs 20'               arguments for the demo, pytest, the benchmarks or the wheel
# TORCH=torch==2.11.0              another torch than the CPU build below
# SYSTEM=1 PYTHON=/path/to/python  the torch of that Python; nothing is installed over it
# FASTREMEDY_CUDA_ARCHS='8.6;8.9'  what the CUDA kernels are built for in place, if neither for the
#                                  GPU of this machine nor, without one, from 8.0 on

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= $(if $(filter torch==2.13.0,$(TORCH)),triton==3.7.1,triton)
JOBS ?= 2

# Over an environment that is not ours lies a layer of our own.
VENV := $(if $(SYSTEM),build/system$(subst /,-,$(PYTHON)),.venv)
PY := $(VENV)/bin/python
READY := $(VENV)/.ready-$(if $(SYSTEM),system,$(subst =,,$(TORCH)))
# The GPU of this machine, or those whose kernels tools/kernel_resources.py looks at.
ARCHS := $(or $(FASTREMEDY_CUDA_ARCHS),$(if $(wildcard /dev/nvidiactl),native,8.0;9.0;10.0;12.0+PTX))
BUILT := $(VENV)/.built-$(FASTREMEDY_BUILD)-$(subst ;,_,$(subst +,_,$(ARCHS)))
SOURCES := $(wildcard csrc/core/* csrc/cpu/* csrc/cuda/* csrc/host/* csrc/ops/*)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test bench lint wheel build clean

demo: build
	$(PY) -m fastremedy demo $(ARGS)

test: build
	$(PY) -m pytest --numprocesses $(JOBS) --dist loadscope --no-loadscope-reorder $(ARGS)

bench: build
	$(PY) -m pytest benchmarks --benchmark-json=$$($(PY) benchmarks/table.py --path) $(ARGS)
	$(PY) benchmarks/table.py

lint: $(READY)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs $(VENV)/bin/clang-format --dry-run -Werror

wheel: $(READY)
	$(PY) tools/build_wheels.py --here $(ARGS)

build: $(BUILT)

clean:
	rm -rf build dist *.egg-info fastremedy/*.so .venv/.built-*

# In place, so that a changed source recompiles alone. --force leaves it to ninja what that is: it
# knows the flags, too.
$(BUILT): $(READY) setup.py $(SOURCES)
	@echo "building the native library; build/native.log tells how"
	@mkdir -p build && rm -f $(VENV)/.built-*
	@FASTREMEDY_CUDA_ARCHS='$(ARCHS)' $(PY) setup.py build_ext --inplace --force > build/native.log 2>&1 || { cat build/native.log; exit 1; }
	@grep -h "no native library" build/native.log || true
	@touch $@

ifdef SYSTEM
$(READY): pyproject.toml
	@echo "laying $(VENV) over the environment of $(PYTHON)"
	@$(PYTHON) -m venv --without-pip --system-site-packages $(VENV)
	@$(PYTHON) -c "import site; print(*map('import site; site.addsitedir({!r})'.format, \
	  site.getsitepackages()), sep='\n')" > $$(echo $(VENV)/lib/python*/site-packages)/system.pth
	@FASTREMEDY_BUILD=none $(PYTHON) -m pip --python $(PY) install -qq \
	  --no-deps --no-build-isolation --no-index -e .
	@touch $@
else
$(READY): pyproject.toml
	@echo "installing $(TORCH) and the tools into $(VENV)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.ready-*
	@$(PY) -m pip install -qq '$(TORCH)' '$(TRITON)' 'setuptools>=77' pybind11 ninja
	@FASTREMEDY_BUILD=none $(PY) -m pip install -qq --no-build-isolation -e '.[dev]'
	@touch $@
endif
