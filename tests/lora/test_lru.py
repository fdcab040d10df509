from typing import Any

from lora.lru import ByteLru


def kept(lru: ByteLru[Any]) -> str:
    """The keys that are there."""
    return "".join(key for key in "abcd" if key in lru)


def test_the_least_recently_used_goes_first() -> None:
    lru: ByteLru[str] = ByteLru(10)
    for key, size in (("a", 4), ("b", 3), ("c", 3)):
        lru.put(key, key.upper(), size)
    assert (kept(lru), lru.size, len(lru)) == ("abc", 10, 3)
    assert lru.get("a") == "A"
    lru.put("d", "D", 4)  # b and c, since a was used
    assert kept(lru) == "ad"
    assert (lru.get("b"), lru.get("a"), lru.get("d")) == (None, "A", "D")


def test_looking_whether_it_is_there_is_no_use() -> None:
    lru: ByteLru[int] = ByteLru(2)
    lru.put("a", 1, 1)
    lru.put("b", 2, 1)
    assert "a" in lru
    lru.put("c", 3, 1)
    assert kept(lru) == "bc"


def test_putting_again_replaces_the_value_and_its_size() -> None:
    lru: ByteLru[int] = ByteLru(10)
    lru.put("a", 1, 9)
    lru.put("a", 2, 3)
    assert (lru.get("a"), lru.size, len(lru)) == (2, 3, 1)


def test_what_is_larger_than_the_budget_is_not_kept_and_costs_the_others_nothing() -> None:
    lru: ByteLru[int] = ByteLru(10)
    lru.put("a", 1, 10)
    lru.put("b", 2, 11)
    assert kept(lru) == "a"
    lru.put("a", 3, 11)  # the old value is not the new one
    assert lru.get("a") is None
    assert lru.size == 0


def test_without_a_budget_only_what_takes_nothing_is_kept() -> None:
    lru: ByteLru[int] = ByteLru(0)
    lru.put("a", 1, 1)
    lru.put("b", 2, 0)
    assert kept(lru) == "b"


def test_forgetting() -> None:
    lru: ByteLru[int] = ByteLru(10)
    lru.put("a", 1, 1)
    lru.put("b", 2, 1)
    lru.pop("a")
    lru.pop("never there")
    assert kept(lru) == "b"
    lru.clear()
    assert (kept(lru), lru.size) == ("", 0)
