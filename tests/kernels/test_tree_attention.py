"""Attention over a tree of segments equals attention with the mask that the tree means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sideroad.kernels.packed_attention import _attend_paths
from sideroad.kernels.tree_attention import fits, tree_attention
from sideroad.segments import Segment, Segments, apart, longest, paths

TREE: Segments = (
    Segment(0, 5, 14),
    Segment(5, 8, 14, 5),
    Segment(8, 10, 10, 8),
    Segment(10, 14, 14, 8),
    Segment(14, 20, 20),
)
ROW = 20


def visible(segments: Segments) -> Tensor:
    seen = torch.zeros(ROW, ROW, dtype=torch.bool)
    for one in segments:
        seen[one.start : one.stop, one.start : one.stop] = True
        seen[one.stop : one.end, one.start : one.stop] = True
    return seen.tril()


@pytest.mark.parametrize("segments", [TREE, apart((7, 1, 12))])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("compute", [tree_attention, lambda *qkv, scale: _attend_paths(*qkv, scale, 0.0)])
def test_equals_the_mask_in_value_and_gradient(
    segments: Segments, heads: int, groups: int, scale: float | None, compute: object
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, ROW, count, 8) for count in (heads, groups, groups)]
    given = [torch.randn(s, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_() for s in shapes]
    found = compute(*given, segments, scale=scale)  # type: ignore[operator]
    key, value = (one.repeat_interleave(heads // groups, 1) for one in given[1:])
    products = given[0] @ key.transpose(2, 3) * (8**-0.5 if scale is None else scale)
    expected = (products.masked_fill(~visible(segments), float("-inf")).softmax(-1) @ value).transpose(1, 2)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad((one * weights).sum(), given) for one in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_long_segments_take_the_other_way_to_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for long in (3, 10**6):
        monkeypatch.setattr("sideroad.kernels.tree_attention._LONG", long)
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, ROW, count, 8) for count in (6, 2, 2)]
        given = [torch.randn(s, generator=generator, dtype=torch.float64).transpose(1, 2) for s in shapes]
        given = [one.requires_grad_() for one in given]
        out = tree_attention(*given, TREE, scale=None)
        found.append(torch.autograd.grad((out * torch.linspace(-1, 1, 8)).sum(), given))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_segments_know_their_paths() -> None:
    assert longest(TREE) == 12
    padded, owners = paths(TREE)
    assert padded.tolist() == [
        [*range(10), 0, 0],
        [*range(8), 10, 11, 12, 13],
        [14, 15, 16, 17, 18, 19, 14, 14, 14, 14, 14, 14],
    ]
    assert padded.flatten()[owners].tolist() == list(range(ROW))


def test_what_the_kernel_does_not_compute_is_left_to_others() -> None:
    q = torch.zeros(1, 2, 3, 4)
    assert fits(q, q, q)
    assert not fits(q, q, torch.zeros(1, 2, 3, 5))
    assert not fits(q.bfloat16(), q.bfloat16(), q.bfloat16())
    assert not fits(q.to("meta"), q, q)
