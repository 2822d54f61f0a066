"""``lrsa ask FILE "question"``: read a text of any length into one cache and answer questions from it.

The text is read before the question, as in the training prompts, so further questions reuse the cache. Each question is
another turn of the same conversation. Nothing heavy is imported before the arguments are checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit.cli.arguments import Parser, called, integer
from lrsa_lit.cli.ask.dialogue import Dialogue
from lrsa_lit.cli.ask.kept_cache import TEXT, keep, read_saved, taken
from lrsa_lit.cli.ask.reader import Answer, Reader
from lrsa_lit.cli.model_options import (
    FLAGS,
    SOURCES,
    add_loading,
    add_rule,
    check_rule,
    check_source,
    default_backbone,
    device_of,
    loaded,
    rule_of,
    trained_of,
)
from lrsa_lit.errors import UserError
from lrsa_lit.paths import check_path
from lrsa_lit.terminal import PlainConsole, log_to

if TYPE_CHECKING:
    from lrsa_lit.attention import LRSAConfig
    from lrsa_lit.models import Backbone

STDIN = "-"
_FLAGS = dict.fromkeys(("model", "source", "tokenizer"), "--model") | FLAGS
"""The options of this command for arguments of its parts."""

EPILOG = """\
The answer is printed while it is generated, then the numbers of tokens that were restored from --cache, that were read,
and that the cache kept. If stdin is a terminal, you can type further questions; an empty line or Ctrl-D ends.

examples:
  lrsa ask docs/extending.md "What is a compressor?"
  lrsa ask --model last.ckpt --top-k 32 book.txt "Who is Ishmael?" "Where does he sail from?"
  lrsa ask --cache book.lrsa book.txt "Who is Ishmael?"
  lrsa ask --cache book.lrsa "Where does he sail from?"
  pdftotext paper.pdf - | lrsa ask --json - "What is the main result?"
"""


@called(_FLAGS)
def run(arguments: Sequence[str]) -> None:
    """Run the command; a mistake in the arguments, the text or the model is a UserError."""
    options = _parse(arguments)
    saved = read_saved(options.cache)
    text = saved.header["notes"][TEXT] if saved is not None and options.file is None else read_text(options.file)
    notes = PlainConsole(stderr=True, soft_wrap=True)
    log_to(notes)
    device = device_of(options)
    trained = trained_of(options, device)
    tokenizer = trained.tokenizer
    dialogue = Dialogue(tokenizer, text)
    # Without a question yet, check with a short one.
    _check_length(trained.backbone, dialogue, options.questions or ["?"], options)
    rule = rule_of(trained, options, notes)
    if options.cache is not None and rule is not None and rule.system is not None:
        reason = f"is not allowed: {type(rule.system).__name__} keeps more than keys and values, which cannot be saved"
        raise UserError("--cache", reason=reason)
    model = loaded(trained, rule, device)
    cache = taken(saved, model, dialogue) if saved is not None else _empty_cache(model, rule)
    reader = Reader(model, cache, tokenizer, dialogue, options.max_new_tokens)
    if saved is None:
        reader.read(notes)
        keep(options.cache, model, cache, dialogue, text)
    for question in _questions(options, notes):
        try:
            _check_length(trained.backbone, dialogue, [question], options)
        except UserError as error:
            # Only a typed question can fail here, because the given ones were checked together.
            notes.say(f"lrsa: {error}")
            continue
        if len(options.questions) > 1 and not options.json:
            print(f"> {question}", flush=True)
        answer = reader.answer(question, show=not options.json)
        print(_json(answer) if options.json else answer.summary(), flush=True)


def _json(answer: Answer) -> str:
    # Characters that stdout cannot encode would be escaped in a way that is not valid JSON.
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    return json.dumps(dataclasses.asdict(answer), ensure_ascii=not unicode)


def read_text(name: str) -> str:
    """The text of a UTF-8 file, or of stdin for ``-``, without surrounding white space."""
    shown = _shown(name)
    check_path("FILE", name)
    try:
        # A byte order mark is not part of the text.
        text = _read(name).decode("utf-8-sig").strip()
    except OSError as error:
        raise UserError("FILE", shown, "a text file, or -", reason=f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError("FILE", shown, reason=f"is not UTF-8 text (byte {error.start}); only that is allowed") from None
    if "\0" in text:
        raise UserError("FILE", shown, "UTF-8 text, not UTF-16 or a binary file", reason="contains NUL characters")
    if not text:
        raise UserError("FILE", shown, reason="is empty; it must contain the text that the question is about")
    return text


def _read(name: str) -> bytes:
    if name == STDIN:
        if sys.stdin is None:
            raise UserError("FILE", reason="stdin is closed; name a file, or pipe the text into this command")
        return sys.stdin.buffer.read()
    path = Path(name)
    # The shell's <(…) is a pipe, which is allowed. Some devices never end.
    if path.is_char_device() or path.is_block_device():
        raise UserError("FILE", path, "a text file, or -", reason="is a device")
    return path.read_bytes()


def _shown(name: str) -> str:
    return "stdin" if name == STDIN else name


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    about = "Answer questions about a text of any length from a compressed cache."
    parser = Parser("lrsa ask", description=about, epilog=EPILOG)
    add = parser.add_argument
    add("file", metavar="FILE", nargs="?", help="the text in UTF-8; - reads it from stdin")
    add(
        "questions",
        metavar="QUESTION",
        nargs="*",
        type=str,
        help="answered in order; each question may refer to earlier ones",
    )
    add("--model", metavar="SOURCE", help=f"{SOURCES} (default: {default_backbone()['source']})")
    kept = "save the text's cache to this file; if it exists, load it instead, and FILE may be left out"
    add("--cache", metavar="PATH", help=kept)
    add_rule(parser)
    add_loading(parser)
    add(
        "--max-new-tokens", type=integer(1), default=128, metavar="N", help="maximum tokens of an answer (default: 128)"
    )
    add("--json", action="store_true", help="one JSON object for each question, progress on stderr, no typed questions")
    options = parser.parse_intermixed_args(arguments)
    _check_cache(options)
    for number, question in enumerate(options.questions, start=1):
        if not question.strip():
            raise UserError("QUESTION", reason=f"number {number} is empty", allowed="some text")
        # Lone surrogates represent bytes that are not UTF-8.
        if re.search("[\ud800-\udfff]", question):
            raise UserError("QUESTION", reason=f"number {number} is not UTF-8 text; only that is allowed")
    check_source("--model", options.model)
    check_rule(options)
    if not options.questions and not _asks(options):
        raise UserError("QUESTION", reason="give at least one, because none can be typed here")
    return options


def _check_cache(options: argparse.Namespace) -> None:
    """Decide whether the first argument is FILE or, if the saved cache exists, already a question."""
    if options.cache is not None:
        check_path("--cache", options.cache)
        if options.dense:
            raise UserError("--cache", reason="it is not allowed with --dense, whose cache is not compressed")
        there = Path(options.cache).exists()
        # Without a blank, it is a mistyped file name and not a question.
        if there and options.file not in (None, STDIN) and " " in options.file and not Path(options.file).exists():
            options.file, options.questions = None, [options.file, *options.questions]
        if there:
            return
    if options.file is None:
        raise UserError("FILE", reason="is required; see lrsa ask --help")


def _asks(options: argparse.Namespace) -> bool:
    """Whether further questions can be typed. Not with ``--json``: scripts must not wait for input."""
    return not options.json and options.file != STDIN and sys.stdin is not None and sys.stdin.isatty()


def _questions(options: argparse.Namespace, notes: PlainConsole) -> Iterator[str]:
    """The questions given, then those typed, until an empty line or the end of input."""
    yield from options.questions
    while _asks(options):
        notes.print("\nQuestion (an empty line ends): ", end="")
        try:
            question = input()
        except EOFError:
            notes.print()
            return
        except UnicodeDecodeError as error:
            notes.print(f"lrsa: QUESTION: it is not {error.encoding} text; only that is allowed", markup=False)
            continue
        if not question.strip():
            return
        yield question


def _check_length(
    backbone: Backbone, dialogue: Dialogue, questions: Sequence[str], options: argparse.Namespace
) -> None:
    """Refuse a text for which the model has too few positions; texts are never cut."""
    positions = getattr(backbone.config, "max_position_embeddings", None) or sys.maxsize
    needed = dialogue.tokens_with(questions, options.max_new_tokens)
    if needed > positions:
        reason = (
            f"needs {needed:,} tokens with the questions and {options.max_new_tokens:,} for each answer, but "
            f"{backbone.name} has {positions:,} positions; shorten the text, lower --max-new-tokens, choose another "
            f"--model or scale this one: --rope-scaling yarn:{-(-needed // positions)}"
        )
        raise UserError("FILE", _shown(options.file or options.cache), reason=reason)


def _empty_cache(model: Any, rule: LRSAConfig | None) -> Any:
    """A compressed cache, or a dense one if there is no rule."""
    from transformers import DynamicCache

    from lrsa_lit.attention import LRSACache

    return DynamicCache(config=model.config) if rule is None else LRSACache.of(model)
