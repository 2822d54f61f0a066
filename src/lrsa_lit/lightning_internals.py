"""All uses of Lightning's private members, which may change with any release.

Checked with the versions :data:`CHECKED_WITH`. Each function and class says why Lightning's public interface is not
enough. A test checks that no other file uses private members, and that the installed Lightning has those used here.
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
"""Keys of the progress in training and validation batches in the state of a fit's loops."""
LOGGED = "epoch_loop.state_dict"


def is_local(path: str | Path) -> bool:
    """Whether a path is on a local disk, by the same rule that Lightning uses to open it."""
    return _is_local_file_protocol(path)


def accumulating(trainer: Trainer) -> bool:
    """Whether more batches follow before the next optimizer step; Lightning does not tell callbacks."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the last batch; a due checkpoint waits for it. Lightning does not tell callbacks."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def number_logged_steps(trainer: Trainer) -> None:
    """Make loggers use the optimizer's step: Lightning's own counter includes a batch that Ctrl-C interrupted."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def complete_batch(loops: dict[str, Any], validation_follows: bool) -> None:
    """Mark a batch as complete, as Lightning is about to do, and a following validation as interrupted at its start.

    Without this, Lightning would treat a state saved at this moment as if the validation had been done.
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
    """Restore the position in the data in cases that Lightning does not handle."""
    loop = trainer.fit_loop
    loader, fetcher = loop._combined_loader, loop._data_fetcher
    assert loader is not None
    assert fetcher is not None
    if loop._combined_loader_states_to_load:
        # Something used the data before the checkpoint was restored, as trainer.estimated_stepping_batches does.
        # Lightning then forgets the position.
        loop._load_combined_loader_states()
        iter(fetcher)
    if loops[BATCHES]["is_last_batch"]:
        # The epoch has no batches left, but its rest, such as a validation, must still run. Loaders whose state is at
        # the end of an epoch start the next one; this must not happen before Lightning asks for it.
        exhausted = loader._iterator
        loader.reset()
        loader._load_state_dicts(loops["state_dict"]["combined_loader"])
        fetcher.iterator = iter(())
        # Lightning asks for the number of batches even if no epoch follows.
        loader._iterator = exhausted


def divides_batches(trainer: Trainer) -> bool:
    """Whether Lightning would divide the batches among devices; the Trainer does not expose this setting."""
    return trainer._accelerator_connector.use_distributed_sampler


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer that a module is attached to, or None; the public property raises if there is none."""
    return module._trainer  # type: ignore[no-any-return]


def setting_names(parser: LightningArgumentParser) -> Iterator[str]:
    """The names of all settings of a parser and its subcommands, to suggest corrections of misspelt ones."""
    for action in parser._actions:
        if isinstance(action.choices, Mapping):
            for child in action.choices.values():
                yield from setting_names(child)
        yield str(action.dest)


def counts_before_shares(parser: LightningArgumentParser) -> None:
    """Make the parser read 1 as a count in settings that are a count or a share: one batch, not all of them.

    The parser tries types in order. Lightning writes ``Optional[Union[int, float]]``, but ``typing`` may return
    ``Optional[Union[float, int]]``, cached from another library.
    """
    for action in parser._actions:
        kinds = typing.get_args(getattr(action, "_typehint", None))
        if float in kinds and int in kinds:
            vars(action)["_typehint"] = typing.Union[(int, *(kind for kind in kinds if kind is not int))]


class OneMesh(ModelParallelStrategy):
    """One mesh of all devices of all machines; Lightning's own strategy learns their number too late.

    Attributes:
        context: how many devices with adjacent ranks share a batch; they form the mesh's second dimension. Lightning
            uses that dimension for tensor parallelism, which is different: its devices all compute the gradients of the
            whole batch.
    """

    context: int = 1

    def setup_environment(self) -> None:
        """Set the mesh's size before Lightning creates it."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        if self.context > 1:
            shape, names = (self.world_size // self.context, self.context), ("data_parallel", "context")
            self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
            assert self.lightning_module is not None
            self.lightning_module._device_mesh = self._device_mesh


class OpenModelCheckpoint(ModelCheckpoint):
    """ModelCheckpoint whose decisions and writing can be overridden; Lightning has no hooks for them."""

    metrics = ModelCheckpoint._monitor_candidates
    nothing_to_save = ModelCheckpoint._should_skip_saving_checkpoint
    saves_on_exception = ModelCheckpoint._should_save_on_exception

    def book(self, save: Callable[[Trainer, dict[str, Tensor]], None], trainer: Trainer, metrics: Any) -> None:
        """Called for each of Lightning's decisions to save; ``save(trainer, metrics)`` saves with its bookkeeping."""
        save(trainer, metrics)

    def write(self, trainer: Trainer, path: str) -> None:
        """Write one checkpoint."""
        super()._save_checkpoint(trainer, path)

    @property
    def saved(self) -> str:
        """The last written checkpoint; empty if there is none."""
        return self._last_checkpoint_saved

    def save_after_validation(self) -> None:
        """Save after the next validation."""
        self._defer_save_until_validation = True

    def save_best(self, trainer: Trainer) -> None:
        """Save the best and the last checkpoints, according to the metrics."""
        metrics = self.metrics(trainer)
        self._save_topk_checkpoint(trainer, metrics)
        self._save_last_checkpoint(trainer, metrics)

    def save_end(self, trainer: Trainer, *, booked: bool = True) -> None:
        """Save as ``last``, with :meth:`book` only if ``booked``."""
        save = self._save_last_checkpoint if booked else super()._save_last_checkpoint
        save(trainer, self.metrics(trainer))

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self.book(super()._save_topk_checkpoint, trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self.book(super()._save_last_checkpoint, trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.write(trainer, filepath)


class OpenCLI(LightningCLI):
    """LightningCLI with additional hooks; it does not read settings from checkpoints."""

    build_trainer = LightningCLI._instantiate_trainer
    run_subcommand = LightningCLI._run_subcommand

    def asked(self, key: str) -> Any:
        """A setting of the subcommand, from files and flags."""
        return self._get(self.config, key)

    def dumped(self) -> str:
        """The subcommand's settings as YAML, without those linked to other settings."""
        name = str(self.subcommand)
        options = {"skip_none": False, "skip_link_targets": True, "skip_validation": True, "format": "yaml"}
        return str(self._parser(name).dump(self.config[name], **options))

    def adapt(self, parser: LightningArgumentParser, subcommand: str) -> None:
        """A hook for subclasses to change the parser of a subcommand."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self.adapt(parser, subcommand)
        return parser

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        return self.build_trainer(config, callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_subcommand(subcommand)

    def _parse_ckpt_path(self) -> None:
        """Do nothing, because Lightning would override the user's settings with the checkpoint's."""

    def _set_seed(self) -> None:
        """Set the seed as Lightning does, but with errors that name the setting."""
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError("seed_everything", reason=str(error)) from None
