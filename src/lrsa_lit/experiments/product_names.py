"""Parsing of ``--systems``: names of attentions, context filters and low-rank models, and products of them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from lrsa_lit import plugins
from lrsa_lit.data.filters import Budgeted, ContextFilter
from lrsa_lit.errors import UserError
from lrsa_lit.experiments.product import Factor, Product
from lrsa_lit.models.low_rank import LowRank
from lrsa_lit.ops.sparse_attention import Compressor, TokenGate

if TYPE_CHECKING:
    from lrsa_lit.attention import LRSAConfig
    from lrsa_lit.systems import System

ALL = "all"
RULE = "rule-"
"""Prefix of a compressor's name, for the rule with this compressor; a system of the same name is something else."""
LORC = "LoRC"
"""Name of low-rank keys and values; the budget sets the rank."""
CONTROLS = ("Truncate", "RandomSentences")
"""Baseline filters that other filters and low ranks must beat."""
QUESTION = "-q"
"""Suffix of the name of a system that sees the question before it cuts."""
_FORM = "NAME, or NAME={argument: value}, followed by @SHARE in a product"
_SHARED = "of all heads of a layer, which keep different tokens"


def products_of(names: Sequence[str], rule: LRSAConfig) -> tuple[list[Product], list[str]]:
    """The requested products, and one line for each name of "all" that cannot be made.

    The control filters are added if there is a filter or a low rank.

    Raises:
        UserError: a name is unknown or appears twice, an argument is wrong, or factors cannot be combined.
    """
    known = _Known(rule)
    everything = ALL in names
    products: list[Product] = []
    left_out: list[str] = []
    for text in known.names if everything else names:
        try:
            product = known.product(text)
            if everything and product.attention is not None:
                _check_distinct(product.attention.part.compressor)
        except UserError as error:
            if not everything:
                raise
            left_out.append(f"{text} is left out: {error}")
            continue
        products.append(product)
    if everything:
        products += [known.product(text) for text in names if text != ALL]
    wanted = [] if all(product.attends_alone for product in products) else CONTROLS
    products += [known.product(name) for name in wanted if name not in [product.words for product in products]]
    seen: set[str] = set()
    for product in products:
        if product.words in seen:
            shown = product.words.removesuffix(QUESTION) + " [q]" * product.words.endswith(QUESTION)
            raise UserError("--systems", shown, known.allowed, reason="appears twice")
        seen.add(product.words)
    return products, left_out


def _check_distinct(compressor: Compressor) -> None:
    """Raise a UserError if the compressor, with its defaults, answers as another one does or with random gates."""
    if compressor.plain is not compressor:
        raise UserError("compressor", reason=f"it answers as rule-{type(compressor.plain).__name__} does")
    if isinstance(compressor, TokenGate) and compressor.weights is None:
        reason, hint = "its gates are random without a file of weights", "`lrsa token-gates` writes one"
        raise UserError("compressor", reason=reason, hint=hint)


@dataclass(frozen=True)
class _Asked:
    """One factor as it was written: name, arguments and share."""

    name: str
    arguments: dict[str, Any]
    share: float | None


class _Known:
    """All known names."""

    def __init__(self, rule: LRSAConfig) -> None:
        self.rule = rule
        self.systems, self.compressors = plugins.registered("systems"), plugins.registered("compressors")
        self.filters = plugins.registered("filters")
        self.names = [*(RULE + name for name in self.compressors), *self.systems, *self.filters, LORC]
        self.allowed = f"{ALL}, or some of {', '.join(self.names)}"

    def product(self, text: str) -> Product:
        """Parse a text into a product of one or more factors."""
        asked = [self._asked(text, part) for part in _split(text)]
        if len(asked) == 1 and asked[0].share is not None:
            raise UserError("--systems", text, reason="has a share, but is not a product", hint="--budgets sets it")
        without = [each.name for each in asked if each.share is None]
        if len(asked) > 1 and len(without) != 1:
            which = f"{' and '.join(without)} have no share" if without else "each factor has a share"
            hint = "give all but one of them @SHARE; that one gets the rest of the budget"
            raise UserError("--systems", text, reason=which, hint=hint)
        product = Product(text, self.rule)
        found: dict[str, Factor[Any]] = {}
        for each in asked:
            kind, factor = self._factor(each)
            if kind in found:
                reason = f"has two factors of the same kind, {found[kind].label} and {factor.label}"
                raise UserError("--systems", text, reason=reason)
            found[kind] = factor
        product = Product(text, self.rule, **found)
        if len(asked) > 1:
            product = self._fitting(product, asked)
        return product

    def _asked(self, text: str, part: str) -> _Asked:
        written = re.fullmatch(r"([^=@]*)(?:=(.*?))?(?:@([^@{}]*))?", part.strip(), re.DOTALL)
        share = None
        if written is not None and written[3] is not None:
            with contextlib.suppress(ValueError):
                share = float(written[3])
            if share is None or not 0 < share < 1:
                raise UserError("--systems", text, "NAME@SHARE with a share above 0 and below 1")
        if written is None:
            raise UserError("--systems", text, _FORM)
        name = written[1].strip()
        if name not in self.names and name in self.compressors:
            name = RULE + name
        if name not in self.names:
            raise UserError("--systems", name, self.allowed)
        return _Asked(name, _arguments(text, written[2]), share)

    def _factor(self, asked: _Asked) -> tuple[str, Factor[Any]]:
        """A factor, and its kind as the attribute of :class:`Product`."""
        if asked.name == LORC:
            made = _low_rank(asked.arguments)
            return "narrow", Factor(_lorc_label(made), made, asked.share)
        if asked.name in self.filters:
            settings = _class_of(self.filters[asked.name]) | {"init_args": asked.arguments}
            with _of_system(asked.name, "context filter"):
                shortens = ContextFilter.from_dict(settings)
            if {"kept", "tokens", "of"} & asked.arguments.keys():
                reason = "are set by the budget"
                raise UserError(f"--systems {asked.name}", reason=f"kept, tokens and of {reason}")
            return "shortens", Factor(asked.name, shortens, asked.share)
        kind = "system" if asked.name in self.systems else "compressor"
        found = self.systems.get(asked.name) or self.compressors[asked.name.removeprefix(RULE)]
        settings = _class_of(found) | {"init_args": asked.arguments}
        with _of_system(asked.name, kind):
            attention = self.rule.replace(**{kind: settings})
        if given := [name for name in attention.system.sizes if name in asked.arguments] if attention.system else []:
            raise UserError(
                f"--systems {asked.name}.{given[0]}", asked.arguments[given[0]], reason="is set by the budget"
            )
        label = asked.name + (QUESTION if attention.system and _cuts_questions(attention.system) else "")
        return "attention", Factor(label, attention, asked.share)

    def _fitting(self, product: Product, asked: Sequence[_Asked]) -> Product:
        """Check that the factors of a product suit each other, and adapt the low rank's grouping to the attention."""
        shortens, narrow, attention = product.shortens, product.narrow, product.attention
        if shortens is not None and not isinstance(shortens.part, Budgeted):
            reason = f"has {shortens.label}, whose size no budget can set"
            raise UserError("--systems", product.text, reason=reason, hint="compare it alone")
        if narrow is None or attention is None:
            return product
        try:
            attention.part.replace(latents=True)
        except UserError as error:
            reason = f"saves nothing with its low rank: a cache of latents {error.reason}"
            raise UserError("--systems", product.text, reason=reason) from None
        shared = getattr(attention.part.compressor, "shared_heads", False)
        own = next(each.arguments for each in asked if each.name == LORC)
        if "grouping" not in own and not shared:
            # Heads keep different tokens, so each head needs latents of its own.
            made = _low_rank(own | {"grouping": "head"})
            narrow = Factor(_lorc_label(made), made, narrow.share)
        elif narrow.part.grouping == "joint" and not shared:
            hint = "leave grouping out, or take the compressor SharedHeads"
            raise UserError("--systems", product.text, reason=f"has latents {_SHARED}", hint=hint)
        return Product(product.text, product.rule, shortens, narrow, attention)


def _split(text: str) -> list[str]:
    """Split a product at its ``*``, except inside braces."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "*" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _low_rank(arguments: dict[str, Any]) -> LowRank:
    """A low rank with rank 1, which the budget raises."""
    if given := sorted({"rank", "ratio"} & arguments.keys()):
        raise UserError(f"--systems {LORC}.{given[0]}", arguments[given[0]], reason="is set by the budget")
    known = sorted(set(LowRank.__dataclass_fields__) - {"rank", "ratio"})
    if unknown := sorted(arguments.keys() - set(known)):
        raise UserError(f"--systems {LORC}.{unknown[0]}", allowed=f"one of {', '.join(known)}", reason="is unknown")
    for name, allowed in (("schedule", ("uniform", "progressive")), ("grouping", ("joint", "head"))):
        if arguments.get(name, allowed[0]) not in allowed:
            raise UserError(f"--systems {LORC}.{name}", arguments[name], " or ".join(allowed))
    try:
        with _of_system(LORC, "low_rank"):
            return LowRank(rank=1, **arguments)
    except TypeError as error:
        raise UserError(f"--systems {LORC}", reason=f"does not take these arguments ({error})") from None


def _lorc_label(made: LowRank) -> str:
    options = {
        "head": made.grouping == "head",
        "progressive": made.schedule == "progressive",
        "whitened": made.whitening is not None,
    }
    return "-".join([LORC, *(name for name, has in options.items() if has)])


def _cuts_questions(system: System) -> bool:
    """Whether the system's setting ``question`` is on; systems without it do not see the question first."""
    return bool(system.to_dict()["init_args"].get("question"))


@contextlib.contextmanager
def _of_system(label: str, kind: str) -> Iterator[None]:
    """Name the argument of a system or compressor in errors by its flag: ``--systems SnapKV.window``."""
    try:
        yield
    except UserError as error:
        argument = error.field.removeprefix(kind).replace(".init_args", "")
        error.field = f"--systems {label}" + (argument if argument.startswith(".") else "")
        raise


def _class_of(found: type) -> dict[str, Any]:
    return {"class_path": f"{found.__module__}.{found.__qualname__}"}


def _arguments(name: str, text: str | None) -> dict[str, Any]:
    try:
        arguments = yaml.safe_load(text) if text else {}
    except yaml.YAMLError:
        arguments = None
    if not isinstance(arguments, dict):
        raise UserError("--systems", name, "NAME, or NAME={argument: value}")
    return arguments
