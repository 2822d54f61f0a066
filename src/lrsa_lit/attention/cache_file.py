"""Cache files: safetensors with a digest of the whole content. A damaged file is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrsa_lit.attention.cache_layer import Past
from lrsa_lit.errors import UserError, message_of
from lrsa_lit.io import write_atomically
from lrsa_lit.ops.sparse_attention import Held

FORMAT = "lrsa-cache-1"
"""The format name in the header; it ends with the version."""
_DIGEST = "sha256"


class Saved(NamedTuple):
    """The verified content of a file.

    Attributes:
        path: the file.
        header: the digest of the ``model``, the ``rule``, the digest of the ``tokens`` that the rows have seen,
            ``notes``, and the structure (``pasts``) of the tensors.
        tensors: tensors by name, on the CPU.
    """

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    def check_tokens(self, rows: Iterable[Sequence[int]]) -> None:
        """Raise a UserError unless these are the tokens that each row has seen."""
        if token_digest(rows) != self.header["tokens"]:
            raise refused(self.path, "was made from another text, or with another tokenizer or chat template")

    def pasts(self, device: torch.device) -> list[Past]:
        """The content of each layer, on ``device``."""
        held = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        pasts = []
        for layer, (rows, columns, token_bytes, seen, streams) in enumerate(self.header["pasts"]):
            parts = [
                [_of_part(held, f"{layer}.{stream}.{part}.", kinds) for part, kinds in enumerate(of_stream)]
                for stream, of_stream in enumerate(streams)
            ]
            pasts.append(Past(rows, columns, token_bytes, seen, parts))
        return pasts


def token_digest(rows: Iterable[Sequence[int]]) -> str:
    """SHA-256 of the token ids of each row."""
    return hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()


def write(path: Path, header: Mapping[str, Any], tokens: Sequence[Sequence[int]], pasts: Sequence[Past]) -> None:
    """Write a file. It appears under its name only when it is complete.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _named(pasts)}
    # For each part, the number of its tensors of each kind.
    numbers = [
        (*past[:4], [[{kind: len(each) for kind, each in part.items()} for part in parts] for parts in past.held])
        for past in pasts
    ]
    values = {"format": FORMAT, "tokens": token_digest(tokens), "pasts": numbers} | dict(header)
    told = {name: json.dumps(value) for name, value in values.items()}
    content = save(tensors, told | {_DIGEST: _digest(told, tensors)})
    write_atomically(path, lambda file: file.write(content))


def read(path: Path) -> Saved:
    """Read and verify a file that :func:`write` wrote.

    Raises:
        UserError: the file cannot be read, is not a saved cache, has another format version, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            told = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        reason = f"cannot be read as a saved cache ({message_of(error)[:120]})"
        raise UserError("cache", str(path), reason=reason) from None
    digest = told.pop(_DIGEST, None)
    if (found := told.get("format")) != json.dumps(FORMAT):
        what = f"has the format {found[:40]}" if found else "is not a saved cache"
        raise UserError("cache", str(path), reason=f"{what}; only {FORMAT!r} is allowed")
    if digest != _digest(told, tensors):
        raise refused(path, "is altered or damaged (its digest does not match)")
    return Saved(path, {name: json.loads(value) for name, value in told.items()}, tensors)


def refused(path: Path, reason: str) -> UserError:
    """The error for a file that cannot be used."""
    return UserError("cache", str(path), reason=reason, hint="remove it or choose another path to make a new one")


def _named(pasts: Sequence[Past]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all layers with their names."""
    for layer, past in enumerate(pasts):
        for stream, parts in enumerate(past.held):
            for part, held in enumerate(parts):
                for kind, tensors in held.items():
                    for number, tensor in enumerate(tensors):
                        yield f"{layer}.{stream}.{part}.{kind}.{number}", tensor


def _of_part(named: Mapping[str, Tensor], prefix: str, kinds: Mapping[str, int]) -> Held:
    return {kind: tuple(named[f"{prefix}{kind}.{number}"] for number in range(count)) for kind, count in kinds.items()}


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
