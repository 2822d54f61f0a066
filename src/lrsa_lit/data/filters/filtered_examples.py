"""Examples of filtered records, and what a filter did to a split of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from lrsa_lit.data.filters.context_filter import ContextFilter
from lrsa_lit.data.prompts import Example, Prompt, TooLong, encode
from lrsa_lit.data.records import QARecord
from lrsa_lit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_filtered(
    shortens: ContextFilter,
    record: QARecord,
    whole: Example | None,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    prompt: Prompt,
) -> Example | TooLong:
    """The example of a record whose context a filter shortens, with its counts as ``filtered``.

    Questions about one context keep that in common. ``whole`` is the example of all of the context, where it is known.
    Contexts that do not fit as a whole may fit then, unless the filter measures them by the whole prompt.
    """
    shortens.use(tokenizer)
    unfiltered = encode(record, tokenizer, max_tokens, prompt) if whole is None else whole
    if isinstance(unfiltered, TooLong) and shortens.needs_whole:
        return unfiltered
    filtered = shortens.filtered(record, prompt)
    example = encode(filtered.record, tokenizer, max_tokens, prompt)
    if not isinstance(example, TooLong):
        example["filtered"] = filtered.counts()
        if isinstance(unfiltered, TooLong):
            answer = len(example["input_ids"]) - example["prompt_length"]
            example["source_length"] = unfiltered.tokens - answer
        else:
            example["source_length"] = unfiltered["prompt_length"]
        example["subject"] = (whole.get("subject") if whole else "") or filtered.context
    return example


def counted(
    examples: Iterable[Example], shortens: ContextFilter, split: str, report: Counter[str]
) -> Iterator[Example]:
    """The examples of a split, what each kept added to its report.

    Raises:
        UserError: an example was made without the filter, or there is no context left in any.
    """
    for example in examples:
        if (counts := example.pop("filtered", None)) is None:
            raise UserError(
                "filter", reason="the data set hands no context to it", hint="leave it out, or set it to null"
            )
        report.update(counts)
        yield example
    if report["filtered without context"] < report["filtered"] or not report["filtered"]:
        return
    reason = f"leaves no context in the split {split!r}"
    size = next((name for name in ("tokens", "kept") if getattr(shortens, name, None) is not None), None)
    if size is None:
        raise UserError("filter", type(shortens).__name__, reason=reason, hint="leave it out, or set it to null")
    raise UserError(f"filter.init_args.{size}", getattr(shortens, size), "larger", reason=reason)


def checked_filter(shortens: ContextFilter | None, data_set: str, filterable: bool) -> ContextFilter | None:
    """The filter of a data set; a UserError where there is one and nothing to filter."""
    if shortens is not None and not filterable:
        reason = f"cannot be used: {data_set} has no questions about passages, which a filter shortens"
        raise UserError("filter", type(shortens).__name__, reason=reason, hint="leave it out, or set it to null")
    return shortens


def sources_of(shortens: ContextFilter | None) -> dict[str, str]:
    """What else decides what a filter leaves."""
    return {} if shortens is None else shortens.sources()
