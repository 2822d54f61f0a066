"""A model's folder on the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lrsa_lit.errors import UserError, message_of

_KEY = "push"


def check_upload(repo: str) -> None:
    """Ask the hub, before anything is written, whether its user may be known.

    Raises:
        UserError: the name is none of a repository, there is no token, or the hub does not accept it.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(_KEY, repo, "ORG/NAME", reason=f"is no name of a repository ({message_of(error)})") from None
    if repo.count("/") != 1:
        raise UserError(_KEY, repo, "ORG/NAME")
    if get_token() is None:
        raise UserError(_KEY, repo, reason="needs a token of the hub", hint="`hf auth login`, or set HF_TOKEN")
    with _answering(repo):
        HfApi().whoami()


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Make the repository if there is none, and put a folder's files into it; returns the commit's address.

    Raises:
        UserError: the hub does not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _answering(repo, f"; {folder} is complete: `hf upload {repo} {folder}` sends it"):
        api.create_repo(repo, private=private or None, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model exported by lrsa-lit")
    return str(commit.commit_url)


@contextlib.contextmanager
def _answering(repo: str, remedy: str = "") -> Iterator[None]:
    """Make one line of whatever the hub's library raises: it speaks through several HTTP libraries."""
    try:
        yield
    except Exception as error:
        reason = message_of(error)[:300] or type(error).__name__
        raise UserError(_KEY, repo, reason=f"was not pushed: {reason}{remedy}") from error
