"""The name that keys and values go by: ``cache`` since transformers 5.24, ``past_key_values`` before."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

_OLD_NAME, _NEW_NAME = "past_key_values", "cache"
# What the installed release calls them in its own models' arguments and outputs.
CACHE_NAME = (
    _NEW_NAME if any(field.name == _NEW_NAME for field in fields(BaseModelOutputWithPast)) else _OLD_NAME
)


def accepts_both_cache_names(method: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a method that takes ``cache`` be called with ``past_key_values`` too, by older releases and scripts.

    Its signature shows the installed release's name: generation looks there for what it may pass.
    """

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _OLD_NAME in kwargs:
            if kwargs.get(_NEW_NAME) is not None:
                raise TypeError(f"{_NEW_NAME} and {_OLD_NAME} are one argument: give one of them")
            kwargs[_NEW_NAME] = kwargs.pop(_OLD_NAME)
        return method(self, *args, **kwargs)

    signature = inspect.signature(method)
    shown = [
        parameter.replace(name=CACHE_NAME if name == _NEW_NAME else name)
        for name, parameter in signature.parameters.items()
    ]
    wrapper.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return wrapper
