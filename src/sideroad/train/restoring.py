"""A checkpoint back onto the model: one way for a resumed run and for the best weights at the end."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sideroad.adapter import Adapter
from sideroad.attaching import Attached
from sideroad.train.setup import NAME
from sideroad.train.steps import Stepper


def put_back(attached: Attached, stepper: Stepper, adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Load what a checkpoint holds.

    Args:
        adapter: of the checkpoint. AdaLoRA's holds the pairs that were left, not the triplets that are attached: its
            values come from the state.
        state: as `Stepper.state_tensors` gave it.
    Raises:
        AdapterError, CheckpointError: what does not fit.
    """
    if stepper.budget is None:
        attached.load(NAME, adapter)
    stepper.load_state(state)
