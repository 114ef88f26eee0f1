"""A run's configuration as a TOML file, which has no null: a setting without a value is "none"."""

from pathlib import Path
from typing import Any, get_args

import tomlkit
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from tomlkit.items import Table

from openmm_regflow.errors import InputError, complaints
from openmm_regflow.files import read_toml
from openmm_regflow.recipes.config import RunConfig

UNSET = "none"


def load_config(path: str | Path) -> RunConfig:
    """Read a TOML run configuration.

    Raises:
        InputError: missing file, bad TOML, unknown key or value out of range, each named.
    """
    try:
        return RunConfig.model_validate(_without_words(RunConfig, read_toml(path)))
    except FileNotFoundError as error:
        raise InputError(
            f"no configuration file {path}; `openmm-regflow train --print-config` shows a complete one"
        ) from error
    except ValidationError as error:
        raise InputError(
            f"{path}: {complaints(error)}; `openmm-regflow train --print-config` shows all keys"
        ) from error


def _without_words(model: type[BaseModel], table: dict[str, Any]) -> dict[str, Any]:
    """A table whose settings without a value, "none" in TOML, are None."""

    def value(key: str, given: Any) -> Any:
        info = model.model_fields.get(key)
        if info is None:
            return given
        if isinstance(given, dict) and isinstance(info.default, BaseModel):
            return _without_words(type(info.default), given)
        return None if given == UNSET and type(None) in get_args(info.annotation) else given

    return {key: value(key, given) for key, given in table.items()}


def print_config(config: RunConfig) -> str:
    """The configuration as TOML that `load_config` reads back, with what every setting means or may be beside it."""
    document = tomlkit.document()
    _fill(document, config)
    return tomlkit.dumps(document)


def _fill(table: tomlkit.TOMLDocument | Table, section: BaseModel) -> None:
    """Write a section's own settings, then the sections in it, each after an empty line."""
    values = {key: getattr(section, key) for key in type(section).model_fields}
    for key, value in sorted(values.items(), key=lambda pair: isinstance(pair[1], BaseModel)):
        if isinstance(value, BaseModel):
            inner = tomlkit.table()
            _fill(inner, value)
            table.add(tomlkit.nl())
            table.add(key, inner)
            continue
        item = tomlkit.item(UNSET if value is None else value)
        remark = _remark(type(section).model_fields[key])
        table.add(key, item.comment(remark) if remark else item)


def _remark(info: FieldInfo) -> str:
    """What a setting may be, where that is a choice between words, and what it means."""
    words = [word for word in _leaves(info.annotation) if isinstance(word, str)]
    return "; ".join(filter(None, [" | ".join(words), info.description]))


def _leaves(annotation: Any) -> list[Any]:
    """What is chosen between: members of an annotation's unions and literals."""
    members = get_args(annotation)
    return [leaf for member in members for leaf in _leaves(member)] if members else [annotation]
