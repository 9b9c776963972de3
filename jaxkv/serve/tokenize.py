"""/tokenize and /detokenize, in vLLM's shape: what a text or a conversation is to the model, token by token."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from jaxkv.serve import chat
from jaxkv.serve.answer import respond
from jaxkv.serve.bounds import Items
from jaxkv.serve.errors import bad_request
from jaxkv.serve.openapi import documented
from jaxkv.serve.pieces import dumps
from jaxkv.serve.protocol import ApiRequest, ChatRequest, validated
from jaxkv.serve.schemas import DetokenizeResponse, TokenizeResponse
from jaxkv.serve.service import Service


class TokenizeRequest(ApiRequest):
    """/tokenize: a ``prompt``, or ``messages`` with the fields of a chat request that shape the prompt."""

    prompt: str | None = None
    messages: Items[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None  # None: true for a prompt, false for messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Items[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("prompt or messages must be given, and not both", "prompt")


class DetokenizeRequest(ApiRequest):
    """/detokenize."""

    tokens: Items[int]


class InParts(Response):
    """A long answer, already JSON."""

    background = None

    def __init__(self, parts: list[bytes]):
        self.parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, 200, self.parts)


def add_tokenize(app: FastAPI, service: Service) -> None:
    """Adds the routes."""

    @app.post("/tokenize", **documented(TokenizeRequest, TokenizeResponse))
    async def tokenize(request: Request) -> Response:
        body = await service.read(TokenizeRequest, request)
        tokenizer, window = service.tokenizer(), service.engine().max_model_len
        text, special = body.prompt or "", body.add_special_tokens is not False
        if body.messages is not None:
            dialect = service.dialect()

            def render() -> str:
                fields = body.model_dump(exclude={"prompt", "return_token_strs"}, exclude_none=True)
                return chat.prompt_of(validated(ChatRequest, fields, service.ignored_fields), tokenizer, dialect)

            text, special = await service.aside(body.size, render), bool(body.add_special_tokens)
        ids = await service.encode(text, add_special_tokens=special)

        def answer() -> list[bytes]:
            strings = [str(token) for token in tokenizer.hf.convert_ids_to_tokens(ids)] if body.return_token_strs else None
            return dumps({"count": len(ids), "max_model_len": window, "tokens": ids, "token_strs": strings})

        return InParts(await service.aside(len(ids), answer))

    @app.post("/detokenize", **documented(DetokenizeRequest, DetokenizeResponse))
    async def detokenize(request: Request) -> Response:
        body = await service.read(DetokenizeRequest, request)
        tokenizer = service.tokenizer("tokens")
        size = tokenizer.vocab_size

        def answer() -> bytes:
            bad = next((token for token in body.tokens if not 0 <= token < size), None)
            if bad is not None:
                raise bad_request(f"tokens holds token id {bad}, outside of the vocabulary of {size}", "tokens")
            return orjson.dumps({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})

        return Response(await service.aside(len(body.tokens), answer), media_type="application/json")
