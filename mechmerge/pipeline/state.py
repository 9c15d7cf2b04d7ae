"""What makes a run resumable: each stage is keyed by the digest of its inputs, and its outputs by theirs.

A stage whose inputs have not changed and whose outputs are as it left them is skipped. Times go to `timings.jsonl`, outside
every digest.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mechmerge.artifacts import digest, sha256_file, write_json
from mechmerge.progress import Progress


class RunState:
    """The stages of one run directory."""

    def __init__(self, run: Path, progress: Progress) -> None:
        self.run, self.progress = run, progress
        self.worked: list[str] = []
        """Stages that did work in this call."""

    def stage(self, name: str, inputs: Any, outputs: list[Path], work: Callable[[], None]) -> None:
        """Runs `work` unless the stage is done: same inputs, and every output (file or folder) as it was left."""
        stamp = self.run / ".state" / f"{name}.json"
        key = digest(inputs)
        if self._done(stamp, key, outputs):
            self.progress.note(f"✓ {name} (unchanged)")
            return
        self.progress.note(f"▶ {name}")
        stamp.unlink(missing_ok=True)
        with self._timed(name):
            work()
        self.worked.append(name)
        write_json(stamp, {"inputs": key, "outputs": self._marks(outputs)})

    def _done(self, stamp: Path, key: str, outputs: list[Path]) -> bool:
        try:
            record = json.loads(stamp.read_text("utf-8"))
        except (OSError, ValueError):
            return False
        return bool(record.get("inputs") == key and record.get("outputs") == self._marks(outputs))

    def _marks(self, outputs: list[Path]) -> dict[str, str] | None:
        """Digest of every output file; None where one is missing. Weights are marked by size and time, which is quick."""
        marks = {}
        for output in outputs:
            files = sorted(p for p in output.rglob("*") if p.is_file()) if output.is_dir() else [output]
            if not files or not all(file.is_file() for file in files):
                return None
            for file in files:
                size = file.stat().st_size
                name = str(file.relative_to(self.run))
                marks[name] = f"{size} {file.stat().st_mtime_ns}" if size > 64_000_000 else sha256_file(file)
        return marks

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.time()
        yield
        entry = {
            "stage": name,
            "seconds": round(time.time() - start, 1),
            "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        with (self.run / "timings.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(entry) + "\n")
