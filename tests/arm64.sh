#!/usr/bin/env bash
# Runs tests for 64-bit Arm on an x86-64 Debian or Ubuntu machine, under qemu's user-mode emulation.
#
#   tests/arm64.sh                          the crates that run on the target, and the bit-for-bit tests
#   tests/arm64.sh -p mrt-kernels rms_norm  any other `cargo test` arguments
#
#   ARM64_CPUS="max cortex-a53"   qemu's names of the CPUs to run on, one after the other (default: max)
#   ARM64_RUSTC=PATH              the compiler (default: `rustc`, else Debian's, whichever has the target's std)
#
# What is missing is installed by apt-get if this runs as root, and named otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu

fail() {
    echo "arm64.sh: $*" >&2
    exit 2
}

# Prints the first compiler that has the target's standard library.
find_rustc() {
    local rustc libdir
    for rustc in ${ARM64_RUSTC:-rustc /usr/bin/rustc}; do
        libdir=$("$rustc" --print target-libdir --target "$target" 2>/dev/null) || continue
        compgen -G "$libdir/libstd-*.rlib" >/dev/null || continue
        command -v "$rustc"
        return
    done
    return 1
}

find_qemu() {
    command -v qemu-aarch64-static || command -v qemu-aarch64
}

missing=()
find_rustc >/dev/null || missing+=(rustc-web libstd-rust-web-dev:arm64)
command -v aarch64-linux-gnu-gcc >/dev/null || missing+=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
find_qemu >/dev/null || missing+=(qemu-user-static)
if ((${#missing[@]})); then
    apt=(apt-get -qq -o DPkg::Lock::Timeout=300)
    [[ $(id -u) == 0 ]] || fail "needs: dpkg --add-architecture arm64, apt-get update, apt-get install ${missing[*]}"
    echo "arm64.sh: installing ${missing[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    dpkg --add-architecture arm64
    "${apt[@]}" update >&2
    "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >/dev/null
fi
RUSTC=$(find_rustc) || fail "no compiler has the standard library of $target"
qemu=$(find_qemu)

# Static linking: a dynamic program would be given the libraries of the host's folders.
export RUSTC
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static"
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
unset RUSTFLAGS

# One call, so that all is built once.
(($#)) || set -- --lib --test bits -p mrt-format -p mrt-kernels -p mruntime -p mruntime-tests
for cpu in ${ARM64_CPUS:-max}; do
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$qemu -cpu $cpu"
    echo "arm64.sh: $("$RUSTC" --version), qemu CPU $cpu" >&2
    # A folder of its own: another compiler would build everything anew in the host's.
    cargo test --target "$target" --target-dir "${CARGO_TARGET_DIR:-target}/arm64" "$@"
done
