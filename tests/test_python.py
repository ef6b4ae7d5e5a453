"""In a notebook: what completes, what shows itself, and what is said to someone who types what Diffusers takes."""

import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

import wan_mlx
from docs import make_signatures
from wan_mlx import options
from wan_mlx import other_words as hints
from wan_mlx.option import MODEL, REQUEST
from wan_mlx.pipeline import WanPipeline
from wan_mlx.types import RunState

SMALL = dict(width=16, height=16, num_frames=5, steps=1, seed=3)


@pytest.fixture(scope="module")
def pipe(pico):
    return WanPipeline.from_pretrained(pico, dtype="float32", progress=False, prompt_cache=False)


@pytest.fixture(scope="module")
def video(pipe):
    return pipe("a red circle", **SMALL)


class TestCompletion:
    """As Jupyter asks jedi: of the text, with the objects that there are."""

    @pytest.fixture
    def jedi(self, monkeypatch, tmp_path):
        jedi = pytest.importorskip("jedi")
        # Its cache is written where others read it: one that is half written raises EOFError, from then on.
        monkeypatch.setattr(jedi.settings, "cache_directory", str(tmp_path))
        return jedi

    @pytest.mark.parametrize(
        "typed, face", [("pipe(", REQUEST), ("wan_mlx.WanPipeline.from_pretrained(", MODEL), ("pipe.images(", REQUEST)]
    )
    def test_every_option(self, jedi, pipe, typed, face):
        found = jedi.Interpreter(typed, [{"pipe": pipe, "wan_mlx": wan_mlx}]).complete()
        names = {completion.name for completion in found}
        assert {f"{option.name}=" for option in options.of(face)} <= names
        assert ("steps=" in names) == (face == REQUEST)

    def test_every_option_before_anything_ran(self, jedi):
        """The lines of docs/python.md as one cell: there is only their text."""
        script = "import wan_mlx\npipe = wan_mlx.WanPipeline.from_pretrained('nano')\npipe('a', "
        names = {completion.name for completion in jedi.Script(script).complete()}
        assert {f"{option.name}=" for option in options.of(REQUEST) if option is not options.PROMPT} <= names

    def test_of_a_script_the_video_s_methods(self, jedi):
        script = "import wan_mlx\npipe = wan_mlx.WanPipeline.from_pretrained('nano')\npipe('a').sa"
        assert "save" in {completion.name for completion in jedi.Script(script).complete()}

    def test_the_package_lists_what_is_public(self):
        assert dir(wan_mlx) == sorted(wan_mlx.__all__)


def test_signatures_are_made_from_the_table():
    """``python docs/make_signatures.py`` writes them anew."""
    text = make_signatures.FILE.read_text(encoding="utf-8")
    assert make_signatures.text(text) == text
    assert text.count("        steps: int | None = None,\n") == 1 and text.count("by docs/make_signatures.py") == 2


class TestOtherNames:
    @pytest.mark.parametrize(
        "given",
        [
            {"num_inference_steps": 2, "flow_shift": 3.0},
            {"sample_steps": 2, "shift": 3.0, "frames": 5, "size": "16x16"},
            {"steps": 2, "sample_shift": 3.0, "frame_num": 5, "size": (16, 16), "base_seed": 3},
        ],
    )
    def test_that_mean_the_same(self, pipe, given):
        same = replace(pipe.request("a", **{**SMALL, "steps": 2, "shift": 3.0}))
        rest = {} if "size" in given else {"width": 16, "height": 16, "num_frames": 5}
        assert pipe.request("a", **{"seed": 3} | rest | given if "base_seed" not in given else given) == same

    def test_guidance_and_skipped_layers(self, pipe):
        request = pipe.request("a", guidance=4, slg="0:0.2-0.9", **SMALL | {"steps": 9})
        assert (request.guidance_scale, request.skip_layers, request.skip_range) == (4, (0,), (0.2, 0.9))

    @pytest.mark.parametrize("dtype", ["float32", mx.float32, "torch.float32"])
    @pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
    def test_dtypes(self, pico, name, dtype):
        assert WanPipeline.from_pretrained(pico, **{name: dtype}).dtype == "float32"

    def test_of_a_model(self, pico):
        assert WanPipeline.from_pretrained(pico, task="t2v-14B", lora=None).preset.name == "t2v-14B"

    @pytest.mark.parametrize(
        "given, says",
        [({"stepz": 3}, "'stepz'; nearest: steps"),
         ({"num_inference_step": 3}, "'num_inference_step'; nearest: num_inference_steps$"),
         ({"cfg": 5}, "'cfg'; here that is guidance"), ({"zzzz": 1}, "'zzzz'$"),
         ({"end_image": "a.png"}, "'end_image'; here that is last_image$"),
         ({"tile_size": 3}, "'tile_size'; vae_tiling is one of WanPipeline.from_pretrained$"),
         ({"memory": "8GB"}, "'memory'; memory is one of WanPipeline.from_pretrained$")],
    )
    def test_that_nobody_knows(self, pipe, given, says):
        with pytest.raises(TypeError, match=f"a request has no option {says}"):
            pipe.request("a", **given)

    def test_given_twice(self, pipe):
        with pytest.raises(TypeError, match="num_inference_steps is steps by another name, and both are given"):
            pipe.request("a", steps=3, num_inference_steps=4)

    def test_every_target_is_an_option(self):
        names = {option.name for option in options.of(REQUEST) + options.of(MODEL)}
        assert set(hints.SAME.values()) <= names
        assert not (set(hints.KEYWORDS) | set(hints.SAME)) & names
        assert not set(hints.ATTRIBUTES) & set(dir(WanPipeline))
        assert set(hints.SAME_NAMES.values()) <= set(wan_mlx.__all__)

    @pytest.mark.parametrize("name", hints.KEYWORDS)
    def test_a_keyword_without_meaning_says_what_to_write(self, pipe, name):
        for call in (pipe, lambda *_, **given: WanPipeline.from_pretrained("nano", **given)):
            with pytest.raises(TypeError, match=f"^{name} is not known here: {re.escape(hints.KEYWORDS[name])}$"):
                call("a", **{name: 1})

    @pytest.mark.parametrize("name", hints.ATTRIBUTES)
    def test_an_attribute_says_what_to_write(self, pipe, name):
        with pytest.raises(AttributeError, match=f"has no {name!r}: {re.escape(hints.ATTRIBUTES[name])}"):
            getattr(pipe, name)

    def test_other_attributes_are_not_there(self, pipe):
        assert not hasattr(pipe, "nothing") and not hasattr(wan_mlx, "nothing")

    @pytest.mark.parametrize("name", hints.NAMES)
    def test_a_name_says_what_to_write(self, name, monkeypatch):
        monkeypatch.delattr(wan_mlx, name, raising=False)  # a module that others imported
        assert not hasattr(wan_mlx, name) and getattr(wan_mlx, name, None) is None
        with pytest.raises(AttributeError, match=f"^wan_mlx has no {name}: {re.escape(hints.NAMES[name])}$"):
            getattr(wan_mlx, name)
        if name == "generate":  # a module's name, too
            exec(f"from wan_mlx import {name}")
            return
        with pytest.raises(ImportError, match=f"^wan_mlx has no {name}: {re.escape(hints.NAMES[name])}$"):
            exec(f"from wan_mlx import {name}")

    def test_calls_of_what_is_not_called_so(self):
        with pytest.raises(TypeError, match="^write WanPipeline.from_pretrained\\('nano', ...\\)$"):
            WanPipeline("nano")
        with pytest.raises(TypeError, match="list\\(wan_mlx.PRESETS\\) lists the released models"):
            wan_mlx.models()
        with pytest.raises(AttributeError, match="has no 'from_single_file': write WanPipeline.from_pretrained"):
            _ = WanPipeline.from_single_file
        assert not hasattr(WanPipeline, "nothing")

    def test_a_lora_of_a_call(self, pipe):
        for name in ("lora", "loras"):
            with pytest.raises(TypeError, match="; loras is one of WanPipeline.from_pretrained, or write pipe"):
                pipe("a", **{name: "style.safetensors"})

    @pytest.mark.parametrize("name", hints.SAME_NAMES)
    def test_pipelines_of_diffusers(self, name):
        assert getattr(wan_mlx, name) is WanPipeline

    def test_what_a_hint_says_to_write_is_there(self):
        """Names of ours in the hints."""
        said = " ".join([*hints.KEYWORDS.values(), *hints.ATTRIBUTES.values(), *hints.NAMES.values()])
        for name in re.findall(r"wan_mlx\.(\w+)", said):
            assert name in wan_mlx.__all__
        for name in re.findall(r"pipe\.(\w+)", said):
            assert hasattr(WanPipeline, name)
        keywords = {option.name for option in options.of(REQUEST) + options.of(MODEL)} | {"callback", "num_images"}
        assert set(re.findall(r"(\w+)=(?!\w+ in the env|1 in)", said)) - {"resume"} <= keywords


@pytest.mark.parametrize(
    "prompt, given, says",
    [
        (3, {}, "the prompt is 3, expected a text, or a list of texts for a list of videos"),
        ([], {}, r"the prompt is \[\], expected"),
        (["a", 3], {}, "prompt is 3, expected string"),
        ("a", {"seed": "abc"}, "seed is 'abc', expected integer"),
        ("a", {"size": "big"}, "'big' is no size; expected WIDTHxHEIGHT"),
        ("a", {"size": 3}, "size is 3, expected string or array"),
    ],
)
def test_bad_values_are_one_line(pipe, prompt, given, says):
    with pytest.raises(ValueError, match=says) as raised:
        pipe(prompt, **given)
    assert "\n" not in str(raised.value)


def test_a_model_that_is_no_name():
    with pytest.raises(ValueError, match="the model is 3, expected a name"):
        WanPipeline.from_pretrained(3)


def test_a_list_of_prompts_is_a_list_of_videos(pipe, video):
    first, second = pipe(["a red circle", "a blue square"], **SMALL)
    assert np.array_equal(first.frames, video.frames) and not np.array_equal(second.frames, video.frames)
    assert [first.prompt, second.prompt] == ["a red circle", "a blue square"] and first.seed == second.seed == 3
    a, b = pipe(("a red circle",) * 2, **SMALL | {"seed": None})
    assert a.seed != b.seed


class TestShown:
    def test_reprs(self, pipe, video, pico):
        assert repr(video) == "Video(5 frames, 16x16, 0.3 s, seed 3)" and len(video) == 5
        assert video.seed == 3 and video.prompt == "a red circle"
        assert repr(wan_mlx.Video(np.zeros((1, 8, 16, 3), np.uint8), None)) == "Video(1 frame, 16x8)"
        assert repr(pipe) == "WanPipeline(nano, t2v, float32)"
        packed = WanPipeline.from_pretrained("nano", quantize="q8", progress=False)
        assert repr(packed) == "WanPipeline(nano, t2v, bfloat16, q8)"
        conditioning, step, *_ = pipe.stages(pipe.request("a", **SMALL))
        shown = "Conditioning(noise (1, 2, 2, 2, 16), context (1, 512, 128), negative_context (1, 512, 128))"
        assert repr(conditioning) == shown and repr(RunState(conditioning, 3)) == f"RunState(3 steps, {shown})"
        assert re.fullmatch(r"Step\(1 of 1, sigma 1.000, \d\.\d s\)", repr(step))

    def test_plans(self, pipe):
        plan = replace(pipe.plan(pipe.request("a", **SMALL)), budget=2**30, title="pico")
        assert re.fullmatch(r"Plan\(pico: fits, \d+ MiB of 1\.00 GiB\)", repr(plan))
        shown = plan._repr_html_()
        assert shown.count("<tr>") == 1 + len(plan.rows) + 1 and "<th>stage</th>" in shown and "it fits" in shown
        for row in plan.rows:
            assert f"<td>{row.stage}</td>" in shown

    @pytest.mark.parametrize("width, shown", [(16, 256), (96, 288), (256, 256), (832, 832)])
    def test_a_player_is_large_enough_and_settings_are_folded(self, width, shown):
        frames = np.zeros((2, 16, width, 3), np.uint8)
        html = wan_mlx.Video(frames, None, settings={"prompt": "<b>", "image": None})._repr_html_()
        assert f'<video controls loop autoplay muted playsinline width="{shown}"' in html
        assert ("image-rendering:pixelated" in html) == (shown != width)
        details = html[html.index("<details>") : html.index("</details>")]
        assert "&lt;b&gt;" in details and "null" not in details and "<summary>Video(2 frames" in details

    def test_show_in_a_notebook(self, video, monkeypatch):
        shown = []
        shell = SimpleNamespace(kernel=1, display_pub=SimpleNamespace(publish=shown.append))
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
        video.show()
        assert "<video" in shown[0]["text/html"] and shown[0]["text/plain"] == repr(video)

    def test_show_elsewhere(self, video, monkeypatch, tmp_path):
        opened = []
        monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or len(opened) == 1)
        monkeypatch.setattr("tempfile.mkdtemp", lambda **_: str(tmp_path))
        video.show()
        assert opened == [(tmp_path / "video.mp4").as_uri()] and (tmp_path / "video.mp4").stat().st_size
        with pytest.raises(wan_mlx.WanError, match="no player or browser here; the video is in .*video.mp4"):
            video.show()


class TestExportToVideo:
    def test_of_a_video_and_of_frames(self, video, tmp_path):
        assert wan_mlx.export_to_video(video, tmp_path / "a.mp4", fps=8).exists()
        assert wan_mlx.export_to_video(video.frames, tmp_path / "b.mp4").exists()

    def test_of_the_first_frame_it_says_what_that_is(self, video, tmp_path):
        with pytest.raises(ValueError, match="here frames\\[0\\] is the first frame"):
            wan_mlx.export_to_video(video.frames[0], tmp_path / "a.mp4")


def test_signatures_are_spelled_out():
    assert "options" not in inspect.signature(WanPipeline.__call__).parameters


def test_the_page_has_what_diffusers_users_type():
    """docs/python.md: every name that is accepted, and the way of those that many type."""
    page = (Path(__file__).parent.parent / "docs/python.md").read_text(encoding="utf-8")
    for name in (*hints.SAME, *hints.SAME_NAMES, "generator", ".to(", "enable_model_cpu_offload", "load_lora_weights",
                 "vae.enable_tiling", "export_to_video", ".frames[0]", "callback_on_step_end"):  # fmt: skip
        assert name in page
