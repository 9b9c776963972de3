"""Imports go down only, the host side needs nothing but the standard library, and nothing of ours is imported late."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = ("jaxkv.params", "jaxkv.types", "jaxkv.sequence", "jaxkv.config", "jaxkv.cache", "jaxkv.sched")  # decide without JAX
CORE = {*HOST, "jaxkv.device", "jaxkv.runtime", "pallas_kernels"}
FACE = "jaxkv"  # its __init__.py: `from jaxkv import LLM`, names the upper layers and loads them on demand
TOP = {FACE, *CORE}
MAY_IMPORT = {
    "pallas_kernels": set(),
    "jaxkv.params": set(),
    "jaxkv.types": {"jaxkv.params"},
    "jaxkv.sequence": {"jaxkv.params", "jaxkv.types"},
    "jaxkv.config": {"jaxkv.params", "jaxkv.types"},
    "jaxkv.cache": {"jaxkv.params", "jaxkv.types", "jaxkv.sequence", "jaxkv.config"},
    "jaxkv.device": {"jaxkv.params", "jaxkv.types", "jaxkv.config", "pallas_kernels"},
    "jaxkv.sched": {"jaxkv.params", "jaxkv.types", "jaxkv.sequence", "jaxkv.config", "jaxkv.cache"},
    "jaxkv.runtime": CORE,
    "jaxkv.cli": TOP,
    "jaxkv.__main__": {*TOP, "jaxkv.cli"},
    "jaxkv.llm": {*TOP, "jaxkv.cli"},
    "jaxkv.serve": {*TOP, "jaxkv.cli"},
    "jaxkv.commands": {*TOP, "jaxkv.cli", "jaxkv.llm"},
    "jaxkv.generate": {*TOP, "jaxkv.cli", "jaxkv.serve"},
}
FILES = sorted(path for top in ("jaxkv", "pallas_kernels") for path in (ROOT / top).rglob("*.py")
               if path != ROOT / FACE / "__init__.py")


def part(module: str) -> str:
    """The layer's name a module belongs to: jaxkv.cache.trie -> jaxkv.cache."""
    return ".".join(module.split(".")[:2]) if module.startswith("jaxkv.") else module.split(".")[0]


def ours(module: str) -> bool:
    return module.split(".")[0] in ("jaxkv", "pallas_kernels")


def imported(node: ast.AST, path: Path) -> list[str]:
    """Modules an import statement names: `from jaxkv import cache` jaxkv.cache, `from jaxkv import LLM` jaxkv."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = path.relative_to(ROOT).parts[:-node.level]
        base = ".".join([*package, *([node.module] if node.module else [])])
    if base != "jaxkv":
        return [base]
    return [f"jaxkv.{name}" if list((ROOT / "jaxkv").glob(f"{name}*")) else "jaxkv"
            for name in (alias.name for alias in node.names)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    me = part(module)
    assert me in MAY_IMPORT, f"{me} has no layer: give it one in this test and in the architecture"
    tree = ast.parse(path.read_text())
    top_level = set(map(id, tree.body))
    for node in ast.walk(tree):
        for name in imported(node, path):
            where = f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
            if ours(name):
                assert part(name) == me or part(name) in MAY_IMPORT[me], f"{where}: not below {me}"
                assert id(node) in top_level, f"{where} inside a function or a condition"
            elif me in HOST:
                assert name.split(".")[0] in sys.stdlib_module_names, f"{where}: not in the standard library"


def test_layers_are_a_hierarchy():
    for name, below in MAY_IMPORT.items():
        assert below - {FACE} <= MAY_IMPORT.keys()
        assert all(MAY_IMPORT[other] < below for other in below - {name, FACE}), name


@pytest.mark.parametrize("module", ["jaxkv", "jaxkv.sched.replay"])
def test_the_host_side_starts_without_jax(module):
    code = f"import sys, {module}; print([m for m in ('jax', 'numpy', 'flax', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
