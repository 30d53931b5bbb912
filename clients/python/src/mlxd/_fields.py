"""Fields of requests. A value that its field cannot hold raises InvalidRequestError."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxd.errors import invalid

BAD_VALUE = (TypeError, ValueError, OverflowError, AttributeError)


def put(message: Any, field: str, value: Any, path: str | None = None) -> None:
    """Sets a field; the error names `path`, or the field."""
    try:
        setattr(message, field, value)
    except BAD_VALUE as error:
        raise invalid(path or field, str(error)) from error


def extend(field: Any, values: Any, path: str) -> None:
    """Adds to a repeated field."""
    try:
        field.extend(values)
    except BAD_VALUE as error:
        raise invalid(path, str(error)) from error


def update(field: Any, values: Mapping[Any, Any], path: str) -> None:
    """Adds to a map."""
    try:
        field.update(values)
    except BAD_VALUE as error:
        raise invalid(path, str(error)) from error


def enum_value(enum: Any, field: str, name: str | None) -> Any:
    """Returns the value of a name without its prefix; None is unspecified."""
    full = f"{field}_{'unspecified' if name is None else name}".upper()
    try:
        return enum.Value(full)
    except (ValueError, AttributeError) as error:
        raise invalid(field, f"unknown value {name!r}") from error
