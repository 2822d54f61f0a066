"""Under which key of the settings a part's arguments stand: the parts themselves know only what their arguments are."""

from __future__ import annotations

import functools
import inspect
import traceback

import lightning
from lightning.pytorch.loggers import Logger

from lrsa_lit.attention import LRSAConfig
from lrsa_lit.data.module import QADataModule
from lrsa_lit.data.policies import Packed
from lrsa_lit.errors import UserError
from lrsa_lit.models.backbone import Backbone, LoRA
from lrsa_lit.models.rope import RopeScaling
from lrsa_lit.ops.sparse_attention import Compressor
from lrsa_lit.tasks import LongContextQA, TopKSchedule

TOKENIZER = "model.tokenizer"
"""The model's, which is linked to the data's."""
DATA_TOKENIZER = "data.init_args.tokenizer"
_KEYS: dict[type, str] = {
    LongContextQA: "model",
    Backbone: "model.backbone",
    LoRA: "model.backbone.lora",
    RopeScaling: "model.backbone.rope_scaling",
    LRSAConfig: "model.lrsa",
    Compressor: "model.lrsa.compressor.init_args",
    TopKSchedule: "model.train_top_k.init_args",
    QADataModule: "data.init_args",
    Packed: "data.init_args.packing",
    lightning.Trainer: "trainer",
    Logger: "trainer.logger.init_args",
}


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
