# Tidemark: `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup build demo test soak shuttle fuzz mutants bench lint fmt fmt-check doc deny images clean

CARGO ?= cargo

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## check for the tools that tests and demo need, install what is missing (Debian)
	@integration/setup.sh

build: ## build the three programs for development
	$(CARGO) build --workspace --bins

demo: ## the whole round trip on real files: protect, write, kill, restore, compare (2 min after the build)
	@integration/setup.sh --demo
	$(CARGO) build --release --bins -p tidemark-cli -p capture-svc -p vault-svc
	@integration/demo.sh --bin-dir "$${CARGO_TARGET_DIR:-target}/release"

test: ## every test (cargo-nextest where it is installed, else cargo test)
	@integration/setup.sh
	@integration/test.sh

soak: ## kill either service 2,000 times under load and compare every generation (some 50 min; ROUNDS=n, TIDEMARK_SEED=n)
	$(CARGO) build --workspace --bins
	TIDEMARK_KILL_ROUNDS=$${ROUNDS:-2000} $(CARGO) test -p tidemark-integration --test it -- \
		--exact kills::either_service_killed_at_random_moments_loses_nothing --nocapture

shuttle: ## run the threads of the capture engine in ITERATIONS (20,000) more orders per scenario (10 min)
	SHUTTLE_ITERATIONS=$${ITERATIONS:-20000} $(CARGO) test -p capture-core --features shuttle --test shuttle

fuzz: ## fuzz each decoder and state machine for FUZZ_SECONDS (60), two at a time (FUZZ="frame ingest" for some of them)
	@integration/setup.sh --fuzz
	@integration/fuzz.sh $(FUZZ)

mutants: ## plant bugs and show that the tests catch each of them (some 15 min; MUTANTS="03 07" for some of them)
	@integration/setup.sh
	@integration/mutants.sh $(MUTANTS)

bench: ## figures, as ratios to peers in the same run (BENCH="interval nbd --rounds 3" for some of them)
	@integration/setup.sh --bench
	$(CARGO) build --release --workspace --bins
	$(CARGO) bench --workspace --bench figures -- $(BENCH)

lint: ## clippy on everything, warnings are errors
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) clippy -p capture-core --features shuttle --all-targets -- -D warnings

fmt: ## format the sources
	$(CARGO) fmt --all

fmt-check: ## fail where a source is not formatted
	$(CARGO) fmt --all --check

doc: ## build the API documentation, warnings are errors
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" $(CARGO) doc --workspace --no-deps --document-private-items

deny: ## check licences, sources and duplicate versions of the dependencies (installs cargo-deny)
	@integration/setup.sh --deny
	$(CARGO) fetch --locked
	$(CARGO) deny --offline --workspace check bans licenses sources

images: ## build the Docker images of both services and of the command
	DOCKER_BUILDKIT=1 docker build -f docker/Dockerfile --target vault -t tidemark-vault .
	DOCKER_BUILDKIT=1 docker build -f docker/Dockerfile --target capture -t tidemark-capture .
	DOCKER_BUILDKIT=1 docker build -f docker/Dockerfile --target cli -t tidemark-cli .

clean: ## remove everything that was built
	$(CARGO) clean
