"""The catalog: typed records that come back as they were kept, a map that grows, and many processes at once."""

import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mounting import environment

from mergefs.catalog import Catalog, default_location
from mergefs.catalog import environment as environment_module
from mergefs.catalog.environment import Environment
from mergefs.catalog.records import (
    CheckpointRecord,
    ContentRecord,
    DeltaRecord,
    HistogramRecord,
    InputRecord,
    PlanEntryRecord,
    PlanRecord,
    SelectionRecord,
    ThresholdRecord,
    TransactionRecord,
)
from mergefs.errors import CatalogError
from mergefs.mount.serving_catalog import ServingCatalog

KEYS = st.binary(min_size=1, max_size=32)


def plan_record(plan_id: str) -> PlanRecord:
    return PlanRecord(
        plan_id=plan_id,
        recipe="merge_method: ties\n",
        origin="/recipes/ties.yml",
        method="ties",
        budget_bytes=10**12,
        expert_bytes_total=2**40,
        expert_bytes_planned=2**39,
        random_seed=-1,
        max_shard_size=5 * 10**9,
        inputs=(InputRecord("org/model", "/models/a", "expert", "abc", "local-def"),),
        created_ns=1_700_000_000_000_000_000,
    )


def entry(name: str) -> PlanEntryRecord:
    return PlanEntryRecord(name, "BF16", (2, 3), SelectionRecord(6, (b"\xff", b"\x00"), b"\x00\x01", b"\x80"))


@pytest.fixture
def small_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every map start so small that a few records fill it."""
    monkeypatch.setattr(environment_module, "_INITIAL_MAP", 256 * 2**10)


# Records --------------------------------------------------------------------------------------------------------------


@given(key=KEYS, digest=st.binary(max_size=32), blocks=st.binary(max_size=4096), number=st.floats(allow_nan=False))
@settings(max_examples=15, deadline=None)
def test_statistics_come_back_as_they_were_kept_and_on_disk_once_they_are_flushed(
    catalogs: Path, key: bytes, digest: bytes, blocks: bytes, number: float
) -> None:
    content, delta = ContentRecord(digest, blocks), DeltaRecord(7, *[digest, blocks] * 3, digest)
    histogram, threshold = HistogramRecord(blocks), ThresholdRecord(2**31 - 1, 2**40)
    path = catalogs / uuid4().hex
    with Catalog(path) as catalog, Catalog(path) as another:
        catalog.keep_content(key, content)
        catalog.keep_delta(key, delta)
        catalog.keep_histogram(key, histogram)
        catalog.keep_threshold(key, threshold)
        catalog.keep_number(key, number)
        assert catalog.content(key) == content
        assert another.content(key) is None
        catalog.flush()
        for one in (catalog, another):
            assert (one.content(key), one.delta(key)) == (content, delta)
            assert (one.histogram(key), one.threshold(key)) == (histogram, threshold)
            assert one.number(key) == number
    with Catalog(path) as again:
        assert again.content(key) == content
        assert again.content(key + b"x") is None


def test_what_is_pending_is_written_when_the_catalog_is_closed(tmp_path: Path) -> None:
    with Catalog(tmp_path) as catalog:
        catalog.keep_number(b"a", 0.1)
    with Catalog(tmp_path) as catalog:
        assert catalog.number(b"a") == 0.1


def test_what_could_not_be_written_is_not_found_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Catalog(tmp_path) as catalog:
        catalog.keep_number(b"a", 0.1)
        with monkeypatch.context() as patch:
            patch.setattr(catalog._environment, "write", refuse)
            with pytest.raises(CatalogError, match="full"):
                catalog.flush()
        assert catalog.number(b"a") is None
        catalog.keep_number(b"a", 0.2)
        catalog.flush()
        assert catalog.number(b"a") == 0.2


def refuse(puts: object) -> None:
    raise CatalogError("the disk is full")


def test_a_plan_is_kept_with_its_tensors_and_not_with_those_of_another(tmp_path: Path) -> None:
    long = "layer." * 200
    with Catalog(tmp_path) as catalog:
        catalog.keep_plan(plan_record("aa"), [entry("b"), entry("a"), entry(long), entry(long + "x")])
        catalog.keep_plan(plan_record("aab"), [entry("other")])
        assert catalog.plan("aa") == plan_record("aa")
        assert catalog.plan("a") is None
        assert [plan.plan_id for plan in catalog.plans()] == ["aa", "aab"]
        names = [record.name for record in catalog.plan_entries("aa")]
        assert names[:2] == ["a", "b"]
        assert set(names[2:]) == {long, long + "x"}
        assert [record.name for record in catalog.plan_entries("aab")] == ["other"]


def test_checkpoints_and_transactions_are_written_at_once(tmp_path: Path) -> None:
    checkpoint = CheckpointRecord("/models/a", 3, 100, None)
    transaction = TransactionRecord("t", "p", "/out", "/.out", "begun", 7, 1)
    with Catalog(tmp_path) as catalog:
        catalog.keep_checkpoint("local-1", checkpoint)
        catalog.keep_transaction(transaction)
        catalog.keep_transaction(msgspec.structs.replace(transaction, state="committed"))
        assert catalog.checkpoint("local-1") == checkpoint
        assert catalog.checkpoints() == [checkpoint]
        assert [record.state for record in catalog.transactions()] == ["committed"]
        assert catalog.counts()["transactions"] == 1
        assert catalog.size_on_disk() == (tmp_path / "data.mdb").stat().st_blocks * 512 > 0


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MERGEFS_CATALOG": "/c", "XDG_DATA_HOME": "/x", "HOME": "/h"}, "/c"),
        ({"XDG_DATA_HOME": "/x", "HOME": "/h"}, "/x/mergefs/catalog"),
        ({"HOME": "/h"}, "/h/.local/share/mergefs/catalog"),
        ({"MERGEFS_CATALOG": "", "XDG_DATA_HOME": "", "HOME": "/h"}, "/h/.local/share/mergefs/catalog"),
    ],
)
def test_where_the_catalog_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("MERGEFS_CATALOG", "XDG_DATA_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_location() == Path(expected)


# Transactions ---------------------------------------------------------------------------------------------------------


def test_writes_are_all_or_nothing(tmp_path: Path) -> None:
    environment_of_two = Environment(tmp_path, ("a", "b"))
    with pytest.raises(CatalogError):
        environment_of_two.write([("a", b"key", b"value"), ("b", b"k" * 600, b"a key that is too long")])
    assert environment_of_two.get("a", b"key") is None
    environment_of_two.write([("a", b"key", b"value"), ("b", b"other", b"x")])
    environment_of_two.write([("a", b"key", None)])
    assert environment_of_two.get("a", b"key") is None
    assert environment_of_two.items("b") == [(b"other", b"x")]
    environment_of_two.close()


@given(st.dictionaries(KEYS, st.binary(max_size=64), max_size=20), st.binary(max_size=2))
@settings(max_examples=15, deadline=None)
def test_items_are_those_with_the_prefix_in_order(catalogs: Path, pairs: dict[bytes, bytes], prefix: bytes) -> None:
    store = Environment(catalogs / uuid4().hex, ("a",))
    store.write([("a", key, value) for key, value in pairs.items()])
    assert store.items("a", prefix) == sorted(pair for pair in pairs.items() if pair[0].startswith(prefix))
    assert store.count("a") == len(pairs)
    store.close()


# Growth ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_map")
def test_the_map_grows_as_records_come(tmp_path: Path) -> None:
    values = {f"key {number}".encode(): os.urandom(100_000) for number in range(60)}
    with Catalog(tmp_path) as catalog:
        for key, value in values.items():
            catalog.keep_content(key, ContentRecord(b"", value))
            catalog.flush()
    with Catalog(tmp_path) as catalog:
        for key, value in values.items():
            assert catalog.content(key) == ContentRecord(b"", value)


@pytest.mark.usefixtures("small_map")
def test_one_transaction_may_be_larger_than_the_map(tmp_path: Path) -> None:
    with Catalog(tmp_path) as catalog:
        for number in range(20):
            catalog.keep_content(b"%d" % number, ContentRecord(b"", bytes(200_000)))
        catalog.flush()
        assert catalog.counts()["contents"] == 20


@pytest.mark.usefixtures("small_map")
def test_the_map_grows_while_other_threads_read_and_write(tmp_path: Path) -> None:
    with Catalog(tmp_path) as catalog:
        catalog.keep_number(b"steady", 1.0)
        catalog.flush()
        done = threading.Event()

        def read() -> int:
            times = 0
            while not done.is_set() or not times:
                assert catalog.number(b"steady") == 1.0
                times += 1
            return times

        def write(worker: int) -> None:
            for number in range(15):
                catalog.keep_content(b"%d %d" % (worker, number), ContentRecord(b"", bytes(50_000)))
                catalog.flush()

        with ThreadPoolExecutor(6) as pool:
            readers = [pool.submit(read) for _ in range(3)]
            for writer in [pool.submit(write, worker) for worker in range(3)]:
                writer.result(timeout=120)
            done.set()
            assert all(reader.result(timeout=120) for reader in readers)
        assert catalog.counts()["contents"] == 45


def _write_from_a_process(path: Path, worker: int, ready: "multiprocessing.synchronize.Barrier") -> None:
    environment_module._INITIAL_MAP = 256 * 2**10
    with Catalog(path) as catalog:
        ready.wait(timeout=60)
        for number in range(20):
            catalog.keep_content(b"%d %d" % (worker, number), ContentRecord(b"", bytes([worker]) * 50_000))
            catalog.flush()
            assert catalog.content(b"%d 0" % worker) is not None


@pytest.mark.usefixtures("small_map")
def test_several_processes_fill_the_catalog_and_each_follows_the_growth_of_the_others(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(4)
    with Catalog(tmp_path) as catalog:
        processes = [context.Process(target=_write_from_a_process, args=(tmp_path, n, ready)) for n in range(3)]
        for process in processes:
            process.start()
        ready.wait(timeout=60)
        while any(process.is_alive() for process in processes):
            catalog.counts()  # must follow the growth too
        for process in processes:
            process.join()
            assert process.exitcode == 0
        for worker in range(3):
            for number in range(20):
                record = catalog.content(b"%d %d" % (worker, number))
                assert record == ContentRecord(b"", bytes([worker]) * 50_000)


# Damage ---------------------------------------------------------------------------------------------------------------


def test_a_catalog_is_as_long_as_its_map_even_when_a_transaction_gave_pages_back(tmp_path: Path) -> None:
    """LMDB alone leaves such a file shorter, which could not be told from one that was cut off."""
    store = Environment(tmp_path, ("a",))
    store.write([("a", b"big", os.urandom(300_000)), ("a", b"big", None)])
    assert (tmp_path / "data.mdb").stat().st_size == environment_module._INITIAL_MAP
    store.close()
    Environment(tmp_path, ("a",)).close()


def test_a_catalog_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    store = Environment(tmp_path, ("a",))
    store.write([("a", b"key", os.urandom(300_000))])
    store.close()
    os.truncate(tmp_path / "data.mdb", 100_000)
    with pytest.raises(CatalogError, match=rf"{tmp_path}: .*has 100000 bytes and needs \d+.*rebuilt"):
        Environment(tmp_path, ("a",))


def test_a_writer_that_is_killed_leaves_a_catalog_of_whole_transactions(tmp_path: Path) -> None:
    code = (
        "import sys, itertools; from pathlib import Path; from mergefs.catalog.environment import Environment\n"
        "store = Environment(Path(sys.argv[1]), ('a', 'b'))\n"
        "for number in itertools.count():\n"
        "    value = str(number).encode() * 1000\n"
        "    store.write([('a', b'key', value), ('b', b'key', value)])\n"
        "    print(number, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "catalog")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(tmp_path),
    )
    assert process.stdout is not None
    while int(process.stdout.readline()) < 20:
        pass
    process.kill()
    written = process.communicate(timeout=60)[0].split()
    last = int(written[-1]) if written else 20
    store = Environment(tmp_path / "catalog", ("a", "b"))
    assert store.get("a", b"key") == store.get("b", b"key")
    assert store.get("a", b"key") in (str(last).encode() * 1000, str(last + 1).encode() * 1000)
    store.write([("a", b"key", b"on it goes")])
    store.close()


# As a mount uses it ---------------------------------------------------------------------------------------------------


def test_a_mount_tells_once_that_nothing_is_kept_until_something_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ServingCatalog(tmp_path) as catalog:
        catalog.serving = True
        with monkeypatch.context() as patch:
            patch.setattr(catalog._environment, "write", refuse)
            for key in (b"a", b"b"):
                catalog.keep_number(key, 0.1)
                assert not catalog.flush()
                assert not catalog.flush()  # another thread, which finds nothing left, has not kept anything
            assert caplog.text.count("what is found out is not kept") == 1
        catalog.keep_number(b"a", 0.1)
        assert catalog.flush()
        with monkeypatch.context() as patch:
            patch.setattr(catalog._environment, "write", refuse)
            catalog.keep_number(b"b", 0.1)
            assert not catalog.flush()
        assert caplog.text.count("what is found out is not kept") == 2
