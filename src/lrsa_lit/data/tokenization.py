"""Text to token ids, so that what a user has written never becomes a control token of the model."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from lrsa_lit.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Span: TypeAlias = tuple[int, int]

# No text can hold it by chance or by intent; a new one in each process, which no token depends on.
_MARK = f"\ufdd0{secrets.token_hex(16)}\ufdd1"


@dataclass(frozen=True)
class Tokens:
    """The ids of a text's tokens, and the character span [start, end) of each."""

    ids: list[int]
    offsets: list[Span]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, user: Sequence[Span] | None = None) -> Tokens:
    """Tokenise a text in one piece; special tokens are recognised only outside of what the user has written.

    A text whose user spans hold no special token's string has the ids that ``tokenizer(text,
    add_special_tokens=False)`` gives. ``user`` are the character spans [start, end) of the user's text, such as
    :func:`~lrsa_lit.data.messages.render_messages` returns; None where it is all of the text.

    Raises:
        UserError: the tokenizer's vocabulary has no other way to write a special token's string.
    """
    # Not verbose: it would warn that a long text is longer than the tokenizer's idea of the model.
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found = Tokens(encoding["input_ids"], encoding["offset_mapping"])
    spans = [(0, len(text))] if user is None else user
    if not (wrong := _special_in_text(tokenizer, text, found, spans)):
        return found
    control = [place for place in _special(tokenizer, found) if place not in wrong]
    plain = _encode_around(tokenizer, text, found, control, cuts=[])
    if wrong := _special_in_text(tokenizer, text, plain, spans):
        # The vocabulary itself holds the string, so only its parts are ordinary tokens.
        cuts = [_core(text, plain.offsets[place])[1] - 1 for place in wrong]
        plain = _encode_around(tokenizer, text, found, control, cuts)
        if wrong := _special_in_text(tokenizer, text, plain, spans):
            start, end = plain.offsets[wrong[0]]
            raise UserError("tokenizer", reason=f"it can write {text[start:end]!r} only as a special token")
    return plain


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """How many tokens :func:`encode_text` makes of each of a user's texts."""
    special = special_ids(tokenizer)
    rows = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    pairs = zip(texts, rows, strict=True)
    return [len(row if special.isdisjoint(row) else encode_text(tokenizer, text).ids) for text, row in pairs]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of all special tokens, named by the tokenizer or not."""
    unnamed = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {*tokenizer.all_special_ids, *unnamed}


def _special(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> list[int]:
    special = special_ids(tokenizer)
    return [place for place, number in enumerate(tokens.ids) if number in special]


def _special_in_text(tokenizer: PreTrainedTokenizerBase, text: str, tokens: Tokens, spans: Sequence[Span]) -> list[int]:
    """Places of the special tokens that a user's text has become, in whole or in part."""
    found = []
    for place in _special(tokenizer, tokens):
        first, last = _core(text, tokens.offsets[place])
        # The unknown token mostly stands for characters that the vocabulary lacks, not for its own string.
        written = tokens.ids[place] != tokenizer.unk_token_id or text[first:last] == str(tokenizer.unk_token)
        if written and any(first < end and start < last for start, end in spans):
            found.append(place)
    return found


def _core(text: str, span: Span) -> Span:
    """A token's span without the white space around it, which some special tokens take in from their neighbours."""
    found = text[slice(*span)]
    if not found.strip():
        return span
    return span[0] + len(found) - len(found.lstrip()), span[1] - len(found) + len(found.rstrip())


def _encode_around(
    tokenizer: PreTrainedTokenizerBase, text: str, found: Tokens, control: Sequence[int], cuts: Sequence[int]
) -> Tokens:
    """Tokenise a text in which only the special tokens at the places ``control`` of those ``found`` are such.

    Each of them is replaced by a mark, which splits the text as the token does, and the marks by the tokens again. So
    are the positions ``cuts`` in the text, which no token reaches over.
    """
    kept = {found.offsets[place]: found.ids[place] for place in control}
    parts = sorted([*kept, *((cut, cut) for cut in cuts)])
    marker = _marker(tokenizer, len(tokenizer))
    mark = marker.token_to_id(_MARK)
    starts, ends = [start for start, _ in parts], [end for _, end in parts]
    marked = _MARK.join(text[start:end] for start, end in zip([0, *ends], [*starts, len(text)], strict=True))
    encoding = marker.encode(marked, add_special_tokens=False)
    ids, offsets, shift = [], [], 0
    remaining = iter(parts)
    for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if number != mark:
            ids.append(number)
            offsets.append((start - shift, end - shift))
            continue
        part = next(remaining)
        shift = end - part[1]
        if part in kept:
            ids.append(kept[part])
            offsets.append(part)
    return Tokens(ids, offsets)


@functools.lru_cache(maxsize=4)
def _marker(tokenizer: PreTrainedTokenizerBase, size: int) -> Tokenizer:
    """A copy of the fast tokenizer, which has so many tokens by now, that knows the mark and no special token."""
    from tokenizers import AddedToken, Tokenizer

    marker = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    marker.no_padding()
    marker.no_truncation()
    marker.encode_special_tokens = True
    marker.add_tokens([AddedToken(_MARK, normalized=False, special=False)])
    return marker
