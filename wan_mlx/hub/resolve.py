"""Resolves a model's name to a bundled model, a file or folder on this machine, or a download from a hub.

`hub.names` lists the forms of a name.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath

from .. import __version__
from ..errors import Stopped, WeightsError, nearest
from ..events import Fetching, Listener, unheard
from ..other_models import of_entries
from ..presets import BUNDLED, EXPERTS, PARTS, PRESETS, Preset
from ..storage import free_space, gigabytes, parse_json, shards_of
from . import modelscope
from .download import RemoteFile, bytes_here, fetch_files, is_transient, one_line
from .model_folders import find_model
from .names import (
    ADAPTER_CONFIG,
    CONFIGS,
    WEIGHT_ENDINGS,
    Location,
    needed_files,
    parse_location,
    preset_at,
    weights_in,
)

log = logging.getLogger(__name__)

# Hubs, and the variable that names the folder of each one's cache.
SOURCES = {"huggingface": "HF_HOME", "modelscope": "MODELSCOPE_CACHE"}

# Where huggingface.co cannot be reached, as in China.
ELSEWHERE = "a mirror: HF_ENDPOINT=https://hf-mirror.com before the command; another hub: --source modelscope"


@dataclass(frozen=True)
class Download:
    """The needed files of a repository, and how many of their bytes are in the cache."""

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

    @property
    def free(self) -> int:
        """Free bytes on the cache's disk."""
        return free_space(self.cache)

    def __str__(self) -> str:
        here = f", {gigabytes(self.cached)} of them here" if self.cached else ""
        to_fetch = f"{gigabytes(self.missing)} to fetch" if self.missing else "nothing to fetch"
        count = f"{len(self.files)} file{'s' * (len(self.files) != 1)}"
        return f"{self.location}: {count}, {gigabytes(self.total)}{here}; {to_fetch}, {gigabytes(self.free)} free"


def resolve(
    model: str | Path, source: str = "huggingface", listener: Listener = unheard, parts: Collection[str] = PARTS
) -> Path:
    """The folder or file that ``model`` names: local, or a repository (or one of its files), downloaded if necessary.

    Downloads only the needed files, resumes an interrupted download, and checks free space first. ``HF_HOME``,
    ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` apply.

    Args:
        model: a path or a name, see `hub.names`.
        source: "huggingface" or "modelscope" (needs the package of that name).
        listener: hears of the download (`Fetching`), in its threads.
        parts: those of `PARTS` that are needed from a whole repository.

    Raises:
        ValueError: unknown ``source``, or an address that is not the hub's.
        WeightsError: the download failed, or the disk is too full; says how to go on.
    """
    return Path(Places(model, wanted=parts).fetch(source, listener).model)


def survey(model: str | Path, source: str = "huggingface", parts: Collection[str] = PARTS) -> Download | Path:
    """The download that `resolve` would make, from the repository's listing; downloads nothing.

    ``parts``: those of `PARTS` that are needed from a whole repository.

    Returns:
        The place if nothing needs a hub: the model is local, or it is in the cache and the hub cannot be reached.

    Raises:
        ValueError, WeightsError: as `resolve`.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}, expected {' or '.join(SOURCES)}")
    location = _remote(model)
    if location is None:
        return _here(model) or Path(model).expanduser()  # opening it reports that it does not exist
    cache = cache_for(location, source)
    if source == "modelscope":
        listing, commit = modelscope.list_files(location.repo, location.revision), None
    else:
        try:
            listing, commit = _list_files(location)
        except Exception as error:  # of many kinds: huggingface_hub's own, and its HTTP client's
            if _is_unreachable(error) and (found := cached(model, parts)) is not None:
                return found
            raise explain(error, location) from error
    names = [location.file] if location.file else needed_files(listing, location.repo, parts)
    if names[0] not in listing:
        raise WeightsError(f"{location.repo} holds no file {location.file}; {weights_in(listing, location.repo)}")
    if location.file and (config := str(PurePosixPath(location.file).with_name(ADAPTER_CONFIG))) in listing:
        names.append(config)  # without it PEFT's file has neither alphas nor its kind
    files = tuple(listing[name] for name in names)
    here = 0 if commit is None else sum(bytes_here(location.repo, commit, file) for file in files)
    return Download(location, source, commit, files, here, cache)


def keys_of(download: Download) -> Collection[str]:
    """Names of the tensors in a safetensors file on the Hugging Face hub, by its header alone; none of other files."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import SafetensorsParsingError

    location = download.location
    if download.commit is None or location.file is None:
        return ()
    api = HfApi(constants.ENDPOINT, library_name="wan_mlx", library_version=__version__)
    try:
        return api.parse_safetensors_file_metadata(location.repo, location.file, revision=download.commit).tensors
    except SafetensorsParsingError:
        return ()
    except Exception as error:
        raise explain(error, location) from error


@dataclass(frozen=True)
class Places:
    """All sources of a pipeline, as the user named them: a model, separate parts, LoRAs with strengths.

    ``wanted``: those of `PARTS` that are needed.
    """

    model: str | Path
    parts: Mapping[str, str | Path] = field(default_factory=dict)
    loras: Collection[tuple[Path, float]] = ()
    wanted: Collection[str] = PARTS

    def _named(self) -> list[tuple[str | Path, Collection[str]]]:
        """Each place, and the parts wanted from it if it is a whole repository."""
        given = [expert for expert in EXPERTS if expert in self.parts]
        rest = [part for part in self.wanted if part not in self.parts and (part != "transformer" or len(given) < 2)]
        if len(given) == 1 and "transformer" in rest:  # of two experts only the other one
            rest[rest.index("transformer")] = next(expert for expert in EXPERTS if expert not in given)
        of_parts = ((place, [part]) for part, place in self.parts.items())
        named: list[tuple[str | Path, Collection[str]]] = [(self.model, rest), *of_parts]
        return named + [(lora, []) for lora in map(_lora_name, self.loras) if isinstance(lora, str)]

    def here(self) -> tuple[Path | None, dict[str, Path | None], list[Path]]:
        """The places of the model, of the separate parts, None for each that is to be fetched from a hub, and of the
        LoRAs that are not."""

        def local(place: str | Path) -> Path | None:
            return _here(place) or (None if _remote(place) else Path(place).expanduser())

        loras = [lora for lora in map(_lora_name, self.loras) if isinstance(lora, Path)]
        return local(self.model), {part: local(place) for part, place in self.parts.items()}, loras

    def on_machine(self) -> tuple[Path | None, dict[str, Path | None], list[Path | None]]:
        """As `here`, and of the LoRAs; what is whole in the cache is here, too."""
        model, *others = (_on_machine(place, parts) for place, parts in self._named()[: 1 + len(self.parts)])
        loras = [lora if isinstance(lora, Path) else _on_machine(lora) for lora in map(_lora_name, self.loras)]
        return model, dict(zip(self.parts, others, strict=True)), loras

    def downloads(self, source: str = "huggingface") -> list[Download]:
        """The downloads that `fetch` would make, one for each repository; see `survey`."""
        found = [survey(place, source, parts) for place, parts in self._named()]
        return [download for download in found if isinstance(download, Download)]

    def fetch(self, source: str = "huggingface", listener: Listener = unheard) -> Places:
        """The same places on this machine, after one check of free space for all of them; see `resolve`."""
        surveyed = [(place, survey(place, source, parts)) for place, parts in self._named()]
        downloads = [found for _, found in surveyed if isinstance(found, Download)]
        _check_room(downloads)
        for download in downloads:
            _check_model(download)
        taken = {}
        for place, found in surveyed:
            if isinstance(found, Path) and _remote(place) is not None:
                log.warning("the hub is out of reach; taking %s from the cache", place)
            taken[str(place)] = found if isinstance(found, Path) else _fetch(found, listener)
        loras = [(taken.get(str(_lora_name(lora)), lora[0]), lora[1]) for lora in self.loras]
        return Places(taken[str(self.model)], {part: taken[str(place)] for part, place in self.parts.items()}, loras)


def _lora_name(lora: tuple[Path, float]) -> str | Path:
    """A LoRA's path, or text if it is a file on a hub; Path has merged the two slashes of an address."""
    path = lora[0]
    text = str(path).replace("https:/", "https://", 1) if str(path).startswith("https:/") else str(path)
    location = None if path.exists() else parse_location(text)
    return text if location is not None and location.file else path


def _check_model(download: Download) -> None:
    """Raise WeightsError if a repository's configuration, which is fetched first, is of a model that is not supported.
    """
    configs = tuple(file for file in download.files if file.path in CONFIGS[:2])
    if download.location.file or download.commit is None or not configs or not download.missing:
        return
    folder = _fetch(replace(download, files=configs), unheard)
    for file in configs:
        with suppress(ValueError, AttributeError):  # no JSON object: reported when the model is opened
            if other := of_entries(parse_json((folder / file.path).read_bytes())):
                raise other.refusal(download.location)


def _check_room(downloads: Collection[Download]) -> None:
    """Raise WeightsError if the disk has no space for the missing files."""
    missing = sum(download.missing for download in downloads)
    for download in downloads:
        if missing > download.free:
            names = " and ".join(str(other.location) for other in downloads)
            raise WeightsError(
                f"{names} needs {gigabytes(missing)} more in {download.cache}, which has {gigabytes(download.free)} "
                f"free; make room, or set {SOURCES[download.source]} to a folder on a larger disk"
            )


def cached(model: str | Path, parts: Collection[str] = PARTS) -> Path | None:
    """The folder or file of a hub's model, if it is complete in the cache; does not use the network."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    location = parse_location(model)
    if location is None or not _has_home(_cache("huggingface")):
        return None
    repo, file, revision = location.repo, location.file, location.revision
    try:
        if file:
            return Path(hf_hub_download(repo, file, revision=revision, local_files_only=True))
        folder = Path(str(snapshot_download(repo, revision=revision, local_files_only=True)))
    except LocalEntryNotFoundError:
        return None
    return folder if _is_whole(folder, parts) else None


def cache_for(model: object, source: str = "huggingface") -> Path:
    """The folder that a model is downloaded to.

    Raises:
        WeightsError: it would be in the home folder, and there is none.
    """
    if not _has_home(cache := _cache(source)):
        raise WeightsError(f"{model} cannot be fetched without a home folder; set {SOURCES[source]} to a folder")
    return cache


def _cache(source: str) -> Path:
    """The folder of a hub's cache."""
    from huggingface_hub import constants

    return modelscope.cache() if source == "modelscope" else Path(constants.HF_HUB_CACHE)


def _has_home(cache: Path) -> bool:
    """Whether a cache's folder is known; it is none named "~", as it would be for a user without a home folder."""
    return cache.parts[0] != "~"


def is_cached(model: str | Path) -> bool:
    """Whether ``model`` (a preset's name, a repository …) opens without a download."""
    return _on_machine(model) is not None


def _on_machine(model: str | Path, parts: Collection[str] = PARTS) -> Path | None:
    """Where ``model`` lies, or in the cache all that is needed of it; does not use the network."""
    return _here(model) or cached(model, parts)


def folders_of(repo: str) -> list[Path]:
    """The folders of both hubs' caches that hold what was downloaded of a repository, whole or not."""
    if not _has_home(_cache("huggingface")):
        return []
    places = [_cache("huggingface") / f"models--{repo.replace('/', '--')}"]
    for folder in ("models", "hub/models", "hub"):  # of ModelScope's versions, which replace dots in names
        places += [modelscope.cache() / folder / name for name in {repo, repo.replace(".", "___")}]
    return [place for place in places if place.is_dir() and not place.is_symlink()]


def preset_of(model: str | Path) -> Preset | None:
    """The preset of a hub's model, by its name; None for local models, whose names mean nothing."""
    location = _remote(model)
    return preset_at(location) if location else None


def _remote(model: str | Path) -> Location | None:
    """The location on a hub that ``model`` names; None if a local path has this name, or would have: a weight file in a
    folder that is here."""
    path = Path(model).expanduser()
    is_file = path.suffix in WEIGHT_ENDINGS and ":" not in path.name and path.parent.is_dir()
    return None if is_file or _here(model) is not None else parse_location(model)


def _here(model: str | Path) -> Path | None:
    if model in BUNDLED:
        return BUNDLED[model]
    path = Path(model).expanduser()
    try:
        return path if path.exists() else find_model(str(model))
    except OSError:  # the name is too long for a path
        return None


def _is_whole(folder: Path, parts: Collection[str]) -> bool:
    """Whether a folder has all ``parts``, and every shard of its indexes."""
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    try:
        indexes = [name for name in needed_files(names, str(folder), parts) if name.endswith(".index.json")]
        shards = [shard for name in indexes for shard in shards_of(folder / name)]
    except (WeightsError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return all(shard.is_file() for shard in shards)


def _list_files(location: Location) -> tuple[dict[str, RemoteFile], str]:
    """Path → file of a repository at its revision, and the commit."""
    from huggingface_hub import HfApi, constants

    api = HfApi(constants.ENDPOINT, library_name="wan_mlx", library_version=__version__)
    info = api.model_info(location.repo, revision=location.revision, files_metadata=True)
    assert info.siblings is not None and info.sha is not None, "asked for with files_metadata"
    etag = {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id for s in info.siblings}
    return {s.rfilename: RemoteFile(s.rfilename, s.size or 0, etag[s.rfilename]) for s in info.siblings}, info.sha


def _fetch(download: Download, listener: Listener) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    log.info("%s", download)
    location, commit = download.location, download.commit
    if commit is None:
        folder = modelscope.fetch(location.repo, location.revision, download.files)
        return folder / location.file if location.file else folder

    def local(file: RemoteFile, revision: str | None) -> str | None:
        found = try_to_load_from_cache(location.repo, file.path, revision=revision)
        return found if isinstance(found, str) else None

    wanted = [file for file in download.files if local(file, commit) is None]
    done, total, lock = 0, sum(file.size for file in wanted), threading.Lock()

    def advance(count: int, file: RemoteFile) -> None:
        nonlocal done
        with lock:
            done += count
            listener(Fetching(f"fetching {location.repo}", done, total, "B", location.repo, file.path))

    try:
        if wanted:
            advance(0, wanted[0])
        fetch_files(location.repo, commit, wanted, advance)
        first = download.files[0]
        if local(first, location.revision) != local(first, commit):
            hf_hub_download(location.repo, first.path, revision=location.revision)  # records the branch's commit
    except Stopped as stopped:
        how = "; what has arrived is kept: the same command goes on from there"
        raise Stopped(stopped.signum, how) from stopped
    except Exception as error:
        raise explain(error, location) from error
    path = Path(local(first, commit) or "")
    return path if location.file else path.parents[first.path.count("/")]


def _is_unreachable(error: Exception) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, OfflineModeIsEnabled) or is_transient(error)


def explain(error: Exception, location: Location) -> WeightsError:
    """One line on an error of the hub, with a remedy."""
    from huggingface_hub import constants, errors

    if isinstance(error, WeightsError):
        return error
    hub, give = constants.ENDPOINT, "give a token that may read it (`hf auth login`, or HF_TOKEN in the environment)"
    offline = f"is not whole in the cache {constants.HF_HUB_CACHE}; HF_HUB_OFFLINE is set, so nothing can be fetched"
    elsewhere = f"; {ELSEWHERE}" if "huggingface.co" in hub else ""
    near = nearest(location.repo, [repo for preset in PRESETS.values() for repo in preset.repositories])
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    refused = status == 401 and not isinstance(error, errors.RepositoryNotFoundError)
    missing = isinstance(error, errors.RepositoryNotFoundError) or status == 404
    is_a = partial(isinstance, error)
    reasons = (
        (is_a(errors.OfflineModeIsEnabled), offline),
        (is_a(errors.GatedRepoError), f"is gated: accept its licence on {hub}/{location.repo}, then {give}"),
        (is_a(errors.RevisionNotFoundError), f"has no revision {location.revision or 'main'} on {hub}"),
        (is_a(errors.EntryNotFoundError), f"lacks on {hub} a file that its listing names; try again later"),
        (refused, f"cannot be fetched: {hub} refuses your token (401); {give}"),
        (missing, f"was not found on {hub} ({status}): check the name, or, if it is private, {give}{near}"),
        (status == 403, f"is forbidden on {hub} (403): {give}"),
        (status is not None, f"cannot be fetched: {hub} answered {status}; try again later"),
        (_is_unreachable(error), f"cannot be fetched: {hub} is out of reach ({one_line(error)}){elsewhere}"),
        (True, f"could not be fetched from {hub}: {type(error).__name__}: {one_line(error)}"),
    )
    text = next(text for holds, text in reasons if holds)
    return WeightsError(f"{location} is no file or folder here, and {text}")
