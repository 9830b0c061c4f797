"""Byte-level BPE tokenizers: trained on the corpus, GPT-2's from its two files, or any `tokenizer.json`.

Whatever its origin, a data folder holds its tokenizer in `tokenizer/`, as Transformers loads it.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from infmoe.data.shards import MAX_VOCAB, sha256
from infmoe.errors import InfMoEError

if TYPE_CHECKING:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

EOT = "<|endoftext|>"
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILE = "tokenizer.json"
_MIN_VOCAB = 256 + 1
_GPT2_NAMES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_ANGLED = re.compile(r"<.*>", re.DOTALL)
_WORD_END = re.compile(r"(?<=\S)[ \n]")


class TokenizerSpec(Protocol):
    """How to come by a tokenizer."""

    @property
    def eot(self) -> str:
        """The token that precedes every document."""

    def describe(self) -> dict[str, Any]:
        """What the manifest's settings say of it, as JSON values; equal for equal tokenizers only."""

    def build(self, texts: Iterable[str]) -> "Tokenizer":
        """The tokenizer itself; one that is trained is trained on `texts`."""


@dataclass(frozen=True)
class TrainBPE:
    """A byte-level BPE with GPT-2's pre-tokenizer, trained on the corpus's train split.

    Args:
        vocab_size: how many tokens it has at most, the 256 bytes and `<|endoftext|>` included; a small corpus
            may not have that many pairs to merge.

    Raises:
        InfMoEError: `vocab_size` is not in [257, 65536].
    """

    vocab_size: int
    eot: str = EOT

    def __post_init__(self) -> None:
        if not _MIN_VOCAB <= self.vocab_size <= MAX_VOCAB:
            raise InfMoEError(f"vocab size {self.vocab_size} is out of range: give one of {_MIN_VOCAB} .. {MAX_VOCAB}")

    def describe(self) -> dict[str, Any]:
        """See `TokenizerSpec.describe`."""
        return {"kind": "bpe", "vocab_size": self.vocab_size, "eot": self.eot}

    def build(self, texts: Iterable[str]) -> "Tokenizer":
        """See `TokenizerSpec.build`."""
        from tokenizers import models, pre_tokenizers, trainers

        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[self.eot],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer


@dataclass(frozen=True)
class GPT2Files:
    """GPT-2's tokenizer, or one of its kind, from its vocabulary and its merges.

    Args:
        vocab: `vocab.json` (OpenAI's `encoder.json`): token to id.
        merges: `merges.txt` (OpenAI's `vocab.bpe`): one merge a line.
    """

    vocab: Path
    merges: Path
    eot: str = EOT

    @classmethod
    def find(cls, folder: Path) -> "GPT2Files | None":
        """The two files in `folder`, under either pair of names; None when there is no such pair."""
        pairs = ((folder / vocab, folder / merges) for vocab, merges in _GPT2_NAMES)
        return next((cls(*pair) for pair in pairs if all(path.is_file() for path in pair)), None)

    def describe(self) -> dict[str, Any]:
        """See `TokenizerSpec.describe`.

        Raises:
            InfMoEError: a file is missing.
        """
        hashes = {"vocab_sha256": _hash(self.vocab), "merges_sha256": _hash(self.merges)}
        return {"kind": "gpt2", **hashes, "eot": self.eot}

    def build(self, texts: Iterable[str]) -> "Tokenizer":
        """See `TokenizerSpec.build`.

        Raises:
            InfMoEError: a file is missing or malformed, or the two do not belong together.
        """
        from tokenizers import models

        vocab, merges = self._read()
        merged = {left + right for left, right in merges}
        parts = {part for pair in merges for part in pair}
        # Both ways round: tokenizers would panic on a merge of unknown parts, and a merges file cut short
        # shows only in tokens that nothing makes any more.
        stray = (parts | merged) - vocab.keys() or {
            token for token in vocab.keys() - merged if len(token) > 1 and not _ANGLED.fullmatch(token)
        }
        if stray:
            raise InfMoEError(
                f"{self.vocab} and {self.merges} do not match ({min(stray)!r} is in one only): "
                "take both from the same tokenizer"
            )
        if self.eot not in vocab:
            raise InfMoEError(f"{self.vocab} has no {self.eot!r} token: add it, or take the vocabulary of GPT-2")
        return _byte_level(models.BPE(vocab, merges), self.eot)

    def _read(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        try:
            vocab = json.loads(self.vocab.read_bytes())
            lines = self.merges.read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise InfMoEError(f"cannot read {error.filename} ({error.strerror}): give the tokenizer's file") from error
        except ValueError as error:
            raise InfMoEError(f"{self.vocab} is not JSON or {self.merges} not UTF-8 text: {error}") from error
        if not isinstance(vocab, dict) or not all(isinstance(index, int) for index in vocab.values()):
            raise InfMoEError(f"{self.vocab} does not map tokens to ids: give GPT-2's vocab.json or encoder.json")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
        if len(merges) < len(pairs):
            raise InfMoEError(f"{self.merges} has a line that is no pair: give GPT-2's merges.txt or vocab.bpe")
        return vocab, merges


@dataclass(frozen=True)
class TokenizerFile:
    """An existing `tokenizer.json` of the `tokenizers` library.

    Args:
        path: the file.
        eot: which of its tokens ends a text.
    """

    path: Path
    eot: str = EOT

    def describe(self) -> dict[str, Any]:
        """See `TokenizerSpec.describe`.

        Raises:
            InfMoEError: the file is missing.
        """
        return {"kind": "tokenizer.json", "sha256": _hash(self.path), "eot": self.eot}

    def build(self, texts: Iterable[str]) -> "Tokenizer":
        """See `TokenizerSpec.build`.

        Raises:
            InfMoEError: the file is no tokenizer, lacks `eot`, or has more tokens than uint16 can hold.
        """
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(self.path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise InfMoEError(f"{self.path} is not a tokenizer.json that can be read: {error}") from error
        if tokenizer.token_to_id(self.eot) is None:
            raise InfMoEError(f"{self.path} has no {self.eot!r} token: name its end-of-text token (eot)")
        # Such files may carry their model's context length and padding, which would cut and fill documents.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def parse_tokenizer(text: str) -> TokenizerSpec:
    """The tokenizer that a command line names.

    Args:
        text: "bpe:N" to train one of N tokens; a `tokenizer.json`; or a folder that holds one, or GPT-2's
            `vocab.json` and `merges.txt` (or `encoder.json` and `vocab.bpe`).

    Raises:
        InfMoEError: `text` is none of these.
    """
    if text.startswith("bpe:") and text[4:].isdecimal():
        return TrainBPE(int(text[4:]))
    path = Path(text)
    if path.is_dir():
        pair = GPT2Files.find(path)
        if (path / TOKENIZER_FILE).is_file():
            return TokenizerFile(path / TOKENIZER_FILE)
        if pair:
            return pair
        names = " or ".join(f"{vocab} and {merges}" for vocab, merges in _GPT2_NAMES)
        raise InfMoEError(f"{text} holds no tokenizer: put {TOKENIZER_FILE}, or {names}, in it")
    if path.is_file():
        return TokenizerFile(path)
    raise InfMoEError(
        f"unknown tokenizer {text!r}: give 'bpe:N' to train one of N tokens, a tokenizer.json or a folder"
    )


def save_tokenizer(tokenizer: "Tokenizer", folder: Path, *, eot: str, model_max_length: int | None) -> Path:
    """Writes `tokenizer` as a folder that Transformers loads, with `eot` as eos, bos, unk and pad token.

    Args:
        tokenizer: the tokenizer.
        folder: the folder to make.
        eot: its end-of-text token.
        model_max_length: the context length, in tokens, to state in it; None for none.

    Returns:
        The `tokenizer.json` in it.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": eot for role in ("bos", "eos", "pad", "unk")},
    }
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    folder.mkdir()
    # Not tokenizer.save: where the disk is full it raises a bare Exception instead of OSError.
    path = folder / TOKENIZER_FILE
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a prepared data folder.

    Raises:
        InfMoEError: the folder has none.
    """
    inside = Path(folder) / TOKENIZER_FOLDER
    if not (inside / TOKENIZER_FILE).is_file():
        raise InfMoEError(f"no tokenizer in {inside}: give a folder that `infmoe data` made")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(inside)


def splits_at_words(tokenizer: "Tokenizer") -> bool:
    """Whether the tokens of a text are those of its `pieces`, whatever the text.

    Holds for GPT-2's pre-tokenizer alone: none of its tokens has a space or newline right after another
    character than white space, and it looks ahead only from white space. Other pre-tokenizers, normalisers,
    and added tokens that are matched in the text (the special ones are not, here) may reach across.
    """
    from tokenizers import pre_tokenizers

    pre = tokenizer.pre_tokenizer
    return (
        isinstance(pre, pre_tokenizers.ByteLevel)
        and pre.use_regex
        and not pre.add_prefix_space
        and tokenizer.normalizer is None
        and all(token.special for token in tokenizer.get_added_tokens_decoder().values())
    )


def pieces(text: str, length: int) -> Iterator[str]:
    """Cuts `text` at the ends of words into pieces of `length` characters or a little more."""
    start = 0
    while found := _WORD_END.search(text, start + length):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _byte_level(model: "models.BPE", *special: str) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise InfMoEError(f"cannot read {path} ({error.strerror}): give the tokenizer's file") from error
