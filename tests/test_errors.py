"""Errors suggest what is near, and nothing else; every command in a hint works as it stands."""

import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from imageio_ffmpeg import get_ffmpeg_exe

from wan_mlx import WanPipeline, errors, options
from wan_mlx.cli.main import main
from wan_mlx.hub.resolve import Location, explain
from wan_mlx.other_words import WORDS
from wan_mlx.presets import PRESETS, model_for

NANO = ["--model", "nano", "--prompt", "a red circle", "--dry-run"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def said_of(capsys, *arguments: str, code: int = 2) -> str:
    assert main([*arguments]) == code
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "given, choices, near",
    [
        ("--sise", ["--size", "--fit", "--prompt"], "--size"),
        ("--WIDTH", ["--fit", "--size"], ""),
        ("--zzzzz", ["--size", "--seed"], ""),
        ("nanoo", [*PRESETS], "nano"),
        ("t2v1.3b", [*PRESETS], "t2v-1.3B"),
        (".avi", [".mp4", ".gif", ".webp"], ""),
        ("t2v", [*PRESETS], "t2v-1.3B, t2v-14B, t2v-A14B"),
        ("tea", ["none", "teacache", "magcache"], "teacache"),
        ("x", ["xyz", "xxy"], ""),
        (3, ["a", "b"], ""),
    ],
)
def test_only_what_is_spelled_nearly_so_is_suggested(given, choices, near):
    assert errors.closest(given, choices) == near
    assert errors.nearest(given, choices) == (f"; nearest: {near}" if near else "")


@pytest.mark.parametrize(
    "flags, end",
    [
        (["--sise", "64x64"], "unknown argument --sise 64x64; nearest: --size"),
        (["a cat", "--sise", "64x64"], "unknown argument --sise 64x64; nearest: --size"),
        (["--zzzzz"], "unknown argument --zzzzz"),
        (["--cfg", "3"], "unknown argument --cfg 3; here that is --guidance"),
        (["--denoise=0.7"], "unknown argument --denoise=0.7; here that is --strength"),
        (["--num-inference-steps", "9"], "unknown argument --num-inference-steps 9; here that is --steps"),
        (["--output", "a.avi"], "expected one of .mp4 .gif .webp .png .npz"),
        (["--memory", "8"], "such as 8GB; nearest: 8GB"),
        (["--dtype", "fp16"], "nearest: float16"),
        (["--dtype", "bf16"], "nearest: bfloat16"),
        (["--cache", "none-at-all"], "spectrum[:WINDOW[:GROWTH[:outputs|hidden]]]"),
        (["--image", "a.png"], ": use --model nano-i2v"),
        (["--last-image", "a.png"], "it is for flf2v, inp, control: use --model fun-5B-InP"),
    ],
)
def test_wrong_flags(flags, end, capsys):
    assert said_of(capsys, *NANO, *flags).endswith(end)


def test_names_of_models(capsys):
    for given, near in (("nanoo", "nano"), ("t2v1.3b", "t2v-1.3B")):
        said = said_of(capsys, *NANO, "--model", given)
        assert said.startswith(f"error: model {given} does not exist; nearest: {near}; `wan-mlx models` lists")
    Path("wan2.1_t2v.gguf").write_bytes(b"GGUF")
    Path("x.txt").touch()
    assert said_of(capsys, *NANO, "--model", "x.gguf") == "error: model file x.gguf does not exist"
    assert said_of(capsys, *NANO, "--model", "wan2.1-t2v.gguf").endswith("does not exist; nearest: wan2.1_t2v.gguf")
    assert said_of(capsys, *NANO, "--task", "t2v1.3B").endswith("; nearest: t2v-1.3B")


def test_only_weights_are_suggested_for_a_lora(capsys):
    for name in ("five.jsonl", "style.log", "causvid.safetensors"):
        Path(name).touch()
    assert said_of(capsys, *NANO, "--lora", "five.safetensors").endswith("five.safetensors: no such file")
    Path("my_style.safetensors").touch()
    said = said_of(capsys, *NANO, "--lora", "mystyle.safetensors")
    assert said.endswith("no such file; nearest: my_style.safetensors")


@pytest.mark.parametrize(
    "argv, there, said",
    [
        ("--image frist.png x", "first.png first.txt", "frist.png does not exist, expected a file; nearest: first.png"),
        ("--image sub/frist.png x", "sub/first.jpg", "; nearest: sub/first.jpg"),
        ("--image a.png x", "bbb.png ccc.png", "a.png does not exist, expected a file"),
        ("info nano.mp4", "nanoo.mp4", "; nearest: nanoo.mp4"),
        ("resume nano.mp4", "nanoo.mp4", "; nearest: nanoo.mp4"),
        ("--config nano.mp4", "nanoo.mp4", "; nearest: nanoo.mp4"),
        ("--config nano.json", "nanoo.json", "--config nano.json does not exist, expected a file; nearest: nanoo.json"),
        ("--config p.txt", "p.txt", "expected a file that ends on one of .json .mp4 .gif .webp .png .npz"),
        ("--prompts q.txt", "p.txt", "--prompts q.txt does not exist, expected a file; nearest: p.txt"),
        ("--lora styles/stile.safetensors x", "styles/style.safetensors", "no such file; nearest: style.safetensors"),
        ("--taehv tae.pth --tiny-vae x", "", "tae.pth: no such file"),
    ],
)
def test_a_file_that_is_missing_is_a_wrong_argument(capsys, argv, there, said):
    for name in there.split():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert said_of(capsys, *argv.split()).endswith(said)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"text_encoder": "umt6.pth"}, "text encoder file umt6.pth does not exist; nearest: umt5.pth"),
        ({"vae": "parts/vea.pth"}, "vae file parts/vea.pth does not exist; nearest: parts/vae.pth"),
        ({"loras": "stile.safetensors"}, "stile.safetensors: no such file; nearest: style.safetensors"),
    ],
)
def test_a_part_that_is_missing_is_told_before_a_download(monkeypatch, given, said):
    monkeypatch.setattr("wan_mlx.hub.resolve.survey", lambda *_: pytest.fail("a hub is asked"))
    Path("parts").mkdir()
    for name in ("umt5.pth", "style.safetensors", "parts/vae.pth"):
        Path(name).touch()
    with pytest.raises(ValueError, match=said):
        WanPipeline.from_pretrained("t2v-1.3B", **given)


def test_a_model_that_takes_the_source_is_named():
    for task, like, name in (
        (["i2v", "flf2v"], "nano", "nano-i2v"), (["vace"], "t2v-1.3B", "vace-1.3B"), (["vace"], "t2v-14B", "vace-14B"),
        (["t2v"], "i2v-14B-480P", "t2v-14B"), (["t2v"], "nano-i2v", "nano"),
    ):  # fmt: skip
        assert model_for(task, PRESETS[like]).name == name


def test_words_of_other_programs_are_options_here():
    known = {flag for option in options.flags() for flag in option.flags}
    assert {word.ours for word in WORDS} <= known
    assert len({word.ours for word in WORDS}) == len(WORDS)


def test_an_image_that_is_missing(capsys):
    said = said_of(capsys, "--model", "nano-i2v", "--prompt", "a red circle", "--dry-run")
    assert said == "error: image to video needs an image: give it with --image FILE (in Python image=)"


def test_a_foreign_video_has_no_settings(capsys):
    made = ["-f", "lavfi", "-i", "testsrc=duration=0.2:size=64x64"]
    for comment in ("hello", '{"made by": "another program"}'):
        noted = ["-metadata", f"comment={comment}"]
        subprocess.run([get_ffmpeg_exe(), "-v", "error", *made, *noted, "-y", "a.mp4"], check=True)
        assert "a.mp4" in (said := said_of(capsys, "--config", "a.mp4", *NANO)) and "not made by wan_mlx" in said


def test_draw_things_models_are_named(capsys):
    Path("wan_v2.1_1.3b_480p_q8p.ckpt").write_bytes(b"SQLite format 3\0" + bytes(500))
    said = said_of(capsys, *NANO, "--model", "wan_v2.1_1.3b_480p_q8p.ckpt", code=1)
    assert "a database, in which Draw Things keeps its models" in said


def test_names_on_a_hub_that_are_nearly_right():
    error = RepositoryNotFoundError("none", response=Mock(status_code=404, headers={}))
    assert str(explain(error, Location("Wan-AI/Wan-2.1-T2V-1.3B"))).endswith("; nearest: Wan-AI/Wan2.1-T2V-1.3B")
    assert "nearest" not in str(explain(error, Location("someone/something")))


def test_a_hub_out_of_reach_has_two_ways_round():
    said = str(explain(ConnectionError("no route"), Location("Wan-AI/Wan2.1-T2V-1.3B")))
    assert "HF_ENDPOINT=https://hf-mirror.com" in said and "--source modelscope" in said


def test_the_bundled_model_is_called_by_its_name(capsys):
    assert main([*NANO]) == 0
    assert "model     nano (bundled, bfloat16)" in capsys.readouterr().err
