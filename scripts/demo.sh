#!/usr/bin/env bash
# The main job on a real family of models, in one command: sets everything up, then runs `mergefs demo`.
# usage: scripts/demo.sh [DIR]     (default DIR: mergefs-demo)
set -euo pipefail
directory=$(realpath -m "${1:-mergefs-demo}")
cd "$(dirname "$0")/.."
. scripts/setup.sh

ensure_system
make_environment demo
[ -e /dev/fuse ] || die "There is no /dev/fuse here; in a container, start it with: --device /dev/fuse --cap-add SYS_ADMIN"
exec .venv/bin/mergefs demo "$directory"
