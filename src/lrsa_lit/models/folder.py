"""Write a trained model as a folder that transformers loads: the weights or adapters, and the tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
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
"""Settings of a config about where a model came from and how it was loaded; they do not change the model."""


class AnotherModel(Exception):  # noqa: N818 - what was written
    """The written model differs from the trained one."""


def save_folder(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    expected: Tensor | None = None,
    replace: bool = False,
    add: Callable[[Path], object] | None = None,
) -> None:
    """Write a model and its tokenizer so that ``AutoModelForCausalLM`` and ``AutoTokenizer`` can load them.

    For a ``PreTrainedModel``, the folder holds safetensors, the generation config, and a config.json with the current
    rule as ``lrsa``. Low-rank factors are written as their products, which any program can load, and also separately,
    for :class:`~lrsa_lit.models.Backbone`. For a ``PeftModel``, the folder holds the adapter, an adapter_config.json
    that names the base model, and, with LRSA enabled, :data:`RULE_FILE`. ``transformers`` loads both, ``peft`` the
    latter. No code is written, even if the model was loaded from its own code.

    Before the folder gets its name, it is loaded again on the CPU and compared. A whole model needs its memory a second
    time for that, unless ``expected`` is given.

    Args:
        model: a ``PreTrainedModel`` or a ``PeftModel``.
        tokenizer: the model's tokenizer.
        folder: the folder to write; its parents are created.
        weights: weights to write instead of the model's current ones, by the names of its ``state_dict``.
        expected: the :func:`logits` that the reloaded ``PreTrainedModel`` must have. The given model then loses its
            weights, to free memory. None means that all weights and settings must be equal.
        replace: whether an existing folder is replaced with all its contents.
        add: writes further files into the folder, before it gets its name.

    Raises:
        AnotherModel: the written model differs; nothing is left behind.
        OSError: the folder exists or cannot be written. Nothing is left behind, and an existing folder is unchanged.
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
        if add is not None:
            add(partial)
        bring_to_disk(partial)
        put_in_place(partial, folder)


def logits(model: Any) -> Tensor:
    """Logits (1, T, V) of a few tokens, in float32 on the CPU, for comparing models."""
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
    """The norm of the difference of two models' logits, relative to the norm of the expected ones."""
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
    # Otherwise peft asks the hub whether the vocabulary has grown, which never happens here.
    options = {} if base is model else {"save_embedding_layers": False}
    with _with_cache(base.config):
        model.save_pretrained(folder, state_dict=None if weights is None else dict(weights), **options)
        tokenizer.save_pretrained(folder)
    _leave_code_out(folder, str(base.config._name_or_path))
    if base is not model:
        _complete_adapter(base, folder)
    # safetensors writes files that other users cannot read.
    mode = (folder / "tokenizer_config.json").stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)


def _check_model(model: Any, folder: Path, weights: Mapping[str, Tensor] | None, expected: Tensor | None) -> None:
    """Load a folder's model and compare it; AnotherModel if it differs."""
    if expected is not None:
        model.to("meta")
    # Load by the class of the given model, so that no file can name code to run.
    loaded, info = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    check_complete(info, str(folder))
    if (folder / FACTOR_FILE).is_file():
        install(loaded, factor_file.read(folder), of_these=True)
    if expected is not None:
        if not (distance := difference(logits(loaded), expected)) <= 1e-3:
            raise AnotherModel(f"its logits differ by {distance:.1%} from those of the trained model")
        return
    held = loaded.state_dict()
    for name, weight in (model.state_dict() if weights is None else weights).items():
        if name not in held or not _same(held[name], weight):
            raise AnotherModel(f"its {name} differs from the trained one")
    written, trained = _settings(loaded.config), _settings(model.config)
    if different := sorted(name for name in written | trained if written.get(name) != trained.get(name)):
        raise AnotherModel(f"its config.json has a different {different[0]}")


def _settings(config: Any) -> dict[str, Any]:
    """The settings of a config that determine the logits, as plain JSON values, including nested configs."""

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
        raise AnotherModel("its adapters differ from the trained ones")
    config = model.peft_config[model.active_adapter]
    if (lora.rank, lora.alpha) != (config.r, config.lora_alpha):
        raise AnotherModel("its adapters have another scaling than the trained ones")


def _same(found: Tensor, expected: Tensor) -> bool:
    expected = expected.detach().to("cpu", found.dtype)
    return found.shape == expected.shape and bool((found == expected).all())


def _complete_adapter(base_model: Any, folder: Path) -> None:
    """Make the path of a local base model absolute, so that the adapter loads from anywhere, and write the rule."""
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
    """Enable the cache in a written config: gradient checkpointing has disabled it, but generation needs it."""
    before, config.use_cache = config.use_cache, True
    try:
        yield
    finally:
        config.use_cache = before


def _leave_code_out(folder: Path, origin: str) -> None:
    """Remove code files that transformers has copied, and make ``auto_map`` refer to their origin."""
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
    """The reference to a class, or to several, in the code of a source, as transformers writes it."""
    if isinstance(name, list):
        return [_in(source, each) for each in name]
    return f"{source}--{name}" if isinstance(name, str) and "--" not in name else name
