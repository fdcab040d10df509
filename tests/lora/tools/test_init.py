"""What all tools use: what is read ahead comes in order, and a fault comes where it belongs."""

from __future__ import annotations

import pytest

from lora.tools import dtype_name, read_ahead


def test_items_come_in_order_with_what_was_read() -> None:
    assert list(read_ahead([], str)) == []
    assert list(read_ahead([1, 2, 3], str)) == [(1, "1"), (2, "2"), (3, "3")]


def test_one_item_and_no_more_is_read_ahead() -> None:
    read: list[int] = []

    def reading(item: int) -> int:
        read.append(item)
        return item

    ahead = read_ahead(range(10), reading)
    assert next(ahead) == (0, 0)
    ahead.close()  # waits for what is under way
    assert read == [0, 1]


def test_a_fault_in_reading_comes_after_the_items_before_it() -> None:
    ahead = read_ahead([2, 1, 0], lambda item: 2 // item)
    assert [next(ahead), next(ahead)] == [(2, 1), (1, 2)]
    with pytest.raises(ZeroDivisionError):
        next(ahead)


def test_a_dtype_has_its_own_name() -> None:
    import torch

    assert dtype_name(torch.float8_e4m3fn) == "float8_e4m3fn"
