"""What the command lines share: options, where their values come from, and how an error ends a command.

``options`` the engine's and the sampling options, one table for the commands and for ``LLM``; ``parser`` the parser with a
short help; ``settings`` values from a file and from the environment. Standard library only (PyYAML if a file is named), so
that ``--help`` starts no device.
"""

from jaxkv.cli.options import (
    BASIC_ENGINE_OPTIONS,
    SAMPLING_OPTIONS,
    EngineOptions,
    add_engine_args,
    add_sampling_args,
    config_from_namespace,
    engine_config,
    sampling_overrides,
)
from jaxkv.cli.parser import OneLineParser, PlainParser, one_line_errors

__all__ = ["BASIC_ENGINE_OPTIONS", "SAMPLING_OPTIONS", "EngineOptions", "OneLineParser", "PlainParser", "add_engine_args",
           "add_sampling_args", "config_from_namespace", "engine_config", "one_line_errors", "sampling_overrides"]
