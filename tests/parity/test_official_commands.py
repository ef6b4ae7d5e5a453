"""Every command of the official README and every example of its ``generate.py``, with the program's name changed.

The flags stand as published; the prompts, which are long, are replaced by short ones. Tiny folders stand in for the
models, and ``--dry-run`` is added, which ends before the work: `test_whole_run_images` does that.
"""

import re
import shlex

import numpy as np
import pytest
from PIL import Image

from wan_mlx.cli.flags import build_parser
from wan_mlx.cli.main import main

ENGLISH = 'A small bird’s flight, "close-up", low-angle; it isn\'t far -- 5 m'
CHINESE = "一只小鸟从地面起飞，镜头跟随"
FOLDERS = {
    "Wan2.1-T2V-1.3B": "t2v", "Wan2.1-T2V-14B": "t2v", "Wan2.1-I2V-14B-720P": "i2v", "Wan2.1-I2V-14B-480P": "i2v",
    "Wan2.1-FLF2V-14B-720P": "flf2v", "Wan2.1-VACE-1.3B": "vace", "Wan2.1-VACE-14B": "vace",
}  # fmt: skip
I2V = "--task i2v-14B --size 1280*720 --ckpt_dir ./Wan2.1-I2V-14B-720P --image examples/i2v_input.JPG"
FLF2V = (
    "--task flf2v-14B --size 1280*720 --ckpt_dir ./Wan2.1-FLF2V-14B-720P --first_frame "
    "examples/flf2v_input_first_frame.png --last_frame examples/flf2v_input_last_frame.png"
)
VACE = "--src_ref_images examples/girl.png,examples/snake.png"
ON_EIGHT_GPUS = "--dit_fsdp --t5_fsdp --ulysses_size 8"
TORCHRUN = "torchrun --nproc_per_node=8 generate.py"
T2I = "--task t2i-14B --size 1024*1024 --ckpt_dir ./Wan2.1-T2V-14B"

# The command, and the size, number of frames, steps, shift and guidance that the official code runs it with.
COMMANDS = {
    "python generate.py  --task t2v-14B --size 1280*720 --ckpt_dir ./Wan2.1-T2V-14B --prompt EN":
        ("1280x720, 81 frames", "50 steps, shift 5, guidance 5"),
    "python generate.py  --task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B --offload_model True --t5_cpu "
    "--sample_shift 8 --sample_guide_scale 6 --prompt EN": ("832x480, 81 frames", "50 steps, shift 8, guidance 6"),
    f"{TORCHRUN} --task t2v-14B --size 1280*720 --ckpt_dir ./Wan2.1-T2V-14B {ON_EIGHT_GPUS} --prompt EN":
        ("1280x720, 81 frames", "50 steps, shift 5, guidance 5"),
    f"python generate.py {I2V} --prompt EN": ("1280x720, 81 frames", "40 steps, shift 5, guidance 5"),
    f"{TORCHRUN} {I2V} {ON_EIGHT_GPUS} --prompt EN": ("1280x720, 81 frames", "40 steps, shift 5, guidance 5"),
    "python generate.py --task i2v-14B --size 832*480 --ckpt_dir ./Wan2.1-I2V-14B-480P --image examples/i2v_input.JPG "
    "--prompt EN": ("832x464, 81 frames", "40 steps, shift 3, guidance 5"),
    f"python generate.py {FLF2V} --prompt EN": ("720x1280, 81 frames", "50 steps, shift 16, guidance 5"),
    f"{TORCHRUN} {FLF2V} {ON_EIGHT_GPUS} --prompt EN": ("720x1280, 81 frames", "50 steps, shift 16, guidance 5"),
    f"python generate.py --task vace-1.3B --size 832*480 --ckpt_dir ./Wan2.1-VACE-1.3B {VACE} --prompt ZH":
        ("832x480, 81 frames", "50 steps, shift 16, guidance 5"),
    f"{TORCHRUN} --task vace-14B --size 1280*720 --ckpt_dir ./Wan2.1-VACE-14B {ON_EIGHT_GPUS} {VACE} --prompt ZH":
        ("1280x720, 81 frames", "50 steps, shift 16, guidance 5"),
    f"python generate.py {T2I}  --prompt ZH": ("1024x1024, 1 frames", "50 steps, shift 5, guidance 5"),
    f"{TORCHRUN} {ON_EIGHT_GPUS} --base_seed 0 --frame_num 1 --task t2i-14B  --size 1024*1024 --prompt ZH --ckpt_dir "
    "./Wan2.1-T2V-14B": ("1024x1024, 1 frames", "50 steps, shift 5, guidance 5, seed 0"),
}  # fmt: skip
# Those that have the prompt extended first, by a model here or by a service.
EXTENDING = [
    "DASH_API_KEY=your_key python generate.py  --task t2v-14B --size 1280*720 --ckpt_dir ./Wan2.1-T2V-14B --prompt EN "
    "--use_prompt_extend --prompt_extend_method 'dashscope' --prompt_extend_target_lang 'zh'",
    "python generate.py  --task t2v-14B --size 1280*720 --ckpt_dir ./Wan2.1-T2V-14B --prompt EN --use_prompt_extend "
    "--prompt_extend_method 'local_qwen' --prompt_extend_target_lang 'zh'",
    f"python generate.py {I2V} --use_prompt_extend --prompt_extend_model Qwen/Qwen2.5-VL-7B-Instruct --prompt EN",
    f"DASH_API_KEY=your_key python generate.py {I2V} --use_prompt_extend --prompt_extend_method 'dashscope' "
    "--prompt EN",
    f"python generate.py {FLF2V} --use_prompt_extend --prompt_extend_model Qwen/Qwen2.5-VL-7B-Instruct --prompt EN",
    f"DASH_API_KEY=your_key python generate.py {FLF2V} --use_prompt_extend --prompt_extend_method 'dashscope' "
    "--prompt EN",
    f"python generate.py {T2I}  --prompt ZH --use_prompt_extend",
    f"{TORCHRUN} {ON_EIGHT_GPUS} --base_seed 0 --frame_num 1 --task t2i-14B  --size 1024*1024 --ckpt_dir "
    "./Wan2.1-T2V-14B --prompt ZH --use_prompt_extend",
]


@pytest.fixture(scope="module")
def home(models, tmp_path_factory):
    """The folder that the official commands are run in: models beside ``examples``."""
    home = tmp_path_factory.mktemp("official")
    for name, kind in FOLDERS.items():
        (home / name).symlink_to(models(kind)[1], target_is_directory=True)
    (home / "examples").mkdir()
    sizes = {"i2v_input.JPG": (1280, 720), "flf2v_input_first_frame.png": (720, 1280),
             "flf2v_input_last_frame.png": (720, 1280), "girl.png": (60, 90), "snake.png": (64, 64)}  # fmt: skip
    for name, (width, height) in sizes.items():
        Image.fromarray(np.full((height, width, 3), 99, np.uint8)).save(home / "examples" / name)
    return home


def arguments(command: str) -> list[str]:
    """What follows the program's name."""
    flags = re.fullmatch(r"(?:\w+=\w+ )?(?:python|torchrun --nproc_per_node=8) generate\.py +(.*)", command)[1]
    return [{"EN": ENGLISH, "ZH": CHINESE}.get(word, word) for word in shlex.split(flags)]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    size, sampling = COMMANDS[command]
    before = sorted(home.iterdir())
    assert main([*arguments(command), "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert f"video     {size} at 16 fps" in said and f"sampling  unipc, {sampling}" in said
    assert f"prompt    {CHINESE if 'ZH' in command else ENGLISH}" in said
    for flag in ("t5_cpu", "offload_model", "dit_fsdp", "t5_fsdp", "ulysses_size"):
        assert (f"--{flag} has no effect here: " in said) == (f"--{flag}" in command)
    assert "proportions" not in said or "832x464" in said or "720x1280" in said
    assert (".png" if "t2i" in command else ".mp4") in said
    assert sorted(home.iterdir()) == before


@pytest.mark.parametrize("command", EXTENDING)
def test_extending_command(command, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    args = build_parser().parse_args(arguments(command))
    assert args.use_prompt_extend is True
    assert args.prompt_extend_method in ("dashscope", "local_qwen", None) and ("dash" in command) == (
        args.prompt_extend_method == "dashscope"
    )
    assert (args.prompt_extend_target_lang == "zh") or "target_lang" not in command
    assert args.prompt_extend_model == ("Qwen/Qwen2.5-VL-7B-Instruct" if "VL" in command else None)
    assert main([*arguments(command), "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert f"extend    the prompt by {args.prompt_extend_model or 'the default language model'}" in said
    assert ("dashscope has no effect here: prompts never leave this machine" in said) == ("dash" in command)


def test_each_official_flag_is_there():
    """Of ``_parse_args`` of the official ``generate.py``, with a value of the official kind."""
    flags = {
        "--task": "t2v-14B", "--size": "1280*720", "--frame_num": "81", "--ckpt_dir": "d", "--offload_model": "False",
        "--ulysses_size": "1", "--ring_size": "1", "--save_file": "f", "--src_video": "v", "--src_mask": "m",
        "--src_ref_images": "a,b", "--prompt": "p", "--prompt_extend_method": "dashscope",
        "--prompt_extend_model": "q", "--prompt_extend_target_lang": "en", "--base_seed": "-1", "--image": "i",
        "--sample_solver": "dpm++", "--sample_steps": "50", "--sample_shift": "5.0", "--sample_guide_scale": "5.0",
    }  # fmt: skip
    parser = build_parser()
    args = parser.parse_args([word for pair in flags.items() for word in pair])
    assert (args.size, args.num_frames, args.model, args.seed) == ((1280, 720), 81, "d", -1)
    assert (args.solver, args.steps, args.shift, args.guidance_scale, args.output) == ("dpm++", 50, 5.0, 5.0, "f")
    args = parser.parse_args(["--t5_fsdp", "--t5_cpu", "--dit_fsdp", "--use_prompt_extend", "--first_frame", "a",
                              "--last_frame", "b"])  # fmt: skip
    assert args.image == "a" and args.last_image == "b" and args.t5_cpu and args.use_prompt_extend


def test_a_command_without_a_prompt_is_refused(home, monkeypatch, capsys):
    """The official code then takes a prompt, and pictures, of its own; every command of its README gives one."""
    monkeypatch.chdir(home)
    assert all("--prompt " in command for command in (*COMMANDS, *EXTENDING))
    assert main("--task t2v-1.3B --size 832*480 --ckpt_dir ./Wan2.1-T2V-1.3B".split()) == 2
    assert "--prompt is missing" in capsys.readouterr().err
