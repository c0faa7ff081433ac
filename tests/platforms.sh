#!/usr/bin/env bash
# Type-checks what an app links for systems that nothing can be run for here: macOS, iOS, Android, Windows.
#
#   tests/platforms.sh [TARGET...]
#
# No standard library of these targets is needed: it is type-checked too, from Debian's source package, which is installed
# by apt-get if this runs as root.
set -euo pipefail
cd "$(dirname "$0")/.."
(($#)) || set -- aarch64-apple-darwin aarch64-apple-ios aarch64-linux-android x86_64-pc-windows-gnu

missing=()
[[ -e /usr/bin/rustc && -d $(/usr/bin/rustc --print sysroot)/lib/rustlib/src/rust/library ]] || missing+=(rustc-web rust-web-src)
# The standard library for Windows names functions of its DLLs, for which dlltool makes import libraries.
command -v x86_64-w64-mingw32-dlltool >/dev/null || missing+=(binutils-mingw-w64-x86-64)
if ((${#missing[@]})); then
    [[ $(id -u) == 0 ]] || { echo "platforms.sh: needs ${missing[*]}" >&2; exit 2; }
    apt-get -qq -o DPkg::Lock::Timeout=300 update >&2
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 install --no-install-recommends \
        "${missing[@]}" >/dev/null
fi
# The compiler and its source belong together; -Zbuild-std is for nightly compilers, unless told otherwise.
export RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1
# Cargo would compile all of the standard library, which nothing is linked with, even to check what is on top of it.
export RUSTFLAGS=-Zno-codegen
# The host's build scripts and macros do run: not optimised, they are there sooner.
export CARGO_PROFILE_DEV_OPT_LEVEL=0
# One call for all, so that all processors have work.
cargo check --quiet -Zbuild-std=std,panic_abort "${@/#/--target=}" --target-dir "${CARGO_TARGET_DIR:-target}/platforms" \
    -p mruntime -p mruntime-capi
echo "platforms.sh: type-checks for $*" >&2
