"""How the chats of the served model are written and read: its template, and the formats of its calls and reasoning.

Owns the choice, made once from the operator's options and the chat template. A request chooses none of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxkv.config import ConfigError
from jaxkv.serve.parsers import TOOL_PARSERS, tool_parser_for
from jaxkv.serve.parsers.reasoning import ThinkParser

REASONING_PARSERS = ("qwen3", "deepseek_r1")  # <think> where the text or the prompt has it; deepseek_r1: always
MAX_TEMPLATE = 2**20  # bytes
_HELLO = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What the operator said. ``tool_parser`` and ``reasoning_parser``: a name, "auto" or "none"."""

    template: str | None = None
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"


@dataclass(frozen=True, slots=True)
class Dialect:
    """What it came to."""

    template: str | None = None  # the operator's; None: the model's own
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    special_tools: bool = False  # the markers of calls are special tokens, which then must stay in the text
    special_reasoning: bool = False  # likewise

    def describe(self) -> str:
        """A line for the start of the server."""
        return (f"chat: tool calls {self.tool_parser or 'not parsed'}, reasoning {self.reasoning_parser or 'not parsed'}"
                f"{', template of the operator' if self.template else ''}")


def add_chat_args(group: Any) -> None:
    """The operator's options for chats."""
    group.add_argument("--chat-template", metavar="FILE", help="Jinja template instead of the model's own")
    group.add_argument("--tool-call-parser", choices=["auto", "none", *TOOL_PARSERS], default="auto", metavar="NAME",
                       help=f"format of tool calls: {', '.join(TOOL_PARSERS)}, none, or auto: from the chat template "
                            "(default: auto)")
    group.add_argument("--reasoning-parser", choices=["auto", "none", *REASONING_PARSERS], default="auto", metavar="NAME",
                       help=f"format of reasoning: {', '.join(REASONING_PARSERS)}, none, or auto (default: auto)")


def chat_options(args: argparse.Namespace) -> ChatOptions:
    """ConfigError for a template that cannot be read."""
    template = None
    if args.chat_template is not None:
        try:
            data = Path(args.chat_template).read_bytes()
            if len(data) > MAX_TEMPLATE:
                raise ConfigError(f"chat_template must be at most {MAX_TEMPLATE} bytes, got {len(data)}")
            template = data.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template {args.chat_template!r} cannot be read: {error}") from None
        if not template.strip():
            raise ConfigError(f"chat_template {args.chat_template!r} is empty")
    return ChatOptions(template, args.tool_call_parser, args.reasoning_parser)


def choose_dialect(options: ChatOptions, tokenizer: Any) -> Dialect:
    """Settles what was left to the template. ConfigError for an operator's template that renders not even a greeting."""
    if tokenizer is None:
        return Dialect()
    if options.template is not None:
        try:
            tokenizer.apply_chat_template(_HELLO, chat_template=options.template)
        except ValueError as error:
            raise ConfigError(f"chat_template does not work: {error}") from None
    template = _template(options, tokenizer)
    tools = tool_parser_for(template) if options.tool_parser == "auto" else options.tool_parser
    tools = None if tools == "none" else tools
    reasoning: str | None = options.reasoning_parser
    if reasoning == "auto":
        reasoning = "qwen3" if all(tag in template for tag in ThinkParser.markers) else None
    reasoning = None if reasoning == "none" else reasoning
    return Dialect(options.template, tools, reasoning,
                   special_tools=tools is not None and _any_special(tokenizer, TOOL_PARSERS[tools].markers),
                   special_reasoning=reasoning is not None and _any_special(tokenizer, ThinkParser.markers))


def _template(options: ChatOptions, tokenizer: Any) -> str:
    """Text of the template used for chats with tools, empty if there is none."""
    if options.template is not None:
        return options.template
    own = tokenizer.hf.chat_template
    return (own.get("tool_use") or own.get("default") or "") if isinstance(own, dict) else own or ""


def _any_special(tokenizer: Any, markers: Sequence[str]) -> bool:
    ids = [tokenizer.encode(marker, add_special_tokens=False) for marker in markers]
    return any(len(tokens) == 1 and tokens[0] in tokenizer.special_ids for tokens in ids)
