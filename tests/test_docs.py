"""What README.md, README.zh-CN.md and docs/ say of flags, links, memory and minutes is so; `test_documented_commands`
runs what they tell to run.
"""

import re
import shlex

import pytest
from pages import PAGES, ROOT, anchors, spelled_out

import wan_mlx
from docs import make_flags, make_formats, make_minutes, make_several
from wan_mlx import options
from wan_mlx.cli import smooth
from wan_mlx.cli.flags import build_parser
from wan_mlx.models.chips import CHIPS
from wan_mlx.other_models import ADVICE
from wan_mlx.planning import peak_memory as peaks
from wan_mlx.presets import PRESETS
from wan_mlx.recipes import RECIPES


def test_scripts_take_the_flags_that_pages_give_them():
    found = 0
    for page in PAGES:
        folder, text = (ROOT / page).parent, (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
        for script, rest in re.findall(r"^ *python (\S+\.py)(.*)", text, re.MULTILINE):
            source = next((path for path in (ROOT / script, folder / script) if path.exists()), None)
            assert source, (page, script)
            code = source.read_text(encoding="utf-8")
            for flag in re.findall(r" (--[a-z][\w-]*)", rest.split("#")[0]):
                assert re.search(f'"{flag}[" ]', code) or script == "weights_convert.py", (page, script, flag)
                found += 1
    assert found > 10


def test_every_link_leads_somewhere():
    for page in PAGES:
        text = re.sub("`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"))
        for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
            if link.startswith("https://"):
                continue
            there = (ROOT / page).parent / link if link else ROOT / page
            assert there.exists() and (not anchor or anchor in anchors(there)), (page, link, anchor)


def test_ten_minutes_are_computed_and_no_more_than_ten():
    """In the line above each command of "In ten minutes", by chip and memory."""
    for page, unit, head in (("docs/choosing-a-model.md", "min", "## In ten minutes"),
                             ("docs/zh/choosing-a-model.md", "分钟", "## 十分钟内")):  # fmt: skip
        text = (ROOT / page).read_text(encoding="utf-8")
        lines = re.findall(r"^# (\d+) GB(.*)\n(wan-mlx .*)$", text[text.index(head) :], re.MULTILINE)
        assert len(lines) >= 6
        for memory, told, command in lines:
            given = build_parser().parse_args(spelled_out(shlex.split(command))[1:])
            width, height = map(int, given.size)
            steps = given.steps or RECIPES[given.recipe].steps
            asked = make_minutes.Run(given.model, (width, height), steps, True, given.num_frames or 81)
            times = re.findall(rf"(M\d(?: (?:Pro|Max|Ultra))?) ([\d.]+) {unit}", told)
            assert times
            for chip, minutes in times:
                room = max(int(memory), make_minutes.MEMORY[chip])
                assert float(minutes) == pytest.approx(make_minutes.seconds(asked, chip, room) / 60, abs=0.06)
                assert float(minutes) <= 10, (page, command)


@pytest.mark.parametrize("page", ["docs/flags.md", "docs/zh/flags.md"])
def test_every_flag_is_documented(page):
    """And none that there is not, under as many headings in each language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(re.findall("^##+ ", text, re.MULTILINE)) == 18
    own = text[: text.index("`weights_convert.py` ")]
    flags = {flag for action in build_parser()._actions for flag in action.option_strings if flag.startswith("--")}
    told = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", own))
    of_smooth = {flag for action in smooth.build_parser()._actions for flag in action.option_strings}
    assert flags - told == set() and told - flags - of_smooth == set()


def test_the_tables_of_formats_are_current():
    """``python docs/make_formats.py`` writes them anew."""
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    assert make_formats.page(text) == text
    assert {name.split()[0] for name in re.findall(r"<!-- table: (.*?) -->", text)} == make_formats.TABLES.keys()
    assert {f"others {kind}" for kind in ADVICE} <= {*re.findall(r"<!-- table: (.*?) -->", text)}


def test_the_tables_of_flags_are_current():
    """``python docs/make_flags.py`` writes them anew."""
    for path in (make_flags.PAGE, make_flags.CHINESE):
        text = path.read_text(encoding="utf-8")
        assert make_flags.page(text, path == make_flags.CHINESE) == text, path
        groups = re.findall(r"<!-- flags: (.*?) -->", text)
        assert {*groups} == {option.group for option in options.flags()}, path
        assert "<!-- words -->" in text, path


def test_the_table_of_several_macs_is_current():
    """``python docs/make_several.py`` writes it anew."""
    for path in make_several.PAGES:
        text = path.read_text(encoding="utf-8")
        assert make_several.page(text, "zh" in path.parts) == text and make_several.table("zh" in path.parts) in text


def test_every_flag_has_a_text_in_chinese_of_the_newest_one_in_english():
    """In wan_mlx/assets/flags.zh.tsv: translate the English text anew, and put its stamp, shown here, before it."""
    found, flags = make_flags.translations(), {option.flags[0]: option for option in options.flags()}
    assert found.keys() == flags.keys()
    stale = {flag: (make_flags.stamp(option), make_flags.english(option)) for flag, option in flags.items()
             if found[flag][0] != make_flags.stamp(option)}  # fmt: skip
    assert not stale
    assert all(re.search("[\u4e00-\u9fff]", text) for flag, (_, text) in found.items())


def test_the_tables_of_minutes_are_current():
    """``python docs/make_minutes.py`` writes them anew."""
    known = make_minutes.measured((ROOT / "docs/times.md").read_text(encoding="utf-8"))
    for page in make_minutes.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert make_minutes.page(text, known) == text and text.count("<!-- minutes: ") == 1, page
    assert make_minutes.MEMORY.keys() == CHIPS.keys() >= make_minutes.FEW.keys()


def test_minutes_are_measured_where_there_is_a_row():
    row = "| Apple M4 Max | 36 GB | t2v-1.3B | 832x480 | 81 | 50 | - | 3000 | 5.9 | 0.32.4 |"
    known = make_minutes.measured(f"| chip |\n|---|\n{row}\n{row.replace('| - |', '| --cache magcache |')}\n")
    assert known == {("M4 Max", make_minutes.RUNS[0]): 3000.0}
    table = make_minutes.table({"M4 Max": 36, "M1": 8}, known)
    assert "| M4 Max, 36 GB | **50 min** | ≈ 2" in table and "| M1, 8 GB | ≈ 5.0 h | ≈ 15 min |" in table
    assert table.splitlines()[3].count("| no ") >= 3  # neither 720p nor pictures with 8 GB


def memory_table(page: str) -> list[tuple[str, ...]]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^\| ([\w.-]+) \| (\d+)x(\d+) \| (.+) \|$", text, re.MULTILINE)


def test_the_memory_table_agrees_with_plans(monkeypatch):
    """Within a tenth: predictions are refined now and then."""
    monkeypatch.setattr(peaks, "on_cpu", lambda: False)
    monkeypatch.setattr(peaks, "has_fused_kernel", lambda *_: True)
    presets = {name.lower(): name for name in PRESETS}
    rows = memory_table("docs/memory.md")
    assert len(rows) >= 5 and rows == memory_table("docs/zh/choosing-a-model.md")
    for row, width, height, told in rows:
        name, size = presets[row.lower()], (int(width), int(height))
        preset = PRESETS[name]

        def plan(room, quantize=None, name=name, size=size):
            return wan_mlx.plan(name, *size, memory=room, quantize=quantize)

        streamed = next(row.peak for row in plan("24GB").rows if row.stage == "denoise")
        shape = preset.geometry.latent_shape(*size, preset.num_frames)
        decode = peaks.vae(preset.vae, shape, None, decoding=True)
        want = [plan("200GB").peak, plan("200GB", "q8").peak, plan("200GB", "q4").peak, max(decode, streamed),
                plan("100MB").peak]  # fmt: skip
        got = [float(number.removesuffix(" GiB")) * 2**30 for number in told.split(" | ")]
        assert got == pytest.approx(want, rel=0.1), name
        if (name, size) == ("t2v-14B", (832, 480)):
            bf16, _, q4, from_disk, _ = told.split(" | ")
            for page, of in (("README.md", "{} GiB in bfloat16, {} in q4, {} streamed"),
                             ("README.zh-CN.md", "{} GiB，q4 时 {}，流式读取时 {}")):  # fmt: skip
                assert of.format(bf16, q4, from_disk) in (ROOT / page).read_text(encoding="utf-8")
