"""Lightning's Trainer, with the settings that are a count or a share typed so that 1 is always a count."""

from __future__ import annotations

from typing import Any

import lightning


class Trainer(lightning.Trainer):
    """Lightning's Trainer for the command line.

    Lightning types these settings as ``Optional[Union[int, float]]``. For such a type, ``typing`` may return one that
    another library made before as ``Optional[Union[float, int]]``. The parser tries the types in their order, so the
    number 1 would become 1.0: not one batch but all of them. Unions written with ``|`` keep their order.

    Args:
        limit_train_batches: batches of an epoch (an integer), or their share (a fraction); null takes all.
        limit_val_batches: the same, for a validation.
        limit_test_batches: the same, for a test.
        limit_predict_batches: the same, for a prediction.
        overfit_batches: train and validate on so many batches, or such a share of them; 0 switches it off.
        val_check_interval: batches (an integer) or share of an epoch (a fraction) between two validations; or a time.
        gradient_clip_val: most that the norm of the gradient may be; null clips nothing.
        kwargs: all other settings of Lightning's Trainer.
    """

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | dict[str, Any] | None = None,
        gradient_clip_val: int | float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            overfit_batches=overfit_batches,
            val_check_interval=val_check_interval,
            gradient_clip_val=gradient_clip_val,
            **kwargs,
        )
