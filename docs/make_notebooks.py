"""``python docs/make_notebooks.py [NAME ...]`` executes the notebooks in examples/, and keeps what they show.

Two at a time, but for the one that measures; all together take some minutes of two CPU cores.
"""

import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient  # both come with the extra "test"

EXAMPLES = Path(__file__).parent.parent / "examples"
PATH = re.compile(r"(?<![\w<.])/(?:home|root|tmp|work|Users|private|var)/[\w./-]*")
MOST = 1_000_000  # bytes of a notebook
MEASURES = "benchmark_a_mac.ipynb"  # runs alone


def complaints(notebook: nbformat.NotebookNode) -> list[str]:
    """What must not be in an executed notebook: errors, warnings, paths of a machine; or that it is too large."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"{cell.id}: {output.get('text', output)}")
            data = output.get("data", {})
            said = "".join([output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")])
            found += [f"{cell.id}: the path {path}" for path in PATH.findall(re.sub(r"base64,[^\"]*", "", said))]
    size = len(nbformat.writes(notebook))
    return [*found, *[f"{size:,} bytes, at most {MOST:,}"] * (size > MOST)]


def shortened(outputs: list) -> list:
    """What was printed in one piece, and pictures as JPEG alone, which is a tenth of the bytes."""
    found: list = []
    for output in outputs:
        if "image/jpeg" in output.get("data", {}):
            output.data.pop("image/png", None)
        if found and output.get("name") == found[-1].get("name") == "stdout":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with what its cells show."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, kernel_name="python3", record_timing=False).execute(cwd=str(path.parent))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = shortened(cell.outputs)
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "version": "3.11"},
    })  # fmt: skip
    return notebook


def make(path: Path) -> str:
    """Execute and keep one; returns what to say of it."""
    started = time.perf_counter()
    made = execute(path)
    if bad := complaints(made):
        sys.exit("\n".join([path.name, *bad]))
    nbformat.write(made, path)
    return f"{path.name}: {time.perf_counter() - started:.0f} s, {path.stat().st_size:,} bytes"


if __name__ == "__main__":
    paths = [EXAMPLES / name for name in sys.argv[1:]] or sorted(EXAMPLES.glob("*.ipynb"))
    for path in [path for path in paths if path.name == MEASURES]:
        print(make(path), flush=True)
    with ProcessPoolExecutor(2) as pool:
        for said in pool.map(make, [path for path in paths if path.name != MEASURES]):
            print(said, flush=True)
