"""Each option is declared once: a made-up one is found on every face, and every option on its own."""

import inspect
import json
import re
from dataclasses import make_dataclass
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from PIL import Image

from docs import make_flags
from wan_mlx import options, request_builder, types
from wan_mlx.caching import resolve_cache
from wan_mlx.cli import completion, config_file, flags
from wan_mlx.cli.jobs import request_from
from wan_mlx.option import COMMAND, MODEL, REQUEST, Limits, Option
from wan_mlx.options import OPTIONS
from wan_mlx.pipeline import WanPipeline
from wan_mlx.presets import PRESETS
from wan_mlx.recipes import RECIPES
from wan_mlx.runs.record import check_same
from wan_mlx.schedulers import SOLVERS
from wan_mlx.server import schema
from wan_mlx.types import Request

DOCS = Path(__file__).parent.parent / "docs/flags.md"
MADE_UP = Option(
    "--sparks --official_sparks N", "how many sparks fly", options.SAMPLE, more="More of them are brighter", default=3,
    limits=Limits(1, 9), name="sparkle", type=int | None, of=REQUEST,
)  # fmt: skip


def a_request(**given) -> Request:
    preset = PRESETS["nano"]
    return request_builder.build_request(preset, preset.transformer, preset.geometry, "a cat", **given)


@pytest.fixture
def made_up(monkeypatch):
    """The option in the table, and its use: a field of the request."""
    monkeypatch.setattr(options, "OPTIONS", [*OPTIONS, MADE_UP])
    wider = make_dataclass("Wider", [("sparkle", int, 0)], bases=(Request,), frozen=True)
    monkeypatch.setattr(request_builder, "Request", wider)
    return MADE_UP


@pytest.fixture(scope="module")
def scripts():
    return [completion.script(shell) for shell in completion.SHELLS]


def parsed(*words: str):
    return flags.build_parser().parse_args(["--prompt", "a cat", *words])


class TestAMadeUpOption:
    def test_flag(self, made_up, capsys):
        assert parsed("--sparks", "4").sparkle == 4 and parsed("--official_sparks=5").sparkle == 5
        assert parsed().sparkle is None  # until the request is filled
        assert "how many sparks fly" in flags.build_parser().format_help()

    def test_flag_to_request(self, made_up, monkeypatch):
        class Pipe:
            def request(self, prompt, **given):
                return a_request(**given)

        assert request_from(Pipe(), parsed("--sparks", "4")).sparkle == 4

    def test_keyword(self, made_up):
        assert a_request(sparkle=5).sparkle == 5 and a_request().sparkle == 3 and a_request(sparkle=None).sparkle == 3
        with pytest.raises(ValueError, match="sparks is 0, expected 1 to 9; nearest: 1"):
            a_request(sparkle=0)
        with pytest.raises(TypeError, match="no option 'sparkel'; nearest: sparkle"):
            a_request(sparkel=5)

    def test_config_of_a_video(self, made_up):
        settings = json.loads(json.dumps(a_request(sparkle=7, seed=1).settings()))
        words = flags.arguments(config_file.as_options(settings, Path("a.mp4"), {}))
        assert "--sparks=7" in words

    @pytest.mark.parametrize("key", ["sparks", "sparkle", "official_sparks", "official-sparks"])
    def test_prompt_file(self, made_up, key):
        if key == "official-sparks":
            with pytest.raises(flags.UsageError, match="nearest: official_sparks"):
                flags.json_flags('{"official-sparks": 2}')
        else:
            assert flags.json_flags(json.dumps({key: 2})) == ["--sparks=2"]

    def test_resume(self, made_up):
        record = {"asked": {}, "model": {}, "request": vars(a_request(sparkle=7))}
        check_same({"sparkle": 7}, record, flags.free_on_resume())
        with pytest.raises(ValueError, match="--sparks is 7, 6 was given"):
            check_same({"sparkle": 6}, record, flags.free_on_resume())

    def test_completion(self, made_up):
        assert all("sparks" in completion.script(shell) for shell in completion.SHELLS)

    def test_docs(self, made_up):
        row = "| `--sparks N`, `--official_sparks` | `sparkle` | how many sparks fly. More of them are brighter |"
        text = make_flags.page(DOCS.read_text(encoding="utf-8"))
        assert text.count(row) == 1 and text.index("## Sampling") < text.index(row) < text.index("## Speed")

    def test_schema(self, made_up, monkeypatch):
        monkeypatch.setattr(schema, "served", schema.served.__wrapped__)  # not what was found before it was made up
        assert schema.request_schema()["properties"]["sparkle"] == {
            "description": "how many sparks fly", "type": "integer", "default": 3, "minimum": 1, "maximum": 9,
        }  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
class TestEveryOption:
    def test_is_whole(self, option):
        assert option.of in (REQUEST, MODEL, COMMAND)
        assert not option.flags or option.group in options.GROUPS
        assert not option.flags or option.help or option.no_effect
        assert all(flag.startswith("--") for flag in option.flags)
        assert option.default is None or option.limits is None or option.default in option.limits
        assert not option.choices or option.default in (None, *option.choices)

    def test_help_completion_and_docs_show_it(self, option, scripts):
        page = DOCS.read_text(encoding="utf-8")
        for flag in option.flags:
            assert f"`{flag}" in page or option.no_effect and flag in page
            shown = not (option.hidden or option.no_effect)
            assert re.search(f"{flag}[ ,\n]", flags.build_parser().format_help()) or not shown
            assert all((flag.lstrip("-") in script) or not shown for script in scripts)

    def test_a_file_may_hold_it(self, option):
        if option.flags and not option.alone:
            value = value_of(option)
            for key in option.keys:
                line = flags.json_flags(json.dumps({key: value}))
                got = flags.build_parser().parse_args(line)
                assert getattr(got, option.key) not in (None, [], ()), (key, line)
        elif option.flags:
            with pytest.raises(flags.UsageError, match="unknown key"):
                flags.json_flags(json.dumps({option.key: value_of(option)}))

    def test_schema_takes_its_default(self, option):
        schema = option.schema()
        kinds = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "array": list}
        for sample in filter(lambda value: value is not None, [schema.get("default"), *option.choices]):
            assert isinstance(sample, kinds[schema["type"]])
        assert json.loads(json.dumps(schema)) == schema


def value_of(option: Option):
    """A value, as a file has it."""
    if option.is_switch:
        return True
    if option.sets:
        return {"slg": "9,10:0.1-0.9"}[option.key]
    words = {"guidance_range": "0-0.5", "size": "32x16", "seeds": [1, 2]}
    numbers = {int: 1, float: 0.5}
    kind = next((kind for kind in option.kinds if kind in numbers), None)
    return words.get(option.name) or (option.choices or (numbers.get(kind, "a"),))[0]


def test_no_flag_and_no_key_is_given_twice():
    for names in ([f for o in OPTIONS for f in o.flags], [o.name for o in OPTIONS]):
        assert len(names) == len(set(names))
    keys = [key for option in options.flags() for key in option.keys]
    assert len(keys) == len(set(keys))
    for option in OPTIONS:
        assert all(options.named(name).of == option.of for name in option.sets)


def test_docs_are_made_from_the_table():
    """``python docs/make_flags.py`` writes them anew."""
    text = DOCS.read_text(encoding="utf-8")
    assert make_flags.page(text) == text
    told = {group for group in options.GROUPS if f"<!-- flags: {group} -->" in text}
    assert told == {*options.GROUPS}


def test_choices_are_those_there_are():
    assert options.SOLVERS == tuple(SOLVERS) and options.RECIPES == tuple(RECIPES)
    for name in options.CACHES:
        preset = PRESETS["t2v-1.3B"]
        assert resolve_cache(name, 50, preset.name, preset.transformer).split(":")[0] == name


def test_requests_have_a_field_for_each():
    fields = get_type_hints(Request, {**vars(types), "Source": object}).keys()
    assert {option.name for option in options.of(REQUEST)} - {"size"} <= fields  # which is width and height there


@pytest.mark.parametrize(
    "face, function",
    [
        (REQUEST, WanPipeline.__call__),
        (REQUEST, WanPipeline.images),
        (REQUEST, WanPipeline.request),
        (MODEL, WanPipeline.from_pretrained),
    ],
)
def test_signatures_and_help_name_each(face, function):
    taken = inspect.signature(function).parameters
    assert "options" not in taken
    for option in options.of(face):
        if option not in (options.PROMPT, options.MODEL_NAME):
            assert taken[option.name].annotation in (option.type, getattr(option.type, "__forward_arg__", None))
            assert taken[option.name].default == option.default
            assert f"    {option.keyword}: {option.described}" in function.__doc__
        else:
            assert taken[option.name].default is inspect.Parameter.empty


def test_from_pretrained_takes_some_in_order():
    assert WanPipeline.from_pretrained("nano", "float32", "q8").opened_with["quantize"] == "q8"
    *_, last = inspect.signature(WanPipeline.from_pretrained).bind("nano", *"12345").arguments
    assert last == "progress"
    with pytest.raises(TypeError, match="from 2 to 7 positional arguments but 8"):
        WanPipeline.from_pretrained("nano", *"123456")


def test_from_pretrained_refuses_other_names():
    with pytest.raises(TypeError, match="no option 'quantise'; nearest: quantize"):
        WanPipeline.from_pretrained("nano", quantise="q8")


def test_a_file_s_composed_keys():
    assert flags.json_flags('{"width": 64, "height": 32}') == ["--width=64", "--height=32"]
    assert flags.json_flags('{"size": "16:9", "seeds": [1, 2]}') == ["--size=16:9", "--seeds=1,2"]
    assert flags.json_flags('{"size": [64, 32]}') == ["--size=64x32"]
    assert flags.json_flags('{"skip_layers": [1, 2], "skip_range": [0, 0.9]}') == ["--slg=1,2:0-0.9"]
    assert flags.json_flags('{"skip_layers": [], "skip_range": [0.1, 1.0]}') == []
    assert flags.json_flags('{"slg": [[1, 2], null]}') == ["--slg=1,2"]
    assert flags.json_flags('{"prompt_cache": false}') == ["--no-prompt-cache"]
    assert flags.json_flags('{"no_prompt_cache": true}') == ["--no-prompt-cache"]
    assert flags.json_flags('{"prompt_cache": true}') == []
    assert flags.json_flags('{"cfg_zero": 0, "src_ref_images": []}') == ["--cfg-zero=0"]
    assert flags.json_flags('{"lora": ["a:0.5", "b"]}') == ["--lora=a:0.5", "--lora=b"]


def test_config_refuses_sources_that_were_in_memory():
    for picture in (np.zeros((2, 2, 3), np.uint8), Image.new("RGB", (2, 2))):
        settings = {"image": types.describe_source(picture)}
        with pytest.raises(flags.UsageError, match="was in memory"):
            config_file.as_options(settings, Path("a.mp4"), {})


def test_an_unknown_flag_names_the_nearest():
    with pytest.raises(flags.UsageError, match="--sample_step 3; nearest: --sample_steps"):
        parsed("--sample_step", "3")


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("steps", 0, "steps is 0, expected 1 to 1000; nearest: 1"),
        ("shift", 0, "shift is 0, expected a number above 0"),
        ("guidance_scale", float("nan"), "guidance is nan, expected a finite number"),
        ("seed", 2**64, f"seed is {2**64}, expected 0 to {2**64 - 1}; nearest: {2**64 - 1}"),
        ("strength", 2.0, "strength is 2.0, expected above 0 and up to 1; nearest: 1"),
        ("solver", "eular", "unknown solver 'eular', expected one of unipc, dpm++, euler, dmd; nearest: euler"),
    ],
)
def test_limits(name, value, said):
    with pytest.raises(ValueError) as raised:
        options.named(name).check(value)
    assert str(raised.value) == said


def test_schema_is_one_of_a_request():
    found = schema.request_schema()
    names = {option.name for option in (*options.of(REQUEST), *options.of(MODEL))} - {*schema.NOT_HERE}
    assert found["required"] == ["prompt"] and names < {*found["properties"]}
    assert found["properties"]["image"]["type"] == "string"
    assert found["properties"]["solver"]["enum"] == list(SOLVERS)
