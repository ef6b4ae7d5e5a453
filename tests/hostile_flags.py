"""Hostile command lines, configuration files and batches."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny_mlx_model
from hostile import Case

from wan_mlx import options
from wan_mlx.cli.main import main
from wan_mlx.media.write import save_video
from wan_mlx.option import Option

Cases = Iterator[Case]
ESCAPES = ("\x1b]0;evil\x07.mp4", "a\nb.mp4")
# Names that a new file may have, and others: taken, of a folder, too long, or none at all.
NEW = ["nowhere", "~", "-", "a.mp4 ", "é.mp4", "a.MP4", ".mp4", "%s%n.mp4", "\udce9.mp4", "x" * 300 + ".mp4", *ESCAPES]
PLACES = [
    *NEW, "", ".", "..", "nowhere/x.mp4", "../user/thesis.txt", "../user", "notes.txt", "cat.png", "clip.mp4",
    "link.txt", "dangling.mp4", "y" * 5000, "notes.txt/a.mp4", "m.old", "cat.png/", "file:///etc/hostname",
]  # fmt: skip
NUMBERS = [
    "", "0", "-1", "1e9", "1000000000", "9" * 30, "nan", "inf", "-inf", "1e400", "0x10", "1_000", "  ", "abc", "１２",
    "1.5", "²", "--", "\x1b[2J", "1;2", "1e-400", "+1", "1 ", "None", "true",
]  # fmt: skip
TEXTS = ["", " ", "\n", "x" * 5000, "\x1b[31mred", "\udce9", "猫", "--prompt", "-", "null", "{}", "a:b:c", "0x0", "nan"]
SIZES = ["0x0", "64x0", "0x64", "16x", "x16", "17x16", "16x16x16", "-16x16", "1e3x16", "9" * 20 + "x16", "16*16"]
ODD = [
    None, True, False, 0, -1, 5, 1.5, 10**30, float("inf"), float("nan"), "", "x", "\x1b[2J", "0x0", [], [1], ["x"],
    [[]], [{}], {}, {"a": 1}, "y" * 5000,
]  # fmt: skip


def write_text(name: str, text: str, work: Path) -> None:
    (work / name).write_text(text, encoding="utf-8", errors="surrogatepass")


def write_bytes(name: str, data: bytes, work: Path) -> None:
    (work / name).write_bytes(data)


class Model:
    """A tiny model as the converter writes it, and command lines for it."""

    def __init__(self, folder: Path):
        pico = tiny_mlx_model.write(folder / "pico")
        self.path = folder / "model"
        assert main(["convert", str(pico), str(self.path)]) == 0
        still = ["--size", "16x16", "--frames", "1", "--steps", "1", "--seed", "1", "--dtype", "float32", "--quiet"]
        self.still = ["--model", str(self.path), "--prompt", "a red circle", *still]
        self.dry = [*self.still, "--dry-run"]


def command_line(model: Model, chance: random.Random, folder: Path) -> Cases:
    yield from each_flag(model, chance)
    yield from several_flags(model, chance)
    yield from outputs(model)
    yield from conversions(model)
    yield from subcommands(chance)


def values_of(option: Option) -> list[str]:
    if option.label == "size":
        return [*SIZES, *NUMBERS[:12]]
    if option.place:
        return PLACES
    return NUMBERS if {int, float} & set(option.kinds) else [*TEXTS, *NUMBERS[:6]]


def refused(option: Option, value: str) -> str:
    """How bad it would be if the option took the value; "" where it may."""
    numbers = {int, float} & set(option.kinds)
    if not value.strip():
        free = option.group == options.OFFICIAL or option.name in ("prompt", "negative_prompt")
        return "" if free else "low"
    if option.label == "size":
        return "" if value == "16*16" else "high"
    if option.name in ("steps", "num_frames", "num_images") and value in ("0", "-1", "1e9", "1000000000", "9" * 30):
        return "high"
    return "low" if numbers and value in ("nan", "inf", "-inf", "1e400", "abc", "--", "1;2", "\x1b[2J") else ""


def each_flag(model: Model, chance: random.Random) -> Cases:
    for option in options.flags():
        if option.name in ("debug", "version") or (option.is_switch and option.name == "extend_prompt"):
            continue
        for flag in option.flags:
            if option.is_switch:
                yield Case(f"{flag} twice", [*model.dry, flag, flag])
                yield Case(f"{flag} with a value", [*model.dry, f"{flag}=yes"], refused="low")
                continue
            for value in values_of(option) if flag == option.flags[0] else chance.sample(values_of(option), 3):
                arguments = [*model.dry, f"{flag}={value}"]
                yield Case(f"{flag} is {value[:40]!r}", arguments, refused=refused(option, value))
            yield Case(f"{flag} without a value", [*model.dry, flag], refused="" if option.value_is_optional else "low")


def several_flags(model: Model, chance: random.Random) -> Cases:
    flags = [option for option in options.flags() if option.name not in ("debug", "extend_prompt", "use_prompt_extend")]
    for number in range(350):
        arguments = []
        for option in chance.sample(flags, chance.randint(2, 4)):
            flag = chance.choice(option.flags)
            value = chance.choice([*values_of(option), "1", "2", "cat.png", "0.5"])
            arguments.append(flag if option.is_switch else f"{flag}={value}")
        if "--plan" in arguments:  # it measures for seconds
            arguments.remove("--plan")
        yield Case(f"flags together, {number}", [*model.dry, *arguments])
    huge = [("1000000000x1000000000", "1"), ("16x16", "4000000001")]
    for size, frames in [("8192x8192", "1"), ("8192x8192", "81"), *huge]:
        yield Case(f"a plan at {size}", [*model.still, "--size", size, "--frames", frames, "--plan"])
        yield Case(f"a dry run at {size}", [*model.dry, "--size", size, "--frames", frames])
    for size, frames in huge:
        yield Case(f"a run at {size}", [*model.still, "--size", size, "--frames", frames], refused=True)
    yield Case("too many steps", [*model.still, "--steps", "1000000000"], refused=True)
    yield Case("too many images", [*model.still, "--num-images", "1000000000"], refused=True)
    yield Case("too many images, dry", [*model.dry, "--num-images", "1000000"], refused=True)


def outputs(model: Model) -> Cases:
    """Real runs, to names that are taken, links, or no names at all."""
    foreign = "out.mp4.wan"

    def user_folder(work: Path) -> None:
        (work / foreign).mkdir()
        for name in ("mine.safetensors", "frames.raw", "notes.txt", "run.txt"):
            (work / foreign / name).write_text("mine")

    taken = ("cat.png", "clip.mp4", "dangling.mp4")
    for place in PLACES:
        for more in ([], ["--overwrite"]):
            new = place in NEW or (more and place.rstrip("/") in taken)
            writes = (place.rstrip("/"), f"{place.rstrip('/')}.wan") if new else ()
            name = f"an output called {place[:40]!r} {' '.join(more)}"
            yield Case(
                name, [*model.still, *more, f"--output={place}"], writes=writes, refused=not (new or place == "")
            )
    made = ("out.mp4", foreign)
    instead = {
        "a user's folder": user_folder,
        "a link to a model": lambda work: (work / foreign).symlink_to("../user/model"),
        "a link to nothing": lambda work: (work / foreign).symlink_to("../user/none"),
        "a file": lambda work: (work / foreign).write_text("mine"),
    }
    for more in ([], ["--overwrite"]):
        arguments = [*model.still, *more, "--output", "out.mp4"]
        for name, prepare in instead.items():
            yield Case(f"the state folder is {name}", arguments, prepare, writes=("out.mp4",), refused=True)
        preview = [*arguments, "--preview", "out.webp"]
        yield Case("a preview beside the output", preview, writes=(*made, "out.webp", "out.png"))
        both = (*made, "cat.webp", "cat.png") if more else made
        yield Case("a preview over a picture", [*arguments, "--preview", "cat.webp"], writes=both)


def conversions(model: Model) -> Cases:
    def out(work: Path, how: str) -> None:
        if how == "folder":
            (work / "m").mkdir()
            (work / "m/mine.txt").write_text("mine")
        elif how == "file":
            (work / "m").write_text("mine")
        elif how == "link":
            (work / "m").symlink_to("../user/model")
        elif how == "dangling":
            (work / "m").symlink_to("../user/none")
        elif how == "partial file":
            shutil.rmtree(work / "m.partial")
            (work / "m.partial").write_text("mine")
        elif how == "config":  # a model that somebody else made
            (work / "m").mkdir()
            (work / "m/config.json").write_text("{}")
            (work / "m/mine.txt").write_text("mine")

    for how in ("nothing", "folder", "file", "link", "dangling", "partial file", "config"):
        for more in ([], ["--overwrite"], ["--quantize", "q8"]):
            new = how in ("nothing", "partial file")
            name = f"converting where there is a {how} {' '.join(more)}"
            yield Case(name, ["convert", str(model.path), "m", *more], partial(out, how=how), ("m",) if new else (),
                       refused=not new)  # fmt: skip
    for place in PLACES:
        if place not in NEW:
            new = place in ("nowhere/x.mp4", "file:///etc/hostname")
            name, made = f"converting to {place[:40]!r}", ("nowhere", "file:")
            yield Case(name, ["convert", str(model.path), place], writes=made, refused=not new)
        yield Case(f"converting from {place[:40]!r}", ["convert", f"./{place}", "m"], refused=True)
        yield Case(f"inspecting {place[:40]!r}", ["inspect", f"./{place}"], refused="low")
    yield Case("converting onto itself", ["convert", "m", "m", "--overwrite"],
               lambda work: shutil.copytree(model.path, work / "m"), ("m",), ("m/*.safetensors",))  # fmt: skip


def subcommands(chance: random.Random) -> Cases:
    for command in ("models", "doctor", "completion", "convert", "inspect", "info"):
        for value in ("--foo", "x\ny", "\x1b[2J", "", "--help=1", "x" * 5000):
            yield Case(f"{command} {value[:20]!r}", [command, value], refused="low")
        yield Case(f"{command} with too many", [command, *"abcdef"], refused="low")
    for arguments in ([], [""], ["--"], ["generat"], ["modles"], ["--model"], ["--modle", "x"], ["\x1b[2J"], ["-h=1"]):
        yield Case(f"{arguments}", arguments, refused="low")


# --- configuration files


def configs(model: Model, chance: random.Random, folder: Path) -> Cases:
    def with_file(name: str, write: Callable[[Path], object], arguments: list[str], **rest: Any) -> Case:
        return Case(name, [*arguments, "--config", "c.json"], lambda work: write(work / "c.json"), **rest)

    keys = [name for option in options.flags() for name in (option.sets or (option.name,))] + [
        "checkpoint",
        "fps",
        "nothing",
    ]
    bare = [*model.dry[:2], "--dry-run", "--quiet"]
    for key in keys:
        for value in chance.sample(ODD, 8):
            said = json.dumps({"prompt": "x", **{key: value}})
            yield with_file(f"{key} is {said[:80]}", lambda path, said=said: path.write_text(said), bare)
    deep = "[" * 100_000 + "]" * 100_000
    texts = {
        "nothing": "", "no JSON": "{", "a list": "[]", "a key twice": '{"prompt": "a", "prompt": "b"}',
        "nested deeply": deep, "a value nested deeply": f'{{"loras": {deep}}}', "deep objects": '{"a":' * 100_000,
        "NaN": '{"prompt": "x", "steps": NaN}', "a huge number": f'{{"prompt": "x", "steps": {"9" * 5000}}}',
        "BOM": '\ufeff{"prompt": "x"}', "control characters": '{"\\u001b[2J": 1}',
        "a lone surrogate": '{"prompt": "\\ud800"}',
    }  # fmt: skip
    for name, said in texts.items():
        yield with_file(
            f"a file with {name}", lambda path, said=said: path.write_text(said), bare, refused=name != "BOM"
        )
    for number in range(40):
        data = chance.randbytes(chance.randint(1, 2000))
        yield with_file(f"random bytes, {number}", lambda path, data=data: path.write_bytes(data), bare, refused="low")
    for place in PLACES:
        yield Case(f"--config {place[:40]!r}", [*bare, f"--config={place}"])
    yield from embedded(model, chance)


def embedded(model: Model, chance: random.Random) -> Cases:
    """Settings in a received picture or video: it may not say where anything is written, or which model is run."""
    frames = np.random.default_rng(1).integers(0, 255, (1, 16, 16, 3), np.uint8)
    good = {"prompt": "x", "width": 16, "height": 16, "num_frames": 1, "steps": 1, "seed": 1}

    def received(work: Path, ending: str, settings: dict) -> None:
        save_video(work / f"got{ending}", frames, 16, settings)

    places = [
        "output", "preview", "report", "prompts", "resume", "config", "transformer", "text_encoder", "vae", "taehv",
        "tokenizer", "image_encoder", "loras", "lora", "model", "source", "prompt_extend_model", "video", "image",
    ]  # fmt: skip
    for ending in (".png", ".mp4", ".npz", ".webp", ".gif"):
        for key in places:
            value = {"model": "evil/repo", "source": "modelscope", "prompt_extend_model": "evil/language"}.get(key)
            settings = {**good, key: value or "../user/evil.mp4"}
            if key == "prompt_extend_model":
                settings["extend_prompt"] = True
            yield Case(f"a {ending} that sets {key}", [*model.still, "--config", f"got{ending}"],
                       lambda work, ending=ending, settings=settings: received(work, ending, settings),
                       writes=("a_red_circle*",), offline=True)  # fmt: skip
        for _ in range(12):
            key, value = (
                chance.choice([*good, "negative_prompt", "cache", "shift", "skip_layers", "dtype"]),
                chance.choice(ODD),
            )
            settings = {**good, key: value}
            yield Case(f"a {ending} whose {key} is {str(value)[:40]!r}", [*model.dry, "--config", f"got{ending}"],
                       lambda work, ending=ending, settings=settings: received(work, ending, settings))  # fmt: skip
    for said in ("\x1b]0;evil\x07\x1b[2J", "a\rb", "\u202egnp.exe"):
        yield Case("a prompt of escape codes", [*model.dry[:2], "--dry-run", "--config", "got.png"],
                   lambda work, said=said: received(work, ".png", {**good, "prompt": said}))  # fmt: skip


def batches(model: Model, chance: random.Random, folder: Path) -> Cases:
    flags = ["--model", str(model.path), *model.still[4:]]

    def batch(name: str, lines: list[str], *arguments: str, **rest: Any) -> Case:
        def prepare(work: Path) -> None:
            (work / "b.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")

        return Case(name, [*flags, "--prompts", "b.jsonl", *arguments], prepare, **rest)

    good = [json.dumps({"prompt": "a", "output": "a.png"}), json.dumps({"prompt": "b", "output": "b.png"})]
    keys = [key for option in options.flags() for key in option.keys]
    for number in range(220):
        key, value = chance.choice(keys), chance.choice(ODD)
        line = json.dumps({"prompt": "c", "output": "c.png", key: value})
        yield batch(f"a line: {line[:90]} {number}", [*good, line], "--dry-run")
    deep = "[" * 100_000 + "]" * 100_000
    escapes = '{"prompt": "\\u001b[2J", "output": "c.png"}'
    for line in ("{", "[]", "5", '"x"', "null", deep, f'{{"prompt": {deep}}}', escapes,
                 '{"prompt": "a", "prompt": "b"}', "\x00", "\x1b[2J"):  # fmt: skip
        yield batch(f"a line {line[:30]!r}", [*good, line], "--dry-run", refused="" if "u001b" in line else "low")
    doubles = ["sub/../c.png", "./c.png", "c.png", f"{'sub/../' * 3}c.png", ".//c.png", "alias/c.png"]
    for one in doubles:
        for other in ("c.png", "sub/../c.png"):
            lines = [json.dumps({"prompt": word, "output": name}) for word, name in (("a", one), ("b", other))]

            def case(*more: str, lines=lines, one=one, other=other) -> Case:
                found = batch(f"{one} and {other}", lines, *more, writes=("c.png*", "b.report.jsonl"), refused=True)
                write = found.prepare

                def prepare(work: Path) -> None:
                    write(work)
                    (work / "sub").mkdir()
                    (work / "alias").symlink_to(".")

                found.prepare = prepare
                return found

            yield case("--overwrite")
            yield case("--dry-run")
    made = ("a.png*", "b.png*")
    for place in PLACES:
        writes = (*made, place) if place in NEW else made
        yield batch(f"--report {place[:40]!r}", good, f"--report={place}", writes=writes)
    yield batch("a report over the prompts", good, "--report", "b.jsonl", writes=made, refused=True)
    yield batch("a report over an output", good, "--report", "a.png", writes=made, refused=True)
    yield batch("a report over the state", good, "--report", "a.png.wan", writes=made)

    def with_report(work: Path) -> None:
        (work / "b.jsonl").write_text("\n".join(good))
        (work / "b.report.jsonl").write_text("mine")

    yield Case("somebody's file where the report would be", [*flags, "--prompts", "b.jsonl"], with_report, writes=made,
               refused=True)  # fmt: skip
    for number in range(30):
        lines = [*good, chance.randbytes(chance.randint(1, 300)).decode("latin-1")]
        yield batch(f"random bytes, {number}", lines, "--dry-run", refused="low")
