#!/usr/bin/env bash
# Makes the environment of the oracle: Hugging Face transformers on CPU torch. It never mixes with the project's own.
# Usage: make_oracle_venv.sh VENV
# torch comes from wherever pip is configured to look; a CPU build there (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) saves gigabytes.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: make_oracle_venv.sh VENV}
torch="torch==2.13.0"
packages=("transformers>=5.16,<5.20" safetensors sentencepiece tokenizers "numpy>=2.0")

# Python 3.11 first: it needs nothing of the project's, and the oldest that serves has had its wheels the longest.
for name in python3.11 python3 python3.12 python3.13 ""; do
  python=$(scripts/find_python.sh 3.11 ${name:+"$name"} 2>/dev/null) || continue
  rm -rf "$venv"
  echo "Making $venv with $python and $torch (once; some minutes)" >&2
  "$python" -m venv "$venv"
  if scripts/retry.sh "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$torch" "${packages[@]}"; then
    exit 0
  fi
done
echo "No Python from 3.11 on could install $torch and ${packages[0]}; is the network there?" >&2
exit 1
