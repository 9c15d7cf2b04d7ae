"""The ways to publish: what is called, with which options, and which revision of which repository must then hold the state."""

from __future__ import annotations

from typing import Literal, NamedTuple

Name = Literal["main", "branch", "pr", "direct", "scores"]


class Way(NamedTuple):
    """One way to publish."""

    name: Name
    command: str = "publish"
    options: tuple[str, ...] = ()
    kind: str = "models"
    revision: str = "main"
    """What comes to hold the state; main is never touched where it is another."""

    @property
    def lands_on_main(self) -> bool:
        return self.revision == "main"

    @property
    def prefix(self) -> str:
        """What a repository's address begins with."""
        return "" if self.kind == "models" else f"{self.kind}/"


MAIN = Way("main")
WAYS: dict[Name, Way] = {
    way.name: way
    for way in (
        MAIN,
        Way("branch", options=("--branch", "trial"), revision="trial"),
        Way("pr", options=("--pr",), revision="refs/pr/1"),
        Way("direct", options=("--direct",)),
        Way("scores", command="publish-scores", kind="datasets"),
    )
}
