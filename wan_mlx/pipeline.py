"""The pipeline: an opened model that makes videos."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .events import unheard
from .hub.resolve import Places, preset_of, resolve
from .models.vae_tiling import parse_tiling
from .opened import OpenedModel
from .options import RequestOptions, told
from .planning.machine import parse_memory
from .presets import PARTS, find_preset
from .progress_bars import ProgressBars
from .prompts.extend import extend_requests
from .request_builder import build_request
from .run import Output, Run
from .types import LoraChoice, Request, RunState, Step
from .video import Video
from .weights.checkpoint import open_checkpoint
from .weights.lora import normalise_loras
from .weights.quantize import check_mode

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of Python 3.11


class WanPipeline(OpenedModel):
    """A Wan2.1 model, opened but not resident: calling it makes a video. Its attributes are `OpenedModel`'s."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        dtype: str = "bfloat16",
        quantize: str | None = None,
        memory: str | None = None,
        preset: str | None = None,
        progress: bool = True,
        vae_tiling: str | tuple[int, int] | None = None,
        source: str = "huggingface",
        loras: Iterable[LoraChoice] | LoraChoice | None = None,
        prompt_cache: bool = True,
        taehv: str | Path | None = None,
        draft: bool = False,
        transformer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        image_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
    ) -> WanPipeline:
        """Open a model.

        Args:
            model: "nano" or "nano-i2v" (come with the package); a folder (official, Diffusers' or ComfyUI's layout,
                written by ``weights_convert.py``, or single files); the transformer's own file (safetensors, GGUF or
                .pth), the other parts given apart; a preset's name; a hub id such as "Wan-AI/Wan2.1-T2V-1.3B", or one
                file of such a repository, "owner/name:path/to/file". What is not here is downloaded.
            dtype: of the transformer and the text encoder: "bfloat16" or "float32". The VAE is float32.
            quantize: keep the blocks of transformer and text encoder in few bits: "q8", "q6", "q5", "q4" or "q3"
                (groups of 64; "q4-g32" for others), "mxfp8", "mxfp4", "nvfp4", or "auto", which gives sensitive layers
                more bits. None takes the weights as they are
                stored, "none" unpacks those stored packed. A GGUF's Q8_0, Q5_0, Q5_1, Q4_0 and Q4_1 stay packed with
                None; "nearest" packs its other types in the form that comes nearest.
            memory: what MLX may hold, such as "8GB": decides whether the transformer is resident or its blocks are read
                at every pass, and whether the VAE works in tiles (`plan`). "auto" (or None) is what this machine has
                to spare.
            preset: name in `PRESETS` to take the sampling defaults from, instead of the nearest one.
            progress: show progress bars.
            vae_tiling: decode and encode in tiles of at most this size, (width, height) in pixels or "384x256": the
                same video in less memory and more time; "off" never, "auto" (or None) where memory asks for it.
            source: hub to download from: "huggingface", or "modelscope" (an extra).
            loras: LoRA files to merge into the transformer as it is loaded: each a path, "path:strength" or
                (path, strength); the path may be a repository's file as in ``model``. Quantised weights keep them
                beside, as `set_loras` does.
            prompt_cache: keep encoded prompts on disk (`wan_mlx.prompts.cache`), to encode each only once.
            taehv: weights of TAEHV for Wan 2.1's latents (``taew2_1.pth`` or .safetensors) or their name on a hub, such
                as "lightx2v/Autoencoders:taew2_1.safetensors": its decoder makes the previews.
            draft: decode the video with TAEHV as well: in a fraction of the VAE's time, and a little less fine.
            transformer, text_encoder, vae, image_encoder, tokenizer: a file in any format that is read, or a folder
                or repository that has it, to use instead of what ``model`` has; that is then not downloaded.

        Raises:
            ValueError: an argument is wrong, or the model's task is not supported.
            WeightsError: the folder is incomplete, a file is not what it should be, or the download failed.
        """
        parse_memory(memory)
        check_mode(quantize)
        parse_tiling(vae_tiling)  # before a download
        found, loras = find_preset(preset) if preset else None, normalise_loras(loras)
        parts = dict(zip(PARTS, (transformer, text_encoder, vae, image_encoder, tokenizer), strict=True))
        places = Places(model, {part: place for part, place in parts.items() if place is not None}, loras)
        given = {**parts, "model": model, "preset": preset, "source": source, "loras": loras, "taehv": taehv}
        listener = ProgressBars() if progress else unheard
        here = places.fetch(source, listener)
        taehv = None if taehv is None else resolve(taehv, source, listener)
        checkpoint = open_checkpoint(here.model, here.parts)
        if found is None and checkpoint.model is None:
            found = preset_of(model)  # two models of the same sizes differ in their defaults
        opened = cls(
            checkpoint, dtype, found, progress, quantize, vae_tiling, here.loras, prompt_cache, memory, taehv, draft
        )
        opened.opened_with |= given
        return opened

    @told
    def __call__(
        self,
        prompt: str,
        callback: Callable[[Step], Any] | None = None,
        extend_prompt: bool | str | Path = False,
        **options: Unpack[RequestOptions],
    ) -> Video:
        """Make a video.

        Args:
            prompt: what it should show.
            callback: called with each `Step` as it ends; `Step.preview` shows it. If it returns False, sampling stops
                there and the video is the estimate of that step, `Step.denoised`; its settings then say
                ``stopped_after``.
            extend_prompt: have the prompt written out in detail first, in its own language: True for the default
                language model, or one that mlx-lm runs (`wan_mlx.prompts.extend`).
            options: as for `request`: negative_prompt, width, height, num_frames, steps, guidance_scale, shift,
                solver, seed, and the task's sources. What is left out or None takes the preset's default.

        Raises:
            ValueError: an option is wrong.
            SamplingError: the latents stopped being finite.
        """
        (request,) = extend_requests([self.request(prompt, **options)], extend_prompt)
        return self.run(request).video(callback)

    @told
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

    @told
    def request(self, prompt: str, **options: Unpack[RequestOptions]) -> Request:
        """Fill in the model's defaults and check every value; ``options`` are those of `RequestOptions`.

        Raises:
            ValueError: a value is wrong; names the nearest valid one.
        """
        return build_request(self.preset, self.config, self.geometry, prompt, **options)

    def run(self, request: Request, resume: RunState | None = None) -> Run:
        """One request on its way to a video: iterate over the `Run` for its events.

        Args:
            resume: what an earlier run of the same request had reached: this one goes on from there, bit for bit, and
                tells the step reached once more, with ``seconds`` 0.

        Raises:
            MemoryPlanError: it does not fit.
        """
        return Run(self, request, resume)

    def stages(self, request: Request, resume: RunState | None = None) -> Iterator[Output]:
        """Run the stages in order and yield what each gives: Conditioning, Steps, decoded frames uint8 (n, H, W, 3).

        The caller may stop at any point; what was loaded is then dropped.

        Args:
            resume: as for `run`.
        """
        run = self.run(request, resume)
        del resume  # with every step the arrays it holds become old
        yield from run.outputs()
