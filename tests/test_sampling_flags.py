"""Flags for caches, guidance and recipes: what is said before a run, and one clear line where they are wrong."""

import pytest

from wan_mlx.cli.main import main


def run(capsys, *extra):
    code = main(["--model", "nano", "--prompt", "a red circle", "--seed", "1", "--dry-run", *extra])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--cache", "easycache:0.1"], ["cache     easycache:0.1:3"]),
        (["--cache", "none"], ["euler, 4 steps", "guidance off", "recipe nano-4step"]),
        (["--steps", "12"], ["unipc, 12 steps", "guidance 3"]),
        (["--guidance-range", "0.1-0.9"], ["guidance only from 0.1 to 0.9 of the steps"]),
        (["--cfg-zero"], ["CFG-Zero*, 2 first steps"]),
        (["--cfg-zero", "0"], ["CFG-Zero*, 0 first steps"]),
        (["--cfg-zero", "--slg", "2,3"], ["CFG-Zero*, 2 first", "layers 2, 3 skipped from 0.1 to 1"]),
        (["--slg", "2:0.2-0.7"], ["layers 2 skipped from 0.2 to 0.7"]),
        (["--recipe", "causvid", "--steps", "6"], ["unipc, 6 steps, shift 7, guidance off", "recipe causvid"]),
        (["--phases", "900:3:0,0:1"], ["timesteps 1000 to 900: 3 steps, guidance 3, without LoRAs", "0: 9 steps"]),
        (["--solver", "dmd"], ["dmd, 12 steps"]),
    ],
)
def test_notes_about_sampling_flags(capsys, arguments, says):
    code, error = run(capsys, *arguments)
    assert code == 0 and all(words in error for words in says), error


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--cache", "teacup"], ["unknown cache 'teacup'", "expected none, teacache"]),
        (["--cache", "teacache:0.1"], ["teacache has no published constants for nano", "spectrum need none"]),
        (["--cache", "magcache"], ["magcache has no published constants for nano"]),
        (["--cache", "easycache", "--steps", "5"], ["easycache makes no sense with 5 steps", "at least 10"]),
        (["--guidance-range", "half"], ["'half' is no range", "0.1-0.9"]),
        (["--guidance-range", "0.9-0.1"], ["guidance_range is (0.9, 0.1)"]),
        (["--guidance-range", "0.1.2-0.9"], ["no range"]),
        (["--cfg-zero", "12"], ["cfg_zero is 12 steps, expected 0 to 11"]),
        (["--cfg-zero", "--guidance", "1"], ["cfg_zero", "guidance is off"]),
        (["--slg", "six"], ["'six'", "9,10:0.1-0.9"]),
        (["--slg", "6"], ["names layer 6, expected 0 to 5"]),
        (["--recipe", "lightning"], ["unknown recipe 'lightning'", "lightx2v-4step"]),
    ],
)
def test_wrong_use_is_one_line(capsys, arguments, says):
    code, error = run(capsys, *arguments)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and all(words in lines[0] for words in says), error
