"""Flip bits of checkpoints and of a converted model, and read them by every way in which a command does.

    python benchmarks/fuzz_flips.py [--flips 400] [--seed 0]

Each flip is refused in one line, harmless (what is read is what was written), silent (something else is read without a
word), or a traceback. The exit code is 1 where one was silent or a traceback. An exported folder is not among them:
safetensors holds no checksums, and a user may edit it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
Reader = Callable[[Path], Any]


def written_by_a_fit() -> Path:
    """A checkpoint of two steps of the tiny model."""
    from lrsa_lit.cli.main import main

    few = ["--trainer.max_steps", "2", "--validate_first", "false", "--trainer.logger", "false"]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        main(["fit", "--config", str(CHECKOUT / "configs/debug/tiny.yaml"), *few])
    return next(Path("runs").rglob("last*.ckpt"))


def sharded(file: Path, folder: Path) -> Path:
    """The checkpoint as devices that share a model would have written it."""
    import torch

    from lrsa_lit.strategies import FullySharded

    FullySharded().save_checkpoint(torch.load(file, weights_only=True), folder)
    return folder


def converted_model(gguf: Path) -> Path:
    """The folder of a GGUF file, or of what stands for one: the conversion gives the tiny model."""
    from lrsa_lit.models import gguf as module
    from lrsa_lit.models.tiny import tiny_model, tiny_tokenizer

    def convert(path: Path, folder: Path) -> None:
        tiny_model().save_pretrained(folder), tiny_tokenizer().save_pretrained(folder)

    module._convert = convert
    return module.converted(gguf)


def readers() -> dict[str, tuple[str, Reader]]:
    """By name: what is read, and how a command does it."""
    from lrsa_lit.checkpoints import AtomicCheckpointIO, resume
    from lrsa_lit.models.checkpoint import load_trained
    from lrsa_lit.models.shards import read_weights
    from lrsa_lit.models.sources import trained_model
    from lrsa_lit.strategies import FullySharded

    def ask(path: Path) -> Any:
        trained = trained_model(str(path), "float32")
        return trained.rule, trained.build().state_dict()

    def export(path: Path) -> Any:
        trained = load_trained(path)
        return trained.rule, trained.build().state_dict()

    def test(path: Path) -> Any:
        resume.named(path)
        if path.is_dir():
            content = FullySharded().load_checkpoint(path)
            return {**content, "state_dict": read_weights(path)}
        return AtomicCheckpointIO().load_checkpoint(path)

    def fit(path: Path) -> Any:
        content, about = test(path), resume.about(path)
        resume.check_continues(path, about, about.settings or {}, about.processes or 1, about.step)
        return content, about

    def last(path: Path) -> Any:
        found = resume.last([path.parent], settings)
        return found and test(found)

    def backbone(path: Path) -> Any:
        from lrsa_lit.models import Backbone

        return Backbone(str(converted_model(Path("model.gguf")))).build().state_dict()

    settings = resume.about(next(Path("runs").rglob("last*.ckpt"))).settings or {}
    of_file = {"ask": ask, "export": export, "test": test, "fit": fit, "fit last": last}
    return (
        {f"file: {name}": ("flipped.ckpt", reader) for name, reader in of_file.items()}
        | {f"folder: {name}": ("shards.ckpt", reader) for name, reader in of_file.items()}
        | {"converted": ("converted", backbone)}
    )


def same(found: Any, expected: Any) -> bool:
    """Whether two nests of values are equal."""
    import torch

    if isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and list(found) == list(expected)
            and all(same(found[key], expected[key]) for key in expected)
        )
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


def outcome(reader: Reader, path: Path, expected: Any) -> str:
    """What comes of reading what was flipped."""
    from lrsa_lit.errors import UserError

    try:
        found = reader(path)
    except UserError as error:
        return "refused" if "\n" not in str(error) else "traceback"
    except Exception:
        traceback.print_exc()
        return "traceback"
    return "harmless" if same(found, expected) else "silent"


def flip(source: Path, target: Path, draw: random.Random) -> str:
    """Copy a file or folder with one bit flipped, each byte as likely as another; returns which one."""
    shutil.rmtree(target, ignore_errors=True)
    target.unlink(missing_ok=True)
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    files = sorted(path for path in target.rglob("*") if path.is_file()) if target.is_dir() else [target]
    # Small files decide as much as large ones: half of the flips are spread evenly over the files.
    weights = [path.stat().st_size if draw.random() < 0.5 else 1 for path in files]
    path = draw.choices(files, [max(weight, 1) for weight in weights])[0]
    content = bytearray(path.read_bytes())
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name}, byte {place}, bit {bit}"


def run(flips: int, seed: int) -> int:
    """Flip and read; returns how many were silent or tracebacks."""
    file = written_by_a_fit()
    Path("model.gguf").write_bytes(b"stands for a model")
    folder = converted_model(Path("model.gguf"))
    Path("flipped").mkdir()
    sources = {"flipped.ckpt": file, "shards.ckpt": sharded(file, Path("shards.ckpt"))}
    sources["converted"] = Path(shutil.copytree(folder, "converted"))
    found = readers()
    expected = {
        name: copy.deepcopy(reader(sources[source] if "last" not in name else _alone(sources[source])))
        for name, (source, reader) in found.items()
    }
    counts: dict[str, Counter[str]] = {name: Counter() for name in found}
    draw = random.Random(seed)
    for number in range(flips):
        for source, original in sources.items():
            target = folder if source == "converted" else Path("flipped", "x.ckpt")
            where = flip(original, target, draw)
            for name, (of, reader) in found.items():
                if of == source:
                    what = outcome(reader, target, expected[name])
                    counts[name][what] += 1
                    if what in ("silent", "traceback"):
                        print(f"{name}: {what}: flip {number}: {where}")
    for name, count in counts.items():
        kinds = ("refused", "harmless", "silent", "traceback")
        print(f"{name:<16}" + "".join(f"{count[kind]:>6} {kind}" for kind in kinds))
    return sum(count["silent"] + count["traceback"] for count in counts.values())


def _alone(path: Path) -> Path:
    """The checkpoint in a folder of its own, as ``--ckpt_path last`` finds it."""
    target = Path("alone") / f"{path.stem}-alone.ckpt"
    shutil.rmtree("alone", ignore_errors=True)
    target.parent.mkdir()
    shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        os.environ["LRSA_CACHE_DIR"] = str(Path(scratch, "cache"))
        import transformers

        transformers.utils.logging.disable_progress_bar()
        logging.disable(logging.ERROR)
        bad = run(options.flips, options.seed)
        os.chdir(CHECKOUT)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
