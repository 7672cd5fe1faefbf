"""What a new adapter must be told before it is trained: ranks that waste memory, pairs beside rows that are new."""

from __future__ import annotations

import warnings

from torch import nn

from sideroad.base.vocabulary import published_rows
from sideroad.config import AdapterConfig
from sideroad.errors import TargetError
from sideroad.handle import Attached
from sideroad.survey import Survey
from sideroad.targets import oversized, resolve
from sideroad.vocabulary import vocabulary_layers


def check_new(model: nn.Module, config: AdapterConfig) -> None:
    """Warn of ranks above a layer's size (PEFT takes them), and refuse a pair on an embedding or head that has grown.

    Raises:
        TargetError: a targeted embedding or head has more rows than the base as it was published: a file would hold
            the pair, but not the rows that are new. Found here, not after training.
    """
    survey = Survey(model)
    targets = resolve(survey, config, any_rank=True)
    for finding in oversized(survey, targets):
        warnings.warn(f"{finding} (r, rank_pattern)", stacklevel=2)
    published = published_rows(model)
    for path, layer in vocabulary_layers(survey, model).items() if published is not None else ():
        count = layer.get_parameter("weight").shape[0]
        if path in targets and published is not None and count > published:
            raise TargetError(
                f"{path} is a target and has grown from {published} to {count} rows, so its file would lack the new "
                "rows. Train them with trainable_token_indices instead, or the whole layer with modules_to_save."
            )


def refuse_resizing(handle: Attached | None) -> None:
    """Raise TargetError if a vocabulary is to be resized under adapters that train its embedding or head.

    Args:
        handle: of the model; None where no adapter is left.
    """
    layers = set() if handle is None else set(vocabulary_layers(handle.survey(), handle.model))
    names = [] if handle is None else [name for name in handle.names if layers & set(handle.paths(name))]
    if names:
        raise TargetError(
            f"resize_token_embeddings() under adapters that train the embedding or head ({', '.join(names)}): they "
            "would keep the old size. Resize the base first, then put the adapters on it."
        )
