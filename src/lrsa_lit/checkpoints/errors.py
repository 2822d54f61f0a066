"""What can keep a checkpoint from being saved."""

from __future__ import annotations

from lrsa_lit.errors import UserError


class CheckpointNotSaved(UserError):  # noqa: N818 - what happened, as with KeyboardInterrupt
    """A checkpoint could not be written; the files of earlier ones are as they were."""


class NonFiniteLoss(UserError):  # noqa: N818
    """The loss, or a weight, is NaN or infinite; nothing was saved since."""


def system_error(error: BaseException | None) -> OSError | None:
    """The OSError among what led to an error: torch's writers raise errors of their own over a full disk's."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
