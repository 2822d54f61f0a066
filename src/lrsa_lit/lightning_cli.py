"""The LightningCLI subclass: the links between the parts, and mistakes told in one line."""

from __future__ import annotations

import difflib
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from omegaconf.errors import OmegaConfBaseException
from rich.logging import RichHandler

from lrsa_lit.data.module import QADataModule
from lrsa_lit.errors import UserError
from lrsa_lit.tasks import LongContextQA
from lrsa_lit.tracking import RecordConfig

_UNKNOWN_OPTION = re.compile(r"unrecognized arguments: --(\S+)|does not accept option '(\S+)'")
_UNION_PREAMBLE = re.compile(r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: ")
_UNION_EPILOGUE = re.compile(r" Given value type: .*? Given value: (?:NestedArg\(key='(.*?)', val=(.*)\)|(.*))$")
_NOISE = (
    ".*args parameter is intended.*",
    ".*does not have many workers.*",
    ".*LeafSpec.*",
    # Evaluating a checkpoint in another folder is no reason for concern.
    "The dirpath has changed.*",
)
_LIGHTNING_CHECKPOINTS = ("best", "last", "hpc")


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, without the usage of several hundred settings."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what the command line prints in one line."""
        text = one_line(message)
        if unknown := _UNKNOWN_OPTION.search(text):
            key = (unknown[1] or unknown[2]).partition("=")[0]
            nearest = difflib.get_close_matches(key, set(_settings(self)), n=3, cutoff=0.4)
            text = f"{key}: no such setting; the nearest are {', '.join(nearest) or 'shown by --help'}"
        raise UserError(text) from ex


class LRSACLI(LightningCLI):
    """Links the model's tokenizer to the data, and validates before training."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings and links beyond Lightning's own."""
        parser.add_argument(
            "--validate_first", type=bool, default=True, help="Validate before training, so that a fit shows its gain."
        )
        parser.link_arguments("model.tokenizer", "data.init_args.tokenizer", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Keep what the user asked for: Lightning would override it with the checkpoint's settings."""

    def before_instantiate_classes(self) -> None:
        """Check the files that a run reads and writes before anything is loaded."""
        checkpoint = self._get(self.config, "ckpt_path")
        if checkpoint and checkpoint not in _LIGHTNING_CHECKPOINTS and not Path(checkpoint).exists():
            raise UserError(f"ckpt_path: {checkpoint} does not exist; it must be a checkpoint file")
        folder = Path(self._get(self.config, "trainer").get("default_root_dir") or ".")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"trainer.default_root_dir: {folder} cannot be written ({error.strerror})") from None

    def before_fit(self) -> None:
        """Validate at step 0; a resumed run has done so."""
        if self._get(self.config, "validate_first") and self._get(self.config, "ckpt_path") is None:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)


def run(arguments: Sequence[str]) -> None:
    """Parse and run one subcommand.

    Raises:
        UserError: a mistake in the arguments or files.
    """
    _quiet_libraries()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    try:
        LRSACLI(
            LongContextQA,
            QADataModule,
            subclass_mode_data=True,
            save_config_callback=RecordConfig,
            seed_everything_default=0,
            parser_class=OneLineParser,
            # "omegaconf+" resolves ${…} after all files and flags are merged; "omegaconf" would ignore overrides.
            parser_kwargs={"parser_mode": "omegaconf+"},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(arguments),
        )
    except OmegaConfBaseException as error:
        raise UserError(one_line(str(error))) from error
    except ValueError as error:
        # jsonargparse wraps what a constructor raised, several times over.
        raise next((cause for cause in _causes(error) if isinstance(cause, UserError)), error) from None


def one_line(message: str) -> str:
    """What a nested message of jsonargparse says to a user: the key, what is allowed, what was given."""
    text = _UNION_PREAMBLE.sub("", " ".join(message.split()))
    text = re.sub(r"(?:^|(?<= ))- Expected a <class 'NoneType'>\s*", "", text)
    text = _UNION_EPILOGUE.sub(lambda match: f" (given: {match[2] or match[3]})", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"Expected a (\w+)\. Got value: (.*)", r"\2 is not allowed; it must be of type \1", text)
    return re.sub(r"^Parser key \"(.+?)\": (?:- )?", r"\1: ", text)


def _settings(parser: LightningArgumentParser) -> Iterator[str]:
    """Names of all settings of a parser and its subcommands."""
    for action in parser._actions:
        if isinstance(action.choices, Mapping):
            for child in action.choices.values():
                yield from _settings(child)
        yield str(action.dest)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _quiet_libraries() -> None:
    """Log this project's lines through rich; silence what no user can act on."""
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(show_path=False, show_time=False)])
    logging.getLogger("lrsa_lit").setLevel(logging.INFO)
    # Lightning's start-up hints, mlflow's "Creating it.", and retries whose outcome is raised anyway.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.loggers.mlflow", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=pattern)
