"""Examples of filtered records, and statistics of what a filter did to a split."""

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
    """Tokenise a record after a filter has shortened its context; ``filtered`` of the example holds the counts.

    ``subject`` of the example identifies the unfiltered context, so questions about the same context stay grouped.
    ``whole`` is the unfiltered example, if known. A context that is too long unfiltered may fit after filtering, unless
    the filter's budget is a share of the prompt (``needs_whole``).
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
    """Yield the examples of a split, and add their filter counts to the split's report.

    Raises:
        UserError: an example was made without the filter, or no example has any context left.
    """
    for example in examples:
        if (counts := example.pop("filtered", None)) is None:
            raise UserError(
                "filter", reason="the data set passes no contexts to it", hint="leave it out, or set it to null"
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
    """Return the filter of a data set; raise a UserError if the data set has no contexts to filter."""
    if shortens is not None and not filterable:
        reason = f"cannot be used: {data_set} has no questions about passages, which a filter shortens"
        raise UserError("filter", type(shortens).__name__, reason=reason, hint="leave it out, or set it to null")
    return shortens


def sources_of(shortens: ContextFilter | None) -> dict[str, str]:
    """The :meth:`ContextFilter.sources` of a filter; empty without a filter."""
    return {} if shortens is None else shortens.sources()
