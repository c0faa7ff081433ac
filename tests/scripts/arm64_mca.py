#!/usr/bin/env python3
"""What the inner loops of the Arm64 products cost, by llvm-mca.

Builds mrt-kernels for Arm64, finds the loops of fused multiply-adds in the machine code, checks that none of them
spills registers to the stack, and prints a table: cycles per k (one row of a panel), and how much of the core's peak rate
of multiply-adds that is. Fails if a loop spills, or if the GEMM tile is below 95 % of the peak on Neoverse V1 or V2.

    tests/scripts/arm64_mca.py
    tests/scripts/arm64_mca.py --fast                               the fast lanes, beside KleidiAI's loops
    tests/scripts/arm64_mca.py --object FILE.o --function NAME      loops of another library's function
    tests/scripts/arm64_mca.py --widening                           ways to widen FP16 exactly in a GEMV

llvm-mca simulates a core's units from tables, with all data in the L1 cache. Its numbers depend on the version: these
need LLVM 22 (Debian: llvm-22). Not a measurement.
"""

import argparse
import os
import re
import subprocess
import sys

from arm64_rustc import TARGET, rustc, target_dir

CORES = ["neoverse-n1", "neoverse-v1", "neoverse-v2", "cortex-x4", "apple-m1"]
ITERATIONS = 200


def run(*command, **options):
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def build():
    """Compiles mrt-kernels and returns the path of its object file."""
    root = os.path.join(os.path.dirname(__file__), "../..")
    folder = target_dir("arm64-mca")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "mrt_kernels.o")
    command = ["cargo", "rustc", "--quiet", "--release", "-p", "mrt-kernels", "--lib", "--target", TARGET]
    command += ["--target-dir", folder, "--", f"--emit=obj={path}"]
    settings = {"RUSTC": rustc(), "CARGO_PROFILE_RELEASE_LTO": "off"}
    subprocess.run(command, check=True, cwd=root, env=os.environ | settings)
    return path


def loops(path, function):
    """Yields (function, instructions) of each innermost loop in functions whose name matches."""
    text = run("llvm-objdump-22", "-d", "-C", "--no-show-raw-insn", path)
    for part in re.split(r"\n(?=[0-9a-f]{16} <)", text):
        name = re.match(r"[0-9a-f]{16} <(.*)>:", part)
        if not name or not re.search(function, name[1]):
            continue
        code = re.findall(r"^\s*([0-9a-f]+):\s+(\S.*)$", part, re.M)
        place = {int(address, 16): i for i, (address, _) in enumerate(code)}
        found = set()
        for i, (_, instruction) in enumerate(code):
            branch = re.match(r"(?:b|b\.\w+|cbn?z|tbn?z)\s.*?0x([0-9a-f]+) <", instruction)
            start = place.get(int(branch[1], 16)) if branch else None
            if start is not None and start <= i:
                found.add((start, i))
        for start, end in sorted(found):
            if not any((s, e) != (start, end) and start <= s and e <= end for s, e in found):
                yield name[1], [instruction for _, instruction in code[start : end + 1]]


def cycles(instructions, core):
    """Cycles of one iteration."""
    text = "\n".join(re.sub(r"0x[0-9a-f]+ <.*>", ".", i.split("//")[0]) for i in instructions)
    command = ["llvm-mca-22", "-mtriple=aarch64", f"-mcpu={core}", "-mattr=+fullfp16,+fp16fml"]
    summary = run(*command, f"-iterations={ITERATIONS}", input=text)
    return int(re.search(r"Total Cycles:\s+(\d+)", summary)[1]) / ITERATIONS


# How 4 of 8 FP16 numbers in v{h} become f32 in v{w}; v30 and v31 hold constants, x0 points to some.
WIDENING = {
    "FCVTL": ["fcvtl v{w}.4s, v{h}.4h"],
    "SSHLL, BIC (activations times 2^112)": ["sshll v{w}.4s, v{h}.4h, #13", "bic v{w}.4s, #0x70, lsl #24"],
    "SSHLL, BIC, FMUL by 2^112": [
        "sshll v{w}.4s, v{h}.4h, #13",
        "bic v{w}.4s, #0x70, lsl #24",
        "fmul v{w}.4s, v{w}.4s, v30.4s",
    ],
    "move of -0, FMLAL": ["mov v{w}.16b, v31.16b", "fmlal v{w}.4s, v{h}.4h, v30.4h"],
    "load of -0, FMLAL": ["ldr q{w}, [x0, #{w}*16]", "fmlal v{w}.4s, v{h}.4h, v30.4h"],
}
MIXES = {
    "half FCVTL, half SSHLL, BIC, FMUL": ["FCVTL", "SSHLL, BIC, FMUL by 2^112"],
    "half FCVTL, half load of -0, FMLAL": ["FCVTL", "load of -0, FMLAL"],
}


def widening():
    """Prints cycles per k of a 1 x 32 GEMV for each way to widen."""
    print("| widening |", " | ".join(CORES), "|")
    print("|---|" + "---|" * len(CORES))
    for name, parts in ({name: [name] for name in WIDENING} | MIXES).items():
        code = ["ldp q8, q9, [x1], #64", "ldp q10, q11, [x1, #-32]"]
        for w in range(8):
            code += [line.format(w=w, h=8 + w // 2) for line in WIDENING[parts[w % len(parts)]]]
            code.append(f"fmla v{16 + w}.4s, v{w}.4s, v12.s[0]")
        print(f"| {name} |", " | ".join(f"{cycles(code, core):.1f}" for core in CORES), "|")


# Cycles per k of KleidiAI's matmul_clamp_f16_f16_f16p32x1b_6x32_neon_mla, as this script found them (see ARM64.md):
# for one row, and for six, on the cores of CORES.
KLEIDIAI = {1: [4.38, 2.01, 2.01, 2.01, 2.13], 6: [13.00, 6.01, 6.01, 6.01, 8.00]}
# FP16 products that follow one another in a loop over whole blocks.
FP16_BLOCK = 64


def fast_lanes(path):
    """Prints the loops of the fast lanes; returns what is wrong with them."""
    print("| lane | loop | instructions per k |", " | ".join(CORES), "|")
    print("|---|---|---|" + "---|" * len(CORES))
    rows, failures, found = [], [], set()
    for function, code in loops(path, r"fp16_neon::(fp16|fhm)_(product|tile)"):
        lane = re.search(r"(fp16|fhm)_(product|tile)", function)[1]
        fp16 = [m for i in code if (m := re.match(r"fm(?:la|ul)\s+v\d+\.8h, v\d+\.8h, v\d+\.h\[(\d)\]", i))]
        fmlal = [m for i in code if (m := re.match(r"fmlal2?\s+v\d+\.4s, v\d+\.4h, v\d+\.h\[(\d)\]", i))]
        if len(fp16) > 2 * FP16_BLOCK:
            k, height, unit = FP16_BLOCK, len({m[1] for m in fp16}), "FP16"
            width = 8 * len(fp16) // (k * height)
        elif not fp16 and len({m[1] for m in fmlal}) == 8:
            k, height, width, unit = 8, 1, 4 * len(fmlal) // 8, "FMLAL"
        else:
            continue  # packing, or inputs that fill no block
        failures += [f"fast-{lane}, {height}x{width}: {i} in the loop" for i in code if re.search(r"\[sp", i)]
        row = []
        for core, one, six in zip(CORES, KLEIDIAI[1], KLEIDIAI[6]):
            per_k = cycles(code, core) / k
            share = (one if height == 1 else six * height / 6) * width / 32 / per_k
            row.append(f"{per_k:.2f} ({share:.0%})")
            # FMLAL is to reach it where it is as fast as FMLA in the tables: not on the M1, with three units.
            held = {"FP16": ["neoverse-v1", "neoverse-v2", "apple-m1"], "FMLAL": ["neoverse-v1", "neoverse-v2"]}[unit]
            if lane == "fhm" and (height in [4, 8] or unit == "FMLAL") and core in held:
                found.add((unit, height))
                if share < 0.9:
                    failures.append(f"fast-fhm, {height}x{width}: {share:.1%} of KleidiAI's rate on {core}")
        rows.append((lane, unit, height, f"{width} | {len(code) / k:.1f} | {' | '.join(row)} |"))
    for lane, unit, height, row in sorted(rows):
        print(f"| `fast-{lane}` | {unit} {height} x {row}")
    if found != {("FP16", 4), ("FP16", 8), ("FMLAL", 1)}:
        failures.append(f"loops are missing: found {sorted(found)}")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--object", help="an object file or library; default: build mrt-kernels")
    parser.add_argument("--function", default="product::(panel_product|add_products)::on_neon", help="regular expression")
    parser.add_argument("--widening", action="store_true", help="compare ways to widen FP16, and nothing else")
    parser.add_argument("--fast", action="store_true", help="the fast lanes, beside KleidiAI's loops")
    arguments = parser.parse_args()
    if arguments.widening:
        return widening()
    if arguments.fast:
        return report(fast_lanes(arguments.object or build()))

    independent = [f"fmla v{i}.4s, v30.4s, v31.s[0]" for i in range(24)]
    peak = {core: len(independent) / cycles(independent, core) for core in CORES}
    print("| loop | panel | instructions per k |", " | ".join(CORES), "|")
    print("|---|---|---|" + "---|" * len(CORES))
    rows = {}
    failures = []
    for function, code in loops(arguments.object or build(), arguments.function):
        # fmla sum.4s, w.4s, x.s[lane]
        fmas = [m for i in code if (m := re.match(r"fml(?:a|al|al2)\s+(v\d+)\.(4s|8h), v\d+\.\S+, (v\d+)\.[sh]\[", i))]
        sums = {m[1] for m in fmas}
        if not sums or len(fmas) < 4 * len(sums):
            continue  # no product, or the last k of one
        k = len(fmas) // len(sums)
        height = len({m[3] for m in fmas})
        width = len(sums) // height * (4 if fmas[0][2] == "4s" else 8)
        spills = [i for i in code if re.match(r"(ldr|ldp|ldur|str|stp|stur)\s+[qdv]\d+.*\[(sp|x29)", i)]
        failures += [f"{function}, {height}x{width}: {i} in the loop" for i in spills]
        panel = "FP16" if any(re.match("fcvtl|fmlal", i) or ".8h" in i for i in code) else "f32"
        kernel = re.sub(r"::h[0-9a-f]{16}$", "", function).rsplit("::", 1)[-1]
        row = []
        for core in CORES:
            per_k = cycles(code, core) / k
            share = len(sums) / per_k / peak[core]
            row.append(f"{per_k:.2f} ({share:.0%})")
            if (height, width, panel) == (6, 16, "f32") and core in ["neoverse-v1", "neoverse-v2"] and share < 0.95:
                failures.append(f"{function}: the GEMM tile has {share:.1%} of the peak on {core}")
        rows[f"| {kernel} {height} x {width} | {panel} | {len(code) / k:.1f} | {' | '.join(row)} |"] = (panel, width, height)
    for line in sorted(rows, key=lambda line: (line.split()[1], rows[line])):
        print(line)
    if not rows:
        failures.append("no loop found")
    report(failures)


def report(failures):
    for failure in failures:
        print(failure, file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
