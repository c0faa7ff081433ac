#!/usr/bin/env bash
# Installs the library in a temporary folder, builds the C and C++ examples with what is installed and nothing else, and
# runs them. Arguments:
#
#   examples.sh FILE.mrt           on this machine: with make and pkg-config, and with CMake
#   examples.sh FILE.mrt --arm64   static programs for 64-bit Arm, under qemu (tests/arm64.sh installs what that needs)
#
# PROFILE=dev builds faster than release.
set -euo pipefail
model=$(realpath "$1")
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
question="What is the capital of France?"
answer="The capital of France is Paris."

expect() {
    local got=$1 want=$2
    [[ $got == "$want" ]] || { echo "examples.sh: got: $got, expected: $want" >&2; exit 1; }
}

ask_all() { # COMMAND...: runs the two examples in folder $bin
    expect "$("$@" "$bin/ask" "$model" "$question")" "$answer"
    expect "$("$@" "$bin/chat" "$model" <<<"$question")" "> $answer
> "
}

cp "$here"/examples/* "$work"
cd "$work"
if [[ ${2:-} == --arm64 ]]; then
    target=aarch64-unknown-linux-gnu
    for RUSTC in rustc /usr/bin/rustc; do
        compgen -G "$("$RUSTC" --print target-libdir --target "$target" 2>/dev/null)/libstd-*.rlib" >/dev/null && break
    done
    export RUSTC
    qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64)
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    "$here/install.sh" "$work/usr" --target "$target" --target-dir "${CARGO_TARGET_DIR:-$here/../../target}/arm64"
    bin=$work
    flags=(-O2 -Wall -Wextra -Werror -pedantic "-I$work/usr/include")
    libs=("$work/usr/lib/libmruntime.a" -static -lpthread -lm -ldl -lgcc_eh -lc)
    aarch64-linux-gnu-gcc -std=c11 "${flags[@]}" -o chat chat.c "${libs[@]}"
    aarch64-linux-gnu-g++ -std=c++17 "${flags[@]}" -o ask ask.cpp "${libs[@]}"
    ask_all "$qemu" -cpu max
else
    "$here/install.sh" "$work/usr"
    export PKG_CONFIG_PATH=$work/usr/lib/pkgconfig
    make -s all
    bin=$work
    LD_LIBRARY_PATH=$work/usr/lib ask_all env
    cmake -S . -B build -DCMAKE_PREFIX_PATH="$work/usr" >/dev/null
    cmake --build build >/dev/null
    bin=$work/build
    ask_all env
fi
echo "examples.sh: all as expected" >&2
