"""Imports point down only: the table of docs/architecture.md, enforced on the syntax tree."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "coala"

# What everybody may import: values, and the small modules that know nothing but words.
GROUND = {"values", "policies", "documents", "messages", "settings", "permission", "processes", "callbacks"}

# Doors from a value to its own file or row, inside a method: the value knows the way, not what is behind it.
DOORS = {("values", "store"), ("values", "data"), ("policies", "store")}

# module or package -> what else it may import from coala, and which heavy libraries it may import at module level
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "values": ({"messages"}, set()),
    "policies": (set(), set()),
    "documents": (set(), set()),
    "messages": (set(), set()),
    "settings": (set(), set()),
    "permission": (set(), set()),
    "processes": (set(), set()),
    "callbacks": (set(), set()),
    "store": (set(), set()),
    "statistics": (set(), set()),
    "trackers": ({"store"}, set()),
    "__main__": ({"cli"}, set()),
    "costs": (set(), set()),
    "recipe": (set(), {"pydantic", "yaml"}),
    "pages": (set(), set()),
    "endpoint": (set(), set()),
    "data": ({"store", "statistics", "pages", "endpoint"}, set()),
    "backbone": ({"costs"}, {"torch", "transformers"}),
    "convex": ({"statistics"}, {"jax", "jaxtyping"}),
    "features": ({"store", "costs", "backbone"}, {"torch"}),
    "decoding": ({"store", "recipe", "backbone"}, {"torch"}),
    "evaluation": ({"data", "statistics", "endpoint"}, set()),
    "baselines": ({"store", "statistics", "costs", "backbone"}, {"torch"}),
    "nash": ({"store", "statistics", "pages"}, {"jaxtyping", "scipy"}),
    "comal": (
        {
            *(
                "store",
                "statistics",
                "costs",
                "recipe",
                "data",
                "backbone",
                "decoding",
                "evaluation",
                "baselines",
                "nash",
                "pages",
                "alignment",
            ),
        },
        {"scipy"},
    ),
    "plan": (
        {"store", "costs", "recipe", "data", "backbone", "convex", "features", "decoding", "alignment", "distil"},
        set(),
    ),
    "report": ({"store", "pages"}, set()),
    "export": (
        {"store", "statistics", "costs", "backbone", "decoding", "evaluation", "report", "alignment"},
        {"torch", "transformers", "lm_eval", "yaml"},
    ),
    "inspection": ({"store", "recipe", "decoding", "alignment"}, {"inspect_ai"}),
    "web": (set(), {"fastapi", "uvicorn"}),
    "survey": ({"store", "pages", "statistics", "web"}, {"fastapi", "uvicorn"}),
    "serve": (
        {"pages", "backbone", "decoding", "web"},
        {"torch", "pydantic", "fastapi", "uvicorn", "prometheus_client"},
    ),
    "alignment": (
        {
            "store",
            "statistics",
            "costs",
            "recipe",
            "data",
            "backbone",
            "convex",
            "features",
            "decoding",
            "evaluation",
            "report",
        },
        set(),
    ),
    "audit": ({"statistics", "pages", "data", "backbone", "evaluation", "baselines"}, set()),
    "receipts": (
        {*("store", "statistics", "costs", "recipe", "backbone", "convex", "features", "report", "alignment")},
        set(),
    ),
    "compare": (
        {
            *("store", "statistics", "pages", "costs", "recipe", "data", "backbone", "convex", "features"),
            *("decoding", "evaluation", "baselines", "alignment", "distil", "plan"),
        },
        {"pydantic", "yaml"},
    ),
    "leaderboards": (
        {
            "survey",
            *("store", "statistics", "recipe", "data", "backbone", "features", "decoding"),
            *("evaluation", "report", "alignment"),
            *("export", "endpoint"),
        },
        set(),
    ),
    "live": (
        {
            *("store", "statistics", "recipe", "pages", "backbone", "convex", "features", "decoding", "alignment"),
            *("survey", "serve", "web", "export", "distil"),
        },
        {"fastapi", "pydantic"},
    ),
    "distil": (
        {
            *("store", "statistics", "pages", "costs", "recipe", "backbone", "convex", "decoding"),
            *("evaluation", "baselines", "alignment"),
        },
        {"torch"},
    ),
    "cli": (
        {
            "leaderboards",
            *("store", "costs", "recipe", "data", "backbone", "convex", "features"),
            "decoding",
            *(
                "evaluation",
                "statistics",
                "nash",
                "comal",
                "plan",
                "report",
                "alignment",
                "survey",
                "serve",
                "receipts",
                "audit",
                "export",
                "distil",
                "baselines",
                "compare",
                "web",
                "endpoint",
                "live",
                "trackers",
            ),
        },
        {"typer"},
    ),
}
HEAVY = {
    "torch",
    "transformers",
    "jax",
    "pydantic",
    "yaml",
    "typer",
    "matplotlib",
    "scipy",
    "datasets",
    "pyarrow",
    "trl",
    "fastapi",
    "uvicorn",
    "aiohttp",
    "wandb",
    "mlflow",
    "trackio",
    "inspect_ai",
    "prometheus_client",
    "yarl",
}


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", files(), ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return  # the lazy public surface names everything
    assert part in ALLOWED, f"{part} has no row in the layer table"
    below = ALLOWED[part][0] | (set() if part == "values" else GROUND)
    tree = parsed(path)
    doors = {
        f"coala.{to}.{alias.name}"
        for method in ast.walk(tree)
        if isinstance(method, ast.FunctionDef)
        for node in method.body
        if isinstance(node, ast.ImportFrom)
        for at, to in DOORS
        if at == part and node.module == f"coala.{to}"
        for alias in node.names
    }
    for name in imports(tree):
        if name in doors:
            continue
        words = name.split(".")
        if words[0] == "coala":
            assert len(words) > 1, "import the module, not the package"
            assert words[1] == part or words[1] in below, f"{part} may not import coala.{words[1]}"
        if part == "convex":
            assert words[0] not in {"torch", "transformers"}, "JAX and torch never meet"
        if part == "backbone":
            assert words[0] not in {"jax", "jaxlib"}, "JAX and torch never meet"


LONGEST_BODY = 30  # lines of a function in cli/, its docstring apart


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    told = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(function.body) > 1
    assert function.end_lineno is not None
    return function.end_lineno - function.body[1 if told else 0].lineno + 1


@pytest.mark.parametrize("path", sorted((SOURCE / "cli").glob("*.py")), ids=lambda p: p.name)
def test_a_command_parses_makes_one_call_and_prints(path: Path) -> None:
    functions = [one for one in ast.walk(parsed(path)) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {one.name: n for one in functions if (n := body_lines(one)) > LONGEST_BODY}
    assert not long, f"longer than {LONGEST_BODY} lines: {long}. Move what is not parsing or printing into a part."


@pytest.mark.parametrize("path", files(), ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_heavy_libraries_stay_inside_functions(path: Path) -> None:
    part = part_of(path)
    heavy = set() if part == "__init__" else ALLOWED[part][1]
    tree = parsed(path)
    top_level = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for name in imports(ast.Module(body=list(top_level), type_ignores=[])):
        root = name.split(".")[0]
        assert root not in HEAVY - heavy, f"{part} imports {root} at module level"


@pytest.mark.parametrize("path", files(), ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_only_the_cli_reads_the_environment_or_prints(path: Path) -> None:
    if part_of(path) == "cli":
        return
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno} prints"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in {"environ", "getenv"}, f"line {node.lineno} reads the environment"


def test_only_store_writes_files() -> None:
    for path in files():
        if part_of(path) in {"store", "cli"}:
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"write_text", "write_bytes", "mkdir", "unlink"}, f"{path.name}:{node.lineno}"
