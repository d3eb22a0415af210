#!/usr/bin/env bash
# Writes the lock files from pyproject.toml: exact versions with hashes, for Python 3.12 and newer. Usage: make lock [ARGS=--upgrade]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(scripts/find_python.sh 3.12)
[ -x .venv-lock/bin/uv ] || { "$python" -m venv .venv-lock && .venv-lock/bin/pip install --quiet uv; }
compile=(.venv-lock/bin/uv pip compile --quiet --universal --python-version 3.12 --generate-hashes --no-header
  --no-emit-index-url --no-emit-find-links --no-annotate --group build pyproject.toml)
header() { printf '# %s\n# Written by `make lock`; do not edit.\n' "$1"; }

"${compile[@]}" --extra test "$@" --output-file requirements.lock >/dev/null
"${compile[@]}" --extra test --extra dev --constraint requirements.lock --output-file requirements-dev.lock >/dev/null
for file in requirements.lock requirements-dev.lock; do
  case $file in
    requirements.lock) text="What \`make run\` and \`make test\` install." ;;
    *) text="The same, and what \`make check\` needs." ;;
  esac
  { header "$text"; grep -v '^#' "$file"; } >"$file.new" && mv "$file.new" "$file"
done
