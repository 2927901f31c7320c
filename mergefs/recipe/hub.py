"""Models on the Hugging Face Hub: in the local cache, or downloaded into it.

Downloading is done by the library ``huggingface_hub`` (the extra ``hub``), which honours HF_ENDPOINT, HF_TOKEN and the
proxies of the environment and shows its progress on a terminal. What is in the cache is found without it and without
the network: a model that is there is never replaced by a newer one behind the user's back.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mergefs.checkpoint.auxiliary import KNOWN_SUFFIXES, LEFT_OUT_DIRECTORIES, TRAINING_LEFTOVERS
from mergefs.checkpoint.weights import find_weight_files
from mergefs.errors import CheckpointError, DownloadError
from mergefs.units import format_size

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_NAME: Final = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_REVISION: Final = re.compile(r"[\w.+-]+(?:/[\w.+-]+)*", re.ASCII)

_ADAPTER: Final = ("adapter_config.json", "adapter_model.safetensors")
_BESIDE_WEIGHTS: Final = (*(f"*{suffix}" for suffix in sorted(KNOWN_SUFFIXES)), "LICENSE*", "NOTICE*")
_LEFT_OUT: Final = (*(f"{directory}/*" for directory in LEFT_OUT_DIRECTORIES), *TRAINING_LEFTOVERS)
_OFFLINE: Final = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def is_hub_name(path: str) -> bool:
    """Return whether ``path`` may be the name of a model on the Hub, with or without an organisation."""
    return bool(_NAME.fullmatch(path))


def hub_cache() -> Path:
    """Return the directory of the local cache, where ``huggingface_hub`` has it."""
    environment = os.environ
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(variable):
            return Path(os.path.expanduser(environment[variable]))  # noqa: PTH111
    if environment.get("HF_HOME"):
        return Path(os.path.expanduser(environment["HF_HOME"])) / "hub"  # noqa: PTH111
    root = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(root)) / "huggingface" / "hub"  # noqa: PTH111


def find_on_hub(name: str, revision: str | None) -> Path:
    """Return the directory of a model of the Hub: its snapshot in the cache, downloaded where it lacks its weights.

    Raises DownloadError, with the rest of a sentence that says what to do, where it is neither here nor to be had.
    """
    cached = _cached_snapshot(name, revision)
    if cached is not None and (_has_weights(cached) or _obstacle() is not None):
        return cached
    obstacle = _obstacle()
    if obstacle is not None:
        command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
        raise DownloadError(f"{obstacle}, correct the path, or run `{command}`")
    return _download(name, revision)


def _cached_snapshot(name: str, revision: str | None) -> Path | None:
    """Return the snapshot of a model in the local cache, or None when it is not there."""
    repository = hub_cache() / f"models--{name.replace('/', '--')}"
    revision = revision or "main"
    if not _REVISION.fullmatch(revision) or ".." in revision.split("/"):
        return None
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (repository / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
        if not _COMMIT.fullmatch(commit):
            return None
    snapshot = Path(os.path.abspath(repository / "snapshots" / commit))  # noqa: PTH100 - resolve() follows links
    return snapshot if os.path.isdir(snapshot) else None  # noqa: PTH112 - is_dir() raises where access is denied


def _has_weights(snapshot: Path) -> bool:
    """Return whether all weights are there: they are downloaded last, so everything else is there too."""
    if all((snapshot / name).exists() for name in _ADAPTER):
        return True
    try:
        return all((snapshot / name).exists() for name in find_weight_files(snapshot).names)
    except CheckpointError:
        return False


def _obstacle() -> str | None:
    """Return why nothing can be downloaded, as the beginning of what to do about it, or None."""
    forbidding = [name for name in _OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    if forbidding:
        return f"unset {forbidding[0]}, which forbids to download it"
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        return "install mergefs[hub], with which it would be downloaded"
    return None


def _download(name: str, revision: str | None) -> Path:
    """Download a model into the cache and return its snapshot. The weights come last."""
    from huggingface_hub import HfApi, snapshot_download

    from mergefs import __version__

    # The library reads this once, when it is imported; the environment of now counts.
    endpoint = os.environ.get("HF_ENDPOINT") or None
    cache = hub_cache()
    api = HfApi(endpoint=endpoint, library_name="mergefs", library_version=__version__)
    with _told(name, revision, api.endpoint), _bars_on_a_terminal_alone():
        sizes = _files(api, name, revision)
        if not any(file.endswith(".safetensors") for file in sizes):
            raise DownloadError(_no_safetensors(name, sizes))

        def fetch(revision: str | None, allow: list[str], ignore: list[str]) -> Path:
            found = snapshot_download(
                name,
                revision=revision,
                cache_dir=cache,
                allow_patterns=allow,
                ignore_patterns=ignore,
                endpoint=endpoint,
                library_name="mergefs",
                library_version=__version__,
            )
            return Path(found)

        snapshot = fetch(revision, list(_BESIDE_WEIGHTS), [*_LEFT_OUT, "*.safetensors"])
        # The branch may have moved meanwhile: from here on it is the commit that counts.
        sizes = _files(api, name, snapshot.name)
        weights = _weights(snapshot, sizes)
        _require_room(cache, sum(sizes.get(file) or 0 for file in weights if not (snapshot / file).exists()))
        return fetch(snapshot.name, [_escaped(file) for file in weights], [])


def _files(api: HfApi, name: str, revision: str | None) -> dict[str, int | None]:
    """Return the files of a model with their sizes, as far as these are known."""
    information = api.model_info(name, revision=revision, files_metadata=True)
    return {file.rfilename: file.size for file in information.siblings or ()}


def _weights(snapshot: Path, sizes: Mapping[str, int | None]) -> tuple[str, ...]:
    """Return the weight files among those of a model, whose other files are in ``snapshot`` already."""
    present = sorted(file for file in sizes if "/" not in file)
    adapter = tuple(file for file in _ADAPTER if file.endswith(".safetensors") and file in sizes)
    try:
        return (*adapter, *find_weight_files(snapshot, present).names)
    except CheckpointError:
        if adapter:
            return adapter
        raise


def _require_room(cache: Path, needed: int) -> None:
    """Refuse a download that the disk has no room for, before it begins."""
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"its weights take {format_size(needed)} and {format_size(free)} are free")


def _escaped(file: str) -> str:
    """Return the pattern that matches this file alone."""
    return re.sub(r"([*?[])", r"[\1]", file)


def _no_safetensors(name: str, files: Mapping[str, int | None]) -> str:
    other = next((file for file in files if file.endswith((".bin", ".pt", ".pth", ".gguf", ".h5"))), None)
    what = f"its weights are in {other}" if other else "there are no weights at all"
    return (
        f"the Hub has {name} without safetensors, which alone are merged ({what}); name a model that has them, or "
        "convert it"
    )


@contextmanager
def _bars_on_a_terminal_alone() -> Iterator[None]:
    """Let the library draw its progress bars where somebody sees them, or where its environment asks for them."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    wanted = constants.HF_HUB_DISABLE_PROGRESS_BARS
    if sys.stderr.isatty() or wanted is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _told(name: str, revision: str | None, endpoint: str) -> Iterator[None]:
    """Turn what the library raises into a DownloadError that ends a sentence for people."""
    from huggingface_hub import errors

    try:
        yield
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"its owners give access on request: ask for it at {endpoint}/{name}, then log in with `hf auth login` or "
            "set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(
            f"the Hub has {name}, but not at revision {revision or 'main'}; name a branch, a tag or a commit of it"
        ) from error
    except Exception as error:  # of whichever HTTP library huggingface_hub is built on
        raise DownloadError(_failure(error, endpoint)) from error


def _failure(error: Exception, endpoint: str) -> str:
    """Return what to say of a download that failed."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk has no room for it ({error.strerror}); free some, or name a directory on another disk in "
            "HF_HUB_CACHE"
        )
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "Invalid credentials" in str(error):
        return f"the Hub at {endpoint} does not take the token; correct HF_TOKEN, or log in anew with `hf auth login`"
    if status in (401, 404) or type(error).__name__ == "HFValidationError":
        return (
            f"the Hub at {endpoint} has none of that name, or keeps it private; correct the path, or log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if status == 403:
        return f"the Hub at {endpoint} forbids it; log in with `hf auth login`, or set HF_TOKEN to one that may read it"
    return (
        f"its download from {endpoint} failed ({reason}); check the network and run the command again, which fetches "
        "only the files that are missing"
    )
