"""Records of the tokens that layers kept, in a file format that can be read without the model and PyTorch.

Dimensions: N layers with LRSA, H key-value heads, T tokens of a sample, P compressed partitions, K top_k.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lrsa_lit.errors import UserError, message_of
from lrsa_lit.io import write_atomically

SCHEMA = 1
"""Version of the file format; other versions cannot be read."""

Span: TypeAlias = tuple[int, int]

_HEADER = "header"


@dataclass(frozen=True, eq=False)
class Sample:
    """One text, and the tokens that the layers with LRSA kept of it when its last token was processed.

    Attributes:
        id: the example's id.
        token_ids: (T,) int32, without padding.
        gold_spans: positions [start, end) of the supporting passages.
        answer_spans: positions [start, end) of the answers in those passages.
        positions: (N, H, P, K) int32, counted from the first token, ascending within a partition.
        scores: (N, H, P, K) float32, the scores of those tokens; files keep three digits. Tokens were ranked by the
            logarithm of the score, which distinguishes tokens whose scores are 0 in float32.
    """

    id: str
    token_ids: NDArray[np.int32]
    gold_spans: tuple[Span, ...]
    answer_spans: tuple[Span, ...]
    positions: NDArray[np.int32]
    scores: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SelectionRecord:
    """The tokens that a model with one set of weights kept of some samples under one rule.

    Attributes:
        samples: the samples, at least one, all with the same layers and heads.
        rule: the rule, as returned by ``LRSAConfig.to_dict``.
        model: name of the model.
        digest: digest of the model's shape, twelve hex digits; records with the same digest are comparable.
        step: number of training steps of the weights.
        texts: the text of each token id that occurs.
        layers: indices of the N layers with LRSA.
    """

    samples: tuple[Sample, ...]
    rule: Mapping[str, Any]
    model: str
    digest: str
    step: int
    texts: Mapping[int, str]
    layers: Sequence[int]

    @property
    def chance(self) -> float:
        """K/L, the share of tokens that a head with random selection keeps."""
        return float(self.rule["top_k"] / self.rule["lag_size"])

    def compressed(self, sample: Sample) -> slice:
        """The tokens in compressed partitions: after the sinks, before the raw window."""
        start = self.rule["sink_size"]
        return slice(start, start + sample.positions.shape[2] * self.rule["lag_size"])

    def kept(self, sample: Sample) -> NDArray[np.bool_]:
        """(N, H, P L): which of the :meth:`compressed` tokens each head kept."""
        positions, region = sample.positions, self.compressed(sample)
        kept = np.zeros((*positions.shape[:2], region.stop - region.start), dtype=bool)
        np.put_along_axis(kept, positions.reshape(*kept.shape[:2], -1) - region.start, True, axis=-1)
        return kept

    def all_kept(self) -> NDArray[np.bool_]:
        """(N, H, tokens): :meth:`kept` of all samples, concatenated."""
        return np.concatenate([self.kept(sample) for sample in self.samples], axis=2)

    def tokens(self, sample: Sample) -> list[str]:
        """The text of each token (T)."""
        return [self.texts[int(token)] for token in sample.token_ids]

    def save(self, path: Path) -> None:
        """Write the record atomically."""
        header: dict[str, Any] = {"schema": SCHEMA}
        header |= {name: getattr(self, name) for name in ("rule", "model", "digest", "step", "texts")}
        header["layers"] = [index in self.layers for index in range(max(self.layers) + 1)]
        names = ("id", "gold_spans", "answer_spans")
        header["samples"] = [{name: getattr(sample, name) for name in names} for sample in self.samples]
        arrays: dict[str, NDArray[Any]] = {_HEADER: np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
        for index, sample in enumerate(self.samples):
            arrays[f"tokens{index}"] = _smallest(sample.token_ids)
            # Positions relative to the partition mostly fit into a byte.
            arrays[f"places{index}"] = _smallest(sample.positions - _starts(self.rule, sample.positions))
            arrays[f"scores{index}"] = _halved(sample.scores)
        write_atomically(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> SelectionRecord:
        """Read a record.

        Raises:
            UserError: the file does not exist, is not a record, is truncated, or has another version of the format.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                header = json.loads(file[_HEADER].tobytes())
                if header["schema"] != SCHEMA:
                    version = f"a selection record of version {header['schema']}; only {SCHEMA} can be read here"
                    raise UserError(str(path), reason=version)
                samples = tuple(
                    _sample(file, index, about, header["rule"]) for index, about in enumerate(header["samples"])
                )
        except FileNotFoundError:
            raise UserError(str(path), reason="no such file") from None
        except UserError:
            raise
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            reason = message_of(error)[:80]
            raise UserError(str(path), reason=f"not a selection record, or a truncated one ({reason})") from None
        texts = {int(token): text for token, text in header["texts"].items()}
        layers = [index for index, compressed in enumerate(header["layers"]) if compressed]
        return cls(samples, header["rule"], header["model"], header["digest"], header["step"], texts, layers)


def check_comparable(first: SelectionRecord, second: SelectionRecord) -> None:
    """Raise a UserError if two records differ in model shape, compressed layers or samples."""
    if first.digest != second.digest:
        models = " and ".join(f"{record.model} ({record.digest})" for record in (first, second))
        raise UserError("selections", reason=f"recorded with {models}; only records of one model can be compared")
    if first.layers != second.layers:
        layers = f"{first.layers} and {second.layers}"
        raise UserError("selections", reason=f"layers {layers} were compressed; they must be the same")
    ids = [[sample.id for sample in record.samples] for record in (first, second)]
    if ids[0] != ids[1]:
        samples = " and ".join(", ".join(each[:3]) + (", …" if len(each) > 3 else "") for each in ids)
        raise UserError("selections", reason=f"recorded of the samples {samples}; they differ")
    for one, other in zip(first.samples, second.samples, strict=True):
        if not np.array_equal(one.token_ids, other.token_ids):
            raise UserError("selections", reason=f"sample {one.id} has other tokens in the two records")


def _sample(file: Any, index: int, about: Mapping[str, Any], rule: Mapping[str, Any]) -> Sample:
    if f"places{index}" in file:
        places = file[f"places{index}"]
        positions = places + _starts(rule, places)
    else:
        # Older files have absolute positions.
        positions = file[f"positions{index}"]
    return Sample(
        id=about["id"],
        token_ids=file[f"tokens{index}"].astype(np.int32),
        gold_spans=tuple(map(tuple, about["gold_spans"])),
        answer_spans=tuple(map(tuple, about["answer_spans"])),
        positions=positions.astype(np.int32),
        scores=file[f"scores{index}"].astype(np.float32),
    )


def _starts(rule: Mapping[str, Any], positions: NDArray[Any]) -> NDArray[Any]:
    """(P, 1): the first token of each partition of positions (N, H, P, K)."""
    starts: NDArray[Any] = rule["sink_size"] + rule["lag_size"] * np.arange(positions.shape[2])[:, None]
    return starts


def _halved(scores: NDArray[np.float32]) -> NDArray[Any]:
    """Scores as float16 (three digits), unless one is too large for it."""
    largest = np.finfo(np.float16).max
    return scores.astype(np.float16) if np.abs(scores).max(initial=0.0) <= largest else scores


def _smallest(values: NDArray[Any]) -> NDArray[Any]:
    """The same non-negative integers in the smallest dtype that holds them."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))
