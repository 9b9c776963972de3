"""/openapi.json says what the routes do."""

import pytest
from test_completions import post

from jaxkv.serve import schemas

HI = [{"role": "user", "content": "hi"}]
JSON_ROUTES = {
    "/v1/completions": "CompletionRequest", "/v1/chat/completions": "ChatCompletionRequest", "/v1/batches": "BatchRequest",
    "/v1/responses": "ResponsesRequest", "/v1/embeddings": "EmbeddingRequest", "/v1/score": "ScoreRequest",
    "/score": "ScoreRequest", "/tokenize": "TokenizeRequest", "/detokenize": "DetokenizeRequest",
}


@pytest.fixture(scope="module")
def document(http):
    return http.get("/openapi.json").json()


def references(node):
    """Every $ref in a piece of JSON."""
    if isinstance(node, dict):
        yield from [node["$ref"]] if "$ref" in node else []
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from references(item)


def test_every_reference_leads_somewhere(document):
    found = set(references(document))
    assert found and all(ref.removeprefix("#/components/schemas/") in document["components"]["schemas"] for ref in found)
    assert "$defs" not in str(document)


def test_bodies_and_answers_are_declared(document):
    for path, name in JSON_ROUTES.items():
        operation = document["paths"][path]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{name}"}
        assert operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    streams = {path for path, operations in document["paths"].items()
               if "text/event-stream" in operations.get("post", {}).get("responses", {}).get("200", {}).get("content", {})}
    assert streams == {"/v1/completions", "/v1/chat/completions", "/v1/responses"}
    assert "multipart/form-data" in document["paths"]["/v1/files"]["post"]["requestBody"]["content"]


def test_what_must_be_given_is_declared(document):
    schemas, paths = document["components"]["schemas"], document["paths"]
    for name, field in (("CompletionRequest", "prompt"), ("EmbeddingRequest", "input"), ("ChatCompletionRequest", "messages")):
        assert field in schemas[name]["required"] and "default" not in schemas[name]["properties"][field]
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    assert {"key": []} in paths["/v1/models"]["get"]["security"] and {"key": []} in paths["/tokenize"]["post"]["security"]
    assert "security" not in paths["/health"]["get"]


def test_errors_are_declared_as_they_are(document, http):
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"], (path, method)
            if path.startswith("/v1"):
                for status in ("400", "401", "404", "408", "415", "429", "500", "503", "504"):
                    schema = operation["responses"][status]["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorResponse"}
    for response in (http.post("/v1/completions", json={}), http.get("/v1/nope"), http.get("/v1/batches?limit=0")):
        schemas.ErrorResponse.model_validate(response.json())


@pytest.mark.parametrize("more", [{}, {"n": 2, "logprobs": 1, "echo": True, "return_token_ids": True, "prompt_logprobs": 1}])
def test_completions_are_as_declared(http, more):
    schemas.CompletionResponse.model_validate(post(http, prompt="a b", **more), extra="forbid")


@pytest.mark.parametrize("more", [{}, {"n": 2, "logprobs": True, "top_logprobs": 1, "return_token_ids": True,
                                       "prompt_logprobs": 1}])
def test_chats_are_as_declared(http, more):
    body = post(http, "/v1/chat/completions", messages=HI, max_tokens=5, **more)
    schemas.ChatCompletionResponse.model_validate(body)


def test_status_routes_are_as_declared(http):
    schemas.ModelList.model_validate(http.get("/v1/models").json(), extra="forbid")
    schemas.ModelCard.model_validate(http.get("/v1/models/fake").json(), extra="forbid")
    for method in ("GET", "POST"):
        assert http.request(method, "/ping").status_code == 200
