"""Loading: what is found, what is refused and how, Orbax conversion, fingerprints."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import load_file, save_file

from checkpoints import convert
from jaxkv.config import ConfigError
from jaxkv.device import models
from jaxkv.device.sharding import param_shardings
from jaxkv.runtime import weights
from jaxkv.runtime.safetensors_io import read_header, read_headers
from jaxkv.runtime.weights import load_model
from tests.oracle import dense_logits

LLAMA = {"architectures": ["LlamaForCausalLM"], "vocab_size": 51, "hidden_size": 16, "intermediate_size": 24,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 51, "n_embd": 16, "n_layer": 2, "n_head": 4,
        "n_positions": 64}
UP = "model.layers.1.mlp.up_proj.weight"
MESH = Mesh(np.array(jax.devices()[:1]), ("tp",))
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def mesh(tp: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:tp]), ("tp",))


def tensors_of(config: dict) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    table = models.weight_table(models.spec_from_config(config))
    return {s.name: rng.standard_normal(s.shape, dtype=np.float32) for decl in table for s in decl.sources}


def write(directory: Path, config: dict | None = None, tensors: dict | None = None) -> Path:
    config = LLAMA if config is None else config
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors_of(config) if tensors is None else tensors, directory / "model.safetensors")
    return directory


def logits(loaded: weights.LoadedModel) -> np.ndarray:
    return np.asarray(dense_logits(loaded.spec, loaded.params, IDS))


def refusal(model: Path | str, **options) -> str:
    with pytest.raises(ConfigError) as error:
        load_model(str(model), MESH, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_built_in_model_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()  # a user's own directory of that name does not hide ours
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    loaded = load_model(None, MESH)
    assert loaded.name == "jaxkv-tiny" and (loaded.directory / "tokenizer.json").is_file()
    assert loaded.spec.max_position >= 2048 and loaded.spec.tied and loaded.spec.dtype == "float32"
    assert loaded.nbytes == sum(leaf.nbytes for leaf in loaded.params)


def test_missing_pieces_are_refused(tmp_path: Path) -> None:
    assert "no directory" in refusal(tmp_path / "nowhere")
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert "has no weights" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "no *.safetensors" in refusal(tmp_path)
    assert load_model(str(tmp_path), MESH, load_format="dummy").params


@pytest.mark.parametrize("text", ["{", "[1]", "", b"\xff\xfe{}"])
def test_corrupt_config_is_refused(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "config.json" in refusal(tmp_path)


def test_unknown_hub_id_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args, **options):
        raise OSError("We couldn't connect to the hub\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert refusal("nobody/nothing") == ("model 'nobody/nothing' is no local directory and cannot be fetched from the "
                                         "hub: We couldn't connect to the hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(weights.BUILT_IN))
    assert load_model("some/model", MESH).name == "some/model"


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA)
    missing = {k: v for k, v in tensors.items() if k != UP}
    assert f"tensor {UP} is missing" in refusal(write(tmp_path, tensors=missing))
    extra = {**tensors, "model.layers.2.mlp.up_proj.weight": tensors[UP]}
    assert "unexpected tensor model.layers.2.mlp.up_proj.weight" in refusal(write(tmp_path, tensors=extra))
    shaped = {**tensors, UP: tensors[UP][:-1].copy()}
    text = refusal(write(tmp_path, tensors=shaped))
    assert UP in text and "(23, 16)" in text and "(24, 16)" in text
    integer = {**tensors, UP: tensors[UP].astype(np.int8)}
    text = refusal(write(tmp_path, tensors=integer))
    assert UP in text and "I8" in text
    untied = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    assert "tensor lm_head.weight is missing" in refusal(write(tmp_path, tensors=untied))


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    inv = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for i in range(2)}
    load_model(str(write(tmp_path / "a", tensors={**tensors_of(LLAMA), **inv})), MESH)
    masks = {f"transformer.h.{i}.attn.{n}": np.ones((1, 1, 4, 4), np.float32) for i in range(2)
             for n in ("bias", "masked_bias")}
    load_model(str(write(tmp_path / "b", GPT2, {**tensors_of(GPT2), **masks})), MESH)


def test_bare_decoder_names(tmp_path: Path) -> None:
    """The hub's gpt2 file has no "transformer." prefix."""
    tensors = tensors_of(GPT2)
    whole = logits(load_model(str(write(tmp_path / "a", GPT2, tensors)), MESH))
    bare = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    np.testing.assert_array_equal(whole, logits(load_model(str(write(tmp_path / "b", GPT2, bare)), MESH)))


@pytest.mark.parametrize("present", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_tied_table_under_either_name(tmp_path: Path, present: str) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    tensors = tensors_of(config)
    expected = logits(load_model(str(write(tmp_path, config, tensors)), MESH))
    table = tensors.pop("model.embed_tokens.weight")
    names = ["model.embed_tokens.weight", "lm_head.weight"] if present == "both" else [present]
    loaded = load_model(str(write(tmp_path, config, {**tensors, **{n: table.copy() for n in names}})), MESH)
    np.testing.assert_array_equal(logits(loaded), expected)


@pytest.mark.parametrize("change", ["value", "shape", "dtype"])
def test_a_tied_model_with_a_head_of_its_own_is_refused(tmp_path: Path, change: str) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    tensors = tensors_of(config)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    head = {"value": head, "shape": head[:-1].copy(), "dtype": head.astype(np.float16)}[change]
    text = refusal(write(tmp_path, config, {**tensors, "lm_head.weight": head}))
    assert "lm_head.weight" in text and "tie_word_embeddings" in text
    if change == "value":  # with what the line says, both are used
        one = logits(load_model(str(write(tmp_path / "tied", config, tensors)), MESH))
        two = logits(load_model(str(write(tmp_path, LLAMA, {**tensors, "lm_head.weight": head})), MESH))
        assert np.abs(one - two)[:, -1].max() > 0.1


@pytest.mark.parametrize("damage", ["cut", "header", "length", "empty", "offsets"])
def test_corrupt_weight_files_are_refused(tmp_path: Path, damage: str) -> None:
    file = write(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    bad_header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    file.write_bytes({"cut": data[:-100], "header": data[:8] + b"x" + data[9:], "length": b"\xff" * 8 + data[8:],
                      "empty": b"", "offsets": len(bad_header).to_bytes(8, "little") + bad_header + bytes(8)}[damage])
    assert "model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(("shape", "offsets", "dtype"), [
    ([4], [-16, 0], "F32"), ([4], [0.0, 16.0], "F32"), ([True], [False, 4], "F32"), ([-2, -2], [0, 16], "F32"),
    ([4], [16, 0], "I8"), ([], [0, True], "I8"), ("", [0, 16], "I8"), ("4", [0, 16], "I8"), ([4.0], [0, 16], "F32"),
    ([4], [0, 16, 16], "F32"), ([4], [0, 16], ["F32"]), ([4], [12, 28], None),
    ([4], [8, 24], "F32"), ([1], [4, 8], "F32"),  # overlaps of the other tensor
])
def test_malformed_headers_are_refused(tmp_path: Path, shape: object, offsets: object, dtype: object) -> None:
    tensors = {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
               "b": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    header = json.dumps(tensors).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ConfigError, match="model.safetensors"):
        read_header(file)


def test_sharded_index_errors(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    assert "index.json" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": {UP: "one.safetensors", "b": "two.safetensors"}}))
    assert "two.safetensors" in refusal(tmp_path)
    index.unlink()
    assert len(read_headers(tmp_path)) == len(read_header(tmp_path / "one.safetensors"))


def test_the_index_says_which_file_a_tensor_is_from(tmp_path: Path) -> None:
    tensors = tensors_of(LLAMA)
    expected = logits(load_model(str(write(tmp_path, tensors=tensors)), MESH))
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    names = {name: f"{'ba'[i % 2]}.safetensors" for i, name in enumerate(tensors)}
    for file in ("a.safetensors", "b.safetensors"):  # what belongs to the other file is there too, but stale
        save_file({k: v if names[k] == file else v + 1 for k, v in tensors.items()}, tmp_path / file)
    index.write_text(json.dumps({"weight_map": names}))
    np.testing.assert_array_equal(logits(load_model(str(tmp_path), MESH)), expected)
    save_file({UP: tensors[UP]}, tmp_path / "a.safetensors")
    save_file({k: v for k, v in tensors.items() if k != UP}, tmp_path / "b.safetensors")
    index.write_text(json.dumps({"weight_map": {name: "b.safetensors" for name in tensors}}))
    assert f"tensor {UP} is not in {tmp_path / 'b.safetensors'}" in refusal(tmp_path)


def test_a_tensor_in_two_files_is_refused_without_an_index(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    save_file({UP: tensors_of(LLAMA)[UP]}, tmp_path / "b.safetensors")
    text = refusal(tmp_path)
    assert UP in text and "a.safetensors" in text and "b.safetensors" in text


@pytest.mark.parametrize("name", ["../one.safetensors", "/one.safetensors", "x/../../one.safetensors", "", 3, None])
def test_an_index_names_files_of_its_directory(tmp_path: Path, name: str | int | None) -> None:
    write(tmp_path / "one").joinpath("model.safetensors").rename(tmp_path / "one.safetensors")
    index = tmp_path / "one" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {UP: name}}))
    text = refusal(tmp_path / "one")
    assert str(index) in text and UP in text and repr(name) in text


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["auto", "bfloat16"])
def test_dtypes(tmp_path: Path, source: str, wanted: str) -> None:
    kind = ml_dtypes.bfloat16 if source == "bfloat16" else np.dtype(source)
    tensors = {k: v.astype(kind) for k, v in tensors_of(LLAMA).items()}
    loaded = load_model(str(write(tmp_path, tensors=tensors)), MESH, dtype=wanted)
    expected = "float32" if wanted == "auto" else wanted
    assert loaded.spec.dtype == loaded.spec.weight_dtype == expected
    names = [decl.name for decl in models.weight_table(loaded.spec)]
    leaf = np.asarray(loaded.params[names.index("layers.1.down")])
    np.testing.assert_array_equal(leaf, tensors["model.layers.1.mlp.down_proj.weight"].astype(leaf.dtype))


def test_auto_dtype_off_cpu() -> None:
    assert weights.resolve_dtype("auto", "gpu", {"torch_dtype": "float16"}, {}) == "float16"
    entries = read_headers(weights.BUILT_IN)
    assert weights.resolve_dtype("auto", "gpu", {}, entries) == "bfloat16"
    assert weights.resolve_dtype("auto", "cpu", {"dtype": "bfloat16"}, entries) == "float32"


def test_every_device_holds_its_part_only(tmp_path: Path) -> None:
    loaded = load_model(str(write(tmp_path)), mesh(4))
    table = models.weight_table(loaded.spec)
    assert [leaf.sharding for leaf in loaded.params] == list(param_shardings(loaded.spec, mesh(4)))
    split = {decl.name for decl, leaf in zip(table, loaded.params) if not leaf.sharding.is_fully_replicated}
    assert {"embed", "head", "layers.0.qkv", "layers.0.out", "layers.0.gate_up", "layers.0.down"} <= split
    assert loaded.params[0].shape[0] == 52 and loaded.params[0].sharding.spec == PartitionSpec("tp", None)
    for leaf in loaded.params:
        parts = {str(s.index) for s in leaf.addressable_shards}
        assert sum(s.data.size for s in leaf.addressable_shards) == leaf.size * 4 // len(parts)


def test_fingerprint(tmp_path: Path) -> None:
    """Same files, same print, wherever they lie; another weight, config or dtype, another print."""
    one = load_model(str(write(tmp_path / "a")), MESH)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load_model(str(tmp_path / "b"), MESH).fingerprint == one.fingerprint and len(one.fingerprint) == 64
    tensors = tensors_of(LLAMA)
    tensors[UP][0, 0] += 1
    others = [
        load_model(str(write(tmp_path / "c", tensors=tensors)), MESH).fingerprint,
        load_model(str(write(tmp_path / "d", {**LLAMA, "rope_theta": 5.0})), MESH).fingerprint,
        load_model(str(tmp_path / "a"), MESH, dtype="bfloat16").fingerprint,
        load_model(str(tmp_path / "a"), MESH, load_format="dummy").fingerprint,
        load_model(str(tmp_path / "a"), MESH, load_format="dummy", seed=1).fingerprint,
    ]
    assert len({one.fingerprint, *others}) == 6


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_every_byte_of_the_weights_is_in_the_fingerprint(tmp_path: Path, kind: str) -> None:
    config = {**LLAMA, "vocab_size": 1024}
    tensors = tensors_of(config)

    def prints(name: str) -> set[str]:
        directory = write(tmp_path / name, config, tensors)
        if kind == "orbax":
            assert convert.main(["--to", "orbax", str(directory), str(tmp_path / f"{name}.orbax")]) == 0
            directory = tmp_path / f"{name}.orbax"
        return {load_model(str(directory), over).fingerprint for over in (MESH, mesh(2))}

    one = prints("a")
    assert len(one) == 1 and prints("b") == one
    tensors["model.embed_tokens.weight"].view(np.uint8)[260, 7] ^= 1  # 64 KB; far from both ends and the middle
    assert len(one | prints("c")) == 2


def test_dummy_weights_do_not_depend_on_the_mesh(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    one, four = (logits(load_model(str(tmp_path), mesh(tp), load_format="dummy")) for tp in (1, 4))
    np.testing.assert_allclose(one, four, atol=1e-5)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_orbax_round_trip(tmp_path: Path, config: dict) -> None:
    """HF -> Orbax -> any mesh, and back to the identical HF tensors; the CLI does the same."""
    source, orbax, back = write(tmp_path / "hf", config), tmp_path / "orbax", tmp_path / "back"
    (source / "tokenizer.json").write_text("{}")
    assert convert.main(["--to", "orbax", str(source), str(orbax)]) == 0
    assert (orbax / "tokenizer.json").is_file() and not list(orbax.glob("*.safetensors"))
    expected = load_model(str(source), MESH)
    loaded = load_model(str(orbax), MESH)
    for a, b in zip(expected.params, loaded.params, strict=True):
        np.testing.assert_array_equal(a, b)
    two = load_model(str(orbax), mesh(2))
    assert two.spec.tp == 2
    np.testing.assert_allclose(logits(two), logits(expected), atol=1e-4)
    assert load_model(str(orbax), MESH, dtype="bfloat16").params[0].dtype == "bfloat16"

    assert convert.main(["--to", "hf", str(orbax), str(back), "--dtype", "float32"]) == 0
    restored, original = load_file(back / "model.safetensors"), load_file(source / "model.safetensors")
    assert restored.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(restored[name], tensor)


def test_orbax_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, orbax = write(tmp_path / "hf"), tmp_path / "orbax"
    assert convert.main(["--to", "orbax", str(source), str(orbax)]) == 0
    assert convert.main(["--to", "orbax", str(source), str(orbax)]) == 2
    assert "already" in capsys.readouterr().err
    config = orbax / "config.json"
    config.write_text(json.dumps({**LLAMA, "num_hidden_layers": 3}))
    assert "layers.2.norm1 is missing" in refusal(orbax)
    config.write_text(json.dumps({**LLAMA, "num_hidden_layers": 1}))
    assert "unexpected tensor layers.1" in refusal(orbax)
    config.write_text(json.dumps({**LLAMA, "vocab_size": 52}))
    assert "tensor embed has shape" in refusal(orbax)
    shutil.rmtree(orbax / "orbax")
    (orbax / "orbax").mkdir()
    assert "Orbax" in refusal(orbax)
