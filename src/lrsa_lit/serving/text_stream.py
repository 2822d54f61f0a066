"""The text of an answer as its tokens come, up to where it is to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextStream:
    """Text is handed out once no later token changes it and no stop can begin in it.

    Args:
        tokenizer: of the model, a fast one.
        stops: texts before which the answer ends.

    Attributes:
        tokens: that were pushed.
        stopped: whether one of the stops was found; nothing comes behind it.
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
        """How many were pushed."""
        return len(self._ids)

    def push(self, token: int) -> str:
        """What can be handed out of the text once another token is there."""
        assert not self.stopped
        self._ids.append(token)
        text = self._decoding.step(self._tokenizer.backend_tokenizer, token) or ""  # type: ignore[attr-defined]
        self._decoded += text
        return self._released(text)

    def end(self) -> str:
        """The rest of the text, once no token comes any more."""
        if self.stopped:
            return ""
        # Bytes that are no whole character are shown as the tokenizer shows them.
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
    """The longest end of a text that a stop begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
