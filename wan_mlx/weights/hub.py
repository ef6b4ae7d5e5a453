"""Where a model's name leads: the bundled model, a folder on this machine, or a repository on the Hugging Face hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ..configs import PRESETS
from ..types import WeightsError
from .checkpoint import DIFFUSERS_FILES, OFFICIAL_FILES

log = logging.getLogger(__name__)

# Models that come with the package, by name.
BUNDLED = {"nano": Path(__file__).parent.parent / "assets" / "nano"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(model: str | Path) -> Path:
    """A folder for ``model``: the bundled one, or itself if it exists, or the downloaded repository it names.

    Only the files needed are fetched. ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are honoured.

    Raises:
        WeightsError: the download failed.
    """
    if model in BUNDLED:
        return BUNDLED[model]
    path = Path(model).expanduser()
    if path.exists():
        return path
    repo = PRESETS[str(model)].repo if str(model) in PRESETS else str(model)
    if not HUB_ID.fullmatch(repo) or isinstance(model, Path) or repo.startswith((".", "/")):
        return path
    return _download(repo)


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    layouts = (OFFICIAL_FILES, DIFFUSERS_FILES)
    wanted = ["*.json", "*.safetensors", *(name for layout in layouts for names in layout.values() for name in names)]
    log.info("fetching %s from the hub", repo)
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted))
    except Exception as error:  # huggingface_hub raises a wide family, from its own and from its HTTP client
        raise WeightsError(f"{repo} is no folder here and could not be fetched from the hub: {error}") from error
