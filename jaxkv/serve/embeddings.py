"""/v1/embeddings and /v1/score: prompts to vectors, and the cosine between two of them.

A vector is the model's state after the final norm at the last token of a prompt, divided by its length, as vLLM pools causal
models by default. Prompts go through ``batching`` to the engine, which caches and schedules them like any other.
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import orjson
from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxkv.params import SamplingParams
from jaxkv.runtime.outputs import Delta
from jaxkv.serve.answer import respond
from jaxkv.serve.batching import Batcher
from jaxkv.serve.bounds import Items
from jaxkv.serve.calls import Call, Mailbox
from jaxkv.serve.completions import rows_of
from jaxkv.serve.errors import ApiError, bad_request
from jaxkv.serve.openapi import documented
from jaxkv.serve.pieces import dumps
from jaxkv.serve.protocol import PromptRequest, count_of
from jaxkv.serve.records import RECORD, Record
from jaxkv.serve.schemas import EmbeddingResponse, ScoreResponse
from jaxkv.serve.service import Service
from jaxkv.serve.worker import Worker

MAX_INPUTS = 2048  # texts of one request, as in the OpenAI API
NUMBER_BYTES = 12  # of one number of a vector, about
_PARAMS = SamplingParams(max_tokens=1, temperature=0.0, embed=True)


class EmbeddingRequest(PromptRequest):
    """/v1/embeddings. ``input`` has the shapes of a completion's prompt."""

    input: Any = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None

    def check(self) -> None:
        if (count := count_of(self.input)) > MAX_INPUTS:
            raise bad_request(f"input may hold at most {MAX_INPUTS} texts, got {count}", "input")
        if self.dimensions is not None:
            raise bad_request(f"dimensions is not supported: vectors have the model's size, got {self.dimensions}",
                              "dimensions", "unsupported_parameter")

    def renamed(self) -> dict[str, str]:
        return {"prompt": "input"}


class ScoreRequest(PromptRequest):
    """/v1/score: one text with one or many, or many with as many."""

    text_1: str | Items[str]
    text_2: str | Items[str]

    def prompts(self) -> list[tuple[str, str]]:
        """(field, text) of every text; each two are compared. Raises ApiError when their numbers do not fit."""
        first, second = ([text] if isinstance(text, str) else text for text in (self.text_1, self.text_2))
        for name, texts in (("text_1", first), ("text_2", second)):
            if len(texts) > MAX_INPUTS // 2:
                raise bad_request(f"{name} may hold at most {MAX_INPUTS // 2} texts, got {len(texts)}", name)
            if not all(texts) or not texts:
                raise bad_request(f"{name} must hold at least one text and no empty one", name)
        if len(first) not in (1, len(second)):
            raise bad_request(f"text_1 must hold one text or as many as text_2 ({len(second)}), got {len(first)}", "text_1")
        pairs = zip(first * len(second) if len(first) == 1 else first, second)
        return [row for one, two in pairs for row in (("text_1", one), ("text_2", two))]


class Vectors(Response):
    """ASGI response made of the vectors of prompts. A client that leaves ends their computation."""

    background = None

    def __init__(self, batcher: Batcher, calls: list[Call], head: dict[str, Any], request: PromptRequest, worker: Worker):
        self.batcher, self.calls, self.head, self.request, self.worker = batcher, calls, head, request, worker

    def data(self, vectors: np.ndarray) -> list[dict[str, Any]]:
        """The entries of `data` for vectors [prompts, d_model]."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.get(RECORD, Record("", "")).calls = self.calls
        work, gone = asyncio.ensure_future(self.batcher.run(self.calls)), asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                try:
                    deltas = work.result()
                except ValueError as error:  # from engine.add_request, through the mailbox
                    raise self.request.api_error(error) from None
                size = sum(len(delta.hidden) for delta in deltas) * NUMBER_BYTES
                await respond(send, 200, await self.worker.run(size, lambda: self._body(deltas)))
        except ApiError as error:
            await respond(send, error.status, error.render(), error.headers)
        finally:
            work.cancel()
            gone.cancel()

    def _body(self, deltas: list[Delta]) -> list[bytes]:
        """Takes the deltas out of the list one by one: to free their numbers all at once would take long."""
        prompt = sum(len(call.prompt) for call in self.calls)
        usage = {"prompt_tokens": prompt, "total_tokens": prompt, "completion_tokens": 0,
                 "prompt_tokens_details": {"cached_tokens": sum(delta.num_cached_tokens for delta in deltas)}}
        deltas.reverse()
        hidden = np.stack([np.array(deltas.pop().hidden, np.float32) for _ in self.calls])
        vectors = hidden / np.maximum(np.linalg.norm(hidden, axis=1, keepdims=True), np.float32(1e-12))
        return dumps(self.head | {"data": self.data(vectors), "usage": usage}, orjson.OPT_SERIALIZE_NUMPY)


class Embeddings(Vectors):
    """One vector per prompt, as numbers or as base64 of little-endian float32."""

    def data(self, vectors: np.ndarray) -> list[dict[str, Any]]:
        packed = isinstance(self.request, EmbeddingRequest) and self.request.encoding_format == "base64"
        return [{"object": "embedding", "index": i,
                 "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode() if packed else row}
                for i, row in enumerate(vectors)]


class Scores(Vectors):
    """One cosine per pair of neighbours."""

    def data(self, vectors: np.ndarray) -> list[dict[str, Any]]:
        scores = np.sum(vectors[::2] * vectors[1::2], axis=1).tolist()
        return [{"object": "score", "index": i, "score": score} for i, score in enumerate(scores)]


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def add_embeddings(app: FastAPI, service: Service) -> None:
    """Adds the routes."""
    batcher = Batcher(service.loop, service.max_batch, service.max_wait_ms / 1000)

    async def calls_of(request: PromptRequest, name: str, prompts: Sequence[tuple[str, Any]]) -> list[Call]:
        param = prompts[-1][0]
        for field, prompt in prompts:
            if isinstance(prompt, str):
                service.check_text(request, prompt, field)
        texts = list(dict.fromkeys(prompt for _, prompt in prompts if isinstance(prompt, str)))  # each is encoded once
        known = dict(zip(texts, await service.encode_all(texts, param=param,
                                                         add_special_tokens=request.add_special_tokens is not False)))
        ids = [known[prompt] if isinstance(prompt, str) else prompt for _, prompt in prompts]
        mailbox, hints = Mailbox(), request.cache_hints()
        return [Call(f"{name}-{i}", service.fit(request, row, 1, param), _PARAMS, mailbox, i, None, hints)
                for i, (row, (param, _)) in enumerate(zip(ids, prompts))]

    def head_of(prefix: str) -> dict[str, Any]:
        return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()),
                "model": service.model_name()}

    @app.post("/v1/embeddings", **documented(EmbeddingRequest, EmbeddingResponse))
    async def create_embedding(request: Request) -> Response:
        body, head = await service.read(EmbeddingRequest, request), head_of("embd")
        rows = await service.json.run(body.size, lambda: rows_of(body.input, "input"))
        prompts = [("input", row) for row in rows]
        return Embeddings(batcher, await calls_of(body, head["id"], prompts), head, body, service.json)

    @app.post("/score", **documented(ScoreRequest, ScoreResponse))
    @app.post("/v1/score", **documented(ScoreRequest, ScoreResponse))
    async def create_score(request: Request) -> Response:
        body, head = await service.read(ScoreRequest, request), head_of("score")
        return Scores(batcher, await calls_of(body, head["id"], body.prompts()), head, body, service.json)
