"""Decode the text of an answer token by token, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextStream:
    """Incremental decoding. Text is returned once no later token can change it and no stop text can begin in it.

    Args:
        tokenizer: the model's tokenizer, a fast one.
        stops: the answer ends before the first of these texts.

    Attributes:
        stopped: whether a stop text was found. No more text follows then.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._stops = tokenizer, stops
        self._decoding = DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._decoded = self._held = ""
        self.stopped = False

    @property
    def tokens(self) -> int:
        """The number of tokens pushed."""
        return len(self._ids)

    def push(self, token: int) -> str:
        """Add a token; returns the new text that is now final."""
        assert not self.stopped
        self._ids.append(token)
        text = self._decoding.step(self._tokenizer.backend_tokenizer, token) or ""  # type: ignore[attr-defined]
        self._decoded += text
        return self._released(text)

    def end(self) -> str:
        """The rest of the text after the last token."""
        if self.stopped:
            return ""
        # The tokenizer decodes incomplete characters at the end.
        whole = str(self._tokenizer.decode(self._ids))
        text = self._released(whole[len(self._decoded) :] if whole.startswith(self._decoded) else "")
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _released(self, new: str) -> str:
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` with which ``stop`` begins; the whole stop does not count."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
