#!/usr/bin/env bash
# Sets up what the tests need and runs them all: format, lint, types, tests.
# usage: scripts/test.sh [--all] [pytest arguments]     (--all adds the tests that need minutes or much disk,
#        and runs those of mounts once more, with the other binding of libfuse)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

all=""
heavy=(-m "not heavy")
programs=(strace rsync getfattr fusermount3 mkfs.xfs mkfs.btrfs)
if [ "${1:-}" = --all ]; then
  all=yes
  heavy=()
  programs+=(chromium curl libnuma.so.1)
  shift
fi
ensure_system "${programs[@]}"
make_environment demo,test
if [ -n "$all" ]; then
  make_vllm_environment
  make_transformers_4
fi
say "ruff"
.venv/bin/ruff format --check .
.venv/bin/ruff check .
say "mypy"
.venv/bin/mypy
say "pytest"
# A file of tests stays in one process, so what it makes for all of them is made once.
run_tests() { .venv/bin/python -m pytest -n auto --dist loadfile "$@"; }
run_tests "${heavy[@]}" "$@"
if [ -n "$all" ]; then
  say "pytest: mounts through fusepy and libfuse 2"
  # 5: among the tests that were asked for is none of mounts.
  MERGEFS_FUSE_BINDING=fusepy run_tests -m mounts "$@" || [ $? = 5 ]
fi
