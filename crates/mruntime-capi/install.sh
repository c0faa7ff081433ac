#!/usr/bin/env bash
# Builds the library and installs it for C and C++: headers, shared and static library, pkg-config file, CMake package.
#
#   crates/mruntime-capi/install.sh PREFIX [cargo arguments, such as --no-default-features or --target TRIPLE]
#
#   DESTDIR=FOLDER   put in front of PREFIX when files are copied
#   PROFILE=release  cargo's profile
set -euo pipefail
[[ $# -ge 1 && $1 == /* ]] || { echo "usage: install.sh PREFIX [cargo arguments]  (PREFIX is an absolute path)" >&2; exit 2; }
prefix=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
profile=${PROFILE:-release}
abi=1
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../../Cargo.toml" | head -1)

# Cargo tells where it puts the files.
files=$(cargo build --manifest-path "$here/Cargo.toml" --lib --profile "$profile" "$@" \
    --message-format=json-render-diagnostics | tr '"' '\n' | sed -nE '/mruntime_capi\.(so|dylib|dll|a|lib)$/p')
static=$(sed -n '/\.a$/p' <<<"$files" | tail -1)
shared=$(sed -nE '/\.(so|dylib)$/p' <<<"$files" | tail -1)
if [[ ! $static || ! $shared ]]; then
    echo "install.sh: cargo has built" ${files:-no library} "and can install a .so or .dylib together with a .a only: for Linux with glibc, Android and Apple's systems" >&2
    exit 1
fi
# What the static library needs of the system: rustc's native-static-libs.
case $shared in
*.dylib) name=libmruntime.$abi.dylib link=libmruntime.dylib libs="-lSystem -lc -lm" ;;
*) name=libmruntime.so.$abi link=libmruntime.so libs="-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc" ;;
esac

# Programs must not be shown functions that the library does not have.
flags= definitions=
if ! grep -q mruntime_tokenize "$static"; then
    flags=" -DMRUNTIME_NO_TEXT"
    definitions="
        INTERFACE_COMPILE_DEFINITIONS MRUNTIME_NO_TEXT"
fi

root=${DESTDIR:-}$prefix
install -d "$root/include" "$root/lib/pkgconfig" "$root/lib/cmake/mruntime"
install -m 644 "$here/include/mruntime.h" "$here/include/mruntime.hpp" "$root/include"
install -m 644 "$static" "$root/lib/libmruntime.a"
install -m 755 "$shared" "$root/lib/$name"
ln -sf "$name" "$root/lib/$link"

cat >"$root/lib/pkgconfig/mruntime.pc" <<END
prefix=$prefix
libdir=\${prefix}/lib
includedir=\${prefix}/include

Name: mruntime
Description: Runs Qwen2 models from one .mrt file
Version: $version
Cflags: -I\${includedir}$flags
Libs: -L\${libdir} -lmruntime
Libs.private: $libs
END

cat >"$root/lib/cmake/mruntime/mruntime-config.cmake" <<END
get_filename_component(_mruntime_prefix "\${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT TARGET mruntime::mruntime)
    add_library(mruntime::mruntime SHARED IMPORTED)
    set_target_properties(mruntime::mruntime PROPERTIES
        IMPORTED_LOCATION "\${_mruntime_prefix}/lib/$name"
        IMPORTED_SONAME "$name"
        INTERFACE_INCLUDE_DIRECTORIES "\${_mruntime_prefix}/include"$definitions)
    add_library(mruntime::static STATIC IMPORTED)
    set_target_properties(mruntime::static PROPERTIES
        IMPORTED_LOCATION "\${_mruntime_prefix}/lib/libmruntime.a"
        INTERFACE_LINK_LIBRARIES "$libs"
        INTERFACE_INCLUDE_DIRECTORIES "\${_mruntime_prefix}/include"$definitions)
endif()
END

cat >"$root/lib/cmake/mruntime/mruntime-config-version.cmake" <<END
set(PACKAGE_VERSION "$version")
if(PACKAGE_FIND_VERSION VERSION_GREATER PACKAGE_VERSION)
    set(PACKAGE_VERSION_COMPATIBLE FALSE)
else()
    set(PACKAGE_VERSION_COMPATIBLE TRUE)
    if(PACKAGE_FIND_VERSION VERSION_EQUAL PACKAGE_VERSION)
        set(PACKAGE_VERSION_EXACT TRUE)
    endif()
endif()
END
echo "installed in $root" >&2
