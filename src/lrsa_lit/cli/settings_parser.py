"""The parser of the LightningCLI's settings: errors are one line, with the key under which a part's argument stands."""

from __future__ import annotations

import difflib
import functools
import inspect
import pkgutil
import re
import traceback
from pathlib import Path
from typing import Any, NoReturn

import lightning
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.cli.catalogue import named
from lrsa_lit.data.filters import ContextFilter
from lrsa_lit.data.module import QADataModule
from lrsa_lit.data.policies import Packed
from lrsa_lit.data.supporting_facts import SentenceData
from lrsa_lit.errors import UserError
from lrsa_lit.lightning_internals import setting_names
from lrsa_lit.models.backbone import Backbone, LoRA
from lrsa_lit.models.low_rank import LowRank
from lrsa_lit.models.rope import RopeScaling
from lrsa_lit.objectives import Objective
from lrsa_lit.ops.sparse_attention import Compressor
from lrsa_lit.plugins import KINDS
from lrsa_lit.systems import System
from lrsa_lit.tasks import Digests, HeadGates, LongContextQA, SentenceRetrieval, SoCo, TopKSchedule

# A parser knows the classes that are imported, and by their names alone: all that --help lists.
for _kind in (*KINDS, "callbacks"):
    for _path in named(_kind).values():
        pkgutil.resolve_name(_path)

TOKENIZER = "model.tokenizer"
"""The model's, which is linked to the data's."""
DATA_TOKENIZER = "data.init_args.tokenizer"
_KEYS: dict[type, str] = {
    LongContextQA: "model",
    SentenceRetrieval: "model",
    Backbone: "model.backbone",
    LoRA: "model.backbone.lora",
    LowRank: "model.backbone.low_rank",
    RopeScaling: "model.backbone.rope_scaling",
    LRSAConfig: "model.lrsa",
    Compressor: "model.lrsa.compressor.init_args",
    System: "model.lrsa.system.init_args",
    TopKSchedule: "model.train_top_k.init_args",
    HeadGates: "model.head_gates.init_args",
    SoCo: "model.spectra.init_args",
    Digests: "model.digests.init_args",
    Objective: "model.objective",
    QADataModule: "data.init_args",
    SentenceData: "data.init_args",
    Packed: "data.init_args.packing",
    ContextFilter: "data.init_args.filter.init_args",
    lightning.Trainer: "trainer",
    Logger: "trainer.logger.init_args",
}
# The last form is that of a parser of one class within the whole.
_UNKNOWN_OPTION = re.compile(
    r"unrecognized arguments: --(\S+)|does not accept option '(\S+)'|^Option '(\S+)' is not accepted$"
)
# What stands for a class may be a file as well, which is said before what is wrong.
_NO_FILE = re.compile(r"(?:\\n|- )*Expected a path but (.*?) either not accessible or invalid(?:\\n|[- ])*(?=[^\s(])")
_OF_CLASS = re.compile(r'^Parser key "(.+?)": (?:- )*(\w+: .*?)(?: \(given: \{.*\}\))?$')
_NO_CLASS = re.compile(r"Expected a dot import path string: ([^\s,)]+)")
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
    text = re.sub(r"(?:^|(?<= ))- Expected a <class 'NoneType'>(?:\. Got value: \S+)?\s*", "", text)
    text = _UNION_EPILOGUE.sub(lambda match: f" (given: {match[2] or match[3]})", text)
    of_class = "init_args" in text
    text = _NO_FILE.sub("", text)
    text = _OF_CLASS.sub(r"\1.init_args.\2", text) if of_class else text
    known = (
        "is no class that is known here; --plugins MODULE (in YAML, plugins: [MODULE]) would make those of yours known"
    )
    text = _NO_CLASS.sub(rf"\1 {known}", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"(?:- )?Expected a (\w+)\. Got value: (\S+)(?: \(given: \S+\))?$",
                  r"\2 is not allowed; it must be of type \1", text)  # fmt: skip
    return re.sub(r"^Parser key \"(.+?)\": (?:- )?", r"\1: ", text)


def _holds(argument: str, content: bytes) -> bool:
    """Whether an argument names the file of that content."""
    path = Path(argument.rpartition("=")[2])
    return path.is_file() and path.read_bytes() == content


def first_user_error(error: BaseException | None, but: type[UserError] | tuple[()] = ()) -> UserError | None:
    """The UserError among an error's causes, with its key: jsonargparse wraps what a constructor raised several times.

    One of the kind ``but`` does not count.
    """
    while error is not None:
        if isinstance(error, UserError) and not isinstance(error, but):
            return with_key(error)
        error = error.__cause__ or error.__context__
    return None


def with_key(error: UserError) -> UserError:
    """The error, its field named as the settings name it.

    Lightning and jsonargparse call the parts, so the traceback tells which of them has complained. The field is an
    argument of the innermost one that has an argument of that name, or stands for itself, as a file does.
    """
    frames = [frame.f_locals.get("self").__class__ for frame, _ in traceback.walk_tb(error.__traceback__)]
    # A callback may look at the task and at its rule from outside.
    for owner in (*reversed(frames), LongContextQA, LRSAConfig):
        if error.field.partition(".")[0] in _arguments(owner):
            key = next((key for kind, key in _KEYS.items() if issubclass(owner, kind)), owner.__name__)
            error.field = f"{key}.{error.field}"
            break
    if error.field in ("tokenizer", DATA_TOKENIZER):
        error.field = TOKENIZER
    # The key is there once and for all.
    return error.with_traceback(None)


@functools.cache
def _arguments(owner: type) -> frozenset[str]:
    """Names of the arguments of a part's constructor and of those of its bases; none where it is no part."""
    if not issubclass(owner, (*_KEYS, lightning.Callback)):
        return frozenset()
    return frozenset(
        name for base in owner.__mro__ if "__init__" in vars(base) for name in inspect.signature(base).parameters
    )
