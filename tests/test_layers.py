"""Folders are layers: imports run down only, without circles; imports inside functions are few and have a reason.

Every import statement counts, wherever it stands: at the top, inside a function, under TYPE_CHECKING.
"""

import ast
import subprocess
import sys
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import wan_mlx
from wan_mlx.presets import PRESETS
from wan_mlx.weights.configs import shapes_of

PACKAGE = Path(wan_mlx.__file__).parent

# Bottom to top. A name is a module or a folder; those of one line may import each other, but not in a circle.
LAYERS = [
    "types errors events lasting option option_texts progress_bars geometry resize noise mac storage phases heartbeat "
    "distributed",
    "files",
    "cuda",
    "models",
    "presets options other_models other_words",
    "hub",
    "weights",
    "media",
    "schedulers",
    "caching",
    "guidance recipes denoise parallel",
    "tasks",
    "request_builder",
    "planning",
    "prompts",
    "experts model_choices opened smoothing",
    "runs",
    "pipeline",
    "cli server training",
    "generate doctor __init__",
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
# The root package defines these itself, before it imports anything.
OF_ROOT = {"__version__", "check_backend"}

# Modules that may import inside functions what needs MLX or numpy, so that they start fast.
STARTS_FAST = {
    "cli.main": "--help, completion and a wrong flag answer without MLX",
    "cli.list_models": "the table answers without MLX; deleting a converted folder needs to know them",
    "cli.serve": "MLX is the worker's alone",
    "cli.queue": "lists without MLX; what is added is checked, and what is removed is a run's",
    "cli.config_file": "main reads --config before it needs MLX",
    "cli.doctor": "says why MLX, or a package, cannot be imported",
}
# Packages imported inside functions: (module, package) → reason.
LATE_PACKAGES = {
    ("files.gguf", "gguf"): "an extra",
    ("generate", "cli.main"): "Ctrl-C is made harmless before it",
    ("cli.mcp", "server.tools"): "an extra",
    ("cli.serve", "server.serving"): "an extra",
    ("files.sentencepiece", "sentencepiece"): "protobuf's classes, only for a tokenizer that is rebuilt",
    ("hub.modelscope", "modelscope"): "an extra",
    ("prompts.extend", "mlx_lm"): "takes seconds; only prompt extension needs it",
    ("prompts.extend", "mlx_vlm"): "an extra",
    ("prompts.extend", "huggingface_hub"): "start-up: half a second",
    ("hub.download", "huggingface_hub"): "start-up: half a second",
    ("hub.names", "huggingface_hub"): "start-up: half a second",
    ("hub.resolve", "huggingface_hub"): "start-up: half a second",
    ("mac", "fcntl"): "not on Windows",
    ("progress_bars", "rich"): "start-up: only a terminal needs it",
    ("runs.folder", "fcntl"): "not on Windows",
    ("runs.queue", "fcntl"): "not on Windows",
    ("server.library", "send2trash"): "start-up: only deleting needs it",
    ("storage", "fcntl"): "not on Windows",
    ("training.dataset", "tomllib"): "of Python 3.11",
}


class Import(NamedTuple):
    """``importer`` and ``imported`` are modules of the package, without its name, or ``imported`` is a package."""

    importer: str
    imported: str
    ours: bool
    late: bool  # inside a function
    for_types: bool  # under TYPE_CHECKING


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@lru_cache
def imports() -> list[Import]:
    """Every import of the package's modules; of a name that a package imports, the module where it stands."""
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    found = set()
    for importer, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        late = inner(tree, lambda node: isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))
        for_types = inner(tree, lambda node: isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for node in ast.walk(tree):
            for imported, ours in targets(node, importer, path.name == "__init__.py", paths):
                if imported != importer:
                    found.add(Import(importer, imported, ours, node in late, node in for_types))
    return sorted(found)


def inner(tree: ast.AST, outer) -> set[ast.AST]:
    return {node for found in ast.walk(tree) if outer(found) for node in ast.walk(found)}


def targets(node: ast.AST, importer: str, is_package: bool, known) -> list[tuple[str, bool]]:
    """(module or package, whether it is ours) of an import statement; of other nodes nothing."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
        return [(name.removeprefix("wan_mlx").strip(".") or "__init__", True) if name.split(".")[0] == "wan_mlx"
                else (name.split(".")[0], False) for name in names]  # fmt: skip
    if not isinstance(node, ast.ImportFrom):
        return []
    module = node.module or ""
    if not node.level and module.split(".")[0] != "wan_mlx":
        return [(module.split(".")[0], False)]
    base = []
    if node.level:
        package = importer.split(".") if is_package else importer.split(".")[:-1]
        package = [] if importer == "__init__" else package
        base = package[: len(package) - (node.level - 1)]
    base = ".".join([*base, *([module.removeprefix("wan_mlx").strip(".")] if module not in ("", "wan_mlx") else [])])
    found = []
    for alias in node.names:
        inside = f"{base}.{alias.name}".lstrip(".")
        if not base and alias.name in OF_ROOT:
            continue
        found.append((inside if inside in known else base or "__init__", True))
    return found


def rank(module: str) -> int:
    name = module if module in RANK else module.split(".")[0]
    assert name in RANK, f"{module} has no layer: put it into LAYERS"
    return RANK[name]


def in_circles(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges that lie on a circle."""
    follow = {}
    for importer, imported in edges:
        follow.setdefault(importer, set()).add(imported)

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for module in follow.get(waiting.pop(), set()) - seen:
                seen.add(module)
                waiting.append(module)
        return seen

    beyond = {module: reached(module) for module in {end for edge in edges for end in edge}}
    return {(importer, imported) for importer, imported in edges if importer in beyond[imported]}


def described(pairs) -> str:
    return "; ".join(f"{importer} imports {imported}" for importer, imported in sorted(pairs))


def own_edges() -> set[tuple[str, str]]:
    return {(entry.importer, entry.imported) for entry in imports() if entry.ours}


def test_imports_run_down():
    up = {(importer, imported) for importer, imported in own_edges() if rank(imported) > rank(importer)}
    assert not up, f"upward: {described(up)}"


def test_imports_make_no_circle():
    circles = in_circles(own_edges())
    assert not circles, f"in a circle: {described(circles)}"


def test_no_reason_is_listed_that_is_gone():
    late = {(entry.importer, entry.imported) for entry in imports() if entry.late}
    assert not set(LATE_PACKAGES) - late, f"take out of LATE_PACKAGES: {described(set(LATE_PACKAGES) - late)}"
    gone = set(STARTS_FAST) - {importer for importer, _ in late}
    assert not gone, f"take out of STARTS_FAST: {', '.join(sorted(gone))}"


def test_imports_inside_functions_have_a_reason():
    top = {}
    for entry in imports():
        if not entry.late and not entry.for_types:
            top.setdefault(entry.importer, set()).add(entry.imported)

    def is_slow(module: str, seen: set[str]) -> bool:
        seen.add(module)
        return any(name in ("mlx", "numpy") or is_slow(name, seen) for name in top.get(module, set()) - seen)

    found = {
        (entry.importer, entry.imported)
        for entry in imports()
        if entry.late
        and (entry.importer, entry.imported) not in LATE_PACKAGES
        and not (entry.importer in STARTS_FAST and entry.ours and is_slow(entry.imported, set()))
    }
    assert not found, f"inside a function without a reason: {described(found)}"


def test_only_cuda_asks_for_nvidia():
    asking = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py") if "mx.cuda." in path.read_text()}
    assert asking == {"cuda"}


def test_commands_that_start_without_mlx():
    commands = ["--help", "-h", "help plan", "--help-all", "genrate", "models", "models --json", "doctor --help",
                "--no-such-flag"]  # fmt: skip
    script = (
        "import sys\n"
        "from contextlib import redirect_stderr, redirect_stdout, suppress\n"
        "from io import StringIO\n"
        "from wan_mlx.cli.main import main\n"
        f"for command in {commands}:\n"
        "    said = StringIO()\n"
        "    with suppress(SystemExit), redirect_stdout(said), redirect_stderr(said):\n"
        "        main(command.split())\n"
        "    assert said.getvalue(), command\n"
        "    assert 'mlx' not in sys.modules and 'rich' not in sys.modules, command"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sizes_that_models_shows_are_those_of_the_networks():
    for preset in PRESETS.values():
        shapes = shapes_of(preset.transformer).values()
        assert preset.parameters == sum(prod(shape) for shape in shapes), preset.name
