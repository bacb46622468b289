# Each target does all its own set-up from a fresh clone: a virtual environment in $(VENV) with the tools it needs from
# PyPI, and this library installed there (not editable, so what is tested is what a wheel would hold).
# Needs Python >= 3.11 with its headers, and a C compiler.
#
#   make demo         the main job: one program over every wire            DEMO_ARGS="--seconds 8"
#   make test         all but the slow, in 6 minutes                       TESTS="tests/contract" PYTEST_ARGS="-x"
#   make check        lint, types, layers, lists of files, docs
#   make bench        beside what one would otherwise use                  BENCH_ARGS="--help"
#   make docs         the site, into site/
#   make wheel        a repaired wheel in dist/, proven where there is no compiler
#   make fuzz         atheris on framing and addresses                     FUZZ_SECONDS=60
#   make sanitize     the native code's tests under ASan and UBSan
#   make integration  other people's programs on our event loop            PYTEST_ARGS="-k redis"
#   make races        threads that share a connection, under ThreadSanitizer
#   make evidence     everything slow, its results into docs/evidence/     EVIDENCE_ARGS="--list"
#   make clean        remove all of the above

PYTHON ?= python3
# The interpreter is fixed when the environment is made. For another one beside it: VENV=.venv-3.13 PYTHON=python3.13
VENV ?= .venv
TESTS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
EVIDENCE_ARGS ?=
FUZZ_SECONDS ?= 60
FUZZ_ARGS ?=
# Passed to Meson, e.g. MESON_ARGS="-Csetup-args=-Db_sanitize=address,undefined"
MESON_ARGS ?=
# Where builds with several interpreters share what Cython makes; none by default.
CYTHON_CACHE_DIR ?=
export CYTHON_CACHE_DIR

BIN := $(VENV)/bin
# The build finds meson, ninja and cython on PATH. No prompt may ever wait for an answer.
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SOURCES := pyproject.toml meson.build meson.options $(shell find src -type f \
	\( -name '*.py' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.pyi' -o -name '*.h' -o -name 'meson.build' \))

COMPILED := $(subst /,.,$(patsubst src/%.pyx,%,$(sort $(shell find src -name '*.pyx'))))

.PHONY: demo test check check-lint check-types check-layers check-files bench docs wheel fuzz sanitize sanitize-build integration races evidence clean build
.DELETE_ON_ERROR:

demo: $(VENV)/.built $(VENV)/.group-cli
	$(BIN)/anywire demo $(DEMO_ARGS)

# Most tests wait for other processes, so more of them than CPUs run at a time; PARALLEL= runs them one by one.
PARALLEL ?= -n 4 --dist worksteal
test: $(VENV)/.built $(VENV)/.group-test
	@mkdir -p build
	ANYWIRE_CONFORMANCE_RESULT=build/conformance.json $(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(PYTEST_ARGS) $(TESTS)

bench: $(VENV)/.built $(VENV)/.group-bench
	$(BIN)/anywire bench $(BENCH_ARGS)

build: $(VENV)/.built

# The interpreter itself isn't instrumented, so the runtime comes first by LD_PRELOAD, and its own allocator (which hides
# small overruns) and its leaks (objects that live until exit) are left out. A report of any process fails the target.
# Without optimisation: it is built in half the time, and the tests, most of which wait, take no longer.
SANITIZE_TESTS ?= tests/engine tests/loop tests/framing tests/contract tests/wires tests/native tests/conformance tests/ipc tests/multiprocessing/test_queues.py
sanitize-build:
	@$(MAKE) --no-print-directory VENV=.venv-sanitize MESON_ARGS="-Csetup-args=-Db_sanitize=address,undefined \
		-Csetup-args=-Db_lundef=false -Csetup-args=-Doptimization=0" .venv-sanitize/.built .venv-sanitize/.group-test

sanitize: sanitize-build
	@rm -f build/sanitizer.*
	LD_PRELOAD=$$(gcc -print-file-name=libasan.so) PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:log_path=$(CURDIR)/build/sanitizer \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:log_path=$(CURDIR)/build/sanitizer \
	.venv-sanitize/bin/python -m pytest --timeout 240 -m "not no_sanitize and not faults and not slow" $(PARALLEL) $(PYTEST_ARGS) $(SANITIZE_TESTS); \
	status=$$?; for report in build/sanitizer.*; do \
		if [ -e "$$report" ]; then grep -v '/Python/\|Objects/\|Include/internal' "$$report" | head -n 40; status=1; fi; \
	done; exit $$status

# PostgreSQL, Redis and wrk are used where they are installed; their tests are skipped elsewhere.
integration: $(VENV)/.built $(VENV)/.group-integration
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS) integration

# Threads that share memory, under ThreadSanitizer. The interpreter's own accesses aren't seen, its locks are (the runtime
# comes by LD_PRELOAD): what is reported is native code that touches shared memory outside the GIL. The ring of the
# shared-memory wire is tested as C alone, RACES_SCALE times as long as by `make test`.
RACES_TESTS ?= tests/native/test_threads.py tests/native/test_ring.py tests/native/test_queue_threads.py tests/native/test_lock_threads.py
RACES_SCALE ?= 20
races:
	@$(MAKE) --no-print-directory VENV=.venv-races MESON_ARGS="-Csetup-args=-Db_sanitize=thread \
		-Csetup-args=-Db_lundef=false -Csetup-args=-Doptimization=1" .venv-races/.built .venv-races/.group-test
	@rm -f build/races.*
	ANYWIRE_RING_SCALE=$(RACES_SCALE) LD_PRELOAD=$$(gcc -print-file-name=libtsan.so) \
	TSAN_OPTIONS=halt_on_error=0:second_deadlock_stack=1:log_path=$(CURDIR)/build/races \
	setarch -R .venv-races/bin/python -m pytest --timeout 240 $(PYTEST_ARGS) $(RACES_TESTS); \
	status=$$?; for report in build/races.*; do \
		if [ -e "$$report" ]; then head -n 60 "$$report"; status=1; fi; \
	done; exit $$status

# Each check runs even when another failed, so that one run shows everything.
check: $(VENV)/.built $(VENV)/.group-check $(VENV)/.group-docs
	@$(MAKE) --no-print-directory --keep-going check-lint check-types check-layers check-files docs

check-lint: $(VENV)/.group-check
	$(BIN)/ruff check --quiet --output-format concise .

# Two type checkers on the public names; pyright reads the stubs too, and stubtest compares them with what was compiled.
check-types: $(VENV)/.built $(VENV)/.group-check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml --concise --ignore-disjoint-bases \
		--ignore-unused-allowlist --allowlist tests/typing/stubtest.txt $(COMPILED)

check-layers: $(VENV)/.built $(VENV)/.group-check
	@$(BIN)/lint-imports --no-logo >build/layers.log 2>&1 || { cat build/layers.log; exit 1; }
	$(BIN)/python scripts/check_layers.py

check-files: $(VENV)/.group-check
	$(BIN)/python scripts/check_sources.py
	$(BIN)/python scripts/check_evidence.py
	@$(BIN)/towncrier build --draft --version next >build/changelog.log 2>&1 || { cat build/changelog.log; exit 1; }

docs: $(VENV)/.group-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Built like any install, then made to run on other distributions, then tried where there is nothing.
wheel: $(VENV)/.built $(VENV)/.group-wheel
	@rm -rf build/wheel dist && mkdir -p build/wheel dist
	$(BIN)/python -m pip wheel -qq --no-build-isolation --no-deps -Cbuild-dir=build/$(notdir $(VENV)) -w build/wheel .
	$(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl >build/auditwheel.log 2>&1 || { cat build/auditwheel.log; exit 1; }
	$(BIN)/python scripts/check_wheel.py dist/*.whl

fuzz: $(VENV)/.built $(VENV)/.group-fuzz
	$(BIN)/python scripts/fuzz.py --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

evidence: $(VENV)/.built $(VENV)/.group-bench $(VENV)/.group-fuzz $(VENV)/.group-test $(VENV)/.group-integration
	$(BIN)/python scripts/evidence.py $(EVIDENCE_ARGS)

# ---- environments -----------------------------------------------------------------------------------------------

# One stamp a dependency group, so that `make demo` doesn't wait for the type checkers.
$(VENV)/.group-%: pyproject.toml | $(VENV)/.python
	@echo "installing the $* tools into $(VENV)"
	@$(BIN)/python -m pip install -qq --group $*
	@touch $@

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(1)' || { echo \
	"anywire needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	@rm -rf build/$(notdir $(VENV))
	@$(PYTHON) -m venv --clear $(VENV) || { echo \
	"'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv python3-dev" >&2; exit 1; }
	@$(BIN)/python -m pip install -qq --upgrade 'pip>=25.1'
	@touch $@

# ---- the library ------------------------------------------------------------------------------------------------

# Meson's build directory stays, so only what changed is compiled.
$(VENV)/.built: $(SOURCES) $(VENV)/.group-build
	@mkdir -p build
	@$(BIN)/python -m pip install -qq --no-build-isolation --no-deps -Cbuild-dir=build/$(notdir $(VENV)) $(MESON_ARGS) \
		$(if $(CYTHON_CACHE_DIR),-Csetup-args=-Dcache_cython=true) . \
		> build/$(notdir $(VENV)).log 2>&1 || { cat build/$(notdir $(VENV)).log >&2; exit 1; }
	@touch $@

clean:
	rm -rf .venv .venv-* build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
