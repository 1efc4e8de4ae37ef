"""The learning rate from a grid: a short run with each, and the validation loss decides (PERP, Appendix A).

The paper tries 5e-6, 1e-5, 5e-5, 1e-4 and 5e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import distributed

from trisparse.retrain.loop import RetrainError


def choose_learning_rate(
    rates: Sequence[float], attempt: Callable[[float], float]
) -> tuple[float, dict[float, float | None]]:
    """The rate whose ``attempt`` ends with the lowest validation loss, the lower rate on a tie, and every loss.

    Args:
        rates: to try, in this order.
        attempt: trains with a rate, puts the model back, and returns the validation loss; a RetrainError or a loss
            that is not finite means that the rate is too high, and its loss is None.

    Raises:
        RetrainError: with no rate was there a loss, or the loss is the same with every rate.
    """
    losses: dict[float, float | None] = {}
    for rate in rates:
        try:
            loss = attempt(rate)
        except RetrainError:
            loss = math.nan
        losses[rate] = loss if math.isfinite(loss) else None
    if distributed.is_available() and distributed.is_initialized():  # one decision, whatever the last bits are
        shared = [losses]
        distributed.broadcast_object_list(shared)
        losses = shared[0]
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    if not finite:
        raise RetrainError(f"no learning rate of {', '.join(f'{r:g}' for r in rates)} gave a finite validation loss")
    if len(finite) > 1 and len(set(finite.values())) == 1:
        raise RetrainError(
            f"the learning rates {', '.join(f'{r:g}' for r in finite)} all gave the validation loss "
            f"{next(iter(finite.values())):g}, so none can be chosen: raise grid_steps, or the rates"
        )
    return min(finite, key=lambda rate: (finite[rate], rate)), losses
