"""Write the data sets of a study as token files; needs the libraries that read them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lrsa_lit.data.module import SPLITS, QADataModule
from lrsa_lit.errors import UserError
from lrsa_lit.models import Backbone
from lrsa_lit.paths import check_writable
from lrsa_lit.study import settings, tokens
from lrsa_lit.study.plan import Study
from lrsa_lit.study.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_data(study: Study, folder: Path, only: Collection[str] = ()) -> None:
    """Tokenise those splits of each data set that its ``limit`` names, and say how large they are.

    Args:
        study: whose data sets these are.
        folder: where the files go.
        only: names of data sets; empty for all.

    Raises:
        UserError: no such data set, one that has no limit, or the folder cannot be written.
    """
    if unknown := [name for name in only if name not in study.data_sets]:
        raise UserError(f"--only: there is no data set {unknown[0]!r}; there are {', '.join(study.data_sets)}")
    check_writable("--data", folder, folder)
    tokenizer = settings.called("model.backbone", Backbone, study.common["model"]["backbone"]).tokenizer
    total = 0
    for name in only or study.data_sets:
        try:
            total += _write(name, study.data_sets[name], folder, tokenizer)
        except UserError as error:
            raise UserError(f"data_sets.{name}: {error}") from None
    print(f"total: {total / 2**20:.1f} MiB", flush=True)


def _write(name: str, spec: Settings, folder: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """Write a data set; returns the bytes of its files."""
    module = settings.made({"class_path": spec["class_path"], "init_args": spec.get("init_args") or {}}, QADataModule)
    if not module.limit:
        raise UserError("it must be a data set with init_args.limit, as in {test: 400}")
    module.tokenizer = tokenizer
    total = 0
    for split in (split for split in SPLITS if split in module.limit):
        module.prepare_split(split)
        path = tokens.path_of(folder, name, split)
        written = tokens.write(path, module.open_split(split))
        size = path.stat().st_size
        total += size
        counts = f"{len(written.examples)} examples, {sum(written.lengths):,} tokens"
        print(f"{path}: {counts}, {size / 2**20:.1f} MiB, {written.digest}", flush=True)
    return total
