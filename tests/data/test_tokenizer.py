"""Tokenizers: trained, GPT-2's, existing; and the cutting of long texts."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from infmoe.data import EOT, GPT2Files, TokenData, TokenizerFile, TrainBPE, load_tokenizer, parse_tokenizer
from infmoe.data.tokenizer import pieces, splits_at_words
from infmoe.errors import InfMoEError

TRAINED = TrainBPE(400).build(["def f(x):\n    return  x's  value, 12 or\n\n\tso", "the quick  brown fox \n\n \n"] * 3)


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_trained_tokenizer_gives_any_text_back() -> None:
    text = "naïve 世界 \x00\t\n  🙂 <|endoftext|>"
    assert TRAINED.decode(TRAINED.encode(text).ids, skip_special_tokens=False) == text


def test_trained_tokenizer_has_the_size_asked_for() -> None:
    assert TrainBPE(260).build(["aaaa bbbb cccc dddd " * 4]).get_vocab_size() == 260


def test_training_is_deterministic(texts: tuple[str, ...]) -> None:
    assert TrainBPE(350).build(texts).to_str() == TrainBPE(350).build(texts).to_str()


@given(
    text=st.text(st.sampled_from("ab1'st.,! \n\t\r\x0b\x1c\x85\xa0\u2028\u3000é世\u0301🙂<|>"), max_size=40),
    length=st.integers(1, 12),
)
@example(text="a   b", length=2)
def test_pieces_have_the_words_of_the_whole(text: str, length: int) -> None:
    # Equal words mean equal tokens, whatever a tokenizer has learned to merge within them.
    def words(part: str) -> list[str]:
        return [word for word, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(part)]

    assert [word for piece in pieces(text, length) for word in words(piece)] == words(text)


def test_pieces_are_barely_longer_than_asked() -> None:
    cut = list(pieces("four char word s in li\nes " * 100, 50))
    assert all(50 <= len(piece) < 60 for piece in cut[:-1])


def test_gpt2s_kind_may_be_cut_at_words() -> None:
    assert splits_at_words(TRAINED)


@pytest.mark.parametrize("kind", ["metaspace", "prefix space", "normalised", "added token"])
def test_other_kinds_may_not_be_cut_at_words(kind: str) -> None:
    tokenizer = Tokenizer.from_str(TRAINED.to_str())
    match kind:
        case "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        case "prefix space":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        case "normalised":
            tokenizer.normalizer = normalizers.NFC()
        case "added token":
            tokenizer.add_tokens([AddedToken("two words")])
    assert not splits_at_words(tokenizer)


def test_gpt2_files_make_the_tokenizer_they_were_taken_from(data: TokenData, gpt2_folder: Path) -> None:
    text = "The quick brown fox\njumps  over 12 dogs."
    tokenizer = parse_tokenizer(str(gpt2_folder)).build(())
    assert tokenizer.encode(text).ids == load_tokenizer(data.folder).encode(text)
    assert tokenizer.token_to_id(EOT) == data.eot_id


def test_gpt2_files_may_have_openais_names(gpt2_folder: Path) -> None:
    (gpt2_folder / "vocab.json").rename(gpt2_folder / "encoder.json")
    (gpt2_folder / "merges.txt").rename(gpt2_folder / "vocab.bpe")
    assert parse_tokenizer(str(gpt2_folder)) == GPT2Files(gpt2_folder / "encoder.json", gpt2_folder / "vocab.bpe")


@pytest.mark.skipif(
    "INFMOE_GPT2_BPE" not in os.environ,
    reason="INFMOE_GPT2_BPE names no folder with GPT-2's vocabulary and merges",
)
def test_gpt2s_own_files_make_gpt2s_tokens() -> None:
    tokenizer = parse_tokenizer(os.environ["INFMOE_GPT2_BPE"]).build(())
    ids = tokenizer.encode("Hello world! The quick brown fox.").ids
    assert ids == [15496, 995, 0, 383, 2068, 7586, 21831, 13]
    assert (tokenizer.get_vocab_size(), tokenizer.token_to_id(EOT)) == (50257, 50256)


def test_existing_tokenizer_does_not_truncate_or_pad(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(TRAINED.to_str())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=1000)
    loaded = parse_tokenizer(str(save(tokenizer, tmp_path))).build(())
    assert loaded.encode("the quick brown fox").ids == TRAINED.encode("the quick brown fox").ids


def test_folder_with_a_tokenizer_json(tmp_path: Path) -> None:
    path = save(TRAINED, tmp_path)
    assert parse_tokenizer(str(tmp_path)) == TokenizerFile(path)


def test_saved_tokenizer_loads_in_transformers(data: TokenData) -> None:
    tokenizer = AutoTokenizer.from_pretrained(data.folder / "tokenizer")
    assert tokenizer.decode(tokenizer("the  quick , fox\n")["input_ids"]) == "the  quick , fox\n"
    assert {
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    } == {data.eot_id}


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InfMoEError, match="no tokenizer in"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("size", [256, 65537])
def test_vocab_size_out_of_range(size: int) -> None:
    with pytest.raises(InfMoEError, match=r"257 \.\. 65536"):
        TrainBPE(size)


@pytest.mark.parametrize(
    ("text", "message"),
    [("bpe:many", "unknown tokenizer"), ("nowhere", "unknown tokenizer"), (".", "holds no tokenizer")],
)
def test_tokenizer_that_is_not_there(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InfMoEError, match=message):
        parse_tokenizer(text)


def test_missing_merges(gpt2_folder: Path) -> None:
    (gpt2_folder / "merges.txt").unlink()
    with pytest.raises(InfMoEError, match=r"vocab\.json and merges\.txt"):
        parse_tokenizer(str(gpt2_folder))


def test_gpt2_file_that_cannot_be_read(gpt2_folder: Path) -> None:
    spec = GPT2Files(gpt2_folder / "vocab.json", gpt2_folder / "gone.txt")
    with pytest.raises(InfMoEError, match=r"cannot read .*gone\.txt"):
        spec.describe()


def test_merges_of_another_tokenizer(gpt2_folder: Path) -> None:
    with (gpt2_folder / "merges.txt").open("a") as file:
        file.write("qq zz\n")
    with pytest.raises(InfMoEError, match="do not match"):
        parse_tokenizer(str(gpt2_folder)).build(())


def test_merges_cut_short(gpt2_folder: Path) -> None:
    merges = gpt2_folder / "merges.txt"
    merges.write_text("".join(merges.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(InfMoEError, match="do not match"):
        parse_tokenizer(str(gpt2_folder)).build(())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "{", "is not JSON"),
        ("vocab.json", "[1]", "does not map tokens to ids"),
        ("merges.txt", "a b c\n", "no pair"),
    ],
)
def test_malformed_gpt2_file(name: str, content: str, message: str, gpt2_folder: Path) -> None:
    (gpt2_folder / name).write_text(content)
    with pytest.raises(InfMoEError, match=message):
        parse_tokenizer(str(gpt2_folder)).build(())


def test_gpt2_vocab_without_end_of_text(gpt2_folder: Path) -> None:
    vocab = json.loads((gpt2_folder / "vocab.json").read_text())
    del vocab[EOT]
    (gpt2_folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(InfMoEError, match=r"no '<\|endoftext\|>'"):
        parse_tokenizer(str(gpt2_folder)).build(())


def test_existing_tokenizer_without_end_of_text(tmp_path: Path) -> None:
    path = save(Tokenizer(models.BPE({"a": 0}, [])), tmp_path)
    with pytest.raises(InfMoEError, match=r"no '<\|endoftext\|>'"):
        TokenizerFile(path).build(())


def test_existing_tokenizer_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InfMoEError, match=r"not a tokenizer\.json"):
        parse_tokenizer(str(tmp_path)).build(())
