#!/usr/bin/env bash
# Fuzzes every target, or those that are named, two at a time. Prints the executions of each and of all; fails where one
# finds an input that breaks a property, and says where it lies.
#
#   integration/fuzz.sh [TARGET...]   FUZZ_SECONDS for each target (60), FUZZ_JOBS at a time (2)
#   integration/fuzz.sh --keep        afterwards keep what is new: the smallest inputs that reach all that was reached
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$PWD"
cd integration/fuzz

seconds="${FUZZ_SECONDS:-60}"
jobs="${FUZZ_JOBS:-2}"
# Of the kept inputs: as many and as large as a repository should hold.
kept_max=60
kept_bytes_max=4096

keep=false
targets=()
for argument in "$@"; do
    if [[ "$argument" == "--keep" ]]; then
        keep=true
    elif [[ -f "run/src/bin/$argument.rs" ]]; then
        targets+=("$argument")
    else
        echo "fuzz: there is no target '$argument'; there are: $(basename -s .rs run/src/bin/*.rs | xargs)" >&2
        exit 2
    fi
done
[[ ${#targets[@]} -gt 0 ]] || mapfile -t targets < <(basename -s .rs run/src/bin/*.rs)

host="$(rustc -vV | sed -n 's/^host: //p')"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$root/target}/fuzz"
built="$CARGO_TARGET_DIR/$host/release"
found="$CARGO_TARGET_DIR/found"
work="$CARGO_TARGET_DIR/corpus"
mkdir -p "$found" "$work"
# A server's socket lies there while its target runs.
TMPDIR="$(mktemp -d)"
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT

# Coverage as libFuzzer reads it, made by the stable compiler. `--target` keeps it out of build scripts.
echo "fuzz: building ${#targets[@]} targets"
instrument=(
    "--cfg fuzzing -Cpasses=sancov-module"
    "-Cllvm-args=-sanitizer-coverage-level=4"
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
    "-Cllvm-args=-sanitizer-coverage-pc-table"
    "-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
)
RUSTFLAGS="${instrument[*]}" cargo build --quiet --release --target "$host" \
    --manifest-path run/Cargo.toml "${targets[@]/#/--bin=}"

run() {
    local target="$1"
    mkdir -p "$work/$target"
    # New inputs go to the first folder; the kept ones are only read.
    if ! "$built/$target" -max_total_time="$seconds" -timeout=60 -rss_limit_mb=1024 -print_final_stats=1 \
        -artifact_prefix="$found/$target-" "$work/$target" "corpus/$target" >"$work/$target.log" 2>&1; then
        echo "fuzz: $target FAILED:"
        grep -E -A4 "panicked at|ERROR: libFuzzer|Test unit written" "$work/$target.log" || tail -20 "$work/$target.log"
        return 1
    fi
}
export -f run
export seconds built found work

failed=false
printf '%s\n' "${targets[@]}" | xargs -P "$jobs" -I{} bash -c 'run {}' || failed=true

total=0
for target in "${targets[@]}"; do
    executed="$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/$target.log")"
    printf 'fuzz: %-18s %12d executions\n' "$target" "${executed:-0}"
    total=$((total + ${executed:-0}))
done
printf 'fuzz: %-18s %12d executions\n' "all ${#targets[@]} targets" "$total"

if $failed; then
    echo "fuzz: run a reproducer with $built/TARGET FILE; it becomes a unit test, and goes to integration/fuzz/corpus/TARGET"
    exit 1
fi

if $keep; then
    for target in "${targets[@]}"; do
        merged="$work/$target.merged"
        rm -rf "$merged" && mkdir "$merged"
        "$built/$target" -merge=1 -set_cover_merge=1 "$merged" "corpus/$target" "$work/$target" >/dev/null 2>&1
        # What is kept for a reason of its own has a name, not a hash.
        find "corpus/$target" -type f -regextype posix-extended -regex '.*/[0-9a-f]{40}' -delete
        find "$merged" -type f -size "-$((kept_bytes_max + 1))c" -printf '%s %p\n' | sort -n |
            awk -v most="$kept_max" 'NR <= most { print $2 }' | xargs -r -I{} cp {} "corpus/$target/"
        echo "fuzz: $target: $(find "corpus/$target" -type f | wc -l) inputs are kept"
    done
fi
