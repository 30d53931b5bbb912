# Everything starts here: `make demo` shows mlxd at work, `make test` proves it, `make help` lists the rest.
# Nothing needs root, and what is downloaded goes to MLXD_CACHE, which clones share.

TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
CACHE := $(or $(MLXD_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/mlxd)
MODEL := SmolLM2-135M-Instruct
MODELS := $(CACHE)/models
DIST := $(TARGET)/dist/mlxd
# One profile for all, so that build, demo and test share what Cargo has compiled.
PROFILE := --release

export MLXD_CACHE := $(CACHE)
export MLXD_BIN := $(TARGET)/release/mlxd
# They would replace the flags by which the binaries find MLX (.cargo/mlx-linux.toml).
unexport RUSTFLAGS CARGO_ENCODED_RUSTFLAGS

.PHONY: help demo test test-all serve build setup model parity soak bench fmt lint dist try-dist clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: build model ## two clients share one model: the set-up, the build, the show
	@python="$$(tests/python/venv.sh demo)" && PYTHONPATH=clients/python/src \
	  "$$python" tests/demo/demo.py --mlxd $(MLXD_BIN) --model-root $(MODELS) --model $(MODEL)

test: lint build model ## formatting, lints and the tests: 25 minutes at most on two cores
	native/tests/run.sh
	cargo test $(PROFILE) --workspace
	tests/python/run.sh

test-all: test parity soak ## and what takes longer; a workflow runs it every night

serve: build model ## the daemon in the foreground, with the default model
	@exec $(MLXD_BIN) serve --model-root $(MODELS) --model $(MODEL)

build: setup ## the release build
	cargo build $(PROFILE) --workspace

setup: ## MLX for Cargo (on macOS, mlx-sys's own build does it)
	@native/setup.sh

model: build ## the default model, fetched and converted
	@tests/demo/fetch-model.sh $(MODELS)/$(MODEL)

parity: build ## every architecture beside mlx-lm, in every storage, and a sweep of configurations
	@python="$$(tests/python/venv.sh test)" && PYTHONPATH=clients/python/src:tests/python/support \
	  "$$python" tests/python/parity/parity_table.py $(PARITY)

soak: build model ## 500 streams, most of which end badly, and 25 kills amid twenty turns: what stays
	tests/bench/run.sh soak --check
	python="$$(tests/python/venv.sh test)" && MLXD_KILLS=25 \
	  PYTHONPATH=clients/python/src:tests/python/support \
	  "$$python" -m pytest --config-file tests/python/pytest.ini --rootdir tests/python \
	  --timeout 1800 tests/python/e2e/test_durability.py -k killed

bench: build model ## mlxd beside mlx-lm, in one run
	MLXD_BLAS=$(CURDIR)/.cargo/mlx-linux/lib/libmlxd_blas.so \
	  MLXD_BLAS_PLAIN=$(CURDIR)/.cargo/mlx-linux/lib/libmlxd_blas_plain.so tests/bench/run.sh

fmt: ## format the Rust code
	cargo fmt --all

lint: setup ## formatting and lints of the Rust code, without changing it
	cargo fmt --all --check
	cargo clippy $(PROFILE) --workspace --all-targets -- -D warnings

dist: build ## a folder to copy to another machine
	native/dist.sh $(MLXD_BIN) $(DIST)

try-dist: dist model ## run that folder as another user, from another folder
	native/try_dist.sh $(DIST) $(MODELS)/$(MODEL)

clean: ## what the build made; the cache stays
	cargo clean
