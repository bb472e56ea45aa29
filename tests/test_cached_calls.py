"""Calls of functions that are cached: the type checker takes any arguments for those."""

import ast
from pathlib import Path

import pytest

import flashrnn

PACKAGE = Path(flashrnn.__file__).parent
CACHES = {"cache", "lru_cache", "cached"}


def cached_functions(tree):
    """Those of a module, by their names."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                called = decorator.func if isinstance(decorator, ast.Call) else decorator
                if getattr(called, "id", getattr(called, "attr", None)) in CACHES:
                    found[node.name] = node
    return found


def misfit(call, function):
    """Why a call does not fit a function; ``None`` if it does, or if only running it would tell."""
    if any(isinstance(x, ast.Starred) for x in call.args) or any(
        k.arg is None for k in call.keywords
    ):
        return None
    arguments = function.args
    names = [x.arg for x in (*arguments.posonlyargs, *arguments.args)]
    by_name = {*names, *(x.arg for x in arguments.kwonlyargs)}
    given = [*names[: len(call.args)], *(k.arg for k in call.keywords)]
    if len(call.args) > len(names) and arguments.vararg is None:
        return f"{len(call.args)} arguments, of which it takes {len(names)}"
    if len(given) != len({*given}) or ({*given} - by_name and arguments.kwarg is None):
        return f"arguments {given}"
    needed = {*names[: len(names) - len(arguments.defaults)]}
    needed |= {
        x.arg
        for x, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if default is None
    }
    return f"no {', '.join(sorted(needed - {*given}))}" if needed - {*given} else None


def misfits(text):
    """The calls of a module's cached functions, within it, that do not fit."""
    tree = ast.parse(text)
    functions = cached_functions(tree)
    return [
        f"line {node.lineno}: {node.func.id}() is given {reason}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in functions
        and (reason := misfit(node, functions[node.func.id]))
    ]


def test_calls_fit():
    wrong = {
        str(path.relative_to(PACKAGE)): found
        for path in PACKAGE.rglob("*.py")
        if (found := misfits(path.read_text(encoding="utf-8")))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("call", "fits"),
    [
        ("f(1, 2)", True),
        ("f(1, b=2)", True),
        ("f(1, 2, 3, c=4)", False),
        ("f(1, 2, c=3)", True),
        ("f(1)", False),
        ("f(1, 2, 3)", False),
        ("f(1, 2, d=3)", False),
        ("f(1, a=2)", False),
        ("f(*x)", True),
    ],
)
def test_what_fits(call, fits):
    text = f"@lru_cache(maxsize=4)\ndef f(a, b, *, c=0):\n    pass\n\n{call}\n"
    assert (not misfits(text)) == fits
