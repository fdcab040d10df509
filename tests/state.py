"""Remembers all of a module tree that a LoRA could change, and checks that nothing was: `unchanged(root)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def remember(value: object) -> object:
    """What must stay of an attribute: the same object, and in a dict (hooks, parameters) the same entries."""
    return [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else id(value)


class State:
    """Values, addresses, objects, hooks and attributes of every module, parameter and buffer."""

    def __init__(self, root: nn.Module) -> None:
        named = [*root.named_parameters(), *root.named_buffers()]
        self.objects = dict(named)
        self.values = {name: value.detach().clone() for name, value in named}
        self.pointers = {name: value.data_ptr() for name, value in named}
        self.keys = list(root.state_dict())
        self.modules = dict(root.named_modules())
        self.attributes = {
            name: {key: remember(value) for key, value in module.__dict__.items()}
            for name, module in self.modules.items()
        }

    def assert_same(self, root: nn.Module) -> None:
        other = State(root)
        changed = [n for n, v in self.values.items() if not torch.equal(v, other.values[n])]
        assert changed == []
        assert self.keys == other.keys
        assert self.pointers == other.pointers
        assert all(self.objects[name] is value for name, value in other.objects.items())
        assert all(self.modules[name] is module for name, module in other.modules.items())
        assert self.attributes == other.attributes


@contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    before = State(root)
    yield
    before.assert_same(root)
