#!/usr/bin/env bash
# Prints the path of a Python that can run the project; says what to install when there is none.
# Usage: find_python.sh MINIMUM [CANDIDATE ...]     MINIMUM like 3.12; with candidates, only those are tried.
set -euo pipefail
minimum=${1:?usage: find_python.sh MINIMUM [CANDIDATE ...]}
shift
candidates=("$@")
if [ $# -eq 0 ]; then
  candidates=(python3.13 python3.12 python3)
  # pyenv keeps its versions where PATH may not lead; newest first.
  while IFS= read -r path; do candidates+=("$path"); done \
    < <(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python3 2>/dev/null | sort -rV)
  candidates+=(python3.14 python3.11)
fi

# Runs the candidate: a name on PATH may be a pyenv shim that leads nowhere, or a Python without venv or pip (Debian's).
probe="import sys, ensurepip, venv
assert sys.version_info >= tuple(map(int, '$minimum'.split('.')))
print(sys.executable)"
for candidate in "${candidates[@]}"; do
  if path=$("$candidate" -c "$probe" 2>/dev/null); then
    echo "$path"
    exit 0
  fi
done

{
  echo "No Python $minimum or newer with venv and pip was found (tried: ${candidates[*]})."
  echo "Install one, then run the command again; for example"
  echo "  Debian 13, Ubuntu 24.04 or newer:  sudo apt-get install python3 python3-venv"
  echo "  Fedora:                            sudo dnf install python3.13"
  echo "  anywhere, with pyenv:              pyenv install 3.13"
  echo "or name one that you have:           make run PYTHON=/path/to/python3.13"
} >&2
exit 1
