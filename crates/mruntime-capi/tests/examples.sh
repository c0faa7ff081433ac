#!/usr/bin/env bash
# Installs the library in a temporary folder, builds the C and C++ examples with what is installed and nothing else, and
# runs them on SmolLM2. Arguments:
#
#   examples.sh SMOLLM2.mrt           on this machine: with make and pkg-config, with CMake; also with a library that has
#                                     no text functions
#   examples.sh SMOLLM2.mrt --arm64   static programs for 64-bit Arm, under qemu
#
# PROFILE=dev builds faster than release.
set -euo pipefail
model=$(realpath "$1")
here=$(cd "$(dirname "$0")/.." && pwd)
root=$(cd "$here/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
question="What is the capital of France?"
answer="The capital of France is Paris."

fail() {
    echo "examples.sh: $*" >&2
    exit 1
}

expect() {
    local got=$1 want=$2
    [[ $got == "$want" ]] || fail "got: $got, expected: $want"
}

ask_all() { # COMMAND...: runs the two examples in folder $bin
    expect "$("$@" "$bin/ask" "$model" "$question")" "$answer"
    expect "$("$@" "$bin/chat" "$model" <<<"$question")" "> $answer
> "
}

golden() { # FIELD COUNT: of what transformers made of the second prompt
    python3 -c 'import json, sys
prompts = json.load(open(sys.argv[1]))["prompts"]
print(*prompts[1][sys.argv[2]][:int(sys.argv[3])], sep="\n")' "$root/tests/goldens/smollm2/golden.json" "$@"
}

functions() { # PREFIX [-D...]: the functions that an installed header declares
    cc -E "${@:2}" "$1/include/mruntime.h" | grep -o 'mruntime_[a-z_]*(' | tr -d '(' | sort -u
}

check_exports() { # PREFIX [-D...]: the shared library has all functions of the header, and no others
    diff <(nm -D --defined-only "$1/lib/libmruntime.so" | awk '{ print $3 }' | sort) <(functions "$@")
}

has_text_code() { # PREFIX
    grep 'mruntime_text\|minijinja\|serde_json' < <(nm "$1/lib/libmruntime.a" 2>/dev/null) >/dev/null
}

cp "$here"/examples/* "$work"
cd "$work"
if [[ ${2:-} == --arm64 ]]; then
    target=aarch64-unknown-linux-gnu
    # arm64.sh installs what is needed, and calls this again.
    [[ ${CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER:-} ]] ||
        exec "$root/tests/arm64.sh" --run "$here/tests/examples.sh" "$model" --arm64
    "$here/install.sh" "$work/usr" --target "$target" --target-dir "${CARGO_TARGET_DIR:-$root/target}/arm64"
    bin=$work
    flags=(-O2 -Wall -Wextra -Werror -pedantic "-I$work/usr/include")
    libs=("$work/usr/lib/libmruntime.a" -static -lpthread -lm -ldl -lgcc_eh -lc)
    aarch64-linux-gnu-gcc -std=c11 "${flags[@]}" -o chat chat.c "${libs[@]}"
    aarch64-linux-gnu-g++ -std=c++17 "${flags[@]}" -o ask ask.cpp "${libs[@]}"
    ask_all qemu-aarch64 -cpu max
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
    check_exports "$work/usr"
    # A line longer than a buffer, in characters of two bytes, arrives whole: it is only too long for the context.
    got=$("$bin/chat" "$model" <<<"$(printf 'é%.0s' {1..5000})" 2>&1) && fail "chat took 5000 tokens: $got"
    [[ $got == *" tokens do not fit into the context of 4096, of which 0 are used" ]] || fail "chat: $got"
    c++ -std=c++17 -Wall -Wextra -Werror -pedantic -o throws "$here/tests/throws.cpp" $(pkg-config --cflags --libs mruntime)
    expect "$(LD_LIBRARY_PATH=$work/usr/lib ./throws "$model")" "enough after 1, then 3 more"
    has_text_code "$work/usr" || fail "a look at the static library does not find its text functions"

    "$here/install.sh" "$work/bare" --no-default-features
    export PKG_CONFIG_PATH=$work/bare/lib/pkgconfig
    make -s -B ids
    mapfile -t prompt < <(golden ids 1000)
    expect "$(LD_LIBRARY_PATH=$work/bare/lib ./ids "$model" 8 "${prompt[@]}")" "$(golden greedy 8)"
    check_exports "$work/bare" -DMRUNTIME_NO_TEXT
    c++ -std=c++17 -Wall -Wextra -Werror -pedantic $(pkg-config --cflags mruntime) -include mruntime.hpp -fsyntax-only \
        -x c++ /dev/null
    if has_text_code "$work/bare"; then fail "there is code of text functions in a library without them"; fi
    if make -s -B chat 2>/dev/null; then fail "the header shows text functions that the library does not have"; fi

    # Libraries that cannot be installed, as for musl and for Windows.
    mkdir other
    for libraries in libmruntime_capi.a mruntime_capi.dll; do
        printf '#!/bin/sh\necho "{\\"filenames\\":[\\"/target/%s\\"]}"\n' "$libraries" >other/cargo
        chmod +x other/cargo
        PATH=$work/other:$PATH "$here/install.sh" "$work/none" 2>error && fail "installed $libraries"
        [[ $(wc -l <error) == 1 && $(<error) == *"cargo has built /target/$libraries and can install"* ]] || fail "$(<error)"
    done
fi
echo "examples.sh: all as expected" >&2
