#!/usr/bin/env bash
# Runs every test of the workspace. With CI=true the profile `ci` of .config/nextest.toml is used, and a test that
# would be skipped for want of a program fails instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The end-to-end tests run the real programs, which a test of one package alone would not build.
cargo build --workspace --bins

# The capture engine's threads in many orders: with locks and atomics of its own, which nothing else may be built with.
shuttle=(-p capture-core --features shuttle --test shuttle)

if command -v cargo-nextest >/dev/null; then
    profile=default
    [[ "${CI:-}" == "true" ]] && profile=ci
    # nextest does not run the examples in the documentation; they go first, so that its summary closes the output.
    cargo test --workspace --doc --quiet
    cargo nextest run "${shuttle[@]}" --profile "$profile"
    cargo nextest run --workspace --profile "$profile"
else
    echo "test: cargo-nextest is not installed (cargo install --locked cargo-nextest): running cargo test, which is slower"
    cargo test "${shuttle[@]}"
    cargo test --workspace --no-fail-fast
fi
