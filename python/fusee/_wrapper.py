"""What optimisers share that wrap another one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch


class OptimizerWrapper(torch.optim.Optimizer):
    """An optimiser whose ``param_groups``, ``state`` and ``defaults`` are those of the one it wraps, so
    that schedulers may be attached to either; what it lacks is looked up there."""

    # GradScaler hands optimizers that say True here its scale instead of unscaling; the base would not
    # see it.
    _step_supports_amp_scaling = False

    _own: tuple[str, ...] = ()
    """The names of the attributes of the wrapper itself, which are pickled."""

    def __init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(
                "base_optimizer must be an instance of torch.optim.Optimizer, got "
                f"{base_optimizer if isinstance(base_optimizer, type) else type(base_optimizer)}"
            )
        self.base_optimizer = base_optimizer
        self._prepare()

    def _prepare(self) -> None:
        # Optimizer.__init__ would make groups and a state of its own. Hooks on steps are the wrapper's,
        # those on state dicts are found in the base, which makes them.
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._patch_step_function()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        # Called for what the wrapper has not; it has nothing while it is being unpickled.
        if name == "base_optimizer" or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base_optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        # Not the hooks, nor the `step` that a scheduler may have put into the instance.
        return {name: getattr(self, name) for name in ("base_optimizer", *self._own)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's ``zero_grad``."""
        self.base_optimizer.zero_grad(set_to_none)
