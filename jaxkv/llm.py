"""Offline use: prompts in, finished answers out, in the order of the prompts.

Owns the shapes prompts may have, request ids and the loop around ``Engine.step``. Owns no sampling and no batching:
every prompt goes to the engine at once and the scheduler decides. One thread at a time may use an ``LLM``.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, TypeAlias, Unpack

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from jaxkv.cli import EngineOptions, engine_config
from jaxkv.params import CacheHints, SamplingParams
from jaxkv.runtime.engine import Engine
from jaxkv.runtime.outputs import RequestOutput, RequestState
from jaxkv.runtime.startup import build_engine

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
Message: TypeAlias = Mapping[str, Any]


_HINTS = tuple(f.name for f in fields(CacheHints))


@dataclass(frozen=True, slots=True)
class _Input:
    """A prompt ready for the engine."""

    text: str | None
    token_ids: list[int]
    hints: CacheHints = CacheHints()


class LLM:
    """A model with its KV cache in this process.

    ``model`` is a directory or hub id; None is the built-in model. The options are those of ``python -m jaxkv.serve``
    with underscores (``jaxkv.cli.EngineOptions``); sizes are bytes or text such as "2G". ConfigError (a ValueError) in
    one line for settings that cannot work. ``shutdown``, or leaving a ``with`` block, frees the engine.
    """

    def __init__(self, model: str | None = None, *, show_progress: bool = False,
                 **options: Unpack[EngineOptions]) -> None:
        self._engine: Engine | None = build_engine(engine_config({"model": model, **options}),
                                                   show_progress=show_progress)
        self._next_id = 0

    @property
    def engine(self) -> Engine:
        """The running engine. RuntimeError after ``shutdown``."""
        if self._engine is None:
            raise RuntimeError("this LLM is shut down")
        return self._engine

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's ``transformers`` tokenizer. ValueError with ``skip_tokenizer_init``."""
        return self._tokenizer("get_tokenizer").hf

    def get_default_sampling_params(self) -> SamplingParams:
        """What ``generate`` uses without sampling parameters: the defaults of the model's generation_config.json, unless
        ``generation_config="none"``, and our own for what it leaves out."""
        return SamplingParams(**self.engine.default_sampling)

    def generate(
        self, prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes each prompt: a text, token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}`` (the dicts
        may carry the fields of ``CacheHints``, such as ``cache_salt``), or a list of these.

        ``sampling_params`` is one for all or a list with one per prompt. Everything is checked before anything runs:
        ValueError names the prompt, the field and the limit. After an exception, Ctrl-C included, nothing of this
        call is left in the engine; after one from inside a step of the engine, every later call raises RuntimeError.
        """
        return self._run([self._input(prompt, name) for name, prompt in _named_prompts(prompts)], sampling_params,
                         use_tqdm)

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, use_tqdm: bool = True, *,
        add_generation_prompt: bool = True, continue_final_message: bool = False, chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None, chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of a list of them, through the chat template. As ``generate`` otherwise."""
        tokenizer = self._tokenizer("chat")
        inputs = []
        for name, conversation in _named_conversations(messages):
            with _naming(name):
                text = tokenizer.apply_chat_template(
                    conversation, add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message, chat_template=chat_template, tools=tools,
                    **chat_template_kwargs or {})
                inputs.append(_Input(text, tokenizer.encode(text, add_special_tokens=False)))
        return self._run(inputs, sampling_params, use_tqdm)

    def shutdown(self) -> None:
        """Frees the engine and its memory, writes what a disk tier is to keep; the object is of no further use. May be
        called twice."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.shutdown()

    # ---- inside

    def _tokenizer(self, user: str) -> Any:
        if self.engine.tokenizer is None:
            raise ValueError(f"{user} needs a tokenizer, and skip_tokenizer_init left it out")
        return self.engine.tokenizer

    def _input(self, prompt: Prompt, name: str) -> _Input:
        hints, field = CacheHints(), name
        if isinstance(prompt, Mapping):
            keys = set(prompt) & {"prompt", "prompt_token_ids"}
            if unknown := sorted(map(str, set(prompt) - {"prompt", "prompt_token_ids", *_HINTS})):
                raise ValueError(f"{name} has an unknown key {unknown[0]!r}; known: prompt, prompt_token_ids, "
                                 + ", ".join(_HINTS))
            if not keys:
                raise ValueError(f"{name} must hold prompt or prompt_token_ids")
            try:
                hints = CacheHints(**{key: prompt[key] for key in _HINTS if key in prompt})
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from None
            if "prompt_token_ids" in keys:
                text, ids = prompt.get("prompt"), _token_ids(prompt["prompt_token_ids"], f"{name}.prompt_token_ids")
                return _Input(text if isinstance(text, str) else None, ids, hints)
            prompt, field = prompt["prompt"], f"{name}.prompt"
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError(f"{field} must not be empty")
            with _naming(name):
                return _Input(prompt, self._tokenizer("a prompt as text").encode(prompt), hints)
        return _Input(None, _token_ids(prompt, field, "a string or a list of token ids"), hints)

    def _run(self, inputs: Sequence[_Input], sampling_params: SamplingParams | Sequence[SamplingParams] | None,
             use_tqdm: bool) -> list[RequestOutput]:
        engine = self.engine
        params = self._params(sampling_params, len(inputs))
        states: dict[str, RequestState] = {}
        with whole_steps() as check_interrupt:
            try:
                for index, (item, param) in enumerate(zip(inputs, params)):
                    request_id = str(self._next_id)
                    self._next_id += 1
                    with _naming(f"prompts[{index}]" if len(inputs) > 1 else ""):
                        engine.add_request(request_id, item.token_ids, param, item.hints)
                    states[request_id] = RequestState(request_id, item.text, item.token_ids, param, engine.tokenizer)
                with _Progress(len(inputs), use_tqdm) as progress:
                    while engine.has_work:
                        for delta in engine.step():
                            state = states[delta.request_id]
                            state.add(delta)
                            progress.count(delta.token_ids, state)
                        check_interrupt()
            except BaseException:
                self._clear(list(states))
                raise
        return [state.output() for state in states.values()]

    def _params(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, Sequence) or isinstance(params, str):
            raise ValueError(f"sampling_params must be SamplingParams or a list of them, got {type(params).__name__}")
        if len(params) != count:
            raise ValueError(f"sampling_params must be one, or as many as prompts ({count}), got {len(params)}")
        for index, item in enumerate(params):
            if not isinstance(item, SamplingParams):
                raise ValueError(f"sampling_params[{index}] must be SamplingParams, got {type(item).__name__}")
        return list(params)

    def _clear(self, request_ids: Sequence[str]) -> None:
        """Aborts requests and reads what is still under way on the device."""
        engine = self.engine
        for request_id in request_ids:
            engine.abort(request_id)
        with contextlib.suppress(Exception):  # a step that failed may fail again; the first error is the one to see
            while engine.has_work:
                engine.step()


class _Progress:
    """A bar that counts finished prompts and shows tokens per second."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar = tqdm(total=total, desc="Processed prompts", unit="prompt", disable=not shown,
                         dynamic_ncols=True)
        self._prompt_tokens = self._tokens = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def count(self, tokens: Sequence[int], state: RequestState) -> None:
        self._tokens += len(tokens)
        if state.finished:
            self._prompt_tokens += state.num_prompt_tokens
            if not self._bar.disable:
                seconds = max(self._bar.format_dict["elapsed"], 1e-9)
                self._bar.set_postfix_str(f"input: {self._prompt_tokens / seconds:.1f} toks/s, "
                                          f"output: {self._tokens / seconds:.1f} toks/s", refresh=False)
            self._bar.update()


@contextlib.contextmanager
def whole_steps() -> Iterator[Any]:
    """Keeps Ctrl-C from tearing a step apart, which would leave host and device disagreeing.

    Yields a function that raises the KeyboardInterrupt that came meanwhile. A second Ctrl-C does not wait. Nothing
    changes where no KeyboardInterrupt can arise: in other threads, or with a handler of the caller's own.
    """
    if (threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGINT) is not signal.default_int_handler):
        yield lambda: None
        return
    interrupted = False

    def remember(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(number, signal.default_int_handler)

    def check() -> None:
        if interrupted:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    check()  # it may have come after the last step


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Says which prompt a ValueError is about."""
    try:
        yield
    except ValueError as error:
        if not name:
            raise
        raise ValueError(f"{name}: {error}") from None


def _named_prompts(prompts: Any) -> list[tuple[str, Prompt]]:
    """The prompts, each with the name that errors give it."""
    if isinstance(prompts, (str, Mapping)) or (isinstance(prompts, Sequence) and prompts and _is_int(prompts[0])):
        return [("prompts", prompts)]
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise ValueError("prompts must be a string, token ids, a dict with prompt or prompt_token_ids, or a list of "
                         f"these, got {type(prompts).__name__}")
    return [(f"prompts[{index}]", prompt) for index, prompt in enumerate(prompts)]


def _named_conversations(messages: Any) -> list[tuple[str, Sequence[Message]]]:
    if isinstance(messages, Sequence) and messages and all(
            isinstance(item, Sequence) and not isinstance(item, (str, bytes)) for item in messages):
        return [(f"conversation {index}", item) for index, item in enumerate(messages)]
    return [("", messages)]


def _token_ids(ids: Any, name: str, what: str = "a list of token ids") -> list[int]:
    if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Sequence):
        raise ValueError(f"{name} must be {what}, got {type(ids).__name__}")
    if not ids:
        raise ValueError(f"{name} must not be empty")
    bad = next((token for token in ids if not _is_int(token)), None)
    if bad is not None:
        raise ValueError(f"{name} must hold token ids (integers), got {bad!r}")
    return [int(token) for token in ids]


def _is_int(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)  # numpy's integers too
