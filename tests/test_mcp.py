"""``wan-mlx mcp``: the tools, as an agent calls them."""

import asyncio
from typing import Any

import pytest
from fake_children import Children, make
from mcp import Client

from wan_mlx.cli.main import main
from wan_mlx.server.studio import Studio
from wan_mlx.server.tools import tools_of


def called(tmp_path, *calls) -> list[Any]:
    """What comes of calls of tools, each a name and a function of the results so far → arguments."""

    def plan(question, clerk):
        value = {"fits": True} if question["what"] == "plan_of" else {"size": [32, 32], "num_frames": 5, "fps": 16}
        clerk.say({"answer": question["ask"], "value": value})

    async def work() -> list[Any]:
        studio, found = Studio(tmp_path, make_child=Children(make, plan)), []
        async with Client(tools_of(studio)) as client:
            for name, arguments in calls:
                for _ in range(200):
                    answer = await client.call_tool(name, arguments(found))
                    if name != "video_status" or answer.structured_content["status"] == "completed":
                        break
                    await asyncio.sleep(0.02)
                found.append(answer.content[0].text if answer.is_error else answer.structured_content)
        return found

    return asyncio.run(work())


def test_from_the_plan_to_the_file(tmp_path):
    def named(found):
        return {"id": found[1]["id"]}

    plan, asked, status, result = called(
        tmp_path,
        ("plan_video", lambda found: {"options": {"model": "nano"}}),
        ("submit_video", lambda found: {"prompt": "a circle", "size": "32x32", "options": {"num_frames": 5}}),
        ("video_status", named),
        ("video_result", named),
    )
    assert plan["fits"] and asked["status"] == "queued" and status["progress"] == 100
    assert result["path"] == str(tmp_path / "a_circle.mp4")


def test_what_is_wrong_is_told(tmp_path):
    size, none, field = called(
        tmp_path,
        ("submit_video", lambda found: {"prompt": "x", "size": "33x32"}),
        ("video_result", lambda found: {"id": "video_none"}),
        ("submit_video", lambda found: {"prompt": "x", "options": {"output": "/tmp/x.mp4"}}),
    )
    assert "nearest: 32" in size and "there is no video" in none and "unknown field 'output'" in field


def test_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["mcp", "--help"])
    assert "Model Context Protocol" in capsys.readouterr().out
    assert main(["mcp", "--model", "nanoo"]) == 2
