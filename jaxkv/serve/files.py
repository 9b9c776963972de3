"""/v1/files: what batches read and write, in one directory, bounded in number and bytes.

A file is known by an id that the server drew, and to the API key that made it only; nothing in a request becomes a path.
What the directory holds outlives the process, unless it is the one that goes with it. Batches keep their own records here
too (``Records``).
"""

from __future__ import annotations

import asyncio
import fcntl
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import orjson
from fastapi import FastAPI, Query, Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import FileResponse

from jaxkv.config import ConfigError
from jaxkv.serve.errors import ApiError, bad_request
from jaxkv.serve.limits import owner_of
from jaxkv.serve.openapi import documented
from jaxkv.serve.schemas import Deleted, ErrorResponse, FileList, FileObject
from jaxkv.serve.service import Service

MAX_FILES = 1000
MAX_BYTES = 2**30  # of all files together
MAX_NAME = 255  # characters of a file's name, which is only shown
Limit = Annotated[int, Query(ge=1, le=10_000)]


class Records:
    """JSON objects by id, each in a file of its own, oldest first. Whoever is not its owner does not learn of one."""

    def __init__(self, directory: Path, prefix: str):
        self._directory, self._prefix = directory, prefix
        name = re.compile(rf"({prefix}[0-9a-f]{{32}})\.json")
        found = [(orjson.loads(file.read_bytes()), match[1]) for file in directory.iterdir()
                 if (match := name.fullmatch(file.name))]
        self._owners = {name: record.pop("owner", "") for record, name in found}
        self._items = {name: record for record, name in sorted(found, key=lambda pair: pair[0]["created_at"])}

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def new_id(self) -> str:
        """An id nobody can guess."""
        return self._prefix + uuid.uuid4().hex

    def add(self, record: dict[str, Any], owner: str) -> None:
        """Keeps a new record."""
        self._owners[record["id"]] = owner
        self.save(record)

    def save(self, record: dict[str, Any]) -> None:
        """Keeps a record as it is now, whole or not at all."""
        self._items[record["id"]] = record
        target = self._directory / f"{record['id']}.json"
        draft = target.with_suffix(".draft")
        draft.write_bytes(orjson.dumps(record | {"owner": self._owners[record["id"]]}))
        draft.replace(target)

    def owner(self, name: str) -> str:
        """Of a known record."""
        return self._owners[name]

    def get(self, name: str, owner: str, param: str | None = None) -> dict[str, Any]:
        """Raises ApiError, a 404, for an id that the owner does not know."""
        if self._owners.get(name) != owner:
            raise ApiError(404, f"{name[:100]!r} does not exist", param=param, code="not_found")
        return self._items[name]

    def drop(self, name: str) -> None:
        """Forgets a record."""
        del self._items[name], self._owners[name]
        (self._directory / f"{name}.json").unlink(missing_ok=True)

    def all(self, owner: str | None = None) -> list[dict[str, Any]]:
        """Every record, or those of one owner, newest first."""
        return [record for name, record in reversed(self._items.items()) if owner in (None, self._owners[name])]


def page(records: Sequence[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """A list object: up to ``limit`` records behind the one with the id ``after``. Raises ApiError if there is none."""
    start = 0
    if after is not None:
        start = 1 + next((i for i, record in enumerate(records) if record["id"] == after), -2)
        if start < 0:
            raise bad_request(f"after must be the id of a listed object, got {after[:100]!r}", "after")
    data = records[start : start + limit]
    return {"object": "list", "data": data, "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None, "has_more": start + limit < len(records)}


class FileStore:
    """Files of a directory, which is created; None: a new one, to be removed by ``close``. ConfigError for a directory that
    cannot be had."""

    def __init__(self, directory: str | None, max_files: int = MAX_FILES, max_bytes: int = MAX_BYTES):
        self._temporary = directory is None
        self.directory = Path(directory or tempfile.mkdtemp(prefix="jaxkv-files-"))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.directory / "lock", "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the system, however the process ends
        except BlockingIOError:
            self._lock.close()
            raise ConfigError(f"batch_dir {directory} is used by another server") from None
        except OSError as error:
            raise ConfigError(f"batch_dir {directory} cannot be used: {error.strerror}") from None
        self.max_files, self.max_bytes = max_files, max_bytes
        self.records = Records(self.directory, "file-")
        for file in self.directory.iterdir():  # what a process that was killed had not finished
            if re.fullmatch(r"file-[0-9a-f]{32}(\.jsonl|\.draft)", file.name) and file.stem not in self.records:
                file.unlink()
        self.bytes = sum(record["bytes"] for record in self.records.all())

    def close(self) -> None:
        """Gives the directory back, or removes it if it was its own."""
        self._lock.close()
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def path(self, name: str, owner: str) -> Path:
        """Where the content of a file is. Raises ApiError, a 404, for an id that the owner does not know."""
        return self.directory / f"{self.records.get(name, owner)['id']}.jsonl"

    def reserve(self, size: int) -> None:
        """Counts bytes that are about to be written. Raises ApiError, a 413, if there is no room."""
        if self.bytes + size > self.max_bytes:
            raise ApiError(413, f"files may hold at most {self.max_bytes} bytes together, {self.bytes} are taken and {size} "
                                "more asked for: delete some", code="storage_full")
        self.bytes += size

    def draft(self) -> Draft:
        """A new file, to be written to and then kept. Raises ApiError when there are too many."""
        if len(self.records) >= self.max_files:
            raise ApiError(413, f"there may be at most {self.max_files} files: delete some", code="storage_full")
        return Draft(self)

    def delete(self, name: str, owner: str) -> None:
        """Raises ApiError, a 404, for an id that the owner does not know."""
        path, size = self.path(name, owner), self.records.get(name, owner)["bytes"]
        self.records.drop(name)
        path.unlink(missing_ok=True)
        self.bytes -= size


class Draft:
    """A file being written."""

    def __init__(self, store: FileStore):
        self._store, self.id, self.size = store, store.records.new_id(), 0
        self._path = store.directory / f"{self.id}.jsonl"
        self._file: BinaryIO = open(self._path, "wb")  # closed by keep or discard

    def write(self, data: bytes) -> None:
        """Appends. Raises ApiError, a 413, if there is no room."""
        self._store.reserve(len(data))
        self.size += len(data)
        self._file.write(data)

    def keep(self, filename: str, purpose: str, owner: str) -> dict[str, Any]:
        """Ends it; its file object."""
        self._file.close()
        record = {"id": self.id, "object": "file", "bytes": self.size, "created_at": int(time.time()),
                  "filename": filename[:MAX_NAME], "purpose": purpose, "status": "processed"}
        self._store.records.add(record, owner)
        return record

    def discard(self) -> None:
        """Ends it and leaves nothing."""
        self._file.close()
        self._path.unlink(missing_ok=True)
        self._store.bytes -= self.size


async def _form(service: Service, request: Request) -> FormData:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(415, "a file must be sent as multipart/form-data", code="unsupported_media_type")
    try:
        return await MultiPartParser(request.headers, service.parts(request), max_files=1, max_fields=16).parse()
    except MultiPartException as error:
        raise bad_request(f"the body is not valid multipart/form-data: {error.message}") from None


def _copy(source: BinaryIO, draft: Draft) -> None:
    pieces: Iterator[bytes] = iter(lambda: source.read(2**20), b"")
    for piece in pieces:
        draft.write(piece)


def add_files(app: FastAPI, service: Service) -> Callable[[], FileStore]:
    """Adds the routes. Returns what gives the store, which is made at its first use; the operator's directory is opened at
    once. ConfigError if that cannot be had."""
    stores: list[FileStore] = []

    def store() -> FileStore:
        if not stores:
            stores.append(FileStore(service.batch_dir))
            service.cleanup.callback(stores[0].close)
        return stores[0]

    if service.batch_dir is not None:
        store()
    body = {"type": "object", "required": ["file", "purpose"],
            "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": ["batch"]}}}
    upload = documented(None, FileObject)
    upload["responses"][415] = {"model": ErrorResponse, "description": "The body is not multipart/form-data."}
    upload["openapi_extra"] = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": body}}}}

    @app.post("/v1/files", **upload)
    async def upload_file(request: Request) -> Any:
        form = await _form(service, request)
        try:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise bad_request("file must be a file", "file")
            if purpose != "batch":
                raise bad_request(f"purpose must be \"batch\", got {str(purpose)[:40]!r}", "purpose")
            draft = store().draft()
            try:
                await asyncio.to_thread(_copy, file.file, draft)
            except BaseException:
                draft.discard()
                raise
            return draft.keep(file.filename or "", "batch", owner_of(request.scope))
        finally:
            await form.close()

    @app.get("/v1/files", **documented(None, FileList))
    async def list_files(request: Request, purpose: str | None = None, after: str | None = None, limit: Limit = 10_000,
                         order: Literal["asc", "desc"] = "desc") -> Any:
        records = [r for r in store().records.all(owner_of(request.scope)) if purpose in (None, r["purpose"])]
        return page(records if order == "desc" else records[::-1], after, limit)

    @app.get("/v1/files/{name}", **documented(None, FileObject))
    async def get_file(name: str, request: Request) -> Any:
        return store().records.get(name, owner_of(request.scope))

    @app.get("/v1/files/{name}/content", **documented(None, None), response_class=FileResponse)
    async def get_content(name: str, request: Request) -> FileResponse:
        return FileResponse(store().path(name, owner_of(request.scope)), media_type="application/octet-stream")

    @app.delete("/v1/files/{name}", **documented(None, Deleted))
    async def delete_file(name: str, request: Request) -> Any:
        store().delete(name, owner_of(request.scope))
        return {"id": name, "object": "file", "deleted": True}

    return store
