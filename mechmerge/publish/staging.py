"""A new state of a repository, all of it or nothing: staged, verified, promoted by one commit, tagged.

    1. plan      what is ready, beside the files of the branch at its present commit (the parent)
    2. stage     upload to a branch or pull request of its own, named by the digest of the new state, in several commits; a file
                 that stands there already is not sent again, so an interrupted upload goes on
    3. verify    checksums and sizes of the staged commit against the files on disk
    4. promote   one commit that copies the staged files and removes what is no more, if the branch still stands at the parent
    5. tag, and remove the staging branch

Until 4 nobody who reads the branch sees anything of it, and 4 is atomic on the Hub's side. Done again it finds what is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mechmerge.artifacts import Document
from mechmerge.errors import InputError, MechmergeError, MissingError
from mechmerge.models.hub_errors import AGAIN
from mechmerge.progress import SILENT, Progress
from mechmerge.publish.plan import LocalFile, Mode, Outbox, Plan, make_plan
from mechmerge.publish.repository import Repository, State

MAIN = "main"
STAGING = "mechmerge-staging-"
"""A staging branch is called this and the first digits of the new state's digest."""
GROUP_BYTES = 2_000_000_000
GROUP_FILES = 100
"""What one staging commit holds at most: little is lost when an upload breaks off, and the Hub limits commits an hour."""


class Published(Document):
    """What a publication did."""

    repo: str
    url: str
    plan: Plan
    mode: Mode
    revision: str
    """The branch that holds the state now, or the pull request's `refs/pr/N`."""
    commit: str | None
    """The commit that holds it; None after a dry run."""
    changed: bool
    """Whether this call committed anything."""
    uploaded: tuple[str, ...] = ()
    """Files that this call sent; those of an earlier, interrupted one are not sent again."""
    pull_request: int | None = None
    tag: str | None = None
    dry_run: bool = False


def send(
    outbox: Outbox,
    repository: Repository,
    *,
    mode: Mode = "main",
    branch: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    tag: str | None = None,
    progress: Progress = SILENT,
) -> Published:
    """Brings a repository to the state of an outbox.

    Args:
        outbox: everything that is to stand there.
        repository: where.
        mode: `main` and `branch` stage and promote; `pr` stops at the verified pull request; `direct` is one commit without
            staging.
        branch: the branch of mode `branch`, made from main if it is not there.
        private: make the repository a private one.
        dry_run: plan only.
        tag: name of the new commit.
        progress: told about steps.

    Raises:
        InputError, MissingError: what the Hub refuses, in one line; the branch is then as it was.
    """
    target = branch if mode == "branch" and branch is not None else MAIN
    if not dry_run:
        repository.require_token()
    state = repository.state()
    if state is None:
        repository.refuse_other_kind()
        if not dry_run:
            progress.note(f"making the {'private ' if private else ''}{outbox.kind} repository {repository.name}")
            repository.create(private)
            state = repository.state()
    elif private and not state.private:
        raise InputError(
            repository.name,
            expected="a private repository",
            found="a public one",
            fix="make it private, or leave --private out",
        )
    parent = None if state is None else state.branches.get(target) or state.branches.get(MAIN)
    held = repository.files(parent) if parent is not None else {}
    plan = make_plan(outbox, repository.name, "pull request" if mode == "pr" else target, parent, held)
    _check_tag(tag, state, plan)
    result = Published(
        repo=repository.name,
        url=repository.url,
        plan=plan,
        mode=mode,
        revision=target,
        commit=None,
        changed=False,
        dry_run=dry_run,
    )
    if dry_run:
        return result
    if state is None or parent is None:
        raise MissingError(repository.name, expected="a repository with a main branch", found="none that we may see", fix=AGAIN)
    return _Sending(outbox, repository, state, plan, parent, target, progress).carry_out(result, tag)


def _check_tag(tag: str | None, state: State | None, plan: Plan) -> None:
    there = state.tags.get(tag) if state is not None and tag is not None else None
    if there is not None and (plan.changes or there != plan.parent):
        raise InputError(f"tag {tag}", expected="a tag that is free", found=f"commit {there[:12]}", fix="name another --tag")


class _Sending:
    """One publication, after it was planned."""

    def __init__(
        self, outbox: Outbox, repository: Repository, state: State, plan: Plan, parent: str, target: str, progress: Progress
    ) -> None:
        self.outbox, self.repository, self.state, self.plan = outbox, repository, state, plan
        self.parent, self.target, self.progress = parent, target, progress
        self.uploaded: list[str] = []
        self.message = f"Publish {outbox.title} with mechmerge"
        self.staging = f"{STAGING}{plan.digest[:16]}"

    def carry_out(self, result: Published, tag: str | None) -> Published:
        if not self.plan.changes:
            self.progress.note(f"{self.repository.name} holds all of it already: nothing to do")
            commit = self.parent
            if self.target not in self.state.branches:
                self.repository.create_branch(self.target, self.parent)
        elif result.mode == "pr":
            return self._propose(result)
        else:
            commit = self._direct() if result.mode == "direct" else self._promote(self._stage_on_branch())
        if tag is not None:
            self.repository.tag(tag, commit)
        if self.staging in self.state.branches or (self.plan.changes and result.mode != "direct"):
            self._clean_up()
        sent = tuple(sorted(self.uploaded))
        return result.model_copy(update={"commit": commit, "changed": self.plan.changes, "tag": tag, "uploaded": sent})

    # ------------------------------------------------------------------------------------------------------------- staging
    def _stage_on_branch(self) -> str:
        if self.staging not in self.state.branches:
            self.repository.create_branch(self.staging, self.parent)
        return self._stage(self.staging)

    def _stage(self, revision: str) -> str:
        """Uploads what a revision lacks, verifies it, and returns its commit."""
        held = self.repository.files(revision)
        lacking = [file for file in self.outbox.files if not file.equals(held.get(file.path))]
        groups = list(_groups(lacking))
        if len(lacking) < len(self.plan.send):
            self.progress.note(f"{len(self.plan.send) - len(lacking)} of {len(self.plan.send)} files are staged already")
        if groups:
            self._upload(groups, revision, len(lacking))
        commit = self.repository.commit_of(revision)
        self.progress.note(f"verifying {commit[:12]}: checksums and sizes of {len(self.outbox.files)} files")
        self.repository.verify(self.outbox.folder, self.outbox.files, commit)
        return commit

    def _upload(self, groups: Sequence[Sequence[LocalFile]], revision: str, count: int) -> None:
        self.progress.start(f"uploading to {revision}", count)
        try:
            for group in groups:
                self.repository.add(group, revision, f"Stage {self.outbox.title}")
                self.uploaded += [file.path for file in group]
                self.progress.advance(len(group))
        finally:
            self.progress.end()

    # ----------------------------------------------------------------------------------------------------------- promoting
    def _promote(self, staged: str) -> str:
        if self.target not in self.state.branches:
            self.repository.create_branch(self.target, self.parent)
        return self.repository.replace(
            self.target,
            self.parent,
            self.message,
            copy=self.plan.send,
            source=staged,
            delete=self.plan.delete,
            done=self._already_done,
        )

    def _direct(self) -> str:
        """One commit straight to the branch; the files are uploaded before it and are no part of any revision until then."""
        wanted = set(self.plan.send)
        add = [file for file in self.outbox.files if file.path in wanted]
        commit = self.repository.replace(
            self.target, self.parent, self.message, add=add, delete=self.plan.delete, done=self._already_done
        )
        self.uploaded += [file.path for file in add]
        self.repository.verify(self.outbox.folder, self.outbox.files, commit)
        return commit

    def _already_done(self) -> str | None:
        """The branch's commit, if it has become what was planned: by a commit whose answer was lost."""
        commit = self.repository.commit_of(self.target)
        plan = make_plan(self.outbox, self.plan.repo, self.plan.target, commit, self.repository.files(commit))
        return None if plan.changes or commit == self.parent else commit

    def _without(self, paths: Sequence[str], revision: str) -> str | None:
        """A revision's commit, if it holds none of these files: by a commit whose answer was lost."""
        commit = self.repository.commit_of(revision)
        return None if set(paths) & self.repository.files(commit).keys() else commit

    def _clean_up(self) -> None:
        try:
            self.repository.delete_branch(self.staging)
        except MechmergeError as error:
            self.progress.note(f"note: the branch {self.staging} is left over ({error})")

    # ----------------------------------------------------------------------------------------------------------- proposing
    def _propose(self, result: Published) -> Published:
        title = f"{self.message} ({self.plan.digest[:12]})"
        number = self.repository.pull_request(title, "The new state, verified by checksums and sizes once this is no draft.")
        revision = f"refs/pr/{number}"
        commit = self._stage(revision)
        stale = [path for path in self.plan.delete if path in self.repository.files(commit)]
        if stale:
            message = f"Remove what {self.outbox.title} no longer has"
            commit = self.repository.replace(
                revision, commit, message, delete=stale, done=lambda: self._without(stale, revision)
            )
        self.repository.open_pull_request(number)
        return result.model_copy(
            update={
                "commit": commit,
                "changed": bool(self.uploaded or stale),
                "uploaded": tuple(sorted(self.uploaded)),
                "revision": revision,
                "pull_request": number,
            }
        )


def _groups(files: Sequence[LocalFile]) -> Iterator[list[LocalFile]]:
    """Files in commits: the small ones first, README.md among them, since the Hub checks the card before anything is sent.

    Two files of one content go in two commits: in one, the client would send it twice.
    """
    waiting = sorted(files, key=lambda file: (file.path.endswith(".safetensors"), file.path))
    while waiting:
        group: list[LocalFile] = []
        later: list[LocalFile] = []
        for file in waiting:
            full = group and (sum(f.size for f in group) + file.size > GROUP_BYTES or len(group) >= GROUP_FILES)
            twice = file.sha256 in {f.sha256 for f in group}
            (later if full or twice else group).append(file)
        yield group
        waiting = later
