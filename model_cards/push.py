"""Pushes one staged folder to the Hub as one commit, so that the remote is never in between."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.hf_api import RepoFile

from .errors import PublishError

# The Hub's own; it makes it, and nobody else has an opinion on it.
_KEEP = ".gitattributes"
_PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt
_PASSING = (408, 412, 429, 500, 502, 503, 504)


class Pushed(NamedTuple):
    """Where a folder is now.

    Attributes
    ----------
    url : str
        Of the repository.
    revision : str
        Commit; what `revision=` pins.
    changed : bool
        False when the remote held exactly this folder already.
    """

    url: str
    revision: str
    changed: bool


def push_folder(
    folder: str | Path,
    repository: str,
    kind: str = "model",
    private: bool = False,
    message: str = "Publish",
    say: Callable[[str], None] = print,
) -> Pushed:
    """Make a repository hold exactly the files of a folder, by one commit on its branch `main`.

    Large files go up first, unseen; then one request moves the branch. A push that is killed, or
    whose connection breaks, leaves the branch where it was or where it should be; doing it again
    completes it. What fails in passing (no answer, too many requests, a busy server, a commit of
    somebody else in between) is tried five times, each time after a look at what the remote holds.

    Parameters
    ----------
    folder : path
        Files that are gone here go there too, save `.gitattributes`.
    repository : str
        ``OWNER/NAME``; made when it does not exist.
    kind : {"model", "dataset", "space"}
    private : bool
        For a repository that is made now.
    message : str
        Of the commit.
    say : callable
        Told of every further attempt.

    Raises
    ------
    PublishError
        No token, no right, no network, offline mode, or a name that the Hub refuses.
    """
    folder = Path(folder)
    api = HfApi()
    for pause in (*_PAUSES, None):
        try:
            made = api.create_repo(
                repository,
                repo_type=kind,
                private=private or None,
                exist_ok=True,
                space_sdk="gradio" if kind == "space" else None,
            )
            return _push_once(api, folder, repository, kind, str(made), message)
        except (HTTPError, OSError, ValueError, RuntimeError) as caught:
            error = _cause(caught)
            if isinstance(error, RuntimeError):  # no fault of the network
                raise
            if not _passes(error) or pause is None:
                raise PublishError(_advice(error, repository, api.endpoint)) from caught
            say(f"{repository}: {_first_line(error)}; again in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def tag(repository: str, kind: str, name: str, revision: str) -> None:
    """Name a revision, unless the name is taken: it is made from the weights, so it stays right.

    Raises
    ------
    PublishError
        As `push_folder`; the push itself is done by then.
    """
    api = HfApi()
    try:
        names = {one.name for one in api.list_repo_refs(repository, repo_type=kind).tags}
        if name not in names:
            api.create_tag(repository, tag=name, revision=revision, repo_type=kind, exist_ok=True)
    except (HTTPError, OSError, ValueError) as error:
        raise PublishError(_advice(error, repository, api.endpoint)) from error


def _push_once(
    api: HfApi, folder: Path, repository: str, kind: str, url: str, message: str
) -> Pushed:
    head = str(api.repo_info(repository, repo_type=kind).sha)
    here = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    there = {
        entry.path: entry
        for entry in api.list_repo_tree(repository, recursive=True, repo_type=kind, revision=head)
        if isinstance(entry, RepoFile) and entry.path != _KEEP
    }
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, str(path))
        for name, path in sorted(here.items())
        if name not in there or not _same(path, there[name])
    ]
    operations += [CommitOperationDelete(name) for name in sorted(there) if name not in here]
    if not operations:
        return Pushed(url, head, False)
    done = api.create_commit(
        repository,
        operations,
        commit_message=message,
        repo_type=kind,
        parent_commit=head,
    )
    return Pushed(url, str(done.oid), True)


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _same(path: Path, entry: RepoFile) -> bool:
    """Whether the remote holds these bytes already."""
    if path.stat().st_size != entry.size:
        return False
    content = path.read_bytes()
    if entry.lfs is not None:
        return bool(hashlib.sha256(content).hexdigest() == entry.lfs.sha256)
    blob = b"blob %d\0" % len(content) + content
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == entry.blob_id


def _cause(error: Exception) -> Exception:
    """What went wrong with a large file, of which the client says only that it went wrong."""
    if type(error) is RuntimeError and isinstance(error.__cause__, HTTPError | OSError):
        return error.__cause__
    return error


def _passes(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, OfflineModeIsEnabled | LocalTokenNotFoundError):
        return False
    if isinstance(error, HfHubHTTPError):
        return _status(error) in _PASSING
    return isinstance(error, HTTPError)  # timeouts, broken and refused connections


def _status(error: HfHubHTTPError) -> int | None:
    return None if error.response is None else int(error.response.status_code)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _advice(error: Exception, repository: str, endpoint: str) -> str:
    """One line: what, why, what to do."""
    reason = _first_line(error)
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{repository}: offline mode is on, so nothing was pushed. Unset HF_HUB_OFFLINE, or "
            "write the folder with --dry-run and push it elsewhere."
        )
    status = _status(error) if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
        return (
            f"{repository}: {endpoint} did not accept the token, or there is none ({reason}). "
            "Log in with `hf auth login` or set HF_TOKEN, to a token that may write there."
        )
    if isinstance(error, HTTPError) and status is None:
        return (
            f"{repository}: no connection to {endpoint} ({reason}). Nothing was changed there; run "
            "the command again, or use --dry-run without a network."
        )
    return (
        f"{repository}: {endpoint} refused ({reason}). Nothing was changed there; run the command "
        "again later, or look at the repository's name and settings."
    )
