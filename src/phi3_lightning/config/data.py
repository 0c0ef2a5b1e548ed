"""``data``: the files, how their rows are read and tokenised, and how they are batched."""

from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args

from phi3_lightning.config.checks import require, require_types
from phi3_lightning.errors import ConfigError
from phi3_lightning.files import local_path
from phi3_lightning.hub import split_revision

Files = str | list[str]
Split = Literal["train", "val", "test", "predict"]
SPLITS: Final[tuple[Split, ...]] = get_args(Split)
Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "preference", "kto", "text", "tokens"]

FORMATS: Final[dict[str, tuple[str, ...]]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
    "tokens": ("input_ids", "labels"),
    "text": ("text",),
}
"""The fields that a row of each format has; a prompt needs only the first of them, a pair both."""
CHAT_FORMATS: Final = ("messages", "sharegpt", "alpaca", "prompt_completion")

SYSTEM: Final = ("system", "system_prompt")
TOOLS: Final = ("tools", "functions")  # the second is OpenAI's older name
MASKS: Final = ("assistant_masks", "completion_mask", "loss_mask")
_CHAT: Final = frozenset((*SYSTEM, *TOOLS))
_ALPACA: Final = frozenset({"instruction", "input", "output", "history"})
_ANY_CHAT: Final = _CHAT | _ALPACA | {"messages", "conversations", "prompt", "completion"}
_LAYOUT: Final = ("attention_mask", "position_ids", "token_type_ids", "seq_lengths")

FIELDS: Final[dict[str, frozenset[str]]] = {
    "messages": _CHAT | {"messages"},
    "sharegpt": _CHAT | {"conversations"},
    "alpaca": _CHAT | _ALPACA,
    "prompt_completion": _CHAT | {"prompt", "completion"},
    "preference": _ANY_CHAT - {"output", "completion"} | {"chosen", "rejected"},
    "kto": _ANY_CHAT | {"label"},
    "tokens": frozenset(("input_ids", "labels", *_LAYOUT, *MASKS)),
    "text": frozenset({"text"}),
}
"""The fields that a row of each format may have."""

_COLUMNS = frozenset().union(*FIELDS.values())
_MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "train")
_ROLES = ("system", "user", "assistant", "tool")
_LEAST = {"max_length": 2, "batch_size": 1, "predict_batch_size": 1, "num_workers": 0, "num_proc": 1}


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """What determines, besides the tokenizer, how a row is read and tokenised."""

    format: Format = "auto"
    """The format of the rows. auto: recognised from their fields."""
    columns: dict[str, str] | None = None
    """Other names for a format's fields, such as {prompt: question, completion: answer}."""
    message_keys: dict[str, str] | None = None
    """Other names for the keys of each message, such as {role: speaker, content: text}; also for reasoning_content,
    tool_calls, and train, the key that says whether a message is trained."""
    conversation_column: str | None = None
    """For tables of one message a row: the column that identifies the conversation."""
    role_column: str | None = None
    """For such tables: the column of the speaker."""
    content_column: str | None = None
    """For such tables: the column of the message's text."""
    order_column: str | None = None
    """For such tables: the column to sort messages by, numbers or ISO times. null: the order of the file."""
    role_map: dict[str, str] | None = None
    """Other names for roles, such as {customer: user, agent: assistant}."""
    repeated_role: Literal["refuse", "merge"] = "refuse"
    """Whether neighbouring turns of one role make a bad row, or one turn."""
    system: Literal["keep", "merge_into_user", "refuse"] = "keep"
    """What becomes of system messages, which some templates do not support."""
    tools: Literal["auto", "render", "native", "refuse", "drop"] = "auto"
    """What becomes of tools, their calls and results, and of reasoning. native: the chat template writes tools in its
    own way, and reasoning is text; render: text by the convention of Hermes; refuse: a bad row; drop: left out. auto:
    native where the chat template has a way of its own, else render."""
    special_text: Literal["plain", "refuse"] = "plain"
    """Whether the text of a special token within a content is plain text or a bad row. It is never a turn."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Whose contents are trained: all of the assistant's, its last, or everyone's. Messages with weight: 0,
    train: false or another tool's key for it never are, nor is the prompt of a preference."""
    empty_answer: Literal["keep", "drop"] = "keep"
    """Whether a chat of which an empty answer would be trained is kept and counted, or left out. An empty answer
    teaches the model to say nothing."""
    max_length: int = 2048
    """Maximum number of tokens in a row; for pairs, in each of the two conversations, and a row holds twice as many."""
    truncation: Literal["drop", "truncate_end", "truncate_turns", "split"] = "drop"
    """What becomes of longer chats: left out and counted, cut at the end, shortened by whole early exchanges, or cut
    into pieces, except for preferences. Both sides of a pair are treated alike."""
    group_by: str | None = None
    """Column of a customer, document or other source, whose rows stay together where val_fraction takes rows from the
    training data."""

    def __post_init__(self) -> None:
        require_types("data", self)
        self._check_names()
        for alias, role in (self.role_map or {}).items():
            if role not in _ROLES:
                raise ConfigError(f"data.role_map: {alias!r} maps to {role!r}; roles are {', '.join(_ROLES)}")
        if self.conversation_column is not None and self.format not in ("auto", "messages"):
            raise ConfigError(
                f"data.format: {self.format!r} is given, and data.conversation_column says that rows are messages; "
                "leave one of them out"
            )
        table = ("conversation_column", "role_column", "content_column")
        missing = [name for name in table if getattr(self, name) is None]
        if (0 < len(missing) < len(table)) or (missing and self.order_column is not None):
            raise ConfigError(
                f"data.{missing[0]}: not given; a table of one message a row needs data.conversation_column, "
                "data.role_column and data.content_column"
            )

    def _check_names(self) -> None:
        for name in self.columns or {}:
            if name not in _COLUMNS:
                raise ConfigError(f"data.columns: {name!r} is not a field of any format; known are {sorted(_COLUMNS)}")
            if self.format != "auto" and name not in FIELDS[self.format]:
                raise ConfigError(
                    f"data.columns: {name!r} is not a field of data.format {self.format}, which has "
                    f"{sorted(FIELDS[self.format])}; leave it out, or name another format"
                )
        for name in self.message_keys or {}:
            if name not in _MESSAGE_KEYS:
                raise ConfigError(f"data.message_keys: {name!r} is not known; known are {', '.join(_MESSAGE_KEYS)}")
        if self.conversation_column is not None and self.message_keys:
            raise ConfigError(
                "data.message_keys: leave it out; data.conversation_column, data.role_column and "
                "data.content_column name the columns of a table of one message a row"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig(RowOptions):
    """The options of ``ChatDataModule``.

    Raises:
        ConfigError: If a value is out of its range, or two contradict each other.
    """

    train: Files | None = None
    """Training data: a file, folder, glob pattern, data set on the hub (owner/name:split, or with a configuration and a
    revision owner/name/configuration@revision:split), or several. Of the splits in a folder or pattern, each option
    takes its own."""
    mixture: list[float] | None = None
    """The share of each of several train data. null: all their rows."""
    val: Files | None = None
    """Validation data. null: a part of the training data, see val_fraction."""
    val_fraction: float = 0.05
    """The share of the training rows that validates where val is null. 0: no validation."""
    test: Files | None = None
    """Test data. null: the validation data."""
    predict: Files | None = None
    """Prompts for predict; an answer at the end of a row is left out."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, owner/name or owner/name@revision. The command line fills in model.base."""
    revision: str | None = None
    """Branch, tag or commit of the tokenizer on the hub, where data.tokenizer names none."""
    chat_template: str | None = None
    """A file with a Jinja chat template, in UTF-8. null: the tokenizer's own."""
    packing: bool = True
    """Whether several chats share a row, without seeing each other."""
    batch_size: int = 4
    """Rows of a micro-batch."""
    predict_batch_size: int = 16
    """Prompts that predict answers together: more are faster, and take more memory."""
    max_tokens_per_batch: int | Literal["auto"] | None = None
    """Maximum number of tokens in a micro-batch, padding included, instead of batch_size. auto: in fit as many rows
    as the device's memory holds, by calculation with the largest, and trainer.accumulate_grad_batches changes so that
    an optimiser step keeps its rows; validation on a GPU gets more. A script needs callbacks.AutoBatchSize in its
    Trainer for it."""
    streaming: bool = False
    """Whether training data are tokenised during training, for sets larger than the disk. Needs trainer.max_steps;
    packs and shuffles within a buffer only, and reads again from the beginning to resume."""
    num_workers: int = 2
    """Processes that collate batches ahead."""
    num_proc: int = 1
    """Processes that tokenise; the result does not depend on it."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """Whether rows that cannot be used are an error, or left out and counted."""
    cache_dir: str | None = None
    """Folder of tokenised data. null: the cache of datasets."""
    seed: int | None = None
    """Decides split, mixture and order. null: the global seed of seed_everything, or 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is not None:
            name, revision = split_revision("data.tokenizer", self.tokenizer, self.revision, "data.revision")
            object.__setattr__(self, "tokenizer", name)
            object.__setattr__(self, "revision", revision)
        for name in ("cache_dir", "chat_template"):
            if getattr(self, name) is not None:
                local_path(f"data.{name}", getattr(self, name))
        for name, least in _LEAST.items():
            require(getattr(self, name) >= least, f"data.{name}", getattr(self, name), f"give {least} or more")
        require(0 <= self.val_fraction < 1, "data.val_fraction", self.val_fraction, "give 0 or more and less than 1")
        tokens = self.max_tokens_per_batch
        if isinstance(tokens, int) and tokens < self.max_length:
            raise ConfigError(
                f"data.max_tokens_per_batch: {tokens} holds no row of data.max_length "
                f"{self.max_length}; give {self.max_length} or more"
            )
        if self.mixture is not None:
            count = len(self.train) if isinstance(self.train, list) else 1
            fits = len(self.mixture) == count and min(self.mixture) > 0
            require(fits, "data.mixture", self.mixture, "give one positive number for each of data.train")
        if self.streaming and self.val is None and self.val_fraction > 0:
            raise ConfigError("data.val_fraction: a stream has no fraction; give data.val, or data.val_fraction: 0")
        if self.streaming and self.mixture is not None:
            raise ConfigError("data.mixture: streamed data are not mixed; set data.streaming: false, or leave it out")
        if self.group_by is not None and (self.val is not None or self.val_fraction == 0):
            raise ConfigError(
                f"data.group_by: {self.group_by!r} only decides which training rows validate; leave out data.val and "
                "give a data.val_fraction above 0, or leave out data.group_by"
            )

    def row_options(self, **changes: Any) -> RowOptions:
        """Return the options that determine tokens, with changes."""
        return RowOptions(**({field.name: getattr(self, field.name) for field in fields(RowOptions)} | changes))

    def files(self, split: Split) -> Files | None:
        """Return the files of a split, as the user wrote them."""
        return {"train": self.train, "val": self.val, "test": self.test, "predict": self.predict}[split]

    @property
    def tested(self) -> Split:
        """The split that ``test`` uses: the validation data where there are no test data."""
        return "val" if self.test is None else "test"

    def needed(self, stage: str | None) -> list[Split]:
        """Return the splits whose files a stage reads. Validation data may be a share of the training data.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None: all splits with files.

        Raises:
            ConfigError: If one of them has no files.
        """
        available: list[Split] = [split for split in SPLITS if self.files(split) is not None]
        if stage is None:
            return available
        held_out: Split = "val" if self.val is not None or self.val_fraction == 0 else "train"
        needed: dict[str, list[Split]] = {
            "fit": ["train"] if self.val is None else ["train", "val"],
            "validate": [held_out],
            "test": [held_out] if self.tested == "val" and held_out in available else ["test"],
            "predict": ["predict"],
        }
        for split in needed[stage]:
            if split not in available:
                raise ConfigError(f"data.{split}: not given; name a file or a data set to {stage} with")
        return needed[stage]

    def prepared(self, stage: str | None) -> list[Split]:
        """Return the splits to tokenise before a stage begins: those that it needs, without streamed training data."""
        return [split for split in self.needed(stage) if not (self.streaming and split == "train")]
