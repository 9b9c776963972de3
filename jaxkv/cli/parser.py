"""The parser of every command: one-line errors, a short help, and values from a file and from the environment.

Precedence: command line, then ``JAXKV_<OPTION>``, then the file of ``--config``, then the default.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from jaxkv import __version__
from jaxkv.cli.settings import SWITCHES, Setting, from_environment, from_file
from jaxkv.config import ConfigError


class PlainParser(argparse.ArgumentParser):
    """Ends with exit code 2 and one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class OneLineParser(PlainParser):
    """A command's options, from the command line, the environment and a file.

    ``--help`` shows the options of ``basic`` (their names with underscores; empty: all), ``--help-all`` every one. What a
    namespace holds that does not come from the command line has its place under ``sources``, by name.
    """

    def __init__(self, prog: str, *, basic: Sequence[str] = (), usage: str | None = None, **kwargs: Any) -> None:
        super().__init__(prog, usage=usage or f"{prog} [OPTIONS]", add_help=False,
                         formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30),
                         **kwargs)
        self._basic = {"help", "help_all", "config", *basic} if basic else set()
        self.add_argument("-h", "--help", action=_Help, help="the most used options" if basic else "this text")
        self.add_argument("--help-all", action=_Help, help="every option" if basic else argparse.SUPPRESS)
        self.add_argument("--version", action="version", version=f"jaxkv {__version__}", help="the version")
        self.add_argument("--config", metavar="FILE",
                          help="YAML file of option names and values; JAXKV_<OPTION> in the environment wins over it")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with values from all sources."""
        unset = _Unset()
        with self._nothing_required():
            given, rest = super().parse_known_args(args, argparse.Namespace(**{a.dest: unset for a in self._actions}))
        given = argparse.Namespace(**{name: value for name, value in vars(given).items() if value is not unset}, sources={})
        try:
            options = self._options()
            lists = {name for name, action in options.items() if _is_list(action)}
            self._add(given, from_environment(options, lists, os.environ), options)
            if "config" in given:
                del options["config"]
                self._add(given, from_file(given.config), options)
        except ConfigError as error:
            self.error(str(error))
        missing = [action for action in self._actions if action.required and action.dest not in given]
        if missing and not rest:
            self.error(f"the following arguments are required: {', '.join(_shown(action) for action in missing)}")
        for action in self._actions:
            if action.dest not in given and action.default is not argparse.SUPPRESS:
                setattr(given, action.dest, action.default)
        return given, rest

    def format_short_help(self) -> str:
        """The basic options by group."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_arguments([action for action in group._group_actions
                                     if action.dest in self._basic or not action.option_strings])
            formatter.end_section()
        formatter.add_text(f"--help-all lists all {len(set(map(id, self._options().values())))} options.")
        return formatter.format_help()

    def print_short_help(self) -> None:
        """The basic options, or all if none is marked so."""
        self._print_message(self.format_short_help() if self._basic else self.format_help(), sys.stdout)

    @contextlib.contextmanager
    def _nothing_required(self) -> Iterator[None]:
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        try:
            yield
        finally:
            for action in required:
                action.required = True

    def _options(self) -> dict[str, argparse.Action]:
        """Every name an option has outside of the command line: with underscores, synonyms too."""
        names: dict[str, argparse.Action] = {}
        for action in self._actions:
            if isinstance(action, (_Help, argparse._VersionAction)):
                continue
            flags = [flag[2:].replace("-", "_") for flag in action.option_strings if flag.startswith("--")]
            if isinstance(action, argparse.BooleanOptionalAction):
                flags = [flag for flag in flags if not flag.startswith("no_")]
            names |= dict.fromkeys(flags, action)
        return names

    @staticmethod
    def _add(given: argparse.Namespace, settings: Sequence[Setting], options: dict[str, argparse.Action]) -> None:
        """Adds settings of one source where no earlier source gave a value. ConfigError names place and value."""
        seen: dict[str, Setting] = {}
        for setting in settings:
            if setting.name not in options:
                near = difflib.get_close_matches(setting.name, options, 1)
                raise ConfigError(f"{setting.source}: unknown option; "
                                  + (f"did you mean {near[0]}?" if near else "--help-all lists all"))
            action = options[setting.name]
            if (other := seen.setdefault(action.dest, setting)) is not setting:
                raise ConfigError(f"{other.source} and {setting.source} set the same option")
            value = _convert(action, setting)
            if action.dest not in given:
                setattr(given, action.dest, value)
                given.sources[action.dest] = setting.source


class _Unset(list):
    """Stands for a value that the command line does not give; a list, as options that may be repeated add to a copy."""


class _Help(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=kwargs["help"])

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if self.dest == "help":
            parser.print_short_help()
        else:
            parser.print_help()
        parser.exit()


@contextlib.contextmanager
def one_line_errors(prog: str, args: argparse.Namespace | None = None) -> Iterator[None]:
    """Turns a ConfigError into one line on stderr and exit code 2. With ``args``, the line says where the values it names
    come from, if not from the command line."""
    try:
        yield
    except ConfigError as error:
        text = " ".join(str(error).split())
        named = [f"{name} from {source}" for name, source in getattr(args, "sources", {}).items()
                 if re.search(rf"\b{name}\b", text)]
        print(f"{prog}: error: {text}" + (f" ({', '.join(named)})" if named else ""), file=sys.stderr)
        raise SystemExit(2) from None


def _is_list(action: argparse.Action) -> bool:
    return isinstance(action, argparse._AppendAction) or action.nargs in ("+", "*")


def _convert(action: argparse.Action, setting: Setting) -> Any:
    """The option's value of a text, or of several. ConfigError names place and value."""
    value = setting.value
    if _is_list(action):
        return [_one(action, text, setting.source) for text in ([value] if isinstance(value, str) else value)]
    if isinstance(value, list):
        raise ConfigError(f"{setting.source}: must be one value, got a list")
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if value.lower() not in SWITCHES:
            raise ConfigError(f"{setting.source}: must be true or false, got {value!r}")
        return SWITCHES[value.lower()]
    return _one(action, value, setting.source)


def _one(action: argparse.Action, text: str, source: str) -> Any:
    kind: Any = action.type or str
    try:
        value = kind(text)
    except (TypeError, ValueError):
        raise ConfigError(f"{source}: invalid {kind.__name__} value: {text!r}") from None
    if action.choices is not None and value not in action.choices:
        raise ConfigError(f"{source}: must be one of {', '.join(map(str, action.choices))}, got {text!r}")
    return value


def _shown(action: argparse.Action) -> str:
    return "/".join(action.option_strings) or str(action.metavar or action.dest)
