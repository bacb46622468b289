"""Loans as NumPy arrays, for the fronts' `loan_array`. NumPy is an extra, imported when first asked for. Any thread."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

from anywire.contract.endpoint import Loan


def loan_array(loan: Callable[[int], Loan], shape: int | tuple[int, ...], dtype: Any) -> Any:
    """An uninitialised array in the memory of a loan.

    Parameters: `loan`, what makes one of so many bytes; `shape` and `dtype` as in `numpy.empty`.
    Raises ModuleNotFoundError that names the extra, TypeError for a dtype that holds Python objects."""
    try:
        numpy: Any = importlib.import_module("numpy")
    except ModuleNotFoundError:
        raise ModuleNotFoundError("loan_array() needs NumPy: pip install 'anywire[numpy]'", name="numpy") from None
    kind = numpy.dtype(dtype)
    if kind.hasobject:
        raise TypeError(f"a message is bytes, and an array of {kind} holds Python objects")
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(sizes)
    if count < 0:
        raise ValueError(f"a shape has no negative sizes: {shape!r}")
    if count * kind.itemsize == 0:
        return numpy.empty(sizes, kind)
    return numpy.frombuffer(loan(count * kind.itemsize), kind).reshape(sizes)
