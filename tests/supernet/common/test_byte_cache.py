"""Values within a number of bytes: what is dropped, and what is not counted twice."""

from __future__ import annotations

from supernet.common.byte_cache import ByteCache


def test_what_takes_no_more_room_is_not_counted_twice() -> None:
    kept: ByteCache[str] = ByteCache(10, len)
    for _ in range(3):
        kept.put(("a",), "aaaa")
    kept.put(("b",), "bbbbbb")
    assert kept[("a",)] == "aaaa" and kept[("b",)] == "bbbbbb"
    kept.put(("a",), "aaaaaaaa")
    assert ("b",) not in kept and kept[("a",)] == "aaaaaaaa"


def test_the_one_used_longest_ago_is_made_again() -> None:
    kept: ByteCache[str] = ByteCache(2, len)
    assert [kept.get_or_make((name,), name.upper) for name in "abac"] == ["A", "B", "A", "C"]
    assert list(kept) == [("a",), ("c",)]
    assert kept.get_or_make(("b",), lambda: "anew") == "anew"  # larger than all of the room: handed on, not kept
    assert ("b",) not in kept
