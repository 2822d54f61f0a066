"""Tokenisation that never turns a user's text into a control token of the model."""

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

# No text can contain this mark by chance or intent. It is random per process; no token depends on it.
_MARK = f"\ufdd0{secrets.token_hex(16)}\ufdd1"


@dataclass(frozen=True)
class Tokens:
    """The ids of a text's tokens, and the character span [start, end) of each."""

    ids: list[int]
    offsets: list[Span]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, user: Sequence[Span] | None = None) -> Tokens:
    """Tokenise a text in one piece; special tokens are recognised only outside of the user's text.

    If the user's text contains no special token's string, the ids are those of
    ``tokenizer(text, add_special_tokens=False)``. ``user`` holds the character spans [start, end) of the user's text,
    as :func:`~lrsa_lit.data.messages.render_messages` returns them; None means the whole text.

    Raises:
        UserError: the tokenizer can encode a special token's string only as the special token.
    """
    # verbose=False suppresses the warning that a text is longer than the tokenizer's maximum.
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found = Tokens(encoding["input_ids"], encoding["offset_mapping"])
    spans = [(0, len(text))] if user is None else user
    if not (wrong := _special_in_text(tokenizer, text, found, spans)):
        return found
    control = [place for place in _special(tokenizer, found) if place not in wrong]
    plain = _encode_around(tokenizer, text, found, control, cuts=[])
    if wrong := _special_in_text(tokenizer, text, plain, spans):
        # The vocabulary also contains the string as an ordinary entry, so cut it into parts.
        cuts = [_core(text, plain.offsets[place])[1] - 1 for place in wrong]
        plain = _encode_around(tokenizer, text, found, control, cuts)
        if wrong := _special_in_text(tokenizer, text, plain, spans):
            start, end = plain.offsets[wrong[0]]
            raise UserError("tokenizer", reason=f"it can write {text[start:end]!r} only as a special token")
    return plain


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The token ids that :func:`encode_text` makes of each of a user's texts, in one call of the tokenizer."""
    if not texts:
        return []
    special = special_ids(tokenizer)
    rows = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    pairs = zip(texts, rows, strict=True)
    return [row if special.isdisjoint(row) else encode_text(tokenizer, text).ids for text, row in pairs]


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Number of tokens that :func:`encode_text` makes of each of a user's texts."""
    return list(map(len, encode_texts(tokenizer, texts)))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of all special tokens, including those without a name in the tokenizer."""
    unnamed = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {*tokenizer.all_special_ids, *unnamed}


def _special(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> list[int]:
    special = special_ids(tokenizer)
    return [place for place, number in enumerate(tokens.ids) if number in special]


def _special_in_text(tokenizer: PreTrainedTokenizerBase, text: str, tokens: Tokens, spans: Sequence[Span]) -> list[int]:
    """Positions of special tokens that come, at least in part, from a user's text."""
    found = []
    for place in _special(tokenizer, tokens):
        first, last = _core(text, tokens.offsets[place])
        # The unknown token usually replaces characters that the vocabulary lacks, and is then no special string.
        written = tokens.ids[place] != tokenizer.unk_token_id or text[first:last] == str(tokenizer.unk_token)
        if written and any(first < end and start < last for start, end in spans):
            found.append(place)
    return found


def _core(text: str, span: Span) -> Span:
    """A token's span without surrounding white space, which some special tokens absorb."""
    found = text[slice(*span)]
    if not found.strip():
        return span
    return span[0] + len(found) - len(found.lstrip()), span[1] - len(found) + len(found.rstrip())


def _encode_around(
    tokenizer: PreTrainedTokenizerBase, text: str, found: Tokens, control: Sequence[int], cuts: Sequence[int]
) -> Tokens:
    """Tokenise a text so that only the special tokens at the positions ``control`` of ``found`` are kept as special.

    Each of them is replaced by a mark, which splits the text as the special token does; afterwards the marks are
    replaced by the tokens. Marks at the text positions ``cuts`` are removed afterwards; no token crosses them.
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
    """A copy of the fast tokenizer that knows the mark and no special tokens; ``size`` is part of the cache key."""
    from tokenizers import AddedToken, Tokenizer

    marker = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    marker.no_padding()
    marker.no_truncation()
    marker.encode_special_tokens = True
    marker.add_tokens([AddedToken(_MARK, normalized=False, special=False)])
    return marker
