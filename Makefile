# `make` alone says what there is.
.PHONY: help setup guest demo test lint bench bench-disk soak crash clean
.DEFAULT_GOAL := help

TARGET := $(or $(CARGO_TARGET_DIR),target)
GUEST := $(or $(TIDEMARK_GUEST_DIR),.cache/guest)
TIDEMARK := $(TARGET)/release/tidemark

# How many times as many crashes as the test suite `make crash` goes through.
CRASHES ?= 10

# How many processes `make soak` kills, and where its random numbers begin.
KILLS ?= 500
SEED ?= 1

help: ## Show this
	@echo 'Tidemark. On Debian 12 with Rust, git and make, try:  make demo'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what the rest needs (Debian packages, SeaweedFS); the others call it themselves
	@.ci/setup.sh

guest: setup ## Build the Debian guest that demo and tests run (1.5 minutes, kept in .cache/guest)
	@tests/guest/build.sh "$(GUEST)"

demo: guest ## Back up a real VM to two targets, lose it, and restore it from the second
	@echo 'building tidemark (some minutes the first time)' >&2
	@cargo build --release --quiet
	@$(TIDEMARK) demo --guest "$(GUEST)"

test: guest ## Run all tests (real VMs, a real S3 service)
	@if cargo nextest --version >/dev/null 2>&1; then \
		cargo nextest run --workspace --no-fail-fast; \
	else \
		cargo test --workspace --no-fail-fast; \
	fi

lint: ## Check formatting and lints
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

bench: guest ## Measure the main steps beside the plainest tool that moves the same bytes
	@cargo build --release --workspace --quiet
	@$(TARGET)/release/tidemark-bench $(TIDEMARK) "$(GUEST)/debian.raw"

bench-disk: ## Measure a disk over NBD beside qemu-nbd: SECONDS_EACH=2 per job, ROUNDS=3
	@.ci/setup.sh bench
	@cargo build --release --quiet --package tidemark-lab --bin tidemark-bench-disk
	@$(TARGET)/release/tidemark-bench-disk $(or $(SECONDS_EACH),2) $(or $(ROUNDS),3)

soak: guest ## Kill processes at random moments of backup and merge, KILLS=500 times, from SEED=1
	TIDEMARK_KILLS=$(KILLS) TIDEMARK_SEED=$(SEED) \
		cargo test --release --package tidemark --test kills -- --nocapture

crash: ## Cut the power after every write of recorded disk lives, CRASHES=10 times as many as the tests do
	TIDEMARK_CRASH=$(CRASHES) cargo test --release --package tidemark-disk --lib -- --nocapture tests::crash::i3_i5

clean: ## Remove everything built and cached
	cargo clean
	rm -rf .cache
