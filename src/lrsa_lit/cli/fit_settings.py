"""Parse the settings that ``lrsa fit`` would use, for studies and sweeps that run it later or elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from omegaconf.errors import OmegaConfBaseException

from lrsa_lit.attention.unread import check_layers
from lrsa_lit.classes import check_classes
from lrsa_lit.cli.lightning_cli import parser_of
from lrsa_lit.cli.main import layers_of, lightning_arguments, task_of
from lrsa_lit.cli.settings_parser import OneLineParser, first_user_error, one_line
from lrsa_lit.cli.task_choice import check_is_question_answering, named
from lrsa_lit.data.module import QADataModule
from lrsa_lit.errors import UserError, under
from lrsa_lit.objectives import Objective
from lrsa_lit.ops.sparse_attention import Compressor
from lrsa_lit.systems import System

Made = TypeVar("Made")


class FitSettings:
    """Parses settings like ``lrsa fit``, with one parser for many fits; runs nothing.

    Raises:
        UserError: from each method, if a fit would refuse the settings.
    """

    def __init__(self) -> None:
        self._parser = parser_of("fit")
        self._known: dict[str, str] = {}
        self._parsers: dict[tuple[type, bool], OneLineParser] = {}

    def given(
        self, arguments: Sequence[str], overlays: Sequence[Mapping[str, Any]] = (), *, defaults: bool = False
    ) -> dict[str, Any]:
        """The settings of the shipped defaults, arguments and overlays.

        Args:
            arguments: what follows ``lrsa fit``.
            overlays: settings that override these; later ones win.
            defaults: include settings whose defaults are only in the code.
        """
        key = json.dumps([arguments, overlays, defaults])
        if key not in self._known:
            check_is_question_answering(named([{"task": task_of(arguments)}, *overlays]), "studies and sweeps")
            check_layers([*layers_of(arguments), *overlays])
            # Overlays are values of --config, as files are.
            layers = [part for overlay in overlays for part in ("--config", json.dumps(overlay))]
            try:
                parsed = self._parser.parse_args([*lightning_arguments("fit", arguments), *layers], defaults=defaults)
            except UserError as error:
                raise UserError(str(error).removeprefix("config: ")) from None
            except (OmegaConfBaseException, ValueError) as error:
                raise first_user_error(error) or UserError(one_line(str(error))) from None
            self._known[key] = json.dumps(parsed["fit"].as_dict(), default=str)
        settings: dict[str, Any] = json.loads(self._known[key])
        # The names of the files that they were read from.
        settings.pop("config", None)
        return settings

    def made(self, key: str, kind: type[Made], settings: Mapping[str, Any]) -> Made:
        """Build what settings describe: arguments of ``kind``, or a subclass by its ``class_path``.

        Errors name it ``key``.
        """
        parser = self._parser_of(kind, named="class_path" in settings)
        with under(key):
            try:
                parsed = parser.parse_object({"value": dict(settings)})
                check_classes("value", parsed.as_dict()["value"], (Compressor, Objective, QADataModule, System), {})
                made: Made = parser.instantiate_classes(parsed).value
            except UserError as error:
                error.field = error.field.removeprefix("value.")
                raise
            except (TypeError, ValueError) as error:
                raise UserError(one_line(str(error)).removeprefix("value.")) from error
        return made

    def _parser_of(self, kind: type, *, named: bool) -> OneLineParser:
        """The parser of a class's arguments, or of a named subclass; cached, because building one is slow."""
        if (kind, named) not in self._parsers:
            parser = OneLineParser(exit_on_error=False)
            (parser.add_subclass_arguments if named else parser.add_class_arguments)(kind, "value")
            self._parsers[kind, named] = parser
        return self._parsers[kind, named]
