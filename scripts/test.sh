#!/usr/bin/env bash
# Sets up what the tests need and runs them all: format, lint, types, tests.
# usage: scripts/test.sh [--all] [pytest arguments]     (--all adds the tests that need minutes or much disk)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

heavy=(-m "not heavy")
programs=(strace rsync getfattr)
if [ "${1:-}" = --all ]; then
  heavy=()
  programs+=(chromium)
  shift
fi
ensure_system "${programs[@]}"
make_environment demo,test
say "ruff"
.venv/bin/ruff format --check .
.venv/bin/ruff check .
say "mypy"
.venv/bin/mypy
say "pytest"
# A file of tests stays in one process, so what it makes for all of them is made once.
exec .venv/bin/python -m pytest -n auto --dist loadfile "${heavy[@]}" "$@"
