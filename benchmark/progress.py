"""Progress of a run: on a terminal one bar and a line per worker below it, elsewhere a plain line from time to time."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from tqdm import tqdm

#: Seconds between plain lines.
PLAIN_EVERY = 10.0
_PLAIN = "{desc}: {n_fmt}/{total_fmt} {unit}s"
_PLAIN_RATE = ", {rate_fmt}, {remaining} left"


def printable(text: str) -> str:
    """The text without control characters, which could change what a terminal shows. Line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)


class Progress:
    """How much of a run is done, its rate and the time left. Close it, or use it in a `with`.

    lines: how many lines of text below the bar. unit: what is counted, in the singular.
    """

    def __init__(self, title: str, lines: int, unit: str = "sample", stream: TextIO | None = None) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self._tty = self.stream.isatty()
        self._due = 0.0
        self._shown = ""
        file = self.stream if self._tty else io.StringIO()  # without a terminal tqdm only formats
        self._bar = tqdm(desc=title, total=0, unit=unit, file=file, dynamic_ncols=self._tty)
        self._lines = [
            tqdm(bar_format="{desc}", file=file, position=i + 1, dynamic_ncols=True, leave=False)
            for i in range(lines if self._tty else 0)
        ]

    def update(self, done: int, total: int, texts: Sequence[str] = (), *, known: int = 0) -> None:
        """done of total units, `known` of which took no time in this run. texts: what each worker is doing."""
        ended = done != self._bar.n and done >= total
        self._bar.n, self._bar.total, self._bar.initial = done, max(total, done), known
        if self._tty:
            self._bar.refresh()
            for i, line in enumerate(self._lines):
                line.set_description_str(printable(f"  {texts[i]}") if i < len(texts) else "")
        elif ended or time.monotonic() >= self._due:
            self._due = time.monotonic() + PLAIN_EVERY
            self._bar.bar_format = _PLAIN + _PLAIN_RATE * (done > known)
            text = f"{self._bar} [{'; '.join(texts)}]" if texts else str(self._bar)
            if text != self._shown:
                self._shown = text
                self.say(text)

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        if self._tty:
            self._bar.write(printable(text), file=self.stream)
        else:
            print(printable(text), file=self.stream, flush=True)

    def close(self) -> None:
        for bar in (*self._lines, self._bar):
            bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
