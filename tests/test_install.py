"""The README's ways to install, each in a clean environment outside the repository, up to the first video."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRA = "" if sys.platform == "darwin" else "[cpu]"
HELP_SECONDS = 0.3
pytestmark = pytest.mark.slow


def do(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command that knows nothing of this repository and this environment; its output."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "COVERAGE_PROCESS_START")
    env = {name: value for name, value in os.environ.items() if name not in ours} | environment
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """The files that git knows, as an archive of the repository has them."""
    folder = tmp_path_factory.mktemp("archive") / "wan-mlx-main"
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).strip("\0").split("\0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    do(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, archive, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> Path:
    """uv and pipx, the programs."""
    folder = tmp_path_factory.mktemp("tools")
    do(sys.executable, "-m", "venv", folder, cwd=folder)
    do(folder / "bin/pip", "install", "--quiet", "uv", "pipx", cwd=folder)
    return folder / "bin"


def test_the_wheel_has_the_package_alone(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"wan_mlx"}
    tracked = subprocess.check_output(["git", "ls-files", "wan_mlx"], cwd=ROOT, text=True).split()
    assert {*tracked} <= names


@pytest.mark.parametrize("way", ["uv", "pipx", "wheel"])
def test_first_hour(way, archive, wheel, tools, tmp_path):
    """Installed, asked for help, the first video, what the README does with it, and uninstalled."""
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
    places = {"HOME": str(home), "PATH": f"{tools}:{os.environ['PATH']}"}
    if way == "uv":
        places |= {"UV_TOOL_DIR": str(home / "tools"), "UV_TOOL_BIN_DIR": str(home / "bin")}
        do("uv", "tool", "install", "--python", sys.executable, f"{archive}{EXTRA}", cwd=work, **places)
        python, program, remove = home / "tools/wan-mlx/bin/python", home / "bin/wan-mlx", ["uv", "tool", "uninstall"]
    elif way == "pipx":
        places |= {"PIPX_HOME": str(home / "tools"), "PIPX_BIN_DIR": str(home / "bin")}
        do("pipx", "install", "--python", sys.executable, f"{archive}{EXTRA}", cwd=work, **places)
        python, program = home / "tools/venvs/wan-mlx/bin/python", home / "bin/wan-mlx"
        remove = ["pipx", "uninstall"]
    else:
        do(sys.executable, "-m", "venv", home / "wan-mlx", cwd=work, **places)
        do(home / "wan-mlx/bin/pip", "install", "--quiet", f"{wheel}{EXTRA}", cwd=work, **places)
        python, program = home / "wan-mlx/bin/python", home / "wan-mlx/bin/wan-mlx"
        remove = [python, "-m", "pip", "uninstall", "--yes"]

    help_starts_at_once(python, program, work, places)
    first = re.search(r'^wan-mlx ("[^"]+") --output demo.mp4$', (ROOT / "README.md").read_text(), re.MULTILINE)
    assert first, "the README's first command"
    small = [] if way == "uv" else ["--size", "32x32", "--frames", "5", "--steps", "2"]
    do(program, first[1].strip('"'), "--output", "demo.mp4", *small, cwd=work, **places)
    assert (work / "demo.mp4").stat().st_size > 1000 and os.listdir(work) == ["demo.mp4"]
    assert "a red circle" in do(program, "info", "demo.mp4", cwd=work, **places)
    nano = do(python, "-c", "from wan_mlx.presets import BUNDLED; print(BUNDLED['nano'])", cwd=work, **places).strip()
    do(program, "convert", nano, "packed", "--quantize", "q8", cwd=work, **places)
    do(program, "inspect", "packed", cwd=work, **places)

    hint = "from wan_mlx.errors import install_command; print(install_command('--force-reinstall', 'humanize'))"
    said = do(python, "-c", hint, cwd=work, **places)
    assert {"uv": "uv pip install", "pipx": "pipx runpip", "wheel": "-m pip install"}[way] in said
    do(*shlex.split(said), cwd=work, **places)  # what a message says adds a package to this environment
    do(python, "-c", "import humanize", cwd=work, **places)

    do(*remove, "wan-mlx", cwd=work, **places)
    assert not program.exists()


def help_starts_at_once(python: Path, program: Path, work: Path, places: dict[str, str]) -> None:
    def seconds() -> float:
        started = time.perf_counter()
        assert "convert" in do(program, "--help", cwd=work, **places)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) <= HELP_SECONDS
    asked = "import sys\nfrom wan_mlx.generate import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    assert do(python, "-c", f"{asked}print('mlx.core' in sys.modules)", cwd=work, **places).endswith("False\n")
