"""Text from a checkpoint."""

import dataclasses
from typing import TYPE_CHECKING, Any, TextIO

import torch

from infmoe.errors import InfMoEError
from infmoe.hf.clock import TokenClock
from infmoe.layers import NoiseKey
from infmoe.layers.point import Point

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEFAULT_NEW_TOKENS = 100


def generate_text(
    model: Any,
    tokenizer: "PreTrainedTokenizerFast",
    prompt: str,
    point: Point,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    stream_to: TextIO | None = None,
    clock: TokenClock | None = None,
) -> str:
    """Continue `prompt`, with a key-value cache; the same seed gives the same text.

    Args:
        model: an `InfMoEForCausalLM`, in eval mode.
        tokenizer: its tokenizer.
        prompt: the text to continue; empty: start a document.
        point: the dials.
        max_new_tokens: None: 100, or what the context still holds.
        temperature: 0 takes the likeliest token each time.
        top_k: tokens are drawn from this many likeliest.
        seed: of the routing's noise and of the drawing of tokens.
        stream_to: where the text goes as it appears.
        clock: is told when each token came out.

    Returns:
        Prompt and continuation.

    Raises:
        InfMoEError: a prompt that leaves no room in the context, or a dial that the model does not have.
    """
    ids, wanted = request(model, tokenizer, prompt, max_new_tokens)
    if not temperature >= 0:
        raise InfMoEError(f"temperature must be 0 or more, got {temperature}")
    device = next(model.parameters()).device
    input_ids = torch.tensor([ids], device=device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    routing = dataclasses.replace(point.routing(max_stats_tokens=1), key=NoiseKey(seed=seed))
    streamer = _streamer(tokenizer, stream_to) if stream_to is not None else None
    torch.manual_seed(seed)
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=wanted,
        pad_token_id=tokenizer.eos_token_id,
        routing=routing,
        streamer=streamer,
        stopping_criteria=None if clock is None else [clock],
        **sampling,
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def request(
    model: Any, tokenizer: "PreTrainedTokenizerFast", prompt: str, max_new_tokens: int | None
) -> tuple[list[int], int]:
    """The token ids of a prompt, and how many new ones follow; see `generate_text`.

    Raises:
        InfMoEError: they do not fit the context.
    """
    context = model.config.max_position_embeddings
    ids = tokenizer(prompt)["input_ids"] if prompt else _document_start(model, tokenizer)
    room = context - len(ids)
    wanted = min(DEFAULT_NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens
    if room < 1:
        raise InfMoEError(
            f"the prompt has {len(ids)} tokens and the model's context {context}: shorten it to {context - 1} or fewer"
        )
    if not 1 <= wanted <= room:
        raise InfMoEError(
            f"max_new_tokens must lie in 1 .. {room}, which the context of {context} leaves after a prompt "
            f"of {len(ids)} tokens, got {wanted}"
        )
    return ids, wanted


def _document_start(model: Any, tokenizer: Any) -> list[int]:
    """The token that precedes every document, as `infmoe.data` writes them."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else model.config.bos_token_id
    if end is None:
        raise InfMoEError("neither tokenizer nor model names an end-of-text token: give a prompt")
    return [end]


def _streamer(tokenizer: Any, target: TextIO) -> Any:
    """transformers' TextStreamer, writing to `target`."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            target.write(text + ("\n" if stream_end else ""))
            target.flush()

    return Streamer(tokenizer, skip_special_tokens=True)
