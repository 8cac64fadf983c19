"""How far a pass of the parallel draw should look ahead, by what passes cost on this device and how far they get.

A pass redraws a window of w columns in each row, and what lies before a row's first change is final. If a column is
such a change with probability h, a pass settles (1 - (1 - h)^w) / h columns of a row: hardly more with a window far
beyond 1 / h. What it costs depends on the device: a CPU pays for every token, a GPU nearly the same for few as for some
hundred. So h and the seconds of a pass are measured as the passes go, and the window with the most columns a second is
taken. The tokens that are drawn are the same with any window; the number of passes is not.

Needs nothing beyond Python.
"""

from __future__ import annotations

import weakref

LARGEST = 13  # windows have fewer than 2^13 columns


class Windows:
    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}  # of a pass, by the power of two that its number of tokens reaches
        self.settled, self.changes = 20.0, 1.0  # columns that became final, and those of them that were changes

    def saw(self, tokens: int, seconds: float, settled: int, changes: int) -> None:
        """After a pass over so many tokens (padding included)."""
        size = tokens.bit_length()
        # the least is what it takes when nothing gets in its way; 5 % are forgotten each time, since that may change
        self.seconds[size] = min(seconds, 1.05 * self.seconds.get(size, seconds))
        self.settled, self.changes = 0.98 * self.settled + settled, 0.98 * self.changes + changes

    def cost(self, tokens: int) -> float:
        """Seconds of a pass over so many tokens. What was not tried yet is hoped for: that fewer tokens cost less in
        proportion, and more of them no more."""
        size, least = tokens.bit_length(), min(self.seconds)
        if size < least:
            return self.seconds[least] / 2 ** (least - size)
        return self.seconds[max(k for k in self.seconds if k <= size)]

    def choose(self, rows: int) -> int:
        """The window for so many rows that settles most in a second: of what was tried, half and twice as much."""
        h = min(max(self.changes / max(self.settled, 1.0), 1e-4), 0.5)
        low, high = min(self.seconds) - 1, max(self.seconds) + 1
        windows = [2**k for k in range(LARGEST) if low <= (rows * 2**k).bit_length() <= high] or [1]
        return max(windows, key=lambda w: (1 - (1 - h) ** w) / h / self.cost(rows * w))


_of: weakref.WeakKeyDictionary[object, Windows] = weakref.WeakKeyDictionary()


def windows_of(model: object) -> Windows:
    """What was measured of a model, over all its batches."""
    return _of.setdefault(model, Windows())
