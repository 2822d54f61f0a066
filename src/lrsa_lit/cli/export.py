"""``lrsa export CKPT --out DIR``: a fit's checkpoint as a folder that transformers loads.

Nothing heavy is imported before the arguments are checked.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit import plugins
from lrsa_lit.cli.arguments import Parser, add_plugins, called, checked
from lrsa_lit.errors import UserError, redacted
from lrsa_lit.models.adapters import check_holdable
from lrsa_lit.models.checkpoint import Trained, load_trained
from lrsa_lit.models.generation_code import write_generation_code
from lrsa_lit.models.hub_upload import check_upload, upload
from lrsa_lit.paths import check_writable, expanded
from lrsa_lit.terminal import PlainConsole, log_to
from lrsa_lit.tracking.store import default_uri, existing_uri, is_new

if TYPE_CHECKING:
    from torch import Tensor

    from lrsa_lit.tracking.model_card import Card

CARD = "README.md"
"""The file name of a model card, as the hub expects it."""

_MODEL_FILES = ("config.json", "adapter_config.json")
"""Every folder that this command writes has one of these files."""

_FLAGS = {
    "model": "CKPT",
    "trust_remote_code": "--trust-remote-code",
    "rope_scaling": "--adapters",
    "low_rank": "--adapters",
    "push": "--push",
    "tracking_uri": "--store",
}
"""The options of this command for arguments of its parts."""
_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 0.15}
"""Largest allowed change of the logits by merging (:func:`lrsa_lit.models.folder.difference`): above the rounding
errors that were measured with large adapters on the tiny model."""

EPILOG = """\
CKPT is a file, or a folder written by several devices (configs/trainer/fsdp.yaml). DIR gets safetensors, the tokenizer
and a config.json with the rule as "lrsa". AutoModelForCausalLM, lrsa ask --model and model.backbone.source load it.
Adapters are merged into the base weights.

--card adds README.md, the model card with scores from the store, and custom_generate/, with which
model.generate(**inputs, custom_generate=DIR, trust_remote_code=True) decodes under the rule.

examples:
  lrsa export runs/1/RUN/checkpoints/last.ckpt --out my-model
  lrsa export runs/1/RUN/checkpoints/last.ckpt --out my-adapters --adapters
  lrsa export runs/1/RUN/checkpoints/last.ckpt --out my-model --card --license apache-2.0 --push ORG/my-model
"""


@called(_FLAGS)
def run(arguments: Sequence[str]) -> None:
    """Run the command; a mistake in the arguments, the checkpoint or the folder is a UserError."""
    options = _parse(arguments)
    options.out = expanded("--out", options.out)
    _check_out(options.out, force=options.force)
    log_to(PlainConsole(stderr=True))
    plugins.load(options.plugins, ["compressors", "systems"])
    trained = load_trained(options.checkpoint, options.dtype, trust_remote_code=options.trust_remote_code)
    if options.adapters:
        if trained.backbone.lora is None:
            raise UserError("--adapters", options.checkpoint, reason="has all weights and no adapters")
        check_holdable(trained.backbone)
    card = _card(trained, options) if options.card else None
    if options.push is not None:
        check_upload(options.push)
    _write(trained, options.out, merge=not options.adapters, card=card)
    kind = "Adapters" if options.adapters else "Model"
    console = PlainConsole()
    console.say(f"{kind} of {options.checkpoint} in {options.out}")
    if options.push is not None:
        console.say(f"Pushed: {upload(options.out, options.push, private=options.private)}")
    ask = ["lrsa", "ask", *plugins.flags_of(options.plugins), "--model", str(options.out), "report.txt"]
    console.say(f"Ask it: {shlex.join(ask)}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("lrsa export", description="Write a checkpoint as a folder that transformers loads.", epilog=EPILOG)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=Path, help="a checkpoint written by a fit")
    add("--out", metavar="DIR", type=Path, required=True, help="the output folder; it appears only when it is complete")
    add("--adapters", action="store_true", help="write only the LoRA adapters, unmerged, in peft's format")
    add("--force", action="store_true", help="replace an existing model in the folder")
    add("--trust-remote-code", action="store_true", help="run code that comes with the base model")
    add_plugins(parser)
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the dtype of the training")
    add("--card", action="store_true", help="add a model card and, if the model has a rule, custom_generate/")
    licence = checked(_licence, "an identifier of the hub in lower case, such as apache-2.0")
    add(
        "--license",
        metavar="ID",
        type=licence,
        help="the card's licence, such as apache-2.0 (default: from the base model's card)",
    )
    store = f"the MLflow store with the run's data and scores, for the card (default: {default_uri()})"
    add("--store", metavar="URI", help=store)
    add("--push", metavar="ORG/NAME", help="upload the folder to the Hugging Face hub")
    add("--private", action="store_true", help="if --push creates the repository, make it private")
    options = parser.parse_args(arguments)
    for flag, of, needed in (
        ("--license", options.license, options.card),
        ("--store", options.store, options.card),
        ("--private", options.private, options.push),
    ):
        if of and not needed:
            raise UserError(flag, reason=f"works only with {'--push' if flag == '--private' else '--card'}")
    return options


def _licence(text: str) -> str:
    """The identifier; the hub refuses a card with any other text."""
    if not re.fullmatch(r"[a-z0-9]+([.+-][a-z0-9.]+)*[+]*", text):
        raise ValueError(text)
    return text


def _check_out(out: Path, *, force: bool) -> None:
    """Refuse to replace anything except a model, and that only with ``--force``."""
    reason = ""
    if out.is_symlink():
        reason = f"is a link to {out.readlink()}; name the folder itself, or remove the link"
    elif out.exists() and not out.is_dir():
        reason = "is not a folder"
    elif Path.cwd().is_relative_to(out.resolve()):
        reason = "contains the working directory and cannot be replaced; name another folder"
    elif out.is_dir() and any(out.iterdir()):
        if not force:
            reason = "is not empty; give another folder, or --force to replace the model in it"
        elif not any((out / name).is_file() for name in _MODEL_FILES):
            reason = "contains no model, and --force replaces only models"
    if reason:
        raise UserError("--out", out, reason=reason)
    check_writable("--out", out, out.absolute().parent)


def _card(trained: Trained, options: argparse.Namespace) -> Card:
    """The content of the model card, with facts of the run if the store has it."""
    from lrsa_lit.checkpoints.resume import writer_of
    from lrsa_lit.tracking.model_card import Card, license_of
    from lrsa_lit.tracking.run_facts import run_facts

    uri, facts = options.store or default_uri(), None
    run_id = writer_of(options.checkpoint)
    if run_id is not None and (options.store or not is_new(uri)):
        facts = run_facts(existing_uri(uri, "--store"), run_id, "--store")
    if facts is None:
        what = "names no run" if run_id is None else f"is from the run {run_id}, which {redacted(uri)} does not have"
        PlainConsole(stderr=True).say(f"{options.checkpoint} {what}: the card has no scores and no data.")
    return Card(
        trained,
        # Not the path, because others read the card.
        options.push or options.out.absolute().name,
        facts,
        options.license or license_of(trained.backbone.source),
        adapters=options.adapters,
        plugins=tuple(options.plugins),
    )


def _write(trained: Trained, out: Path, *, merge: bool, card: Card | None) -> None:
    """Write the trained model with its rule in the config; adapters merged or not."""
    from lrsa_lit.models.folder import AnotherModel, save_folder

    def add(folder: Path) -> None:
        if card is None:
            return
        (folder / CARD).write_text(card.text(), encoding="utf-8")
        if merge and trained.rule is not None:
            write_generation_code(folder)

    try:
        model, expected = _model(trained, merge=merge)
        save_folder(model, trained.tokenizer, out, expected=expected, replace=True, add=add)
    except AnotherModel as error:
        raise UserError("--out", out, reason=f"was not written: {error}") from error
    except OSError as error:
        raise UserError("--out", out, reason=f"cannot be written ({error.strerror or error})") from error


def _model(trained: Trained, *, merge: bool) -> tuple[Any, Tensor | None]:
    """The model to write, and the logits that it must have when it is loaded again; None for adapters."""
    from lrsa_lit.attention import base_of
    from lrsa_lit.models.folder import AnotherModel, difference, logits

    # Merged into weights of 4 bits, most of what the adapters learned would be rounded away.
    model: Any = trained.build(dequantize=merge)
    config = base_of(model).config
    if trained.rule is not None:
        config.lrsa = trained.rule
    elif hasattr(config, "lrsa"):
        del config.lrsa
    if not merge:
        return model, None
    expected = logits(model)
    if trained.backbone.lora is None:
        return model, expected
    _untie(base_of(model))
    merged = model.merge_and_unload()
    found = logits(merged)
    if not (distance := difference(found, expected)) <= _TOLERANCE[trained.backbone.dtype]:
        hint = "" if trained.backbone.dtype == "float32" else "; --dtype float32 rounds less"
        raise AnotherModel(f"with merged adapters its logits differ by {distance:.1%} from the trained ones{hint}")
    return merged, found


def _untie(model: Any) -> None:
    """Untie the output head from the input embeddings if either is adapted: merging changes only one of them."""
    from torch import nn

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    adapted = [hasattr(layer, "base_layer") for layer in (head, embeddings)]
    head, embeddings = (getattr(layer, "base_layer", layer) for layer in (head, embeddings))
    if head is None or head.weight is not embeddings.weight or not any(adapted):
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    # save_pretrained leaves out weights that are listed here as tied.
    model.all_tied_weights_keys = {}
