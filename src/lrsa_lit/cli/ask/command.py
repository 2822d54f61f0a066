"""``lrsa ask FILE "question"``: read a text of any length into one cache and answer questions from what it kept.

The text is read before the question, as in the training prompts, so further questions reuse the cache: each is a turn
more of the same conversation. Nothing heavy is imported before the arguments are known to be good.
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

from lrsa_lit import plugins
from lrsa_lit.cli.arguments import Parser, add_plugins, called, checked, integer
from lrsa_lit.cli.ask.dialogue import Dialogue
from lrsa_lit.cli.ask.reader import Answer, Reader
from lrsa_lit.errors import UserError
from lrsa_lit.models.checkpoint import Trained
from lrsa_lit.models.rope import LARGEST_FACTOR, RopeScaling
from lrsa_lit.paths import check_path, shipped
from lrsa_lit.terminal import PlainConsole, log_to

if TYPE_CHECKING:
    import torch

    from lrsa_lit.attention import LRSAConfig
    from lrsa_lit.models import Backbone

DEFAULT_MODEL = "configs/model/smollm2.yaml"
"""The shipped file that names the model of a command without ``--model``."""

STDIN = "-"
_RULE_FLAGS = ("lag_size", "top_k", "sink_size", "chunk_size")
_FLAGS = dict.fromkeys(("model", "source", "tokenizer"), "--model") | {
    name: f"--{name.replace('_', '-')}"
    for name in ("rope_scaling", "template_arguments", "trust_remote_code", *_RULE_FLAGS)
}
"""What this command calls the arguments of its parts."""

EPILOG = """\
The answer is printed as it is generated, then how many tokens were read and how many the cache kept. With a terminal on
stdin further questions can be typed; an empty line or Ctrl-D ends.

examples:
  lrsa ask docs/extending.md "What is a compressor?"
  lrsa ask --model last.ckpt --top-k 32 book.txt "Who is Ishmael?" "Where does he sail from?"
  pdftotext paper.pdf - | lrsa ask --json - "What is the main result?"
"""


@called(_FLAGS)
def run(arguments: Sequence[str]) -> None:
    """Run the command; a mistake in the arguments, the text or the model is a UserError."""
    options = _parse(arguments)
    text = read_text(options.file)
    notes = PlainConsole(stderr=True, soft_wrap=True)
    log_to(notes)
    device = _device(options.device)
    plugins.load(options.plugins, ["compressors", "systems"])
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    trained = _trained(options.model, dtype, trust_remote_code=options.trust_remote_code)
    if options.rope_scaling is not None:
        trained = trained._replace(backbone=dataclasses.replace(trained.backbone, rope_scaling=options.rope_scaling))
    if options.template_arguments is not None:
        trained = trained._replace(template_arguments=options.template_arguments)
    tokenizer = trained.tokenizer
    dialogue = Dialogue(tokenizer, text)
    # Without a question yet, a short one.
    _check_length(trained.backbone, dialogue, options.questions or ["?"], options)
    rule = None if options.dense else _rule(trained, options, notes)
    model, cache = _loaded(trained, rule, device)
    reader = Reader(model, cache, tokenizer, dialogue, options.max_new_tokens)
    reader.read(notes)
    for question in _questions(options, notes):
        try:
            _check_length(trained.backbone, dialogue, [question], options)
        except UserError as error:
            # Only a typed question comes this far: the given ones were checked together.
            notes.say(f"lrsa: {error}")
            continue
        if len(options.questions) > 1 and not options.json:
            print(f"> {question}", flush=True)
        answer = reader.answer(question, show=not options.json)
        print(_json(answer) if options.json else answer.summary(), flush=True)


def _json(answer: Answer) -> str:
    # What stdout cannot encode would be escaped in a way that is not JSON's.
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    return json.dumps(dataclasses.asdict(answer), ensure_ascii=not unicode)


def read_text(name: str) -> str:
    """The text of a UTF-8 file, or of stdin for ``-``, without white space around it."""
    shown = _shown(name)
    check_path("FILE", name)
    try:
        # A byte order mark is no part of the text.
        text = _read(name).decode("utf-8-sig").strip()
    except OSError as error:
        raise UserError("FILE", shown, "a text file, or -", reason=f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError("FILE", shown, reason=f"is not UTF-8 text (byte {error.start}); only that is allowed") from None
    if "\0" in text:
        raise UserError("FILE", shown, "UTF-8 text, not UTF-16 or a binary file", reason="holds NUL characters")
    if not text:
        raise UserError("FILE", shown, reason="is empty; it must hold the text that the question is about")
    return text


def _read(name: str) -> bytes:
    if name == STDIN:
        if sys.stdin is None:
            raise UserError("FILE", reason="stdin is closed; name a file, or pipe the text into this command")
        return sys.stdin.buffer.read()
    path = Path(name)
    # The shell's <(…) is a pipe. Some devices never end.
    if path.is_char_device() or path.is_block_device():
        raise UserError("FILE", path, "a text file, or -", reason="is a device")
    return path.read_bytes()


def _shown(name: str) -> str:
    return "stdin" if name == STDIN else name


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    about = "Answer questions about a text of any length from a compressed cache."
    parser = Parser("lrsa ask", description=about, epilog=EPILOG)
    add = parser.add_argument
    add("file", metavar="FILE", help="the text, UTF-8; - reads it from stdin")
    add("questions", metavar="QUESTION", nargs="*", help="answered in order, each knowing the ones before it")
    model = "a fit's .ckpt, a folder of a model or of adapters, a hub name, a GGUF file, package://…, or tiny"
    add("--model", metavar="SOURCE", help=f"{model} (default: {_default_backbone()['source']})")
    # LRSAConfig checks their lower bounds.
    rule = "(default: what the model was trained with, else {})"
    add("--lag-size", type=integer(), metavar="L", help=f"tokens of a partition {rule.format('128')}")
    add("--top-k", type=integer(), metavar="K", help=f"tokens kept of each {rule.format('L/4')}")
    add("--sink-size", type=integer(), metavar="S", help=f"first tokens, all kept {rule.format('16')}")
    add("--chunk-size", type=integer(), metavar="C", help=f"tokens between compressions {rule.format('L')}")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add_plugins(parser)
    add("--dense", action="store_true", help="keep everything and attend densely, for comparison")
    scaling = checked(_scaling, f"yarn:FACTOR or linear:FACTOR, with a FACTOR from 1 to {LARGEST_FACTOR:,}")
    add("--rope-scaling", type=scaling, metavar="TYPE:FACTOR", help="more positions, as in yarn:4 or linear:2.5")
    template = "arguments of the model's chat template, as in '{\"enable_thinking\": false}'"
    add("--template-arguments", type=checked(_json_object, "a JSON object"), metavar="JSON", help=template)
    add("--max-new-tokens", type=integer(1), default=128, metavar="N", help="most tokens of an answer (default: 128)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on CUDA, float32 on CPU")
    add("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    add("--json", action="store_true", help="one JSON object for each question, progress on stderr, no further asking")
    options = parser.parse_intermixed_args(arguments)
    for number, question in enumerate(options.questions, start=1):
        if not question.strip():
            raise UserError("QUESTION", reason=f"number {number} is empty", allowed="some text")
        # Lone surrogates stand for bytes that are not UTF-8.
        if re.search("[\ud800-\udfff]", question):
            raise UserError("QUESTION", reason=f"number {number} is not UTF-8 text; only that is allowed")
    if ignored := [name for name in _RULE_FLAGS if options.dense and getattr(options, name) is not None]:
        raise UserError(_FLAGS[ignored[0]], reason="it is not allowed with --dense, which compresses nothing")
    if not options.questions and not _asks(options):
        raise UserError("QUESTION", reason="none is given; at least one is needed where none can be typed")
    return options


def _scaling(text: str) -> RopeScaling:
    kind, _, factor = text.partition(":")
    if kind not in ("yarn", "linear"):
        raise ValueError(kind)
    return RopeScaling("yarn" if kind == "yarn" else "linear", float(factor))


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def _asks(options: argparse.Namespace) -> bool:
    """Whether further questions can be typed. Scripts (``--json``) are never kept waiting for one."""
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


def _default_backbone() -> dict[str, Any]:
    """The backbone's settings in the shipped YAML of the default model."""
    import yaml

    settings: dict[str, Any] = yaml.safe_load(shipped(DEFAULT_MODEL).read_text(encoding="utf-8"))["model"]["backbone"]
    return settings


def _trained(source: str | None, dtype: Any, *, trust_remote_code: bool) -> Trained:
    """The model that a source names, or the default one; not loaded."""
    from lrsa_lit.models import Backbone
    from lrsa_lit.models.sources import trained_model

    if source is not None:
        return trained_model(source, dtype, trust_remote_code=trust_remote_code)
    return Trained(Backbone(**_default_backbone(), dtype=dtype, trust_remote_code=trust_remote_code), None, None)


def _device(name: str | None) -> torch.device:
    """The device of that name, tried out."""
    import torch

    count = torch.cuda.device_count()
    try:
        device = torch.device(("cuda" if count else "cpu") if name is None else name)
        torch.empty(1, device=device).item()
    # Each accelerator's code, and the lack of it, has errors of its own.
    except Exception:
        allowed = f"cpu, or cuda:0 to cuda:{count - 1}" if count else "cpu here"
        raise UserError("--device", name, allowed) from None
    return device


def _rule(model: Trained, options: argparse.Namespace, notes: PlainConsole) -> LRSAConfig:
    """The rule that the model was trained with, else the defaults with K = L/4, with what the options change of it."""
    from lrsa_lit.attention import LRSAConfig
    from lrsa_lit.attention.unread import check_read

    changes = {name: value for name in _RULE_FLAGS if (value := getattr(options, name)) is not None}
    if model.rule is None:
        notes.say(f"{model.backbone.name} was never trained with LRSA: its answers may be worse than with --dense.")
        quarter = changes.get("lag_size", LRSAConfig.lag_size) // 4
        return LRSAConfig().replace(**{"top_k": quarter} | changes)
    try:
        rule = LRSAConfig.from_dict(model.rule)
    except (TypeError, ValueError) as error:
        raise UserError("--model", model.backbone.source, reason=f"has no valid rule ({error})") from None
    check_read(changes, rule.system)
    return rule.replace(**changes)


def _check_length(
    backbone: Backbone, dialogue: Dialogue, questions: Sequence[str], options: argparse.Namespace
) -> None:
    """Refuse what the model has no positions for: nothing is cut."""
    positions = getattr(backbone.config, "max_position_embeddings", None) or sys.maxsize
    needed = dialogue.tokens_with(questions, options.max_new_tokens)
    if needed > positions:
        reason = (
            f"needs {needed:,} tokens with the questions and {options.max_new_tokens:,} for each answer, but "
            f"{backbone.name} has {positions:,} positions; shorten the text, lower --max-new-tokens, choose another "
            f"--model or scale this one: --rope-scaling yarn:{-(-needed // positions)}"
        )
        raise UserError("FILE", _shown(options.file), reason=reason)


def _loaded(trained: Trained, rule: LRSAConfig | None, device: torch.device) -> tuple[Any, Any]:
    """The model with the rule enabled and an empty compressed cache, or as it is and a dense one."""
    from transformers import DynamicCache

    from lrsa_lit.attention import LRSACache, enable

    if rule is not None:
        # Before the weights are loaded.
        rule.layers.check(trained.backbone.config.num_hidden_layers)
    model: Any = trained.build().eval().to(device)
    if rule is None:
        return model, DynamicCache(config=model.config)
    enable(model, rule)
    return model, LRSACache.of(model)
