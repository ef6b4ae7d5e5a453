"""Only the command line speaks: the rest of the package tells events and logs."""

import ast
from pathlib import Path

import wan_mlx

PACKAGE = Path(wan_mlx.__file__).parent
SPEAKERS = ("progress_bars.py", "heartbeat.py")  # a listener, for notebooks too; the last words of a process
STREAMS = ("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__")


def spoken(path: Path) -> list[str]:
    """Calls of print, and whatever would write on the terminal, with their lines."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "input"):
            found.append(f"{node.lineno}: {node.func.id}")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            found += [f"{node.lineno}: {name}" for name in names if name.split(".")[0] in ("tqdm", "rich")]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in STREAMS:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "os.write" and ast.unparse(node.args[0]) in "12":
            found.append(f"{node.lineno}: os.write")
    return found


def test_nothing_below_the_command_line_prints():
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "cli"]
    assert len(files) > 60
    said = {path.relative_to(PACKAGE).as_posix(): found for path in files if (found := spoken(path))}
    assert set(said) <= set(SPEAKERS), said
    assert any(spoken(path) for path in (PACKAGE / "cli").glob("*.py"))  # it would be seen


def test_names_and_texts_are_printed_in_one_place():
    """`terminal.write`, which escapes what would steer a terminal; the others print what is written in them."""
    files = (PACKAGE / "cli").glob("*.py")
    printing = {path.name for path in files if any(call.endswith(" print") for call in spoken(path))}
    assert printing <= {"terminal.py", "completion.py", "doctor.py"}
