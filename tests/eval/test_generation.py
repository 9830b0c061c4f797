"""Text from a checkpoint: what decides it, and how it is made."""

import io
from types import SimpleNamespace

import pytest
import torch

from infmoe.errors import InfMoEError
from infmoe.eval.generation import generate_text
from infmoe.layers import NoiseKey
from infmoe.layers.point import Point

PROMPT = "abc de"


@pytest.fixture(scope="module")
def tokenizer(opened):
    return opened.tokenizer()


def test_the_seed_decides(opened, tokenizer):
    texts = [generate_text(opened.model, tokenizer, PROMPT, Point(2, 0.25), seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith(PROMPT)


def test_the_noise_is_seeded_too(opened, tokenizer):
    """With the likeliest token taken each time, only the routing is left to differ."""

    def text(seed, **dials):
        return generate_text(opened.model, tokenizer, PROMPT, Point(**dials), temperature=0, seed=seed)

    assert text(0, num_samples=1) == text(0, num_samples=1)
    assert len({text(seed, num_samples=1) for seed in range(6)}) > 1
    assert len({text(seed, mode="mu") for seed in range(6)}) == 1


@pytest.mark.parametrize("point", [Point(2, 0.25), Point(keep_ratio=0.5, mode="mu")])
def test_the_likeliest_tokens_are_those_of_a_plain_loop(opened, tokenizer, point):
    """Without a cache, and with the position in the key of the noise: caching changes no text."""
    ids = tokenizer(PROMPT)["input_ids"]
    routing = point.routing()
    key = NoiseKey(seed=4)
    with torch.no_grad():
        while len(ids) < 20:
            logits = opened.model(
                input_ids=torch.tensor([ids]),
                use_cache=False,
                routing=type(routing)(**{**vars(routing), "key": key}),
            ).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == opened.model.config.eos_token_id:
                break
    text = generate_text(
        opened.model,
        tokenizer,
        PROMPT,
        point,
        max_new_tokens=20 - len(tokenizer(PROMPT)["input_ids"]),
        temperature=0,
        seed=4,
    )
    assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_each_token_is_read_once(opened, tokenizer, monkeypatch):
    lengths = []
    forward = opened.model.transformer.forward

    def counting(input_ids, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(opened.model.transformer, "forward", counting)
    generate_text(opened.model, tokenizer, PROMPT, Point(), max_new_tokens=6)
    assert lengths[0] == len(tokenizer(PROMPT)["input_ids"])
    assert len(lengths) > 1
    assert set(lengths[1:]) == {1}


def test_text_appears_while_it_is_made(opened, tokenizer, monkeypatch):
    passes = []  # forward passes before each piece of text
    forward = opened.model.transformer.forward
    count = 0

    def counting(*args, **kwargs):
        nonlocal count
        count += 1
        return forward(*args, **kwargs)

    class Target(io.StringIO):
        def write(self, text):
            passes.append(count)
            return super().write(text)

    monkeypatch.setattr(opened.model.transformer, "forward", counting)
    target = Target()
    text = generate_text(opened.model, tokenizer, PROMPT, Point(), stream_to=target)
    assert target.getvalue() == text + "\n"
    assert passes[0] < passes[1] <= passes[-1] == count


def test_an_empty_prompt_starts_a_document(opened, tokenizer, monkeypatch):
    seen = []
    generate = opened.model.generate
    monkeypatch.setattr(opened.model, "generate", lambda ids, **k: seen.append(ids) or generate(ids, **k))
    text = generate_text(opened.model, tokenizer, "", Point(), seed=1)
    assert seen[0].tolist() == [[tokenizer.convert_tokens_to_ids("<|endoftext|>")]]
    assert text
    assert "endoftext" not in text


def test_the_context_bounds_prompt_and_text(opened, tokenizer):
    long = " ".join(["zq"] * 40)
    with pytest.raises(InfMoEError, match="context 32: shorten it to 31"):
        generate_text(opened.model, tokenizer, long, Point())
    length = len(tokenizer(PROMPT)["input_ids"])
    for wanted in (0, 33 - length):
        with pytest.raises(InfMoEError, match=rf"1 \.\. {32 - length}, .* got {wanted}"):
            generate_text(opened.model, tokenizer, PROMPT, Point(), max_new_tokens=wanted)
    generate_text(opened.model, tokenizer, PROMPT, Point(), max_new_tokens=32 - length)


@pytest.mark.parametrize("temperature", [-1.0, float("nan")])
def test_temperature(opened, tokenizer, temperature):
    with pytest.raises(InfMoEError, match="temperature must be 0 or more"):
        generate_text(opened.model, tokenizer, PROMPT, Point(), temperature=temperature)


def test_nothing_to_start_with(opened, monkeypatch):
    monkeypatch.setattr(opened.model.config, "bos_token_id", None)
    with pytest.raises(InfMoEError, match="give a prompt"):
        generate_text(opened.model, SimpleNamespace(eos_token_id=None), "", Point())
