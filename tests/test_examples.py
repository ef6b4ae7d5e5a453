"""The notebooks run from top to bottom, each in a kernel of its own."""

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebook_executes(notebook, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    # Two steps and five frames instead of the defaults: this shows that every cell runs, not how well nano paints.
    quick = "import wan_mlx.configs as c, dataclasses\n" + (
        "n = c.PRESETS['nano']\n"
        "c.PRESETS['nano'] = dataclasses.replace(n, num_frames=5, sampling=c.Sampling(2, 3.0, 3.0))\n"
    )
    content = nbformat.read(notebook, as_version=4)
    content.cells.insert(0, nbformat.v4.new_code_cell(quick))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    nbclient.NotebookClient(content, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    shown = [o for cell in content.cells if cell.cell_type == "code" for o in cell.outputs if "data" in o]
    assert any("<video" in output.data.get("text/html", "") for output in shown)
