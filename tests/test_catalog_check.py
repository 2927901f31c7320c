"""``catalog check``: every invariant finds the damage that breaks it, says what to do, and is whole after that."""

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import torch
from checkpoints import family
from mounting import ROOT
from recipes import MERGES, write_recipe
from sound_catalog import ENTRY, KEY, LOCAL, PLAN, RECORDS, Hands

from mergefs.catalog import Catalog
from mergefs.catalog.catalog import FORMAT_KEY
from mergefs.catalog.check.evidence import Finding
from mergefs.catalog.check.files import FILE_INVARIANTS
from mergefs.catalog.check.records import INVARIANTS
from mergefs.catalog.check.run import check
from mergefs.catalog.check.supervision import check_catalog
from mergefs.catalog.check.values import VALUE_INVARIANTS
from mergefs.catalog.envelope import today
from mergefs.catalog.records import (
    ContentRecord,
    InputRecord,
    NumberRecord,
    ReadingRecord,
    SelectionRecord,
    VectorRecord,
)
from mergefs.catalog.schema import META, SCHEMA
from mergefs.cli import main
from mergefs.errors import CatalogError

Act = Callable[[Hands], None]


def by_repair(hands: Hands) -> None:
    """Do what most remedies say."""
    assert check(hands.path, repair=True).findings == ()


def by_rebuilding(hands: Hands) -> None:
    """Do the same where the file itself is damaged."""
    assert check_catalog(hands.path, repair=True).findings == ()


def by_forgetting(hands: Hands) -> None:
    """Do what the remedy says where nothing but the record knows what it held."""
    assert {finding.table for finding in check(hands.path, repair=True).findings} == {"transactions"}
    assert check(hands.path, repair=True, forget=True).findings == ()


def by_moving_away(hands: Hands) -> None:
    """Do what the remedy says where the file is another version's."""
    hands.path.rename(hands.path.with_name(f"{hands.path.name}-away"))
    Catalog(hands.path).close()


@dataclass(frozen=True, slots=True)
class Planted:
    """Damage that breaks an invariant, a word of what the check says of it, and what makes it well."""

    number: str
    plant: Act
    says: str
    heal: Act = by_repair


def change(table: str, **fields: object) -> Act:
    return lambda hands: hands.change(table, **fields)


def selection(**fields: object) -> Act:
    whole = SelectionRecord(8, (zlib.compress(b"\xff"),), zlib.compress(bytes(2)), b"\x80")
    return change("entries", selection=msgspec.structs.replace(whole, **fields))


def inputs(**fields: str) -> Act:
    whole = InputRecord("org/model", "/models/base", "expert", "cd" * 24, LOCAL)
    return change("plans", inputs=(msgspec.structs.replace(whole, **fields),))


def overwrite_a_leaf(hands: Hands) -> None:
    """Overwrite the beginning of the page that the numbers lie in, in the file itself."""
    for number in range(200):
        hands.keep("numbers", NumberRecord(float(number)), key=number.to_bytes(24, "big"))
    content = bytearray((hands.path / "data.mdb").read_bytes())
    # The key stands in old copies of the page, too.
    place = content.find((150).to_bytes(24, "big"))
    while place >= 0:
        begin = place // 4096 * 4096
        content[begin + 10 : begin + 12] = b"\xff\xff"
        place = content.find((150).to_bytes(24, "big"), begin + 4096)
    (hands.path / "data.mdb").write_bytes(content)


def leave(name: str) -> Act:
    def plant(hands: Hands) -> None:
        (hands.path / name).mkdir()
        (hands.path / name / "data.mdb").write_bytes(b"half")

    return plant


def flip_a_plane(hands: Hands) -> None:
    status = hands.planes.stat()
    hands.planes.write_bytes(b"c0ded")
    os.utime(hands.planes, ns=(status.st_atime_ns, status.st_mtime_ns))


PLANTED: Final = (
    Planted("C1", lambda h: h.write((META, FORMAT_KEY, b"99")), "format is '99' and not", by_moving_away),
    Planted("C1", lambda h: h.write((META, FORMAT_KEY, None)), "format is none", by_moving_away),
    Planted("C2", lambda h: h.write(("later", b"k", b"v"), tables=("later",)), "no table of that name", by_moving_away),
    Planted("C3", overwrite_a_leaf, "pages are damaged", by_rebuilding),
    Planted("C4", leave("compacting"), "interrupted compaction"),
    Planted("C4", leave("salvage"), "interrupted compaction"),
    Planted("C5", flip_a_plane, "not that of its name"),
    Planted("C10", lambda h: h.write(("numbers", KEY, h.value("numbers")[:-1] + b"?")), "bytes are not those"),
    Planted("C10", lambda h: h.write(("numbers", bytes(24), h.value("numbers"))), "bytes are not those"),
    Planted("C11", lambda h: h.seal_payload("deltas", b"\xc1"), "no DeltaRecord"),
    Planted("C11", lambda h: h.keep("contents", NumberRecord(1.0)), "no ContentRecord"),
    Planted("C12", lambda h: h.move("vectors", b"short"), "has 5 bytes"),
    Planted("C12", lambda h: h.move("plans", b"\xff\xfe"), "no text", by_forgetting),
    Planted("C13", lambda h: h.keep("numbers", NumberRecord(1.0), about=b"1"), "no multiple of 24"),
    Planted("C13", lambda h: h.keep("numbers", NumberRecord(1.0), day=today() + 400), "has not come"),
    Planted("C20", lambda h: h.move("checkpoints", b"local-1"), "no local identity"),
    Planted("C20", change("checkpoints", path="models/base"), "not absolute"),
    Planted("C21", change("checkpoints", tensors=-1), "-1 tensors"),
    Planted("C22", change("checkpoints", content="abc"), "'abc' is none"),
    Planted("C23", change("contents", digest=bytes(23)), "23 bytes and not 24"),
    Planted("C23", change("contents", blocks=bytes(33)), "33 bytes"),
    Planted(
        "C24",
        lambda h: h.keep("contents", ContentRecord(RECORDS["contents"][1].digest, bytes(32)), key=bytes(24)),
        "another tensor has the same digest",
    ),
    Planted("C25", change("deltas", present=bytes(2)), "with 2 bytes"),
    Planted("C25", change("deltas", present=b"\xc0"), "array changed has 4 bytes for 2 blocks"),
    Planted("C25", change("deltas", largest=b""), "array largest has 0 bytes for 1 blocks"),
    Planted("C25", change("deltas", sketches=bytes(127)), "sketches have 127 bytes"),
    Planted("C26", change("deltas", squared_norms=struct.pack("<f", -1.0)), "squared_norms has a number that is neg"),
    Planted("C26", change("deltas", largest=struct.pack("<f", float("inf"))), "not finite"),
    Planted("C26", change("deltas", changed=bytes(4)), "no element that did"),
    Planted("C27", change("norms", squared_norms=bytes(5)), "5 bytes"),
    Planted("C27", change("norms", squared_norms=struct.pack("<f", float("nan"))), "not finite"),
    Planted("C28", change("twins", local=bytes(23)), "23 bytes and not 24"),
    Planted("C29", change("histograms", packed=b"?"), "cannot be unpacked"),
    Planted("C29", change("histograms", packed=zlib.compress(bytes([2, 3, 1, 5]))), "it has 4 numbers"),
    Planted("C29", change("histograms", packed=zlib.compress(b"")), "it has 0 numbers"),
    Planted("C29", change("histograms", packed=zlib.compress(bytes([2, 3, 0, 5, 1]))), "do not ascend"),
    Planted("C29", change("histograms", packed=zlib.compress(bytes([1, 0x80, 0x80, 2, 5]))), "below 32768"),
    Planted("C29", change("histograms", packed=zlib.compress(bytes([1, 3, 0]))), "empty"),
    Planted("C30", change("thresholds", key=-1), "key is -1"),
    Planted("C31", change("vectors", values=bytes(9)), "9 bytes"),
    Planted("C32", change("vocabularies", ids=bytes(5)), "5 bytes"),
    Planted("C33", change("vocabularies", ids=struct.pack("<2i", 1, 1)), "do not ascend"),
    Planted("C33", change("vocabularies", count=1), "counts 1 tokens"),
    Planted("C33", change("vocabularies", found_ids=(-2,)), "id -2"),
    Planted("C34", change("vocabularies", permutations=(struct.pack("<i", -2),)), "below -1"),
    Planted("C35", change("vocabularies", files={"../x": b""}), "outside"),
    Planted("C36", change("planes", planes=9), "9 planes"),
    Planted("C36", change("planes", digest=b""), "0 bytes and not 16"),
    Planted("C37", change("planes", left=bytes(4)), "4 bytes of errors for 2 cells"),
    Planted("C37", change("planes", coded=bytes(3)), "have 3 bytes"),
    Planted("C38", change("planes", left=struct.pack("<4f", 1.0, 0.0, 2.0, 0.0)), "rises"),
    Planted("C38", change("planes", coded=struct.pack("<2I", 9, 0)), "more elements than it has"),
    Planted("C39", lambda h: h.planes.unlink(), "No such file"),
    Planted("C39", lambda h: os.utime(h.planes), "another time"),
    Planted("C39", change("planes", file="../data.mdb"), "no name of such files"),
    Planted("C39", change("planes", offset=6), "behind the end"),
    Planted("C40", lambda h: h.keep("plans", RECORDS["plans"][1], key=b"56" * 16), "under another id", by_repair),
    Planted("C40", change("plans", plan_id="x"), "id 'x' is none", by_forgetting),
    Planted("C41", change("plans", expert_bytes_planned=101), "101 of 100", by_forgetting),
    Planted("C41", change("plans", budget_bytes=49), "above its budget of 49", by_forgetting),
    Planted("C41", change("plans", created_ns=0), "made at 0", by_forgetting),
    Planted("C42", change("plans", recipe=""), "lacks its recipe", by_forgetting),
    Planted("C42", inputs(role="donor"), "are donor", by_forgetting),
    Planted("C43", inputs(identity=LOCAL), "otherwise than its inputs", by_forgetting),
    Planted("C44", lambda h: h.remove("entries"), "no tensors", by_forgetting),
    Planted("C49", change("plans", directories=("recipes",)), "from 'recipes', which is relative", by_forgetting),
    Planted("C45", lambda h: h.move("entries", b"78" * 16 + ENTRY[32:]), f"{'78' * 16} is not there", by_forgetting),
    Planted("C46", change("entries", name="another"), "under the name of another", by_forgetting),
    Planted("C47", change("entries", dtype="F3"), "dtype is 'F3'", by_forgetting),
    Planted("C47", change("entries", shape=(-1,)), "shape [-1]", by_forgetting),
    Planted("C48", selection(cell=3), "cells have 3 elements", by_forgetting),
    Planted("C48", selection(levels=(b"x",)), "cannot be unpacked", by_forgetting),
    Planted("C48", selection(givers=zlib.compress(bytes(3))), "cannot be unpacked", by_forgetting),
    Planted("C48", selection(levels=(zlib.compress(b"12"),)), "not said for 1 inputs", by_forgetting),
    Planted("C48", selection(computed=b""), "with 0 bytes", by_forgetting),
    Planted("C48", selection(givers=zlib.compress(b"\1\0")), "comes later", by_forgetting),
    Planted("C50", change("readings", how="guess"), "read by 'guess'"),
    Planted("C50", lambda h: h.keep("readings", RECORDS["readings"][1], key=b"56" * 16), "under another id"),
    Planted("C51", change("readings", counts={"a": bytes(8)}), "read of 'a' is not two counts"),
    Planted("C51", change("readings", counts={"a": struct.pack("<2q", -1, 0)}), "read of 'a' is not two counts"),
    Planted("C52", lambda h: h.keep("readings", ReadingRecord("56" * 16, "open", 1, {}), key=b"56" * 16), "not there"),
    Planted("C60", lambda h: h.move("transactions", b"90" * 16), "under another id", by_forgetting),
    Planted("C61", change("transactions", state="done"), "state is 'done'", by_forgetting),
    Planted("C61", change("transactions", pid=0), "process is 0", by_forgetting),
    Planted("C62", change("transactions", destination="out"), "not absolute", by_forgetting),
    Planted("C64", change("transactions", manifest=""), "does not say what it wrote", by_forgetting),
    Planted("C64", change("transactions", manifest="x"), "manifest 'x' is none", by_forgetting),
    Planted("C64", change("transactions", content="x"), "wrote 'x' is none", by_forgetting),
    Planted("C63", change("transactions", plan_id="78" * 16), "is not there", by_forgetting),
)


@pytest.fixture
def place(catalogs: Path, tmp_path: Path) -> Path:
    return catalogs / f"{tmp_path.name}-catalog"


@pytest.fixture
def hands(place: Path) -> Hands:
    hands = Hands(place)
    hands.fill()
    return hands


def found_in(hands: Hands) -> tuple[Finding, ...]:
    return check(hands.path).findings


# Every invariant ------------------------------------------------------------------------------------------------------


def test_every_table_has_a_sound_record(hands: Hands) -> None:
    report = check(hands.path)
    assert report.findings == ()
    assert report.records == dict.fromkeys(SCHEMA, 1)


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: f"{planted.number} {planted.says}")
def test_damage_is_found_and_told_and_gone_after_the_remedy(hands: Hands, planted: Planted) -> None:
    planted.plant(hands)
    found = [finding for finding in found_in(hands) if finding.number == planted.number]
    assert found
    assert planted.says in found[0].says
    assert found[0].remedy
    planted.heal(hands)
    assert found_in(hands) == ()


def test_every_declared_invariant_has_planted_damage() -> None:
    declared = [invariant.number for invariant in (*FILE_INVARIANTS, *VALUE_INVARIANTS, *INVARIANTS)]
    assert sorted(set(declared)) == sorted(declared), "a number stands for one invariant"
    assert {planted.number for planted in PLANTED} == set(declared)


def test_every_table_of_the_schema_has_a_sound_record_to_damage_and_says_what_its_fields_are() -> None:
    assert set(RECORDS) == set(SCHEMA)
    for name, table in SCHEMA.items():
        assert tuple(table.fields) == table.record.__struct_fields__, name
    assert {invariant.table for invariant in INVARIANTS} | {"numbers"} == set(SCHEMA), "a number may be any"


def test_the_document_says_what_the_schema_and_the_invariants_say() -> None:
    script = ROOT / "scripts" / "document_catalog.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What real work leaves ------------------------------------------------------------------------------------------------


def test_what_planning_and_materializing_leave_is_as_it_must_be(tmp_path: Path, place: Path) -> None:
    models = family(tmp_path / "models", experts=2, dtype=torch.bfloat16, tied=False, shards=2)
    catalog = ["--catalog", str(place)]
    for name in ("ties", "dare_ties", "slerp"):
        recipe = str(write_recipe(tmp_path / f"{name}.yml", MERGES[name], models))
        assert main([*catalog, "plan", recipe, "--budget", "50%"]) == 0
    assert main([*catalog, "analyze", recipe, "--planes", "2"]) == 0
    assert main([*catalog, "materialize", recipe, str(tmp_path / "out")]) == 0
    report = check(place)
    assert report.findings == ()
    assert {"checkpoints", "contents", "deltas", "plans", "entries", "transactions"} <= {
        table for table, count in report.records.items() if count
    }


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_tells_each_finding_and_exits_with_1(hands: Hands, capsys: pytest.CaptureFixture[str]) -> None:
    hands.change("vectors", values=bytes(9))
    hands.change("transactions", state="done")
    assert main(["--catalog", str(hands.path), "catalog", "check"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"C31 vectors {KEY.hex()}: its numbers have 9 bytes, no multiple of 8; `mergefs catalog check --repair` "
        "removes it, and it is gathered again when it is needed",
        f"C61 transactions {'34' * 16}: its state is 'done'; `mergefs catalog check --repair --forget` removes it, and "
        "what it held is lost",
        f"{hands.path}: 2 findings in {len(SCHEMA)} records",
    ]
    assert main(["--catalog", str(hands.path), "catalog", "check", "--repair", "--forget"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said[:2]] == [["repaired:", "C31"], ["repaired:", "C61"]]
    assert said[2] == f"{hands.path}: {len(SCHEMA) - 2} records, all as they must be"


def test_many_findings_of_a_kind_are_counted(hands: Hands, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(15):
        hands.write(("numbers", number.to_bytes(24, "big"), b"?"))
    assert main(["--catalog", str(hands.path), "catalog", "check"]) == 1
    assert "C10 numbers: and 5 more of this kind" in capsys.readouterr().out.splitlines()


def test_the_command_prints_json_for_programs(hands: Hands, capsys: pytest.CaptureFixture[str]) -> None:
    hands.change("deltas", changed=bytes(8))
    assert main(["--catalog", str(hands.path), "catalog", "check", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (finding,) = report["findings"]
    assert (finding["invariant"], finding["table"], finding["key"]) == ("C25", "deltas", KEY.hex())
    assert (finding["repair"], report["repaired"], report["records"]["deltas"]) == ("remove", [], 1)


def test_forgetting_alone_is_no_repair(hands: Hands) -> None:
    assert main(["--catalog", str(hands.path), "catalog", "check", "--forget"]) == 2


def test_there_is_nothing_wrong_with_a_catalog_that_is_not_there(place: Path) -> None:
    assert main(["--catalog", str(place), "catalog", "check"]) == 0
    assert not place.exists()


# Damaged files --------------------------------------------------------------------------------------------------------


def test_a_damaged_record_is_refused_by_its_name_when_it_is_read(hands: Hands) -> None:
    hands.write(("numbers", KEY, b"?" + hands.value("numbers")[1:]))
    with (
        Catalog(hands.path) as catalog,
        pytest.raises(CatalogError, match=rf"record {KEY.hex()} of table 'numbers' is damaged .*check --repair"),
    ):
        catalog.number(KEY)


def test_a_file_that_was_cut_off_is_told_and_replaced(hands: Hands) -> None:
    for number in range(300):
        hands.keep("vectors", VectorRecord(bytes(8 * 1000)), key=number.to_bytes(24, "big"))
    size = (hands.path / "data.mdb").stat().st_blocks * 512
    os.truncate(hands.path / "data.mdb", size * 3 // 4)
    (finding,) = check_catalog(hands.path).findings
    assert (finding.number, "has" in finding.says, "needs" in finding.says) == ("C3", True, True)
    report = check_catalog(hands.path, repair=True)
    assert report.findings == ()
    assert report.repaired == (finding,)
    assert (hands.path / "data.mdb.damaged").exists()


def test_records_in_sound_pages_of_a_damaged_file_are_kept(hands: Hands) -> None:
    overwrite_a_leaf(hands)
    report = check_catalog(hands.path, repair=True)
    assert report.findings == ()
    assert {table: count for table, count in report.records.items() if table != "numbers"} == {
        table: 1 for table in SCHEMA if table != "numbers"
    }
    with Catalog(hands.path) as catalog:
        assert catalog.plan(PLAN) == RECORDS["plans"][1]


@pytest.mark.parametrize("content", [b"", b"no catalog" * 1000])
def test_a_file_that_is_no_catalog_is_moved_away(hands: Hands, content: bytes) -> None:
    (hands.path / "data.mdb").write_bytes(content)
    (finding,) = check_catalog(hands.path).findings or (None,)
    if content:
        assert finding is not None
        assert finding.number == "C3"
    assert check_catalog(hands.path, repair=True).findings == ()
    with Catalog(hands.path) as catalog:
        assert set(catalog.counts().values()) == {0}


def test_pages_that_kill_the_check_are_a_finding_like_others(hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run

    def killed(command: list[str], **options: Any) -> "subprocess.CompletedProcess[bytes]":
        if "--salvage" in command or killed.done:  # type: ignore[attr-defined]
            return real(command, **options)
        killed.done = True  # type: ignore[attr-defined]
        code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
        return real([sys.executable, "-c", code], capture_output=True, check=False)

    killed.done = False  # type: ignore[attr-defined]
    monkeypatch.setattr(subprocess, "run", killed)
    report = check_catalog(hands.path, repair=True)
    assert report.findings == ()
    assert [finding.says for finding in report.repaired] == [
        "its pages are damaged: reading them ended LMDB by SIGSEGV"
    ]
    assert sum(report.records.values()) == len(SCHEMA)


def test_a_damaged_file_is_not_replaced_under_a_process_that_has_it_open(hands: Hands) -> None:
    overwrite_a_leaf(hands)
    with Catalog(hands.path), pytest.raises(CatalogError, match="has it open, so it cannot be replaced; end that"):
        check_catalog(hands.path, repair=True)
    assert not (hands.path / "salvage").exists()
