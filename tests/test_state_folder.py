"""Nothing in a run's folder is taken on trust: damaged, edited, of another run, a link, or somebody else's."""

import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from wan_mlx import storage
from wan_mlx.cli.main import main
from wan_mlx.errors import WanError
from wan_mlx.runs.folder import FrameStore, RunFolder


@pytest.fixture(scope="module")
def cut(tmp_path_factory, flags):
    """Where a run of a.npz was cut with all frames kept; another with other text, seed and size; and a whole a.npz."""
    place = tmp_path_factory.mktemp("cut")
    (place / "whole").mkdir()
    assert main([*flags, "--output", str(place / "whole" / "a.npz")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "mark_finished", lambda *_: 1 / 0)
        for name, more in (("mine", []), ("other", ["--prompt", "a cat", "--seed", "4", "--size", "32x32"])):
            (place / name).mkdir()
            assert main([*flags, *more, "--output", str(place / name / "a.npz")]) == 1
    return place


@pytest.fixture
def folder(cut, tmp_path, monkeypatch):
    """The cut run's folder, in the current folder."""
    shutil.copytree(cut / "mine", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("a.npz.wan")


@pytest.fixture
def resume(cut, capsys, caplog):
    """Goes on with the run; returns the exit code and the one line of the error, or what was warned of."""

    def go_on() -> tuple[int, str]:
        capsys.readouterr()
        code = main(["--resume", "a.npz", "--quiet"])
        lines = capsys.readouterr().err.splitlines()
        if code == 0:
            assert Path("a.npz").read_bytes() == (cut / "whole" / "a.npz").read_bytes()
        else:
            assert [line.startswith("error: ") for line in lines].count(True) == 1 and "--debug" not in lines[-1], lines
        return code, caplog.text if code == 0 else lines[-1]

    return go_on


def flip(path: Path) -> None:
    """One bit of the last number in it."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 64
    path.write_bytes(data)


def rewritten(folder: Path, **changes) -> None:
    """Edit run.json as one would by hand."""
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | changes))


def test_an_intact_one_goes_on(folder, resume):
    assert resume() == (0, "") and os.listdir() == ["a.npz"]


@pytest.mark.parametrize("frames", ["all frames", "no frames"])
def test_a_damaged_step_is_made_again(folder, resume, frames):
    """Its latents and forwards never come from the step before."""
    if frames == "no frames":
        (folder / "frames.index").unlink()
    flip(folder / "step-0003.safetensors")
    code, said = resume()
    assert code == 0 and "step-0003.safetensors is damaged; that step is made again" in said


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: b"", lambda data: b"{" * len(data)])
def test_a_step_cut_short(folder, resume, damage):
    path = folder / "step-0003.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert resume()[0] == 0


def test_a_copied_step_is_made_again(folder, resume):
    shutil.copy(folder / "step-0002.safetensors", folder / "step-0003.safetensors")
    code, said = resume()
    assert code == 0 and "step-0003.safetensors is a copy of step-0002.safetensors" in said


def test_weights_of_a_step_that_is_made_again_are_looked_at(folder, resume, monkeypatch):
    """Where all steps are kept, the transformer may be another; not where the last of them is damaged."""
    flip(folder / "step-0003.safetensors")
    real = storage.fingerprint
    monkeypatch.setattr(storage, "fingerprint", lambda path: real(path) | {"size": 1})
    code, said = resume()
    assert code == 1 and "is not the file that the run was begun with" in said


def test_damaged_conditioning_is_refused(folder, resume):
    flip(folder / "conditioning.safetensors")
    code, said = resume()
    assert code == 1 and "conditioning.safetensors is damaged; start anew with --overwrite" in said
    assert main(["--resume", "a.npz", "--overwrite"]) == 1


@pytest.mark.parametrize("names", [["conditioning.safetensors"], ["step-0002.safetensors", "step-0003.safetensors"],
                                   ["frames.raw"], ["frames.index"], ["frames.raw", "frames.index"]])  # fmt: skip
def test_what_is_missing_is_made_again(folder, resume, names):
    for name in names:
        (folder / name).unlink()
    assert resume()[0] == 0


def test_state_of_another_run_is_not_taken(cut, folder, resume):
    other = cut / "other" / "a.npz.wan"
    for name in ("step-0002.safetensors", "step-0003.safetensors", "frames.raw", "frames.index"):
        shutil.copy(other / name, folder)
    code, said = resume()
    assert code == 0 and "step-0003.safetensors is of another run" in said


@pytest.mark.parametrize("name", ["conditioning.safetensors", "run.json"])
def test_conditioning_or_record_of_another_run_is_refused(cut, folder, resume, name):
    shutil.copy(cut / "other" / "a.npz.wan" / name, folder)
    code, said = resume()
    assert code == 1 and "conditioning.safetensors is of another run; start anew with --overwrite" in said


@pytest.mark.parametrize("edit", [{"seed": 4}, {"prompt": "a cat"}, {"steps": 4}, {"steps": 2}, {"width": "wide"},
                                  {"guidance_scale": 1.5}], ids=str)  # fmt: skip
def test_an_edited_record_is_refused(folder, resume, edit):
    record = json.loads((folder / "run.json").read_text())
    rewritten(folder, request=record["request"] | edit)
    code, said = resume()
    assert code == 1 and "run.json is damaged (it is not as it was written); remove a.npz.wan to start anew" in said


@pytest.mark.parametrize("change", [{"asked": None}, {"request": {}}, {"steps": 10**30}, {"before": 5}], ids=str)
def test_a_record_with_a_digest_of_its_own_is_refused(folder, resume, change):
    """Steps and conditioning hold the digest of the record that they were made under."""
    record = json.loads((folder / "run.json").read_text()) | change
    del record["digest"]
    rewritten(folder, **record, digest=storage.digest({}, record))
    code, said = resume()
    assert code == 1
    assert "conditioning.safetensors is of a run.json that has been changed since" in said or "is damaged" in said


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "5", "[" * 100_000, '{"run": ' * 100_000, "\0", "\udcff"])
def test_a_record_that_is_none(folder, resume, text):
    (folder / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    code, said = resume()
    assert code == 1 and "run.json is damaged" in said and "remove a.npz.wan to start anew" in said
    kept = sorted(os.listdir(folder))
    assert main(["--resume", "a.npz", "--overwrite", "--quiet"]) == 1 and sorted(os.listdir(folder)) == kept


@pytest.mark.parametrize("name", ["request", "asked", "model", "settings", "weights", "machine", "steps", "before"])
def test_a_record_without(folder, resume, name):
    record = json.loads((folder / "run.json").read_text())
    del record[name]
    (folder / "run.json").write_text(json.dumps(record))
    code, said = resume()
    assert code == 1 and "run.json is damaged" in said


@pytest.mark.parametrize("count", ["1" + "0" * 20, "1" + "0" * 10, "9" * 5000, "-1", "٣", "999999999"])
def test_frames_that_the_index_invents(folder, resume, count):
    index = folder / "frames.index"
    _, *rest = index.read_text().splitlines()[0].split(" ")
    index.write_text(" ".join([count, *rest]) + "\n")
    assert resume()[0] == 0


def test_frames_of_another_size_are_refused(tmp_path):
    store = FrameStore(tmp_path, "f" * 32, 4, 6)
    with pytest.raises(WanError, match=r"frames are uint8 \(1, 6, 4, 3\), but the run makes uint8 \(4, 6, 3\)"):
        store.add(np.zeros((1, 6, 4, 3), np.uint8))
    assert os.listdir(tmp_path) == []


def test_somebody_elses_files_stay(folder, resume, caplog):
    """Of the names that a run gives, only those of this run."""
    others = ["step-0099.safetensors", "step-0004.safetensors", "step-abc.safetensors", "model.safetensors",
              "frames.txt", "notes.txt", "finished.json"]  # fmt: skip
    for name in others:
        (folder / name).write_text("{")
    code, said = resume()
    assert code == 0 and "a.npz.wan stays: Directory not empty" in said
    assert sorted(os.listdir(folder)) == sorted(others)


def refused(flags, capsys, *more) -> str:
    """What a new run of a.npz, begun at whatever cost, is told."""
    capsys.readouterr()
    assert main([*flags, "--output", "a.npz", "--overwrite", *more]) in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "--debug" not in lines[0], lines
    return lines[0]


@pytest.mark.parametrize("target", ["models", "nowhere", "empty"])
def test_a_link_in_place_of_the_folder(tmp_path, monkeypatch, capsys, flags, target):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("empty").mkdir()
    names = ["conditioning.safetensors", "model.safetensors", "frames.raw", "step-0001.safetensors"]
    for name in names:
        (Path("models") / name).write_text("mine")
    os.symlink(target, "a.npz.wan")
    assert "a.npz.wan" in refused(flags, capsys)
    assert main(["--resume", "a.npz"]) == 2
    assert sorted(os.listdir("models")) == sorted(names) and not os.listdir("empty")
    assert not Path("nowhere").exists() and not Path("a.npz").exists()


@pytest.mark.parametrize("names", [["a.safetensors"], ["lock", "frames.raw"], ["run.json", "b.safetensors"], ["lock"],
                                   ["finished.json"]])  # fmt: skip
def test_somebody_elses_folder(tmp_path, monkeypatch, capsys, flags, names):
    monkeypatch.chdir(tmp_path)
    Path("a.npz.wan").mkdir()
    for name in names:
        (Path("a.npz.wan") / name).write_text('{"mine": 1}')
    said = refused(flags, capsys)
    assert "no run has made it" in said or "is damaged" in said or "is no run's" in said
    assert sorted(os.listdir("a.npz.wan")) == sorted(names)
    assert all((Path("a.npz.wan") / name).read_text() == '{"mine": 1}' for name in names)


@pytest.mark.parametrize("name", ["lock", "run.json", "conditioning.safetensors", "frames.raw", "frames.index",
                                  "step-0003.safetensors", ".wan_mlx-run.json"])  # fmt: skip
def test_links_in_the_folder_are_not_followed(folder, resume, capsys, flags, name):
    victim = Path("victim").absolute()
    victim.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"mine")
    before = victim.read_bytes()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    code, said = resume()
    assert code == 2 and f"{name} is a link or a folder, expected a file of a run" in said
    assert name in refused(flags, capsys)
    assert victim.read_bytes() == before


def test_files_with_another_name_stay_as_they_are(folder, resume):
    """As a backup by hard links has them."""
    (folder / "lock").write_text("process 1")
    backup = Path("backup")
    shutil.copytree(folder, backup, copy_function=os.link)
    before = {path.name: path.read_bytes() for path in backup.iterdir()}
    index = (folder / "frames.index").read_text().splitlines(keepends=True)
    (folder / "frames.index").unlink()
    (folder / "frames.index").write_text(index[0])  # so that frames are added
    assert resume()[0] == 0
    assert {path.name: path.read_bytes() for path in backup.iterdir()} == before


@pytest.mark.parametrize("name", ["lock", "run.json", "frames.raw", "step-0003.safetensors"])
def test_a_folder_in_place_of_a_file(folder, resume, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    code, said = resume()
    assert code == 2 and f"{name} is a link or a folder" in said


def test_a_state_that_does_not_fit_is_not_damaged(folder, monkeypatch):
    def fails(*arrays):
        raise RuntimeError("[malloc] Unable to allocate 9 bytes.")

    monkeypatch.setattr("wan_mlx.runs.folder.mx.eval", fails)
    assert main(["--resume", "a.npz"]) == 1 and (folder / "step-0003.safetensors").exists()


def test_nobody_else_may_read(folder, monkeypatch, flags):
    made = Path("b.npz.wan")
    before = os.umask(0)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "mark_finished", lambda *_: 1 / 0)
            assert main([*flags, "--output", "b.npz"]) == 1
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()} == {0o600} and len(os.listdir(made)) == 7


@pytest.mark.parametrize("what", ["state", "output"])
@pytest.mark.parametrize("when", ["save_step", "add"])
def test_removed_while_the_run_is_at_work(tmp_path, monkeypatch, capsys, flags, what, when):
    output = tmp_path / "out" / "a.npz"
    output.parent.mkdir()
    of = FrameStore if when == "add" else RunFolder
    real = getattr(of, when)

    def removing(*args):
        shutil.rmtree(output.parent if what == "output" else f"{output}.wan", ignore_errors=True)
        real(*args)

    monkeypatch.setattr(of, when, removing)
    assert main([*flags, "--output", str(output)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "learned to draw at" in lines.pop(0)
    assert lines == [f"error: {output}.wan was removed while the run was at work; start anew"]


def test_what_is_written_does_not_go_through_a_link(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "frames.raw").symlink_to(victim)
    with pytest.raises(WanError, match="frames.raw cannot be written"):
        storage.append(tmp_path / "frames.raw", b"more")
    monkeypatch.setattr(storage.secrets, "token_hex", lambda size: "00")  # a name that could be guessed
    (tmp_path / ".wan_mlx-00.json").symlink_to(victim)
    with pytest.raises(WanError, match="run.json cannot be written.*File exists"):
        with storage.whole_file(tmp_path / "run.json") as path:
            path.write_text("other")
    assert victim.read_text() == "mine" and not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("given", [["--report", "a.jsonl"], ["--preview-every", "2"]])
def test_flags_that_a_run_that_goes_on_has_no_use_for(folder, capsys, given):
    assert main(["--resume", "a.npz", *given]) == 2
    assert f"{given[0]} has no effect without" in capsys.readouterr().err and (folder / "run.json").exists()


def test_frames_of_another_run_are_not_taken(tmp_path):
    """Whole ones, and of the same size."""
    FrameStore(tmp_path, "mine", 2, 2).add(np.zeros((1, 2, 2, 3), np.uint8))
    assert FrameStore(tmp_path, "mine", 2, 2).count == 1 and FrameStore(tmp_path, "other", 2, 2).count == 0
