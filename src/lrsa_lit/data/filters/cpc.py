"""Sentences that are most similar to the question, by the embeddings of a trained encoder.

Source: CPC, Liskavets et al., "Prompt Compression with Context-Aware Sentence Encoding for Fast and Improved LLM
Inference", arXiv 2409.01227.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lrsa_lit.bounds import check_setting, is_integer
from lrsa_lit.data.filters.sentence_filter import SentenceFilter
from lrsa_lit.data.filters.sentences import Sentence
from lrsa_lit.data.records import QARecord
from lrsa_lit.data.tokenization import encode_texts
from lrsa_lit.errors import UserError, message_of, named
from lrsa_lit.io import sha256_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_NOWHERE = -2.0
"""Below any cosine."""


@dataclass(frozen=True)
class CPC(SentenceFilter):
    """Keep the sentences nearest to the question, by an encoder that reads each sentence in its context.

    The encoder is a base LLM without its causal mask, trained by ``lrsa fit`` with the task sentence_retrieval. It is
    loaded when the first context is filtered. The result depends on the checkpoint's content, not its path.

    Args:
        checkpoint: checkpoint of that fit (.ckpt).
        max_tokens: maximum tokens per encoder pass; longer contexts are read in chunks. Null: the length of the
            training. A longer sentence is read in pieces, and its nearest piece counts.
        dtype: dtype of the encoder's weights.
        device: device of the encoder, for example cuda:1; null uses a GPU if there is one.
    """

    checkpoint: str = field(kw_only=True)
    max_tokens: int | None = field(default=None, kw_only=True)
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", kw_only=True)
    device: str | None = field(default=None, kw_only=True)

    asks = True

    def __post_init__(self) -> None:
        """Check the settings; the checkpoint is read when it is needed."""
        super().__post_init__()
        valid = self.max_tokens is None or (is_integer(self.max_tokens) and self.max_tokens >= 1)
        check_setting("max_tokens", self.max_tokens, valid, "an integer >= 1, or null for the length of the training")

    def scores(self, record: QARecord, sentences: Sequence[Sentence]) -> list[float]:
        """Cosine similarity of each sentence and the question; a passage's first sentence is read with its title.

        Raises:
            UserError: the checkpoint is not that of an encoder, or the device cannot be used.
        """
        from lrsa_lit.models.sentence_encoder import embeddings

        place = _place(self.device)
        with named("checkpoint"):
            encoder = _encoder(self.checkpoint, _stamp(self.checkpoint), self.dtype, place)
        most = self.max_tokens or encoder.max_tokens
        pieces: list[list[int]] = []
        owners: list[int] = []
        texts = [(each.titled if each.first else each.text).strip() for each in sentences]
        question, *rows = encode_texts(encoder.tokenizer, [record.question.strip(), *texts])
        for number, ids in enumerate(rows):
            cut = [ids[start : start + most] for start in range(0, len(ids), most)]
            pieces += cut
            owners += [number] * len(cut)
        asked, found = embeddings(encoder.model, [[question[:most]], pieces], most)
        best = [_NOWHERE] * len(sentences)
        for owner, cosine in zip(owners, (found @ asked[0]).tolist(), strict=True):
            best[owner] = max(best[owner], cosine)
        return best

    def sources(self) -> dict[str, str]:
        """Empty: the checkpoint is in :attr:`key` by its content, not by its path."""
        return {}

    @property
    def key(self) -> dict[str, object]:
        """The cache key: settings, code and the checkpoint's content, without its path and the device.

        Raises:
            UserError: the checkpoint is not that of an encoder.
        """
        from lrsa_lit.models import sentence_encoder

        key, settings = super().key, self.to_dict()["init_args"]
        del settings["checkpoint"], settings["device"]
        with named("checkpoint"):
            digest = _digest(self.checkpoint, _stamp(self.checkpoint))
        code = sha256_of(Path(sentence_encoder.__file__))
        return {**key, "init_args": settings, "checkpoint": digest, "encoder": code}


class _Encoder(NamedTuple):
    model: Any
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int


def _stamp(checkpoint: str) -> object:
    """Size, modification time and inode of the file, which change if it is replaced; None if there is no file."""
    try:
        about = Path(checkpoint).expanduser().stat()
    except OSError:
        return None
    return about.st_size, about.st_mtime_ns, about.st_ino


def _place(device: str | None) -> torch.device:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError("device", device, reason=f"cannot be used ({message_of(error)[:100]})") from error


@functools.lru_cache(maxsize=1)
def _encoder(checkpoint: str, stamp: object, dtype: str, place: torch.device) -> _Encoder:
    """Load the encoder of a checkpoint; it stays loaded until another one is requested."""
    import torch

    from lrsa_lit.models.checkpoint import load_trained, typed
    from lrsa_lit.models.sentence_encoder import remove_causal_mask

    trained = load_trained(Path(checkpoint), dtype, encodes=True)
    max_tokens: int = typed(int, (trained.encoder or {}).get("max_tokens"), "encoder.max_tokens")
    # Building draws random adapter weights before loading them. Restore the random state, so that a run has the same
    # random numbers whether or not contexts are cached.
    with torch.random.fork_rng(devices=[]):
        model = trained.build().to(place).eval()
    remove_causal_mask(model)
    return _Encoder(model, trained.tokenizer, max_tokens)


@functools.lru_cache(maxsize=8)
def _digest(checkpoint: str, stamp: object) -> str:
    """Digest of the content of the checkpoint and its base model, independent of their paths."""
    from lrsa_lit.models.checkpoint import load_trained
    from lrsa_lit.models.identity import digest_of

    return digest_of(checkpoint, load_trained(Path(checkpoint), encodes=True))
