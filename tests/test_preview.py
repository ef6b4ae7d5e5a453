"""Previews: what they show, the files, when they are written, and drafts by TAEHV."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hub_server import serving
from paused_process import PausedProcess, run
from PIL import Image

import wan_mlx
from wan_mlx.cli.batch import read_lines
from wan_mlx.cli.main import main
from wan_mlx.cli.terminal import Terminal
from wan_mlx.errors import UsageError
from wan_mlx.media import preview
from wan_mlx.media.preview import PreviewFiles, latent_map, read_maps, sheet_of
from wan_mlx.media.write import read_settings, save_video
from wan_mlx.models.configs import VAE22Config, VAEConfig
from wan_mlx.models.taehv import TAEHV, TAEHVConfig
from wan_mlx.types import Step
from wan_mlx.weights.component import parameter_shapes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def nano():
    return wan_mlx.WanPipeline.from_pretrained("nano", progress=False)


@pytest.fixture(scope="module")
def pipe(pico):
    return wan_mlx.WanPipeline.from_pretrained(pico, dtype="float32", progress=False)


@pytest.fixture(scope="module")
def taehv(tmp_path_factory):
    """A narrow TAEHV with random weights, as its files name them."""
    rng, config = np.random.default_rng(0), TAEHVConfig(encoder_width=4, widths=(8, 6, 4, 4))
    arrays = {}
    for name, shape in parameter_shapes(TAEHV(config)).items():
        values = rng.normal(size=shape).astype(np.float32) / np.sqrt(np.prod(shape[1:]) or 1)
        arrays[name] = mx.array(np.moveaxis(values, -1, 1) if len(shape) == 4 else values * 0.1)
    path = tmp_path_factory.mktemp("taehv") / "taew2_1.safetensors"
    mx.save_safetensors(str(path), {name: mx.contiguous(array) for name, array in arrays.items()})
    return path


@pytest.fixture(scope="module")
def wan_space(pico, tmp_path_factory):
    """The tiny model with the normalisation of Wan 2.1's latents."""
    folder = tmp_path_factory.mktemp("wan") / "model"
    shutil.copytree(pico, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vae"] |= {"mean": list(VAEConfig().mean), "std": list(VAEConfig().std)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fitting():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import fit_preview
    finally:
        sys.path.pop(0)
    return fit_preview


def test_nano_previews_look_like_its_videos(nano):
    """Latents of a clip with several colours: correlation of the preview with what the VAE decodes them to."""
    y, x = np.mgrid[:64, :96]
    clip = np.zeros((5, 64, 96, 3), np.float32) + np.array([-0.8, -0.8, 0.3])
    for frame in range(5):
        clip[frame, (x - 20 - 2 * frame) ** 2 + (y - 30) ** 2 < 150] = [0.8, -0.7, -0.7]
        clip[frame, 20:50, 60 + frame : 85] = [0.7, 0.7, -0.6]
    (latents,) = nano.encode_videos([[mx.array(clip[None, :1]), mx.array(clip[None, 1:])]])
    decoded = np.concatenate(list(nano.decode(latents))) / 127.5 - 1
    shown = nano.preview(latents)
    assert shown.shape == (2, 8, 12, 3) and shown.dtype == np.uint8
    assert fitting().correlation(shown, fitting().shrink(decoded, 8)) >= 0.9


def test_nano_i2v_has_the_colours_of_nano(nano):
    i2v = wan_mlx.WanPipeline.from_pretrained("nano-i2v", progress=False)
    assert i2v.previewer.args == nano.previewer.args


def test_maps_are_whole_and_say_where_they_come_from():
    assert set(read_maps()) == {"Wan 2.1", "Wan 2.2", "nano"}
    for space in read_maps().values():
        assert np.shape(space["factors"]) == (len(space["mean"]), 3) and np.shape(space["bias"]) == (3,)
        assert "latent_rgb" in space["source"] or "examples/fit_preview.py" in space["source"]
    wan = read_maps()["Wan 2.1"]
    assert tuple(wan["mean"]) == VAEConfig().mean and tuple(wan["std"]) == VAEConfig().std
    wan = read_maps()["Wan 2.2"]
    assert tuple(wan["mean"]) == VAE22Config().mean and tuple(wan["std"]) == VAE22Config().std
    assert latent_map(VAE22Config()).args == (wan,)


def test_the_map_is_that_of_the_latents():
    assert latent_map(VAEConfig()).args[0]["factors"][6][1] == -0.4059
    with pytest.raises(ValueError, match=r"expected those of Wan 2.1 or Wan 2.2 or nano; fit them with"):
        latent_map(VAEConfig(mean=(0.0,) * 16))
    z = mx.zeros((1, 1, 1, 2, 16))
    z[0, 0, 0, 1, 14] = 1.0
    shown = latent_map(VAEConfig())(z)[0, 0].astype(int)
    assert np.abs(shown[0] - (np.array([-0.1835, -0.0868, -0.3360]) + 1) * 127.5).max() <= 1
    assert np.abs(shown[1] - shown[0] - np.array([0.3477, 0.2275, 0.2950]) * 127.5).max() <= 1


def test_fit_finds_a_linear_map():
    rng = np.random.default_rng(0)
    factors, bias, z = rng.normal(size=(16, 3)), rng.normal(size=3), rng.normal(size=(200, 16))
    found = fitting().fit(z, z @ factors + bias)
    assert np.allclose(found[0], factors) and np.allclose(found[1], bias)
    frames = np.arange(5 * 2 * 4 * 3, dtype=float).reshape(5, 2, 4, 3)
    small = fitting().shrink(frames, 2)
    assert small.shape == (2, 1, 2, 3)
    assert small[0, 0, 1, 0] == frames[0, :, 2:, 0].mean() and small[1, 0, 0, 2] == frames[1:, :, :2, 2].mean()


def test_fitting_script(tmp_path, monkeypatch, capsys):
    """Any videos, any model: the map is written beside the others, and found by the model's latents."""
    rng = np.random.default_rng(0)
    clips = []
    for index in range(4):
        clips.append(str(tmp_path / f"{index}.gif"))
        colours = rng.integers(0, 255, (5, 1, 1, 3)).astype(np.uint8)
        save_video(clips[-1], np.broadcast_to(colours, (5, 16, 32, 3)), 8, {})
    maps = tmp_path / "maps.json"
    monkeypatch.setattr(fitting(), "MAPS", maps)
    monkeypatch.setattr(sys, "argv", ["fit_preview.py", "--model", "nano", "--size", "32x16", "--save", "again",
                                      "--source", "here", "--clips", *clips])  # fmt: skip
    fitting().main()
    assert capsys.readouterr().out.startswith("3 clips fitted; on 1 others: correlation ")
    written = json.loads(maps.read_text())
    assert list(written) == [*read_maps(), "again"] and written["Wan 2.1"] == read_maps()["Wan 2.1"]
    assert written["again"]["mean"] == read_maps()["nano"]["mean"] and written["again"]["source"] == "here"
    assert np.shape(written["again"]["first"]["factors"]) == (16, 3)


def test_the_first_frame_has_its_own_map():
    rng = np.random.default_rng(0)
    scale = 0.1 * np.array([4, 1, 1])[:, None, None, None]
    latents = [rng.normal(size=(3, 2, 2, 16)) for _ in range(8)]
    found = fitting().fit_both([(z, scale * z[..., :3]) for z in latents])
    assert np.allclose(found["factors"][:3], 0.1 * np.eye(3), atol=1e-3)
    assert np.allclose(found["first"]["factors"][:3], 0.4 * np.eye(3), atol=1e-3)
    z = mx.array(np.full((1, 2, 1, 1, 16), 0.5, np.float32))
    assert preview.map_preview(found, z)[:, 0, 0, 0].tolist() == [int((0.2 + 1) * 127.5), int((0.05 + 1) * 127.5)]


def test_previews_show_the_clean_estimate(pipe):
    seen = []
    video = pipe("a red circle", width=16, height=32, num_frames=5, steps=2, seed=1,
                 callback=lambda step: seen.append((step.preview(), step.denoised, step.latents)))  # fmt: skip
    assert [shown.shape for shown, _, _ in seen] == [(2, 4, 2, 3)] * 2
    for shown, denoised, latents in seen:
        assert np.array_equal(shown, pipe.preview(denoised))
        assert (shown is seen[1][0]) == np.array_equal(shown, pipe.preview(latents))  # only the last is clean
    assert np.array_equal(seen[1][0], pipe.preview(mx.array(np.moveaxis(video.latents, 0, -1)[None])))
    with pytest.raises(ValueError, match="only a pipeline's steps"):
        Step(0, 1, 0.0, 0.0, mx.zeros(1), mx.zeros(1)).preview()


def test_files(pico, flags, tmp_path, capsys, monkeypatch):
    """An animation as long as the video and a sheet; replaced whole after the steps that were asked for."""
    shown, watched = [], tmp_path / "live.webp"
    write = PreviewFiles.write

    def writing(self, step, request):
        event = write(self, step, request)
        with Image.open(watched) as animation, Image.open(watched.with_suffix(".png")) as sheet:
            sizes = animation.size, animation.n_frames, sheet.size
        shown.append((step.index, read_settings(watched)["preview"], *sizes))
        return event

    monkeypatch.setattr(PreviewFiles, "write", writing)
    command = [*talking(flags), "--output", str(tmp_path / "a.mp4"), "--preview", str(watched)]
    assert main([*command, "--preview-every", "2"]) == 0
    # 16x16 pixels are 2x2 latents, twice as large in the animation; 9 frames are 3 latent frames, in two rows.
    assert shown == [(i, {"step": i + 1, "steps": 3}, (4, 4), 3, (4, 4)) for i in (1, 2)]
    assert read_settings(watched)["prompt"] == "a red circle"
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "live.png", "live.webp"]
    with Image.open(watched) as animation:
        durations = []
        for index in range(animation.n_frames):
            animation.seek(index)
            animation.load()
            durations.append(animation.info["duration"])
    assert sum(durations) == round(9 / 16 * 1000)
    said = capsys.readouterr().err
    assert f"preview   {watched}, {watched.with_suffix('.png')}, after every 2 steps" in said
    assert "of denoise, 2 times" in said
    assert main([*command, "--overwrite"]) == 0  # its own files it may replace
    assert len(shown) == 5


def test_previews_are_lines_of_json(flags, tmp_path, capsys):
    watched = tmp_path / "live.webp"
    flags = [*talking(flags), "--json", "--preview", str(watched), "--preview-every", "2"]
    assert main([*flags, "--output", str(tmp_path / "a.mp4")]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event for event in events if event["event"] == "preview"] == [
        {"event": "preview", "animation": str(watched), "sheet": str(watched.with_suffix(".png")), "step": step}
        for step in (1, 2)
    ]


def test_the_video_is_the_same(pico, flags, tmp_path):
    for name, more in (("a", []), ("b", ["--preview", str(tmp_path / "live.webp")])):
        assert main([*flags, "--output", str(tmp_path / f"{name}.mp4"), *more]) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_ctrl_c_leaves_a_preview_of_the_last_step(tmp_path, flags):
    watched = tmp_path / "live.webp"
    watching = ["--preview", str(watched), "--preview-every", "9"]
    paused = PausedProcess("step", 1, *flags, "--output", str(tmp_path / "a.mp4"), *watching)
    assert not watched.exists()
    paused.process.send_signal(signal.SIGINT)
    paused.wait_for("Ctrl-C again stops at once")
    paused.go_on()
    code, errors = paused.finish()
    assert code == 130, errors
    assert read_settings(watched)["preview"] == {"step": 2, "steps": 3}
    assert sorted(os.listdir(tmp_path)) == ["a.mp4.wan", "live.png", "live.webp"]
    assert run("--resume", str(tmp_path / "a.mp4"), "--quiet")[0] == 0  # it goes on watching
    assert read_settings(watched)["preview"] == {"step": 3, "steps": 3}


def test_a_preview_that_cannot_be_written_is_no_reason_to_stop(pico, flags, tmp_path, monkeypatch, caplog):
    def full(path, *rest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preview, "save_video", full)
    assert main([*flags, "--output", str(tmp_path / "a.mp4"), "--preview", str(tmp_path / "live.webp")]) == 0
    assert [r.message for r in caplog.records].count(
        "the preview could not be written: [Errno 28] No space left on device"
    ) == 1
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--preview", "live.gif"], "nearest: live.webp"),
        (["--preview", "none/live.webp"], "none does not exist"),
        (["--preview", "a.webp"], "a.webp would be written over a.png"),
        (["--preview", "live.webp", "--preview-every", "0"], "expected at least 1"),
        (["--preview", "mine.webp"], "mine.png exists and is no preview"),
        (["--tiny-vae"], "tiny_vae is TAEHV, which is for the latents of Wan's VAEs"),
    ],
)
def test_refused_before_any_work(pico, flags, tmp_path, capsys, monkeypatch, more, said):
    monkeypatch.chdir(tmp_path)
    save_video("mine.png", np.zeros((1, 4, 4, 3), np.uint8), 1, {})
    mine = Path("mine.png").read_bytes()
    assert main([*flags, "--output", "a.png", *more]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and said in last
    assert os.listdir() == ["mine.png"] and Path("mine.png").read_bytes() == mine


def test_each_line_of_a_batch_may_be_watched(flags, tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"prompt": "a red circle", "steps": 1, "output": str(tmp_path / "a.mp4"),
                                 "preview": str(tmp_path / "live.webp")}))  # fmt: skip
    assert main([*without_prompt(flags), "--prompts", str(lines)]) == 0
    assert read_settings(tmp_path / "live.webp")["preview"] == {"step": 1, "steps": 1}
    own = {"prompt": "a", "output": str(tmp_path / "c.png"), "preview": str(tmp_path / "c.webp")}
    lines.write_text(json.dumps(own))
    with pytest.raises(UsageError, match="line 1: preview .* would be written over"):
        read_lines(lines, without_prompt(flags), False, Terminal())


def talking(flags):
    return [flag for flag in flags if flag != "--quiet"]


def without_prompt(flags):
    index = flags.index("--prompt")
    return [*flags[:index], *flags[index + 2 :]]


def test_sheet():
    frames = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 4, 3), np.uint8) + 1
    sheet = sheet_of(frames)
    assert sheet.shape == (8, 8, 3)  # two columns of four make the squarest picture
    assert sheet[0, 0, 0] == 1 and sheet[0, 4, 0] == 2 and sheet[2, 0, 0] == 3 and sheet[7, 7, 0] == 0
    assert sheet_of(frames[:1]).shape == (2, 4, 3)
    assert sheet_of(np.zeros((60, 2, 4, 3), np.uint8)).shape == (14, 16, 3)  # 25 of them


def test_taehv_makes_previews_and_drafts(wan_space, taehv, flags, tmp_path, capsys):
    pipe = wan_mlx.WanPipeline.from_pretrained(wan_space, dtype="float32", progress=False, taehv=taehv, tiny_vae=True)
    options = dict(width=16, height=32, num_frames=5, steps=1, seed=1)
    steps = []
    video = pipe("a red circle", **options, callback=steps.append)
    tiny = wan_mlx.load_taehv(taehv)
    latents = mx.array(np.moveaxis(video.latents, 0, -1)[None])
    wanted = np.concatenate([preview.to_uint8(frames[0]) for frames in tiny.decode(latents)])
    assert video.frames.shape == (5, 32, 16, 3) and np.array_equal(video.frames, wanted)
    assert video.settings["tiny_vae"] == "taew2_1.safetensors"
    small = [preview.to_uint8(frames[0]) for frames in tiny.decode(latents, small=True)]
    assert np.array_equal(steps[0].preview(), np.concatenate(small))
    plain = wan_mlx.WanPipeline.from_pretrained(wan_space, dtype="float32", progress=False)
    assert not np.array_equal(plain("a red circle", **options).frames, video.frames)
    assert not {"draft", "tiny_vae"} & {*plain.settings(plain.request("x"))}


@pytest.mark.parametrize("rank, count", [(0, 2), (1, 0)])
def test_of_several_machines_the_first_decodes_a_draft(wan_space, taehv, monkeypatch, rank, count):
    pipe = wan_mlx.WanPipeline.from_pretrained(wan_space, dtype="float32", progress=False, taehv=taehv, tiny_vae=True)
    monkeypatch.setattr(type(pipe), "group", SimpleNamespace(rank=rank))
    assert len(list(pipe.decode(mx.zeros((1, 2, 4, 2, 16))))) == count


def test_a_draft_goes_on_as_a_draft(wan_space, taehv, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(taehv, "tae.safetensors")
    flags = [*talking(flags), "--model", str(wan_space), "--taehv", "tae.safetensors", "--tiny-vae", "--output"]
    assert main([*flags, "whole.mp4"]) == 0
    assert "decoding  by tae.safetensors instead of the VAE" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(TAEHV, "decode", lambda *_, **__: (_ for _ in ()).throw(OSError("cut")))
        assert main([*flags, "cut.mp4"]) == 1
    assert main(["--resume", "cut.mp4", "--quiet"]) == 0
    assert Path("cut.mp4").read_bytes() == Path("whole.mp4").read_bytes()
    replay = ["--config", "whole.mp4", "--model", str(wan_space), "--output", "replayed.mp4", "--quiet"]
    assert main(replay) == 2 and "give that with --taehv" in capsys.readouterr().err
    assert main([*replay, "--taehv", "tae.safetensors"]) == 0
    assert Path("replayed.mp4").read_bytes() == Path("whole.mp4").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(TAEHV, "decode", lambda *_, **__: (_ for _ in ()).throw(OSError("cut")))
        assert main([*flags, "other.mp4"]) == 1
    arrays = mx.load("tae.safetensors")
    arrays["decoder.22.bias"] = arrays["decoder.22.bias"] + 0.25
    mx.eval(arrays)
    mx.save_safetensors("tae.safetensors", arrays)
    assert main(["--resume", "other.mp4", "--quiet"]) == 1
    assert "tae.safetensors is not the file that the run was begun with" in capsys.readouterr().err


def test_taehv_of_a_hub(wan_space, taehv, tmp_path, monkeypatch):
    repos = {"some/Autoencoders": {"taew2_1.safetensors": taehv.read_bytes(), "other.pth": b"no"}}
    with serving(repos, monkeypatch, tmp_path) as hub:
        name = "some/Autoencoders:taew2_1.safetensors"
        pipe = wan_mlx.WanPipeline.from_pretrained(wan_space, progress=False, taehv=name, tiny_vae=True)
        assert hub.got() == {"taew2_1.safetensors": 1}
    assert pipe.settings(pipe.request("x"))["tiny_vae"] == "taew2_1.safetensors"
    with pytest.raises(wan_mlx.WeightsError, match="none.pth"):
        wan_mlx.WanPipeline.from_pretrained(wan_space, taehv=tmp_path / "none.pth")


def test_taehv_is_for_wan_latents(pico, taehv):
    with pytest.raises(ValueError, match="taehv is for Wan 2.1's latents"):
        wan_mlx.WanPipeline.from_pretrained(pico, taehv=taehv)
