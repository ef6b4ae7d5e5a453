"""The notebooks run from top to bottom as they stand, but with small videos."""

import json
from pathlib import Path

import pytest

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
for name in ("nano", "nano-i2v"):
    wan_mlx.presets.PRESETS[name] = dataclasses.replace(
        wan_mlx.presets.PRESETS[name], size=(32, 32), num_frames=5, sampling=wan_mlx.presets.Sampling(2, 3.0, 1.0))
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
        assert "step 2 of 2" in said and "frames: (4, 32, 32, 3)" in said and "it fits" in said
    else:
        assert any("<video" in output.get("text/html", "") for output in data)
    if name not in ("low_memory.ipynb", "benchmark_a_mac.ipynb"):
        assert any("image/png" in output for output in data)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_kept_without_output(name):
    cells = json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
