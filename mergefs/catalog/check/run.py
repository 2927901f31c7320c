"""The check itself, in a process of its own: LMDB may be killed by the pages of a damaged file."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import lmdb

from mergefs.catalog.check.evidence import REMEDIES, Evidence, Finding, Repair, Report, Subject
from mergefs.catalog.check.files import FILE_INVARIANTS
from mergefs.catalog.check.records import INVARIANTS
from mergefs.catalog.check.values import VALUE_INVARIANTS
from mergefs.catalog.envelope import decode, unseal
from mergefs.catalog.environment import Environment
from mergefs.catalog.naming import name_of_key
from mergefs.catalog.schema import SCHEMA, TABLES


def check(path: Path, repair: bool = False, forget: bool = False) -> Report:
    """Return everything that is not as it must be in the catalog at ``path``.

    With ``repair`` what can be had again is removed where it is damaged, until nothing more can be done; with
    ``forget`` also what cannot. Raises CatalogError when the catalog cannot be opened.
    """
    environment = Environment(path, TABLES)
    try:
        repaired: list[Finding] = []
        while True:
            report = _examine(environment)
            done = _repair(environment, report.findings, forget) if repair else []
            repaired += done
            if not done:
                return Report(report.path, report.records, report.findings, tuple(repaired))
    finally:
        environment.close()


def _examine(environment: Environment) -> Report:
    """Look at one state of the catalog."""
    with environment.view() as view:
        evidence = Evidence(environment.path, view)
        findings = [finding for invariant in FILE_INVARIANTS for finding in invariant.find(evidence)]
        records = dict.fromkeys(SCHEMA, 0)
        if not any(finding.number == "C1" for finding in findings):
            for table in SCHEMA:
                records[table], found = _examine_table(evidence, table)
                findings += found
    return Report(str(environment.path), records, tuple(findings))


def _examine_table(evidence: Evidence, table: str) -> tuple[int, list[Finding]]:
    """Return how many records of a table were looked at, and what is wrong with them."""
    count, findings = 0, []
    try:
        for key, value in evidence.view.items(table):
            count += 1
            findings += [
                _finding(number, table, key, value, says) for number, says in _wrong(evidence, table, key, value)
            ]
    except lmdb.Error:
        pass  # that the table cannot be read is a finding of its own
    return count, findings


def _wrong(evidence: Evidence, table: str, key: bytes, value: bytes) -> Iterator[tuple[str, str]]:
    """Yield the first invariant that a record breaks, and how: what follows from it is not worth telling."""
    for general in VALUE_INVARIANTS:
        if (says := general.broken(table, key, value)) is not None:
            yield general.number, says
            return
    envelope = decode(unseal(table, key, value), SCHEMA[table].record)
    subject = Subject(key, envelope.record, envelope.day, envelope.about, evidence)
    for invariant in INVARIANTS:
        if invariant.table == table and (says := invariant.broken(subject)) is not None:
            yield invariant.number, says
            return


def _finding(number: str, table: str, key: bytes, value: bytes, says: str) -> Finding:
    again = SCHEMA[table].again
    repair = Repair.FORGET if again is None else Repair.REMOVE
    return Finding(
        number, table, key.hex(), name_of_key(key), says, REMEDIES[repair].format(again=again), repair, value
    )


def _repair(environment: Environment, findings: tuple[Finding, ...], forget: bool) -> list[Finding]:
    """Do what can be done about ``findings`` and return those that it was done about."""
    kinds = {Repair.REMOVE, Repair.FORGET} if forget else {Repair.REMOVE}
    records = [finding for finding in findings if finding.repair in kinds]
    expected = [(finding.table, bytes.fromhex(finding.key), finding.value) for finding in records]
    if not environment.remove(expected):
        records = []  # others have removed them, or the pages are damaged
    files = [finding for finding in findings if finding.repair is Repair.DELETE]
    for finding in files:
        _delete(Path(finding.name))
    return records + files


def _delete(path: Path) -> None:
    """Delete a file or a directory."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
