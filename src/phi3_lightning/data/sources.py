"""Where rows come from: files, folders and hub data sets."""

import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from phi3_lightning.config.data import Split
from phi3_lightning.data.arrow import plain_rows
from phi3_lightning.data.decoding import BOM
from phi3_lightning.data.files import Selection, listing, select_by_pattern, select_in_folder
from phi3_lightning.data.readers import SUFFIXES, Row, data_suffix, kind_of_file, open_file, read_rows
from phi3_lightning.errors import DataError
from phi3_lightning.files import local_path, remedy
from phi3_lightning.hub import REVISION, check_access, refusal, split_revision, with_revision

if TYPE_CHECKING:  # importing it takes half a second, for which `--help` need not wait
    import datasets

_SLICE = r"\[-?\d*%?:-?\d*%?\]"
_HUB = re.compile(
    r"(?P<name>[\w-][\w.-]*(?P<owned>/[\w.-]+)?)(?(owned)(/(?P<configuration>[^/:@*?\[\]]+))?)"
    rf"(@(?P<revision>{REVISION}))?(:(?P<split>[^:/*?\[]+({_SLICE})?))?"
)
_HUB_SPLITS: Final[dict[Split, str]] = {"train": "train", "val": "validation", "test": "test", "predict": "train"}
"""The split of a hub set where none is named; a set without splits has all of its rows in ``train``."""


@dataclass(frozen=True)
class FileSource:
    """A file of rows: JSON lines, one JSON array, CSV, Parquet or Arrow, packed with gzip or not."""

    path: Path
    item: int = 0
    """The index of the user's entry that it belongs to."""

    def check(self) -> None:
        """Check quickly whether the file can be read at all.

        Raises:
            DataError: If it is missing, empty, or not readable.
        """
        if not self.path.exists():
            raise DataError(f"{self.path}: no such file; give a path, or a data set on the hub as 'owner/name:split'")
        try:
            with open_file(self.path) as file:
                if not file.read(4).removeprefix(BOM).strip() and not file.read().strip():
                    raise DataError(f"{self.path}: the file is empty; write one chat per line into it")
            kind_of_file(self.path)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.path}: cannot be read ({error}); check it and its permissions") from error

    def fingerprint(self) -> str:
        """Return a hash of the file's content, with its place among the user's data."""
        with self.path.open("rb") as file:
            return f"{self.item}:{data_suffix(self.path)}:{hashlib.file_digest(file, 'blake2b').hexdigest()}"

    def name(self) -> str:
        """Return the path, as the user calls the file."""
        return str(self.path)

    def place(self, row: int) -> str:
        """Return ``path:line`` for a row, or the row's number in files without lines."""
        return f"{self.path}:{row}" if kind_of_file(self.path) == "lines" else f"{self.path} row {row}"

    def rows(self) -> Iterator[Row]:
        """Read the file from its beginning; lines are bytes, for ``decode_line``."""
        return read_rows(self.path)


@dataclass(frozen=True)
class HubSource:
    """A split of a data set on the Hugging Face hub."""

    id: str
    """Its name on the hub, ``owner/name``."""
    split: str
    item: int = 0
    """The index of the user's entry that it is."""
    streaming: bool = False
    """Whether rows are fetched as they are read, instead of downloaded first."""
    configuration: str | None = None
    """The configuration, which the hub also calls a subset; None: the set's only or default one."""
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""

    def fingerprint(self) -> str:
        """Return the hash that ``datasets`` has of the set's content, with its place among the user's data."""
        return f"{self.item}:{self.name()}:{self._load()._fingerprint}"

    def name(self) -> str:
        """Return ``owner/name/configuration@revision:split``, as the user calls the set."""
        configuration = "" if self.configuration is None else f"/{self.configuration}"
        return f"{with_revision(self.id + configuration, self.revision)}:{self.split}"

    def place(self, row: int) -> str:
        """Return the set's name and a row's number."""
        return f"{self.name()} row {row}"

    def rows(self) -> Iterator[Row]:
        """Read the split from its beginning."""
        tables = self._load().with_format("arrow").iter(batch_size=1024)
        return enumerate(plain_rows(batch for table in tables for batch in table.to_batches()), start=1)

    def _load(self) -> "datasets.Dataset | datasets.IterableDataset":
        import datasets

        try:
            if self.revision is not None:
                self._check_revision()
            return datasets.load_dataset(
                self.id, self.configuration, split=self.split, revision=self.revision, streaming=self.streaming
            )
        except DataError:
            raise
        except Exception as error:  # load_dataset passes on whatever its many back ends raise
            raise DataError(f"{self.name()}: {self._explain(error)}") from error

    def _check_revision(self) -> None:
        """Refuse a cached copy of another revision, which ``datasets`` takes where it cannot reach the hub."""
        import datasets
        from datasets.packaged_modules.cache.cache import Cache

        builder = datasets.load_dataset_builder(self.id, self.configuration, revision=self.revision)
        if isinstance(builder, Cache) and builder.hash != self.revision:
            raise DataError(
                f"{self.name()}: the hub cannot be reached to look up {self.revision!r}, and the cache of datasets "
                f"holds the commit {builder.hash}; name that one, or connect to the hub"
            )

    def _explain(self, error: Exception) -> str:
        """Return in one line why the set cannot be loaded, with the names that the hub offers, and what to do."""
        from datasets.exceptions import DatasetNotFoundError

        why = " ".join(str(error).split())
        if remedy(error) is not None:
            return f"cannot be stored ({why}); set HF_HOME to a folder that can be written and has room"
        try:
            if isinstance(error, DatasetNotFoundError):  # which does not say whether the set is missing or private
                check_access(self.id, self.revision, "dataset")
            elif isinstance(error, ValueError) and (offered := self._offered()):
                return offered
        except Exception as refused:
            if reason := refusal(refused, self.id, self.revision, "dataset"):
                return f"no such file or folder, and {reason}"
        return (
            f"neither a file nor a data set with a split {self.split!r} that can be loaded from the hub ({why}). "
            f"Check the spelling, or name the split: '{self.id}:SPLIT'"
        )

    def _offered(self) -> str | None:
        """Return the configurations or splits of the set where the one that is named is not among them."""
        import datasets

        names = datasets.get_dataset_config_names(self.id, revision=self.revision)
        default = datasets.get_dataset_default_config_name(self.id, revision=self.revision)
        configuration = self.configuration or default
        if configuration not in names:
            example = replace(self, configuration=names[0]).name()
            return f"the data set has the configurations {listing(names)}; name one of them, as in '{example}'"
        splits = datasets.get_dataset_split_names(self.id, configuration, revision=self.revision)
        if self.split.partition("[")[0] not in splits:
            example = replace(self, split=splits[0]).name()
            return f"the data set has the splits {listing(splits)}; name one of them, as in '{example}'"
        return None


Source = FileSource | HubSource


class Sources(NamedTuple):
    """What a user's data are read from."""

    sources: list[Source]
    """Files and hub data sets, in order."""
    left_out: list[str]
    """Names of what else is in the folders and patterns."""


def select_sources(files: str | list[str], split: Split = "train", *, streaming: bool = False) -> Sources:
    """Find the sources of a user's data, in the user's order, files of a folder or a pattern by name.

    Args:
        files: A file, a folder, a glob pattern, a data set on the hub (``owner/name``, which may be followed by
            ``/configuration``, ``@revision``, and ``:split`` or a part of it, ``:train[:100]``), or several of them.
        split: The split of the option: folders, patterns and hub ids may hold several.
        streaming: Whether rows of hub data sets are fetched as they are read.

    Raises:
        DataError: If a path leads nowhere, a file cannot be read, or it is not clear which files are meant.
    """
    items = [files] if isinstance(files, str) else files
    selections = [_select(item, split, index, streaming) for index, item in enumerate(items)]
    sources = [source for selection in selections for source in selection.sources]
    for source in sources:
        if isinstance(source, FileSource):  # a hub data set is looked for when it is read
            source.check()
    return Sources(sources, [name for selection in selections for name in selection.left_out])


def find_sources(files: str | list[str], split: Split = "train", *, streaming: bool = False) -> list[Source]:
    """Return the sources of :func:`select_sources` alone."""
    return select_sources(files, split, streaming=streaming).sources


def _select(text: str, split: Split, item: int, streaming: bool) -> Sources:
    path = local_path(f"data.{split}", text)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # no permission, or a byte that no name has
        raise DataError(f"{text}: cannot be looked up ({error}); check the path and its permissions") from error
    hub = _HUB.fullmatch(text)
    if is_folder:
        return _files(select_in_folder(text, split), item)
    if exists or (hub and data_suffix(path) in SUFFIXES):
        return Sources([FileSource(path, item)], [])
    if hub is not None:
        return Sources([_hub_source(text, hub, split, item, streaming)], [])
    if has_magic(text):
        return _files(select_by_pattern(text, split), item)
    return Sources([FileSource(path, item)], [])


def _files(selection: Selection, item: int) -> Sources:
    return Sources([FileSource(path, item) for path in selection.files], selection.left_out)


def _hub_source(text: str, match: re.Match[str], split: Split, item: int, streaming: bool) -> HubSource:
    name, configuration, revision = match["name"], match["configuration"], match["revision"]
    if revision is not None:
        split_revision(f"data.{split}", f"{name}@{revision}")  # which refuses the name of a local folder
    rows = match["split"] or _HUB_SPLITS[split]
    if streaming and rows.endswith("]"):
        raise DataError(f"{text}: a stream has no parts of a split; name a whole one, or set data.streaming: false")
    return HubSource(name, rows, item, streaming, configuration, revision)
