"""Names on the Hugging Face hub, and why it refuses one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from phi3_lightning.errors import ConfigError

Kind = Literal["model", "dataset"]

REVISION = r"[\w.+/-]+"
"""What a branch, tag or commit may be called, ``refs/pr/1`` among them."""
LOG_IN = "run `hf auth login`, or set HF_TOKEN"

_REVISED = re.compile(rf"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)@(?P<revision>{REVISION})")


def split_revision(
    option: str, text: str, revision: str | None = None, revision_option: str | None = None
) -> tuple[str, str | None]:
    """Return name and revision of ``owner/name@revision``; a path that exists keeps its ``@``.

    Args:
        option: The key path of the text.
        revision: The revision that an option of its own gives.
        revision_option: The key path of that option.

    Raises:
        ConfigError: If the two revisions differ, or the name is that of a local folder, which has none.
    """
    match = _REVISED.fullmatch(text)
    if match is None or Path(text).exists():
        return text, revision
    if Path(match["name"]).exists():
        raise ConfigError(
            f"{option}: {text}: {match['name']} is a path here, and paths have no revisions; give it without @, or "
            "run in another folder to use the hub's"
        )
    if revision not in (None, match["revision"]):
        raise ConfigError(
            f"{option}: {text}, and {revision_option} is {revision!r}; give the revision once: leave out "
            f"@{match['revision']}, or set {revision_option}: null"
        )
    return match["name"], match["revision"]


def is_repository(name: str) -> bool:
    """Whether a name is one that the hub gives to a repository, ``owner/name``."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def with_revision(name: str, revision: str | None) -> str:
    """Return ``owner/name@revision``, as an option takes it."""
    return name if revision is None else f"{name}@{revision}"


def refusal(error: BaseException, name: str, revision: str | None = None, kind: Kind = "model") -> str | None:
    """Return in one line why the hub refuses a repository, and what to do; None for an error of another kind."""
    refused = next((each for each in chain(error) if isinstance(each, _REFUSALS)), None)
    if refused is None:
        return None
    login = "" if get_token() else f", and you are not logged in: {LOG_IN}"
    if isinstance(refused, RevisionNotFoundError):
        return f"{name} has no revision {revision!r} on the hub{_offered_revisions(name, kind)}"
    if isinstance(refused, GatedRepoError):
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
        return f"{name} is gated on the hub{login}; ask for access at {page}"
    rights = login or "; check the name, and what your token may read"
    return f"{name} does not exist on the hub as a {kind}, or is private{rights}"


_REFUSALS = (RepositoryNotFoundError, RevisionNotFoundError)  # a gated repository is one of the first


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def check_access(name: str, revision: str | None, kind: Kind) -> None:
    """Raise the error of ``huggingface_hub`` that tells why a repository cannot be read."""
    api = HfApi()
    api.auth_check(name, repo_type=kind)
    api.repo_info(name, revision=revision, repo_type=kind)


def _offered_revisions(name: str, kind: Kind) -> str:
    try:
        refs = HfApi().list_repo_refs(name, repo_type=kind)
    except Exception:  # the names are only an addition to an error
        return ""
    names = {"branches": refs.branches, "tags": refs.tags}
    offered = [f"{what} {', '.join(ref.name for ref in each)}" for what, each in names.items() if each]
    return f"; it has the {' and the '.join(offered)}" if offered else ""
