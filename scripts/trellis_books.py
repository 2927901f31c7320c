#!/usr/bin/env python3
"""Derives the books of the trellis code and prints them as the text of mergefs/kernels/trellis_books.py.

Each book is trained as the centres of k-means are: the best bits are found for a long sample, and the value of each
state becomes the mean of what it stands for; so on until little changes. What the first book leaves trains the second.
The sample is Gaussian with a scale that varies a little, as that of deltas within a group does; the first state, which
can follow itself, keeps the value zero, so that every plane can leave the sum as it is.
usage: scripts/trellis_books.py > NEW_FILE
"""

import base64
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from mergefs.kernels.fused.trellis_search import Search
from mergefs.kernels.trellis import PLANES, STATES, STEP, states

SAMPLES = 1 << 20
ROUNDS = 24
VARIATION = 0.15
"""Standard deviation of the logarithm of the scale."""
MULTIPLIER = 109
"""Spreads neighbouring values over the states; of all odd numbers it left the least after the first book."""


def sample() -> NDArray[np.float32]:
    """Return the numbers that the books are trained on, of variance one."""
    generator = np.random.default_rng(2026)
    numbers = generator.standard_normal(SAMPLES) * np.exp(VARIATION * generator.standard_normal(SAMPLES))
    return (numbers / numbers.std()).astype(np.float32)


def trained(targets: NDArray[np.float32], sums: NDArray[np.int32], book: NDArray[np.int16]) -> NDArray[np.int16]:
    """Return the book that suits what ``sums``, in steps, leave of ``targets``."""
    ends, scales = np.array([targets.size]), np.ones(1, dtype=np.float32)
    missing = targets.astype(np.float64) / STEP - sums
    search = Search()
    for _ in range(ROUNDS):
        after = sums.copy()
        stream = search.plane(targets, after, ends, scales, book)
        found = states(stream, targets.size)
        counts = np.bincount(found, minlength=STATES)
        means = np.bincount(found, weights=missing, minlength=STATES) / np.maximum(counts, 1)
        book = np.where(counts > 0, np.round(means), book).astype(np.int16)
        book[0] = 0
    return book


def main() -> None:
    """Train the books and print them."""
    targets = sample()
    sums: NDArray[np.int32] = np.zeros(SAMPLES, dtype=np.int32)
    order = (np.arange(STATES) * MULTIPLIER + 11) % STATES
    start = np.array([NormalDist().inv_cdf((rank + 0.5) / STATES) for rank in order])
    books, left = [], []
    for _ in range(PLANES):
        spread = float((targets.astype(np.float64) - sums * STEP).std())
        book = trained(targets, sums, np.round(0.87 * spread * start / STEP).astype(np.int16))
        Search().plane(targets, sums, np.array([SAMPLES]), np.ones(1, dtype=np.float32), book)
        books.append(book)
        left.append(float((targets.astype(np.float64) - sums * STEP).std()))
    print(f"TYPICAL_ERRORS: Final = ({', '.join(f'{error:.4f}' for error in (1.0, *left))})")
    for book in books:
        text = base64.b85encode(book.astype("<i2").tobytes()).decode()
        for begin in range(0, len(text), 106):
            print(f'    "{text[begin : begin + 106]}"')


if __name__ == "__main__":
    main()
