"""The exception that means "the user can mend this", shown as a single line with exit code 2, and what others say."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a config, a file or an argument.

    The message is one line that names the key, the value and what is allowed. The command line prints it
    without a traceback and exits with code 2; library users catch it as a :class:`ValueError`.
    """


def said(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())
