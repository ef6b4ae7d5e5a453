"""Every command, flag and nearest value that an error of the package suggests works as it is typed."""

import ast
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import wan_mlx
from wan_mlx import errors
from wan_mlx.cli import serve
from wan_mlx.cli.commands import COMMANDS
from wan_mlx.cli.flags import build_parser
from wan_mlx.cli.main import main
from wan_mlx.errors import WanError
from wan_mlx.opened import OpenedModel
from wan_mlx.planning import speed

ROOT = Path(__file__).parent.parent
# Flags of other programs that messages name: pip's, uv's, gguf-split's.
OF_OTHERS = {"--force-reinstall", "--python", "--merge"}
# Commands in the package's texts, {} for what is filled in → the same with names of what is in the test's folder. The
# longest of what follows "wan-mlx " up to a quote, a comma, a semicolon or a sentence's end.
SHOWN = {
    "wan-mlx models": "models",
    "wan-mlx doctor": "doctor --help",  # tests/test_documented_commands.py runs it
    "wan-mlx doctor --store-reference": "doctor --help",
    "wan-mlx inspect": "inspect nano.folder",
    "wan-mlx inspect t2v-1.3B": "inspect nano.folder",
    "wan-mlx convert t2v-1.3B folder": "convert nano.folder folder --quiet",
    "wan-mlx info cat.mp4": "info nano.folder",
    "wan-mlx smooth cat.mp4": "smooth --help",  # tests/test_interpolation.py runs it
    "wan-mlx completion zsh": "completion zsh",
    "wan-mlx train clips -o zorb": "train --help",  # tests/test_training_command.py trains
    "wan-mlx info describes it": "info nano.folder/transformer.safetensors",
    "wan-mlx info {}": "info nano.folder",
    "wan-mlx convert SOURCE OUT": "convert nano.folder out --quiet",
    "wan-mlx completion bash": "completion bash",
    "wan-mlx help plan": "help plan",
    "wan-mlx help COMMAND": "help plan",
    "wan-mlx --help-all": "--help-all",
    "wan-mlx {} {}": "generate 'a red circle' --dry-run",
    "wan-mlx plan": "plan nano",
    "wan-mlx recipes": "recipes",
    "wan-mlx plan {}": "plan nano",
    "wan-mlx plan t2v-1.3B": "plan nano",
    "wan-mlx -m {} \"what the video should show\"": "-m nano 'what the video should show' --dry-run",
    "wan-mlx -m t2v-1.3B -p \"a cat boxing\" -o cat.mp4": "-m nano -p 'a cat boxing' -o cat.mp4 --dry-run",
    "wan-mlx -m nano-i2v --image first.png \"it moves right\"":
        "-m nano-i2v --image first.png 'it moves right' --dry-run",
    "wan-mlx -p {}": "-p 'a red circle' --dry-run",
    "wan-mlx \"a red circle\"": "'a red circle' --dry-run",
    "wan-mlx \"a red circle moves right\"": "'a red circle moves right' --dry-run",
    "wan-mlx \"a cat\"": "'a cat' --dry-run",
    "wan-mlx --prompts {}": "--prompts many.txt --dry-run",
    "wan-mlx --image {} \"what it should show\"": "--image first.png 'what it should show' --dry-run",
    "wan-mlx --video {} \"what it should show\"": "--video clip.mp4 'what it should show' --dry-run",
    "wan-mlx --model ./{}{} --prompt \"what it should show\" --output out.mp4":
        "--model ./nano.folder --prompt 'what it should show' --output out.mp4 --dry-run",
    "wan-mlx queue": "queue --library lib",  # tests/test_serve.py runs them
    "wan-mlx queue add \"a red circle moves right\" --seed 7": "queue --help",
    "wan-mlx queue run": "queue run --library lib",
    "wan-mlx queue stop 1f3a9c": "queue --help",
    "wan-mlx serve": "serve --help",  # tests/test_serve.py runs it
    "wan-mlx serve --model t2v-1.3B --library ~/Movies/wan": "serve --help",
    "wan-mlx serve --host 0.0.0.0 --no-browser": "serve --help",
    "wan-mlx train clips -o zorb --trigger zorb": "train clips -o zorb --trigger zorb --frames 5 --dry-run",
    "wan-mlx train clips -m t2v-1.3B -o style --size 480x272 --frames 33":
        "train clips -m t2v-1.3B -o style --size 480x272 --frames 33 --dry-run --memory 24GB",
    "wan-mlx resume {}": "resume made.mp4",
    "wan-mlx resume cat.mp4": "resume made.mp4",
    "wan-mlx resume FILE": "resume made.mp4",
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch, pico):
    """A folder with a model, a picture, prompts, and a video that is finished."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "measure_rates", lambda *_: speed.Rates(1e12, 1e12, 1e12, 1e12))
    shutil.copytree(pico, "nano.folder")
    for name in ("first.png", "clip.mp4"):
        shutil.copy(ROOT / "examples/sources" / name, tmp_path)
    Path("many.txt").write_text("a red circle\na blue square\n")
    Path("many.jsonl").write_text('{"prompt": "a red circle"}\n')
    Path("made.mp4").write_bytes(b"video")
    Path("clips").mkdir()
    shutil.copy("first.png", "clips")


def texts() -> Iterator[tuple[Path, str]]:
    """All texts in the package's code, {} where something is filled in, without docstrings and programs' own names."""
    for path in sorted(Path(wan_mlx.__file__).parent.rglob("*.py")):
        tree, left_out = ast.parse(path.read_text(encoding="utf-8")), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = node.body[0] if node.body else None
                left_out |= {id(first.value)} if isinstance(first, ast.Expr) else set()
            elif isinstance(node, ast.keyword) and node.arg in ("prog", "usage"):
                left_out |= {id(part) for part in ast.walk(node)}
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                left_out.add(id(node.value))
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr) and id(node) not in left_out:
                left_out |= {id(part) for part in node.values}
                yield path, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
                yield path, node.value


def commands_in(text: str) -> list[str]:
    """The commands of ours in a text, without what follows them."""
    found = re.findall(r"""\bwan-mlx ((?:"[^"]*"|[^"`';,:)\n])*?)(?=  |[`';,:)\n]|\. |\.?$)""", text)
    return [f"wan-mlx {words.strip()}" for words in found if words.strip()]


def test_every_command_shown_works(here, capsys):
    shown = {command for _, text in texts() for command in commands_in(text)}
    assert shown - {"wan-mlx COMMAND [flags]", 'wan-mlx "what the video should show" [flags]'} == SHOWN.keys()
    for command in dict.fromkeys(SHOWN.values()):
        assert run(command) == 0, (command, capsys.readouterr().err)


def test_no_other_spelling_of_the_command_is_shown():
    assert not [(path.name, text) for path, text in texts() if "python -m wan_mlx" in text]


def test_every_flag_that_a_text_names_is_one():
    known = {flag for action in build_parser()._actions for flag in action.option_strings} | OF_OTHERS
    known |= {"--help-all", "--help"}
    for command in COMMANDS.values():
        if command.module:
            module = __import__(f"wan_mlx.cli{command.module}", fromlist=["build_parser"])
            known |= {flag for action in module.build_parser()._actions for flag in action.option_strings}
    named = {flag for _, text in texts() for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*[a-z0-9]\b", text)}
    assert named <= known, named - known


class TestInstalling:
    @pytest.mark.parametrize(
        "way, command",
        [
            ("pip", "'{}/bin/python' -m pip install -U 'mlx[cpu]'"),
            ("uv", "uv pip install -U 'mlx[cpu]' --python '{}/bin/python'"),
            ("pipx", "pipx runpip 'wan-mlx 2' install -U 'mlx[cpu]'"),
        ],
    )
    def test_is_into_the_environment_that_this_copy_runs_in(self, tmp_path, monkeypatch, way, command):
        """tests/test_install.py runs them."""
        environment = tmp_path / "wan-mlx 2"
        environment.mkdir()
        if way == "pipx":
            (environment / "pipx_metadata.json").touch()
        monkeypatch.setattr(sys, "prefix", str(environment))
        monkeypatch.setattr(sys, "executable", f"{environment}/bin/python")
        monkeypatch.setattr(errors, "find_spec", lambda name: name if way == "pip" else None)
        assert errors.install_command("-U", "mlx[cpu]") == command.format(environment)

    def test_is_of_packages_that_the_project_names(self):
        """In all the package's calls; it is on no index itself."""
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        named = {re.split("[<>=;]", requirement)[0] for requirement in re.findall(r'"([^"\s]+)[^"]*"', project)}
        given = {node.value for path in sorted((ROOT / "wan_mlx").rglob("*.py"))
                 for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("install_command", "install")
                 for node in ast.walk(call) if isinstance(node, ast.Constant)}  # fmt: skip
        given -= {"-U", "--force-reinstall", "Metal", "CUDA", "CPU", "mlx-metal"}  # the last comes with mlx
        assert given == {"mlx", "mlx[cpu]", "mlx[cuda13]", "gguf", "modelscope", "mlx-vlm", "av", "imageio"}
        assert given <= named
        for extra, needed in serve.NEEDED.items():
            listed = re.search(rf"^{extra} = \[(.*)\]$", project, re.MULTILINE)
            assert listed and {name.replace("_", "-") for name in needed} == {*re.findall(r'"([\w-]+)', listed[1])}

    @pytest.mark.parametrize("page", ["docs/troubleshooting.md", "docs/zh/troubleshooting.md"])
    def test_the_pages_need_no_folder_for_an_extra(self, page):
        """Each extra with its packages, and the commands that messages give, in place of `pip install '.[extra]'`."""
        text = (ROOT / page).read_text(encoding="utf-8")
        for packages in ("modelscope", "gguf", "mlx-vlm", " ".join(serve.OF_SERVE).replace("_", "-"), "mcp"):
            assert f"`{packages}`" in text
        assert "\nuv pip install modelscope --python " in text and "\npipx runpip wan-mlx install modelscope " in text
        for other in (ROOT / "docs").rglob("*.md"):  # extending.md is for those who have the folder
            said = other.read_text(encoding="utf-8")
            assert "pip install '.[" not in said or other.name == "extending.md", other

    def test_stands_in_one_place(self):
        assert {path.name for path, text in texts() if re.search(r"\b(pip|pipx|uv)\b", text)} == {"errors.py"}


def run(command: str) -> int:
    try:
        return main(shlex.split(command))
    except SystemExit as stopped:  # --help
        return int(stopped.code or 0)


@pytest.mark.parametrize(
    "wrong",
    [
        "modles", "nano", "many.jsonl", "many.txt", "first.png", "nano.folder/transformer.safetensors",
        "a circle moves", "-m nanoo -p circle", "plann", "./nano.folder",
    ],
)  # fmt: skip
def test_what_an_error_suggests_works(wrong, here, capsys):
    assert run(wrong) == 2
    said = capsys.readouterr().err
    suggested = re.findall(r"wan-mlx (?:'[^']*'|\"[^\"]*\"|[^`;,'\"])+", said)
    assert suggested, said
    for command in suggested:
        words = command.removeprefix("wan-mlx ").strip()
        words = "plan nano" if words == "plan" else words  # what is measured takes a minute for a real model
        makes = words.split()[0] not in {"models", "plan", "info", "resume"}
        assert run(f"{words} --dry-run" if makes else words) == 0, words


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--frames", "6"), ("--steps", "0"), ("--steps", "5000"), ("--memory", "8"),
        ("--dtype", "fp16"), ("--solver", "eulr"), ("--cache", "easycahe"), ("--quantize", "q88"), ("--fit", "padd"),
        ("--model", "nanoo"), ("--recipe", "causvit"), ("--task", "nanoo"), ("--output", "a.webm"),
        ("--seed", str(2**64)), ("--stop-below", "100"),
    ],
)  # fmt: skip
def test_the_nearest_value_is_a_valid_one(flag, value, here, capsys):
    def said(value: str) -> str:
        code = run(f"--model nano.folder --task nano -p circle --dry-run {flag} {value}")
        return capsys.readouterr().err if code else ""

    nearest = re.search(r"nearest: ([^;,\n]+)", said(value))
    assert nearest, value
    again = nearest[1] if flag != "--output" else f"a{nearest[1]}"
    assert said(again) == "" or (flag == "--fit" and "no picture or video to fit" in said(again))


def test_where_a_run_stopped_the_hint_goes_on_with_it(here, monkeypatch, capsys):
    """The same hint stands where a run of that file is unfinished."""
    makes = "-m nano.folder --task nano -p circle --size 16x16 --frames 1 --steps 2 -o 'my circle.png'"
    with monkeypatch.context() as patch:
        patch.setattr(OpenedModel, "decode", lambda *_: (_ for _ in ()).throw(WanError("no")))
        assert run(makes) == 1
    hints = [capsys.readouterr().err]
    assert run(makes) == 2
    hints.append(capsys.readouterr().err)
    commands = {command for text in hints for command in re.findall(r"wan-mlx (resume (?:'[^']*'|[^` \n]+))", text)}
    assert commands == {"resume 'my circle.png'"}
    assert run(commands.pop()) in (0, 3) and Path("my circle.png").exists()
    assert run("resume 'my circle.png'") == 0
    assert "my circle.png is finished already" in capsys.readouterr().err
