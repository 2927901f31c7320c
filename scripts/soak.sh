#!/usr/bin/env bash
# Runs what looks for faults that a short test does not meet, for as long as each needs, and prints its figures.
# usage: scripts/soak.sh [NAME...]     (a NAME is a file scripts/soak/NAME.py; without any, all of them)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

names=("$@")
if [ ${#names[@]} -eq 0 ]; then
  for file in scripts/soak/*.py; do
    names+=("$(basename "$file" .py)")
  done
fi
ensure_system strace
make_environment demo,test
for name in "${names[@]}"; do
  [ -f "scripts/soak/$name.py" ] || die "scripts/soak.sh: there is no scripts/soak/$name.py"
  say "soak: $name"
  .venv/bin/python "scripts/soak/$name.py"
done
