#!/usr/bin/env bash
# Runs the Rust examples on SmolLM2 and looks at what each of them promises.
#
#   tests/rust_examples.sh SMOLLM2.mrt
set -euo pipefail
model=$(realpath "$1")
cd "$(dirname "$0")/.."
target=$(realpath "${CARGO_TARGET_DIR:-target}")
work=$(mktemp -d -p "$target")
trap 'rm -rf "$work"' EXIT

fail() {
    echo "rust_examples.sh: $*" >&2
    exit 1
}

expect() {
    local got=$1 want=$2
    [[ $got == "$want" ]] || fail "got: $got, expected: $want"
}

refused() { # TEXT COMMAND...: it ends with exit code 1 and an error that holds TEXT
    local text=$1 status=0
    shift
    "$@" >/dev/null 2>"$work/error" || status=$?
    [[ $status == 1 && $(<"$work/error") == *"$text"* ]] || fail "$* ended with $status: $(<"$work/error")"
}

golden() { # PROMPT FIELD COUNT: of what transformers made of a prompt
    python3 -c 'import json, sys
prompts = {prompt["name"]: prompt for prompt in json.load(open("tests/goldens/smollm2/golden.json"))["prompts"]}
print(*prompts[sys.argv[1]][sys.argv[2]][:int(sys.argv[3])])' "$@"
}

cargo build --quiet --workspace --bins --examples
bin=$target/debug/examples

# One-shot completion: transformers' greedy continuation.
expect "$("$bin/complete" "$model" "The sun was going down behind the hills when the old man finally closed the door of")" \
    " his cabin. He had been gone for a long time, and the old man had been gone for a long time, too. He had been gone for a"

# Streaming chat: a second turn begins where the first has ended; whoever reads no further ends it.
question="What is the capital of France?"
first=$("$bin/chat" "$model" <<<"$question")
both=$("$bin/chat" "$model" <<<"$question"$'\n'"And of Italy?")
[[ $both == ?*$'\n'?* && $both == "$first"$'\n'* ]] || fail "chat: $both"
refused "Broken pipe" bash -o pipefail -c '"$0" "$1" <<<"Tell me a long story." | head -c 1' "$bin/chat" "$model"

# Many sessions at the same time answer as each does alone.
questions=("What is the capital of France?" "What is two plus two?" "Name a colour.")
together=$("$bin/sessions" "$model" "${questions[@]}" 2>"$work/log")
expect "$together" "$(for question in "${questions[@]}"; do "$bin/sessions" "$model" "$question" 2>/dev/null; done)"
grep -q '^([1-9][0-9]* tokens of each prompt were computed once)$' "$work/log" || fail "sessions: $(<"$work/log")"

# Constrained: one of two words.
answer=$("$bin/constrain" "$model" "Is Paris the capital of France?")
[[ $answer == yes || $answer == no ]] || fail "constrain: $answer"

# An observer of 30 layers.
read -ra ids <<<"$(golden chat_short ids 1000)"
"$bin/hidden_states" "$model" "${ids[@]}" >"$work/layers"
awk 'NR > 1 && $1 == NR - 2 && $2 > 0 && $3 > -1 && $3 < 1 { n++ } END { exit n != 30 || NR != 31 }' "$work/layers" ||
    fail "hidden_states: $(<"$work/layers")"

# The longest context that a budget allows; nothing for less.
"$bin/memory_budget" "$model" 60 >"$work/budget"
awk '$1 + 0 && $2 + $3 <= 60 { fits = $1 } /^allocated/ { as_told = $NF == fits } END { exit !as_told }' "$work/budget" ||
    fail "memory_budget: $(<"$work/budget")"
refused "no context fits into the budget" "$bin/memory_budget" "$model" 1

# Weights inside a ZIP file, at a page: mapped where they lie. Compressed: refused.
python3 - "$model" "$work/app.zip" <<'END'
import sys, zipfile
with zipfile.ZipFile(sys.argv[2], "w") as app:
    app.writestr("hello.txt", "hello")
    app.writestr("small.mrt", bytes(100), zipfile.ZIP_DEFLATED)
    entry = zipfile.ZipInfo("assets/model.mrt")
    start = app.fp.tell() + 30 + len(entry.filename)
    entry.extra = bytes(-start % 4096)
    with open(sys.argv[1], "rb") as model, app.open(entry, "w") as packed:
        while piece := model.read(1 << 22):
            packed.write(piece)
END
got=$("$bin/zip_entry" "$work/app.zip" assets/model.mrt)
root=$("$target/debug/mrt" info "$model" | awk '$1 == "root" { print $2 }')
[[ $got == *", root $root, weights Some(Map)" ]] || fail "zip_entry: $got"
refused "small.mrt is compressed" "$bin/zip_entry" "$work/app.zip" small.mrt

# Weights linked into the program.
read -ra ids <<<"$(golden two ids 1000)"
linked=$(MODEL=$model cargo run --quiet --release --manifest-path examples/linked-weights/Cargo.toml \
    --target-dir "$target" -- "${ids[@]}")
expect "$linked" "$(golden two greedy 1)"
echo "rust_examples.sh: all as promised" >&2
