"""The options of a request over HTTP, made from the table of options: a schema, and a table for the page's forms."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

from .. import options
from ..option import COMMAND, MODEL, REQUEST, Option
from ..presets import PRESETS, TASK_NAMES

TRANSLATED = Path(options.__file__).parent / "assets/flags.zh.tsv"  # flag, stamp of the English text, Chinese text
# Options of the command line alone that a request may have, too.
EXTENDING = ("extend_prompt", "prompt_extend_model", "prompt_extend_target_lang")
NOT_HERE = ("progress", "caffeinate")  # of the server's own process
CHINESE_GROUPS = {
    options.WHAT: "提示词与输出", options.EXTEND: "扩写提示词", options.SOURCES: "图片与视频来源",
    options.WEIGHTS: "模型", options.SAMPLE: "采样",
    options.GUIDE: "速度与引导", options.RUN: "运行与内存", options.WATCH: "预览",
}  # fmt: skip
CHINESE_TASKS = {
    "t2v": "文生视频", "i2v": "图生视频", "flf2v": "首尾帧", "vace": "编辑（VACE）", "ti2v": "文或图生视频",
    "inp": "首帧、尾帧（Fun-InP）", "control": "控制视频（Fun-Control）", "s2v": "声音驱动（S2V）",
    "animate": "人物动作（Animate）",
}  # fmt: skip
# Task → the sources that it takes; a test compares with `tasks.TASKS`, which needs MLX.
SOURCES_OF = {
    "t2v": ("video", "src_mask"),
    "i2v": ("image",),
    "flf2v": ("image", "last_image"),
    "ti2v": ("image", "video", "src_mask"),
    "inp": ("image", "last_image"),
    "control": ("src_video", "src_ref_images", "image", "last_image"),
    "s2v": ("image", "audio", "pose_video"),
    "vace": ("src_video", "src_mask", "src_ref_images"),
    "animate": ("src_root_path",),
}
# Options of one task that are no sources.
OF_TASK = {
    **dict.fromkeys(("context_scale", "vace_module"), ["vace"]),
    **dict.fromkeys(("num_clip", "infer_frames", "start_from_ref"), ["s2v"]),
    **dict.fromkeys(("refert_num", "replace_flag", "use_relighting_lora"), ["animate"]),
}
# Source → what it may be, of uploads; those that are not here are videos.
KINDS_OF = {
    "image": ("image",), "last_image": ("image",), "src_ref_images": ("image",), "src_mask": ("image", "video"),
    "audio": ("audio", "video"), "src_root_path": ("folder",),
}  # fmt: skip
SIMPLE = ("prompt", "negative_prompt", "model", "size", "num_frames", "seed", "loras")  # not among the advanced ones
QUALITIES = {"draft": ("Draft", "草稿", 0.4), "good": ("Good", "良好", 0.7), "best": ("Best", "最佳", 1.0)}
# Fields that are no options of ours, as OpenAI's API and its kin have them.
FIELDS: dict[str, dict[str, Any]] = {
    "seconds": {"description": "length of the video, instead of num_frames; the nearest that the model can make",
                "anyOf": [{"type": "number"}, {"type": "string"}], "examples": ["4"]},
    "num_inference_steps": {"description": "the same as steps", "type": "integer"},
    "guidance_scale_2": {"description": "guidance of the low-noise expert; guidance_scale is then the high-noise one's",
                         "type": "number"},
    "input_reference": {"description": "the same as image", "type": "string"},
    "quality": {"description": "a share of the model's own steps", "enum": list(QUALITIES)},
}  # fmt: skip
ABOUT_SOURCES = (
    " (a file of a multipart request; or upload_ID, video_ID, library:NAME, each perhaps with #first or #last for a "
    "frame of it; or a data: URL)"
)


@cache
def served() -> tuple[Option, ...]:
    """The options that a request over HTTP may have."""
    taken = [option for option in options.OPTIONS if option.of in (REQUEST, MODEL) and option.name not in NOT_HERE]
    return (*taken, *(option for option in options.of(COMMAND) if option.name in EXTENDING))


def request_schema() -> dict[str, Any]:
    """The JSON schema of a request for a video."""
    properties = {}
    for option in served():
        found = option.schema()
        if option.place == "file":
            found["description"] += ABOUT_SOURCES
        properties[option.name] = found
    return {
        "type": "object",
        "properties": {**properties, **FIELDS},
        "required": ["prompt"],
        "additionalProperties": False,
    }


@cache
def chinese() -> dict[str, str]:
    """Flag → its help in Chinese."""
    rows = csv.reader(TRANSLATED.read_text(encoding="utf-8").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    return {flag: text.replace("`", "") for flag, _, text in rows}


def kind_of(option: Option) -> str:
    """Which control shows it best."""
    if option.place == "file":
        return "files" if option.default == () else "file"
    if option.name in options.LORAS:
        return "list"
    if option.choices or (option.examples and not option.place):
        return "choice" if option.choices else "suggestions"
    if option.is_switch or option.kinds == (bool,):
        return "switch"
    if option.place == "name":
        return "name"
    if option.parse is None and len(option.kinds) == 1 and option.kinds[0] in (int, float):
        return "integer" if option.kinds[0] is int else "number"
    return "text"


def options_table() -> list[dict[str, Any]]:
    """What the page's forms show: a row for each option, its help in English and Chinese."""
    rows = []
    for option in served():
        flag = option.flags[0] if option.flags else ""
        tasks = [task for task, sources in SOURCES_OF.items() if option.name in sources]
        told = [option.described, chinese().get(flag, option.described)]
        if option.kinds == (bool,) and option.default is True:  # whose flag turns it off
            told = [f"off: {told[0]}", f"关闭时：{told[1]}"]
        rows.append({
            "name": option.name,
            "group": option.group,
            "flag": flag,
            "help": told,
            "schema": option.schema(),
            "kind": kind_of(option),
            "of": option.of,
            "advanced": option.name not in SIMPLE and not tasks,
            "tasks": tasks or OF_TASK.get(option.name),
        })  # fmt: skip
    return rows


def capabilities() -> dict[str, Any]:
    """What can be asked for: the same for every server of this version."""
    groups = dict.fromkeys(option.group for option in served() if option.group)
    return {
        "tasks": {task: [name, CHINESE_TASKS[task]] for task, name in TASK_NAMES.items()},
        "sources": {task: list(sources) for task, sources in SOURCES_OF.items()},
        "source_kinds": {source: list(KINDS_OF.get(source, ("video",)))
                         for sources in SOURCES_OF.values() for source in sources},
        "qualities": [{"name": name, "label": [*label]} for name, (*label, _) in QUALITIES.items()],
        "groups": [{"name": name, "label": [name, CHINESE_GROUPS[name]]} for name in groups],
        "options": options_table(),
        "fields": FIELDS,
    }


def qualities_of(model: str) -> dict[str, dict[str, Any]]:
    """Name of a quality → the options that it stands for, of a released model."""
    preset = PRESETS[model]
    steps = preset.sampling.steps
    if preset.recipe:  # it is fast as it is
        return {name: {"steps": steps} if share == 1 else {} for name, (*_, share) in QUALITIES.items()}
    return {name: {} if share == 1 else {"steps": max(1, round(share * steps))}
            for name, (*_, share) in QUALITIES.items()}  # fmt: skip
