"""The parser of the LightningCLI's settings, whose errors are one line."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lrsa_lit.cli.setting_keys import first_user_error
from lrsa_lit.errors import UserError
from lrsa_lit.lightning_internals import setting_names

# The last form is that of a parser of one class within the whole.
_UNKNOWN_OPTION = re.compile(
    r"unrecognized arguments: --(\S+)|does not accept option '(\S+)'|^Option '(\S+)' is not accepted$"
)
_UNION_PREAMBLE = re.compile(r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: ")
_UNION_EPILOGUE = re.compile(r" Given value type: .*? Given value: (?:NestedArg\(key='(.*?)', val=(.*)\)|(.*))$")


class _Complaint(UserError):  # noqa: N818 - what it is
    """That of a parser of one class, which the parser of the whole completes with the key."""


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, without the usage of several hundred settings."""

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:  # type: ignore[override]
        """Parse; the parser reads a file where one is given instead of a group of settings, and it must be text."""
        try:
            return super().parse_args(args, *rest, **options)
        except UnicodeDecodeError as error:
            name = next((text for text in args or () if _holds(text, error.object)), "")
            raise UserError(name.removeprefix("--"), reason=f"the file is not UTF-8 text ({error.reason})") from error
        except RecursionError:
            raise UserError("settings", reason="a value is nested too deeply") from None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what the command line prints in one line."""
        if (own := first_user_error(ex, but=_Complaint)) is not None:
            raise own from ex
        text = one_line(message)
        if unknown := _UNKNOWN_OPTION.search(text):
            key = next(filter(None, unknown.groups())).partition("=")[0]
            names = {name for name in setting_names(self) if not name.endswith("help")}
            nearest = difflib.get_close_matches(key, names, n=3, cutoff=0.4)
            text = f"{key}: no such setting; the nearest are {', '.join(nearest) or 'shown by --help'}"
        raise _Complaint(text) from ex


def one_line(message: str) -> str:
    """What a nested message of jsonargparse says to a user: the key, what is allowed, what was given."""
    text = _UNION_PREAMBLE.sub("", " ".join(message.split()))
    text = re.sub(r"(?:^|(?<= ))- Expected a <class 'NoneType'>\s*", "", text)
    text = _UNION_EPILOGUE.sub(lambda match: f" (given: {match[2] or match[3]})", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"Expected a (\w+)\. Got value: (.*)", r"\2 is not allowed; it must be of type \1", text)
    return re.sub(r"^Parser key \"(.+?)\": (?:- )?", r"\1: ", text)


def _holds(argument: str, content: bytes) -> bool:
    """Whether an argument names the file of that content."""
    path = Path(argument.rpartition("=")[2])
    return path.is_file() and path.read_bytes() == content
