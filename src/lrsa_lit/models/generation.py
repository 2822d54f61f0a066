"""Where a generated answer ends."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer, ascending: every special one, named by the tokenizer or not.

    What a model writes behind one is no part of its answer, even if it left out the end-of-sequence token: it begins
    another message, or a text of another kind. Decoding hides such a token, and nothing would tell the two apart.
    """
    unnamed = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return sorted({*tokenizer.all_special_ids, *unnamed})


def before_stop(tokens: Iterable[int], stops: Container[int]) -> list[int]:
    """Generated tokens up to the first of ``stops``, which is not among them; all of them if none is there."""
    return list(itertools.takewhile(lambda token: token not in stops, tokens))
