"""The tables of rules: what a module, a function or a method makes of a box."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Rule = Callable[..., Any]
MODULES: dict[type[nn.Module], Rule] = {}
FUNCTIONS: dict[Any, Rule] = {}
METHODS: dict[str, Rule] = {}
WITH_RELU: set[Rule] = set()
"""The rules that take ``relu``."""
ALIASES: set[Rule] = set()
"""The rules of what may return its input, or a part of it, in the same memory."""
CURVED: set[Rule] = set()
"""The rules of what is not linear, ReLU aside."""


def no_sound_rule(what: str) -> NotImplementedError:
    return NotImplementedError(f"no sound interval rule for {what}; sound=False has one")
