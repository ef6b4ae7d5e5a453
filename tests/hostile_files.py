"""Weight files, LoRAs, converted models, pictures and videos: damaged, crafted, or something else than they say."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from crafted import TWO, TWO_DATA, call, literal, mapping, tensor, write_pth, write_safetensors
from crafted_gguf import blocks, field, text, write_gguf
from hostile import Case
from hostile_flags import Cases, Model, write_bytes, write_text
from hostile_states import edit, edits
from PIL import Image

from wan_mlx.media.write import save_video

# Bytes to put into a file of weights.
STRANGE = (b"\xff" * 8, b'{"a":' * 3000, b"[" * 5000, bytes(64))


def spoil(data: bytearray, how: str, draw: random.Random, more: Callable[[], bytes]) -> None:
    """Change the bytes of a file at a place that is drawn; with any other ``how`` they stay."""
    at = draw.randrange(len(data))
    if how == "flip":
        data[at] = draw.randrange(256)
    elif how == "cut":
        del data[max(1, at) :]
    elif how == "head":
        data[at % min(64, len(data))] = draw.randrange(256)
    elif how == "splice":
        data[at:at] = more()


def weights(model: Model, chance: random.Random, folder: Path) -> Cases:
    yield from model_folders(model, chance)
    yield from weight_files(model, chance)


def model_folders(model: Model, chance: random.Random) -> Cases:
    """An MLX folder whose files are not those that were converted."""
    names = sorted(path.name for path in model.path.iterdir() if path.suffix in (".safetensors", ".model"))

    def damaged(work: Path, name: str, how: str, at: float) -> None:
        shutil.copytree(model.path, work / "m")
        path = work / "m" / name
        data = bytearray(path.read_bytes())
        place = int(at * len(data))
        if how == "flip":
            data[place] ^= 16
        elif how == "cut":
            del data[place:]
        elif how == "zeros":
            data[place:] = bytes(len(data) - place)
        elif how == "other":
            data = bytearray((model.path / next(other for other in names if other != name)).read_bytes())
        path.unlink()
        if how != "gone":
            path.write_bytes(data)

    run = ["--model", "m", *model.still[2:], "--no-prompt-cache", "--output", "out.npz"]
    for name in names:
        for how in ("flip", "flip", "flip", "flip", "cut", "cut", "zeros", "zeros", "other", "gone"):
            at = chance.uniform(0, 0.999)

            def prepare(work: Path, name=name, how=how, at=at) -> None:
                damaged(work, name, how, at)

            yield Case(f"{name}: {how} at {at:.3f}", run, prepare, writes=("out.npz*", "m/.wan*"), refused=True)
            said, gone = f"inspecting {name}: {how} at {at:.3f}", how == "gone"  # which its report says
            yield Case(said, ["inspect", "m"], prepare, writes=("m/.wan*",), refused=not gone)
    config = json.loads((model.path / "config.json").read_text())
    for key, value in edits(config, chance, 60):

        def prepare(work: Path, key=key, value=value) -> None:
            shutil.copytree(model.path, work / "m")
            edit(work / "m/config.json", key, value)

        wrong = key and key[-1] == "std"
        for arguments in (["inspect", "m"], [*run, "--dry-run"]):
            yield Case(
                f"config.json's {key} is {str(value)[:40]}",
                arguments,
                prepare,
                writes=("m/.wan*",),
                refused=bool(wrong),
            )
    for index, value in ((0, 0), (3, -1.0), (5, float("nan"))):

        def prepare(work: Path, index=index, value=value) -> None:
            shutil.copytree(model.path, work / "m")
            edit(work / "m/config.json", ("vae", "std", index), value)

        yield Case(f"a std of {value}", run, prepare, writes=("out.npz*",), refused=True)


def weight_files(model: Model, chance: random.Random) -> Cases:
    """Single files of every format, damaged at random; none is a model, so nothing may succeed."""
    lora = {f"blocks.0.self_attn.q.lora_{side}.weight": np.ones((4, 256) if side == "A" else (256, 4), np.float32)
            for side in "AB"}  # fmt: skip

    def good(path: Path) -> Path:
        if path.suffix == ".safetensors":
            return write_safetensors(path, {"__metadata__": {"a": "b"}, **TWO}, TWO_DATA)
        if path.suffix == ".pth":
            return write_pth(path, mapping(x=tensor(), y=tensor()))
        if path.suffix == ".gguf":
            return write_gguf(
                path, [("a", (4, 64), "Q8_0", blocks("Q8_0", 4, 64))], [field("general.architecture", 8, text("wan"))]
            )
        path.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}))
        write_safetensors(path.with_name("1.safetensors"), TWO, TWO_DATA)
        return path

    for ending in (".safetensors", ".pth", ".gguf", ".safetensors.index.json"):
        for number in range(45):
            how, seed = chance.choice(["flip", "cut", "splice", "as it is"]), chance.random()

            def prepare(work: Path, ending=ending, how=how, seed=seed) -> None:
                path, draw = good(work / f"w{ending}"), random.Random(seed)
                data = bytearray(path.read_bytes())
                for _ in range(draw.randint(1, 4)):
                    spoil(data, how, draw, lambda: draw.choice(STRANGE))
                path.write_bytes(data)

            arguments = chance.choice([
                ["inspect", f"w{ending}"], ["--model", f"w{ending}", *model.dry[2:]],
                [*model.dry, "--transformer", f"w{ending}"], [*model.dry, "--lora", f"w{ending}"],
                [*model.dry, "--vae", f"w{ending}"], ["convert", f"w{ending}", "new"],
            ])  # fmt: skip
            yield Case(f"a {ending}, {how} {number}", arguments, prepare, refused="low")
    evil = [
        ("os.system", call("os", "system", literal("touch ../user/thesis.txt"))),
        ("eval", call("builtins", "eval", literal("1"))),
        ("deep", b"(" * 50_000), ("a huge long", b"\x8b\xff\xff\xff\x7f"), ("memo", b"r\xff\xff\xff\xff"),
    ]  # fmt: skip
    for name, body in evil:
        yield Case(
            f"a pickle: {name}",
            ["inspect", "w.pth"],
            lambda work, body=body: write_pth(work / "w.pth", body),
            refused=True,
        )
    names = ["../1.safetensors", "/etc/hostname", "x" * 5000, "", ".", "a\x1b[2J", 5, None, [], {}]
    for name in names:
        said = json.dumps({"weight_map": {"a": name}})
        yield Case(f"a shard called {str(name)[:30]!r}", ["inspect", "w.safetensors.index.json"],
                   partial(write_text, "w.safetensors.index.json", said), refused="low")  # fmt: skip
    for number in range(60):
        change = chance.choice(["nan", "inf", "shape", "int", "alone", "alpha", "unknown", "zeros", "huge rank"])
        arrays = {name: array.copy() for name, array in lora.items()}
        first, second = list(arrays)
        if change in ("nan", "inf"):
            arrays[chance.choice([first, second])][chance.randrange(4), 0] = float(change)
        elif change == "shape":
            arrays[first] = np.ones((4, chance.randint(1, 300)), np.float32)
        elif change == "int":
            arrays[first] = arrays[first].astype(np.int32)
        elif change == "alone":
            del arrays[chance.choice([first, second])]
        elif change == "alpha":
            arrays["blocks.0.self_attn.q.alpha"] = np.float32(chance.choice([np.nan, np.inf, 0.0, -1.0])) * np.ones(())
        elif change == "unknown":
            arrays[f"blocks.{chance.randint(5, 999)}.x.lora_A.weight"] = np.ones((4, 4), np.float32)
        elif change == "huge rank":
            arrays[first], arrays[second] = np.ones((5000, 256), np.float32), np.ones((256, 4), np.float32)
        kept = {name: mx.array(array) for name, array in arrays.items()}
        yield Case(f"a LoRA: {change} {number}", [*model.still, "--lora", "l.safetensors", "--output", "out.npz"],
                   lambda work, kept=kept: mx.save_safetensors(str(work / "l.safetensors"), kept), writes=("out.npz*",),
                   refused=change in ("nan", "inf", "int", "alone", "unknown", "huge rank"))  # fmt: skip


def media(model: Model, chance: random.Random, folder: Path) -> Cases:
    pixels = np.random.default_rng(2).integers(0, 255, (4, 32, 32, 3), np.uint8)

    def picture(ending: str) -> bytes:
        data, first = io.BytesIO(), Image.fromarray(pixels[0])
        if ending in (".gif", ".webp"):
            first.save(data, ending[1:].upper(), save_all=True, append_images=[Image.fromarray(p) for p in pixels[1:]])
        else:
            first.save(data, {".jpg": "JPEG", ".tif": "TIFF"}.get(ending, ending[1:].upper()))
        return data.getvalue()

    with tempfile.TemporaryDirectory() as folder:
        clip = save_video(Path(folder) / "a.mp4", np.concatenate([pixels] * 2)[:5], 16, {"prompt": "x"}).read_bytes()
    i2v = ["--model", "nano-i2v", *model.dry[2:], "--image"]
    t2v = [*model.dry, "--frames", "5", "--video"]
    endings = [".png", ".jpg", ".gif", ".webp", ".bmp", ".tif", ".mp4"]
    for number in range(240):
        ending, how = chance.choice(endings), chance.choice(["flip", "cut", "head", "splice", "as it is", "renamed"])
        data = bytearray(clip if ending == ".mp4" else picture(ending))
        for _ in range(chance.randint(1, 5)):
            spoil(data, how, chance, lambda: chance.randbytes(chance.randint(1, 200)))
        name = f"p{chance.choice(endings) if how == 'renamed' else ending}"
        arguments = chance.choice([i2v, t2v, [*model.dry, "--config"]])
        yield Case(f"a {ending}: {how} {number}", [*arguments, name],
                   partial(write_bytes, name, bytes(data)))  # fmt: skip
    for name, data in crafted_pictures():
        for arguments in (i2v, t2v, [*model.dry, "--config"]):
            for ending in (".png", ".mp4", ".jpg"):
                yield Case(f"{name} as {ending}", [*arguments, f"p{ending}"],
                           partial(write_bytes, f"p{ending}", data), refused=True)  # fmt: skip


def crafted_pictures() -> Iterator[tuple[str, bytes]]:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    huge = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    yield "3.6 gigapixels", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", huge) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    yield "a PNG without pixels", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0))
    yield "EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    yield (
        "SVG",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="../user/thesis.txt"/></svg>',
    )
    yield "ffconcat", b"ffconcat version 1.0\nfile clip.mp4\n"
    yield "a playlist", b"#EXTM3U\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n"
    yield "a playlist of the network", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.mp4\n#EXT-X-ENDLIST\n"
    yield "a PDF", b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\n"
    yield "a script", b"#!/bin/sh\ntouch ../user/thesis.txt\n"
    yield "zeros", bytes(5000)
    yield "gzip", gzip.compress(bytes(5000))
    yield "text", b"a cat"
    yield "nothing", b""
