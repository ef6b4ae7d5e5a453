"""What `import wan_mlx` offers: names that editors see as they are, help that reads, contact sheets."""

import ast
import pydoc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import wan_mlx

PACKAGE = Path(wan_mlx.__file__).parent


def test_editors_see_the_public_names_where_they_are():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {name.asname: node.module for node in block.body for name in node.names}
    assert seen == wan_mlx._PUBLIC
    assert (PACKAGE / "py.typed").exists()


def test_help_of_the_package_reads():
    said = pydoc.plain(pydoc.render_doc(wan_mlx))
    for name in wan_mlx.__all__:
        assert name in said
        documented = getattr(wan_mlx, name)
        assert name == "PRESETS" or (documented.__doc__ and not documented.__doc__.startswith(f"{name}(")), name
    assert "from_pretrained" in said and "ValueError" in said and "video.grid()" in said


@pytest.mark.parametrize(
    "options, size, shown",
    [
        ({}, (4 * 40, 3 * 20), [0, 1, 2, 4, 5, 6, 7, 8, 9, 11, 12, 13]),
        ({"columns": 2, "count": 4}, (80, 40), [0, 4, 9, 13]),
        ({"columns": 5, "count": 3}, (120, 20), [0, 6, 13]),
        ({"columns": 3, "count": 99}, (120, 100), list(range(14))),
        ({"columns": 2, "count": 2, "width": 40}, (40, 10), [0, 13]),
    ],
)
def test_contact_sheet(options, size, shown):
    frames = np.broadcast_to(np.arange(14, dtype=np.uint8)[:, None, None, None] * 10, (14, 20, 40, 3))
    sheet = wan_mlx.Video(np.ascontiguousarray(frames), None).grid(**options)
    assert isinstance(sheet, Image.Image) and sheet.size == size
    columns = min(options.get("columns", 4), len(shown))
    cell = size[0] // columns, size[1] // -(-len(shown) // columns)
    found = [
        sheet.getpixel((cell[0] * (place % columns) + cell[0] // 2, cell[1] * (place // columns) + cell[1] // 2))[0]
        for place in range(len(shown))
    ]
    assert found == [10 * number for number in shown]


@pytest.mark.parametrize("options", [{"columns": 0}, {"count": 0}, {"columns": 8, "width": 7}])
def test_contact_sheet_of_nothing(options):
    with pytest.raises(ValueError, match="expected at least"):
        wan_mlx.Video(np.zeros((2, 8, 8, 3), np.uint8), None).grid(**options)
