"""The comparison as a whole: rows in their order, and the page that is written of what is known after each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.machine import about
from bench.page import write_page
from bench.results import Results
from bench.rounds import Patience, run_row
from bench.rows.catalogue import all_rows, chosen
from bench.setting import Setting


@dataclass(frozen=True, slots=True)
class Order:
    """What of the comparison is asked for: how often, how long, which rows, and whether only to list them."""

    repeat: int
    patience: float
    rows: str
    only_list: bool


def run_comparison(setting: Setting, order: Order, document: Path, say: Callable[[str], None]) -> bool:
    """Measure what is missing and write the page; return whether all outputs are what they must be."""
    results = Results(setting.work / "measurements.jsonl", about(setting.work))
    rows = chosen(all_rows(setting), order.rows)
    if order.only_list:
        for row in rows:
            say(f"{row.name}: {f'measured in {results.rounds(row.name)} rounds' if results.rounds(row.name) else '-'}")
        return True
    sound = True
    for row in rows:
        sound &= run_row(row, results, Patience(order.repeat, order.patience), say)
        write_page(document, setting, results)
    return sound
