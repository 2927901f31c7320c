"""What the disk and the page cache give, for people to hold the other figures against."""

from pathlib import Path

from bench.cold import evict
from bench.processes import Taken, measured
from bench.rounds import Row, Way
from bench.setting import Setting, named

WRITE = "write and sync"
READ = "read from the disk"
CACHED = "read from the page cache"


def disk_name(setting: Setting) -> str:
    """Return the name of the row."""
    return f"disk@{named(setting.large)}"


def plain(setting: Setting) -> Row:
    """Return the row that writes and reads the files of a model."""
    name = disk_name(setting)
    out = setting.work / "scratch" / name / "copy"

    def ways() -> tuple[Way, ...]:
        family = setting.family(setting.large, 1)
        setting.scratch(name)
        files = sorted(family.base.glob("*.safetensors"))

        def cold() -> Taken:
            evict(files)
            return _cat(setting, files)

        def cached() -> Taken:
            _cat(setting, files)
            return _cat(setting, files)

        return (Way(WRITE, lambda: _write(setting, files, out), out), Way(READ, cold), Way(CACHED, cached))

    return Row(name, ways)


def _cat(setting: Setting, files: list[Path]) -> Taken:
    return _with_bytes(measured(["bash", "-c", f"cat {_quoted(files)} > /dev/null"], setting.variables()), files)


def _write(setting: Setting, files: list[Path], out: Path) -> Taken:
    out.mkdir()
    script = (
        f'for file in {_quoted(files)}; do dd if="$file" of="{out}/${{file##*/}}" bs=1M conv=fsync status=none; done'
    )
    return _with_bytes(measured(["bash", "-c", script], setting.variables()), files)


def _with_bytes(taken: Taken, files: list[Path]) -> Taken:
    total = sum(path.stat().st_size for path in files)
    return Taken(taken.seconds, taken.processor_seconds, taken.peak_bytes, {"bytes": total})


def _quoted(files: list[Path]) -> str:
    return " ".join(f"'{path}'" for path in files)
