#!/usr/bin/env python3
"""Times other programs that run Qwen2 on a CPU beside this one: the same random weights, the same token ids.

    peers.py install DIR               builds and installs llama.cpp, candle, OpenVINO, PyTorch and mistral.rs into DIR,
                                       and makes the model in every format: 25 GB, half an hour of two cores
    peers.py run DIR RESULTS.csv       measures them in turns, --rounds times; may be stopped and called again
    peers.py table RESULTS.csv         prints medians and ratios; --csv or --json for machines
    peers.py turns DIR                 decodes beside llama.cpp, in turns of less than a second: what memory can do changes
                                       within minutes, and both meet the same

A round starts, for each program and number of threads, a process from its start to the first token of a prompt of 16
tokens, and a process that prefills 512 tokens and decodes 64 after 32. Each does every measured thing once before, to
warm up. RESULTS.csv has a line for every single measurement. Before each round all model files are read anew into the
page cache, through mappings that ask for huge pages, and `run` says how much of each sits in such: what the system drops
or splits of them in the course of a round would count in the next.

Needs Python 3.9 with venv, a C++ compiler, cargo, and mr-bench and mr-convert in PATH (or in --bin).
"""
import argparse
import array
import csv
import datetime
import glob
import json
import mmap
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
MODELS = os.path.join(HERE, "..", "..", "models")
THREADS = (1, 2)
# Tokens of a turn.
TURN = 12
# Seconds between the processes.
SETTLE = 5
# The first tokens after 32 of the prompt, as every program finds them that computes what the model says.
EXPECTED = [52534, 50331, 50331, 50331, 118775, 46398, 70227, 128898]

# Program, type, and its command up to the number of threads; {dir} is DIR, {here} this folder.
PEERS = [
    *(("llama.cpp", t, f"{{dir}}/peer_llama {{dir}}/model-{t}.gguf {{dir}}/model-bf16/tokens.json") for t in ("f16", "bf16")),
    *(("OpenVINO", t, f"{{dir}}/openvino/bin/python {{here}}/peer.py openvino {{dir}}/model-openvino {t}") for t in ("f32", "bf16")),
    *(("PyTorch", t, f"{{dir}}/torch/bin/python {{here}}/peer.py torch {{dir}}/model-bf16 {t}") for t in ("f32", "bf16")),
    ("mistral.rs", "f16", "{dir}/mistralrs/bin/python {here}/peer.py mistralrs {dir}/model-bf16 f16"),
    ("candle", "f16", "{dir}/build-candle/release/peer-candle {dir}/model-f16 f16"),
    ("candle", "f32", "{dir}/build-candle/release/peer-candle {dir}/model-bf16 f32"),
]
OURS = "mruntime"
METRICS = [
    ("prefill", "prefill 512, tok/s", "{:.1f}"),
    ("decode", "decode, tok/s", "{:.1f}"),
    ("ready", "ready, s", "{:.3f}"),
    ("first", "first token, s", "{:.3f}"),
    ("rss", "peak RSS, MB", "{:.0f}"),
]
COLUMNS = ["date", "cpu", "cores", "kernel", "huge_pages", "program", "version", "type", "threads", "round", "metric", "value"]


def call(*command, **options):
    """Runs a command; exits with what it printed when it fails."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if result.returncode:
        sys.exit(f"{result.stdout}\nfailed: {shlex.join(command)}")
    return result.stdout


def install(args):
    os.makedirs(args.dir, exist_ok=True)
    os.chdir(args.dir)

    def venv(name, *packages):
        print(f"installing {name}", file=sys.stderr)
        if not os.path.isdir(name):
            call(sys.executable, "-m", "venv", name)
        call(f"{name}/bin/pip", "install", *packages)

    venv("llama", "numpy", "gguf", "cmake", "ninja", "scikit-build-core")
    venv("openvino", "openvino", "openvino-genai")
    venv("mistralrs", "mistralrs")
    venv("torch", "torch", "transformers", "safetensors", "tokenizers")

    print("building llama.cpp", file=sys.stderr)
    if not glob.glob("sdist/*/vendor/llama.cpp"):
        call("llama/bin/pip", "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", "sdist",
             "llama-cpp-python", env={**os.environ, "PATH": f"{os.getcwd()}/llama/bin:{os.environ['PATH']}"})
        with tarfile.open(glob.glob("sdist/*.tar.gz")[0]) as archive:
            archive.extractall("sdist", filter="data")
    [source] = glob.glob("sdist/*/vendor/llama.cpp")
    tools = {**os.environ, "PATH": f"{os.getcwd()}/llama/bin:{os.environ['PATH']}"}
    off = ["BUILD_SHARED_LIBS", *(f"LLAMA_{x}" for x in ("BUILD_UI", "BUILD_SERVER", "BUILD_TESTS", "BUILD_EXAMPLES",
                                                         "BUILD_APP", "OPENSSL"))]
    call("llama/bin/cmake", "-S", source, "-B", "build-llama", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
         "-DGGML_NATIVE=ON", *(f"-D{option}=OFF" for option in off), env=tools)
    call("llama/bin/ninja", "-C", "build-llama", "llama", env=tools)
    call("g++", "-O2", "-std=c++17", f"-I{source}/include", f"-I{source}/ggml/include", f"{HERE}/peer_llama.cpp", "-o",
         "peer_llama", "-Lbuild-llama/src", "-Lbuild-llama/ggml/src", "-lllama", "-lggml", "-lggml-cpu", "-lggml-base",
         "-fopenmp", "-lpthread", "-ldl", "-lm")

    print("building candle", file=sys.stderr)
    call("cargo", "build", "--release", "--manifest-path", f"{HERE}/candle/Cargo.toml", "--target-dir", "build-candle",
         env={**os.environ, "RUSTFLAGS": "-C target-cpu=native"})

    print("making the model", file=sys.stderr)
    tokenizer = os.path.join(MODELS, "Qwen2.5-tokenizer")
    if not os.path.isdir(tokenizer):
        call(sys.executable, os.path.join(MODELS, "get_qwen2_5_tokenizer.py"))
    for dtype in ("bf16", "f16"):
        if not os.path.isdir(f"model-{dtype}"):
            call(sys.executable, os.path.join(MODELS, "make_random_qwen2.py"), f"model-{dtype}", "--dtype", dtype,
                 "--tokenizer-dir", tokenizer)
        call("llama/bin/python", f"{HERE}/make_gguf.py", "model-bf16", f"model-{dtype}.gguf", dtype)
    os.makedirs("model-openvino", exist_ok=True)
    shutil.copy("model-f16.gguf", "model-openvino")
    convert = "import openvino_genai as g; g.LLMPipeline('model-openvino/model-f16.gguf', 'CPU', enable_save_ov_model=True)"
    call("openvino/bin/python", "-c", convert)
    os.remove("model-openvino/model-f16.gguf")
    for name in ("config.json", "tokens.json"):
        shutil.copy(f"model-bf16/{name}", "model-openvino")
    call(f"{args.bin}mr-convert", "model-bf16", "model.mrt")


def versions(directory):
    """Of each program, as its package says."""
    def package(venv, name):
        [path] = glob.glob(f"{directory}/{venv}/lib/python3*/site-packages/{name}-*.dist-info")
        return os.path.basename(path).removesuffix(".dist-info").split("-")[1]

    [llama] = [p for p in glob.glob(f"{directory}/sdist/llama_cpp_python-*") if os.path.isdir(p)]
    with open(f"{HERE}/candle/Cargo.lock") as lock:
        candle = re.search(r'name = "candle-core"\nversion = "(.*)"', lock.read())[1]
    return {
        "llama.cpp": "llama-cpp-python " + llama.rsplit("-", 1)[1],
        "OpenVINO": package("openvino", "openvino_genai"),
        "PyTorch": package("torch", "torch"),
        "mistral.rs": package("mistralrs", "mistralrs"),
        "candle": candle,
    }


def read_anew(path):
    """Reads a file that is not in the page cache, in huge pages, and returns MiB of it in huge pages and in all."""
    with open(path, "rb") as file:
        size = os.path.getsize(path)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
            mapping.madvise(mmap.MADV_HUGEPAGE)
            mapping.madvise(22)  # MADV_POPULATE_READ
            with open("/proc/self/smaps") as smaps:
                entry = smaps.read().split(os.path.realpath(path))[1]
            return int(re.search(r"FilePmdMapped: +(\d+)", entry)[1]) >> 10, size >> 20


def read_models_anew(args):
    for name in ("model.mrt", "model-*.gguf", "model-*/*.safetensors", "model-openvino/*model.bin"):
        for path in sorted(glob.glob(f"{args.dir}/{name}")):
            huge, size = read_anew(path)
            print(f"{os.path.relpath(path, args.dir)}: {huge} of {size} MiB in huge pages", file=sys.stderr)


def start(command, **options):
    """Runs a measured program. Its one line of JSON, with the process's peak RSS in MB."""
    # What the process before has freed, a virtual machine may give back to its host, which occupies a core meanwhile.
    time.sleep(SETTLE)
    env = {**os.environ, "PEER_START": repr(time.monotonic())}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL)
        output = process.stdout.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        lines = [line for line in output.splitlines() if line.startswith("{")]
        if process.returncode or not lines:
            errors.seek(0)
            raise RuntimeError((errors.read().decode(errors="replace").strip().splitlines() or ["no output"])[-1])
    return {**json.loads(lines[-1]), "rss": usage.ru_maxrss * 1024 / 1e6}


def measure_peer(args, command, threads, warm):
    """Both processes of one round: values of each metric. What is not warm is started once before."""
    command = command.format(dir=args.dir, here=HERE).split()
    if not warm:
        start([*command, str(threads), "start", "0"])
    first = start([*command, str(threads), "start", "0"])
    run = start([*command, str(threads), "run", str(args.repetitions)])
    if run["tokens"] and run["tokens"] != EXPECTED:
        print(f"note: {run['tokens']} are not the expected tokens", file=sys.stderr)
    return {**{metric: [first[metric]] for metric in ("ready", "first", "rss")},
            **{metric: run[metric] for metric in ("prefill", "decode")}}


def measure_ours(args, numerics, threads, _warm):
    """The same of this project, by mr-bench, which starts itself once before."""
    common = ["-m", f"{args.dir}/model.mrt", "-t", str(threads), "--json"]
    lane = ["--numerics", "fast"] if numerics == "fast" else []
    cold = start([f"{args.bin}mr-bench", "cold", "-p", "16", "-r", "1", *common, *lane])
    [run] = cold["measurements"][-1]["runs"]
    speed = start([f"{args.bin}mr-bench", "speed", "-r", str(args.repetitions), *common, *lane])
    rates = {test["test"]: [tokens / s for s in test["seconds"]]
             for test in speed["tests"] for tokens in [test["prompt_tokens"] + test["generated_tokens"]]}
    return {"prefill": rates["pp512"], "decode": rates["tg64"], "ready": [run["ready"] / 1e3],
            "first": [run["first_token"] / 1e3], "rss": [cold["rss"]]}


def check_ours(args):
    """Fails unless the most likely tokens are the expected ones."""
    with open(f"{args.dir}/model-bf16/tokens.json") as file:
        tokens = json.load(file)[:32]
    with tempfile.TemporaryDirectory() as directory:
        ids, out = f"{directory}/ids.json", f"{directory}/logits.bin"
        for expected in EXPECTED:
            with open(ids, "w") as file:
                json.dump(tokens, file)
            call(f"{args.bin}mr-bench", "logits", "-m", f"{args.dir}/model.mrt", "--tokens", ids, "--out", out)
            logits = array.array("f")
            with open(out, "rb") as file:
                logits.frombytes(file.read())
            token = max(range(len(logits)), key=logits.__getitem__)
            if token != expected:
                sys.exit(f"{OURS}: token {token} where {expected} is expected")
            tokens.append(token)


def machine():
    with open("/proc/cpuinfo") as file:
        cpu = re.search(r"model name\s*: (.*)", file.read())
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
        huge = re.search(r"\[(\w+)\]", file.read())
    return {"cpu": cpu[1].strip() if cpu else "unknown", "cores": len(os.sched_getaffinity(0)),
            "kernel": os.uname().release, "huge_pages": huge[1]}


def run(args):
    ours = json.loads(call(f"{args.bin}mr-bench", "roofline", "-t", "1", "--json"))
    of = {**versions(args.dir), OURS: ours["commit"] or ours["version"]}
    done = set()
    if os.path.exists(args.results):
        with open(args.results, newline="") as file:
            done = {(r["program"], r["type"], int(r["threads"]), int(r["round"])) for r in csv.DictReader(file)}
    else:
        check_ours(args)
        with open(args.results, "w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)
    programs = [(OURS, numerics, numerics) for numerics in ("exact", "fast")] + PEERS
    warm = set()
    end = time.monotonic() + args.seconds
    for turn in range(1, args.rounds + 1):
        left = [(threads, *program) for threads in THREADS for program in programs
                if (*program[:2], threads, turn) not in done and re.search(args.only, " ".join(program[:2]))]
        if left:
            read_models_anew(args)
        for threads, program, dtype, command in left:
            if time.monotonic() > end:
                return print("time is over: call again", file=sys.stderr)
            try:
                measure = measure_ours if program == OURS else measure_peer
                values = measure(args, command, threads, (program, dtype) in warm)
                warm.add((program, dtype))
            except RuntimeError as error:
                print(f"{program} {dtype}, {threads} threads: {error}", file=sys.stderr)
                continue
            date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
            about = {"date": date, **machine(), "program": program, "version": of[program], "type": dtype,
                     "threads": threads, "round": turn}
            with open(args.results, "a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                for metric, *_ in METRICS:
                    writer.writerows({**about, "metric": metric, "value": f"{value:.6g}"} for value in values[metric])
            medians = {metric: round(statistics.median(values[metric]), 3) for metric, *_ in METRICS}
            print(f"{program} {dtype}, {threads} threads: {medians}", file=sys.stderr)


def turns(args):
    """Prints rates of decoding, and ratios of those of the same round."""
    read_models_anew(args)
    for threads in THREADS:
        commands = {OURS: f"{args.bin}mr-bench turns -m {args.dir}/model.mrt -t {threads}"}
        commands |= {f"{program} {dtype}": command.format(dir=args.dir) + f" {threads} turns 0"
                     for program, dtype, command in PEERS if program == "llama.cpp"}
        env = {**os.environ, "PEER_START": "0"}
        processes = {name: subprocess.Popen(command.split(), env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                     for name, command in commands.items()}

        def rate(name):
            print(TURN, file=processes[name].stdin, flush=True)
            answer = processes[name].stdout.readline()
            if not answer:
                sys.exit(f"{name} has ended")
            # The first ones bring back into the caches what the others have displaced.
            return 1 / statistics.median(json.loads(answer)[2:])

        names = list(commands)
        for name in names:
            rate(name)
        rates = {name: [] for name in names}
        for i in range(args.rounds):
            for name in names[i % len(names):] + names[:i % len(names)]:
                rates[name].append(rate(name))
        for process in processes.values():
            process.stdin.close()
            process.wait()
        for name in names:
            line = (f"{threads} threads, {name}: {min(rates[name]):.1f} to {max(rates[name]):.1f} tok/s, median "
                    f"{statistics.median(rates[name]):.1f}")
            if name != OURS:
                ratios = [ours / theirs for ours, theirs in zip(rates[OURS], rates[name])]
                low, median, high = statistics.quantiles(ratios, n=4)
                line += (f"; {OURS} is {median:.2f} times as fast (quartiles {low:.2f} and {high:.2f}), faster in "
                         f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)} rounds")
            print(line)


def format_ratio(x):
    return f"{x:.2f}" if x < 10 else f"{x:.0f}"


def table(args):
    with open(args.results, newline="") as file:
        rows = list(csv.DictReader(file))
    values, about = {}, {}
    for row in rows:
        key = (row["program"], row["type"])
        values.setdefault(key, {}).setdefault((row["metric"], int(row["threads"])), []).append(float(row["value"]))
        about[key] = row["version"]
    medians = {key: {m: statistics.median(v) for m, v in of.items()} for key, of in values.items()}
    exact = medians.get((OURS, "exact"), {})
    records = [{"program": program, "type": dtype, "version": about[program, dtype], "metric": metric,
                "threads": threads, "median": median, "ratio_to_ours": median / exact[metric, threads] if (metric, threads) in exact else None,
                "measurements": len(values[program, dtype][metric, threads])}
               for (program, dtype), of in medians.items() for (metric, threads), median in of.items()]
    if args.json:
        return print(json.dumps({**{k: rows[-1][k] for k in COLUMNS[:5]}, "results": records}))
    if args.csv:
        writer = csv.DictWriter(sys.stdout, list(records[0]))
        writer.writeheader()
        return writer.writerows(records)
    days = sorted(row["date"][:10] for row in rows)
    first, last = days[0], days[-1]
    print(f"{rows[-1]['cpu']}, {rows[-1]['cores']} cores, Linux {rows[-1]['kernel']}, "
          f"{first if first == last else first + ' to ' + last}; medians; threads: "
          f"{' / '.join(sorted({row['threads'] for row in rows}))}; in brackets the ratio to ours\n")
    print("| program | " + " | ".join(title for _, title, _ in METRICS) + " |")
    print("|---|" + "---|" * len(METRICS))
    for (program, dtype), of in medians.items():
        cells = []
        for metric, _, form in METRICS:
            have = [t for t in THREADS if (metric, t) in of]
            cell = " / ".join(form.format(of[metric, t]) for t in have)
            if (program, dtype) != (OURS, "exact"):
                ratios = [format_ratio(of[metric, t] / exact[metric, t]) for t in have if (metric, t) in exact]
                cell += f" ({' / '.join(ratios)})" if ratios else ""
            cells.append(cell)
        print(f"| {program} {about[program, dtype]}, {dtype} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, work in (("install", install), ("run", run), ("table", table), ("turns", turns)):
        command = commands.add_parser(name)
        command.set_defaults(work=work)
        if name != "table":
            command.add_argument("dir", type=os.path.abspath)
            command.add_argument("--bin", help="directory of mr-bench and mr-convert")
        if name in ("run", "table"):
            command.add_argument("results")
        if name in ("run", "turns"):
            command.add_argument("--rounds", type=int, default=3 if name == "run" else 40)
        if name == "run":
            command.add_argument("--repetitions", type=int, default=2, help="measurements of each process")
            command.add_argument("--seconds", type=float, default=1e9, help="begin nothing after so many")
            command.add_argument("--only", default=".", help="programs and types that this regular expression finds")
        if name == "table":
            command.add_argument("--csv", action="store_true")
            command.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.work is table:
        # Ends quietly when whoever reads it, as `head` does, has read enough.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    else:
        args.bin = os.path.join(os.path.abspath(args.bin), "") if args.bin else ""
    args.work(args)


if __name__ == "__main__":
    main()
