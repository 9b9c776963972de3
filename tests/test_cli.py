"""Every command's options: help without a device, values from file and environment, one-line errors, completion."""

import argparse
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxkv.__main__ import COMMANDS, SHELLS
from jaxkv.cli import OneLineParser, add_engine_args, config_from_namespace, one_line_errors
from jaxkv.config import ConfigError
from jaxkv.serve.__main__ import make_parser

ROOT = Path(__file__).parent.parent


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "jaxkv", *args], env=path | env, cwd=ROOT, text=True, capture_output=True,
                          timeout=60, stdin=subprocess.DEVNULL)


def refused(capsys, parse) -> str:
    """The one line of an exit with code 2."""
    with pytest.raises(SystemExit) as end:
        parse()
    error = capsys.readouterr().err
    assert end.value.code == 2 and len(error.splitlines()) == 1, error
    return error


@pytest.mark.parametrize("args", [["--help"], *([name, flag] for name in COMMANDS for flag in ("--help", "--help-all"))],
                         ids=" ".join)
def test_help_starts_nothing(args):
    code = (f"import sys\nfrom jaxkv.__main__ import main\ntry: main({args})\nexcept SystemExit as end:\n"
            "    print(end.code, sorted({'jax', 'numpy', 'fastapi', 'transformers', 'yaml'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout.endswith("0 []\n"), done.stdout[-100:]
    if args[-1] == "--help":
        assert len(done.stdout.splitlines()) <= 60
    if args == ["serve", "--help-all"]:
        assert all(title in done.stdout for title in ("server:", "model:", "KV cache:", "scheduling:", "--eviction-policy"))


def test_the_console_script_is_there():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["jaxkv"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_exit_codes():
    done = run("--version")
    assert done.returncode == 0 and done.stdout.startswith("jaxkv ")
    for args, env, words in [([], {}, "COMMAND"), (["fly"], {}, "invalid choice: 'fly'"),
                             (["serve", "--nope"], {}, "jaxkv serve: error: unrecognized arguments: --nope"),
                             (["serve"], {"JAXKV_PORT": "x"}, "jaxkv serve: error: JAXKV_PORT: invalid int value: 'x'"),
                             (["generate"], {"JAXKV_INPUT": "in"}, "required: --output"),
                             (["serve", "--model", "/no/such", "--kv-layout", "columns"], {}, "invalid choice: 'columns'"),
                             (["generate", "--model", "/no/such", "--input", "i", "--output", "o"],
                              {"JAXKV_KV_LAYOUT": "rows"}, "JAXKV_KV_LAYOUT: must be one of auto, token_major"),
                             (["inspect", "/no/such"], {}, "'/no/such' is neither a directory nor a server's URL"),
                             (["chat", "--url", "localhost"], {}, "url must look like http://host:port"),
                             (["bench", "--url", "http://127.0.0.1:9"], {}, "cannot reach 127.0.0.1:9")]:
        done = run(*args, **env)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_precedence(monkeypatch, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("port: 1\nhost: a\nmax-num-seqs: 3\noverlap: no\napi_key: [0123, 'a, b']\nblock_size: 8\n"
                    "disk_kv_path: x\ndisk_kv_required: true\n")
    monkeypatch.setenv("JAXKV_PORT", "2")
    monkeypatch.setenv("JAXKV_HOST", "b")
    monkeypatch.setenv("JAXKV_SERVED_MODEL_NAME", "")  # as Compose writes what is not set
    monkeypatch.setenv("JAXKV_CONFIG", str(file))
    args = make_parser().parse_args(["--port", "3"])
    assert (args.port, args.host, args.max_open_requests, args.served_model_name) == (3, "b", 1024, None)
    assert args.api_key == ["0123", "a, b"] and not args.sources.get("port") and args.disk_kv_required is True
    config = config_from_namespace(args)
    assert (config.sched.max_num_seqs, config.sched.overlap, config.cache.page_size) == (3, False, 8)
    monkeypatch.setenv("JAXKV_API_KEY", "x,y")
    assert make_parser().parse_args([]).api_key == ["x", "y"]
    assert make_parser().parse_args(["--api-key", "z"]).api_key == ["z"], "a list on the command line is not added to others"
    file.write_text("api-key: 'p, q'")
    monkeypatch.delenv("JAXKV_API_KEY")
    assert make_parser().parse_args([]).api_key == ["p, q"], "only the environment is split at commas"
    monkeypatch.setenv("JAXKV_API_KEY", "x, y")
    monkeypatch.setenv("JAXKV_OVERLAP", "True")
    assert make_parser().parse_args([]).overlap is True
    assert make_parser().parse_args(["--no-overlap"]).overlap is False
    assert make_parser().parse_args(["--config", "/dev/null"]).api_key == ["x", "y"]


@pytest.mark.parametrize(("text", "words"), [
    ("prt: 1", "c.yaml: prt: unknown option; did you mean port?"), ("port: many", "c.yaml: port: invalid int value: 'many'"),
    ("port: [1, 2]", "c.yaml: port: must be one value, got a list"), ("port: {a: 1}", "c.yaml: port: must be one value or"),
    ("port:", "c.yaml: port: has no value"), ("port: 1\nport: 2", "c.yaml: port and"), ("dtype: int3", "dtype: must be one of"),
    ("page_size: 1\nblock-size: 1", "c.yaml: page_size and"), ("overlap: maybe", "overlap: must be true or false, got 'maybe'"),
    ("- port", "must hold option names"), ("port: [", "is no YAML"), ("config: other", "config: unknown option"),
    ("api_key: !!python/object/apply:os.system [id]", "c.yaml: api_key: must be one value"), ("help: true", "unknown option"),
    ("\0", "is no YAML"),
])
def test_bad_files(tmp_path, capsys, text, words):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    parse = lambda: print(make_parser().parse_args(["--config", str(file)]))  # noqa: E731
    if words.startswith("c.yaml: api_key"):  # tags mean nothing: it is a list of texts
        assert make_parser().parse_args(["--config", str(file)]).api_key == ["id"]
        return
    error = refused(capsys, parse)
    assert words in error and str(file) in error


def test_a_file_that_is_not_there(capsys):
    for path in ("/no/such/file.yaml", "/"):
        error = refused(capsys, lambda path=path: make_parser().parse_args(["--config", path]))
        assert f"config {path!r} cannot be read" in error


def test_errors_say_where_values_come_from(monkeypatch, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("max_num_seqs: 100")
    monkeypatch.setenv("JAXKV_MAX_NUM_BATCHED_TOKENS", "50")
    args = make_parser().parse_args(["--config", str(tmp_path / "c.yaml"), "--page-size", "16"])

    def build():
        with one_line_errors("prog", args):
            config_from_namespace(args)

    error = refused(capsys, build)
    assert "max_num_batched_tokens from JAXKV_MAX_NUM_BATCHED_TOKENS" in error
    assert f"max_num_seqs from {tmp_path / 'c.yaml'}: max_num_seqs" in error and "page_size" not in error


def test_a_plain_parser_takes_the_engine_options_too():
    parser = argparse.ArgumentParser()
    add_engine_args(parser)
    assert config_from_namespace(parser.parse_args(["--max-num-seqs", "5"])).sched.max_num_seqs == 5
    with pytest.raises(ConfigError, match="max_num_seqs"):
        config_from_namespace(parser.parse_args(["--max-num-seqs", "0"]))


def test_required_options_may_come_from_anywhere(monkeypatch, capsys):
    parser = OneLineParser("p")
    parser.add_argument("--input", required=True, type=int)
    parser.add_argument("--origins", nargs="+", default=["c"], help="(default: %(default)s)")
    parser.add_argument("--word", action="append", default=["w"])
    assert "--input" in refused(capsys, lambda: parser.parse_args([]))
    monkeypatch.setenv("JAXKV_INPUT", "7")
    monkeypatch.setenv("JAXKV_ORIGINS", "a,b")
    assert parser.parse_args([]).input == 7 and parser.parse_args([]).origins == ["a", "b"]
    assert parser.parse_args(["--word", "x", "--word", "y"]).word == ["x", "y"] and parser.parse_args([]).word == ["w"]
    assert "(default: ['c'])" in parser.format_help()
    assert parser.parse_args(["--input", "8"]).input == 8


@pytest.mark.parametrize("shell", SHELLS)
def test_completion(shell, tmp_path):
    done = run("completion", shell)
    assert done.returncode == 0 and done.stderr == ""
    assert "kv-cache-memory" in done.stdout and all(name in done.stdout for name in COMMANDS)
    if shell == "bash":
        (tmp_path / "c").write_text(done.stdout)
        ask = f"source {tmp_path / 'c'}; COMP_WORDS=(jaxkv serve --eviction-policy l); COMP_CWORD=3; " \
              "_shtab_jaxkv; echo \"${COMPREPLY[@]}\""
        words = subprocess.run(["bash", "-c", ask], text=True, capture_output=True)
        assert {"lfu", "lru"} <= set(words.stdout.split()), words
