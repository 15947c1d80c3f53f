"""The Hugging Face Hub: fetch two files of one commit, upload some in one commit, and say what went wrong.

`huggingface_hub` is imported when the Hub is first asked, so that nobody waits for it who does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from .errors import SteerError

__all__ = ["check_repo", "fetch", "is_repo", "upload"]

_LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"


def is_repo(name: object) -> bool:
    """Say whether `name` looks like a repository's: "owner/name", with no leading `./`, `~` or `/`."""
    return (
        isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", name, re.ASCII) is not None
    )


def check_repo(name: object) -> str:
    """Return the name of a repository.

    Raises:
        SteerError: it does not look like one.
    """
    if not isinstance(name, str) or not is_repo(name):
        raise SteerError(f"a repository on the Hub is named 'owner/name'; received {name!r}.")
    return name


def fetch(repo: str, revision: str | None, files: tuple[str, ...]) -> Path:
    """Fetch files of a repository, all of the same commit, into the Hub's cache.

    Args:
        repo: "owner/name".
        revision: a branch, tag or commit; None is the main branch.
        files: their names.

    Returns:
        The folder in the cache.

    Raises:
        SteerError: the Hub cannot be reached, refuses, or has no such repository, revision or files.
    """
    at = f" at revision {revision!r}" if revision is not None else ""
    looked = f"found no field: there is no local folder {repo!r}, and on the Hub, {repo}{at}"
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the client passes on what several libraries raise
        what, remedy = _explain(error)
        raise SteerError(f"{looked}: {what}. {remedy}") from error
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise SteerError(f"{looked}: it holds no {' and no '.join(absent)}. `residual_steer.push` uploads both.")
    return folder


def upload(repo: str, files: Mapping[str, bytes], message: str, *, private: bool) -> str:
    """Upload files to a repository in one commit, making it first where it is not there.

    Args:
        repo: "owner/name".
        files: contents by name.
        message: of the commit.
        private: whether only the owner may see the repository.

    Returns:
        The repository's address.

    Raises:
        SteerError: the Hub cannot be reached or refuses, or the repository is public and was to be private.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        hub = HfApi()
        url = str(hub.create_repo(repo, private=private, exist_ok=True))
        hidden = not private or hub.model_info(repo).private
        if hidden:  # not `upload_folder`, which may spread a folder over several commits
            added = [CommitOperationAdd(name, content) for name, content in files.items()]
            hub.create_commit(repo, added, commit_message=message)
    except Exception as error:  # the client passes on what several libraries raise
        what, remedy = _explain(error)
        raise SteerError(f"could not push to {repo}: {what}. {remedy}") from error
    if not hidden:
        raise SteerError(
            f"could not push to {repo}: it is there already, and public. Nothing was uploaded; make it private in its "
            "settings, or leave `private` out."
        )
    return url


def _explain(error: Exception) -> tuple[str, str]:
    """Say in words what went wrong, and what to do."""
    from huggingface_hub import errors

    chain = _chain(error)
    status = next((found for one in chain if (found := _status(one)) is not None), None)
    if any(isinstance(one, errors.OfflineModeIsEnabled) for one in chain):
        return "the Hub was not asked, since HF_HUB_OFFLINE is set", "Unset it to use the Hub."
    if isinstance(error, errors.HFValidationError):
        return f"that is no name ({_brief(error)})", "Name a repository 'owner/name', as on the Hub."
    if isinstance(error, errors.GatedRepoError):
        return "access to it is gated", f"Ask for access on its page, then {_LOG_IN}."
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision", "Name a branch, tag or commit that is there, or leave `revision` out."
    if status == 401 or isinstance(error, errors.RepositoryNotFoundError):
        return "there is none that you may use", f"Check the name; if it is right, {_LOG_IN}."
    if status == 403:
        return "your token does not allow that", f"Check the owner's name, and {_LOG_IN} with a token that may write."
    if status is not None:
        return f"the Hub answered {status} ({_brief(error)})", "Try again later."
    return (
        f"the Hub could not be asked ({type(chain[-1]).__name__}: {_brief(chain[-1])})",
        "Check the connection, and that the cache of huggingface_hub can be written.",
    )


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and what caused it, down to the first cause."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _status(error: BaseException) -> int | None:
    """Return the status with which the Hub answered, if it did."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
