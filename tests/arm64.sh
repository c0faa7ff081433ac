#!/usr/bin/env bash
# Runs tests for 64-bit Arm on an x86-64 Debian or Ubuntu machine, under qemu's user-mode emulation.
#
#   tests/arm64.sh                          all below
#   tests/arm64.sh --build                  what all below needs, without running it
#   tests/arm64.sh -p mrt-kernels rms_norm  any other `cargo test` arguments, and no more
#   tests/arm64.sh --run COMMAND...         a command that cross-compiles, with the compilers in its environment
#
#   ARM64_CPUS="max cortex-a53"   for other arguments: qemu's names of the CPUs to run on (default: max)
#   ARM64_RUSTC=PATH              the compiler (default: `rustc`, else Debian's, whichever has the target's std)
#
# All are the tests of the crates that run on the target, and of the bits that models give, a real one too, on the CPU
# with every instruction set and on the smallest; the kernels' tests on CPUs between; both fast lanes with a real model; and
# instruction counts compared.
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

missing=()
find_rustc >/dev/null || missing+=(rustc-web libstd-rust-web-dev:arm64)
command -v aarch64-linux-gnu-gcc >/dev/null || missing+=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu)
# Not the static one, which cannot count instructions.
command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
command -v gcc >/dev/null || missing+=(gcc libc6-dev)
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

export RUSTC
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
unset RUSTFLAGS
if [[ ${1:-} == --run ]]; then
    exec "${@:2}"
fi
# Static linking: a dynamic program would be given the libraries of the host's folders.
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static"

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64

# on CPU ARGUMENTS...: the tests on that CPU; they too read its name in the variable that qemu reads.
on() {
    export QEMU_CPU=$1
    echo "arm64.sh: $("$RUSTC" --version), qemu CPU $QEMU_CPU" >&2
    # A folder of its own: another compiler would build everything anew in the host's.
    cargo test --target "$target" --target-dir "${CARGO_TARGET_DIR:-target}/arm64" "${@:2}"
}

if (($#)) && [[ $1 != --build ]]; then
    for cpu in ${ARM64_CPUS:-max}; do
        on "$cpu" "$@"
    done
    exit
fi
# Features depend on which packages are named. With the same ones in each call, what all share is built once.
packages=(-p mrt-format -p mrt-kernels -p mruntime -p mruntime-tests)
if (($#)); then
    on max --no-run --lib --test bits --test fast_lane "${packages[@]}"
    exit
fi
models/get_smollm2.py >&2
for cpu in max cortex-a53; do
    on "$cpu" --lib --test bits "${packages[@]}"
done
for cpu in cortex-a72 cortex-a76 neoverse-n1; do
    # mruntime-tests has no unit tests: it gives the kernels the features that they were built with above.
    on "$cpu" --lib -p mrt-kernels -p mruntime-tests
done
for cpu in max cortex-a76; do
    on "$cpu" --test fast_lane "${packages[@]}" -- --nocapture
done
unset QEMU_CPU
tests/scripts/arm64_instructions.py
