"""The parser of the LightningCLI's settings; its errors are one line with the full key of a part's argument."""

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

# A parser finds a class by its short name only if it is imported, so all classes of --help are imported.
for _kind in (*KINDS, "callbacks"):
    for _path in named(_kind).values():
        pkgutil.resolve_name(_path)

TOKENIZER = "model.tokenizer"
"""The key of the model's tokenizer, which is linked to the data's."""
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
# The last form is that of the parser of a single class.
_UNKNOWN_OPTION = re.compile(
    r"unrecognized arguments: --(\S+)|does not accept option '(\S+)'|^Option '(\S+)' is not accepted$"
)
# A class may also be given as a file, which jsonargparse mentions before the mistake itself.
_NO_FILE = re.compile(r"(?:\\n|- )*Expected a path but (.*?) either not accessible or invalid(?:\\n|[- ])*(?=[^\s(])")
_OF_CLASS = re.compile(r'^Parser key "(.+?)": (?:- )*(\w+: .*?)(?: \(given: \{.*\}\))?$')
# The parser of a single class has no key before the mistake.
_OF_ONE_CLASS = re.compile(r"^(?:- )+(\w+: .*) \(given: Namespace\(class_path=.*\)\)$")
_NO_CLASS = re.compile(r"Expected a dot import path string: ([^\s,)]+)")
_UNION_PREAMBLE = re.compile(r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: ")
_UNION_EPILOGUE = re.compile(r" Given value type: .*? Given value: (?:NestedArg\(key='(.*?)', val=(.*)\)|(.*))$")


class _Complaint(UserError):  # noqa: N818 - what it is
    """An error of a single class's parser; the parser of all settings adds the key."""


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, without the usage of several hundred settings."""

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:  # type: ignore[override]
        """Parse arguments; a group of settings may be given as a file, which must be UTF-8 text."""
        try:
            return super().parse_args(args, *rest, **options)
        except UnicodeDecodeError as error:
            name = next((text for text in args or () if _holds(text, error.object)), "")
            raise UserError(name.removeprefix("--"), reason=f"the file is not UTF-8 text ({error.reason})") from error
        except RecursionError:
            raise UserError("settings", reason="a value is nested too deeply") from None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error as a UserError, which the command line prints in one line."""
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
    """Shorten a nested message of jsonargparse to the key, what is allowed, and what was given."""
    text = _UNION_PREAMBLE.sub("", " ".join(message.split()))
    text = re.sub(r"(?:^|(?<= ))- Expected a <class 'NoneType'>(?:\. Got value: \S+)?\s*", "", text)
    text = _UNION_EPILOGUE.sub(lambda match: f" (given: {match[2] or match[3]})", text)
    of_class = "init_args" in text
    text = _NO_FILE.sub("", text)
    text = _OF_CLASS.sub(r"\1.init_args.\2", text) if of_class else text
    text = _OF_ONE_CLASS.sub(r"init_args.\1", text)
    known = "is not a known class; --plugins MODULE (in YAML, plugins: [MODULE]) adds your own classes"
    text = _NO_CLASS.sub(rf"\1 {known}", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"(?:- )?Expected a (\w+)\. Got value: (\S+)(?: \(given: \S+\))?$",
                  r"\2 is not allowed; it must be of type \1", text)  # fmt: skip
    text = re.sub(r"(?:- )?Expected a (\w+) \(given: (\S+)\)$", r"\2 is not allowed; it must be of type \1", text)
    return re.sub(r"^Parser key \"(.+?)\": (?:- )?", r"\1: ", text)


def _holds(argument: str, content: bytes) -> bool:
    """Whether an argument names a file with this content."""
    path = Path(argument.rpartition("=")[2])
    return path.is_file() and path.read_bytes() == content


def first_user_error(error: BaseException | None, but: type[UserError] | tuple[()] = ()) -> UserError | None:
    """The UserError among an error's causes, with its key; jsonargparse wraps constructors' errors several times.

    Errors of the type ``but`` are skipped.
    """
    while error is not None:
        if isinstance(error, UserError) and not isinstance(error, but):
            return with_key(error)
        error = error.__cause__ or error.__context__
    return None


def with_key(error: UserError) -> UserError:
    """Return the error with its field renamed to the key in the settings.

    Lightning and jsonargparse call the parts, so the traceback shows which part raised the error. The field is an
    argument of the innermost part that has an argument of that name. Any other field, such as a file, is kept.
    """
    frames = [frame.f_locals.get("self").__class__ for frame, _ in traceback.walk_tb(error.__traceback__)]
    # A callback may check the task and its rule from outside.
    for owner in (*reversed(frames), LongContextQA, LRSAConfig):
        if error.field.partition(".")[0] in _arguments(owner):
            key = next((key for kind, key in _KEYS.items() if issubclass(owner, kind)), owner.__name__)
            error.field = f"{key}.{error.field}"
            break
    if error.field in ("tokenizer", DATA_TOKENIZER):
        error.field = TOKENIZER
    # Without a traceback, a second call does not add the key again.
    return error.with_traceback(None)


@functools.cache
def _arguments(owner: type) -> frozenset[str]:
    """Names of the arguments of a part's constructor and of those of its bases; empty if it is not a part."""
    if not issubclass(owner, (*_KEYS, lightning.Callback)):
        return frozenset()
    return frozenset(
        name for base in owner.__mro__ if "__init__" in vars(base) for name in inspect.signature(base).parameters
    )
