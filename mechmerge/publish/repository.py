"""One repository on the Hugging Face Hub: the requests that publishing makes, repeated where that is safe, errors ours.

Only what the Hub offers is used: it cannot merge branches, and merging a pull request takes no parent commit, so a staged state
reaches a branch by one commit that copies its files, on the condition that the branch still stands where it was planned on
(https://huggingface.co/docs/huggingface_hub/guides/upload, `CommitOperationCopy` and `parent_commit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mechmerge.errors import InputError, MechmergeError, MissingError
from mechmerge.models.hub_errors import LOGIN, status_of
from mechmerge.progress import SILENT, Progress
from mechmerge.publish.patience import PATIENCE, Patience
from mechmerge.publish.plan import Kind, LocalFile, RemoteFile
from mechmerge.version import __version__

T = TypeVar("T")
OTHER_KINDS: dict[Kind, tuple[str, ...]] = {"model": ("dataset", "space"), "dataset": ("model", "space")}


class State(NamedTuple):
    """Where a repository stands."""

    private: bool
    branches: dict[str, str]
    """Commit of every branch."""
    tags: dict[str, str]
    """Commit of every tag."""


class Repository:
    """A model or dataset repository on the Hub.

    Args:
        name: `owner/name`.
        kind: its type.
        endpoint: the Hub's address (default: huggingface_hub's own, `HF_ENDPOINT`).
        token: a token (default: huggingface_hub's own places).
        patience: how often requests are repeated.
        progress: told about repetitions.

    Raises:
        InputError: a name that the Hub refuses.
    """

    def __init__(
        self,
        name: str,
        kind: Kind = "model",
        *,
        endpoint: str | None = None,
        token: str | None = None,
        patience: Patience = PATIENCE,
        progress: Progress = SILENT,
    ) -> None:
        from huggingface_hub import HfApi, get_token

        self.name, self.kind = check_name(name), kind
        self._patience, self._progress = patience, progress
        self._has_token = bool(token or get_token())
        self._api = HfApi(endpoint=endpoint, token=token, library_name="mechmerge", library_version=__version__)

    @property
    def url(self) -> str:
        """Address of its page."""
        return f"{self._api.endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    def require_token(self) -> None:
        """Raises MissingError where huggingface_hub knows no token."""
        if not self._has_token:
            raise MissingError(f"publishing to {self.name}", expected="a token of the Hub", found="none", fix=LOGIN)

    def _call(self, action: Callable[[], T], what: str) -> T:
        return self._patience.call(action, f"{self.name}: {what}", self._progress)

    def _ask(self, method: str, what: str, /, **arguments: Any) -> Any:
        """One method of HfApi on this repository."""
        arguments = {"repo_id": self.name, "repo_type": self.kind} | arguments
        return self._call(lambda: getattr(self._api, method)(**arguments), what)

    # ------------------------------------------------------------------------------------------------------------- reading
    def state(self) -> State | None:
        """Branches and tags; None where there is no such repository, or none that we may see."""
        info = self._info(self.kind)
        if info is None:
            return None
        refs = self._ask("list_repo_refs", "reading its branches")
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        return State(bool(info.private), branches, {ref.name: ref.target_commit for ref in refs.tags})

    def _info(self, kind: str) -> Any:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        def ask() -> Any:
            try:
                return self._api.repo_info(self.name, repo_type=kind)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None

        return self._call(ask, "looking for it")

    def refuse_other_kind(self) -> None:
        """Raises InputError where the name belongs to a repository of another type, and to none of this one."""
        for kind in OTHER_KINDS[self.kind]:
            if self._info(kind) is not None:
                raise InputError(
                    self.name,
                    expected=f"a {self.kind} repository, or a name that is free",
                    found=f"a {kind} repository",
                    fix="publish under another name",
                )

    def files(self, revision: str) -> dict[str, RemoteFile]:
        """The files of a revision, by path."""
        from huggingface_hub.hf_api import RepoFile

        def ask() -> dict[str, RemoteFile]:
            entries = self._api.list_repo_tree(self.name, recursive=True, revision=revision, repo_type=self.kind)
            files = [entry for entry in entries if isinstance(entry, RepoFile)]
            return {f.path: RemoteFile(f.size, f.blob_id, f.lfs.sha256 if f.lfs else None) for f in files}

        return self._call(ask, f"listing {revision[:12]}")

    def commit_of(self, revision: str) -> str:
        """The commit that a branch, tag or pull request stands at."""
        return str(self._ask("repo_info", f"reading {revision}", revision=revision).sha)

    # ------------------------------------------------------------------------------------------------------------- writing
    def create(self, private: bool) -> None:
        """Makes the repository, if it is not there."""
        self._ask("create_repo", "making the repository", private=private, exist_ok=True)

    def create_branch(self, branch: str, commit: str) -> None:
        """Makes a branch, if it is not there."""
        self._ask("create_branch", f"making the branch {branch}", branch=branch, revision=commit, exist_ok=True)

    def delete_branch(self, branch: str) -> None:
        """Removes a branch."""
        self._ask("delete_branch", f"removing the branch {branch}", branch=branch)

    def add(self, files: Sequence[LocalFile], revision: str, message: str) -> str:
        """Uploads files to a branch or pull request, in one commit; returns the commit.

        Files whose content the Hub knows are not sent again.
        """
        from huggingface_hub import CommitOperationAdd

        def ask() -> str:
            additions = [CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=file.source) for file in files]
            return self._commit(additions, revision, message, None)

        return self._call(ask, f"uploading to {revision}")

    def replace(
        self,
        revision: str,
        parent: str,
        message: str,
        *,
        copy: Iterable[str] = (),
        source: str | None = None,
        add: Sequence[LocalFile] = (),
        delete: Iterable[str] = (),
        done: Callable[[], str | None] = lambda: None,
    ) -> str:
        """One commit on a branch that still stands at `parent`: all of it, or nothing.

        Args:
            revision: the branch.
            parent: the commit that it must stand at.
            message: the commit's first line.
            copy: files to copy from another commit of the repository.
            source: that commit.
            add: files to upload.
            delete: files to remove.
            done: the commit that already holds all this, if there is one; asked where the Hub says that the branch has moved,
                since an answer to our own commit may have been lost.

        Returns:
            The new commit.

        Raises:
            InputError: the branch has moved.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        def ask() -> str:
            operations: list[Any] = [
                CommitOperationCopy(src_path_in_repo=path, path_in_repo=path, src_revision=source) for path in copy
            ]
            operations += [CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=file.source) for file in add]
            operations += [CommitOperationDelete(path_in_repo=path, is_folder=False) for path in delete]
            try:
                return self._commit(operations, revision, message, parent)
            except Exception as error:
                ours = done() if status_of(error) in (404, 412) else None
                if ours is None:
                    raise
                return ours

        return self._call(ask, f"committing to {revision}")

    def _commit(self, operations: list[Any], revision: str, message: str, parent: str | None) -> str:
        info = self._api.create_commit(
            self.name, operations, commit_message=message, repo_type=self.kind, revision=revision, parent_commit=parent
        )
        return str(info.oid)

    def tag(self, tag: str, commit: str) -> None:
        """Names a commit.

        Raises:
            InputError: the tag is there, on another commit.
        """
        self._ask("create_tag", f"making the tag {tag}", tag=tag, revision=commit, exist_ok=True)
        state = self.state()
        found = state.tags.get(tag) if state is not None else None
        if found != commit:
            raise InputError(f"tag {tag}", expected=f"commit {commit[:12]}", found=str(found)[:12], fix="name another --tag")

    # ------------------------------------------------------------------------------------------------------- pull requests
    def pull_request(self, title: str, description: str) -> int:
        """The number of our own pull request of this title, found or made; it is a draft until `open_pull_request`."""

        def ask() -> int:
            me = self._api.whoami()["name"]
            for found in self._api.get_repo_discussions(
                self.name, author=me, discussion_type="pull_request", repo_type=self.kind
            ):
                if found.title == title and found.author == me and found.status in ("draft", "open"):
                    return found.num
            made = self._api.create_pull_request(self.name, title, description=description, repo_type=self.kind)
            return made.num

        return self._call(ask, "making a pull request")

    def open_pull_request(self, number: int) -> None:
        """Turns a draft into an open pull request."""

        def ask() -> None:
            if self._api.get_discussion_details(self.name, number, repo_type=self.kind).status == "draft":
                self._api.change_discussion_status(self.name, number, "open", repo_type=self.kind)

        self._call(ask, f"opening pull request {number}")

    # ------------------------------------------------------------------------------------------------------------ checking
    def verify(self, folder: Path, files: Sequence[LocalFile], commit: str) -> None:
        """Compares checksums and sizes of a commit with the files on disk.

        Raises:
            MechmergeError: the first difference.
        """
        report = self._ask("verify_repo_checksums", f"verifying {commit[:12]}", local_dir=folder, revision=commit)
        where = f"{self.name} at {commit[:12]}"
        fix = "run the same command again; if it stays so, the Hub does not keep what it was sent"
        for mismatch in report.mismatches:
            raise MechmergeError(
                f"{where}: {mismatch['path']}",
                expected=f"{mismatch['algorithm']} {mismatch['actual'][:12]}",
                found=mismatch["expected"][:12],
                fix=fix,
            )
        for path in report.extra_paths:
            # The Hub leaves out, silently, what a .gitignore of the repository names.
            fix = "look whether a .gitignore of the repository names it"
            raise InputError(f"{where}: {path}", expected="the file", found="none", fix=fix)
        held = self.files(commit)
        for file in files:
            if not file.equals(held.get(file.path)):
                raise MechmergeError(f"{where}: {file.path}", expected=f"{file.size} bytes as planned", found="others", fix=fix)


def check_name(name: str) -> str:
    """The name, which must be one that the Hub takes.

    Raises:
        InputError: it is not `owner/name` as the Hub takes it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    wanted = "owner/name as the Hub takes it (letters, digits, '-', '_', '.'; at most 96 characters)"
    if name.count("/") != 1:
        raise InputError(f"repository {name!r}", expected=wanted, found="another form")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"repository {name!r}", expected=wanted, found=str(error).split(":")[0].splitlines()[0]) from None
    return name
