"""Repositories in memory: commits with parents, branches, tags, pull requests. Large objects lie in the stores."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from tests.hub.answers import Refusal
from tests.hub.git import git_object, lfs_pointer, tree_object

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def stamp(seconds: float) -> str:
    """A time as the Hub writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


@dataclass(frozen=True)
class File:
    """A file of a commit: its bytes, or the SHA-256 of a large object."""

    size: int
    oid: str
    """SHA-1 of the git blob: of the content, or of the LFS pointer."""
    sha256: str
    """SHA-256 of the content."""
    data: bytes | None = None
    """The content of a regular file, None for a large one."""
    xet: str | None = None
    """The xet hash of a large file that was stored through xet."""

    @classmethod
    def regular(cls, data: bytes) -> File:
        return cls(len(data), git_object("blob", data), hashlib.sha256(data).hexdigest(), data)

    @classmethod
    def large(cls, sha256: str, size: int, xet: str | None) -> File:
        return cls(size, git_object("blob", lfs_pointer(sha256, size)), sha256, None, xet)

    @property
    def is_large(self) -> bool:
        return self.data is None


Tree = dict[str, File]


@dataclass(frozen=True)
class Commit:
    """A commit, named by the SHA-1 that git would give it."""

    sha: str
    parent: str | None
    tree: Tree
    title: str
    message: str
    author: str
    date: str


@dataclass
class PullRequest:
    """A pull request; its commits are under `refs/pr/N`."""

    number: int
    title: str
    author: str
    base: str
    date: str
    status: str
    """draft, open, closed or merged."""
    merge_commit: str | None = None
    comments: list[str] = field(default_factory=list)


class Repository:
    """One repository: every change is a new commit whose parent is the head that it was made on."""

    def __init__(self, kind: str, name: str, author: str, private: bool = False) -> None:
        self.kind, self.name, self.private = kind, name, private
        self.gated: bool | str = False
        self.created = stamp(time.time())
        self.commits: dict[str, Commit] = {}
        self.heads: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pull_requests: dict[int, PullRequest] = {}
        self.commit("main", {".gitattributes": File.regular(GITATTRIBUTES)}, "initial commit", author=author)

    @property
    def namespace(self) -> str:
        return self.name.split("/")[0]

    @property
    def url_path(self) -> str:
        return self.name if self.kind == "models" else f"{self.kind}/{self.name}"

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a pull request's ref, a tag or a commit's name.

        Raises:
            Refusal: 404, RevisionNotFound.
        """
        sha = self.heads.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def commit(
        self, branch: str | None, tree: Tree, title: str, message: str = "", *, author: str, parent: str | None = None
    ) -> Commit:
        """Adds a commit on top of `branch` (or of `parent`, without moving a branch)."""
        parent = self.heads.get(branch) if branch else parent
        now = time.time()
        lines = [f"tree {tree_object({path: file.oid for path, file in tree.items()})}"]
        lines += [f"parent {parent}"] if parent else []
        who = f"{author} <{author}@users.noreply.huggingface.co> {int(now)} +0000"
        # git would give two equal commits of one second the same name; a counter in the text keeps them apart
        lines += [f"author {who}", f"committer {who}", f"x-count {len(self.commits)}", "", title, "", message]
        commit = Commit(git_object("commit", "\n".join(lines).encode()), parent, tree, title, message, author, stamp(now))
        self.commits[commit.sha] = commit
        if branch:
            self.heads[branch] = commit.sha
        return commit

    def history(self, revision: str) -> Iterator[Commit]:
        """Commits from a revision back to the first."""
        commit: Commit | None = self.resolve(revision)
        while commit:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None

    def open_pull_request(self, title: str, base: Commit, author: str, status: str) -> PullRequest:
        """A new pull request whose ref stands at `base`."""
        request = PullRequest(len(self.pull_requests) + 1, title, author, base.sha, stamp(time.time()), status)
        self.pull_requests[request.number] = request
        self.heads[f"refs/pr/{request.number}"] = base.sha
        return request

    def merge(self, number: int, author: str) -> Commit:
        """Brings a pull request's changes onto main, as the Hub's button does: no word on main's parent."""
        request, main = self.pull_requests[number], self.resolve("main")
        base, head = self.commits[request.base].tree, self.resolve(f"refs/pr/{number}").tree
        tree = {path: file for path, file in main.tree.items() if path in head or path not in base}
        tree |= {path: file for path, file in head.items() if base.get(path) != file}
        commit = self.commit("main", tree, f"{request.title} (#{number})", author=author)
        request.status, request.merge_commit = "merged", commit.sha
        return commit

    def copy(self) -> Repository:
        """The same repository, to be changed apart (commits themselves never change)."""
        other = copy.copy(self)
        other.commits, other.heads, other.tags = dict(self.commits), dict(self.heads), dict(self.tags)
        other.pull_requests = {
            number: replace(pull, comments=list(pull.comments)) for number, pull in self.pull_requests.items()
        }
        return other

    def known_objects(self) -> dict[str, File]:
        """Large files of any commit, by SHA-256: what a commit may copy without a new upload."""
        return {file.sha256: file for commit in self.commits.values() for file in commit.tree.values() if file.is_large}
