#!/usr/bin/env bash
# Runs a command up to three times, for downloads over a poor network. Usage: retry.sh COMMAND [ARGUMENT ...]
set -uo pipefail
for pause_s in 5 15 0; do
  "$@" && exit 0
  code=$?
  [ "$pause_s" -eq 0 ] || { echo "failed; again in $pause_s s: $*" >&2; sleep "$pause_s"; }
done
exit $code
