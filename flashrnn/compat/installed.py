"""A check that no files of the upstream package, also called ``flashrnn``, lie in this one."""

from __future__ import annotations

from pathlib import Path

# A module that only upstream has.
_SIGN = Path(__file__).parents[1] / "flashrnn" / "cuda_init.py"
DISTRIBUTION = "flashrnn-jit"


def check() -> None:
    """Look for a file of upstream's in this package's folder.

    Raises:
        ImportError: there is one; says what to do.
    """
    if _SIGN.exists():
        raise ImportError(explain(f"{_SIGN} is a file of upstream's"))


def explain(found: str) -> str:
    """The message for a mixture of both packages: what was found and what to do."""
    from importlib.metadata import distributions

    names = ("flashrnn", DISTRIBUTION)
    installed = ", ".join(
        sorted(f"{x.name} {x.version}" for x in distributions() if x.name in names)
    )
    return (
        f"{found}, so two packages that are both imported as flashrnn are installed in one place "
        f"(distributions: {installed or 'none by these names'}). Keep one: `pip uninstall flashrnn "
        f"{DISTRIBUTION}`, then install the one you want. Where another package asks for "
        f"flashrnn>=1.0.8, README.md of {DISTRIBUTION} says how to satisfy it"
    )
