"""The package's modules import each other without circles, for type checkers too."""

import ast
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "src"


def modules():
    """The package's modules by dotted name, without generated stubs."""
    found = {}
    for path in (SOURCES / "mlxd").rglob("*.py"):
        parts = path.relative_to(SOURCES).with_suffix("").parts
        if "v1" not in parts:
            name = ".".join(parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree, known):
    """The known modules that a module names, inside functions and TYPE_CHECKING blocks too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            # `from package import module` needs the module; of anything else, the package.
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from [name for name in (inner, node.module) if name in known][:1]


def circle(graph):
    """The modules of one circle, None without one."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        path.append(name)
        found = next(filter(None, map(visit, sorted(graph[name]))), None)
        path.pop()
        done.add(name)
        return found

    return next(filter(None, map(visit, sorted(graph))), None)


def test_no_modules_import_each_other():
    trees = modules()
    assert {"mlxd.client", "mlxd.session", "mlxd.aio.client", "mlxd.abstractllm"} <= trees.keys()
    assert circle({name: set(imports(tree, trees)) for name, tree in trees.items()}) is None


def test_a_circle_is_found():
    sources = {
        "p": "from p.a import A",
        "p.a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import b",
        "p.b": "def f():\n    import p.a",
    }
    graph = {name: set(imports(ast.parse(text), sources)) for name, text in sources.items()}
    assert circle(graph) == ["p.a", "p.b", "p.a"]
    assert circle({**graph, "p.b": set()}) is None
