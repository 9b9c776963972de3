"""Tool calls and reasoning in the text of an answer: one small file per format, behind ``base.ToolParser``."""

from __future__ import annotations

from jaxkv.serve.parsers.base import ToolParser
from jaxkv.serve.parsers.hermes import HermesParser
from jaxkv.serve.parsers.llama3_json import Llama3JsonParser
from jaxkv.serve.parsers.mistral import MistralParser
from jaxkv.serve.parsers.pythonic import PythonicParser

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser, "llama3_json": Llama3JsonParser, "mistral": MistralParser, "pythonic": PythonicParser,
}


def tool_parser_for(template: str) -> str | None:
    """The parser of the format a chat template shows the model; None if it shows none we know, or more than one."""
    found = []
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        found.append("hermes")  # the two others are XML formats of the same tag (Qwen3-Coder, GLM)
    if "[TOOL_CALLS]" in template:
        found.append("mistral")
    if '{"name": function name, "parameters": ' in template:
        found.append("llama3_json")
    if "[func_name1(params_name1=" in template:
        found.append("pythonic")
    return found[0] if len(found) == 1 else None
