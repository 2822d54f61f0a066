"""Where a generated answer ends."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer, ascending: all special tokens, including those without a role in the tokenizer.

    Text after a special token is not part of the answer, even if the model omitted the end-of-sequence token: it starts
    another message or another kind of text. Decoding drops special tokens, so the two could not be told apart later.
    """
    unnamed = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return sorted({*tokenizer.all_special_ids, *unnamed})


def before_stop(tokens: Iterable[int], stops: Container[int]) -> list[int]:
    """The generated tokens before the first of ``stops``, or all of them if there is none."""
    return list(itertools.takewhile(lambda token: token not in stops, tokens))
