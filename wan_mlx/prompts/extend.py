"""Prompt extension: a local language model writes out a short prompt in the detailed style that Wan was trained on.

Runs mlx-lm, which is imported only here; with images and the extra ``vlm``, mlx-vlm. `prompts.instructions` has the
system prompts. It has its own random keys: the same seed gives the same words, and no global state changes.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from PIL import Image

from ..errors import WanError, install_command, nearest
from ..hub.resolve import cache_for
from ..mac import awake
from ..media.read import read_image
from ..presets import PRESETS, Preset
from ..storage import parse_json
from ..types import Request, Source
from .instructions import INSTRUCTIONS, LANGUAGES, PICTURE_ALONE, kind_of

log = logging.getLogger(__name__)

DEFAULT_MODEL = "mlx-community/Qwen2.5-7B-Instruct-4bit"
DEFAULT_VISION_MODEL = "mlx-community/Qwen2.5-VL-7B-Instruct-4bit"
# The official code's short names, where they mean unquantised models.
SHORT_NAMES = {
    "Qwen2.5_3B": "mlx-community/Qwen2.5-3B-Instruct-4bit",
    "Qwen2.5_7B": DEFAULT_MODEL,
    "Qwen2.5_14B": "mlx-community/Qwen2.5-14B-Instruct-4bit",
    "QwenVL2.5_3B": "mlx-community/Qwen2.5-VL-3B-Instruct-4bit",
    "QwenVL2.5_7B": DEFAULT_VISION_MODEL,
}
MAX_TOKENS = 512  # umT5's limit
TEMPERATURE, TOP_P = 0.7, 0.8  # Qwen2.5's own recommendation
LONGEST_SIDE = 768  # of images that the model sees
# What `extend_prompt` takes as a task: one, which is that of its first model, or a model's name.
TASKS = {preset.task: preset for preset in reversed(PRESETS.values())} | PRESETS
CHINESE = re.compile(r"[\u3400-\u9fff]")
THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)
QUOTES = (('"', '"'), ("“", "”"), ("'", "'"), ("「", "」"))
REFUSALS = re.compile(
    r"(i['’]m sorry|i am sorry|sorry,|i can(no|['’])t|i am (unable|not able)|i['’]m (unable|not able)|i won['’]t|"
    r"as an ai|抱歉|对不起|很遗憾|我(不能|无法)|作为(一个|一名)?(AI|人工智能))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Extended:
    """Result of extending a prompt.

    Attributes:
        prompt: the longer prompt, or the user's own if there is a ``complaint``.
        original: the user's prompt.
        model: the language model.
        complaint: why the user's prompt stays, if it does.
    """

    prompt: str
    original: str
    model: str
    complaint: str | None = None


class PromptExtender:
    """A language model, loaded once for several prompts; use as a context manager, whose end frees it.

    Args:
        model: hub id or folder of any instruct model that mlx-lm runs, or mlx-vlm for images; one of the official
            code's short names (`SHORT_NAMES`); None for the default.
        language: "zh" or "en"; None for the prompt's own: Chinese if it has Chinese characters, else English.
        pictures: whether prompts come with images; the default model is then a vision model.
        alone: whether an image comes without a prompt, so that the model has to see it.

    Raises:
        ValueError: an unknown language.
        WanError: the model cannot be loaded, does not follow instructions, or does not see what it has to.
        ImportError: it needs mlx-vlm, which is not installed.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        language: str | None = None,
        pictures: bool = False,
        alone: bool = False,
    ):
        if language is not None and language not in LANGUAGES:
            raise ValueError(f"language is {language!r}, expected one of {', '.join(LANGUAGES)}")
        if alone and not _has_vlm():
            raise ImportError("the prompt is empty, and writing one out of the picture needs mlx-vlm: "
                              f"{install_command('mlx-vlm')}; or give a prompt")  # fmt: skip
        self.model = choose_model(model, pictures)
        self.language, self.pictures, self.alone, self.shows = language, pictures, alone, False
        self._generate: Generate | None = None

    def __enter__(self) -> PromptExtender:
        folder = _folder_of(self.model)
        try:
            sees = "vision_config" in parse_json((folder / "config.json").read_text(encoding="utf-8"))
            self.shows = sees and self.pictures
            if self.shows and not _has_vlm():
                raise ImportError(f"{self.model} needs mlx-vlm to see the picture: {install_command('mlx-vlm')}")
            if self.alone and not self.shows:
                raise WanError(f"the prompt is empty, and {self.model} does not see pictures; give a prompt, or a "
                               f"model that does, such as {DEFAULT_VISION_MODEL}")  # fmt: skip
            with same_random_state():  # mlx-lm draws random weights before it reads the real ones
                self._generate = _vision_model(folder) if self.shows else _text_model(folder)
        except (WanError, ImportError):
            raise
        except Exception as error:  # any error of mlx-lm, transformers or the files
            raise WanError(f"prompt extension: {self.model} cannot be loaded: {_line(error)}") from error
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._generate = None
        gc.collect()  # models contain reference cycles
        mx.clear_cache()

    def __call__(self, prompt: str, kind: str = "text", seed: int = 0, pictures: Sequence[Source] = ()) -> Extended:
        """Extend a prompt.

        Args:
            prompt: the user's; may be empty for "image alone".
            kind: of instructions, a key of `INSTRUCTIONS`.
            seed: the same seed gives the same words.
            pictures: first image of the video (and last), for a vision model.
        """
        if self._generate is None:
            raise ValueError("the model of prompt extension is not loaded; use PromptExtender in a with block")
        language = self.language or language_of(prompt)
        said = prompt if prompt.strip() else PICTURE_ALONE[language]
        messages = [{"role": "system", "content": INSTRUCTIONS[kind][language]}, {"role": "user", "content": said}]
        shown = [_small(picture) for picture in pictures] if self.shows else []
        with same_random_state():
            words, ended = self._generate(messages, Sampler(seed), shown)
        words = tidy(words)
        complaint = complaint_of(words, ended)
        return Extended(prompt if complaint else words, prompt, str(self.model), complaint)


@contextmanager
def same_random_state() -> Iterator[None]:
    """This block leaves MLX's global random state unchanged."""
    state = cast(list[mx.array], mx.random.state)
    before = mx.array(state[0])
    try:
        yield
    finally:
        state[0][:] = before


class Sampler:
    """Draws tokens from log-probabilities (1, V) → (1,) by temperature and nucleus, with its own random keys."""

    def __init__(self, seed: int, temperature: float = TEMPERATURE, top_p: float = TOP_P):
        self.key = mx.random.key(seed)
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, logprobs: mx.array) -> mx.array:
        logits = logprobs.astype(mx.float32) / self.temperature
        order = mx.argsort(-logits, axis=-1)
        sorted_logits = mx.take_along_axis(logits, order, axis=-1)
        probabilities = mx.softmax(sorted_logits, axis=-1)
        before = mx.cumsum(probabilities, axis=-1) - probabilities
        kept = mx.where(before < self.top_p, sorted_logits, -mx.inf)  # the first is always kept
        self.key, now = mx.random.split(self.key)
        drawn = mx.random.categorical(kept, key=now)
        return mx.take_along_axis(order, drawn[:, None], axis=-1)[:, 0]


def extend_prompt(
    prompt: str,
    model: str | Path | None = None,
    language: str | None = None,
    seed: int = 0,
    task: str = "t2v",
    image: Source | None = None,
    last_image: Source | None = None,
) -> Extended:
    """Extend a short prompt with a local language model, which is freed again.

    Args:
        prompt: describes the video; of Wan2.2's models with an image it may be empty.
        model: as for `PromptExtender`.
        language: "zh", "en", or None for the prompt's own.
        seed: the same seed gives the same words.
        task: "t2v", "vace", "i2v", "flf2v" or "ti2v"; or a model's name, such as "t2v-A14B": Wan2.2 wants other
            prompts.
        image, last_image: the task's images, for a vision model (extra ``vlm``).

    Raises:
        ValueError: an unknown language or task, or an empty prompt that cannot be written out of an image.
        WanError: the model cannot be loaded, or does not see the image that is all it has.
        ImportError: it needs mlx-vlm, which is not installed.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}, expected one of {', '.join(TASKS)}{nearest(task, TASKS)}")
    kind = kind_of(TASKS[task], prompt, image is not None)
    pictures = [picture for picture in (image, last_image) if picture is not None]
    with PromptExtender(model, language, bool(pictures), kind == "image alone") as extender:
        return _told(extender(prompt, kind, seed, pictures))


@dataclass(frozen=True)
class Extension:
    """Prompt extension as requested: by which model (None: the default), in which language (None: the prompt's own).

    ``caffeinate``: whether an idle Mac stays awake meanwhile.
    """

    model: str | None = None
    language: str | None = None
    caffeinate: bool = True

    def __call__(
        self, preset: Preset, requests: Sequence[Request], tell: Callable[[str], None] = log.warning
    ) -> list[Request]:
        """Requests of one model with longer prompts, each by its own seed; the language model is loaded once and freed.

        A request whose prompt stays is unchanged; ``tell`` gets the reason.
        """
        pictures = [[p for p in (request.image, request.last_image) if p is not None] for request in requests]
        kinds = [kind_of(preset, request.prompt, request.image is not None) for request in requests]
        needed = any(pictures), "image alone" in kinds
        done = []
        with awake(self.caffeinate), PromptExtender(self.model, self.language, *needed) as extender:
            for request, kind, shown in zip(requests, kinds, pictures, strict=True):
                extended = _told(extender(request.prompt, kind, request.seed, shown), tell)
                if extended.complaint is None:
                    request = replace(
                        request,
                        prompt=extended.prompt,
                        original_prompt=extended.original,
                        extended_by=_name_of(extended.model),
                    )
                done.append(request)
        return done

    def undone(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A video's settings with the prompt from before this extension, if it was extended."""
        by = settings.get("extended_by")
        if by is None or (self.model is not None and by != _name_of(choose_model(self.model, False))):
            return dict(settings)
        return {**settings, "prompt": settings["original_prompt"], "original_prompt": None, "extended_by": None}


def extend_requests(
    preset: Preset, requests: list[Request], extend_prompt: bool | str | Path, caffeinate: bool
) -> list[Request]:
    """The requests of one model, their prompts extended if asked for.

    Raises:
        ValueError: a prompt is empty, and not to be extended.
    """
    if not extend_prompt:
        for request in requests:
            check_prompt(request)
        return requests
    return Extension(None if extend_prompt is True else str(extend_prompt), caffeinate=caffeinate)(preset, requests)


def check_prompt(request: Request) -> None:
    """Raise ValueError if the prompt is empty, which it may be only where it is yet to be written out of a picture."""
    if not request.prompt.strip():
        raise ValueError("the prompt is empty; say what the video should show, or have a prompt written out of the "
                         "picture by extending it")  # fmt: skip


def _told(extended: Extended, tell: Callable[[str], None] = log.warning) -> Extended:
    if extended.complaint:
        stays = "the prompt stays as it is" if extended.prompt.strip() else "no prompt was written"
        tell(f"{stays}: {extended.model}'s answer {extended.complaint}")
    return extended


def language_of(prompt: str) -> str:
    return "zh" if CHINESE.search(prompt) else "en"


def tidy(words: str) -> str:
    """An answer without thinking, line breaks and outer quotes."""
    words = " ".join(THOUGHTS.sub("", words).split())
    for opening, closing in QUOTES:
        if len(words) > 1 and words[0] == opening and words[-1] == closing and opening not in words[1:-1]:
            return words[1:-1].strip()
    return words


def complaint_of(words: str, ended: bool) -> str | None:
    """The fault of an answer, as a predicate of "the answer"; None if it is fine."""
    if not words:
        return "is empty"
    if not ended:
        return f"did not come to an end within {MAX_TOKENS} tokens"
    return f"is a refusal ({words[:60]})" if REFUSALS.match(words) else None


def choose_model(model: str | Path | None, pictures: bool) -> str:
    """The model's id or folder."""
    if model is not None:
        return SHORT_NAMES.get(str(model), str(model))
    if pictures and _has_vlm():
        return DEFAULT_VISION_MODEL
    if pictures:
        log.warning(f"the language model will not see the picture; for one that does: {install_command('mlx-vlm')}")
    return DEFAULT_MODEL


def _name_of(model: str) -> str:
    """A hub's id, or the bare name of a folder on this machine: it is embedded in files that others get."""
    return Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model


def _folder_of(model: str) -> Path:
    """The model's folder; downloaded if it is none."""
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    from huggingface_hub import snapshot_download
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    cache_for(model)
    data = [pattern for pattern in DEFAULT_ALLOW_PATTERNS if not pattern.endswith(".py")]
    try:
        return Path(snapshot_download(model, allow_patterns=data))
    except Exception as error:  # no such repository, no network, no space
        said = _line(error)[:300]
        raise WanError(f"prompt extension: {model} is no folder, and cannot be downloaded: {said}") from error


def _check_is_data(folder: Path) -> None:
    """Refuse a model that names Python of its own, which mlx-vlm would run unasked.

    Raises:
        WanError: it does.
    """

    def keys(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from value
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from keys(inner)

    for path in sorted(folder.glob("*config*.json")):
        try:
            own = {"model_file", "auto_map"}.intersection(keys(parse_json(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError) as error:
            raise WanError(f"prompt extension: {path} cannot be read: {_line(error)}") from error
        if own:
            raise WanError(f"prompt extension: {path} names a program of its own ({', '.join(sorted(own))}), which is "
                           f"not run; use a model without one, such as {DEFAULT_VISION_MODEL}")  # fmt: skip


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


# (messages, sampler, PIL images) → the answer, and whether it is complete.
Generate = Callable[[list[dict[str, str]], Sampler, Sequence[Image.Image]], tuple[str, bool]]


def _text_model(folder: Path) -> Generate:
    import mlx_lm

    config = {"trust_remote_code": False}
    model, tokenizer, *_ = mlx_lm.load(str(folder), tokenizer_config=config, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise WanError(f"prompt extension: {folder} has no chat template; expected a model that follows instructions, "
                       f"such as {DEFAULT_MODEL}")  # fmt: skip

    def generate(messages, sampler, pictures) -> tuple[str, bool]:
        # Turns off thinking; other chat templates ignore the argument.
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
        words, reason = "", None
        for part in mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=MAX_TOKENS, sampler=sampler):
            words, reason = words + part.text, part.finish_reason
        return words, reason == "stop"

    return generate


def _vision_model(folder: Path) -> Generate:
    from mlx_vlm import apply_chat_template, load
    from mlx_vlm import generate as answer

    _check_is_data(folder)
    model, processor = load(str(folder))

    def generate(messages, sampler, pictures) -> tuple[str, bool]:
        text = apply_chat_template(processor, model.config, messages, num_images=len(pictures))
        with tempfile.TemporaryDirectory() as temporary:
            paths = [str(Path(temporary) / f"{i}.png") for i in range(len(pictures))]
            for picture, path in zip(pictures, paths, strict=True):
                picture.save(path)
            result = answer(model, processor, text, paths, max_tokens=MAX_TOKENS, sampler=sampler)
        return result.text, result.finish_reason == "stop"

    return generate


def _has_vlm() -> bool:
    return importlib.util.find_spec("mlx_vlm") is not None


def _small(picture: Source) -> Image.Image:
    """Of at most `LONGEST_SIDE` pixels a side."""
    image = Image.fromarray(read_image(picture))
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return image
