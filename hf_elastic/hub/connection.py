"""Talking to the Hub: what is needed before, repositories that are made, and errors in one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.constants import DEFAULT_REVISION
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from hf_elastic.errors import CheckpointError, ElasticError

PUSHED_BY = "Pushed by hf-elastic"
"""Begins the description of our commits, by which a later push knows them."""
_FILES_AT_ONCE = 256
_MADE_BY_THE_HUB = {".gitattributes"}
_REASONS = {
    401: "the token is not accepted; log in by `hf auth login`, or pass token=",
    403: "the token may not write there; make one that may, or choose another name",
    412: "somebody else pushed in the meantime; push again",
    413: "it is larger than the Hub takes",
    429: "the Hub asks to wait; push again later",
}


@dataclass
class Repository:
    """A repository that is pushed to.

    Attributes:
        api: of the Hub.
        repo_id: with its namespace.
        revision: branch that is pushed to; ``None``: the main one.
        made: whether this push made it.
        branched: whether this push made the branch.
        head: commit that it is at.
        files: that it holds there.
    """

    api: HfApi
    repo_id: str
    revision: str | None
    made: bool = False
    branched: bool = False
    head: str | None = None
    files: frozenset[str] = frozenset()

    def read(self) -> None:
        """Reads which commit the branch is at, and which files it holds."""
        info = self.api.model_info(self.repo_id, revision=self.revision)
        self.head = info.sha
        self.files = frozenset(self.api.list_repo_files(self.repo_id, revision=info.sha))

    def text(self, name: str) -> str | None:
        """A small file of it; ``None`` where it is not there."""
        if name not in self.files:
            return None
        try:
            path = self.api.hf_hub_download(self.repo_id, name, revision=self.head)
        except EntryNotFoundError:
            return None
        return Path(path).read_text(encoding="utf-8", errors="replace")

    def ignored(self, sizes: Mapping[str, int], *, create_pr: bool) -> list[str]:
        """Those of some files that the repository's .gitignore would leave out of a commit, asked by name.

        Args:
            sizes: bytes of each file, by its path.
            create_pr: whether the commit would be a pull request.
        """
        names, found = sorted(sizes), []
        revision = quote(self.revision or DEFAULT_REVISION, safe="")
        for first in range(0, len(names), _FILES_AT_ONCE):
            asked = names[first : first + _FILES_AT_ONCE]
            response = http_backoff(
                "POST",
                f"{self.api.endpoint}/api/models/{self.repo_id}/preupload/{revision}",
                json={"files": [{"path": name, "size": sizes[name], "sample": ""} for name in asked]},
                params={"create_pr": "1"} if create_pr else None,
                headers=build_hf_headers(token=self.api.token),
            )
            hf_raise_for_status(response)
            found += [str(file["path"]) for file in response.json()["files"] if file.get("shouldIgnore")]
        return found

    def of_our_pushes(self, names: Iterable[str]) -> frozenset[str]:
        """Those of some files whose last change was a push of ours; others belong to whoever changed them."""
        asked = sorted(names)
        if not asked:
            return frozenset()
        commits = self.api.list_repo_commits(self.repo_id, revision=self.head)
        ours = {commit.commit_id for commit in commits if PUSHED_BY in commit.message}
        found = self.api.get_paths_info(self.repo_id, asked, revision=self.head, expand=True)
        return frozenset(file.path for file in found if file.last_commit is not None and file.last_commit.oid in ours)

    def remove_if_empty(self) -> None:
        """Undoes what this push made, where nobody has put anything into it."""
        if self.made and set(self.api.list_repo_files(self.repo_id)) <= _MADE_BY_THE_HUB:
            self.api.delete_repo(self.repo_id, missing_ok=True)
        elif self.branched and self.revision is not None:
            self.api.delete_branch(self.repo_id, branch=self.revision)


def connect(token: str | bool | None) -> HfApi:
    """The Hub, with a token.

    Raises:
        CheckpointError: offline, or there is no token.
    """
    if is_offline_mode():
        raise CheckpointError("HF_HUB_OFFLINE is set, so nothing is pushed; unset it, or look at it by dry_run")
    known = token if isinstance(token, str) else None if token is False else get_token()
    if not known:
        raise CheckpointError("no token of the Hub: log in by `hf auth login`, set HF_TOKEN, or pass token=")
    return HfApi(token=known, library_name="hf-elastic", library_version=version("hf-elastic"))


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line.

    Raises:
        CheckpointError: the block raised something else than an error of ours.
    """
    try:
        yield
    except ElasticError:
        raise
    except Exception as error:  # huggingface_hub and its transports raise whatever their parts raise
        raise CheckpointError(f"cannot {what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The reason in a line: that of the cause, where that is an answer of the Hub."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    if isinstance(cause, RevisionNotFoundError):
        return "it has no such branch; push without create_pr to make it"
    if isinstance(cause, RepositoryNotFoundError):
        return "there is no such repository, or this token may not see it"
    if isinstance(cause, HfHubHTTPError) and cause.response is not None:
        status = int(cause.response.status_code)
        said = " ".join(str(cause.server_message or "").split())[:200]
        known = _REASONS.get(status, f"the Hub answered {status}")
        return f"{known}{f' ({said})' if said else ''}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {lines[0][:300]}"


def opened(api: HfApi, repo_id: str, *, private: bool | None, revision: str | None, create_pr: bool) -> Repository:
    """Makes a repository, or opens the one that is there; a pull request needs one.

    Raises:
        CheckpointError: it cannot be made, or is public where a private one is asked for.
    """
    if "/" not in repo_id:
        with one_line("ask the Hub whose token this is"):
            repo_id = f"{api.whoami()['name']}/{repo_id}"
    found = Repository(api, repo_id, revision)
    with one_line(f"open {repo_id}"):
        if not create_pr:
            found.made = _made(api, repo_id, private=private)
        if not found.made and private and not api.model_info(repo_id).private:
            raise CheckpointError(f"{repo_id} is public; make it private in its settings, or choose another name")
        with removed_if_it_fails(found):
            if revision is not None and not create_pr:
                found.branched = _branched(api, repo_id, revision)
            found.read()
    return found


def _made(api: HfApi, repo_id: str, *, private: bool | None) -> bool:
    """Makes a repository unless it is there."""
    try:
        api.create_repo(repo_id, private=private, exist_ok=False)
        return True
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 409:
            return False
        if status not in (401, 403):
            raise
        try:  # tokens for one repository may write to it and make none
            api.model_info(repo_id)
        except HfHubHTTPError:
            raise error from None
        return False


def _branched(api: HfApi, repo_id: str, revision: str) -> bool:
    """Makes a branch unless it is there."""
    try:
        api.create_branch(repo_id, branch=revision, exist_ok=False)
        return True
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 409:
            return False
        raise


@contextmanager
def removed_if_it_fails(repository: Repository) -> Iterator[None]:
    """Removes a repository or branch that was made for a push when the block fails."""
    try:
        yield
    except BaseException as failure:
        try:
            repository.remove_if_empty()
        except Exception as error:  # the first failure is what matters
            left = f"{repository.repo_id} was made for this push and is still there, empty ({_reason(error)})"
            raise CheckpointError(f"{failure}; {left}") from failure
        raise
