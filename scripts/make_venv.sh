#!/usr/bin/env bash
# Makes a virtual environment that can run the project and its tests. Usage: make_venv.sh VENV LOCK [PYTHON]
# Packages come from the lock file, by hash; the project itself is installed editable. Safe to repeat after a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: make_venv.sh VENV LOCK [PYTHON]}
lock=${2:?usage: make_venv.sh VENV LOCK [PYTHON]}
python=$(scripts/find_python.sh 3.12 ${3:+"$3"})

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
if [ "$(version "$venv/bin/python" || true)" != "$(version "$python")" ]; then
  echo "Making $venv with $python ($(version "$python"))" >&2
  rm -rf "$venv"
  "$python" -m venv "$venv"
fi
echo "Installing $lock into $venv (once; a minute or two)" >&2
scripts/retry.sh "$venv/bin/python" -m pip install -qq --disable-pip-version-check --require-hashes -r "$lock"
# The build backend is in the lock, so this step needs no network.
"$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
