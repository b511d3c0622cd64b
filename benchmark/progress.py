"""Progress of a run: one bar in all and one line a worker on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

#: Seconds between plain lines.
PLAIN_EVERY = 10.0


class Progress:
    """Shows how many samples are done of how many, the rate and the time left. Close it, or use it in a `with`."""

    def __init__(self, title: str, workers: int, stream: TextIO | None = None) -> None:
        self.title = title
        self.stream = stream if stream is not None else sys.stderr
        self._started = time.monotonic()
        self._last = 0.0
        self._done = self._total = 0
        self._line = ""
        self._bar: Any = None
        self._lines: list[Any] = []
        if self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=title, total=0, unit="sample", file=self.stream, position=0, dynamic_ncols=True, leave=True)
            self._lines = [
                tqdm(bar_format="{desc}", file=self.stream, position=i + 1, dynamic_ncols=True, leave=False)
                for i in range(workers)
            ]

    def update(self, done: int, total: int, workers: list[str]) -> None:
        """done of total samples in this run; workers: what each is doing."""
        fresh = done != self._done
        self._done, self._total = done, max(total, done)
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.n = done
            self._bar.refresh()
            for bar, text in zip(self._lines, workers, strict=False):
                bar.set_description_str(f"  {text}")
            return
        now = time.monotonic()
        last_one = fresh and done >= self._total
        if now - self._last >= PLAIN_EVERY or last_one:
            line = self._plain(now, workers)
            if line != self._line:
                print(line, file=self.stream, flush=True)
                self._line = line
            self._last = now

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        for bar in [*self._lines, *([self._bar] if self._bar is not None else [])]:
            bar.close()
        self._bar, self._lines = None, []

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plain(self, now: float, workers: list[str]) -> str:
        spent = now - self._started
        text = f"{self.title}: {self._done}/{self._total} samples"
        if self._done and spent > 0:
            left = spent / self._done * (self._total - self._done)
            text += f", {self._done / spent * 60:.1f} a minute, {duration(left)} left"
        busy = [line for line in workers if line]
        return text + (f" [{'; '.join(busy)}]" if busy else "")


def duration(seconds: float) -> str:
    """85 -> "1m25s"."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
