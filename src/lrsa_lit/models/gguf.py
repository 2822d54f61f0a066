"""Convert GGUF files once into a Hugging Face folder, which loads in seconds instead of a minute."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from lrsa_lit import verified
from lrsa_lit.errors import UserError
from lrsa_lit.io import sha256_of
from lrsa_lit.models.loading import load_model, pretrained, system_errors
from lrsa_lit.paths import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# Part of the folder's name, so that folders converted by other versions of this code are not reused.
_CODE = sha256_of(Path(__file__))[:8]


def converted(path: Path, sha256: str | None = None) -> Path:
    """The folder with the de-quantised model and its tokenizer, written on the first call.

    The folder's name contains the hashes of the file and of this module. It appears only when it is complete, and is
    written again if it is damaged.

    Args:
        path: a GGUF file; its weights are de-quantised to float32.
        sha256: its SHA-256 in hex, if known.

    Raises:
        UserError: the file is not a GGUF model that transformers can read, or the cache cannot be written.
    """
    target = cache_dir("models", f"{path.stem}-{(sha256 or sha256_of(path))[:12]}-{_CODE}")
    reason = verified.damage(target) if target.is_dir() else None
    if target.is_dir() and reason is None:
        return target
    why = "" if reason is None else f" again, because {reason}"
    _log.info("converting %s once into %s (up to a minute)%s", path.name, target, why)
    try:
        with system_errors():
            verified.build(target, lambda folder: _convert(path, folder))
    except OSError as error:
        raise UserError("LRSA_CACHE_DIR", target, reason=f"cannot be written ({error.strerror or error})") from error
    return target


def _convert(path: Path, folder: Path) -> None:
    """Write the model and the tokenizer; transformers shows the progress."""
    import torch
    from transformers.utils.quantization_config import GgufConfig

    _tokenizer(path).save_pretrained(folder)
    load_model(
        str(path.parent),
        str(path),
        dtype=torch.float32,
        # Otherwise the model stays quantised and cannot be saved.
        quantization_config=GgufConfig(dequantize=True),
        gguf_file=path.name,
    ).save_pretrained(folder)


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the file describes, corrected for all versions of transformers.

    Release 5.17 uses the wrong end-of-sequence token and no pad token, and gives a byte-level BPE parts of Llama's
    pipeline, which decode "▁" as a space.
    """
    from gguf import GGUFReader
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = pretrained(AutoTokenizer, str(path.parent), str(path), gguf_file=path.name)
    fields = {
        name: field.contents() for name, field in GGUFReader(path).fields.items() if name.startswith("tokenizer.")
    }
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (index := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(index))
    if fields.get("tokenizer.ggml.model") == "gpt2":
        backend = tokenizer.backend_tokenizer
        backend.normalizer, backend.decoder = None, decoders.ByteLevel()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe = backend.model
        bpe.unk_token, bpe.fuse_unk, bpe.byte_fallback = None, False, False
        bpe.continuing_subword_prefix = bpe.end_of_word_suffix = ""
    return tokenizer
