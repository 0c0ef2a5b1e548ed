"""Where rows come from: files, folders and hub data sets."""

import errno
import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from phi3_lightning.config.data import Split
from phi3_lightning.data.arrow import plain_rows
from phi3_lightning.data.decoding import BOM
from phi3_lightning.data.files import Selection, select_by_pattern, select_in_folder
from phi3_lightning.data.readers import SUFFIXES, Row, data_suffix, kind_of_file, open_file, read_rows
from phi3_lightning.errors import DataError
from phi3_lightning.files import local_path

if TYPE_CHECKING:  # importing it takes half a second, for which `--help` need not wait
    import datasets

_SLICE = r"\[-?\d*%?:-?\d*%?\]"
_HUB = re.compile(rf"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(:(?P<split>[^:/*?\[]+({_SLICE})?))?")
_FINER = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(/(?P<configuration>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:[^/]+)?")
_HUB_SPLITS: Final[dict[Split, str]] = {"train": "train", "val": "validation", "test": "test", "predict": "train"}
"""The split of a hub set where none is named; a set without splits has all of its rows in ``train``."""
NOT_WRITTEN: Final = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG),
}
"""What the system says of a folder into which a file cannot be written."""


@dataclass(frozen=True)
class FileSource:
    """A file of rows: JSON lines, one JSON array, CSV, Parquet or Arrow, packed with gzip or not.

    Args:
        path: The file.
        item: Which of the things that the user gave it belongs to.
    """

    path: Path
    item: int = 0

    def check(self) -> None:
        """Look whether the file can be read at all, in no time.

        Raises:
            DataError: It is missing, empty, or not readable.
        """
        if not self.path.exists():
            raise DataError(f"{self.path}: no such file. Give a path, or a data set on the hub as 'owner/name:split'.")
        try:
            with open_file(self.path) as file:
                if not file.read(4).removeprefix(BOM).strip() and not file.read().strip():
                    raise DataError(f"{self.path}: the file is empty. Write one chat per line into it.")
            kind_of_file(self.path)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.path}: cannot be read ({error}). Check it and its permissions.") from error

    def fingerprint(self) -> str:
        """A name for the file's content, and for its place among what the user gave.

        Returns:
            Hexadecimal digits.
        """
        with self.path.open("rb") as file:
            return f"{self.item}:{data_suffix(self.path)}:{hashlib.file_digest(file, 'blake2b').hexdigest()}"

    def name(self) -> str:
        """What the user calls it.

        Returns:
            Its path.
        """
        return str(self.path)

    def place(self, row: int) -> str:
        """Say where a row is.

        Args:
            row: Its number.

        Returns:
            ``path:line``, or the row's number in files without lines.
        """
        return f"{self.path}:{row}" if kind_of_file(self.path) == "lines" else f"{self.path} row {row}"

    def rows(self) -> Iterator[Row]:
        """Read the file from its beginning.

        Returns:
            Its rows; lines as bytes, for ``decode_line``.
        """
        return read_rows(self.path)


@dataclass(frozen=True)
class HubSource:
    """A split of a data set on the Hugging Face hub.

    Args:
        id: Its name on the hub, ``owner/name``.
        split: The split.
        item: Which of the things that the user gave it is.
        streaming: Whether rows are fetched as they are read, instead of downloaded first.
    """

    id: str
    split: str
    item: int = 0
    streaming: bool = False

    def check(self) -> None:
        """Nothing can be said without the network; the set is looked for when it is read."""

    def fingerprint(self) -> str:
        """A name for the set's content, and for its place among what the user gave.

        Returns:
            The fingerprint that ``datasets`` gives it.
        """
        return f"{self.item}:{self.id}:{self.split}:{self._load()._fingerprint}"

    def name(self) -> str:
        """What the user calls it.

        Returns:
            Its id and split.
        """
        return f"{self.id}:{self.split}"

    def place(self, row: int) -> str:
        """Say where a row is.

        Args:
            row: Its number.

        Returns:
            Name, split and number.
        """
        return f"{self.id}:{self.split} row {row}"

    def rows(self) -> Iterator[Row]:
        """Read the split from its beginning.

        Returns:
            Its rows.

        Raises:
            DataError: There is no such set or split, or the hub cannot be reached.
        """
        tables = self._load().with_format("arrow").iter(batch_size=1024)
        return enumerate(plain_rows(batch for table in tables for batch in table.to_batches()), start=1)

    def _load(self) -> "datasets.Dataset | datasets.IterableDataset":
        import datasets

        try:
            return datasets.load_dataset(self.id, split=self.split, streaming=self.streaming)
        except Exception as error:  # load_dataset lets through whatever its many back ends raise
            why, remedy = " ".join(str(error).split()), f"Check the spelling, or name the split: '{self.id}:SPLIT'."
            if isinstance(error, OSError) and error.errno in NOT_WRITTEN:
                raise DataError(
                    f"{self.id}: cannot be stored ({why}). Set HF_HOME to a folder that can be written and has room."
                ) from error
            if "config" in why.lower():  # with the names that the hub offers
                remedy = _save_first(self.id, "CONFIGURATION")
            raise DataError(
                f"{self.id}: neither a file nor a data set with a split {self.split!r} that can be loaded from the "
                f"hub ({why}). {remedy}"
            ) from error


Source = FileSource | HubSource


class Sources(NamedTuple):
    """What a user's data are read from.

    Args:
        taken: Files and hub data sets, in order.
        left_out: Names of what else is in the folders and patterns.
    """

    taken: list[Source]
    left_out: list[str]


def select_sources(given: str | list[str], split: Split = "train", *, streaming: bool = False) -> Sources:
    """Understand what a user gave as data.

    Args:
        given: A file, a folder, a glob pattern, a hub id (``owner/name``, ``owner/name:split`` or, with a part of a
            split, ``owner/name:train[:100]``), or several of them.
        split: Which option it was given to: folders, patterns and hub ids may hold several splits.
        streaming: Whether hub data sets are fetched as they are read.

    Returns:
        The sources, in the order given, files of a folder or a pattern by name; and what was left out.

    Raises:
        DataError: A path leads nowhere, a file cannot be read, or it is not clear which files are meant.
    """
    items = [given] if isinstance(given, str) else given
    found = [_select(item, split, index, streaming) for index, item in enumerate(items)]
    taken = [source for sources in found for source in sources.taken]
    for source in taken:
        source.check()
    return Sources(taken, [name for sources in found for name in sources.left_out])


def find_sources(given: str | list[str], split: Split = "train", *, streaming: bool = False) -> list[Source]:
    """Return the sources that :func:`select_sources` takes.

    Args:
        given: What the user gave.
        split: Which option it was given to.
        streaming: Whether hub data sets are fetched as they are read.
    """
    return select_sources(given, split, streaming=streaming).taken


def _select(given: str, split: Split, item: int, streaming: bool) -> Sources:
    path = local_path(f"data.{split}", given)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # no permission, a byte that no name has
        raise DataError(f"{given}: cannot be looked up ({error}). Check the path and its permissions.") from error
    hub, finer = _HUB.fullmatch(given), _FINER.fullmatch(given)
    if is_folder:
        return _files(select_in_folder(given, split), item)
    if exists or (hub and data_suffix(path) in SUFFIXES):
        return Sources([FileSource(path, item)], [])
    if hub is not None:
        return Sources([HubSource(hub["name"], hub["split"] or _HUB_SPLITS[split], item, streaming)], [])
    if finer is not None and data_suffix(path) not in SUFFIXES:
        raise DataError(
            f"{given}: no such file or folder. If it is a configuration or a revision of a data set on the hub: "
            f"neither can be named here. {_save_first(finer['name'], finer['configuration'], finer['revision'])}"
        )
    if has_magic(given):
        return _files(select_by_pattern(given, split), item)
    return Sources([FileSource(path, item)], [])


def _files(selection: Selection, item: int) -> Sources:
    return Sources([FileSource(path, item) for path in selection.taken], selection.left_out)


def _save_first(name: str, configuration: str | None, revision: str | None = None) -> str:
    """Tell how a configuration or a revision becomes a file."""
    arguments = [repr(name), *([repr(configuration)] if configuration else []), "split='train'"]
    arguments += [f"revision={revision!r}"] if revision else []
    code = f"from datasets import load_dataset; load_dataset({', '.join(arguments)}).to_parquet('train.parquet')"
    return f'Save it first, and give that file: python -c "{code}"'
