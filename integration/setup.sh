#!/usr/bin/env bash
# Makes sure that the programs which the tests and the demo drive are there, the Python modules, and a Docker engine.
# Needs nothing but bash; does nothing, in well under a second, where all of them are.
#
#   integration/setup.sh          programs for tests and demo, and a Docker engine
#   integration/setup.sh --demo   programs for the demo
#   integration/setup.sh --bench  these, and the peers that figures are compared with
#   integration/setup.sh --fuzz   these, and the C++ compiler that libFuzzer is built with
#   integration/setup.sh --deny   cargo-deny, built from source where it is missing (some minutes)
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

if [[ "${1:-}" == "--deny" ]]; then
    command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
    exit 0
elif [[ $# -gt 0 && "$1" != "--demo" && "$1" != "--bench" && "$1" != "--fuzz" ]]; then
    echo "setup: unknown argument '$1'; there are --demo, --bench, --fuzz and --deny" >&2
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
    mkfs.btrfs:btrfs-progs
    fusermount3:fuse3
    cmp:diffutils
    patch:patch
    losetup:mount
    fsfreeze:util-linux
    ip:iproute2
)
# What images are built with and run by, and what checks units.
[[ $# -gt 0 ]] || needed+=(
    dockerd:docker.io
    strip:binutils
    systemd-analyze:systemd
)
# PostgreSQL's programs are not on the path.
postgres=(/usr/lib/postgresql/*/bin/pg_amcheck)
[[ -x "${postgres[-1]}" ]] || needed+=(pg_amcheck:postgresql)
[[ "${1:-}" != "--fuzz" ]] || needed+=(g++:g++)

if [[ "${1:-}" == "--bench" ]]; then
    needed+=(
        nbdkit:nbdkit
        nbdfuse:libnbd-bin
        qemu-storage-daemon:qemu-utils
    )
fi

# Python modules of Debian's own interpreter, which tests drive: module → package
needed_modules=(
    nbd:python3-libnbd
    ensurepip:python3-venv
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
by_hand() {
    echo "setup: missing: ${missing_programs[*]}" >&2
    echo "setup: $1" >&2
    exit 1
}

install_packages() {
    local install="apt-get install -y --no-install-recommends" as_root=()
    command -v apt-get >/dev/null ||
        by_hand "this is not Debian: install what your system calls ${missing_packages[*]}, then try again"
    if [[ "$(id -u)" -ne 0 ]]; then
        if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
            as_root=(sudo -n)
        else
            by_hand "as root run: $install ${missing_packages[*]}"
        fi
    fi

    echo "setup: installing ${missing_packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    "${as_root[@]}" apt-get update -qq || by_hand "apt-get update failed: mend that, then run: $install ${missing_packages[*]}"
    if [[ " ${missing_packages[*]} " == *" postgresql "* ]]; then
        # Its package makes a cluster and starts it, which nobody has asked for.
        local no_cluster=/etc/postgresql-common/createcluster.d/tidemark.conf
        # shellcheck disable=SC2086
        "${as_root[@]}" $install postgresql-common >/dev/null || by_hand "this failed: $install postgresql-common"
        "${as_root[@]}" install -D -m 644 /dev/stdin "$no_cluster" <<<"create_main_cluster = false"
        # shellcheck disable=SC2064
        trap "${as_root[*]} rm -f $no_cluster" EXIT
    fi
    # shellcheck disable=SC2086
    "${as_root[@]}" $install "${missing_packages[@]}" >/dev/null || by_hand "this failed: $install ${missing_packages[*]}"
    for entry in "${needed_modules[@]}"; do
        has_module "${entry%%:*}" || by_hand "installed ${missing_packages[*]}, but Python finds no module ${entry%%:*}"
    done
    for entry in "${needed[@]}"; do
        program="${entry%%:*}"
        [[ "$program" == pg_amcheck ]] || command -v "$program" >/dev/null ||
            by_hand "installed ${missing_packages[*]}, but there is still no $program"
    done
}
[[ ${#missing_programs[@]} -eq 0 ]] || install_packages

# The modules that the Python examples need, and Helm, Compose and the schemas of Kubernetes, in an environment of their
# own.
venv="$here/.venv"
requirements=("$here/../crates/agent/examples/python/requirements.txt" "$here/requirements.txt")
if ! cat "${requirements[@]}" | cmp -s - "$venv/installed.txt"; then
    echo "setup: installing the Python modules of tests and examples in integration/.venv"
    rm -rf "$venv"
    /usr/bin/python3 -m venv "$venv"
    if ! "$venv/bin/pip" install --quiet --disable-pip-version-check "${requirements[@]/#/--requirement=}"; then
        echo "setup: pip failed: mend that, then try again" >&2
        exit 1
    fi
    cat "${requirements[@]}" >"$venv/installed.txt"
fi

# promtool, of Debian's Prometheus: the program alone, without the service that the package would start.
fetch_promtool() {
    local fetched
    fetched="$(mktemp -d)"
    (cd "$fetched" && apt-get -q download prometheus && dpkg-deb --extract prometheus_*.deb .) >/dev/null 2>&1 &&
        mkdir -p "$here/.tools" && install "$fetched/usr/bin/promtool" "$here/.tools/promtool"
    local fetching=$?
    rm -rf "$fetched"
    return $fetching
}
if [[ $# -eq 0 ]] && ! command -v promtool >/dev/null && [[ ! -x "$here/.tools/promtool" ]]; then
    echo "setup: fetching promtool into integration/.tools"
    # What is known of packages may be older than what there is.
    fetch_promtool || { [[ "$(id -u)" -eq 0 ]] && apt-get update -qq && fetch_promtool; } ||
        echo "setup: the package prometheus can't be fetched: tests with promtool are skipped" >&2
fi

# A Docker engine for the tests with containers. One that answers is left as it is. Else, for root, dockerd is started
# here and goes on after this script: its log is in /var/log/tidemark-dockerd.log, and `kill $(cat /run/docker.pid)` ends it.
# It makes the kernel drop what is forwarded between other networks, which tests with network namespaces need.
docker_answers() { docker info >/dev/null 2>&1; }
start_docker() {
    local log=/var/log/tidemark-dockerd.log
    echo "setup: no Docker engine answers: starting dockerd, log in $log"
    setsid nohup dockerd >"$log" 2>&1 </dev/null &
    for _ in $(seq 120); do
        if docker_answers; then
            ! command -v iptables >/dev/null || iptables --policy FORWARD ACCEPT || true
            return
        fi
        sleep 0.5
    done
    echo "setup: dockerd does not answer after a minute: $(tail -n 3 "$log")" >&2
    exit 1
}
if [[ $# -eq 0 ]] && ! docker_answers; then
    if [[ "$(id -u)" -eq 0 ]]; then
        start_docker
    else
        echo "setup: no Docker engine answers, or not to you: tests with containers are skipped" >&2
    fi
fi
