#!/bin/sh
# Keeps a diary in a volume: an entry a second, each in a block of its own, the first block again after the last.
#
#   workload write         writes for ever, through NBD
#   workload show FILE     prints the newest entry of an image, and how many there are
set -eu

uri="nbd+unix:///${VOLUME:-data}?socket=${NBD_SOCKET:-/run/tidemark/nbd.sock}"
block=4096
blocks=1024
page=/tmp/page

write() {
    entry=0
    while :; do
        entry=$((entry + 1))
        printf 'entry %08d of %s\n' "$entry" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" >"$page"
        truncate -s "$block" "$page"
        offset=$((entry % blocks * block))
        if qemu-io -f raw -c "write -s $page $offset $block" -c flush "$uri" >/dev/null; then
            echo "wrote entry $entry"
        else
            echo "entry $entry is not written: the volume can't be reached"
        fi
        sleep 1
    done
}

show() {
    entries=$(tr -d '\000' <"$1" | grep -a '^entry ' | sort)
    [ -n "$entries" ] || { echo "no entry"; exit 1; }
    printf '%s\n' "$entries" | tail -n 1
    printf '%s\n' "$entries" | wc -l
}

case "${1:-write}" in
write) write ;;
show) show "$2" ;;
*) echo "workload: there are write and show FILE" >&2; exit 2 ;;
esac
