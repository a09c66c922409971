"""Values that are kept within a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

Key = tuple[object, ...]
Value = TypeVar("Value")


class ByteCache(OrderedDict[Key, Value]):
    """Values that take `memory` bytes at most, by their `size_of`; the one used longest ago is dropped first."""

    def __init__(self, memory: int, size_of: Callable[[Value], int]) -> None:
        super().__init__()
        self._memory, self._size_of, self._held = memory, size_of, 0
        self._bytes: dict[Key, int] = {}

    def __getitem__(self, key: Key) -> Value:
        self.move_to_end(key)
        return super().__getitem__(key)

    def get_or_make(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key; where it is not kept, what `make` returns, which is kept then."""
        if key in self:
            return self[key]
        value = make()
        self.put(key, value)
        return value

    def put(self, key: Key, value: Value) -> None:
        """Keep a value, unless it alone is too large."""
        size = self._size_of(value)
        if size > self._memory:
            return
        self[key] = value
        self.move_to_end(key)
        self._held += size - self._bytes.get(key, 0)
        self._bytes[key] = size
        while self._held > self._memory:
            dropped, _ = self.popitem(last=False)
            self._held -= self._bytes.pop(dropped)
