"""Where a model's name leads: the bundled model, a file or folder on this machine, or a repository on a hub.

A name is one of
    nano                                     what comes with the package
    ./Wan2.1-T2V-1.3B                        what is on this machine
    t2v-1.3B                                 a preset: the official repository
    Wan-AI/Wan2.1-T2V-1.3B-Diffusers         a repository: official, Diffusers' or an MLX folder
    city96/Wan2.1-T2V-14B-gguf:wan2.1-t2v-14b-Q4_K_M.gguf      one file of a repository
    https://huggingface.co/…/resolve/main/…  the same, as a browser shows it
and of a repository another revision than main can be given: owner/name@revision.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .. import __version__
from ..configs import COMFYUI_TRANSFORMERS, PRESETS, Preset
from ..types import WeightsError
from . import modelscope
from .checkpoint import DIFFUSERS_FILES, MLX_FILES, OFFICIAL_FILES
from .disk import free_space, gigabytes
from .download import RemoteFile, bytes_here, fetch_files, one_line

log = logging.getLogger(__name__)

# Models that come with the package, by name.
BUNDLED = {"nano": Path(__file__).parent.parent / "assets" / "nano"}
SOURCES = ("huggingface", "modelscope")
HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<file>[^:]+))?")
WEIGHT_ENDINGS = (".safetensors", ".gguf", ".pth", ".pt", ".ckpt")
# Beside the weights, each layout's small files.
CONFIGS = {
    "MLX": ("config.json",),
    "Diffusers": ("model_index.json", *(f"{component}/config.json" for component in DIFFUSERS_FILES)),
    "official": ("config.json",),
}
OPTIONAL = ("image_encoder",)  # only models that read images have one


@dataclass(frozen=True)
class Location:
    """A repository on a hub, or with ``file`` one file in it."""

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


@dataclass(frozen=True)
class Download:
    """What of a repository is needed, and how much of that is not here yet (bytes)."""

    location: Location
    source: str
    commit: str | None
    files: tuple[RemoteFile, ...]
    cached: int
    cache: Path

    @property
    def total(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def missing(self) -> int:
        return self.total - self.cached

    @cached_property
    def free(self) -> int:
        """Free bytes on the cache's disk."""
        return free_space(self.cache)

    def __str__(self) -> str:
        here = f", {gigabytes(self.cached)} of them here" if self.cached else ""
        to_fetch = f"{gigabytes(self.missing)} to fetch" if self.missing else "nothing to fetch"
        count = f"{len(self.files)} file{'s' * (len(self.files) != 1)}"
        return f"{self.location}: {count}, {gigabytes(self.total)}{here}; {to_fetch}, {gigabytes(self.free)} free"


def resolve(model: str | Path, source: str = "huggingface", progress: bool = False) -> Path:
    """A folder or file for ``model``: what it names here, or the downloaded repository (or file of one) it names.

    Only the files needed are fetched, an interrupted download goes on where it stopped, and free space is checked
    first. ``HF_HOME``, ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` are honoured.

    Args:
        model: see the module's own text.
        source: "huggingface" or "modelscope" (needs the package of that name).
        progress: show a bar.

    Raises:
        ValueError: unknown ``source``, or an address that is not the hub's.
        WeightsError: the download failed, or there is no room for it; says what to do.
    """
    path = _here(model)
    if path is not None:
        return path
    location = parse_location(model)
    if location is None:
        return Path(model).expanduser()  # whoever opens it says that it does not exist
    download = survey(model, source)
    if download is None:
        found = cached(model)
        log.warning("the hub is out of reach; taking %s from the cache", location)
        return found
    if download.missing > download.free:
        raise WeightsError(
            f"{location} needs {gigabytes(download.missing)} more in {download.cache}, which has "
            f"{gigabytes(download.free)} free; make room, or set "
            f"{'HF_HOME' if source == 'huggingface' else 'MODELSCOPE_CACHE'} to a folder on a larger disk"
        )
    return _fetch_from_modelscope(download) if source == "modelscope" else _fetch(download, progress)


def survey(model: str | Path, source: str = "huggingface") -> Download | None:
    """What `resolve` would fetch, from the repository's listing; nothing is downloaded.

    Returns:
        None if there is nothing to fetch from a hub: a model on this machine, or the hub is out of reach but the
        model is in its cache.

    Raises:
        ValueError, WeightsError: as `resolve`.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}, expected {' or '.join(SOURCES)}")
    location = None if _here(model) is not None else parse_location(model)
    if location is None:
        return None
    if source == "modelscope":
        listing, commit, cache = modelscope.list_files(location.repo, location.revision), None, modelscope.cache()
    else:
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE)
        try:
            listing, commit = _list_files(location)
        except Exception as error:  # huggingface_hub raises a wide family, from its own and from its HTTP client
            if _is_unreachable(error) and cached(model) is not None:
                return None
            raise explain(error, location) from error
    names = [location.file] if location.file else needed_files(listing, str(location))
    if names[0] not in listing:
        raise WeightsError(f"{location.repo} holds no file {location.file}; {_weights_in(listing, location)}")
    files = tuple(listing[name] for name in names)
    here = 0 if source == "modelscope" else sum(bytes_here(location.repo, commit, file) for file in files)
    return Download(location, source, commit, files, here, cache)


def remote_size(model: str | Path, source: str = "huggingface") -> int:
    """Bytes of the files of ``model`` that are needed, here or not; 0 for a model that is no hub's."""
    download = survey(model, source)
    return download.total if download else 0


def cached(model: str | Path) -> Path | None:
    """The folder or file of a hub's model if it is in the cache and whole; the network is not touched."""
    from huggingface_hub import try_to_load_from_cache

    location = parse_location(model)
    if location is None:
        return None
    probes = (location.file,) if location.file else ("model_index.json", "config.json", "transformer/config.json")
    for probe in probes:
        found = try_to_load_from_cache(location.repo, probe, revision=location.revision)
        if not isinstance(found, str):
            continue
        if location.file:
            return Path(found)
        folder = Path(found).parents[probe.count("/")]
        names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        return folder if _is_whole(folder, names) else None
    return None


def is_cached(model: str | Path) -> bool:
    """Whether ``model`` (a preset's name, a repository …) can be opened without a download."""
    return _here(model) is not None or cached(model) is not None


def preset_of(model: str | Path) -> Preset | None:
    """The preset of a model that is one of those published under a known name, whatever its layout."""
    location = None if _here(model) is not None else parse_location(model)
    if location is None:
        return None
    plain = str(Location(location.repo, location.file))
    return next(
        (
            p
            for p in PRESETS.values()
            if location.repo in (p.repo, p.diffusers, p.gguf) or plain == (f"{COMFYUI_TRANSFORMERS}/{p.comfyui}")
        ),
        None,
    )


def parse_location(model: str | Path) -> Location | None:
    """The repository that ``model`` names, or None if it is no such name.

    Raises:
        ValueError: an address of another site.
    """
    if isinstance(model, Path):
        return None
    if model in PRESETS and PRESETS[model].repo:
        return Location(PRESETS[model].repo)
    if re.match(r"https?://", model):
        return _parse_url(model)
    match = HUB_ID.fullmatch(model)
    if match is None or (match["file"] and _is_unsafe(match["file"])):
        return None
    return Location(match["repo"], match["file"], match["revision"])


def _parse_url(url: str) -> Location:
    from huggingface_hub import constants

    parts = urlsplit(url)
    known = {"huggingface.co", "hf.co", "www.huggingface.co", urlsplit(constants.ENDPOINT).netloc}
    match = re.fullmatch(
        r"/(?P<repo>[\w.-]+/[\w.-]+)(/(resolve|blob|tree)/(?P<revision>[^/]+)(/(?P<file>.+))?)?/?", unquote(parts.path)
    )
    if parts.netloc not in known or match is None or (match["file"] and _is_unsafe(match["file"])):
        raise ValueError(
            f"{url} is no model on {' or '.join(sorted(known))}; give owner/name or owner/name:path/to/file"
        )
    if "/tree/" in parts.path and match["file"]:
        raise ValueError(f"{url} is a folder in a repository; give one file as {match['repo']}:path/to/file")
    return Location(match["repo"], match["file"], match["revision"])


def _is_unsafe(file: str) -> bool:
    return file.startswith("/") or "\\" in file or any(part in ("", ".", "..") for part in file.split("/"))


def _here(model: str | Path) -> Path | None:
    if model in BUNDLED:
        return BUNDLED[model]
    path = Path(model).expanduser()
    try:
        return path if path.exists() else None
    except OSError:  # a name too long to be one
        return None


def needed_files(names: Iterable[str], repo: str) -> list[str]:
    """Which of a repository's files a model needs: each network's weights, the tokenizer, and the configurations.

    Raises:
        WeightsError: a part is missing, or these are single files of which one must be chosen; names them.
    """
    names = set(names)
    if names & set(MLX_FILES["transformer"]):
        layout, files = "MLX", MLX_FILES
    elif "model_index.json" in names or "transformer/config.json" in names:
        layout, files = "Diffusers", DIFFUSERS_FILES
    elif names & set(OFFICIAL_FILES["transformer"]):
        layout, files = "official", OFFICIAL_FILES
    else:
        raise WeightsError(f"{repo} is no whole Wan2.1 model; {_weights_in(names, Location(repo))}")
    needed, missing = [name for name in CONFIGS[layout] if name in names], []
    for component, candidates in files.items():
        present = [name for name in candidates if name in names]
        if present:
            needed += [present[0], *_shards(present[0], names)]
        elif component not in OPTIONAL:
            missing.append(f"{' or '.join(candidates)} ({component})")
    if missing:
        raise WeightsError(f"{repo} is no whole Wan2.1 model ({layout} layout): it lacks {'; '.join(missing)}")
    return needed


def _shards(index: str, names: set[str]) -> list[str]:
    """The files beside an index that are named after it: x.safetensors.index.json → x-00001-of-00006.safetensors …"""
    if not index.endswith(".safetensors.index.json"):
        return []
    stem = re.escape(index.removesuffix(".safetensors.index.json"))
    return sorted(name for name in names if re.fullmatch(stem + r"-\d+-of-\d+\.safetensors", name))


def _is_whole(folder: Path, names: set[str]) -> bool:
    """Whether a folder has every part, and every shard that an index names."""
    try:
        indexes = [Path(name) for name in needed_files(names, str(folder)) if name.endswith(".index.json")]
        shards = [
            (index.parent / shard).as_posix()
            for index in indexes
            for shard in json.loads((folder / index).read_bytes())["weight_map"].values()
        ]
    except (WeightsError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return names.issuperset(shards)


def _weights_in(names: Iterable[str], location: Location) -> str:
    found = sorted(name for name in names if name.endswith(WEIGHT_ENDINGS))
    if not found:
        return "it holds no weight files"
    return f"give one of its files, as {location.repo}:{found[0]}; it holds {', '.join(found[:6])}" + (
        f" and {len(found) - 6} more" if len(found) > 6 else ""
    )


def _list_files(location: Location) -> tuple[dict[str, RemoteFile], str]:
    """Path → file of a repository's revision, and its commit."""
    from huggingface_hub import HfApi, constants

    api = HfApi(constants.ENDPOINT, library_name="wan_mlx", library_version=__version__)
    info = api.model_info(location.repo, revision=location.revision, files_metadata=True)
    etag = {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id for s in info.siblings}
    return {s.rfilename: RemoteFile(s.rfilename, s.size, etag[s.rfilename]) for s in info.siblings}, info.sha


def _fetch(download: Download, progress: bool) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from tqdm.auto import tqdm

    location, commit = download.location, download.commit

    def local(file: RemoteFile, revision: str | None) -> str | None:
        found = try_to_load_from_cache(location.repo, file.path, revision=revision)
        return found if isinstance(found, str) else None

    log.info("%s", download)
    wanted = [file for file in download.files if local(file, commit) is None]
    bar = tqdm(
        total=sum(file.size for file in wanted), desc=f"fetching {location.repo}", unit="B", unit_scale=True,
        leave=False, disable=not progress or not wanted,
    )  # fmt: skip
    lock = threading.Lock()

    def advance(count: int) -> None:
        with lock:
            bar.update(count)

    try:
        with bar:
            fetch_files(location.repo, commit, wanted, advance)
        first = download.files[0]
        if local(first, location.revision) != local(first, commit):
            hf_hub_download(location.repo, first.path, revision=location.revision)  # notes the branch's commit
    except Exception as error:
        raise explain(error, location) from error
    path = Path(local(first, commit))
    return path if location.file else path.parents[first.path.count("/")]


def _fetch_from_modelscope(download: Download) -> Path:
    log.info("%s", download)
    location = download.location
    folder = modelscope.fetch(location.repo, location.revision, download.files)
    return folder / location.file if location.file else folder


def _is_unreachable(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, HTTPError | ConnectionError | TimeoutError)  # OfflineModeIsEnabled is a ConnectionError


def explain(error: Exception, location: Location) -> WeightsError:
    """One line for what went wrong with the hub, and what can be done."""
    from huggingface_hub import constants, errors

    if isinstance(error, WeightsError):
        return error
    hub, give = constants.ENDPOINT, "give a token that may read it (`hf auth login`, or HF_TOKEN in the environment)"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.OfflineModeIsEnabled):
        text = f"is not whole in the cache {constants.HF_HUB_CACHE}; HF_HUB_OFFLINE is set, so nothing can be fetched"
    elif isinstance(error, errors.GatedRepoError):
        text = f"is gated: accept its licence on {hub}/{location.repo}, then {give}"
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"has no revision {location.revision or 'main'} on {hub}"
    elif isinstance(error, errors.EntryNotFoundError):
        text = f"lacks on {hub} a file that its listing names; try again later"
    elif status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        text = f"cannot be fetched: {hub} refuses your token (401); {give}"
    elif isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        text = f"was not found on {hub} ({status}): check the name, or, if it is private, {give}"
    elif status == 403:
        text = f"is forbidden on {hub} (403): {give}"
    elif status is not None:
        text = f"cannot be fetched: {hub} answered {status}; try again later"
    elif _is_unreachable(error):
        text = f"cannot be fetched: {hub} is out of reach ({one_line(error)})"
    else:
        text = f"could not be fetched from {hub}: {type(error).__name__}: {one_line(error)}"
    return WeightsError(f"{location} is no file or folder here, and {text}")
