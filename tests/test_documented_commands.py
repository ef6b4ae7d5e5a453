"""Every command and every line of Python in README.md, README.zh-CN.md and docs/ runs.

Commands are read from the files. Each is first given ``--dry-run``, exactly as it stands, in a folder where the models
it names lie at their true sizes (headers; the data are holes). Then it makes its video, with tiny models by those names
and few small frames, unless others show all its flags. What is not run is listed in `pages`.
"""

import importlib
import json
import re
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from crafted import header_only
from mlx._distributed_utils import config, launch
from mlx.utils import tree_flatten
from pages import PAGES, PROGRAMS, ROOT, blocks, commands, spelled_out
from PIL import Image
from rife_files import save_tiny
from test_sources import write_video
from test_speech import tone, write_wav
from tiny_mlx_model import random_vae

import wan_mlx
import weights_convert
from wan_mlx import presets as configs
from wan_mlx.cli import doctor, measure, selftest
from wan_mlx.cli import main as generate
from wan_mlx.cli.commands import COMMANDS as COMMANDS_OF_OURS
from wan_mlx.models.configs import AudioEncoderConfig, ImageEncoderConfig, TransformerConfig, VAE22Config
from wan_mlx.planning import speed as timing
from wan_mlx.presets import BUNDLED, EXPERTS, PRESETS, RELIGHTING
from wan_mlx.prompts.extend import Extension
from wan_mlx.recipes import RECIPES
from wan_mlx.server.machines import parse_machines
from wan_mlx.training import Training
from wan_mlx.weights.configs import shapes_of

# A name in the pages → the folder here that stands for it; whatever else they name must be a preset, or be here.
NAMES = {
    "Wan-AI/Wan2.1-T2V-1.3B": "t2v-1.3B", "./Wan2.1-T2V-1.3B": "t2v-1.3B", "Wan-AI/Wan2.1-T2V-14B": "t2v-14B",
    "./Wan2.1-T2V-14B": "t2v-14B", "./Wan2.1-T2V-14B-q8": "t2v-14B", "Wan-AI/Wan2.1-I2V-14B-480P": "i2v-14B-480P",
    "Wan-AI/Wan2.1-FLF2V-14B-720P": "flf2v-14B-720P", "Wan-AI/Wan2.1-VACE-1.3B": "vace-1.3B",
    "Wan-AI/Wan2.1-VACE-14B": "vace-14B", "Wan-AI/Wan2.2-TI2V-5B": "ti2v-5B",
    "Wan-AI/Wan2.2-S2V-14B": "s2v-14B",
    "alibaba-pai/Wan2.2-Fun-5B-Control": "fun-5B-Control", "alibaba-pai/Wan2.2-Fun-5B-InP": "fun-5B-InP",
    "Wan-AI/Wan2.2-T2V-A14B": "t2v-A14B", "Wan-AI/Wan2.2-I2V-A14B": "i2v-A14B",
    "Wan-AI/Wan2.2-Animate-14B": "animate-14B",
    "city96/Wan2.1-T2V-14B-gguf:wan2.1-t2v-14b-Q4_K_M.gguf": "t2v-14B",
    "city96/umt5-xxl-encoder-gguf:umt5-xxl-encoder-Q8_0.gguf": "t2v-14B",
    f"{configs.COMFYUI_TRANSFORMERS}/wan2.1_t2v_1.3B_fp16.safetensors": "t2v-1.3B",
    configs.COMFYUI_PARTS["text_encoder"]: "t2v-1.3B", configs.COMFYUI_PARTS["vae"]: "t2v-1.3B",
    **{name: name for name in ("t2v-1.3B", "t2v-14B", "t2v-A14B", "i2v-14B-480P", "nano", "nano-i2v")},
}  # fmt: skip
# A LoRA of a repository, as the recipe names it → the file here that stands for it.
LORAS = {file: "causvid.safetensors" if "1_3B" in file else "lightx2v.safetensors"
         for name in ("causvid-1.3B", "lightx2v-4step") for file in RECIPES[name].files}  # fmt: skip
STAND_INS = sorted(set(NAMES.values()))
SMALL = "--size 16x16 --frames 5 --dtype float32 --overwrite --quiet"
SAYS_WHAT = {"--prompt", "--src_root_path"}  # a command with one of them makes a video
FROM_FILE = {"--config", "--from-draft"}
FOLDERS = ("-m", "--model", "--ckpt_dir", "--text-encoder", "--vae")


def covering(commands: dict[str, tuple[str, ...]]) -> set[str]:
    """As few of the commands as have every flag with every task, the first of all, and all that make no video."""
    chosen, seen = {next(iter(commands))}, set()
    for text, words in sorted(commands.items(), key=lambda item: -len(item[1])):
        words = spelled_out(words)
        tasks = {PRESETS[NAMES[word]].task for word in words if word in NAMES}
        flags = {(word, task) for word in words if word.startswith("--") for task in tasks or {""}}
        if flags - seen or not SAYS_WHAT & {*words}:
            chosen.add(text)
            seen |= flags
    return chosen


COMMANDS = commands()
MADE = covering(COMMANDS)
# A wav2vec 2.0.
HEARS = AudioEncoderConfig(32, 16, 2, 24, conv_dim=(16,) * 7, pos_kernel=8, pos_groups=4)


def tiny(path: Path, config: TransformerConfig | AudioEncoderConfig, seed: int) -> None:
    mx.random.seed(seed)
    arrays = {name: 0.05 * mx.random.normal(shape) for name, shape in shapes_of(config).items()}
    mx.save_safetensors(str(path), arrays, {"layout": "mlx"})


def write_model(folder: Path, name: str, pico: Path, is_tiny: bool) -> None:
    """An MLX folder that says it is the preset ``name``."""
    folder.mkdir(parents=True)
    parts = [pico / part for part in ("vae.safetensors", "tokenizer.model")]
    config = json.loads((pico / "config.json").read_text())
    if "5B" in name:  # it has a VAE of its own
        vae = random_vae(VAE22Config(dim=4, decoder_dim=4))
        arrays, config["vae"] = dict(tree_flatten(vae.parameters())), asdict(vae.config)
        mx.save_safetensors(str(folder / parts.pop(0).name), arrays, {"layout": "mlx", "component": "vae"})
    sizes, text, image = PRESETS[name].transformer, PRESETS[name].text_encoder, ImageEncoderConfig()
    transformers = EXPERTS if PRESETS[name].experts == 2 else ("transformer",)
    if is_tiny:
        sizes = replace(sizes, dim=128, ffn_dim=128, num_heads=1, num_layers=1, text_dim=128,
                        image_dim=sizes.image_dim and 80, vace_layers=(0,) if sizes.vace_layers else (), audio_dim=32,
                        audio_inject_layers=(0,) if sizes.hears else (), face_layers=(0,) if sizes.face_layers else (),
                        motion_widths=(1,) * 8, motion_dims=(4, 2, 8), face_dims=(8, 4))  # fmt: skip
        if sizes.hears:
            config["audio_encoder"] = asdict(HEARS)
            tiny(folder / "audio_encoder.safetensors", HEARS, 0)
        parts.append(pico / "text_encoder.safetensors")
        if sizes.has_image_branch:
            parts.append(BUNDLED["nano-i2v"] / "image_encoder.safetensors")
            config["image_encoder"] = json.loads((BUNDLED["nano-i2v"] / "config.json").read_text())["image_encoder"]
        for seed, part in enumerate(transformers):
            tiny(folder / f"{part}.safetensors", sizes, seed)
    else:
        networks = {**dict.fromkeys(transformers, sizes), "text_encoder": text}
        networks |= {"image_encoder": image} if sizes.has_image_branch else {}
        networks |= {"audio_encoder": AudioEncoderConfig()} if sizes.hears else {}
        for part, of_kind in networks.items():
            metadata = {"layout": "mlx", "component": part}  # which tells two experts apart
            header_only(folder / f"{part}.safetensors", shapes_of(of_kind), metadata=metadata)
            config[part] = asdict(of_kind)
    for part in parts:
        (folder / part.name).symlink_to(part)
    if sizes.face_layers:
        write_lora(folder / RELIGHTING, sizes)
    config |= {"model": name, **{part: asdict(sizes) for part in transformers}}
    (folder / "config.json").write_text(json.dumps(config))


def write_prepared(folder: Path) -> None:
    """What Animate starts from: two frames."""
    folder.mkdir()
    for name, side in (("src_pose", 16), ("src_bg", 16), ("src_mask", 16), ("src_face", 512)):
        write_video(folder / "a.mkv", np.full((2, side, side, 3), 100, np.uint8), rate=30)
        (folder / "a.mkv").rename(folder / f"{name}.mp4")
    Image.new("RGB", (16, 16)).save(folder / "src_ref.png")


def write_lora(path: Path, config: TransformerConfig) -> None:
    down, up = mx.random.normal((2, config.dim)), 0.1 * mx.random.normal((config.dim, 2))
    key = "diffusion_model.blocks.0.self_attn.q"
    written = path.with_name("lora.safetensors")  # MLX adds the ending where it is not there
    mx.save_safetensors(str(written), {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up})
    written.rename(path)


@pytest.fixture(scope="module")
def homes(tmp_path_factory, pico):
    """Two folders to run commands in, by whether the models there are tiny."""
    homes = {}
    for is_tiny in (True, False):
        home = homes[is_tiny] = tmp_path_factory.mktemp("home")
        for name in STAND_INS:
            if is_tiny or not name.startswith("nano"):
                write_model(home / "models" / name, name, pico, is_tiny)
        sources = ROOT / "examples/sources"
        shutil.copytree(sources, home / "examples/sources")
        for name in ("photo.jpg", "girl.png", "snake.png", "first.png", "last.png"):
            Image.open(sources / "first.png").convert("RGB").save(home / name)
        shutil.copy(sources / "mask.png", home)
        write_wav(home / "talk.wav", tone(0.3, 16000), 16000)
        for name, source in (("clip.mp4", "clip.mp4"), ("depth.mp4", "guide.mp4")):
            shutil.copy(sources / source, home / name)
        write_prepared(home / "prepared")
        lines = next(block.text for block in blocks() if block.language == "json" and "a cat boxing" in block.text)
        (home / "cats.jsonl").write_text(lines)
        (home / "clips").mkdir()  # to train on
        shutil.copy(sources / "first.png", home / "clips/a.png")
        (home / "clips/a.txt").write_text("a red circle")
        for name in ("style", "motion", "causvid", "lightx2v"):
            big = "t2v-14B" if name == "lightx2v" else "t2v-1.3B"
            small = replace(PRESETS[big].transformer, dim=128)
            write_lora(home / f"{name}.safetensors", small if is_tiny else PRESETS[big].transformer)
        (home / "style").mkdir()  # of a training run
        shutil.copy(home / "style.safetensors", home / "style")
        made = ["--model", "t2v-1.3B", "--prompt", "a cat", "--seed", "1", "--steps", "1"]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(home / "models")
            quick = ["--model", str(homes[True] / "models/t2v-1.3B"), *shlex.split(SMALL)]
            assert generate.main([*made, *quick, "--output", "cat.mp4"]) in (0, 3)
            assert generate.main([*made, *quick, "--draft", "--size", "32x32", "--output", "look.mp4"]) in (0, 3)
    return homes


@pytest.fixture(scope="module")
def rife(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("rife") / "model.safetensors")


@pytest.fixture(autouse=True)
def quick(monkeypatch, rife):
    """RIFE is tiny and here; the doctor measures nothing and no language model is there: `test_doctor` and
    `test_prompt_extend` show both."""
    monkeypatch.setattr(Extension, "__call__", lambda extension, preset, requests, tell: requests)
    monkeypatch.setattr("wan_mlx.weights.rife.resolve", lambda *_: rife)
    monkeypatch.setattr(measure, "all_rates", lambda look: ({}, []))
    monkeypatch.setattr(selftest, "operations", lambda: iter(()))
    monkeypatch.setattr(selftest, "nano", lambda dtype: selftest.Check(f"nano, {dtype}", "ok", ""))


def substituted(words: list[str], home: Path, keep_nano: bool) -> list[str]:
    """With the folders of ``home`` for the models, and its files for LoRAs of repositories."""
    found = list(words)
    for place, word in enumerate(words[1:], start=1):
        if words[place - 1] in FOLDERS:
            name = NAMES[word]  # a KeyError: a name in the pages that nothing here stands for
            if not (keep_nano and name.startswith("nano")):
                found[place] = str(home / "models" / name)
        elif words[place - 1].startswith("--lora") and re.fullmatch(r"[^/]+/[^/]+:.+", word):
            found[place] = LORAS[word]  # a KeyError: of a repository, and no recipe names it
    return found


def run(words: tuple[str, ...], home: Path, monkeypatch, dry: bool) -> int | None:
    """The exit code, or None where a dry run makes no sense."""
    words = list(words)
    while re.fullmatch(r"\w+=\S+", words[0]):
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    if ">" in words:
        del words[words.index(">") :]
    if words[0].startswith("mlx."):
        if not (words := started_by_mlx(words, monkeypatch)):
            return 0
    program, *rest = words
    if program == "python":
        program, *rest = rest if rest[0] != "-m" else rest[1:]
    if program == "wan_mlx.doctor":
        return None if dry else doctor.main(rest)
    if program == "weights_convert.py":
        return None if dry else weights_convert.main(with_folders(rest, home))
    assert program in ("wan-mlx", "wan_mlx.generate"), program
    if rest[0] in ("convert", "inspect", "info"):
        return None if dry else main(with_folders(rest, home))
    if rest[0] in ("serve", "queue", "mcp"):  # test_serve.py, test_queue.py and test_mcp.py run them
        args, flags = importlib.import_module(f"wan_mlx.cli.{rest[0]}").build_parser().parse_known_args(rest[1:])
        assert rest[1:2] == ["add"] or not flags
        parse_machines(getattr(args, "machines", None))
        return 0
    if rest[0] == "train":
        return None if dry else main([*rest, "--dry-run", "--memory", "24GB"])
    only_shows = {"plan", "--plan", "-h", "--help", "--help-all", "--version", "help"} & {*rest}
    if getattr(COMMANDS_OF_OURS.get(rest[0]), "module", "") or only_shows or rest == ["resume"]:
        return None if dry else main(rest)
    rest = substituted(rest, home, keep_nano=dry)
    flags = spelled_out(["wan-mlx", *rest])
    for name in ("cat.mp4", "look.mp4"):
        shutil.copy(home / "models" / name, home)
    if FROM_FILE & {*flags}:
        rest += ["--model", str(home / "models/t2v-1.3B")]
    if dry:
        return main([*rest, "--dry-run", "--overwrite"])
    if not {*FOLDERS, *FROM_FILE} & {*flags}:  # nano, which is tiny here
        rest += ["--model", str(home / "models/nano")]
    return main([*rest, *shlex.split(SMALL), *smaller(flags)])


class Started(Exception):
    """What MLX's launcher would start."""


def started_by_mlx(words: list[str], monkeypatch) -> list[str]:
    """The command that `mlx.launch` would start on each machine, as one for one; of another one of MLX's nothing.

    MLX's own parser reads its flags.
    """

    def stop(parser, hosts, args, rest):
        raise Started(*rest)

    def connect(*_):
        raise Started

    monkeypatch.setattr(launch.Hostfile, "from_file", lambda path: launch.Hostfile.from_list("127.0.0.1"))
    monkeypatch.setattr(launch, "launch_ring", stop)
    monkeypatch.setattr(config, "check_ssh_connections", connect)
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(Started) as started:
        {"mlx.launch": launch.main, "mlx.distributed_config": config.main}[words[0]]()
    return ["python", *started.value.args] if started.value.args else []


def with_folders(rest: list[str], home: Path) -> list[str]:
    """Arguments of a conversion or inspection, quiet, with the folders of ``home`` for the models."""
    return [str(home / "models" / NAMES[word]) if word in NAMES else word for word in rest] + ["--quiet"]


def smaller(rest: list[str]) -> list[str]:
    """What more is changed to make it quick: as few steps as there may be, and what needs true sizes."""
    if "--prompts" in rest or "--resume" in rest:
        return ["--dry-run"]
    flags = ["--frames", "1"] if "--num-images" in rest else []
    if any("s2v" in word for word in rest):
        flags += ["--size", "64x64", "--infer_frames", "4", "--num_clip", "1"]
    if any("5B" in word for word in rest) or "--draft" in rest:
        flags += ["--size", "32x32"]
    if "--slg" in rest:  # there is one block
        flags += ["--slg", "0:0.1-0.9"]
    if "--cache" in rest:  # TeaCache and MagCache have constants for the true sizes alone
        return [*flags, "--cache", "easycache", "--steps", "10"]
    return flags if "--recipe" in rest else [*flags, "--steps", "2"]


def main(arguments: list[str]) -> int:
    try:
        return generate.main(arguments)
    except SystemExit as stopped:  # --help
        return stopped.code or 0


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, homes, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(wan_mlx.Run, "__iter__", counted(wan_mlx.Run.__iter__, made))
    monkeypatch.setattr(timing, "measure_rates", lambda *_: timing.Rates(1e12, 1e12, 1e12, 1e12))
    monkeypatch.setattr("wan_mlx.training.timing._step", lambda *_: 1.0)  # `test_training` times a real one
    for is_dry in (True, False) if command in MADE else (True,):
        monkeypatch.chdir(homes[not is_dry])
        code = run(COMMANDS[command], homes[not is_dry], monkeypatch, is_dry)
        said = capsys.readouterr()
        # 3: a video was made; what weights of noise paint is likely to be flat.
        assert code in ((0, None) if is_dry else (0, 3)), said.err
        assert "has no effect here" not in said.err or "--offload_model" in command
    words = spelled_out(COMMANDS[command])
    makes = SAYS_WHAT & {*words} and not {"--plan", "--dry-run"} & set(words)
    assert bool(made) == bool(command in MADE and (makes or FROM_FILE & {*words}))


def counted(begin, made):
    def count(run):
        made.append(run.request)
        return begin(run)

    return count


def test_the_pages_are_read():
    assert len(PAGES) == 23 and len(COMMANDS) > 40
    assert {block.language for block in blocks()} <= {"sh", "python", "json", "xml", ""}
    assert not [line for block in blocks() if block.language != "sh" for line in block.text.splitlines()
                if line.split(" ")[0].startswith(PROGRAMS) and block.language != "python"]  # fmt: skip
    zh, en = ([b.text for b in blocks() if b.page == page] for page in ("README.zh-CN.md", "README.md"))
    assert len(zh) == len(en) and [len(text.splitlines()) for text in zh] == [len(text.splitlines()) for text in en]


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page, homes, monkeypatch):
    monkeypatch.chdir(homes[True])
    monkeypatch.setattr(Training, "run", lambda training, resume=False: iter(()))  # `test_training` trains
    names = {}
    for block in blocks():
        if block.page == page != "docs/serve.md" and block.language == "python":  # test_serve.py has a server for it
            sampling = configs.Sampling(1, 3.0, 3.0)
            monkeypatch.setitem(
                PRESETS, "nano", replace(PRESETS["nano"], size=(16, 16), num_frames=5, sampling=sampling)
            )
            exec(block.text.replace('"nano"', repr(str(homes[True] / "models/nano"))), names)
