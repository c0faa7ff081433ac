#!/usr/bin/env bash
# From nothing to an answer: gets SmolLM2-135M-Instruct, converts it, verifies the file and asks it a question.
#
#   models/run-smollm2.sh ["What is the capital of France?"]
#
# Needs Rust, a C linker, and python3 with pip. What has been fetched and converted is kept: a second call answers at once.
set -euo pipefail
cd "$(dirname "$0")/.."
question=${1:-What is the capital of France?}
file=models/smollm2.mrt

cargo build --release --bins
program() { cargo run --quiet --release --bin "$@"; }

directory=$(models/get_smollm2.py)
if [[ ! -f $file ]]; then
    program mr-convert -- "$directory" "$file" >&2
    program mrt -- verify "$file" >&2
fi
program mruntime_chat -- -m "$file" --greedy -p "$question"
