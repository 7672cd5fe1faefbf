"""The training loss on the fast path: the model up to its head, then head and cross-entropy in one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sideroad.kernels.causal_loss import chosen_logits, forward_arguments
from sideroad.kernels.cross_entropy import cross_entropy_sum
from sideroad.kernels.head import Head
from sideroad.kernels.head_loss import head_loss
from sideroad.kernels.pieces import Pieces
from sideroad.kernels.predictions import Predictions
from sideroad.segments import Segments


def fast_loss(
    model: nn.Module,
    head: Head | None,
    pieces: Pieces,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    predictions: Predictions,
    segments: Segments | None,
) -> Tensor:
    """Return the summed cross-entropy of the predictions; fp32, differentiable, 0 where there are none.

    Args:
        head: None where the model's own logits must be used.
        predictions: on the model's device.
        segments: of a packed row, which may share beginnings if every layer sees all of a sequence.
    """
    given = (input_ids, position_ids, attention_mask, segments)
    projection = None if head is None else head.projection()
    if head is None or projection is None:
        length = input_ids.shape[1]
        columns, at = torch.unique(predictions.places % length, return_inverse=True)
        logits = chosen_logits(model, *given, columns)[predictions.places // length, at]
        return cross_entropy_sum(logits[predictions.owners], predictions.targets)
    with forward_arguments(model, *given) as arguments:
        hidden = head.hidden(model, arguments)
    return head_loss(hidden.flatten(0, 1)[predictions.places], projection, head.finish, predictions, pieces)
