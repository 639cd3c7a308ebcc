"""Other code for the modules of one model, for a while or for good.

Each change gives a module a subclass of its own class (``module.__class__``), and leaving a context gives the class
back. So neither mlx-lm nor MLX is changed, and another model in the same process never runs the other code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

import mlx.nn as nn

ModuleCall = Callable[..., Any]
"""A module's ``__call__``, or a function of mlx-lm that one calls; their arguments differ by architecture."""
Members = Mapping[str, ModuleCall]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` was made of, whatever stands in for it now."""
    kind: type[nn.Module] = getattr(type(module), "_macft_original_class", type(module))
    return kind


@contextmanager
def replaced_members(
    modules: Iterable[nn.Module], members_of: Callable[[type[nn.Module]], Members | None]
) -> Iterator[None]:
    """Inside, ``modules`` have the methods ``members_of(their class)``; None or none of them leaves a module alone."""
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        changed.extend(_changes(modules, members_of))  # those before an error too
        yield
    finally:
        for module, kind in reversed(changed):
            module.__class__ = kind


def change_members(modules: Iterable[nn.Module], members_of: Callable[[type[nn.Module]], Members | None]) -> None:
    """As :func:`replaced_members`, for as long as the modules exist."""
    for _ in _changes(modules, members_of):
        pass


def _changes(
    modules: Iterable[nn.Module], members_of: Callable[[type[nn.Module]], Members | None]
) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """Changes module after module; yields each with the class that it had."""
    classes: dict[type[nn.Module], type[nn.Module] | None] = {}
    for module in {id(module): module for module in modules}.values():
        kind = type(module)
        if kind not in classes:
            members = members_of(kind)
            classes[kind] = _subclass(kind, members, original_class(module)) if members else None
        if (subclass := classes[kind]) is not None:
            module.__class__ = subclass
            yield module, kind


@contextmanager
def replaced_functions(model: nn.Module, make: Mapping[str, Callable[[ModuleCall], ModuleCall]]) -> Iterator[None]:
    """Inside, the modules of ``model`` call other functions in place of those their architecture's file imports.

    ``make`` maps the name of a function in that file to what makes a replacement out of the original. The methods of
    the modules are the same code, with a namespace in which the names stand for the replacements. A method that only
    ``super()`` reaches keeps the original; no architecture of mlx-lm has one that matters.
    """
    with replaced_members(model.modules(), lambda kind: _rebound_methods(kind, make)):
        yield


def change_functions(model: nn.Module, make: Mapping[str, Callable[[ModuleCall], ModuleCall]]) -> None:
    """As :func:`replaced_functions`, for as long as the modules exist."""
    change_members(model.modules(), lambda kind: _rebound_methods(kind, make))


def calls_function(model: nn.Module, name: str) -> bool:
    """Whether a module of ``model`` calls the function ``name`` of its architecture's file."""
    kinds = {type(module) for module in model.modules()}
    return any(_rebound_methods(kind, {name: lambda original: original}) for kind in kinds)


def _subclass(kind: type[nn.Module], members: Members, original: type[nn.Module]) -> type[nn.Module]:
    about = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_macft_original_class": original}
    return type(kind.__name__, (kind,), {**about, **members})


def _rebound_methods(kind: type, make: Mapping[str, Callable[[ModuleCall], ModuleCall]]) -> dict[str, ModuleCall]:
    methods: dict[str, ModuleCall] = {}
    for base in reversed(kind.__mro__):
        for name, method in vars(base).items():
            methods.pop(name, None)  # the derived class has its own
            if not isinstance(method, FunctionType):
                continue
            used = make.keys() & _global_names(method.__code__) & method.__globals__.keys()
            if used:
                methods[name] = _rebound(method, {name: make[name](method.__globals__[name]) for name in used})
    return methods


def _rebound(function: FunctionType, names: Members) -> FunctionType:
    """The same function, for which ``names`` stand for other objects."""
    code, space = function.__code__, {**function.__globals__, **names}
    copy = FunctionType(code, space, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__ = function.__qualname__
    return copy


def _global_names(code: CodeType) -> set[str]:
    """Names that ``code`` looks up, with those of the functions inside of it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_global_names, inner))
