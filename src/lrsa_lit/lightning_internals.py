"""All that this package uses of Lightning's private members, which may change with any release.

Checked with :data:`CHECKED_WITH`. Each function and class says why Lightning's public interface does not do. A test
holds that no other file reaches for a private member, and that the installed Lightning has those that are used here.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lrsa_lit.errors import UserError

CHECKED_WITH = ("2.6.0", "2.6.6")

BATCHES, VALIDATED = "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"
"""Where the state of a fit's loops keeps the progress in batches, and in those of its validation."""
LOGGED = "epoch_loop.state_dict"


def is_local(path: str | Path) -> bool:
    """Whether a path is on a local disk, by the rule by which Lightning itself opens it."""
    return _is_local_file_protocol(path)


def accumulating(trainer: Trainer) -> bool:
    """Whether gradients of the last batch wait for those of further ones; Lightning tells no callback."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows on the last batch: a checkpoint that is due waits for it."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def number_logged_steps(trainer: Trainer) -> None:
    """Give loggers the optimizer's step as theirs: their own counter also counts a batch that Ctrl-C cut short."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def complete_batch(loops: dict[str, Any], validation_follows: bool) -> None:
    """Count a batch as complete, as Lightning will in a moment, and a validation after it as interrupted at its start.

    Lightning itself treats what was saved here, before that moment, as if the validation had been done.
    """
    batches, validated = loops[BATCHES], loops[VALIDATED]
    for progress in (batches["total"], batches["current"]):
        progress["completed"] = progress["processed"]
    if not validation_follows:
        loops[LOGGED]["_batches_that_stepped"] += 1
        return
    done = validated["total"]["completed"]
    validated["total"].update(ready=done + 1, started=done + 1, processed=done)
    validated["current"].update(ready=1, started=1, processed=0, completed=0)


def restore_data(trainer: Trainer, loops: dict[str, Any]) -> None:
    """See to the position in the data, where Lightning does not."""
    loop = trainer.fit_loop
    loader, fetcher = loop._combined_loader, loop._data_fetcher
    assert loader is not None
    assert fetcher is not None
    if loop._combined_loader_states_to_load:
        # Something asked for the data before the checkpoint was restored, as trainer.estimated_stepping_batches does;
        # Lightning then forgets the position.
        loop._load_combined_loader_states()
        iter(fetcher)
    if loops[BATCHES]["is_last_batch"]:
        # The epoch has no batch left, but what remains of it, a validation maybe, is still to be done. Loaders whose
        # state is at the end of an epoch begin the next one: not now, but when Lightning asks for it.
        exhausted = loader._iterator
        loader.reset()
        loader._load_state_dicts(loops["state_dict"]["combined_loader"])
        fetcher.iterator = iter(())
        # If no epoch follows, Lightning still asks for the number of batches.
        loader._iterator = exhausted


def divides_batches(trainer: Trainer) -> bool:
    """Whether Lightning would divide the batches among devices; the Trainer takes the setting and does not show it."""
    return trainer._accelerator_connector.use_distributed_sampler


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer that a module is attached to; the public property raises where there is none."""
    return module._trainer  # type: ignore[no-any-return]


def setting_names(parser: LightningArgumentParser) -> Iterator[str]:
    """Names of all settings of a parser and its subcommands, to find the nearest of a misspelt one."""
    for action in parser._actions:
        if isinstance(action.choices, Mapping):
            for child in action.choices.values():
                yield from setting_names(child)
        yield str(action.dest)


def counts_before_shares(parser: LightningArgumentParser) -> None:
    """Let 1 be a count where a setting is a count or a share: one batch, not all of them.

    The parser tries types in their order, and for ``Optional[Union[int, float]]``, which Lightning writes, ``typing``
    may return ``Optional[Union[float, int]]`` that another library made before.
    """
    for action in parser._actions:
        kinds = typing.get_args(getattr(action, "_typehint", None))
        if float in kinds and int in kinds:
            vars(action)["_typehint"] = typing.Union[(int, *(kind for kind in kinds if kind is not int))]


class OneMesh(ModelParallelStrategy):
    """All devices of all machines are one mesh; Lightning's own strategy knows their number too late to be told.

    Attributes:
        context: how many devices, neighbours in rank, share a batch: they are the second dimension of the mesh. Tensor
            parallelism, which Lightning knows there, has another meaning: its devices make gradients of one batch.
    """

    context: int = 1

    def setup_environment(self) -> None:
        """Set the size before the mesh is made."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        if self.context > 1:
            shape, names = (self.world_size // self.context, self.context), ("data_parallel", "context")
            self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
            assert self.lightning_module is not None
            self.lightning_module._device_mesh = self._device_mesh


class OpenModelCheckpoint(ModelCheckpoint):
    """ModelCheckpoint whose decisions and writing can be overridden: Lightning has no hooks around them."""

    metrics = ModelCheckpoint._monitor_candidates
    nothing_to_save = ModelCheckpoint._should_skip_saving_checkpoint
    saves_on_exception = ModelCheckpoint._should_save_on_exception

    def book(self, save: Callable[[Trainer, dict[str, Tensor]], None], trainer: Trainer, metrics: Any) -> None:
        """Save as one of Lightning's decisions to save does, with its bookkeeping: call ``save(trainer, metrics)``."""
        save(trainer, metrics)

    def write(self, trainer: Trainer, path: str) -> None:
        """Write one checkpoint."""
        super()._save_checkpoint(trainer, path)

    @property
    def saved(self) -> str:
        """The checkpoint that was written last; empty if there is none."""
        return self._last_checkpoint_saved

    def save_after_validation(self) -> None:
        """Save when the next validation is done."""
        self._defer_save_until_validation = True

    def save_best(self, trainer: Trainer) -> None:
        """Save the best and the last ones, as the metrics say."""
        metrics = self.metrics(trainer)
        self._save_topk_checkpoint(trainer, metrics)
        self._save_last_checkpoint(trainer, metrics)

    def save_end(self, trainer: Trainer, *, booked: bool = True) -> None:
        """Save as ``last``; without :meth:`book` if not ``booked``."""
        save = self._save_last_checkpoint if booked else super()._save_last_checkpoint
        save(trainer, self.metrics(trainer))

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self.book(super()._save_topk_checkpoint, trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self.book(super()._save_last_checkpoint, trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.write(trainer, filepath)


class OpenCLI(LightningCLI):
    """LightningCLI with hooks where it has none, which leaves a checkpoint's settings alone."""

    build_trainer = LightningCLI._instantiate_trainer
    run_subcommand = LightningCLI._run_subcommand

    def asked(self, key: str) -> Any:
        """A setting of the subcommand as files and flags say."""
        return self._get(self.config, key)

    def dumped(self) -> str:
        """The subcommand's settings as YAML, without those that are linked to others."""
        name = str(self.subcommand)
        options = {"skip_none": False, "skip_link_targets": True, "skip_validation": True, "format": "yaml"}
        return str(self._parser(name).dump(self.config[name], **options))

    def adapt(self, parser: LightningArgumentParser, subcommand: str) -> None:
        """Change the parser of a subcommand; for subclasses."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self.adapt(parser, subcommand)
        return parser

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        return self.build_trainer(config, callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_subcommand(subcommand)

    def _parse_ckpt_path(self) -> None:
        """Keep what the user asked for: Lightning would override it with the checkpoint's settings."""

    def _set_seed(self) -> None:
        """Lightning's, with a complaint that names the setting."""
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError("seed_everything", reason=str(error)) from None
