"""The batches of an epoch, from the run's seed and the epoch's number."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from lrsa_lit.data.batching import Batches, batches_an_epoch, chunks, split_into
from lrsa_lit.errors import UserError


class EpochPlan:
    """Shuffled batches of ``batch_size`` examples, each example once an epoch.

    With several ranks, some batches are halved so that each rank gets as many. Only where batches hold one example each
    may this not do: then up to ``ranks`` - 1 examples are left out, others in each epoch.

    Args:
        lengths: tokens of each example.
        batch_size: examples in a batch.
        ranks: data-parallel processes.

    Raises:
        UserError: there are fewer examples than ranks.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, ranks: int = 1) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.ranks = ranks
        self._length = batches_an_epoch(-(-len(lengths) // batch_size), len(lengths), ranks)
        if not self._length:
            raise UserError(f"trainer.devices: {ranks} devices cannot share {len(lengths)} training examples")

    def __len__(self) -> int:
        return self._length

    def key(self) -> Mapping[str, str | int | float | bool | None]:
        """What decides the batches beside the seed."""
        return {"number of training examples": len(self.lengths), "data.init_args.batch_size": self.batch_size}

    def batches(self, seed: int, epoch: int) -> Batches:
        """The batches of an epoch, for all ranks in turn."""
        order = list(range(len(self.lengths)))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        return split_into(chunks(order, self.batch_size), len(self))
