#!/usr/bin/env bash
# Makes sure that the programs which the tests and the demo drive are there. Needs nothing but bash; does nothing, in
# well under a second, where all of them are.
#
#   integration/setup.sh          programs for tests and demo
#   integration/setup.sh --bench  these, and the peers that figures are compared with
#   integration/setup.sh --fuzz   these, and the C++ compiler that libFuzzer is built with
#   integration/setup.sh --deny   cargo-deny, built from source where it is missing (some minutes)
set -euo pipefail

if [[ "${1:-}" == "--deny" ]]; then
    command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
    exit 0
elif [[ $# -gt 0 && "$1" != "--bench" && "$1" != "--fuzz" ]]; then
    echo "setup: unknown argument '$1'; there are --bench, --fuzz and --deny" >&2
    exit 2
fi

# program → Debian package
needed=(
    cc:gcc
    nbdcopy:libnbd-bin
    nbdinfo:libnbd-bin
    qemu-img:qemu-utils
    qemu-io:qemu-utils
    fio:fio
    sqlite3:sqlite3
    mkfs.ext4:e2fsprogs
    e2fsck:e2fsprogs
    mkfs.xfs:xfsprogs
    mkfs.btrfs:btrfs-progs
    debugfs:e2fsprogs
    fusermount3:fuse3
    cmp:diffutils
    patch:patch
)
[[ "${1:-}" != "--fuzz" ]] || needed+=(g++:g++)

if [[ "${1:-}" == "--bench" ]]; then
    needed+=(nbdkit:nbdkit)
fi

# Python modules of Debian's own interpreter, which tests drive: module → package
needed_modules=(
    nbd:python3-libnbd
)

# e2fsprogs and xfsprogs live in sbin, which is not on the path of every user.
PATH="$PATH:/usr/sbin:/sbin"

if ! command -v cargo >/dev/null; then
    echo "setup: there is no Rust toolchain: install the one that rust-version in Cargo.toml asks for (https://rustup.rs)" >&2
    exit 1
fi

missing_programs=()
missing_packages=()
for entry in "${needed[@]}"; do
    program="${entry%%:*}"
    package="${entry#*:}"
    if ! command -v "$program" >/dev/null; then
        missing_programs+=("$program")
        [[ " ${missing_packages[*]:-} " == *" $package "* ]] || missing_packages+=("$package")
    fi
done
has_module() { [[ -x /usr/bin/python3 ]] && /usr/bin/python3 -c "import $1" 2>/dev/null; }
for entry in "${needed_modules[@]}"; do
    if ! has_module "${entry%%:*}"; then
        missing_programs+=("${entry#*:}")
        missing_packages+=("${entry#*:}")
    fi
done
[[ ${#missing_programs[@]} -eq 0 ]] && exit 0

install="apt-get install -y --no-install-recommends ${missing_packages[*]}"
by_hand() {
    echo "setup: missing: ${missing_programs[*]}" >&2
    echo "setup: $1" >&2
    exit 1
}

command -v apt-get >/dev/null ||
    by_hand "this is not Debian: install what your system calls ${missing_packages[*]}, then try again"
as_root=()
if [[ "$(id -u)" -ne 0 ]]; then
    if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        as_root=(sudo -n)
    else
        by_hand "as root run: $install"
    fi
fi

echo "setup: installing ${missing_packages[*]}"
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -qq || by_hand "apt-get update failed: mend that, then run: $install"
# shellcheck disable=SC2086
"${as_root[@]}" $install >/dev/null || by_hand "this failed: $install"
for entry in "${needed_modules[@]}"; do
    has_module "${entry%%:*}" || by_hand "installed ${missing_packages[*]}, but Python finds no module ${entry%%:*}"
done
for entry in "${needed[@]}"; do
    program="${entry%%:*}"
    command -v "$program" >/dev/null || by_hand "installed ${missing_packages[*]}, but there is still no $program"
done
