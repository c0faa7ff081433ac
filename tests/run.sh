#!/usr/bin/env bash
# Gets the models that the tests run on, then runs all tests. Arguments go to `cargo test`.
set -euo pipefail
cd "$(dirname "$0")/.."

models/get_qwen2_5_tokenizer.py >&2
models/get_smollm2.py >&2
cargo test --workspace "$@"
