"""An engine in this process as the one who answers in a chat. Loads JAX."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxkv.config import ConfigError, EngineConfig
from jaxkv.llm import whole_steps
from jaxkv.params import SamplingParams
from jaxkv.runtime.startup import build_engine


class Local:
    """Builds the engine. ConfigError for settings that cannot work and for a model that cannot chat."""

    def __init__(self, config: EngineConfig, params: Mapping[str, Any]) -> None:
        if config.model.skip_tokenizer_init:
            raise ConfigError("skip_tokenizer_init leaves a chat without words")
        self._params = SamplingParams(**({"max_tokens": None} | dict(params)))
        self._engine = build_engine(config, show_progress=sys.stderr.isatty())
        if not self._engine.tokenizer.hf.chat_template:
            raise ConfigError(f"model {self._engine.model_name} has no chat template")
        self.name = self._engine.model_name
        self._count = 0

    def answer(self, messages: Sequence[Mapping[str, str]], show: Callable[[str], None]) -> None:
        """Shows the parts of an answer as they come. KeyboardInterrupt after a whole step; ValueError says what is wrong with
        the messages, their length too."""
        engine, tokenizer = self._engine, self._engine.tokenizer
        ids = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
        self._count += 1
        name = f"chat-{self._count}"
        engine.add_request(name, ids, self._params)
        with whole_steps() as check_interrupt:
            try:
                while engine.has_work:
                    for delta in engine.step():
                        if delta.text:
                            show(delta.text)
                    check_interrupt()
            finally:
                engine.abort(name)
                while engine.has_work:
                    engine.step()

    def close(self) -> None:
        """Writes what a disk tier is to keep."""
        self._engine.close()
