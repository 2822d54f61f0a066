"""GGUF files converted once into a Hugging Face folder, which loads in seconds instead of a minute."""

from __future__ import annotations

import logging
import shutil
import struct
import tempfile
from pathlib import Path

from lrsa_lit.errors import UserError
from lrsa_lit.paths import cache_dir, sha256_of

_log = logging.getLogger(__name__)


def converted(path: Path) -> Path:
    """The folder of the de-quantised model and its tokenizer, made on the first call.

    The folder is named by the file's hash and appears only when it is complete.

    Args:
        path: a GGUF file; its weights are de-quantised to float32.

    Raises:
        UserError: the file is not a GGUF model that transformers can read, or the cache cannot be written.
    """
    target = cache_dir("models", f"{path.stem}-{sha256_of(path)[:12]}")
    if target.is_dir():
        return target
    _log.info("converting %s once into %s (up to a minute)", path.name, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UserError(f"LRSA_CACHE_DIR: {target.parent} cannot be written ({error.strerror})") from None
    try:
        _convert(path, scratch)
        scratch.chmod(0o755)
        scratch.rename(target)
    except OSError:
        # Another process may have finished the same conversion first.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(path: Path, folder: Path) -> None:
    """Write the model and tokenizer; transformers shows the progress."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    try:
        AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            dtype=torch.float32,
            # Without it the model stays quantised and cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(folder)
    except (ValueError, KeyError, IndexError, NotImplementedError, RuntimeError, struct.error) as error:
        raise UserError(f"model.backbone.source: {path} cannot be read as a GGUF model ({error})") from error
