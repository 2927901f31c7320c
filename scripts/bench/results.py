"""What has been measured, a line of JSON each in a file that an interrupted benchmark goes on with."""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.processes import Taken


@dataclass(frozen=True, slots=True)
class Checked:
    """Whether what the ways of a row wrote is the same, as far as it must be, and what was found, as a sentence."""

    same: bool
    found: str


@dataclass(slots=True)
class Results:
    """Measurements by row and way, in the order of rounds, and the checks of rows.

    Only lines ``about`` the same thing (this version of mergefs on this machine) are read; others stay in the file.
    """

    path: Path
    about: str
    _taken: dict[tuple[str, str], list[Taken]] = field(default_factory=dict)
    _checked: dict[str, Checked] = field(default_factory=dict)
    _rounds: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line) if line.endswith("}") else {}  # the last one may have been cut off
            if entry.get("about") == self.about:
                self._remember(entry)

    def _remember(self, entry: dict[str, Any]) -> None:
        if "way" in entry:
            self._taken.setdefault((entry["row"], entry["way"]), []).append(Taken(**entry["taken"]))
        elif "rounds" in entry:
            self._rounds[entry["row"]] = entry["rounds"]
        else:
            self._checked[entry["row"]] = Checked(**entry["checked"])

    def keep(self, row: str, way: str, taken: Taken) -> None:
        """Keep a measurement, at once."""
        values = asdict(taken)
        del values["output"]
        self._append({"about": self.about, "row": row, "way": way, "taken": values})

    def keep_check(self, row: str, checked: Checked) -> None:
        """Keep what a comparison of outputs found, at once."""
        self._append({"about": self.about, "row": row, "checked": asdict(checked)})

    def keep_done(self, row: str, rounds: int) -> None:
        """Keep that all of a row has been measured, in so many rounds."""
        self._append({"about": self.about, "row": row, "rounds": rounds})

    def _append(self, entry: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut_off else "") + json.dumps(entry) + "\n")
        self._remember(entry)

    def taken(self, row: str, way: str) -> list[Taken]:
        """Return what the rounds of a way took until now."""
        return list(self._taken.get((row, way), []))

    def checked(self, row: str) -> Checked | None:
        """Return what the comparison of a row's outputs found, None before it was made."""
        return self._checked.get(row)

    def rounds(self, row: str) -> int:
        """Return in how many rounds all of a row has been measured, 0 while some of it is missing."""
        return self._rounds.get(row, 0)

    def median(self, row: str, way: str, what: Callable[[Taken], float] = lambda taken: taken.seconds) -> float | None:
        """Return the median over the rounds, None where nothing was measured."""
        found = self._taken.get((row, way))
        return statistics.median(map(what, found)) if found else None

    def peak(self, row: str, way: str) -> int:
        """Return the most memory that any round took, 0 where nothing was measured."""
        return max((taken.peak_bytes for taken in self.taken(row, way)), default=0)

    def peaks(self, wanted: Callable[[str], bool]) -> dict[tuple[str, str], int]:
        """Return the most memory of each row and way whose way is wanted, where it was measured."""
        found = {key: max(taken.peak_bytes for taken in all_taken) for key, all_taken in self._taken.items()}
        return {key: peak for key, peak in found.items() if peak and wanted(key[1])}
