# SPDX-License-Identifier: GPL-2.0-or-later
#
# dedup-share: build, test and show it.  Everything that is built or
# downloaded is kept in $XDG_CACHE_HOME/dedup-share (~/.cache/dedup-share).
#
#   make demo         set all up, and show two Linux guests sharing on Xen
#   make check        set all up, and run every test that is quick enough
#   make check-fast   the edit loop: build, our own tests without the lab
#   make check-no-lab all tests but the lab, on any host
#   make demo-linux   show Linux guests sharing without Xen, and a picture
#   make bench        what reads cost, with the filter and without
#   make model        random operations against a plain model; OPS=1000000
#   make kill-test    processes that share and are killed; SECONDS=600
#   make fuzz         what clients say to the store daemon; SECONDS=600
#   make hostile      attacks on the store daemon, by another user
#   make lab          all scenarios on a real Xen; LAB=name for one
#   make build        QEMU with dedup-share
#   make lint         checkpatch, clang's thread-safety analysis, who includes whom
#   make sanitize     our tests under the address and UB sanitizers
#   make tsan         the store daemon and clients under the thread sanitizer

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dedup-share

.PHONY: all build demo demo-linux bench check check-fast check-no-lab lab lint
.PHONY: sanitize tsan hostile deps lab-deps fuzz-build model kill-test fuzz

all: build

deps:
	@scripts/deps

lab-deps:
	@scripts/deps --lab

build: deps
	@scripts/build-qemu

check-fast: build
	@scripts/check --fast

fuzz-build: deps
	@scripts/deps --clang
	@scripts/build-qemu --flavour fuzz

model: build
	@scripts/stress model $(or $(OPS),1000000)

kill-test: build
	@scripts/stress kill $(or $(SECONDS),600)

fuzz: fuzz-build
	@scripts/stress fuzz $(or $(SECONDS),600)

check: lab-deps fuzz-build
	@scripts/build-qemu
	@tests/lab/lab build
	@scripts/check

check-no-lab: build fuzz-build
	@scripts/check --no-lab

tsan: deps
	@scripts/deps --clang
	@scripts/build-qemu --flavour tsan
	@scripts/tsan

hostile: build
	@tests/hostile/hostile

demo-linux: lab-deps
	@scripts/deps --demo
	@scripts/build-qemu
	@scripts/demo-linux

bench: build
	@scripts/bench

lab: lab-deps
	@scripts/build-qemu
	@tests/lab/lab run $(LAB)

demo: lab-deps
	@scripts/build-qemu
	@tests/lab/lab build
	@scripts/demo

lint: build
	@scripts/deps --clang
	@scripts/lint

sanitize: deps
	@scripts/build-qemu --flavour asan
	@scripts/check --fast --sanitized --build $(CACHE)/build-asan
