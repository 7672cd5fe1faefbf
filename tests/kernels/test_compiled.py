"""kernels.compiled: pieces that are right however many kinds of model one process trains."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from sideroad.kernels.compiled import compiled, refusal
from sideroad.kernels.pieces import EAGER

needs_compiler = pytest.mark.skipif(refusal(torch.device("cpu")) is not None, reason="no compiler")


@needs_compiler
def test_more_kinds_of_input_than_torch_compiles_for_are_computed_all_the_same() -> None:
    pieces, limit = compiled(), 2
    with torch._dynamo.config.patch(recompile_limit=limit):
        for dtype, activation in product((torch.float32, torch.float64), ("silu", "gelu", "gelu_tanh")):
            e = torch.linspace(-2, 2, 24, dtype=dtype).view(3, 8)
            torch.testing.assert_close(pieces.gate(e, e, activation), EAGER.gate(e, e, activation))


@needs_compiler
def test_each_run_has_a_limit_of_its_own() -> None:
    first, second = compiled(), compiled()
    assert first.gate._torchdynamo_orig_callable.__code__ is not second.gate._torchdynamo_orig_callable.__code__
