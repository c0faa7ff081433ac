#!/usr/bin/env bash
# Gets the models that the tests run on, then runs all tests. Arguments go to `cargo test`.
set -euo pipefail
cd "$(dirname "$0")/.."

models/get_qwen2_5_tokenizer.py >&2
models/get_smollm2.py >&2
# The fuzz targets are a workspace of their own, which names what the crates depend on a second time.
for manifest in Cargo.toml tests/fuzz/Cargo.toml; do
    cargo metadata --quiet --locked --format-version 1 --manifest-path "$manifest" >/dev/null
done
cargo test --workspace "$@"
# With the examples, whose dependencies are those of the tests: else features differ, and much is built a second time.
cargo build --quiet --workspace --bins --examples

# The reader that knows the format by its specification only. It needs numpy, which models/fetch.py gets.
reader() {
    python3 -c 'import runpy, sys
sys.path.insert(0, "models")
import fetch
fetch.use_requirements()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")' tests/scripts/read_mrt.py "$@"
}
reader --vectors tests/vectors/files.json
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
for model in tests/goldens/tiny/*; do
    "${CARGO_TARGET_DIR:-target}/debug/mr-convert" "$model" "$folder/model.mrt" >"$folder/log"
    reader "$folder/model.mrt" --safetensors "$model"
done
