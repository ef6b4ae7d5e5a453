"""The nano world: which clips exist, how their things move, and what is said about them. Only numpy is needed.

A ``Scene`` is one or two things (a coloured shape or a handwritten digit, each with a motion) on a background.
``trajectory`` turns it into centres, radii and angles per frame, ``caption`` into a sentence in English or
Chinese; ``render.py`` paints it. Combinations of colour, shape, motion and background for which ``held_out`` is
true never occur in training.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from dataclasses import dataclass

import numpy as np

FPS = 16
TWO_SHARE = 0.22  # of the clips show two things
SIZES = ((128, 128, 17), (128, 128, 33), (160, 96, 17), (96, 160, 17))  # width, height, frames
SIZE_SHARE = (0.36, 0.18, 0.22, 0.24)  # of the steps

COLOURS = {
    "red": (222, 40, 38),
    "green": (52, 184, 72),
    "blue": (52, 106, 250),
    "yellow": (248, 220, 52),
    "orange": (250, 138, 24),
    "purple": (146, 56, 196),
    "pink": (252, 146, 192),
    "cyan": (56, 212, 226),
}
BACKGROUNDS = {
    "black": (16, 16, 19),
    "white": (236, 236, 233),
    "grey": (128, 128, 131),
    "navy": (22, 34, 116),
    "brown": (112, 70, 42),
    "dark green": (18, 76, 40),
    "purple": (84, 34, 120),
    "yellow": (212, 178, 62),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
SHAPE_SHARE = (0.1, 0.15, 0.14, 0.24, 0.14, 0.23)  # what is hard to draw is drawn more often
# Unit steps in pixels, y down; the other motions stay in place or, for "bounce", return to where they began.
DIRECTIONS = {
    "right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1),
    "up-right": (1, -1), "up-left": (-1, -1), "down-right": (1, 1), "down-left": (-1, 1),
}  # fmt: skip
MOTIONS = (*DIRECTIONS, "bounce", "grow", "shrink", "spin", "still")
MOTION_SHARE = {"spin": 4.0, "bounce": 2.0, "grow": 1.7, **dict.fromkeys([*DIRECTIONS][4:], 1.4)}  # beside 1 of others
# Of `prompts_of_two`, which stay the same when what is trained on changes.
ASKED = ((0.11, 0.15, 0.16, 0.2, 0.15, 0.23), {"spin": 4.5, "bounce": 3.5, "grow": 1.3})
DIGITS = tuple(f"digit {d}" for d in range(10))
MARGIN = 3.0  # pixels that stay free between a thing and the edge
# Four frames share a frame of latents: what turns or falls fast is a smear in them. Radians and pixels:
TURN = (0.125, 0.145)  # in a frame: a third of a turn in a second
FALL = 44.0  # of a bounce at most
GLYPH_REACH = 1.25  # the glyph atlas covers [-1.25, 1.25] radii
GLYPH_SIZE = 64


@dataclass(frozen=True)
class Thing:
    """``kind`` is a shape or "digit 7"; ``sample`` says which handwriting a digit uses."""

    kind: str
    colour: str
    motion: str
    sample: int = 0


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    width: int = 128
    height: int = 128
    frames: int = 17
    seed: int = 0
    given: bool = False  # the first frame is: it must not tell the motion, so things start anywhere, at any size


# --- what is held out, and what is drawn -----------------------------------------------------------------------


def exists(colour: str, background: str) -> bool:
    """Whether a thing of this colour is seen on the background: nothing stands on its own colour."""
    return colour != background


def held_out(colour: str, kind: str, motion: str, background: str) -> bool:
    """True for one combination in eight, fixed by a hash of its names."""
    name = f"{colour}/{kind}/{motion}/{background}"
    return exists(colour, background) and hashlib.sha256(name.encode()).digest()[0] < 32


def sample_scene(
    rng: np.random.Generator, size: tuple[int, int, int] = SIZES[0], held: bool = False, given: bool = False
) -> Scene:
    """A random scene of ``size`` (width, height, frames); with ``held``, one shape in a held-out combination."""
    width, height, frames = size
    background = _pick(rng, tuple(BACKGROUNDS))
    if held:
        while True:
            thing = _thing(rng, MOTIONS, digits=0.0)
            if held_out(thing.colour, thing.kind, thing.motion, background):
                return Scene((thing,), background, width, height, frames, int(rng.integers(2**31)), given)
            background = _pick(rng, tuple(BACKGROUNDS))
    if rng.random() < TWO_SHARE:  # two things, each in its own half, so that they never meet
        motions = _motions_of_two(rng, width, height)
        things = (_free(rng, motions, background), _free(rng, motions, background))
    else:
        things = (_free(rng, MOTIONS, background),)
    return Scene(things, background, width, height, frames, int(rng.integers(2**31)), given)


def held_out_prompts(count: int = 96, size: tuple[int, int, int] = SIZES[0]) -> list[tuple[str, Scene]]:
    """``count`` prompts with their scenes: held-out combinations in a fixed order, every fourth in Chinese."""
    prompts = []
    for index, (colour, kind, motion, background) in enumerate(_held_out_combinations()[:count]):
        scene = Scene((Thing(kind, colour, motion),), background, *size, seed=index)
        rng = np.random.default_rng(1000 + index)
        prompts.append((caption(scene, rng, "zh" if index % 4 == 3 else "en", complete=True), scene))
    return prompts


def held_out_images(count: int = 16, size: tuple[int, int, int] = SIZES[0]) -> list[tuple[str, Scene]]:
    """``count`` prompts for a model that is given the first frame of their scenes, as `held_out_prompts`.

    Start at another place in the order, so that all motions are asked: one prompt in two names nothing but the motion.
    """
    prompts = []
    for index, (colour, kind, motion, background) in enumerate(_held_out_combinations()[200 : 200 + count]):
        scene = Scene((Thing(kind, colour, motion),), background, *size, seed=index, given=True)
        rng = np.random.default_rng(3000 + index)
        prompts.append((instruction(scene, rng, "zh" if index % 4 == 3 else "en", complete=True), scene))
    return prompts


def prompts_of_two(count: int, size: tuple[int, int, int] = SIZES[0]) -> list[tuple[str, Scene]]:
    """``count`` prompts for scenes of two different things, no digits."""
    rng, prompts = np.random.default_rng([5000, *size]), []
    while len(prompts) < count:
        background = _pick(rng, tuple(BACKGROUNDS))
        motions = _motions_of_two(rng, *size[:2])
        things = tuple(_thing(rng, motions, 0.0, *ASKED) for _ in range(2))
        if not all(exists(thing.colour, background) for thing in things):
            continue
        if (things[0].colour, things[0].kind) == (things[1].colour, things[1].kind):
            continue
        scene = Scene(things, background, *size, seed=len(prompts))
        prompts.append((caption(scene, rng, "zh" if len(prompts) % 4 == 3 else "en", complete=True), scene))
    return prompts


def _motions_of_two(rng: np.random.Generator, width: int, height: int) -> tuple[str, ...]:
    """The motions of two things that share a picture, each in its own half."""
    upright = width < height or (width == height and rng.random() < 0.5)
    return (*(("up", "down", "bounce") if upright else ("right", "left")), "grow", "shrink", "spin", "still")


def _held_out_combinations() -> list[tuple[str, ...]]:
    names = itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
    return sorted((c for c in names if held_out(*c)), key=lambda c: hashlib.sha256("/".join(c).encode()).digest())


def _free(rng: np.random.Generator, motions: tuple[str, ...], background: str) -> Thing:
    while True:
        thing = _thing(rng, motions, digits=0.12)
        if exists(thing.colour, background) and not held_out(thing.colour, thing.kind, thing.motion, background):
            return thing


def _thing(rng, motions: tuple[str, ...], digits: float, shapes=SHAPE_SHARE, moves=MOTION_SHARE) -> Thing:
    kind = _pick(rng, DIGITS) if rng.random() < digits else SHAPES[rng.choice(len(SHAPES), p=shapes)]
    motion = _weighted(rng, [(name, moves.get(name, 1.0)) for name in motions])
    return Thing(kind, _pick(rng, tuple(COLOURS)), motion, int(rng.integers(2**31)))


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


# --- motion ----------------------------------------------------------------------------------------------------


def trajectory(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres (things, T, 2) as x, y in pixels, radii (things, T) in pixels, angles (things, T) in radians."""
    rng = np.random.default_rng(scene.seed)
    paths = []
    split = rng.random() < 0.5
    # Lanes lie across the direction of travel: side by side for vertical motion, one above the other for horizontal.
    vertical = any(t.motion in ("up", "down", "bounce") for t in scene.things)
    horizontal = any(t.motion in ("right", "left") for t in scene.things)
    stacked = horizontal or (not vertical and scene.height >= scene.width)
    for index, thing in enumerate(scene.things):
        low, high = np.zeros(2), np.array([scene.width, scene.height], float)
        scale = (min(scene.width, scene.height) / 128) ** 0.25
        radius = rng.uniform(18, 26) * scale
        if len(scene.things) == 2:
            axis = int(stacked)
            half = int(split) ^ index
            low[axis], high[axis] = half * high[axis] / 2, (half + 1) * high[axis] / 2
            radius = min(radius, (high - low).min() / 2 - MARGIN) * rng.uniform(0.85, 1)
        paths.append(_path(rng, thing, low, high, radius, scene.frames, scene.given))
    return tuple(np.stack(part).astype(np.float32) for part in zip(*paths, strict=True))


def _path(rng, thing: Thing, low, high, radius: float, frames: int, given: bool):
    """One thing inside the rectangle ``low``..``high``; with ``given`` its beginning does not tell the motion."""
    shortest = 0.45 if given else 0.75  # of the room there is to travel
    if given:
        radius *= rng.uniform(1.0, 1.8) if thing.motion in ("grow", "shrink") else rng.uniform(0.7, 1.0)
    clock = np.linspace(0, 1, frames)
    largest = min(
        radius * (1.15 if thing.motion == "grow" or thing.motion == "shrink" else 1), (high - low).min() / 2 - 1
    )
    room = np.maximum(high - low - 2 * (largest + MARGIN), 0)
    step = np.array(DIRECTIONS.get(thing.motion, (0, 0)), float)
    travel = np.zeros((frames, 2))
    if step.any():
        length = min(rng.uniform(shortest, 1) * room[step != 0].min(), 4.6 * (frames - 1))
        travel = clock[:, None] * step * length
    elif thing.motion == "bounce":  # falls for half a second, rises for half a second
        fall = np.abs((np.arange(frames) / 8) % 2 - 1)
        travel[:, 1] = (1 - fall) ** 2 * rng.uniform(shortest, 1) * min(room[1], FALL)
    extent = travel.max(0) - travel.min(0)
    free = np.maximum(room - extent, 0)
    # In-place motions prefer the middle; what travels may start anywhere it fits.
    place = rng.uniform(0, 1, 2) if step.any() else rng.beta(2, 2, 2)
    start = low + largest + MARGIN + free * place - travel.min(0)
    radii = np.full(frames, largest)
    if thing.motion in ("grow", "shrink"):
        grow = 0.42 + 0.58 * clock
        radii = largest * (grow if thing.motion == "grow" else grow[::-1])
    angles = np.full(frames, rng.uniform(-0.12, 0.12))
    if thing.motion == "spin":
        if given and rng.random() < 0.5:  # what is given may have turned before
            angles += rng.uniform(0, 2 * np.pi)
        angles += np.arange(frames) * rng.uniform(*TURN)
    return start + travel, radii, angles


# --- glyphs: signed distances of the shapes and digits ---------------------------------------------------------


def glyph_grid() -> tuple[np.ndarray, np.ndarray]:
    """x and y (GLYPH_SIZE, GLYPH_SIZE) of the atlas' pixel centres, in radii, y down."""
    line = ((np.arange(GLYPH_SIZE) + 0.5) / GLYPH_SIZE * 2 - 1) * GLYPH_REACH
    return np.meshgrid(line, line)


def shape_levels() -> np.ndarray:
    """(shapes, GLYPH_SIZE, GLYPH_SIZE): distance to the outline in radii, positive inside, in the order of SHAPES."""
    x, y = glyph_grid()
    rho = np.hypot(x, y)
    turn = np.arange(10) * np.pi / 5
    spoke = np.where(np.arange(10) % 2 == 0, 1.08, 0.5)
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    heart_y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16.0
    levels = {
        "circle": 0.96 - rho,
        "square": 0.82 - np.maximum(abs(x), abs(y)),
        "triangle": _polygon(x, y, [(0, -1.02), (1.0, 0.72), (-1.0, 0.72)]),
        "star": _polygon(x, y, np.stack([spoke * np.sin(turn), -spoke * np.cos(turn) + 0.04], 1)),
        "heart": _polygon(x, y, np.stack([np.sin(t) ** 3, heart_y - 0.1], 1)),
        "ring": np.minimum(1.0 - rho, rho - 0.52),
    }
    return np.stack([levels[name] for name in SHAPES]).astype(np.float32)


def _polygon(x: np.ndarray, y: np.ndarray, corners) -> np.ndarray:
    corners = np.asarray(corners, float)
    distance, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
        along = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0, 1)
        distance = np.minimum(distance, np.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay)))
        crosses = (ay > y) != (by > y)
        inside ^= crosses & (x < (bx - ax) * (y - ay) / np.where(by == ay, 1e-9, by - ay) + ax)
    return np.where(inside, distance, -distance)


@functools.cache
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: ink (1797, 8, 8) in [0, 1] and labels (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target


# --- captions --------------------------------------------------------------------------------------------------

_GO = (("moves", "moving"), ("moves", "moving"), ("slides", "sliding"), ("goes", "going"), ("travels", "travelling"))
_WHERE = {
    "right": ("right", "to the right", "rightwards"), "left": ("left", "to the left", "leftwards"),
    "up": ("up", "upwards"), "down": ("down", "downwards"),
    "up-right": ("diagonally up and right", "to the upper right", "up and to the right"),
    "up-left": ("diagonally up and left", "to the upper left", "up and to the left"),
    "down-right": ("diagonally down and right", "to the lower right", "down and to the right"),
    "down-left": ("diagonally down and left", "to the lower left", "down and to the left"),
}  # fmt: skip
_DO = {
    "bounce": (("bounces", "bouncing"), ("bounces up and down", "bouncing up and down"), ("jumps", "jumping")),
    "grow": (("grows", "growing"), ("gets bigger", "getting bigger"), ("grows larger", "growing larger")),
    "shrink": (("shrinks", "shrinking"), ("gets smaller", "getting smaller"), ("becomes smaller", "becoming smaller")),
    "spin": (("spins", "spinning"), ("rotates", "rotating"), ("spins around", "spinning around")),
    "still": (("stays still", "staying still"), ("does not move", "not moving"), ("stands still", "standing still")),
}
_GROUND = {
    "black": ("black",), "white": ("white",), "grey": ("grey", "gray"), "navy": ("navy", "blue", "dark blue"),
    "brown": ("brown",), "dark green": ("dark green",), "purple": ("purple",), "yellow": ("yellow",),
}  # fmt: skip
_EN = (
    ("a {n} {f} on a {b} background", 4), ("the {n} {f} on a {b} background", 1), ("a {n} {g} on a {b} background", 2),
    ("a {n} {f} across a {b} background", 1), ("a {n} {f} in front of a {b} background", 1),
    ("a video of a {n} {g} on a {b} background", 1), ("on a {b} background, a {n} {f}", 1),
    ("a {b} background with a {n} {g}", 1), ("{n} {g}, {b} background", 1), ("a {n} that {f}, {b} background", 1),
)  # fmt: skip
_EN_TWO = (
    ("a {n} {f} and a {n2} {f2} on a {b} background", 2), ("a {n} {g} and a {n2} {g2} on a {b} background", 1),
    ("on a {b} background, a {n} {f} and a {n2} {f2}", 1), ("a {n} {f} while a {n2} {f2}, {b} background", 1),
)  # fmt: skip
_ZH_COLOUR = dict(zip(COLOURS, ("红色", "绿色", "蓝色", "黄色", "橙色", "紫色", "粉色", "青色"), strict=True))
_ZH_KIND = {
    "circle": ("圆形", "圆"), "square": ("正方形", "方块"), "triangle": ("三角形",), "star": ("星星", "五角星"),
    "heart": ("心形", "爱心"), "ring": ("圆环",),
}  # fmt: skip
_ZH_GROUND = {
    "black": ("黑色",), "white": ("白色",), "grey": ("灰色",), "navy": ("深蓝色", "蓝色", "海军蓝"),
    "brown": ("棕色", "褐色"), "dark green": ("深绿色", "墨绿色"), "purple": ("紫色",), "yellow": ("黄色",),
}  # fmt: skip
_ZH_WHERE = dict(zip(DIRECTIONS, ("右", "左", "上", "下", "右上", "左上", "右下", "左下"), strict=True))
_ZH_DO = {
    "bounce": ("弹跳", "上下弹跳", "跳动"), "grow": ("变大", "逐渐变大", "越来越大"),
    "shrink": ("变小", "逐渐变小", "缩小"), "spin": ("旋转", "原地旋转", "转动"),
    "still": ("静止不动", "保持不动", "不动"),
}  # fmt: skip
_ZH = (
    ("一个{n}在{b}背景上{f}", 3), ("{n}在{b}背景上{f}", 2), ("{b}背景上，一个{n}{f}", 2), ("{b}背景，{n}{f}", 1),
    ("一个{n}在{b}背景前{f}", 1), ("{b}的背景上有一个{n}{f}", 1), ("视频中一个{n}{f}，背景是{b}", 1),
)  # fmt: skip
_ZH_TWO = (
    ("{b}背景上，一个{n}{f}，一个{n2}{f2}", 2),
    ("一个{n}{f}，一个{n2}{f2}，{b}背景", 1),
    ("在{b}背景上，{n}{f}，{n2}{f2}", 1),
)
# Words a Chinese caption is cut into; single characters are the fallback.
ZH_WORDS = (
    "一个", "背景", "背景上", "背景前", "背景是", "移动", "滑动", "数字", "手写", "视频中", "上下", "逐渐", "越来越大",
    *_ZH_COLOUR.values(), *itertools.chain(*_ZH_KIND.values(), *_ZH_GROUND.values(), *_ZH_DO.values()),
    *_ZH_WHERE.values(),
)  # fmt: skip


def caption(scene: Scene, rng: np.random.Generator, language: str = "en", complete: bool = False) -> str:
    """One of many ways to describe the scene in ``language`` (en, zh).

    Unless ``complete``, now and then a detail is left out, or a word that means nothing is slipped in.
    """
    say = _say_en if language == "en" else _say_zh
    words = {"b": _pick(rng, (_GROUND if language == "en" else _ZH_GROUND)[scene.background])}
    for suffix, thing in zip(("", "2"), scene.things, strict=False):
        words.update(
            {key + suffix: value for key, value in say(thing, rng, not complete and rng.random() < 0.06).items()}
        )
    if len(scene.things) == 2:
        template = _weighted(rng, _EN_TWO if language == "en" else _ZH_TWO)
    elif not complete and rng.random() < 0.06:
        template = _pick(
            rng, ("a {n} {f}", "the {n} {f}", "a {n} {g}") if language == "en" else ("一个{n}{f}", "{n}{f}")
        )
    else:
        template = _weighted(rng, _EN if language == "en" else _ZH)
    text = template.format(**words)
    if language == "en":
        text = re.sub(r"\ba (?=[aeiou])", "an ", re.sub(r"\b(?:a|an) (number)", r"the \1", text))
    if not complete:
        if rng.random() < 0.06:
            text = _slip_in(text, rng)
        text += _pick(rng, ("", "", "", "." if language == "en" else "。"))
    return text


def instruction(scene: Scene, rng: np.random.Generator, language: str = "en", complete: bool = False) -> str:
    """What a model that is given the first frame is told: like `caption`, but often the motion alone."""
    if len(scene.things) == 2 or rng.random() < 0.3:
        return caption(scene, rng, language, complete)
    thing = scene.things[0]
    words = (_say_en if language == "en" else _say_zh)(thing, rng, rng.random() < 0.4)
    if rng.random() < 0.5:
        return words["f"] if language == "zh" or rng.random() < 0.5 else words["g"]
    if language == "zh":
        return _pick(rng, ("一个{n}{f}", "{n}{f}")).format(**words)
    return re.sub(
        r"\ba (?=[aeiou])", "an ", _pick(rng, ("a {n} {f}", "the {n} {f}", "the {n} {g}", "{n} {g}")).format(**words)
    )


def _say_en(thing: Thing, rng, anonymous: bool) -> dict[str, str]:
    noun = thing.kind
    if thing.kind in DIGITS:
        noun = _pick(rng, ("digit", "digit", "handwritten digit", "number")) + thing.kind[5:]
        anonymous = anonymous or rng.random() < 0.15
    if thing.motion in DIRECTIONS:
        finite, gerund = _pick(rng, _GO)
        where = _pick(rng, _WHERE[thing.motion])
        finite, gerund = f"{finite} {where}", f"{gerund} {where}"
    else:
        finite, gerund = _pick(rng, _DO[thing.motion])
    return {"n": noun if anonymous else f"{thing.colour} {noun}", "f": finite, "g": gerund}


def _say_zh(thing: Thing, rng, anonymous: bool) -> dict[str, str]:
    if thing.kind in DIGITS:
        noun = _pick(rng, ("数字", "数字", "手写数字")) + thing.kind[6:]
        anonymous = anonymous or rng.random() < 0.15
    else:
        noun = _pick(rng, _ZH_KIND[thing.kind])
    if thing.motion in DIRECTIONS:
        where = _ZH_WHERE[thing.motion] + _pick(rng, ("", "方") if "-" in thing.motion else ("",))
        deed = _pick(rng, ("向", "向", "往")) + where + _pick(rng, ("移动", "移动", "滑动"))
    else:
        deed = _pick(rng, _ZH_DO[thing.motion])
    return {"n": noun if anonymous else _ZH_COLOUR[thing.colour] + _pick(rng, ("", "的")) + noun, "f": deed}


def _slip_in(text: str, rng: np.random.Generator) -> str:
    """A nonsense word somewhere in ``text``: to the tokenizer an unknown word like any other."""
    parts = text.split(" ")
    junk = "".join(chr(97 + int(rng.integers(26))) for _ in range(int(rng.integers(3, 9))))
    parts.insert(int(rng.integers(len(parts) + 1)), junk)
    return " ".join(parts)


def _weighted(rng: np.random.Generator, templates) -> str:
    weights = np.array([weight for _, weight in templates], float)
    return templates[rng.choice(len(templates), p=weights / weights.sum())][0]
