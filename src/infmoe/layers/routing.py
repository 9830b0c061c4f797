"""Routing: everything a caller may say about one forward pass, in one frozen value.

B batch rows, T tokens.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from infmoe.errors import InfMoEError
from infmoe.ops.dispatch import Backend, check_backend

Mode = Literal["sample", "mu", "antithetic", "qmc"]
MODES: tuple[Mode, ...] = ("sample", "mu", "antithetic", "qmc")

DIALS = ("num_samples", "keep_ratio", "score_cut", "score_mass", "min_sigma_to_mu", "num_experts_per_tok")
_FOR_ALL_ROWS = ("score_cut", "score_mass", "min_sigma_to_mu")  # what rows may not differ in

_STREAMS_PER_PROCESS = 2**32  # more than a batch has rows

V = TypeVar("V")


@dataclass(frozen=True)
class PerLayer(Generic[V]):
    """A dial with one value for each layer, first layer first.

    A plain tuple in a dial means one value per row of the batch; `PerLayer` tells the two apart, and its
    values may themselves be tuples with one entry per row.
    """

    values: tuple[V, ...]

    def __init__(self, values: Sequence[V]):
        object.__setattr__(self, "values", tuple(values))


IntDial = int | tuple[int, ...] | PerLayer
FloatDial = float | tuple[float, ...] | PerLayer


@dataclass(frozen=True)
class NoiseKey:
    """What the router's noise is a function of, beside the layer and the sample's number.

    Attributes:
        seed: one integer for the run, in [0, 2**63); a 0-d int64 tensor is taken too (no graph break).
        step: the optimizer step, so that an epoch's second pass draws anew; 0 outside training.
        stream: int64, shape (B,): whose noise each row uses. In training the sample's number in the data
            order, in evaluation the document or window, in generation the request. None: 0 for every row.
        position: int64, shape (B, T) or (T,): the token's place in its sequence. None: 0 .. T-1.
    """

    seed: int | Tensor = 0
    step: int | Tensor = 0
    stream: Tensor | None = None
    position: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.seed, int) and not 0 <= self.seed < 2**63:
            raise InfMoEError(f"the noise seed must lie in [0, 2**63), got {self.seed}")

    def at(self, position_BT: Tensor, batch_size: int) -> "NoiseKey":
        """The same as tensors on the positions' device, so that a model's layers need not make them one by one.

        Args:
            position_BT: what the positions are where the key has none.
            batch_size: B.
        """
        device = position_BT.device

        def number(value: int | Tensor) -> Tensor:
            if isinstance(value, int):
                return torch.full((), value, dtype=torch.int64, device=device)
            return value.to(device, torch.int64)

        stream = torch.zeros(batch_size, dtype=torch.int64, device=device) if self.stream is None else self.stream
        position = position_BT if self.position is None else self.position
        return NoiseKey(number(self.seed), number(self.step), stream.to(device), position.to(device))

    @staticmethod
    def draw(batch_size: int, device: torch.device) -> "NoiseKey":
        """A fresh key from torch's default generator, another stream for each row (train mode's default).

        Rows of other processes have other streams too: their generators may all have the same seed.
        """
        seed = torch.randint(0, 2**62, (), dtype=torch.int64)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        first = torch.distributed.get_rank() * _STREAMS_PER_PROCESS if distributed else 0
        return NoiseKey(seed=seed, stream=torch.arange(first, first + batch_size, device=device))


@dataclass(frozen=True)
class Routing:
    """How tokens are routed in one forward pass: the dials, the mode and the noise key.

    It goes unchanged through layer, model, `generate`, evaluation and benchmarks. A dial left at None takes
    the layer's own default; a dial that a variant does not have is refused, never ignored.

    Attributes:
        num_samples: K, how many expert indices each token draws (`infinity`). One int, a tuple with one int
            per row of the batch, or `PerLayer`.
        keep_ratio: N/100, the fraction of neurons that each sample keeps, in (0, 1] (`infinity`). One float,
            a tuple with one float per row, or `PerLayer`.
        score_cut: keep the neurons that score at least this, in place of a fixed share, so that tokens whose
            scores are larger run more of them (`infinity`). One float, or `PerLayer`. `infmoe.eval.adaptive` finds
            the cut that keeps a given share on average, and likewise what the next two take.
        score_mass: top-p over neurons: keep the fewest that hold this share, in (0, 1], of the sum of a sample's
            positive scores, in place of a fixed share of the neurons (`infinity`). One float, or `PerLayer`.
        min_sigma_to_mu: tokens whose router is surer than this, by rms(sigma) / rms(mu), run the neurons of their
            first sample alone, the others those of all K (`infinity`). One float, or `PerLayer`. All K are scored and
            selected for every token: what it spares is neurons.
        num_experts_per_tok: k, how many experts each token runs (`moe`). One int, in eval mode a tuple with one
            int per row, or `PerLayer`.
        mode: "sample" draws z from the router; "mu" takes its mean once (deterministic, K has no meaning);
            "antithetic" draws pairs z = mu + sigma*eps, mu - sigma*eps; "qmc" spreads the K draws as a shifted
            Sobol sequence. None: the layer's default.
        key: what the noise is a function of. None: drawn from torch's default generator in train mode, the
            layer's `noise_seed` in eval mode.
        token_ids: int64, shape (B, T); what hash routing hashes. The model fills it in.
        max_stats_tokens: the routing statistics look at this many evenly spaced tokens at most (at one of each k
            at least, where rows differ in it); None: at all
            of them, but a model in train mode at 512.
        backend: which kernels run (`infinity`): "auto", "eager", "fused", "sparse" or "triton"; None: the
            environment's INFMOE_BACKEND, else "auto". They agree but for rounding. The other variants have none.
    """

    num_samples: IntDial | None = None
    keep_ratio: FloatDial | None = None
    score_cut: float | PerLayer | None = None
    score_mass: float | PerLayer | None = None
    min_sigma_to_mu: float | PerLayer | None = None
    num_experts_per_tok: IntDial | None = None
    mode: Mode | None = None
    key: NoiseKey | None = None
    token_ids: Tensor | None = None
    max_stats_tokens: int | None = None
    backend: Backend | None = None

    def __post_init__(self) -> None:
        for dial, check in (
            ("num_samples", check_num_samples),
            ("keep_ratio", check_keep_ratio),
            ("score_cut", check_score_cut),
            ("score_mass", check_score_mass),
            ("min_sigma_to_mu", check_min_sigma_to_mu),
            ("num_experts_per_tok", check_num_experts_per_tok),
        ):
            given = getattr(self, dial)
            if given is not None and (plain := _checked(dial, given, check)) is not given:
                object.__setattr__(self, dial, plain)
        shares = [name for name in ("keep_ratio", "score_cut", "score_mass") if getattr(self, name) is not None]
        if len(shares) > 1:
            raise InfMoEError(f"{shares[1]} takes the place of {shares[0]}: give one of them")
        for name in _FOR_ALL_ROWS:
            given = getattr(self, name)
            if any(isinstance(value, tuple) for value in (given.values if isinstance(given, PerLayer) else (given,))):
                raise InfMoEError(f"{name} takes one number (or PerLayer) for the whole batch, got {given}")
        if self.mode is not None and self.mode not in MODES:
            raise InfMoEError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.backend is not None:
            check_backend(self.backend)
        if self.max_stats_tokens is not None and self.max_stats_tokens < 1:
            raise InfMoEError(f"max_stats_tokens must be at least 1, or None, got {self.max_stats_tokens}")
        if self.mode == "mu" and self.num_samples is not None:
            raise InfMoEError("mode 'mu' takes z = mu once and draws nothing: leave num_samples out")

    def at_layer(self, layer_index: int) -> "Routing":
        """The routing of one layer: `PerLayer` dials become that layer's value."""
        picked = {
            name: _pick(name, value, layer_index)
            for name in DIALS
            if isinstance(value := getattr(self, name), PerLayer)
        }
        return dataclasses.replace(self, **picked) if picked else self

    def with_key(self, *, seed: int, training: bool, batch_size: int, device: torch.device) -> "Routing":
        """The same routing with a noise key: the given one, else a fresh one in training, else `seed`."""
        if self.key is not None:
            return self
        key = NoiseKey.draw(batch_size, device) if training else NoiseKey(seed=seed)
        return dataclasses.replace(self, key=key)

    def of_rows(self, rows: Sequence[int], batch_size: int) -> "Routing":
        """The routing of some of the batch's rows; what holds for all rows stays.

        Raises:
            InfMoEError: something with neither one value nor one for each row.
        """

        def pick(value):
            if isinstance(value, PerLayer):
                return PerLayer([pick(v) for v in value.values])
            several = isinstance(value, tuple) or (isinstance(value, Tensor) and value.ndim > 0)
            if not several or len(value) == 1:
                return value
            if len(value) != batch_size:
                raise InfMoEError(f"{len(value)} values for a batch of {batch_size} rows: give one per row")
            return value[list(rows)] if isinstance(value, Tensor) else tuple(value[b] for b in rows)

        return self._each_row(pick)

    def expand_rows(self, repeats: int) -> "Routing":
        """Repeat every per-row value `repeats` times in place, as `generate` does with the batch's rows.

        A value with one entry already stands for all rows, and stays.
        """

        def expand(value):
            if isinstance(value, PerLayer):
                return PerLayer([expand(v) for v in value.values])
            if isinstance(value, tuple) and len(value) > 1:
                return tuple(v for v in value for _ in range(repeats))
            if isinstance(value, Tensor) and value.ndim > 0 and len(value) > 1:
                return value.repeat_interleave(repeats, dim=0)
            return value

        return self._each_row(expand)

    def _each_row(self, change: Callable[[Any], Any]) -> "Routing":
        """The same with everything that may differ by row changed."""
        key = self.key
        if key is not None:
            position = change(key.position) if key.position is not None and key.position.ndim == 2 else key.position
            key = dataclasses.replace(key, stream=change(key.stream), position=position)
        return dataclasses.replace(
            self,
            num_samples=change(self.num_samples),
            keep_ratio=change(self.keep_ratio),
            num_experts_per_tok=change(self.num_experts_per_tok),
            key=key,
            token_ids=change(self.token_ids),
        )


def check_num_samples(value: int) -> int:
    """`value` as a plain int; raises unless it is a usable K."""
    number = _plain(value)
    if not isinstance(number, int) or number < 1:
        raise InfMoEError(f"num_samples must be an integer of at least 1, or a tuple of them by row, got {value!r}")
    return number


def check_keep_ratio(value: float, name: str = "keep_ratio") -> float:
    """`value` as a plain number; raises unless it is a usable keep ratio."""
    number = _plain(value)
    if number is None or not 0.0 < number <= 1.0:
        raise InfMoEError(f"{name} must lie in (0, 1], e.g. 0.25 for the paper's 25 %, got {value!r}")
    return number


def check_score_cut(value: float) -> float:
    """`value` as a plain number; raises unless it is a usable cut."""
    number = _plain(value)
    if number is None or not math.isfinite(number):
        raise InfMoEError(f"score_cut must be a finite number, got {value!r}")
    return number


def check_score_mass(value: float) -> float:
    """`value` as a plain number; raises unless it is a share of the scores' sum."""
    number = _plain(value)
    if number is None or not 0.0 < number <= 1.0:
        raise InfMoEError(f"score_mass must lie in (0, 1], got {value!r}")
    return number


def check_min_sigma_to_mu(value: float) -> float:
    """`value` as a plain number; raises unless it is a usable bound."""
    number = _plain(value)
    if number is None or not 0.0 <= number < math.inf:
        raise InfMoEError(f"min_sigma_to_mu must be 0 or more, and finite, got {value!r}")
    return number


def check_num_experts_per_tok(value: int, name: str = "num_experts_per_tok") -> int:
    """`value` as a plain int; raises unless it is a usable k."""
    number = _plain(value)
    if not isinstance(number, int) or number < 1:
        raise InfMoEError(f"{name} must be an integer of at least 1, got {value!r}")
    return number


def _plain(value: Any) -> int | float | None:
    """A real number as Python's own (NumPy's are not); None for anything else, truth values too."""
    if type(value) in (int, float):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _checked(name: str, value: Any, check: Callable[[Any], Any]) -> Any:
    """A dial whose every number was checked and made a plain one."""
    if isinstance(value, PerLayer):
        return PerLayer([entry if entry is None else _checked(name, entry, check) for entry in value.values])
    if isinstance(value, tuple):
        return tuple([check(v) for v in value])
    if not isinstance(value, int | float | str) and isinstance(value, Iterable):
        rows = "" if name in _FOR_ALL_ROWS else "a tuple with one for each row of the batch, "
        raise InfMoEError(f"{name} takes one number, {rows}or PerLayer with one for each layer, got {value!r}")
    return check(value)


def _pick(name: str, dial: PerLayer, layer_index: int):
    if layer_index >= len(dial.values):
        raise InfMoEError(f"{name} has {len(dial.values)} per-layer values, but the model has more layers")
    return dial.values[layer_index]
