#!/usr/bin/env bash
# Planted bugs: shows that the tests catch them. Each patch in integration/mutants plants one and names the test that has
# to fail; the README there says how they are written.
#
#   integration/mutants.sh            all of them
#   integration/mutants.sh 03 07      those whose names begin so
#
# Bugs are planted in a copy of the sources, uncommitted changes included, which is removed at the end. What is built of
# it stays in the target folder, so that a later run builds less.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
target="${CARGO_TARGET_DIR:-$root/target}"
mkdir -p "$target/mutants"
work="$(cd "$target/mutants" && pwd)"
tree="$work/tree"
export CARGO_TARGET_DIR="$work/build" CARGO_TERM_COLOR=never
# A test that would be skipped for want of a right or a program fails: what was not run catches nothing.
export CI=true
# With cargo test; nextest has its own bound.
seconds_max=300

fail() {
    echo "mutants: $*" >&2
    exit 2
}
field() { sed -n "s/^$2: //p;/^--- /q" "$1"; }

command -v patch >/dev/null || fail "there is no 'patch': install it ('make setup' does)"
exec 9>"$work/lock"
flock -n 9 || fail "another run is under way in $work"
cleanup() { rm -rf "$tree"; }
trap cleanup EXIT
trap 'exit 130' INT TERM
cleanup

# Grouped by package, so that each is built with few others anew.
choose() {
    local patch name wanted
    for patch in "$root"/integration/mutants/*.patch; do
        name="$(basename "$patch" .patch)"
        [[ $# -gt 0 ]] || printf '%s\t%s\n' "$(field "$patch" Package)" "$patch"
        for wanted in "$@"; do
            [[ "$name" != "$wanted"* ]] || printf '%s\t%s\n' "$(field "$patch" Package)" "$patch"
        done
    done | sort -u | cut -f 2
}
for wanted in "$@"; do
    compgen -G "$root/integration/mutants/$wanted*.patch" >/dev/null ||
        fail "no patch in integration/mutants begins with '$wanted'"
done
mapfile -t patches < <(choose "$@")

# Times of change are kept, so that cargo builds only what is new to it. Two things are new whatever their time says: what
# was changed since the last copy was begun, and what has had a bug, which may be in what was built last.
mkdir -p "$tree" "$work/logs"
rm -f "$work"/logs/*
touch "$work/copying" "$work/mutated"
tar -C "$root" --exclude-vcs --exclude=target -cf - . | tar -C "$tree" -xf - || fail "the sources can't be copied to $tree"
[[ ! -e "$work/copied" ]] || find "$tree" -type f -newer "$work/copied" -exec touch {} +
while read -r file; do
    [[ ! -e "$tree/$file" ]] || touch "$tree/$file"
done < <(sort -u "$work/mutated")
mv "$work/copying" "$work/copied"

# The arguments of cargo that select the binary of a patch's test.
binary_of() {
    echo --locked -p "$(field "$1" Package)"
    if [[ "$(field "$1" Binary)" == lib ]]; then
        echo --lib
    else
        echo --test "$(field "$1" Binary)"
    fi
}

# Builds and runs a patch's test on the tree as it is now. 0: it passed, 1: an assertion failed; else what went wrong is
# in `reason`.
run() {
    local log="$2" test code
    local -a binary
    test="$(field "$1" Test)"
    mapfile -t binary < <(binary_of "$1" | tr ' ' '\n')
    reason="it doesn't compile"
    (cd "$tree" && cargo test --no-run "${binary[@]}") >>"$log" 2>&1 || return 2
    reason="there is no test $test"
    if command -v cargo-nextest >/dev/null; then
        (cd "$tree" && cargo nextest run "${binary[@]}" -E "test(=$test)") >>"$log" 2>&1
        code=$?
        # No test was run; one has failed.
        ((code != 4)) || return 2
        ((code != 100)) || code=101
    else
        (cd "$tree" && timeout "$seconds_max" cargo test "${binary[@]}" -- --exact "$test") >>"$log" 2>&1
        code=$?
        grep -q '^running 1 test$' "$log" || return 2
    fi
    ((code != 0)) || return 0
    reason="$test ended otherwise than by an assertion"
    ((code == 101)) && grep -q 'panicked at' "$log" && return 1
    return 2
}

caught=0 missed=0 broken=0
tell() {
    local counter="$1" patch="$2"
    case "$counter" in
        caught) caught=$((caught + 1)) ;;
        MISSED) missed=$((missed + 1)) ;;
        BROKEN) broken=$((broken + 1)) ;;
    esac
    printf '%-6s  %-40s  %-40s  %s\n' "$counter" "$(basename "$patch" .patch)" "$(field "$patch" Breaks)" "$3"
}
key_of() { echo "$(field "$1" Package) $(field "$1" Binary) $(field "$1" Test)"; }

# Each test without the bug first: a test that always fails catches nothing.
began=$SECONDS
declare -A unsound=()
for patch in "${patches[@]}"; do
    key="$(key_of "$patch")"
    [[ -z "${unsound[$key]+known}" ]] || continue
    log="$work/logs/$(basename "$patch" .patch).sound.log"
    run "$patch" "$log"
    case $? in
        0) unsound[$key]="" ;;
        1) unsound[$key]="it fails without the bug: $log" ;;
        *) unsound[$key]="without the bug: $reason: $log" ;;
    esac
done
echo "mutants: ${#unsound[@]} tests were run without a bug, in $((SECONDS - began)) s"

for patch in "${patches[@]}"; do
    log="$work/logs/$(basename "$patch" .patch).log"
    key="$(key_of "$patch")"
    since=$SECONDS
    if [[ -n "${unsound[$key]}" ]]; then
        tell BROKEN "$patch" "${unsound[$key]}"
        continue
    fi
    if ! patch -d "$tree" -p1 --fuzz=0 --force --dry-run <"$patch" >"$log" 2>&1; then
        tell BROKEN "$patch" "the patch doesn't apply any more: $log"
        continue
    fi
    sed -n 's|^+++ b/||p' "$patch" >>"$work/mutated"
    patch -d "$tree" -p1 --fuzz=0 --force <"$patch" >>"$log" 2>&1
    run "$patch" "$log"
    case $? in
        0) tell MISSED "$patch" "$(field "$patch" Test) passes: $log" ;;
        1) tell caught "$patch" "$(field "$patch" Test) ($((SECONDS - since)) s)" ;;
        *) tell BROKEN "$patch" "$reason: $log" ;;
    esac
    patch -d "$tree" -p1 --fuzz=0 --force --reverse <"$patch" >>"$log" 2>&1 ||
        fail "$(basename "$patch") can't be taken back: $log"
done

echo "mutants: $caught caught, $missed missed, $broken broken, in $((SECONDS - began)) s"
((missed == 0 && broken == 0))
