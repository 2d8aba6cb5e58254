#!/usr/bin/env bash
# The whole round trip on real files: an ext4 image is protected, written to through NBD by real clients while intervals
# ship, snapshots overlap, the capture service is killed in the middle, two generations are restored and compared byte
# for byte with what they must be.
#
#   integration/demo.sh [--bin-dir DIR] [--small] [--keep]
#
#   --bin-dir DIR   where the programs are (default: target/release)
#   --small         less data and less time, for the test of this script
#   --keep          leave the working folder behind
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PATH:/usr/sbin:/sbin"

bin=target/release image_mib=512 scratch_mib=64 source_mib_max=256 write_s=8 keep=no
while [[ $# -gt 0 ]]; do
    case "$1" in
        --bin-dir) bin="$2"; shift ;;
        --small) image_mib=96 scratch_mib=16 source_mib_max=48 write_s=3 ;;
        --keep) keep=yes ;;
        *) echo "demo: unknown argument '$1'; see the top of $0" >&2; exit 2 ;;
    esac
    shift
done
bin="$(cd "$bin" && pwd)"
for program in tidemark capture-svc vault-svc; do
    [[ -x "$bin/$program" ]] || { echo "demo: there is no $bin/$program: run 'make demo'" >&2; exit 1; }
done

work="$(mktemp -d "${TMPDIR:-/tmp}/tidemark-demo.XXXXXX")"
pids=()
clean_up() {
    local status=$?
    for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    if [[ $status -ne 0 ]]; then
        echo "demo: FAILED; logs and images are in $work" >&2
        tail -n 5 "$work"/*.log >&2 || true
    elif [[ $keep == yes ]]; then
        echo "kept: $work"
    else
        rm -rf "$work"
    fi
}
trap clean_up EXIT
trap 'exit 130' INT TERM

say() { printf '\n== %s\n' "$*"; }
fail() { echo "demo: $*" >&2; exit 1; }
now_ms() { date +%s%3N; }
# One field of a flat JSON object on standard input.
field() { sed -n "s/.*\"$1\":\"\{0,1\}\([^,\"}]*\).*/\1/p"; }
mib() { awk -v b="$1" 'BEGIN { printf "%.1f MiB", b / 1048576 }'; }

# Ports that nothing listens on.
free_port() {
    local port
    while port=$((20000 + RANDOM % 20000)); do
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
    done
}
capture_addr="127.0.0.1:$(free_port)"
vault_addr="127.0.0.1:$(free_port)"
export TIDEMARK_CAPTURE="http://$capture_addr" TIDEMARK_VAULT="http://$vault_addr"
uri="nbd+unix:///files?socket=$work/nbd.sock"
volume="$work/files.img"

tidemark() { "$bin/tidemark" "$@"; }
ready() { # PID WHAT ADDRESS
    for _ in $(seq 300); do
        (exec 3<>"/dev/tcp/${3/://}") 2>/dev/null && return
        kill -0 "$1" 2>/dev/null || fail "$2 did not start"
        sleep 0.05
    done
    fail "$2 does not listen on $3"
}
start_vault() {
    "$bin/vault-svc" --listen "$vault_addr" --store-dir "$work/store" --state-dir "$work/vault" --retain 8 \
        2>>"$work/vault.log" &
    vault_pid=$!
    pids+=("$vault_pid")
    ready "$vault_pid" vault-svc "$vault_addr"
}
start_capture() {
    "$bin/capture-svc" --listen "$capture_addr" --vault "$TIDEMARK_VAULT" --state "$work/capture" \
        --nbd "unix:$work/nbd.sock" --interval-max 2s --scrub-period 2s 2>>"$work/capture.log" &
    capture_pid=$!
    pids+=("$capture_pid")
    ready "$capture_pid" capture-svc "$capture_addr"
}
# Random 4 KiB writes into the blocks of one file inside the image: a filesystem does not mind what a file contains, so
# that every cut, at any moment, is a sound ext4.
fio_writes() { # SECONDS
    # --thread: one process, which is the one that is killed.
    exec fio --name=writes --ioengine=nbd --uri="$uri" --thread --rw=randwrite --bs=4k --iodepth=8 --rate=12m \
        --offset="$scratch_offset" --size="$scratch_length" --time_based --runtime="$1" \
        --refill_buffers --buffer_compress_percentage=60 >/dev/null 2>&1
}
same() { cmp "$1" "$2" || fail "$1 differs from $2"; }
sound() { e2fsck -fn "$1" >"$work/e2fsck.log" 2>&1 || { cat "$work/e2fsck.log" >&2; fail "$1 is not a sound ext4"; }; }
ship() { tidemark ship files --json; }
told_receipt() {
    local of="$1" how=""
    if [[ $(field created <<<"$of") == false ]]; then
        # What had changed was just on its way, as intervals are every 2 s: what it came to is in the generation.
        of="$(tidemark generation show "files@$(field generation <<<"$of")" --json)" how="   by itself, just before"
    fi
    printf '   generation %s   digest %s   %s blocks changed   %s sent%s\n' "$(field generation <<<"$of")" \
        "$(field image_digest <<<"$of")" "$(field changed_blocks <<<"$of")" "$(mib "$(field bytes_sent <<<"$of")")" "$how"
}
began=$(now_ms)

say "an ext4 image of real files"
mkdir "$work/files"
left=$source_mib_max
for folder in /etc /usr/share/* /usr/sbin /usr/bin; do
    size=$(du -sm "$folder" 2>/dev/null | cut -f1) || true
    if [[ -d $folder && ${size:-0} -ge 1 && $size -le $left ]]; then
        # Whoever is not root cannot read every file.
        cp -a "$folder" "$work/files/" 2>/dev/null || true
        left=$((left - size))
    fi
done
mkfs.ext4 -q -F -b 4096 -i 4096 -d "$work/files" "$volume" "${image_mib}M" >/dev/null
head -c "${scratch_mib}M" /dev/urandom >"$work/scratch"
debugfs -w -R "write $work/scratch scratch" "$volume" >/dev/null 2>&1
# The longest run of blocks of the file, as first and last block.
read -r first last < <(debugfs -R "stat scratch" "$volume" 2>/dev/null | grep -o '([0-9]*-[0-9]*):[0-9]*-[0-9]*' |
    sed 's/.*://' | awk -F- '{ print $2 - $1, $1, $2 }' | sort -n | tail -1 | cut -d' ' -f2-)
scratch_offset=$((first * 4096)) scratch_length=$(((last - first + 1) * 4096))
sound "$volume"
echo "   $image_mib MiB, with the $(find "$work/files" -type f | wc -l) files from /etc and /usr"

say "vault and capture service start; the image becomes volume \"files\""
start_vault
start_capture
tidemark volume add files --file "$volume" --json >"$work/volume"
receipt="$(ship)"
told_receipt "$receipt"

say "fio writes through NBD while intervals ship and snapshots overlap"
fio_writes 60 &
fio_pid=$!
pids+=("$fio_pid")
for label in one two three; do
    sleep "$(awk -v s="$write_s" 'BEGIN { print s / 6 }')"
    snapshot="$(tidemark snapshot create files --label "$label" --json)"
    echo "   snapshot $(field snapshot <<<"$snapshot") at epoch $(field epoch <<<"$snapshot")"
done
tidemark snapshot read files 1 --output "$work/snapshot-1.img" --json >/dev/null
sound "$work/snapshot-1.img"
echo "   snapshot 1 read while fio writes: e2fsck finds it sound"
sleep "$(awk -v s="$write_s" 'BEGIN { print s / 2 }')"

say "the capture service is killed (kill -9) amid the writing, and started again"
kill -9 "$capture_pid"
# A fio that has lost its server never ends by itself.
kill -9 "$fio_pid"
wait "$capture_pid" "$fio_pid" 2>/dev/null || true
killed=$(now_ms)
start_capture
for _ in $(seq 200); do
    [[ "$(tidemark volume show files --json | field problem)" == "" ]] && nbdinfo --size "$uri" >/dev/null 2>&1 && break
    sleep 0.05
done
back=$(($(now_ms) - killed))
echo "   killed; serves again after $back ms, by itself"
tidemark snapshot read files 1 --output "$work/snapshot-1.again" --json >/dev/null
same "$work/snapshot-1.img" "$work/snapshot-1.again"
echo "   snapshot 1 is still what it was, byte for byte"
(fio_writes "$write_s") || fail "fio could not write after the restart"

say "all writers are quiet: the image is copied aside, and shipped"
cp --sparse=always "$volume" "$work/first.cut"
receipt="$(ship)"
told_receipt "$receipt"
first_generation=$(field generation <<<"$receipt")

say "another state of the filesystem, made with debugfs, arrives by nbdcopy"
cp --sparse=always "$volume" "$work/second.cut"
head -c 4M "$bin/tidemark" >"$work/program"
debugfs -w -R "write $work/program program" "$work/second.cut" >/dev/null 2>&1
debugfs -w -R "rm scratch" "$work/second.cut" >/dev/null 2>&1
sound "$work/second.cut"
nbdcopy --flush "$work/second.cut" "$uri"
receipt="$(ship)"
told_receipt "$receipt"
second_generation=$(field generation <<<"$receipt")

say "both generations are restored and compared"
for pair in "first:$first_generation" "second:$second_generation"; do
    cut="$work/${pair%%:*}.cut" generation="${pair#*:}" output="$work/${pair%%:*}.restored"
    restored="$(tidemark restore "files@$generation" "$output" --json)"
    same "$output" "$cut"
    sound "$output"
    echo "   generation $generation: restored in $(field took_ms <<<"$restored") ms, equal byte for byte, e2fsck finds it sound"
done
debugfs -R "dump program $work/back" "$work/second.restored" >/dev/null 2>&1
same "$work/back" "$work/program"
# The pass under way may have begun before the last write: two more.
passes=$(tidemark volume show files --json | field passes)
for _ in $(seq 400); do
    shown="$(tidemark volume show files --json)"
    [[ $(field passes <<<"$shown") -ge $((passes + 2)) ]] && break
    sleep 0.1
done
[[ $(field passes <<<"$shown") -ge $((passes + 2)) ]] || fail "the source scrub does not come to an end"
[[ $(field mismatches <<<"$shown") -eq 0 ]] || fail "the source scrub found blocks that tracking had missed"

say "report"
generations="$(tidemark generation list files --json)"
printf '   %-10s  %-24s  %-24s  %9s  %12s  %12s  %s\n' generation cut committed coherence changed sent digest
sed 's/},{/}\n{/g' <<<"$generations" | while read -r generation; do
    printf '   %-10s  %-24s  %-24s  %9s  %12s  %12s  %s\n' \
        "$(field generation <<<"$generation")" "$(field cut_time <<<"$generation")" \
        "$(field committed_time <<<"$generation")" "$(field coherence <<<"$generation")" \
        "$(mib $(($(field changed_blocks <<<"$generation") * 4096)))" \
        "$(mib "$(field bytes_sent <<<"$generation")")" "$(field image_digest <<<"$generation")"
done
echo "   the source scrub read the whole volume $(field passes <<<"$shown") times and found nothing that tracking had missed"
echo "   $image_mib MiB of volume, $(mib "$(du -sb "$work/store" | cut -f1)") in the vault's store"
echo "   everything compared equal, in $(awk -v ms=$(($(now_ms) - began)) 'BEGIN { printf "%.0f", ms / 1000 }') s"
kill "$capture_pid"
wait "$capture_pid" || fail "the capture service did not end cleanly"
kill "$vault_pid"
wait "$vault_pid" || fail "the vault service did not end cleanly"
