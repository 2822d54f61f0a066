"""A trained model as a folder that transformers loads: the weights, or the adapters, and the tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrsa_lit.attention import base_of
from lrsa_lit.errors import message_of
from lrsa_lit.io import bring_to_disk, partial_folder, put_in_place
from lrsa_lit.models import factor_file
from lrsa_lit.models.adapters import RULE_FILE, read_adapters
from lrsa_lit.models.added_biases import with_place_for_biases
from lrsa_lit.models.backbone import ADAPTER_CONFIG
from lrsa_lit.models.factors import factors_in, install, whole
from lrsa_lit.models.loading import check_complete, system_errors
from lrsa_lit.models.low_rank import FACTOR_FILE

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_OF_LOADING = {"_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "use_cache"}
"""Settings of a config that say where a model came from and how it was loaded, not which one it is."""


class AnotherModel(Exception):  # noqa: N818 - what was written
    """What was written is not what was trained."""


def save_folder(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    expected: Tensor | None = None,
    replace: bool = False,
) -> None:
    """Write a model and its tokenizer as ``AutoModelForCausalLM`` and ``AutoTokenizer`` load them.

    A ``PreTrainedModel`` becomes safetensors, config.json, with the rule it runs under as ``lrsa``, and its generation
    config. Factors of low rank are written as their products, which any program loads, and by themselves beside them,
    for a :class:`~lrsa_lit.models.Backbone`. A ``PeftModel`` becomes its adapter, adapter_config.json, which names the
    base model, and, with LRSA enabled, :data:`RULE_FILE`. ``transformers`` loads either, ``peft`` the latter. No code
    is written, even where the model was loaded from code of its own.

    The folder is loaded again, on the CPU, and compared before it gets its name. A whole model takes its room in memory
    once more for that, unless ``expected`` is given.

    Args:
        model: a ``PreTrainedModel`` or a ``PeftModel``.
        tokenizer: the model's.
        folder: its parents are made.
        weights: weights to write instead of those that the model has now, under the names of its ``state_dict``.
        expected: what :func:`logits` must give of the ``PreTrainedModel`` that is loaded again. The one that is given
            then loses its weights, to make room. None: all weights and settings must be the same.
        replace: whether the folder may exist, and what is in it goes.

    Raises:
        AnotherModel: what was written is another model; nothing is left behind.
        OSError: the folder exists or cannot be written; nothing is left behind, and what was there still is.
    """
    if folder.exists() and not replace:
        raise FileExistsError(f"{folder} exists")
    with partial_folder(folder) as partial:
        with system_errors():
            _write(model, tokenizer, partial, weights)
        if base_of(model) is not model:
            _check_adapters(model, partial, weights)
        else:
            _check_model(model, partial, weights, expected)
        bring_to_disk(partial)
        put_in_place(partial, folder)


def logits(model: Any) -> Tensor:
    """Logits (1, T, V) of a few tokens, in float32 on the CPU, to compare models with; densely attended."""
    import torch

    vocabulary = base_of(model).config.get_text_config().vocab_size
    tokens = torch.arange(1, 17) * 7919 % vocabulary
    training = model.training
    try:
        with torch.no_grad():
            found: Tensor = model.eval()(input_ids=tokens[None].to(model.device), use_cache=False).logits
    finally:
        model.train(training)
    return found.float().cpu()


def difference(found: Tensor, expected: Tensor) -> float:
    """The distance of two models' logits, as a share of the size of the expected ones."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def _write(model: Any, tokenizer: Any, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
    base = base_of(model)
    if base is model and (factors := factors_in(state := model.state_dict() if weights is None else weights)):
        factor_file.write(folder, factors)
        try:
            weights = with_place_for_biases(model, whole(state))
        except ValueError as error:
            raise AnotherModel(message_of(error)) from error
    # peft would ask the hub whether the vocabulary has grown, which it never does here.
    options = {} if base is model else {"save_embedding_layers": False}
    with _with_cache(base.config):
        model.save_pretrained(folder, state_dict=None if weights is None else dict(weights), **options)
        tokenizer.save_pretrained(folder)
    _leave_code_out(folder, str(base.config._name_or_path))
    if base is not model:
        _complete_adapter(base, folder)
    # safetensors lets nobody else read what it writes.
    mode = (folder / "tokenizer_config.json").stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)


def _check_model(model: Any, folder: Path, weights: Mapping[str, Tensor] | None, expected: Tensor | None) -> None:
    """Load a folder's model and compare it; AnotherModel if it differs."""
    if expected is not None:
        model.to("meta")
    # By a class that is at hand: so none of the files can name code.
    loaded, info = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    check_complete(info, str(folder))
    if (folder / FACTOR_FILE).is_file():
        install(loaded, factor_file.read(folder), of_these=True)
    if expected is not None:
        if not (distance := difference(logits(loaded), expected)) <= 1e-3:
            raise AnotherModel(f"its logits differ by {distance:.1%} from those of what was trained")
        return
    held = loaded.state_dict()
    for name, weight in (model.state_dict() if weights is None else weights).items():
        if name not in held or not _same(held[name], weight):
            raise AnotherModel(f"its {name} is not the one that was trained")
    written, trained = _settings(loaded.config), _settings(model.config)
    if different := sorted(name for name in written | trained if written.get(name) != trained.get(name)):
        raise AnotherModel(f"its config.json has another {different[0]}")


def _settings(config: Any) -> dict[str, Any]:
    """What of a config decides the logits, as JSON has it; configs of several models have one for each."""

    def decisive(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in _OF_LOADING}

    kept: dict[str, Any] = json.loads(config.to_json_string(use_diff=False), object_hook=decisive)
    return kept


def _check_adapters(model: Any, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
    """Read a folder's adapters and compare them; AnotherModel if they differ."""
    lora, held = read_adapters(folder)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    given = trained if weights is None else weights
    if held.keys() != trained.keys() or not all(_same(held[name], given[name]) for name in trained):
        raise AnotherModel("its adapters are not those that were trained")
    config = model.peft_config[model.active_adapter]
    if (lora.rank, lora.alpha) != (config.r, config.lora_alpha):
        raise AnotherModel("its adapters are scaled otherwise than those that were trained")


def _same(found: Tensor, expected: Tensor) -> bool:
    expected = expected.detach().to("cpu", found.dtype)
    return found.shape == expected.shape and bool((found == expected).all())


def _complete_adapter(base_model: Any, folder: Path) -> None:
    """Name a base model in a local folder wherever the adapter is loaded from, and write the rule."""
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    base = Path(config["base_model_name_or_path"] or "")
    if base.name and base.is_dir():
        config["base_model_name_or_path"] = str(base.resolve())
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if (rule := getattr(base_model.config, "lrsa", None)) is not None:
        (folder / RULE_FILE).write_text(json.dumps(rule, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _with_cache(config: Any) -> Iterator[None]:
    """Gradient checkpointing switched the cache off, which who loads the folder to generate wants on."""
    before, config.use_cache = config.use_cache, True
    try:
        yield
    finally:
        config.use_cache = before


def _leave_code_out(folder: Path, origin: str) -> None:
    """Remove the code that transformers has copied; what the files say of it names the place that it came from."""
    for path in folder.glob("*.py"):
        path.unlink()
    source = str(Path(origin).resolve()) if Path(origin).is_dir() else origin
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if isinstance(classes := config.get("auto_map"), dict):
            config["auto_map"] = {key: _in(source, of) for key, of in classes.items()}
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _in(source: str, name: Any) -> Any:
    """The name of a class, or of several, in the code of a source, as transformers writes it."""
    if isinstance(name, list):
        return [_in(source, each) for each in name]
    return f"{source}--{name}" if isinstance(name, str) and "--" not in name else name
