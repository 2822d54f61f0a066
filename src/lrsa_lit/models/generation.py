"""How answers are decoded, wherever this project generates."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Plain greedy decoding, whatever the model's own generation_config.json says."""


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer, ascending: every special one.

    A model that begins another message has ended this one, even if it left out the end-of-sequence token.
    """
    return sorted(tokenizer.all_special_ids)


def before_stop(tokens: Iterable[int], stops: Container[int]) -> list[int]:
    """Generated tokens up to the first of ``stops``, which is not among them; all of them if none is there."""
    return list(itertools.takewhile(lambda token: token not in stops, tokens))
