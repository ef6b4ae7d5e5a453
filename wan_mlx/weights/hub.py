"""Where a model's name leads: a folder on this machine, or a repository on the Hugging Face hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ..configs import PRESETS
from ..types import WeightsError
from .checkpoint import OFFICIAL_FILES

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(model: str | Path) -> Path:
    """A folder for ``model``: itself if it exists, else the downloaded repository it names.

    Only the files needed are fetched. ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are honoured.

    Raises:
        WeightsError: the download failed.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    repo = PRESETS[str(model)].repo if str(model) in PRESETS else str(model)
    if not HUB_ID.fullmatch(repo) or isinstance(model, Path) or repo.startswith((".", "/")):
        return path
    return _download(repo)


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "*.safetensors", *(name for names in OFFICIAL_FILES.values() for name in names)]
    log.info("fetching %s from the hub", repo)
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted))
    except Exception as error:  # huggingface_hub raises a wide family, from its own and from its HTTP client
        raise WeightsError(f"{repo} is no folder here and could not be fetched from the hub: {error}") from error
