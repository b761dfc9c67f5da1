# Everything a person or a CI runs. `make` alone lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup build demo demo-check test sim sim-mutants chaos behave bench-failover bench-faults bench-idle bench-relay bench-sessions compose-check fmt lint clean

# rustup puts cargo where a login shell finds it; make may run outside of one.
export PATH := $(HOME)/.cargo/bin:$(PATH)

# A full release takes nearly twice as long to build as the profile of the demo. PROFILE=… overrides both.
PROFILE ?= release
demo demo-check chaos: PROFILE = demo
BIN = target/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))

# What docs/compatibility.md was measured with.
BEHAVE_COMMIT = v4.1.4, commit de6b22c8

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/' | expand -t 20

setup: ## install what building and the demo need, by Debian package names
	@tools/setup demo

build: ## build the three programs into target/release (PROFILE=dev: target/debug)
	@tools/setup build
	cargo build --locked --profile $(PROFILE) --workspace --bins

demo: ## a live cluster: etcd, three agents with PostgreSQL, one router; Ctrl-C ends and removes everything
	@tools/setup demo
	cargo build --locked --profile $(PROFILE) --package trunkline-agent --package trunkline-router --bins
	@$(BIN)/trunklinectl demo $(ARGS)

demo-check: ## the demo without a person: kill, switch over, kill a node; measures, checks, exits 0 or 1
	@tools/setup demo
	cargo build --locked --profile $(PROFILE) --package trunkline-agent --package trunkline-router --bins
	@$(BIN)/trunklinectl demo --check $(ARGS)

test: ## format, clippy, unit and property tests, then real clusters (up to 30 minutes on two cores)
	@tools/test $(ARGS)

sim: PROFILE = $(if $(LONG),sim-long,sim)
sim: ## SEEDS=10000 simulated worlds around the HA loop (FROM=first; LONG=1: built for very many; ARGS="--seed 42" replays one with a trace)
	@tools/setup build
	cargo build --locked --profile $(PROFILE) --package trunkline-sim
	@$(BIN)/sim $(if $(ARGS),,--seeds $(or $(SEEDS),10000) --from $(or $(FROM),1)) $(ARGS)

sim-mutants: ## break the HA loop on purpose, in one way after the other; says how many seeds notice each
	@tools/setup build
	@SEEDS=$(or $(SEEDS),10000) tools/sim-mutants $(ARGS)

chaos: ## MINUTES=5 of random faults on a cluster in network namespaces, then a checker decides (SEED=s, ARGS=…; root)
	@tools/setup chaos
	cargo build --locked --profile $(PROFILE) --workspace --bins
	@$(BIN)/chaos --minutes $(or $(MINUTES),5) $(if $(SEED),--seed $(SEED)) $(ARGS)

behave: PROFILE = dev
behave: ## Patroni's own acceptance suite with our agent and command line (PATRONI_SRC=checkout; JOBS=2 FEATURES=… OUT=… root)
	@tools/setup test
	@test -n "$(PATRONI_SRC)" || { echo "PATRONI_SRC=…: a checkout of Patroni ($(BEHAVE_COMMIT))" >&2; exit 2; }
	cargo build --locked --profile $(PROFILE) --package trunkline-agent --bins
	@/usr/bin/python3 tests/behave/suite.py run --patroni $(PATRONI_SRC) --agent $(BIN)/trunkline-agent --ctl $(BIN)/trunklinectl \
		--jobs $(or $(JOBS),2) $(if $(OUT),--out $(OUT)) $(ARGS) $(FEATURES)

bench-failover: ## write outage beside Patroni + HAProxy in the same run (needs PyPI once, for Patroni)
	@tools/setup test
	@tools/patroni-venv
	cargo build --locked --profile $(PROFILE) --workspace --bins
	@$(BIN)/failover $(ARGS)

bench-faults: ## write outage when a host freezes, etcd is lost, or etcd's leader with the primary's host (ARGS="--rounds 5")
	@tools/setup test
	cargo build --locked --profile $(PROFILE) --workspace --bins
	@$(BIN)/faults $(ARGS)

bench-idle: ## memory and processor time of idle agents beside Patroni's in the same run (ARGS="--seconds 60")
	@tools/setup test
	@tools/patroni-venv
	cargo build --locked --profile $(PROFILE) --workspace --bins
	@$(BIN)/idle $(ARGS)

bench-relay: ## throughput, CPU and memory of the router beside HAProxy, PgBouncer, nginx and no proxy (ARGS="--rounds 5")
	@tools/setup bench
	cargo build --locked --profile $(PROFILE) --workspace --bins
	@$(BIN)/relay $(ARGS)

bench-sessions: ## 10,000 sessions at once, and 500,000 one after the other, beside HAProxy (ARGS="--held 5000 --total 100000")
	@tools/setup bench
	cargo build --locked --profile $(PROFILE) --workspace --bins
	@$(BIN)/sessions $(ARGS)

compose-check: ## build the image, start docker-compose.yml, kill the leader, check, take it down
	@tools/setup compose
	@tools/compose-check $(ARGS)

fmt: ## format the code
	cargo fmt --all

lint: ## format check and clippy, warnings denied
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

clean: ## remove the build products
	cargo clean
