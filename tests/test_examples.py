"""The notebooks run from top to bottom as they stand, but with small videos."""

from pathlib import Path

import pytest

make_notebooks = pytest.importorskip("docs.make_notebooks", reason="nbclient is not installed", exc_type=ImportError)

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = {path.name: path for path in sorted(EXAMPLES.glob("*.ipynb"))}
# Two steps of small videos, without guidance: this shows that every cell runs, not how well nano paints.
# `test_doctor` and `test_timing` measure rates; the kernel is one for all, so nothing is kept in it.
QUICK = """
%reset -f
import dataclasses
import wan_mlx.cli.selftest
import wan_mlx.planning.speed
import wan_mlx.presets
import wan_mlx.training.recipe
for name in ("nano", "nano-i2v"):
    wan_mlx.presets.PRESETS[name] = dataclasses.replace(
        wan_mlx.presets.PRESETS[name], size=(32, 32), num_frames=5, recipe="", recipe_steps=0,
        sampling=wan_mlx.presets.Sampling(2, 3.0, 1.0))
wan_mlx.training.recipe.OF_MODELS["nano"]["steps"] = 2
wan_mlx.cli.selftest._rate = lambda make, compute, flop, start, *_, **__: compute(make(1)) is not None and 0.5
wan_mlx.planning.speed.measure_rates = lambda *_, rates=wan_mlx.planning.speed.Rates, **__: rates(*[1e12] * 4)
del dataclasses, name, wan_mlx
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    client = pytest.importorskip("jupyter_client")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        manager = client.KernelManager(kernel_name="python3")
        manager.start_kernel(cwd=str(tmp_path_factory.mktemp("notebooks")))
        yield manager
        manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_executes(name, kernel):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    content = nbformat.read(NOTEBOOKS[name], as_version=4)
    content.cells.insert(0, nbformat.v4.new_code_cell(QUICK))
    client = nbclient.NotebookClient(content, timeout=300, km=kernel)
    client.execute(cleanup_kc=False)
    client.kc.stop_channels()
    shown = [o for cell in content.cells if cell.cell_type == "code" for o in cell.outputs]
    data = [output.data for output in shown if "data" in output]
    if name == "benchmark_a_mac.ipynb":
        said = "".join(output.text for output in shown if output.output_type == "stream")
        assert "step 2 of 2" in said and "frames: (4, 32, 32, 3)" in said
        assert any("it fits" in each.get("text/html", "") for each in data)
    else:
        assert any("<video" in output.get("text/html", "") for output in data)
    if name not in ("low_memory.ipynb", "benchmark_a_mac.ipynb"):
        assert any("image/png" in output for output in data)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_kept_as_it_was_executed(name):
    """``python docs/make_notebooks.py`` executes them: every cell, without warnings and paths of a machine."""
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    assert make_notebooks.complaints(notebook) == []
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    shown = [output.data for cell in cells for output in cell.outputs if "data" in output]
    if name != "benchmark_a_mac.ipynb":
        assert any("<video" in data.get("text/html", "") for data in shown)


@pytest.mark.parametrize(
    "text, found",
    [("in /tmp/x/circle.mp4", True), ("file:///home/me/a", True), ("https://x.y/home/a", False), ("832/480", False)],
)
def test_paths_are_found_in_what_a_notebook_shows(text, found):
    nbformat = pytest.importorskip("nbformat")
    cell = nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("stream", text=text)])
    assert bool(make_notebooks.complaints(nbformat.v4.new_notebook(cells=[cell]))) == found
    warned = nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("stream", name="stderr", text="a warning")])
    assert make_notebooks.complaints(nbformat.v4.new_notebook(cells=[warned]))
