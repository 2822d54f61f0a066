"""Upload a model's folder to the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lrsa_lit.errors import UserError, message_of

_KEY = "push"


def check_upload(repo: str) -> None:
    """Check the repository's name, and that the hub accepts the user's token, before anything is written.

    Raises:
        UserError: the name is not valid, there is no token, or the hub refuses it.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(_KEY, repo, "ORG/NAME", reason=f"is not a repository name ({message_of(error)})") from None
    if repo.count("/") != 1:
        raise UserError(_KEY, repo, "ORG/NAME")
    if get_token() is None:
        raise UserError(_KEY, repo, reason="needs a hub token", hint="run `hf auth login`, or set HF_TOKEN")
    with _answering(repo):
        HfApi().whoami()


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Create the repository if it does not exist, and upload a folder's files; returns the commit's URL.

    Raises:
        UserError: the upload fails.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _answering(repo, f"; {folder} is complete, so upload it later by `hf upload {repo} {folder}`"):
        api.create_repo(repo, private=private or None, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model exported by lrsa-lit")
    return str(commit.commit_url)


@contextlib.contextmanager
def _answering(repo: str, remedy: str = "") -> Iterator[None]:
    """Turn any exception of the hub's library, which uses several HTTP libraries, into a UserError."""
    try:
        yield
    except Exception as error:
        reason = message_of(error)[:300] or type(error).__name__
        raise UserError(_KEY, repo, reason=f"was not pushed: {reason}{remedy}") from error
