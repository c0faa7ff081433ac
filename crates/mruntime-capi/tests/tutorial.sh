#!/usr/bin/env bash
# Runs the ten commands of README.md in this crate, and looks at the answer.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
cd "$here/../.."
commands=$(mktemp)
trap 'rm -f "$commands"' EXIT
sed -n '/^```sh$/,/^```$/{/^```/d;p}' "$here/README.md" >"$commands"
[[ $(wc -l <"$commands") == 10 ]] || { echo "tutorial.sh: README.md has not ten commands" >&2; exit 1; }
rm -rf target/demo
answer=$(bash -euo pipefail "$commands" | tail -2)
[[ $answer == *"The capital of France is Paris."* ]] || { echo "tutorial.sh: got: $answer" >&2; exit 1; }
echo "tutorial.sh: answered" >&2
