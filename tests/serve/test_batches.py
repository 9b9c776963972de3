"""/v1/files and /v1/batches with the openai client, against the fake engine."""

import contextlib
import json
import tempfile
import threading

import httpx
import openai
import pytest
from serve_fakes import REPLY, FakeEngine, serving, wait_for
from test_bad_input import refused

from jaxkv.config import ConfigError
from jaxkv.serve.errors import ApiError
from jaxkv.serve.files import FileStore
from jaxkv.serve.schemas import BatchList, BatchObject, FileList, FileObject

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def line(name, url="/v1/chat/completions", **body):
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body or CHAT})


def upload(client, *lines):
    return client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")


def start(client, *lines, endpoint="/v1/chat/completions", **more):
    return client.batches.create(input_file_id=upload(client, *lines).id, endpoint=endpoint, completion_window="24h", **more)


def finish(client, batch, *states):
    wait_for(lambda: client.batches.retrieve(batch.id).status in (states or ("completed", "failed", "cancelled")), 20)
    return client.batches.retrieve(batch.id)


def records(client, file_id):
    return {r["custom_id"]: r for r in map(json.loads, client.files.content(file_id).text.splitlines())}


def test_file_life(client, http):
    data = b'{"a": 1}\n\xff raw bytes\n'
    file = client.files.create(file=("../../etc/\u00e4.jsonl", data), purpose="batch")
    assert (file.bytes, file.purpose, file.object, file.status) == (len(data), "batch", "file", "processed")
    FileObject.model_validate(http.get(f"/v1/files/{file.id}").json())
    assert client.files.content(file.id).content == data
    assert file.id in [f.id for f in client.files.list(purpose="batch")]
    assert file.id not in [f.id for f in client.files.list(purpose="other")]
    assert client.files.delete(file.id).deleted
    for gone in (lambda: client.files.retrieve(file.id), lambda: client.files.content(file.id),
                 lambda: client.files.delete(file.id)):
        with pytest.raises(openai.NotFoundError):
            gone()


def test_batch_of_chats_with_bad_lines(client, http, fake):
    batch = start(client, line("a"), "", "{broken", line("b", messages=[{"role": "user", "content": "x"}], stop="sat"),
                  '{"custom_id": 5, "body": {}}', line("c", temperature=101, **CHAT), line("d", "/v1/completions"),
                  line("e", stream=True, **CHAT), line("f", model="other", **CHAT), "[]", metadata={"job": "one"})
    assert batch.status in ("validating", "in_progress") and batch.metadata == {"job": "one"}
    done = finish(client, batch)
    assert done.status == "completed" and done.request_counts.to_dict() == {"total": 9, "completed": 2, "failed": 7}
    good = records(client, done.output_file_id)
    assert set(good) == {"a", "b"} and all(r["response"]["status_code"] == 200 and r["error"] is None for r in good.values())
    body = good["b"]["response"]["body"]
    assert body["choices"][0]["message"]["content"] == REPLY[:REPLY.index("sat")] and body["object"] == "chat.completion"
    bad = [json.loads(row) for row in client.files.content(done.error_file_id).text.splitlines()]
    assert len(bad) == 7
    params = {r["custom_id"]: r["response"]["body"]["error"]["param"] for r in bad if r["response"]}
    assert params == {"c": "temperature", "d": "url", "e": "stream", "f": "model"}
    assert sum(r["response"] is None and bool(r["error"]["message"]) for r in bad) == 3
    assert fake.engine.requests[-1].priority == 1000, "behind everything else"
    BatchObject.model_validate(http.get(f"/v1/batches/{batch.id}").json())
    assert not fake.loop.calls


def test_batches_of_completions_and_embeddings(client):
    one = start(client, line("a", "/v1/completions", prompt=[5], max_tokens=3, priority=2), endpoint="/v1/completions")
    two = start(client, *(line(f"e{i}", "/v1/embeddings", input=[[5], [i]]) for i in range(30)), endpoint="/v1/embeddings")
    assert records(client, finish(client, one).output_file_id)["a"]["response"]["body"]["usage"]["completion_tokens"] == 3
    done = finish(client, two)
    assert done.request_counts.completed == 30 and done.error_file_id is None
    body = records(client, done.output_file_id)["e7"]["response"]["body"]
    assert body["data"][1]["embedding"] == pytest.approx(
        client.embeddings.create(model="fake", input=[7], encoding_format="float").data[0].embedding)


def test_long_lines(client):
    long = {"messages": CHAT["messages"], "max_tokens": 4, "user": "x" * 100_000}
    done = finish(client, start(client, line("a", **long), line("b", **long)[:-1], line("c", x=[[]] * 100_001, **long)))
    assert done.request_counts.to_dict() == {"total": 3, "completed": 1, "failed": 2}
    bad = client.files.content(done.error_file_id).text
    assert "the line is not valid JSON" in bad and "the line may hold at most 100000 lists and objects" in bad


def test_a_nested_line_fails_alone(client):
    deep = json.loads('{"a":' * 500 + "1" + "}" * 500)
    done = finish(client, start(client, line("a"), line("deep", user=deep, **CHAT), json.dumps({"custom_id": deep, "body": 5}),
                                json.dumps({"custom_id": "b", "method": deep}), line("c")))
    assert done.status == "completed" and done.request_counts.to_dict() == {"total": 5, "completed": 2, "failed": 3}


def test_a_line_that_breaks_the_server_fails_alone(client, monkeypatch):
    monkeypatch.setattr("jaxkv.serve.batches.envelope_of", lambda data, unnamed: {}["a bug"])
    done = finish(client, start(client, line("a"), line("b")))
    assert done.status == "completed" and done.request_counts.failed == 2
    assert "internal server error" in client.files.content(done.error_file_id).text


def test_lists_have_pages(client, http):
    made = [start(client, line("a")).id for _ in range(5)]
    assert [b.id for b in client.batches.list(limit=2)][:5] == made[::-1], "the client follows has_more"
    first = http.get("/v1/batches?limit=3").json()
    BatchList.model_validate(first)
    assert first["has_more"] and first["last_id"] == made[2]
    rest = http.get(f"/v1/batches?limit=2&after={first['last_id']}").json()
    assert [b["id"] for b in rest["data"]] == [made[1], made[0]]
    FileList.model_validate(http.get("/v1/files?order=asc&limit=1").json())
    for query in ("limit=0", "limit=x", "after=batch_nope"):
        refused(http.get(f"/v1/batches?{query}"), param=query.partition("=")[0])
    for name in made:
        finish(client, client.batches.retrieve(name))


def test_cancel_keeps_what_is_answered_and_a_waiting_batch_goes_on(tokenizer):
    with serving(lambda: FakeEngine(tokenizer, step_seconds=0.01)) as server, \
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        lines = [line(f"s{i}", max_tokens=1, messages=CHAT["messages"]) for i in range(3)]
        first = start(client, *lines, *(line(f"l{i}", messages=CHAT["messages"]) for i in range(40)))
        second, third = start(client, line("x")), start(client, line("y"))
        wait_for(lambda: client.batches.retrieve(first.id).request_counts.completed >= 3)
        assert len(server.engine.children) <= 8, "bounded concurrency"
        assert client.batches.cancel(second.id).status == "cancelled"
        assert client.batches.cancel(first.id).status == "cancelling"
        done = finish(client, first)
        assert done.status == "cancelled" and {"s0", "s1", "s2"} <= set(records(client, done.output_file_id))
        assert not [call for call in server.loop.calls if "l" in call] or not server.engine.children
        assert finish(client, third).status == "completed" and client.batches.retrieve(second.id).status == "cancelled"
        with pytest.raises(openai.BadRequestError, match="has ended"):
            client.batches.cancel(third.id)


def test_lines_wait_while_the_queue_is_full(tokenizer):
    with serving(lambda: FakeEngine(tokenizer), max_open=4) as server, \
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        done = finish(client, start(client, *(line(f"n{i}", n=3, **CHAT) for i in range(4))))
        assert done.request_counts.completed == 4


def test_a_batch_fails_for_a_file_that_is_none(client, http):
    empty = finish(client, start(client, "", " "))
    assert empty.status == "failed" and "1 to 50000 lines" in empty.errors.data[0].message and empty.output_file_id is None
    file = upload(client, line("a"))
    good = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    for field, value, status in (("input_file_id", "file-nope", 404), ("input_file_id", "../secret", 404),
                                 ("endpoint", "/v1/nope", 400), ("completion_window", "1h", 400), ("metadata", 5, 400)):
        refused(http.post("/v1/batches", json=good | {field: value}), status, field)
    output = finish(client, start(client, line("a"))).output_file_id
    refused(http.post("/v1/batches", json=good | {"input_file_id": output}), param="input_file_id")
    refused(http.get("/v1/batches/batch_nope"), 404)
    refused(http.post("/v1/batches/batch_nope/cancel"), 404)


def test_bad_uploads(http):
    file = {"file": ("a.jsonl", b"{}")}
    refused(http.post("/v1/files", json={}), 415)
    refused(http.post("/v1/files", files=file, data={"purpose": "assistants"}), param="purpose")
    refused(http.post("/v1/files", files=file), param="purpose")
    refused(http.post("/v1/files", files={"other": ("a", b"x")}, data={"purpose": "batch"}), param="file")
    refused(http.post("/v1/files", files=[("file", ("a", b"x")), ("file", ("b", b"x"))], data={"purpose": "batch"}))
    refused(http.post("/v1/files", content=b"junk", headers={"content-type": "multipart/form-data"}))
    refused(http.post("/v1/files", content=b"junk", headers={"content-type": "multipart/form-data; boundary=x"}))
    refused(http.post("/v1/files", files={"file": ("a", b"x" * 2**20)}, data={"purpose": "batch"}), 413)
    for path in ("/v1/files/..%2F..%2Fetc%2Fpasswd", "/v1/files/lock", "/v1/files/file-x/content"):
        refused(http.get(path), 404)


def test_store_is_bounded(tmp_path):
    store = FileStore(str(tmp_path), max_files=2, max_bytes=100)
    draft = store.draft()
    draft.write(b"x" * 60)
    with pytest.raises(ApiError, match="at most 100 bytes"):
        draft.write(b"x" * 41)
    kept = draft.keep("a", "batch", "")
    other = store.draft()
    other.write(b"y" * 40)
    other.discard()
    assert store.bytes == 60 and len(list(tmp_path.glob("*.jsonl"))) == 1
    store.draft().keep("b", "batch", "")
    with pytest.raises(ApiError, match="at most 2 files"):
        store.draft()
    store.delete(kept["id"], "")
    assert store.bytes == 0
    store.close()


def test_operators_directory_outlives_the_server(tokenizer, tmp_path):
    held = threading.Event()

    def build():
        engine = FakeEngine(tokenizer)
        if held.is_set():
            engine.run.clear()
        return engine

    options = {"service": {"batch_dir": str(tmp_path)}}
    with serving(build, **options) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        done = finish(client, start(client, line("a")))
        with pytest.raises(ConfigError, match="another server"):
            FileStore(str(tmp_path))
    held.set()
    with serving(build, **options) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        assert "a" in records(client, client.batches.retrieve(done.id).output_file_id)
        cut = start(client, line("b"))
        finish(client, cut, "in_progress")
        wait_for(lambda: server.engine.children)
    (tmp_path / f"file-{'0' * 32}.jsonl").write_bytes(b"of a process that was killed")
    with serving(build, **options) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        lost = client.batches.retrieve(cut.id)
        assert lost.status == "failed" and "the server ended" in lost.errors.data[0].message
    assert not (tmp_path / f"file-{'0' * 32}.jsonl").exists()


def test_another_key_knows_of_nothing(tokenizer, tmp_path):
    """Files, batches and responses, and those of files and batches after a restart with the keys in another order."""
    def clients(server, stack):
        return [stack.enter_context(openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0))
                for key in ("open-sesame", "second-key")]

    options = {"service": {"batch_dir": str(tmp_path)}}
    with serving(lambda: FakeEngine(tokenizer), api_keys=("open-sesame", "second-key"), **options) as server, \
            contextlib.ExitStack() as stack:
        mine, other = clients(server, stack)
        done = finish(mine, start(mine, line("a"), "{broken"))
        response = mine.responses.create(model="fake", input="hi", max_output_tokens=2)
        assert mine.responses.retrieve(response.id).id == response.id
        for ask in (lambda: other.responses.retrieve(response.id), lambda: other.responses.delete(response.id),
                    lambda: other.responses.create(model="fake", input="a", previous_response_id=response.id)):
            with pytest.raises(openai.NotFoundError):
                ask()
        theirs = finish(other, start(other, line("b")))
        assert [batch.id for batch in other.batches.list()] == [theirs.id]
    files = [done.input_file_id, done.output_file_id, done.error_file_id]
    kept = "".join(file.name + file.read_text() for file in tmp_path.iterdir())
    assert done.id in kept and not any(key in kept for key in ("sesame", "second-key"))
    with serving(lambda: FakeEngine(tokenizer), api_keys=("second-key", "open-sesame"), **options) as server, \
            contextlib.ExitStack() as stack:
        mine, other = clients(server, stack)
        assert [batch.id for batch in mine.batches.list()] == [done.id] and mine.batches.retrieve(done.id) == done
        assert {file.id for file in mine.files.list()} == set(files) and "a" in records(mine, files[1])
        assert not {file.id for file in other.files.list()} & set(files) and len(other.files.list().data) == 2
        more = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        for ask in (lambda: other.batches.retrieve(done.id), lambda: other.batches.cancel(done.id),
                    lambda: other.batches.create(input_file_id=files[0], **more),
                    *(lambda f=f, name=name: f(name) for name in files for f in (other.files.retrieve, other.files.content,
                                                                                 other.files.delete))):
            with pytest.raises(openai.NotFoundError):
                ask()
        assert mine.files.delete(files[0]).deleted
    with serving(lambda: FakeEngine(tokenizer), **options) as server, httpx.Client(base_url=server.url) as http:
        assert not http.get("/v1/files").json()["data"] and not http.get("/v1/batches").json()["data"]  # nobody's


def test_directory_of_its_own_goes_with_the_server(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serving(lambda: FakeEngine(tokenizer)) as server:
        assert not list(tmp_path.iterdir()), "made when it is needed"
        httpx.post(f"{server.url}/v1/files", files={"file": ("a", b"x")}, data={"purpose": "batch"}).raise_for_status()
        assert len(list(tmp_path.glob("jaxkv-files-*/file-*"))) == 2
    assert not list(tmp_path.iterdir())


def test_directory_that_cannot_be_had():
    with pytest.raises(ConfigError, match="cannot be used"):
        FileStore("/proc/nope")
