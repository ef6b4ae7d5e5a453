"""Nothing of the user's is touched when a folder is made or replaced, at whatever moment a process is killed."""

import builtins
import json
import os
import shutil

import pytest

from wan_mlx import storage
from wan_mlx.errors import WanError
from wan_mlx.presets import BUNDLED
from wan_mlx.weights.convert import convert
from weights_convert import main

NEIGHBOURS = {"mlx.partial/thesis.txt": "mine", "mlx.old/model.safetensors": "my other version", ".wan_mlx-1234/x": "?"}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}


def make(out, text, replace=True):
    with storage.new_folder(out, replace) as folder:
        write(folder, {"config.json": text, "sub/weights": text * 10})


class Killed(BaseException):
    """As kill -9: nothing that the process would still do reaches the disk."""


@pytest.fixture
def killed_at(monkeypatch):
    """Call a function such that its n-th file operation and all later ones do not happen; whether it came so far."""

    def call(n, function, *arguments):
        left = [n]

        def dies(real):
            def operation(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return real(*args, **kwargs)

            return operation

        with monkeypatch.context() as patch:
            for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "open"):
                patch.setattr(os, name, dies(getattr(os, name)))
            patch.setattr(builtins, "open", dies(open))
            patch.setattr(storage, "_exchange", dies(storage._exchange))
            try:
                function(*arguments)
            except Killed:
                return True
        return False

    return call


@pytest.mark.parametrize("at_once", [True, False])
def test_kills_leave_the_old_folder_or_the_new_one(tmp_path, monkeypatch, killed_at, at_once):
    """And what a killed process left is gone after the next call, while what only looks like it stays."""
    if not at_once:  # as on a disk that cannot swap two names
        monkeypatch.setattr(storage, "_exchange", lambda *names: False)
    old, new = ({"config.json": text, "sub/weights": text * 10} for text in ("old", "new"))
    out, moments = tmp_path / "mlx", 0
    while True:
        for place in tmp_path.iterdir():
            shutil.rmtree(place)
        write(out, old)
        write(tmp_path, NEIGHBOURS)
        killed = killed_at(moments, make, out, "new")
        if not killed:
            break
        found = contents(tmp_path)
        assert all(found[name] == text for name, text in NEIGHBOURS.items())
        places = [place for place in tmp_path.iterdir() if contents(place).items() >= old.items()]
        places += [place for place in tmp_path.iterdir() if contents(place).items() >= new.items()]
        assert out in places or (not at_once and places)
        make(out, "new")
        found = {name: text for name, text in contents(tmp_path).items() if name not in NEIGHBOURS and text}
        kept = {name for name in found if name.startswith(".wan_mlx-") and not at_once}  # never what has no marker
        assert {name: text for name, text in found.items() if name not in kept} == {
            f"mlx/{k}": v for k, v in new.items()
        }
        moments += 1
    assert moments > 10 and contents(out) == new


def test_the_unfinished_folder_of_a_living_process_stays(tmp_path):
    with storage.new_folder(tmp_path / "one") as folder:
        write(folder, {"weights": "1"})
        make(tmp_path / "two", "2")
        assert (folder / "weights").is_file()
    assert contents(tmp_path / "one") == {"weights": "1"} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("replace", [False, True])
def test_what_appears_meanwhile_is_kept(tmp_path, replace):
    out, elsewhere = tmp_path / "mlx", tmp_path / "photos"
    write(elsewhere, {"photo": "p"})
    with pytest.raises(WanError, match=r"mlx appeared meanwhile; .* the new folder is .*mlx-\w+$") as error:
        with storage.new_folder(out, replace) as folder:
            write(folder, {"weights": "1"})
            out.symlink_to(elsewhere) if replace else write(out, {"mine": "m"})
    kept = tmp_path / str(error.value).rpartition("/")[2]
    assert contents(kept) == {"weights": "1"} and contents(elsewhere) == {"photo": "p"}
    assert contents(out) == ({"photo": "p"} if replace else {"mine": "m"}) and len(list(tmp_path.iterdir())) == 3


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return convert(BUNDLED["nano"], tmp_path_factory.mktemp("nano") / "mlx")


def test_converting_touches_no_neighbour(tmp_path):
    write(tmp_path, NEIGHBOURS)
    write(tmp_path, {"two.partial": "a file"})
    for flags in (["mlx"], ["mlx", "--overwrite"], ["two"]):
        assert main(["nano", str(tmp_path / flags[0]), *flags[1:], "--quiet"]) == 0
    found = contents(tmp_path / "mlx.partial") | contents(tmp_path / "mlx.old")
    assert found == {"thesis.txt": "mine", "model.safetensors": "my other version"}
    assert (tmp_path / "two.partial").read_text() == "a file"


def test_a_folder_that_holds_more_is_not_replaced(converted, tmp_path, capsys):
    out = shutil.copytree(converted, tmp_path / "mlx")
    write(out, {"lora.safetensors": "mine", ".DS_Store": "Finder's"})
    assert main(["nano", str(out), "--overwrite", "--quiet"]) == 2
    assert "also holds lora.safetensors, which would be lost" in capsys.readouterr().err
    (out / "lora.safetensors").unlink()
    (tmp_path / "link").symlink_to(out)
    assert main(["nano", str(tmp_path / "link"), "--overwrite", "--quiet"]) == 2 and out.is_dir()
    assert main(["nano", str(out), "--overwrite", "--quiet"]) == 0
    assert json.loads((out / "config.json").read_text())["format"] == "wan_mlx" and not (out / ".DS_Store").exists()


@pytest.mark.parametrize("name", ["file/mlx", "file/a/mlx", "m" * 300, "m" * 5000, "", "nul\0"])
def test_a_place_where_no_folder_can_be_is_one_line(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert main(["nano", name, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Errno" not in error
    assert contents(tmp_path) == {"file": "mine"}


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    def refused(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refused)
    assert main(["nano", str(tmp_path / "mlx"), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "mlx cannot be written" in error and error.count("\n") == 1
