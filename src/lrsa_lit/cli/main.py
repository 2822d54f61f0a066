"""The command line: ``lrsa fit|validate|test|predict``, a LightningCLI over the shipped defaults, and lighter tools."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

import lrsa_lit
from lrsa_lit import plugins
from lrsa_lit.attention.unread import check_layers
from lrsa_lit.classes import check_class_paths
from lrsa_lit.cli import completion, early_checks, short_help, task_choice
from lrsa_lit.errors import UserError, printable, redacted
from lrsa_lit.paths import check_path, shipped

COMMANDS = {
    "fit": "train, with validation before, during and after",
    "validate": "evaluate on the validation split",
    "test": "evaluate on the test split",
    "predict": "answer the test split's questions into a JSONL file",
}
"""Commands of the LightningCLI; they share their options."""

TOOLS = {
    "ask": "answer your questions about a text file of any length",
    "cache": "list or clear the project's cache",
    "compare": "compare published systems and the rule at equal shares of the cache",
    "distil-cache": "store a teacher's outputs for the training data, to train on them in any number of epochs",
    "env": "print versions, devices, kernels, caches and extras, for a bug report",
    "eval": "evaluate a model with lm-evaluation-harness, under any rule",
    "export": "write a checkpoint as a folder that transformers loads",
    "input-moments": "measure moments of attention inputs, for low-rank keys and values with smaller errors",
    "preference-pairs": "rewrite passages, and pair better with worse rewritings, for training a summariser",
    "prepare": "tokenise the data of a fit, before it or for a machine without the data's files",
    "schema": "print the JSON schema of the settings, for editors that complete YAML",
    "serve": "answer chats of many users at once over OpenAI's API",
    "study": "train and evaluate the rows of a study, part by part",
    "summarise": "write the summaries that the filter Summaries shows instead of passages",
    "sweep": "fit once for each point of a grid of settings",
    "token-gates": "fit token gates to KVzip's scores, for the compressor TokenGate",
    "ui": "open the MLflow UI on the recorded runs",
}
"""Commands with their own options; each is a module of that name with a function ``run``."""

AS_FIT = ("distil-cache", "input-moments", "preference-pairs", "prepare", "summarise", "token-gates")
"""Tools with the options of a fit."""

HELP = """\
usage: lrsa [-h] [--version] COMMAND [options]

Fine-tune and evaluate LLMs with Lag-Relative Sparse Attention on long-context question answering.

commands:
{commands}

{runs} take:
  --config FILE          YAML, may be given several times; later ones win. A shipped file is found from anywhere:
                         --config configs/model/smollm2.yaml
  --model.lrsa.lag_size L, --model.lrsa.top_k K, --model.lrsa.chunk_size C
                         the rule: tokens of a partition, tokens kept of it, tokens between two compressions
  --model.KEY, --data.KEY, --trainer.KEY, --seed_everything N
                         any other setting of the YAML files
  --ckpt_path FILE       checkpoint to evaluate or to resume; your settings are not changed by it. "last" takes the
                         newest good checkpoint of the same settings, if there is one
  --plugins MODULE       import one of your modules with data sets, compressors, …; may be repeated
  --estimate             estimate a fit's memory and time, and do not start it
  --print_config         print the resolved settings and exit
  --help                 the settings, data sets, compressors, systems and objectives, one line each;
                         --data.help QAFiles shows all settings of a data set, --help-all shows every option

{as_fit} take the options of fit. {tools} have their own options, which --help lists.

examples:
  lrsa fit --config configs/model/smollm2.yaml --config configs/data/hotpotqa.yaml --model.lrsa.top_k 16
  lrsa ask docs/extending.md "What is a compressor?"
  lrsa ui
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command with arguments of the command line; None takes those of ``sys.argv``.

    Raises:
        SystemExit: code 2 after a one-line message for a user's mistake, code 130 after Ctrl-C, code 143 after SIGTERM,
            code 141 if the reader of the output has gone (``| head``).
    """
    if args is None:
        completion.complete((*COMMANDS, *AS_FIT), [name for name in TOOLS if name not in AS_FIT])
    arguments = list(sys.argv[1:] if args is None else args)
    if sys.stdout is None and arguments[:1] == ["ask"]:
        _fail("stdout: it is closed; it must be open for the answers")
    _open_streams()
    try:
        try:
            _main(arguments)
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or _writable(sys.stdout):
            raise
        # At exit, Python writes the rest of its buffer again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(141) from None
        _fail(f"stdout: it cannot be written ({error.strerror})")


def _open_streams() -> None:
    """Replace closed streams by the null device, and make stdout escape characters that it cannot encode.

    Otherwise the next file to be opened would become stdout, and receive what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        # A missing stdin stays None, so that a command that reads it can report it.
        if getattr(sys, name) is None and name != "stdin":
            setattr(sys, name, open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _writable(stream: TextIO) -> bool:
    """Whether one more line can be written to a stream; true for a stream without a file."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return True
    try:
        os.write(number, b"\n")
    except OSError:
        return False
    return True


def _main(arguments: list[str]) -> None:
    if not sys.stderr.isatty():
        # The progress bars of transformers and the hub library would fill a log.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not arguments or arguments[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<16} {text}" for name, text in (COMMANDS | TOOLS).items())
        tools = [name for name in TOOLS if name not in AS_FIT]
        print(
            HELP.format(commands=commands, runs=_listed(COMMANDS), as_fit=_listed(AS_FIT), tools=_listed(tools)), end=""
        )
        return
    if arguments[0] == "--version":
        print(f"lrsa-lit {lrsa_lit.__version__}")
        return
    if arguments[0] not in COMMANDS | TOOLS:
        _fail(f"{arguments[0]!r} is not a command; choose from {', '.join(COMMANDS | TOOLS)}")
    try:
        command, given = arguments[0], arguments[1:]
        if command in TOOLS:
            if command in AS_FIT:
                task_choice.check_is_question_answering(task_of(given), command)
                prepared(command, given)
            importlib.import_module(f"lrsa_lit.cli.{command.replace('-', '_')}").run(given)
            return
        told = prepared(command, given)
        # Lightning and transformers take seconds to import, so they are imported only now.
        home = task_choice.TASKS[task_of(given)].module
        with _importing(home):
            module = importlib.import_module(home)
        module.run(told)
    except UserError as error:
        _fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail(_out_of_memory(arguments[0], str(error)))
    except KeyboardInterrupt:
        print("\nlrsa: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def prepared(command: str, arguments: Sequence[str]) -> list[str]:
    """Make the LightningCLI's arguments, after all checks that do not need Lightning.

    Args:
        command: the run, or a tool with the options of a fit.
        arguments: what follows it on the command line.

    Raises:
        UserError: an argument is wrong.
        SystemExit: code 0, after help that was asked for is printed.
    """
    told = lightning_arguments(command, arguments)
    task = task_of(arguments)
    if (text := short_help.answered(command, arguments, task)) is not None:
        print(text, end="")
        raise SystemExit(0)
    if task == task_choice.QUESTION_ANSWERING:
        early_checks.check(command, arguments, plugins=any(each.startswith("--plugins=") for each in told))
    check_layers(layers_of(arguments))
    return ["--help" if argument == short_help.ALL else argument for argument in told]


@contextlib.contextmanager
def _importing(module: str) -> Iterator[None]:
    """Disable garbage collection while a module is imported: it would take a fifth of the start-up time."""
    if module in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _is_out_of_memory(error: BaseException) -> bool:
    # Compare the name, because importing torch takes seconds.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _out_of_memory(command: str, error: str) -> str:
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", error)
    remedy = {
        "ask": "shorten the text, or lower --top-k",
        "fit": "lower data.init_args.batch_size or max_tokens, or set model.backbone.gradient_checkpointing; "
        "--estimate shows what a fit needs",
    }.get(command, "lower data.init_args.eval_batch_size or max_tokens")
    return f"the device is out of memory{f' (it was asked for {asked[1]} more)' if asked else ''}; {remedy}"


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}"


def lightning_arguments(command: str, arguments: Sequence[str]) -> list[str]:
    """The LightningCLI's arguments: the command, the shipped defaults, then the user's arguments.

    A config file that does not exist here is looked up among the shipped ones. Plugins are imported here, because a
    parser knows only classes that are imported before it reads their names.

    Raises:
        UserError: a config file does not exist or is not YAML, a plugin fails to load, or an argument has no meaning.
    """
    found = [command, "--config", str(shipped(task_choice.TASKS[task_of(arguments)].defaults))]
    modules: list[str] = []
    previous, rest = "", iter(arguments)
    for argument in rest:
        flag, assigned, value = argument.partition("=")
        if flag not in ("--config", "-c", "--plugins"):
            _check_argument(previous, argument)
            found.append(argument)
        elif not (value := value if assigned else next(rest, "")).strip():
            raise UserError(flag, reason="it names no module" if flag == "--plugins" else "it names no file")
        elif flag == "--plugins":
            modules += _modules(value)
        else:
            path, settings = _config(value)
            modules += plugins.names_of(settings.get("plugins") or [])
            found += [flag, path]
        previous = argument
    modules = list(dict.fromkeys(modules))
    plugins.load(modules)
    # Pass all of them together, because the parser would keep only the last list.
    return [*found, f"--plugins={json.dumps(modules)}"] if modules else found


def task_of(arguments: Sequence[str]) -> str:
    """The name of a run's task; a UserError if there is no task of that name."""
    layers = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, assigned, value = argument.partition("=")
        value = value if assigned else following
        if flag in ("--config", "-c") and value:
            layers.append(_config(value)[1])
        elif flag == "--task":
            layers.append({"task": value})
    return task_choice.named(layers)


def layers_of(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The settings of each config file, in order, and last those of ``--model`` flags.

    Settings that the parser will refuse may be missing.
    """
    import yaml

    files: list[dict[str, Any]] = []
    flags: dict[str, Any] = {}
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, assigned, value = argument.partition("=")
        value = value if assigned else following
        if flag in ("--config", "-c"):
            files.append(_config(value)[1])
        elif flag == "--model" or flag.startswith("--model."):
            with contextlib.suppress(yaml.YAMLError):
                _set(flags, flag.removeprefix("--").split("."), yaml.safe_load(value))
    return [*files, flags]


def _set(settings: dict[str, Any], names: Sequence[str], value: Any) -> None:
    """Set a value at a path of names; other settings are kept, and mappings are merged."""
    first, *rest = names
    below = settings.get(first)
    if rest or (isinstance(value, dict) and isinstance(below, dict)):
        # A class given by name may be followed by its arguments.
        inner = settings[first] = below if isinstance(below, dict) else {} if below is None else {"class_path": below}
        for name, item in [(rest[0], value)] if rest else value.items():
            _set(inner, [name, *rest[1:]], item)
    else:
        settings[first] = value


def _modules(value: str) -> list[str]:
    """The modules that a ``--plugins`` value names: one module, or a list in YAML."""
    import yaml

    try:
        return plugins.names_of(yaml.safe_load(value) if value.startswith("[") else value)
    except yaml.YAMLError:
        raise UserError("--plugins", value, "a module or a list of modules") from None


def _check_argument(previous: str, argument: str) -> None:
    """Refuse values on which the parser would hang or fail unclearly: it reads any value as YAML or as a file."""
    from lrsa_lit.yaml_file import check_bounds

    flag, given, value = argument.partition("=") if argument.startswith("--") else (previous, " ", argument)
    key = flag.removeprefix("--")
    if "\0" in argument:
        raise UserError(key, argument, reason="is not allowed (it contains a NUL character)")
    if given and not value.strip():
        hint = "leave the flag out; if no text is meant, write null, or set it in a file of settings"
        raise UserError(flag, reason="it is empty", hint=hint)
    # Skip most values, which are short words and numbers.
    if "&" in value or "{" in value or value.count("[") > 50:
        check_bounds(key, value)
    if os.path.exists(value):
        path = Path(value)
        if path.is_fifo():
            raise UserError(key, path, "a file", reason="is a pipe")
        if path.suffix in (".yaml", ".yml"):
            check_bounds(key, path)


def _config(value: str) -> tuple[str, dict[str, Any]]:
    """The path of a config file and its settings."""
    path = Path(value)
    check_path("--config", path)
    if not path.is_file():
        try:
            path = shipped(value if value.startswith("configs/") else f"configs/{value}")
        except FileNotFoundError:
            reason = "is neither a file here nor a shipped file under configs/"
            raise UserError("--config", Path(value), reason=reason) from None
    # The parser merges all files, and then cannot say in which file and line a mistake is.
    from lrsa_lit.yaml_file import read_settings

    try:
        settings = read_settings(path)
        check_class_paths("", settings)
    except UserError as error:
        raise UserError("--config", reason=str(error)) from None
    return str(path), settings


def _fail(message: str) -> NoReturn:
    print(f"lrsa: error: {printable(redacted(message))}", file=sys.stderr)
    raise SystemExit(2)
