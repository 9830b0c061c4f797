"""Log-likelihoods of continuations: what an item's texts begin with runs once, and batches are sorted by length.

B rows, T tokens of a row, M scored tokens of a batch, P of them at a time, V vocabulary.

A row holds a trunk, the context that several continuations share, and behind it the rest of each as a branch: a token
sees the trunk and its own branch, and counts its position from the trunk's end. So a branch is what it would be alone,
noise included.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from infmoe.errors import InfMoEError
from infmoe.layers import NoiseKey, Routing

_MAX_LOGITS = 2**25  # at once, 128 MiB in float32: a real vocabulary times all positions would fill a GPU
_MAX_WINDOWS = 4  # in one row
X = TypeVar("X")


@dataclass(frozen=True)
class Request:
    """What is to be scored.

    Attributes:
        context: token ids, at least one; cut from the left where it does not fit the window.
        continuation: token ids, at least one. One that is longer than the window is scored in pieces of half a
            window, each behind as much of what precedes it as fits.
        stream: the noise stream of the item that it belongs to.
        name: what an error calls it.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    stream: int
    name: str = "a request"


@dataclass(frozen=True)
class Score:
    """What was found.

    Attributes:
        log_likelihood: of the whole continuation, in nats.
        greedy: whether each of its tokens was the likeliest.
    """

    log_likelihood: float
    greedy: bool


@dataclass
class _Branch:
    """What follows a row's trunk: the index of its request, tokens, and how many of them, the last ones, are scored."""

    request: int
    tokens: tuple[int, ...]
    scored: int


@dataclass
class _Row:
    trunk: tuple[int, ...]
    stream: int
    branches: list[_Branch]

    @property
    def length(self) -> int:
        return len(self.trunk) + sum(len(branch.tokens) - 1 for branch in self.branches)


@torch.no_grad()
def score(
    model: Any,
    requests: Sequence[Request],
    routing: Routing | None = None,
    *,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Score]:
    """Score every request; the result depends on neither order nor batch size, but for rounding.

    Args:
        model: an `InfMoEForCausalLM`, in eval mode.
        requests: in any order.
        routing: dials and mode; its key is replaced.
        seed: of the noise.
        batch_size: rows per forward pass.
        progress: told how many requests are done.

    Raises:
        InfMoEError: an empty context or continuation, or a model that gives NaN.
    """
    for request in requests:
        if not request.context or not request.continuation:
            raise InfMoEError(f"{request.name} has an empty context or continuation: leave it out")
    rows = sorted(_rows(requests, model.config.max_position_embeddings), key=lambda row: row.length, reverse=True)
    found: list[Score | None] = [None] * len(requests)
    done = 0
    for start in range(0, len(rows), batch_size):
        for index, result in _score_batch(model, rows[start : start + batch_size], routing or Routing(), seed):
            before = found[index]
            if before is None:
                found[index] = result
                done += 1
            else:  # a piece of the same continuation
                total = before.log_likelihood + result.log_likelihood
                found[index] = Score(total, before.greedy and result.greedy)
        progress(done)
    scores = [result for result in found if result is not None]
    for request, one in zip(requests, scores, strict=True):
        if not math.isfinite(one.log_likelihood):
            raise InfMoEError(f"{request.name} has no finite log-likelihood: the model has diverged, take another one")
    return scores


def _rows(requests: Sequence[Request], window: int) -> list[_Row]:
    """Each item's pieces: those of one context as one row, and all as one where contexts begin alike (WinoGrande)."""
    by_stream: dict[int, dict[tuple[int, ...], list[_Branch]]] = {}
    for i, request in enumerate(requests):
        for context, continuation in _pieces(request, window):
            kept = context[-(window + 1 - len(continuation)) :]
            branch = _Branch(i, continuation, len(continuation))
            by_stream.setdefault(request.stream, {}).setdefault(kept, []).append(branch)
    rows = []
    for stream, by_context in by_stream.items():
        trunk = common_start(list(by_context))
        if 2 * len(trunk) < max(map(len, by_context)):
            rows += [_Row(context, stream, branches) for context, branches in by_context.items()]
            continue
        branches = [
            _Branch(branch.request, context[len(trunk) :] + branch.tokens, branch.scored)
            for context, own in by_context.items()
            for branch in own
        ]
        rows.append(_Row(trunk, stream, branches))
    return [part for row in rows for part in _bounded(row, _MAX_WINDOWS * window)]


def _bounded(row: _Row, limit: int) -> Iterator[_Row]:
    """The row in parts of about `limit` tokens: a mask grows with the square of its length."""
    part = _Row(row.trunk, row.stream, [])
    for branch in row.branches:
        if part.branches and part.length + len(branch.tokens) - 1 > limit:
            yield part
            part = _Row(row.trunk, row.stream, [])
        part.branches.append(branch)
    yield part


def common_start(sequences: Sequence[Sequence[X]]) -> tuple[X, ...]:
    """What all the sequences begin with."""
    same = itertools.takewhile(lambda here: len(set(here)) == 1, zip(*sequences, strict=False))
    return tuple(here[0] for here in same)


def _pieces(request: Request, window: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The request, or its parts where its continuation is longer than the window."""
    whole = request.context + request.continuation
    length = len(request.continuation) if len(request.continuation) <= window else max(1, window // 2)
    for start in range(len(request.context), len(whole), length):
        yield whole[:start], whole[start : start + length]


def _score_batch(model: Any, rows: Sequence[_Row], routing: Routing, seed: int) -> list[tuple[int, Score]]:
    device = model.device
    length = max(row.length for row in rows)
    tokens_BT = torch.zeros(len(rows), length, dtype=torch.int64)
    position_BT = torch.zeros(len(rows), length, dtype=torch.int64)
    branch_BT = torch.full((len(rows), length), -2, dtype=torch.int64)  # padding sees itself alone
    taken: list[int] = []  # where, over the flattened batch, each scored token is predicted
    targets: list[int] = []
    spans: list[tuple[int, int]] = []  # (request, scored tokens)
    for b, row in enumerate(rows):
        n = len(row.trunk)
        tokens_BT[b, :n] = torch.tensor(row.trunk)
        position_BT[b, :n] = torch.arange(n)
        branch_BT[b, :n] = -1
        at = n
        for number, branch in enumerate(row.branches):
            inner = len(branch.tokens) - 1
            tokens_BT[b, at : at + inner] = torch.tensor(branch.tokens[:-1], dtype=torch.int64)
            position_BT[b, at : at + inner] = torch.arange(n, n + inner)
            branch_BT[b, at : at + inner] = number
            predicts = [b * length + n - 1, *range(b * length + at, b * length + at + inner)]
            taken += predicts[-branch.scored :]
            targets += branch.tokens[-branch.scored :]
            spans.append((branch.request, branch.scored))
            at += inner
    key = NoiseKey(seed=seed, stream=torch.tensor([row.stream for row in rows], device=device))
    hidden_BTD = model.transformer(
        input_ids=tokens_BT.to(device),
        attention_mask=_mask(branch_BT.to(device), model.dtype),
        position_ids=position_BT.to(device),
        use_cache=False,
        routing=dataclasses.replace(routing, key=key, max_stats_tokens=1),
    ).last_hidden_state
    hidden_MD = hidden_BTD.flatten(0, 1)[torch.tensor(taken, device=device)]
    target_M = torch.tensor(targets, device=device)
    likelihood_M, greedy_M = _likelihoods(model.lm_head, hidden_MD, target_M, model.config.vocab_size)
    results, begin = [], 0
    values, hits = likelihood_M.cpu().double(), greedy_M.cpu()
    for index, count in spans:
        part = slice(begin, begin + count)
        results.append((index, Score(float(values[part].sum()), bool(hits[part].all()))))
        begin += count
    return results


def _likelihoods(head: Any, hidden_MD: Tensor, target_M: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Each scored token's log-likelihood, and whether it is the likeliest, (M,) each; few positions at a time."""
    likelihoods, hits = [], []
    positions = max(1, _MAX_LOGITS // vocab_size)
    for hidden_PD, target_P in zip(hidden_MD.split(positions), target_M.split(positions), strict=True):
        logits_PV = head(hidden_PD).float()
        likelihoods.append(logits_PV.gather(1, target_P[:, None])[:, 0] - logits_PV.logsumexp(dim=-1))
        hits.append(logits_PV.argmax(dim=-1) == target_P)
    return torch.cat(likelihoods), torch.cat(hits)


def _mask(branch_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Added to the attention's scores, (B, 1, T, T): a token sees what came before in the trunk and its branch."""
    T = branch_BT.shape[1]
    before_TT = torch.ones(T, T, dtype=torch.bool, device=branch_BT.device).tril()
    same_BTT = branch_BT[:, :, None] == branch_BT[:, None, :]
    trunk_B1T = (branch_BT == -1)[:, None, :]
    padding_BT1 = (branch_BT == -2)[:, :, None]
    seen_BTT = before_TT & (same_BTT | (trunk_B1T & ~padding_BT1))
    added_BTT = torch.zeros(seen_BTT.shape, dtype=dtype, device=branch_BT.device)
    return added_BTT.masked_fill_(~seen_BTT, torch.finfo(dtype).min)[:, None]
