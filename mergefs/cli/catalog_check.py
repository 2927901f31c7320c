"""``mergefs catalog check``."""

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import click

from mergefs.cli.settings import Settings

if TYPE_CHECKING:
    from mergefs.catalog.check.evidence import Finding, Report

_SHOWN: Final = 10
"""Findings of one kind that are told one by one."""


@click.command(name="check")
@click.option(
    "--repair", is_flag=True, help="Remove damaged records whose content can be had again, and rebuild a damaged file."
)
@click.option("--forget", is_flag=True, help="With --repair, also remove damaged records of which nothing else knows.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.pass_context
def command(ctx: click.Context, repair: bool, forget: bool, as_json: bool) -> None:
    """Check that everything in the catalog is as it must be, and say what to do where it is not.

    Exits with 1 when something is wrong. The invariants are numbered; docs/catalog.md lists them.
    """
    from mergefs.catalog import default_location
    from mergefs.catalog.check.supervision import check_catalog
    from mergefs.cli.output import print_json

    if forget and not repair:
        raise click.UsageError("--forget says what --repair may remove; give both")
    settings: Settings = ctx.obj
    report = check_catalog(settings.catalog or default_location(), repair, forget)
    if as_json:
        print_json(_as_json(report))
    else:
        _print(report)
    if report.findings:
        ctx.exit(1)


def _as_json(report: "Report") -> dict[str, Any]:
    """Return a report for programs."""
    return {
        "path": report.path,
        "records": report.records,
        "findings": [_finding_as_json(finding) for finding in report.findings],
        "repaired": [_finding_as_json(finding) for finding in report.repaired],
    }


def _finding_as_json(finding: "Finding") -> dict[str, Any]:
    return {
        "invariant": finding.number,
        "table": finding.table,
        "key": finding.key,
        "name": finding.name,
        "says": finding.says,
        "remedy": finding.remedy,
        "repair": finding.repair.value,
    }


def _print(report: "Report") -> None:
    """Print a report for people: each finding in one sentence, of many of a kind the first few."""
    _print_findings("repaired: ", report.repaired)
    _print_findings("", report.findings)
    if report.findings:
        click.echo(f"{report.path}: {len(report.findings)} findings in {sum(report.records.values())} records")
    else:
        click.echo(f"{report.path}: {sum(report.records.values())} records, all as they must be")


def _print_findings(prefix: str, findings: "tuple[Finding, ...]") -> None:
    shown: Counter[tuple[str, str]] = Counter()
    for finding in findings:
        kind = (finding.number, finding.table)
        shown[kind] += 1
        if shown[kind] <= _SHOWN:
            where = f"{finding.table} {finding.name}" if finding.table else finding.name
            remedy = "" if prefix else f"; {finding.remedy}"
            click.echo(f"{prefix}{finding.number} {where}: {finding.says}{remedy}")
    for (number, table), count in shown.items():
        if count > _SHOWN:
            click.echo(f"{prefix}{number} {table}: and {count - _SHOWN} more of this kind")
