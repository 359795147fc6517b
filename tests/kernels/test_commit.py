"""The commit in plain torch, against slots moved one by one."""

from __future__ import annotations

import pytest
import torch

from helpers.kv_buffers import committed, different_buffers, random_paths
from specdec_kernels import KernelError, KVBuffers, commit_kv


@pytest.mark.parametrize("seed", range(12))
def test_slots_move_and_prefixes_advance(seed: int) -> None:
    """The tree's last node is in the cache's last slot."""
    buffers = different_buffers(3, 40)
    path, length = random_paths(seed, 3, 20, 12)
    prefix = torch.tensor([7, 20, 0])
    wanted, after = committed(buffers, path, length, prefix)
    commit_kv(buffers, path, length, prefix)
    assert torch.equal(prefix, after)
    for found, right in zip(buffers, wanted, strict=True):
        assert torch.equal(found, right)


def test_a_path_may_be_wider_than_the_cache_has_room() -> None:
    """Its width is a bound; what no row keeps is not looked at."""
    buffers = [torch.randn(2, 1, 10, 4)]
    path, length = torch.full((2, 12), -1, dtype=torch.int32), torch.tensor([1, -1])
    path[0, 0] = 2
    prefix = torch.tensor([6, 9])
    wanted, after = committed(buffers, path, length, prefix)
    commit_kv(buffers, path, length, prefix)
    assert torch.equal(buffers[0], wanted[0])
    assert prefix.tolist() == after.tolist() == [8, 9]


def test_the_table_counts_in_the_largest_unit_that_fits_all() -> None:
    even = torch.zeros(1, 2, 3, 8)
    assert KVBuffers.of([even]).unit == 8
    assert KVBuffers.of([even, even[..., :6].half()]).unit == 4
    assert KVBuffers.of([even, torch.zeros(1, 2, 3, 5, dtype=torch.bfloat16)]).unit == 2
    assert KVBuffers.of([even, torch.zeros(1, 2, 3, 5, dtype=torch.float8_e5m2)]).unit == 1
    known = KVBuffers.of([even])
    assert known.table.tolist() == [[even.data_ptr(), 24, 12, 4, 2, 4]]


def test_it_is_an_operator_with_a_fake() -> None:
    known = KVBuffers.of(different_buffers(2, 30))
    path, length = random_paths(1, 2, 20, 6)
    sizes = [known.unit, known.heads, known.dim]
    inputs = (list(known.tensors), known.table, sizes, path, length, torch.tensor([3, 4]))
    torch.library.opcheck(torch.ops.specdec.commit_kv.default, (*inputs, "reference"))


def test_buffers_are_checked() -> None:
    path, length = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([0, 0])
    with pytest.raises(KernelError, match="contiguous in the last dimension"):
        commit_kv([torch.zeros(2, 1, 4, 8)[..., ::2]], path, length, length.clone())
    with pytest.raises(KernelError, match="with one B"):
        commit_kv([torch.zeros(2, 1, 4, 8), torch.zeros(1, 1, 4, 8)], path, length, length.clone())
    with pytest.raises(KernelError, match="at least one layer"):
        commit_kv([], path, length, length.clone())
    with pytest.raises(KernelError, match=r"must be \[2, P\]"):
        commit_kv([torch.zeros(2, 1, 4, 8)], path[:1], length, length.clone())
