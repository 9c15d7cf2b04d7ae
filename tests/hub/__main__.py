"""A Hub to try things on by hand: `python -m tests.hub FOLDER [--xet]` prints the environment that clients need, and serves."""

from __future__ import annotations

import shlex
import sys
import threading
from pathlib import Path

from tests.hub.server import Hub


def main(arguments: list[str]) -> None:
    folders = [argument for argument in arguments if not argument.startswith("-")]
    if len(folders) != 1 or set(arguments) - {*folders, "--xet"}:
        sys.exit("usage: python -m tests.hub FOLDER [--xet]")
    with Hub(Path(folders[0]), xet="--xet" in arguments) as hub:
        for name, value in hub.env().items():
            if name.startswith("HF_") or name == "NO_PROXY":
                print(f"export {name}={shlex.quote(value)}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main(sys.argv[1:])
