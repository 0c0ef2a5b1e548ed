"""A certified export, uploaded to the Hugging Face hub as one commit."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from phi3_lightning.errors import ConfigError
from phi3_lightning.export.card import PICTURE
from phi3_lightning.export.certificate import CERTIFICATE, file_hashes
from phi3_lightning.hub import LOG_IN, chain, is_repository

UNCERTIFIED = ("README.md", PICTURE, CERTIFICATE)
"""Files of an export that no model reads; a card may be edited before it is pushed."""
_KEPT = ".gitattributes"

_REASONS = {
    401: "the token is not valid: log in again",
    403: "the token may not write there: use one with write permission, and a repository of your own",
    404: "there is no such repository, or the token may not see it",
    409: "it was changed at the same time: run the command again",
    412: "it was changed at the same time: run the command again",
}


@dataclass(frozen=True)
class Destination:
    """A model repository, as it was when it was checked."""

    repository: str
    """``owner/name``."""
    private: bool | None
    """Whether only its owners see it; None: the default of the hub for a new one, which is often public."""
    parent: str | None
    """Its newest commit, which the push follows; None: it does not exist yet."""
    files: frozenset[str]
    """Its files, which the push replaces."""

    @property
    def address(self) -> str:
        """The address of its page."""
        return f"{constants.ENDPOINT}/{self.repository}"


def check_destination(repository: str, private: bool | None = None, *, overwrite: bool = False) -> Destination:
    """Look up a model repository, without changing it, before an export begins.

    Args:
        repository: ``owner/name``; it need not exist.
        private: Whether only its owners may see it; None: as it is, and for a new one the hub's default.
        overwrite: Whether its files may be replaced.

    Raises:
        ConfigError: If nobody is logged in, the token cannot write, or the repository has files or another visibility.
    """
    where = f"--push: {repository}"
    if not is_repository(repository):
        raise ConfigError(f"{where} is not the name of a repository on the hub; give owner/name")
    if get_token() is None:
        raise ConfigError(f"{where}: you are not logged in to {constants.ENDPOINT}: {LOG_IN}, with write permission")
    api = HfApi()
    with _refused(repository, "nothing was exported"):
        if api.whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ConfigError(f"{where}: the token has only read permission; {LOG_IN}, with write permission")
        try:
            info = api.model_info(repository)
        except RepositoryNotFoundError:
            return Destination(repository, private, None, frozenset())
    if private not in (None, info.private):
        is_, option = ("private", "true") if info.private else ("public", "false")
        raise ConfigError(
            f"{where} exists and is {is_}, which a push does not change; give --private {option}, change it in the "
            "settings of the repository, or name another one"
        )
    files = frozenset(file.rfilename for file in info.siblings or []) - {_KEPT}
    if files and not overwrite:
        raise ConfigError(
            f"{where} holds {', '.join(sorted(files)[:5])}{' and more' if len(files) > 5 else ''}; give another "
            "repository, or --overwrite to replace its files by one commit"
        )
    return Destination(repository, info.private, info.sha, files)


def push(folder: Path, destination: Destination) -> str:
    """Upload a folder of :func:`~phi3_lightning.export.export.export`, and return the address of the repository.

    All files are one commit: a push that fails publishes nothing in part, and can be repeated.

    Raises:
        ConfigError: If the folder holds something else than what was certified, or the hub refuses it.
    """
    files = _certified(folder)
    api, repository = HfApi(), destination.repository
    deletions = [CommitOperationDelete(name) for name in sorted(destination.files - files.keys())]
    additions = [CommitOperationAdd(name, path) for name, path in files.items()]
    state = f"a push is one commit, so nothing was published in part; {folder} is complete: try again with --overwrite"
    with _refused(repository, state):
        if destination.parent is None:
            api.create_repo(repository, private=destination.private)
        # not upload_folder, which makes several commits of a large folder
        api.create_commit(
            repository,
            [*deletions, *additions],
            commit_message="Export of phi3_lightning",
            parent_commit=destination.parent,
        )
    return destination.address


def _certified(folder: Path) -> dict[str, Path]:
    """Return the files of an export by name, if they are those that were compared with the live model."""
    try:
        certificate = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))
        certified, holds = certificate["files"], certificate["holds"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--push: {folder} has no {CERTIFICATE} that lists its files; export it again") from error
    present = {path.name: path for path in sorted(folder.iterdir())}
    hashes = file_hashes(folder, present.keys() & certified.keys())
    changed = {name for name in certified if hashes.get(name) != certified[name]}
    changed |= present.keys() - certified.keys() - set(UNCERTIFIED)
    if changed or not holds:
        names = ", ".join(sorted(changed)) or CERTIFICATE
        raise ConfigError(f"--push: {folder}: {names} is not what was compared with the live model; export it again")
    return present


@contextmanager
def _refused(repository: str, state: str) -> Iterator[None]:
    """Turn what the hub or the network raises into one line, which ends with what was done."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of HTTP, of the storage's client, of the network
        raise ConfigError(f"--push: {repository}: {_reason(error)}; {state}") from error


def _reason(error: Exception) -> str:
    errors = list(chain(error))
    answer = next((each for each in errors if isinstance(each, HfHubHTTPError)), None)
    why = " ".join(str((answer and answer.server_message) or answer or errors[-1]).split())
    if answer is not None and answer.response is not None and answer.response.status_code in _REASONS:
        return f"{_REASONS[answer.response.status_code]} ({why})"
    if isinstance(answer, BadRequestError) or isinstance(error, ValueError):
        return f"the hub refuses the files ({why})"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to push"
    return f"the hub cannot be reached, or fails ({why})"
