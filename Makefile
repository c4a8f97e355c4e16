# Every target installs what it lacks and says what it installs: Debian packages (.ci/need) and a .venv.

PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard ring/*.[ch] virtio/*.[ch] qcow2/*.[ch] qcow2/plane/*.[ch] */*.cdef) ring/build.py pyproject.toml
export PYTHON

# JOBS: test processes beside one another, two for each processor: half the time they wait, for disks and for guests.
JOBS ?= $(shell expr 2 \* $$(nproc))
PYTEST = $(BIN)/pytest -n $(JOBS) --maxprocesses 8 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: demo test deep check vm migrate asan kill threads bench compare install build-packages guest-packages

demo: export PYTHONPATH := $(CURDIR)
demo: guest-packages $(VENV)/installed
	@$(BIN)/python examples/demo.py

# Every test; of long campaigns the cases that the commit draws, or SAMPLE_SEED=ANYTHING.
test: guest-packages libvirt-packages systemd-packages nbd-packages $(VENV)/installed
	$(PYTEST) --sample

# All cases of the campaigns of which `make test` runs some.
deep: guest-packages libvirt-packages $(VENV)/installed
	$(PYTEST) -m sample

vm: guest-packages libvirt-packages $(VENV)/installed
	$(BIN)/pytest tests/vm

# The guests on QEMU 10.0 and 11.1, too: fetched into .cache/qemu, 200 MB each. QEMU_BIN names any other's directory.
.PHONY: peers
peers: guest-packages $(VENV)/installed
	tests/vm/peers 10.0 11.1
	QEMU_BIN=$(CURDIR)/.cache/qemu/10.0/programs $(BIN)/pytest tests/vm
	QEMU_BIN=$(CURDIR)/.cache/qemu/11.1/programs $(BIN)/pytest tests/vm

# QEMU's own tests of vhost-user-blk. QOS_TEST: tests/qtest/qos-test of a build of QEMU; QEMU_BIN: that build's directory.
.PHONY: qtests
qtests: guest-packages $(VENV)/installed
	@test -x "$(QOS_TEST)" || { echo "make qtests: QOS_TEST names no qos-test of QEMU's" >&2; exit 1; }
	QOS_TEST="$(abspath $(QOS_TEST))" $(BIN)/pytest tests/vm/test_qtests.py

# The systemd units, started and killed by a systemd in namespaces of its own; root.
.PHONY: units
units: guest-packages systemd-packages $(VENV)/installed
	$(BIN)/pytest tests/file/test_systemd.py

# A guest that writes and verifies, ten times to the other host and back.
migrate: guest-packages $(VENV)/installed
	MIGRATIONS=10 $(BIN)/pytest tests/vm/test_migration.py

# A guest that writes and verifies outlives 50 daemons, for each cache mode, ring format and number of queues; an hour.
.PHONY: reconnect
reconnect: guest-packages $(VENV)/installed
	KILLS=50 $(BIN)/pytest -s tests/vm/test_reconnect.py

check: guest-packages nbd-packages $(VENV)/installed $(VENV)/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	MYPYPATH=examples $(BIN)/mypy --strict examples/*.py bench
	$(PYTEST) --sample tests/pure tests/file

asan: $(VENV)/installed
	$(BIN)/python -m ring.build --asan
	$(BIN)/python -m ring.build --tsan

# The file tests, kills included, where a seccomp filter forbids io_uring; what measures io_uring itself is left out.
threads: guest-packages $(VENV)/installed
	$(BIN)/python -m tests.refused EPERM io_uring $(BIN)/pytest tests/file --ignore=tests/file/test_bench.py

# KILL: options, such as KILL="--kills 1000 --seed 5 --kind overlay".
kill: guest-packages $(VENV)/installed
	$(BIN)/python -m tests.kill $(KILL)

# LIVE: minutes; a guest that verifies what it wrote while its disk is frozen, streamed, committed, its daemons killed,
# and that migrates.
.PHONY: live
live: guest-packages $(VENV)/installed
	tests/vm/peers 11.1
	JUDGE_BIN=$(or $(JUDGE_BIN),$(CURDIR)/.cache/qemu/11.1/programs) LIVE_MINUTES=$(or $(LIVE),10) $(BIN)/pytest -s tests/vm/test_live.py

# KILLLIVE: options, such as KILLLIVE="--kills 50 --seed 5"; 500 daemons killed in the midst of snapshots and jobs.
.PHONY: kill-live
kill-live: guest-packages $(VENV)/installed
	$(BIN)/python -m tests.kill.live $(KILLLIVE)

# SIMULATELIVE: options, such as SIMULATELIVE="--seed 50 --histories 10"; 200,000 deaths within live operations.
.PHONY: simulate-live
simulate-live: $(VENV)/installed
	$(BIN)/python -m tests.sim.live $(SIMULATELIVE)

# Every mutant of live operations must be found.
.PHONY: simulate-live-mutants
simulate-live-mutants: $(VENV)/installed
	$(BIN)/python -m tests.sim.live --mutants

# FEATURES: features and options, such as FEATURES="luks --seed 5"; 5,000 operations on images of each without it. Judged
# by this system's QEMU and by that of QEMU_BIN, a directory; without it by QEMU 11.1, which is fetched.
.PHONY: features
features: guest-packages $(VENV)/installed
	$(if $(QEMU_BIN),,tests/vm/peers 11.1)
	QEMU_BIN=$(or $(QEMU_BIN),$(CURDIR)/.cache/qemu/11.1/programs) $(BIN)/python -m tests.features $(FEATURES)

# DAMAGE: features and options, such as DAMAGE="bitmaps --damages 50"; 200 broken words of each without it. QEMU_BIN: as above.
.PHONY: damage
damage: guest-packages $(VENV)/installed
	$(if $(QEMU_BIN),,tests/vm/peers 11.1)
	QEMU_BIN=$(or $(QEMU_BIN),$(CURDIR)/.cache/qemu/11.1/programs) $(BIN)/python -m tests.features.damage $(DAMAGE)

# FUZZ: targets and options, such as FUZZ="ring --minutes 60"; ten minutes each without it.
.PHONY: fuzz fuzz-packages
fuzz: fuzz-packages $(VENV)/installed-fuzz
	CLANG=clang $(BIN)/python -m tests.fuzz $(FUZZ)

# CRASH: options, such as CRASH="--seed 5" for all sequences of up to three actions; three million states without it.
.PHONY: crash
crash: guest-packages $(VENV)/installed
	$(BIN)/python -m tests.crash explore $(or $(CRASH),--states 3000000)

# CHAINS: options, such as CHAINS="--chains 50 --work commit"; a thousand chains for each piece of work without it.
.PHONY: chains
chains: guest-packages $(VENV)/installed
	$(BIN)/python -m tests.chains $(CHAINS)

# FEATURE: features and options, such as FEATURE="bitmaps --states 5000"; a hundred thousand states of each without it.
.PHONY: crash-features
crash-features: guest-packages $(VENV)/installed
	$(BIN)/python -m tests.crash.features $(FEATURE)

# SIMULATE: options, such as SIMULATE="--seed 5000 --histories 10000 --states 1000000"; a thousand histories without it.
.PHONY: simulate
simulate: $(VENV)/installed
	$(BIN)/python -m tests.sim $(or $(SIMULATE),--histories 1000)

# Every mutant must be found. HUNT: options, such as HUNT="--write" or the names of some.
.PHONY: simulate-mutants
simulate-mutants: $(VENV)/installed
	$(BIN)/python -m tests.sim.hunt $(HUNT)

# FAULTS: options, such as FAULTS="--faults 50000 --seed 5"; without it every operation of all sequences of two actions.
.PHONY: faults
faults: guest-packages $(VENV)/installed
	$(BIN)/python -m tests.crash faults $(FAULTS)

# REALFAULTS: options, such as REALFAULTS="--stride 1 --kind overlay"; without it every tenth system call.
.PHONY: realfaults
realfaults: guest-packages $(VENV)/installed
	$(BIN)/python -m tests.realfault $(REALFAULTS)

# BENCH: cases and options, such as BENCH="read-32 --pairs 3"; all cases and sweeps without it.
bench: guest-packages $(VENV)/installed-bench
	$(BIN)/python -m bench $(or $(BENCH),all)

# CROWD: cases and options, such as CROWD="overwrite --passes 9": up to 65,536 requests under way.
.PHONY: crowd
crowd: guest-packages $(VENV)/installed-bench
	$(BIN)/python -m bench.crowd $(CROWD)

# TOOL: cases and options, such as TOOL="compare --peer /path/of/qemu-img --pairs 5": the tool beside qemu-img.
.PHONY: bench-tool
bench-tool: guest-packages $(VENV)/installed
	$(BIN)/python -m bench.tool $(TOOL)

compare: guest-packages $(VENV)/installed-bench
	PYTHONPATH=examples $(BIN)/python -m bench.guest $(COMPARE)

# Self-contained below PREFIX/lib/vhost-user-qcow2; programs, man pages, completion, systemd units, discovery file.
# Uses sudo where only root may write. DESTDIR is for those who make packages.
PREFIX ?= /usr/local
install: build-packages $(VENV)/installed
	@PREFIX=$(PREFIX) DESTDIR=$(DESTDIR) BUILDER=$(BIN)/python share/install.sh install

# Below scratch directories, then all of it in a Debian 12 that has nothing yet, which only root can make; ten minutes.
.PHONY: install-test
install-test: $(VENV)/installed
	@.ci/need debian || echo "the tests in a fresh Debian are skipped"
	INSTALL=1 $(BIN)/pytest tests/file/test_installation.py tests/file/test_fresh_debian.py

.PHONY: uninstall
uninstall:
	@PREFIX=$(PREFIX) DESTDIR=$(DESTDIR) share/install.sh uninstall

build-packages:
	@.ci/need build

guest-packages: build-packages
	@.ci/need guest

.PHONY: libvirt-packages
libvirt-packages: build-packages
	@.ci/need libvirt || echo "the tests that need libvirt are skipped"

.PHONY: systemd-packages
systemd-packages: build-packages
	@.ci/need systemd || echo "the tests that need systemd are skipped"

.PHONY: nbd-packages
nbd-packages: build-packages
	@.ci/need nbd || echo "the tests that need libnbd's programs are skipped"

fuzz-packages: build-packages
	@.ci/need fuzz

$(BIN)/python: | build-packages
	@echo "creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

# Editable, so only a change of the compiled half or of the dependencies needs another run.
$(VENV)/installed: $(NATIVE) | $(BIN)/python
	@echo "building the C extensions and installing into $(VENV): this project, pytest, pyelftools, hypothesis"
	@flock share/install.sh $(BIN)/pip install -q --disable-pip-version-check -e '.[test]'
	@$(BIN)/python -m compileall -q ring virtio qcow2 vhost
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/installed
	@echo "installing into $(VENV): ruff, mypy"
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[test,dev]'
	@touch $@

$(VENV)/installed-bench: pyproject.toml | $(VENV)/installed
	@echo "installing into $(VENV): matplotlib"
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[test,bench]'
	@touch $@

$(VENV)/installed-fuzz: pyproject.toml | $(VENV)/installed
	@echo "installing into $(VENV): atheris"
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[test,fuzz]'
	@touch $@

# SURVEY: options, such as SURVEY="--points 1000 --seed 5".
.PHONY: survey
survey: guest-packages $(VENV)/installed
	$(BIN)/python -m tests.vm $(SURVEY)

.PHONY: help
help:
	@echo "make install: programs, manual, completion, units; make demo: a guest on a disk of ours; make test: every test"
	@sed -n 's/^| `\(make .*\)` | \(.*\) |$$/\1: \2/p' README.md | tr -d '`'
