#!/usr/bin/env python3
"""Instructions that Arm64 executes per prefilled and per decoded token, counted under qemu, against those on record.

    tests/scripts/arm64_instructions.py             fails if one differs from tests/goldens/arm64-instructions.txt by 2 %
    tests/scripts/arm64_instructions.py --record    writes that file

It runs examples/fixed_work.rs of mruntime: a fixed model on one thread, on CPUs with each of the vector instruction
sets. The number is the same in every run on every machine, and changes with the code and the compiler: with another
compiler than the recorded one it is shown, not compared. Needs qemu-aarch64 with plugins of version 1 (qemu 4.2 to 8;
Debian 12: qemu-user 7.2, not qemu-user-static), without which nothing is counted, and what tests/arm64.sh installs.
"""

import os
import re
import subprocess
import sys
import tempfile

from arm64_rustc import TARGET, rustc, target_dir

FOLDER = os.path.dirname(os.path.abspath(__file__))
RECORD = os.path.join(FOLDER, "../goldens/arm64-instructions.txt")
MARGIN = 0.02
CPUS = {"neoverse-n1": "neon", "max": "neon-fhm"}
# Two runs each, whose difference is that many tokens of work: loading and setting up cancel out. From position 64 on.
PREFILL = [(64, 0), (192, 0)]
DECODE = [(64, 0), (64, 16)]


def compiler():
    return subprocess.run([rustc(), "--version"], check=True, capture_output=True, text=True).stdout.split()[1]


def build():
    """Returns the path of the program."""
    folder = target_dir("arm64")
    prefix = "CARGO_TARGET_" + TARGET.upper().replace("-", "_")
    settings = {
        "RUSTC": rustc(),
        prefix + "_LINKER": "aarch64-linux-gnu-gcc",
        prefix + "_RUSTFLAGS": "-C target-feature=+crt-static",
    }
    command = ["cargo", "build", "--quiet", "--release", "-p", "mruntime", "--example", "fixed_work"]
    command += ["--target", TARGET, "--target-dir", folder]
    subprocess.run(command, check=True, cwd=FOLDER, env=os.environ | settings)
    return os.path.join(folder, TARGET, "release/examples/fixed_work")


def count(plugin, program, cpu, tokens):
    """Instructions of one run."""
    command = ["qemu-aarch64", "-cpu", cpu, "-plugin", plugin, program, *map(str, tokens)]
    # An empty environment: its size would be part of the count.
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={})
    assert done.stdout.strip() == CPUS[cpu], done.stdout
    return int(done.stderr.split()[-1])


def main():
    version = subprocess.run(["qemu-aarch64", "--version"], check=True, capture_output=True, text=True).stdout
    if not 4 <= int(re.search(r"version (\d+)", version)[1]) <= 8:
        print("instructions NOT COUNTED: the plugin is for qemu 4.2 to 8; this is", version.split("\n")[0])
        return 0
    program = build()
    lines = [f"rustc {compiler()}"]
    with tempfile.TemporaryDirectory() as folder:
        plugin = os.path.join(folder, "count.so")
        source = os.path.join(FOLDER, "count_instructions.c")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", plugin, source], check=True)
        for cpu, isa in CPUS.items():
            for name, (before, after) in {"prefill": PREFILL, "decode": DECODE}.items():
                instructions = count(plugin, program, cpu, after) - count(plugin, program, cpu, before)
                lines.append(f"{isa} {name} {round(instructions / (sum(after) - sum(before)))}")
    if "--record" in sys.argv:
        with open(RECORD, "w") as file:
            file.write("".join(line + "\n" for line in lines))
        return 0
    with open(RECORD) as file:
        recorded = file.read().splitlines()
    failed = len(recorded) != len(lines)
    for line, old in zip(lines[1:], recorded[1:]):
        now, before = (int(text.split()[-1]) for text in (line, old))
        change = now / before - 1
        failed |= abs(change) > MARGIN or line.split()[:-1] != old.split()[:-1]
        print(f"{line} instructions a token, {change:+.2%} from what is on record")
    if lines[0] != recorded[0]:
        print(f"counts NOT COMPARED: the record is of {recorded[0]}, this is {lines[0]}")
        return 0
    if failed:
        print(f"more than {MARGIN:.0%} apart: if on purpose, run this with --record", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
