"""The pipeline: an opened model that makes videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .events import unheard
from .hub.resolve import Places, resolve
from .mac import awake
from .media.video import Video
from .opened import OpenedModel
from .option import MODEL, REQUEST
from .options import ModelOptions, RequestOptions, filled, told
from .planning.choose import parse_tiling
from .planning.machine import parse_memory
from .presets import GIVEN_APART, find_preset
from .progress_bars import ProgressBars
from .prompts.extend import extend_requests
from .request_builder import build_request
from .runs.run import Output, Run
from .types import Request, RunState, Step
from .weights.checkpoint import check_here, open_checkpoint
from .weights.lora import normalise_loras
from .weights.quantize import check_mode

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of Python 3.11

# Options of `WanPipeline.from_pretrained` that may be given without their names.
IN_ORDER = ("dtype", "quantize", "memory", "preset", "progress")


class WanPipeline(OpenedModel):
    """A Wan2.1 model, opened but not resident: calling it makes a video. Its attributes are `OpenedModel`'s."""

    @classmethod
    @told(MODEL, IN_ORDER)
    def from_pretrained(cls, model: str | Path, *in_order: Any, **options: Unpack[ModelOptions]) -> WanPipeline:
        """Open a model.

        Args:
            model: "nano" or "nano-i2v" (come with the package); a folder (official, Diffusers' or ComfyUI's layout,
                written by ``weights_convert.py``, or single files); the transformer's own file (safetensors, GGUF or
                .pth), the other parts given apart; a preset's name; a hub id such as "Wan-AI/Wan2.1-T2V-1.3B", or one
                file of such a repository, "owner/name:path/to/file". Missing files are downloaded.

        Raises:
            ValueError: an option is wrong, or the model's task is not supported.
            WeightsError: the folder is incomplete, a file is of another kind, or the download failed.
        """
        if len(in_order) > len(IN_ORDER):
            raise TypeError(f"{len(in_order)} options without their names, expected at most {', '.join(IN_ORDER)}")
        given = filled(MODEL, {"model": model, **dict(zip(IN_ORDER, in_order, strict=False)), **options})
        parse_memory(given["memory"])
        check_mode(given["quantize"])
        parse_tiling(given["vae_tiling"])  # before a download
        if given["preset"]:
            find_preset(given["preset"])
        given["loras"] = normalise_loras(given["loras"])
        source, listener = given["source"], ProgressBars() if given["progress"] else unheard
        parts = {part: given[part] for part in GIVEN_APART if given[part] is not None}
        places = Places(model, parts, given["loras"])
        check_here(*places.here())
        with awake(given["caffeinate"]):
            here = places.fetch(source, listener)
            taehv = given["taehv"] and resolve(given["taehv"], source, listener)
        opened = cls(open_checkpoint(here.model, here.parts), **{**given, "loras": here.loras, "taehv": taehv})
        opened.opened_with |= {"loras": given["loras"], "taehv": given["taehv"]}
        return opened

    @told(REQUEST)
    def __call__(
        self,
        prompt: str,
        callback: Callable[[Step], Any] | None = None,
        extend_prompt: bool | str | Path = False,
        **options: Unpack[RequestOptions],
    ) -> Video:
        """Make a video.

        Args:
            prompt: a description of the video.
            callback: called with each `Step` as it ends; `Step.preview` shows it. If it returns False, sampling stops
                there and the video is the estimate of that step, `Step.denoised`; its settings then say
                ``stopped_after``.
            extend_prompt: have the prompt written out in detail first, in its own language: True for the default
                language model, or one that mlx-lm runs (`wan_mlx.prompts.extend`).
            options: as for `request`.

        Raises:
            ValueError: an option is wrong.
            SamplingError: the latents stopped being finite.
        """
        (request,) = extend_requests([self.request(prompt, **options)], extend_prompt)
        return self.run(request).video(callback)

    @told(REQUEST)
    def images(
        self,
        prompt: str,
        num_images: int = 1,
        callback: Callable[[Step], Any] | None = None,
        extend_prompt: bool | str | Path = False,
        **options: Unpack[RequestOptions],
    ) -> list[Video]:
        """Make stills of one prompt, with the seeds ``seed``, ``seed + 1``, ...: the model is loaded once.

        Args:
            prompt, callback, extend_prompt, options: as for a video; ``num_frames`` is 1.
            num_images: how many.

        Returns:
            a `Video` of one frame each, the same as if it had been made alone with its seed.

        Raises:
            ValueError: an option is wrong.
            SamplingError: the latents stopped being finite.
        """
        first = self.request(prompt, **{"num_frames": 1, **cast(dict[str, Any], options)})
        requests = extend_requests(first.series(num_images), extend_prompt)
        with self.keep_loaded():
            return [self.run(request).video(callback) for request in requests]

    @told(REQUEST)
    def request(self, prompt: str, **options: Unpack[RequestOptions]) -> Request:
        """Fill in the model's defaults and check every value; ``options`` are those of `RequestOptions`.

        Raises:
            ValueError: a value is wrong; names the nearest valid one.
        """
        return build_request(self.preset, self.config, self.geometry, prompt, **options)

    def run(self, request: Request, resume: RunState | None = None) -> Run:
        """One request on its way to a video: iterate over the `Run` for its events.

        Args:
            resume: the state of an earlier run of the same request: this one goes on from there, bit for bit, and
                tells the step reached once more, with ``seconds`` 0.

        Raises:
            MemoryPlanError: it does not fit.
        """
        return Run(self, request, resume)

    def stages(self, request: Request, resume: RunState | None = None) -> Iterator[Output]:
        """Run the stages in order and yield their results: Conditioning, Steps, decoded frames uint8 (n, H, W, 3).

        The caller may stop at any point; loaded networks are then dropped.

        Args:
            resume: as for `run`.
        """
        run = self.run(request, resume)
        del resume  # with every step the arrays it holds become old
        yield from run.outputs()
