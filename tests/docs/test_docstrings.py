"""The examples in docstrings run: of Python modules and, by the same walk, of compiled ones (whose functions doctest's
own finder doesn't take for functions)."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import anywire


def module_names() -> list[str]:
    found = [module.name for module in pkgutil.walk_packages(anywire.__path__, "anywire.")]
    return ["anywire", *(name for name in found if not name.endswith("__main__"))]


def documented(module: ModuleType) -> Iterator[tuple[str, str]]:
    """(name, docstring) of the module and of everything defined in it."""
    seen: set[int] = set()

    def walk(name: str, thing: Any) -> Iterator[tuple[str, str]]:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        text = getattr(thing, "__doc__", None)
        if isinstance(text, str):
            yield name, text
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                if callable(value) or isinstance(value, (property, classmethod, staticmethod)):
                    yield from walk(f"{name}.{member}", getattr(value, "__func__", value))

    yield module.__name__, module.__doc__ or ""
    for member, value in vars(module).items():
        if getattr(value, "__module__", None) == module.__name__:
            yield from walk(f"{module.__name__}.{member}", value)


def examples() -> list[doctest.DocTest]:
    parser = doctest.DocTestParser()
    found = []
    for name in module_names():
        module = importlib.import_module(name)
        for where, text in documented(module):
            if ">>>" in text:
                found.append(parser.get_doctest(text, dict(vars(module)), where, module.__file__, None))
    return found


EXAMPLES = examples()


def test_there_are_examples_to_run() -> None:
    assert {"anywire.facade.connect", "anywire.contract.address.Address"} <= {test.name for test in EXAMPLES}


@pytest.mark.parametrize("test", EXAMPLES, ids=[test.name for test in EXAMPLES])
def test_examples_in_docstrings(test: doctest.DocTest) -> None:
    output: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL).run(test, out=output.append)
    assert result.failed == 0, "".join(output)
    assert result.attempted > 0
