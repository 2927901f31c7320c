"""The scales of the heat maps: which of a few steps a share falls into, and the colours of the steps."""

from dataclasses import dataclass
from typing import Final

STEPS: Final = 11
"""Steps of a scale: 0 and 1 have their own, and between them are nine."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A run of colours from ``low`` to ``high``, each (red, green, blue) of 0 to 255."""

    low: tuple[int, int, int]
    high: tuple[int, int, int]

    def colour(self, step: int) -> str:
        """Return the colour of a step as ``#rrggbb``."""
        return "#" + "".join(f"{round(value):02x}" for value in self._mixed(step))

    def ink(self, step: int) -> str:
        """Return black or white, whichever is read better on the colour of a step."""
        red, green, blue = (_linear(value / 255) for value in self._mixed(step))
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        # The ratio of contrast of WCAG, against black and against white.
        return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"

    def _mixed(self, step: int) -> tuple[float, ...]:
        part = step / (STEPS - 1)
        return tuple(low + (high - low) * part for low, high in zip(self.low, self.high, strict=True))


# One hue each, told apart by their lightness alone, so that they can be read without seeing colours.
BOUGHT_LIGHT: Final = Scale((236, 242, 250), (18, 78, 148))
BOUGHT_DARK: Final = Scale((30, 38, 50), (120, 184, 255))
ERROR_LIGHT: Final = Scale((252, 243, 232), (156, 52, 10))
ERROR_DARK: Final = Scale((44, 35, 30), (255, 158, 94))


def step(share: float) -> int:
    """Return the step of a share of 0 to 1: 0 and 1 alone have the first and the last one."""
    if share <= 0:
        return 0
    if share >= 1:
        return STEPS - 1
    return min(STEPS - 2, 1 + int(share * (STEPS - 2)))


def _linear(value: float) -> float:
    """Return the light of an sRGB value of 0 to 1."""
    return value / 12.92 if value <= 0.04045 else float(((value + 0.055) / 1.055) ** 2.4)
