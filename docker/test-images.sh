#!/usr/bin/env bash
# Builds the images of docker/ out of a program that is there already, with stand-ins for the public base images made
# of Debian's packages: no image is pulled, nothing is compiled. For tests, and for machines without a registry.
#
#   docker/test-images.sh --bin-dir target/debug [--tag test] [IMAGE...]
#
# An IMAGE is vault, capture, cli or workload; all of them unless some are named. Prints the names that it gave. One that was
# made of the same program before stays as it is.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export DOCKER_BUILDKIT=1
# The engine's own client, where another one lies before it on the path that knows no BuildKit.
[[ ! -x /usr/bin/docker ]] || PATH="/usr/bin:$PATH"
PATH="$PATH:/usr/sbin:/sbin"

bin_dir="" tag=test images=()
while [[ $# -gt 0 ]]; do
    case "$1" in
    --bin-dir) bin_dir="$2"; shift 2 ;;
    --tag) tag="$2"; shift 2 ;;
    vault | capture | cli | workload) images+=("$1"); shift ;;
    *) echo "test-images: unknown argument '$1'" >&2; exit 2 ;;
    esac
done
[[ ${#images[@]} -gt 0 ]] || images=(vault capture cli workload)
[[ "${images[*]}" == workload || -n "$bin_dir" ]] || { echo "test-images: say with --bin-dir where the program is" >&2; exit 2; }

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

has_image() { docker image inspect "$1" >/dev/null 2>&1; }

# gcr.io/distroless/cc-debian12:nonroot: the C library and what belongs to it, a user, certificates; no shell.
runtime_image=tidemark-standin-distroless:1
make_runtime_image() {
    local root="$work/runtime" debs="$work/debs"
    mkdir -p "$root"/{etc/ssl/certs,home/nonroot,tmp} "$debs"
    (cd "$debs" && { apt-get download -qq libc6 libgcc-s1 tzdata netbase ||
        { apt-get update -qq && apt-get download -qq libc6 libgcc-s1 tzdata netbase; }; } >/dev/null)
    local deb
    for deb in "$debs"/*.deb; do dpkg -x "$deb" "$root"; done
    rm -rf "$root"/usr/share/{doc,lintian}
    printf 'root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n' >"$root/etc/passwd"
    printf 'root:x:0:\nnonroot:x:65532:\n' >"$root/etc/group"
    cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
    chmod 1777 "$root/tmp"
    chown 65532:65532 "$root/home/nonroot"
    tar -C "$root" -c . | docker import -c 'USER 65532:65532' -c 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - "$runtime_image" >/dev/null
}

# debian:bookworm-slim, as far as the workload needs it: this machine's programs and their libraries.
debian_image=tidemark-standin-debian:1
make_debian_image() {
    local root="$work/debian" program path
    mkdir -p "$root"/{bin,usr/bin,tmp,lib64,etc}
    for program in sh date dd grep printf qemu-io sleep sort tail tr truncate wc; do
        path="$(command -v "$(type -P "$program")")"
        cp -L "$path" "$root/usr/bin/$program"
        ldd "$path" | grep -o '/[^ ]*' | while read -r library; do
            mkdir -p "$root$(dirname "$library")"
            cp -Ln "$library" "$root$library"
        done
    done
    cp "$root/usr/bin/sh" "$root/bin/sh"
    chmod 1777 "$root/tmp"
    tar -C "$root" -c . | docker import -c 'ENV PATH=/usr/local/bin:/usr/bin:/bin' - "$debian_image" >/dev/null
}

# What an image is made of: the same program is that of the same size and time.
inputs_label=tidemark.inputs
inputs_of() {
    if [[ "$1" == workload ]]; then
        cat "$here"/workload/* && docker image inspect --format '{{.Id}}' "$debian_image"
    else
        cat "$here/Dockerfile" && docker image inspect --format '{{.Id}}' "$runtime_image" &&
            stat --dereference --format '%n %s %y' "$(realpath "$bin_dir")/tidemark"
    fi | sha256sum | cut --delimiter ' ' --fields 1
}
is_made_of() {
    [[ "$(docker image inspect --format "{{index .Config.Labels \"$inputs_label\"}}" "$1" 2>/dev/null)" == "$2" ]]
}

context="$work/context"
mkdir -p "$context"
for image in "${images[@]}"; do
    name="tidemark-$image:$tag"
    if [[ "$image" == workload ]]; then
        has_image "$debian_image" || make_debian_image
    else
        has_image "$runtime_image" || make_runtime_image
    fi
    inputs="$(inputs_of "$image")"
    if is_made_of "$name" "$inputs"; then
        echo "$name"
        continue
    fi
    if [[ "$image" == workload ]]; then
        docker build --quiet --build-arg "DEBIAN_IMAGE=$debian_image" --label "$inputs_label=$inputs" --tag "$name" \
            "$here/workload" >/dev/null
    else
        if [[ ! -f "$context/tidemark" ]]; then
            strip -o "$context/tidemark" "$bin_dir/tidemark"
            mkdir "$context"/{capture,vault}
            ln -s tidemark "$context/capture/capture-svc"
            ln -s tidemark "$context/vault/vault-svc"
        fi
        docker build --quiet --file "$here/Dockerfile" --target "$image" --tag "$name" \
            --build-arg BINARIES=prebuilt --build-arg "RUNTIME_IMAGE=$runtime_image" \
            --build-arg "VERSION=$tag" --label "$inputs_label=$inputs" "$context" >/dev/null
    fi
    echo "$name"
done
