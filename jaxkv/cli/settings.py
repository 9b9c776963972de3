"""Values of options that do not stand on the command line: a YAML file and the environment.

Owns how both are read: every value is text, exactly as it was written, so that the options' own types decide what it means
(YAML would read ``0123`` as 83 and ``no`` as false). Knows no option.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxkv.config import ConfigError

PREFIX = "JAXKV_"
SWITCHES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Setting:
    """One value: ``name`` of the option with underscores, and where it stands, for messages."""

    name: str
    value: str | list[str]
    source: str


def from_environment(names: Iterable[str], lists: Container[str], environ: Mapping[str, str]) -> list[Setting]:
    """The options of ``names`` that ``JAXKV_<OPTION>`` gives; empty counts as not given. Those of ``lists`` are split at
    commas."""
    return [Setting(name, [part.strip() for part in value.split(",")] if name in lists else value, PREFIX + name.upper())
            for name in names if (value := environ.get(PREFIX + name.upper()))]


def from_file(path: str) -> list[Setting]:
    """The keys of a YAML (or JSON) file. ConfigError names file and key: no flat mapping of names to a value or a list."""
    import yaml  # only if there is a file

    try:
        with Path(path).expanduser().open(encoding="utf-8") as file:
            root = yaml.compose(file, yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path!r} is no YAML: {error}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"config {path!r} must hold option names and values")
    settings = []
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"config {path!r}: line {key.start_mark.line + 1} is no option name")
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(item, yaml.ScalarNode) for item in items):
            raise ConfigError(f"{path}: {key.value}: must be one value or a list of values")
        if any(item.style is None and item.value in ("", "~", "null") for item in items):
            raise ConfigError(f"{path}: {key.value}: has no value")
        texts = [item.value for item in items]
        settings.append(Setting(key.value.replace("-", "_"), texts if items is value.value else texts[0],
                                f"{path}: {key.value}"))
    return settings
