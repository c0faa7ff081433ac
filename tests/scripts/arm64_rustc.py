"""The compiler for Arm64: the first that has the target's standard library. `tests/arm64.sh` installs one."""

import glob
import os
import subprocess
import sys

TARGET = "aarch64-unknown-linux-gnu"


def rustc():
    for name in [os.environ.get("ARM64_RUSTC", "rustc"), "/usr/bin/rustc"]:
        command = [name, "--print", "target-libdir", "--target", TARGET]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode == 0 and glob.glob(found.stdout.strip() + "/libstd-*.rlib"):
            return name
    sys.exit(f"no compiler has the standard library of {TARGET}; tests/arm64.sh installs one")


def target_dir(name):
    """Cargo's folder for builds with that compiler."""
    default = os.path.join(os.path.dirname(__file__), "../../target")
    return os.path.abspath(os.path.join(os.environ.get("CARGO_TARGET_DIR", default), name))
