"""The options of ChatDataModule, typed, with their ranges."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from phi3_lightning.data.fields import FIELDS
from phi3_lightning.errors import ConfigError
from phi3_lightning.files import local_path

Files = str | list[str]
Split = Literal["train", "val", "test", "predict"]
Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokens"]

_COLUMNS = frozenset().union(*FIELDS.values())
_MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "train")
_ROLES = ("system", "user", "assistant", "tool")
_LEAST = {
    "max_length": 2,
    "batch_size": 1,
    "predict_batch_size": 1,
    "num_workers": 0,
    "num_proc": 1,
    "max_tokens_per_batch": 1,
}


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """What decides, beside the tokenizer, how a row is read and tokenised; see ``ChatDataModule``."""

    format: Format = "auto"
    columns: dict[str, str] | None = None
    conversation_id: str | None = None
    role: str | None = None
    content: str | None = None
    order: str | None = None
    message_keys: dict[str, str] | None = None
    roles: dict[str, str] | None = None
    repeated_role: Literal["refuse", "merge"] = "refuse"
    system: Literal["keep", "merge_into_user", "refuse"] = "keep"
    tools: Literal["auto", "render", "native", "refuse", "drop"] = "auto"
    special_text: Literal["plain", "refuse"] = "plain"
    train_on: Literal["assistant", "last", "all"] = "assistant"
    max_length: int = 2048
    overlong: Literal["drop", "truncate_end", "truncate_turns", "split"] = "drop"
    group_by: str | None = None

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ConfigError(f"data.{name}: {getattr(self, name)!r} is not known; give one of {known}.")
        self._check_names()
        for alias, role in (self.roles or {}).items():
            if role not in _ROLES:
                raise ConfigError(f"data.roles: {alias!r} maps to {role!r}; roles are {', '.join(_ROLES)}.")
        if self.conversation_id is not None and self.format not in ("auto", "messages"):
            raise ConfigError(
                f"data.format: {self.format!r} is given, and data.conversation_id says that rows are messages; "
                "leave one of them out."
            )
        table = {"conversation_id": self.conversation_id, "role": self.role, "content": self.content}
        missing = [name for name, column in table.items() if column is None]
        if (0 < len(missing) < len(table)) or (missing and self.order is not None):
            raise ConfigError(
                f"data.{missing[0]}: not given; a table of one message a row needs data.conversation_id, data.role and "
                "data.content."
            )

    def _check_names(self) -> None:
        for name in self.columns or {}:
            if name not in _COLUMNS:
                raise ConfigError(f"data.columns: {name!r} is no field of any format; known are {sorted(_COLUMNS)}.")
            if self.format != "auto" and name not in FIELDS[self.format]:
                raise ConfigError(
                    f"data.columns: {name!r} is no field of data.format {self.format}, which has "
                    f"{sorted(FIELDS[self.format])}; leave it out, or name another format."
                )
        for name in self.message_keys or {}:
            if name not in _MESSAGE_KEYS:
                raise ConfigError(f"data.message_keys: {name!r} is not known; known are {', '.join(_MESSAGE_KEYS)}.")
        if self.conversation_id is not None and self.message_keys:
            raise ConfigError(
                "data.message_keys: leave it out; data.conversation_id, data.role and data.content name the columns of "
                "a table of one message a row."
            )


@dataclass(frozen=True, kw_only=True)
class Options(RowOptions):
    """What ``ChatDataModule`` was given; its docstring says what each option means.

    Raises:
        ConfigError: A value is out of its range, or two contradict each other.
    """

    train: Files | None
    weights: list[float] | None
    val: Files | None
    val_fraction: float
    test: Files | None
    predict: Files | None
    tokenizer: str | None
    revision: str | None
    chat_template: str | None
    packing: bool
    batch_size: int
    predict_batch_size: int
    max_tokens_per_batch: int | Literal["auto"] | None
    streaming: bool
    num_workers: int
    num_proc: int
    on_bad_row: Literal["raise", "skip"]
    cache_dir: str | None
    seed: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tools == "native":
            raise ConfigError(
                "data.tools: native, as the chat template itself writes tools, is not supported yet; set data.tools: "
                "render to write them as text by the convention of Hermes, or drop or refuse."
            )
        for name in ("cache_dir", "chat_template"):
            if getattr(self, name) is not None:
                local_path(f"data.{name}", getattr(self, name))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise ConfigError(f"data.{name}: {value} is too small; give {least} or more.")
        tokens = self.max_tokens_per_batch
        if isinstance(tokens, str) and tokens != "auto":
            raise ConfigError(f"data.max_tokens_per_batch: {tokens!r} is no number; give one, or auto.")
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"data.val_fraction: {self.val_fraction} is not in [0, 1); 0.05 is usual.")
        if isinstance(tokens, int) and tokens < self.max_length:
            raise ConfigError(
                f"data.max_tokens_per_batch: {tokens} holds no row of data.max_length "
                f"{self.max_length}; give {self.max_length} or more."
            )
        if self.weights is not None:
            count = len(self.train) if isinstance(self.train, list) else 1
            if len(self.weights) != count or min(self.weights, default=0) <= 0:
                raise ConfigError(f"data.weights: {self.weights}; give one positive number for each of data.train.")

        if self.streaming and self.val is None and self.val_fraction > 0:
            raise ConfigError("data.val_fraction: a stream has no fraction; give data.val, or data.val_fraction: 0.")
        if self.streaming and self.weights is not None:
            raise ConfigError("data.weights: streamed data are not mixed; set data.streaming: false or leave them out.")
        if self.group_by is not None and (self.val is not None or self.val_fraction == 0):
            raise ConfigError(
                f"data.group_by: {self.group_by!r} only decides which training rows validate; leave out data.val and "
                "give a data.val_fraction above 0, or leave out data.group_by."
            )

    def row_options(self, **changes: Any) -> RowOptions:
        """The part of the options that decides about tokens.

        Args:
            **changes: Other values for some of them.

        Returns:
            A copy.
        """
        return RowOptions(**({field.name: getattr(self, field.name) for field in fields(RowOptions)} | changes))

    def files(self, split: Split) -> Files | None:
        """The files of a split.

        Args:
            split: Which one.

        Returns:
            What was given for it.
        """
        return {"train": self.train, "val": self.val, "test": self.test, "predict": self.predict}[split]

    @property
    def tested(self) -> Split:
        """The split that ``test`` takes: the validation data where there are no test data."""
        return "val" if self.test is None else "test"

    def needed(self, stage: str | None) -> list[Split]:
        """The files that a stage reads. Validation data may be a share of the training data.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None: whatever files are given.

        Returns:
            The splits.

        Raises:
            ConfigError: One of them was not given.
        """
        given: list[Split] = [split for split in ("train", "val", "test", "predict") if self.files(split) is not None]
        if stage is None:
            return given
        held_out: Split = "val" if self.val is not None or self.val_fraction == 0 else "train"
        needed: dict[str, list[Split]] = {
            "fit": ["train"] if self.val is None else ["train", "val"],
            "validate": [held_out],
            "test": [held_out] if self.tested == "val" and held_out in given else ["test"],
            "predict": ["predict"],
        }
        for split in needed[stage]:
            if split not in given:
                raise ConfigError(f"data.{split}: not given; name a file or a data set to {stage} with.")
        return needed[stage]

    def prepared(self, stage: str | None) -> list[Split]:
        """The files that are tokenised before a stage begins.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None: whatever files are given.

        Returns:
            The splits; not the training data where they are streamed.

        Raises:
            ConfigError: A split that is needed was not given.
        """
        return [split for split in self.needed(stage) if not (self.streaming and split == "train")]
