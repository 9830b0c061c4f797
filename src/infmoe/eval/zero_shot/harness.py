"""The model that lm-eval sees, and local files as tasks of lm-eval's own kind."""

import contextlib
import hashlib
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from infmoe.errors import InfMoEError, unknown_name
from infmoe.eval.dials import grid, parse_ints, parse_mode, parse_ratios
from infmoe.eval.loading import Opened, open_model
from infmoe.eval.zero_shot.local import LocalTask
from infmoe.eval.zero_shot.scoring import Request, Score, score
from infmoe.hf.configuration_infmoe import variant_options
from infmoe.layers import NoiseKey, Routing
from infmoe.layers.point import Point

VERSION = lm_eval.__version__
_DIALS = ("num_samples", "keep_ratio", "num_experts_per_tok")


@register_model("infmoe")
class InfMoELM(TemplateLM):
    """A checkpoint of ours; every item is its own noise stream, so that batch and order change no score.

    On lm-eval's command line: `--model infmoe --model_args pretrained=DIR,num_samples=2,keep_ratio=0.25`.
    """

    def __init__(
        self,
        pretrained: str | Opened,
        *,
        num_samples: int | str | None = None,
        keep_ratio: float | str | None = None,
        num_experts_per_tok: int | str | None = None,
        mode: str | None = None,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **options: Any,
    ):
        """Open a checkpoint.

        Args:
            pretrained: a run folder, a checkpoint or a saved model; or one that is open.
            num_samples, keep_ratio, num_experts_per_tok, mode: the dials, one value each; None: the model's own.
            seed: of the noise.
            batch_size: contexts per forward pass; None or "auto": 16.
            max_batch_size: taken and not needed.
            device: "cpu", "cuda" (which lm-eval asks for unless told otherwise); None, or a GPU that is not there:
                the GPU where there is one.
            dtype: "float32" or "bfloat16"; None: the checkpoint's.
            **options: of the variant, in place of the checkpoint's, as `capacity_factor="null"`; for what is opened
                here. Any other is refused by name.

        Raises:
            InfMoEError: nothing to open, or a dial or an option that the model does not have.
        """
        super().__init__()
        to_open = () if isinstance(pretrained, Opened) else variant_options()
        for name in options.keys() - to_open:
            known = ("pretrained", *_DIALS, "mode", "seed", "batch_size", "device", "dtype", *to_open)
            raise unknown_name("model argument", name, known)
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None
        if isinstance(pretrained, Opened):
            opened = pretrained
        else:
            overrides = [f"{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in options.items()]
            opened = open_model(pretrained, device, dtype, overrides)
        self.model, self.tokenizer = opened.model, opened.tokenizer()
        points = grid(
            self.model.config,
            num_samples=parse_ints(_text(num_samples), "num_samples"),
            keep_ratios=parse_ratios(_text(keep_ratio), "keep_ratio"),
            num_experts_per_tok=parse_ints(_text(num_experts_per_tok), "num_experts_per_tok"),
            mode=parse_mode(mode),
        )
        if len(points) > 1:
            raise InfMoEError("lm-eval scores one setting at a time: give one value for each dial")
        self.point: Point = points[0]
        self.seed = _count("seed", seed, at_least=0)
        automatic = batch_size is None or str(batch_size).startswith("auto")
        self.rows = 16 if automatic else _count("batch_size", batch_size, at_least=1)
        self.cut_streams: set[int] = set()  # items that were longer than the window, since this was last emptied
        if self.model.config.ffn == "switch" and self.model.config.capacity_factor is not None:
            raise InfMoEError(
                "a Switch layer with a capacity drops tokens by what stands beside them in the batch, so its scores "
                "would depend on it: open it with --set capacity_factor=null (of lm-eval's own command: --model_args "
                "pretrained=DIR,capacity_factor=null)"
            )
        self.progress: Callable[[int], None] = lambda _: None

    @property
    def eot_token_id(self) -> int:
        """The token that precedes a document."""
        eot = self.model.config.eos_token_id
        if eot is None:
            raise InfMoEError("the checkpoint's config names no eos_token_id, which precedes a text: set it there")
        return int(eot[0] if isinstance(eot, list) else eot)

    @property
    def routing(self) -> Routing:
        """The dials that are being scored."""
        return self.point.routing()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, without special tokens."""
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's continuation, and whether it is the greedy one."""
        scores = self._score([self._request(instance) for instance in requests])
        return [(s.log_likelihood, s.greedy) for s in scores]

    def _request(self, instance: Instance) -> Request:
        context, continuation = instance.args
        if context == "":
            encoded = self.tok_encode(continuation)
            prefix = [self.prefix_token_id]
            context_ids, ids = (prefix, encoded) if prefix != encoded[:1] else (encoded[:1], encoded[1:])
        else:
            context_ids, ids = self._encode_pair(context, continuation)
        name = f"{(instance.task_name or 'a text').removesuffix(_LOCAL)}, item {(context or continuation)[:48]!r}"
        return Request(tuple(context_ids), tuple(ids), stream_of(instance), name)

    def _score(self, requests: Sequence[Request]) -> list[Score]:
        window = self.model.config.max_position_embeddings
        # a continuation's last token is never an input
        self.cut_streams |= {r.stream for r in requests if len(r.context) + len(r.continuation) > window + 1}
        return score(self.model, requests, self.routing, seed=self.seed, batch_size=self.rows, progress=self.progress)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """Token ids instead of texts; what they belong to is not known, so a stream follows from the context."""
        made = [
            Request(tuple(context), tuple(continuation), zlib.crc32(repr(context).encode()))
            for _, context, continuation in requests
        ]
        return [(s.log_likelihood, s.greedy) for s in self._score(made)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that overlap by one token."""
        made: list[Request] = []
        owners: list[int] = []
        for i, instance in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(instance.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.model.config.max_position_embeddings,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                made.append(Request(tuple(context), tuple(continuation), stream_of(instance)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, found in zip(owners, self._score(made), strict=True):
            totals[owner] += found.log_likelihood
        return totals

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut at the first stop text."""
        texts = []
        window = self.model.config.max_position_embeddings
        for instance in requests:
            context, options = instance.args
            until = options.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            wanted = min(int(options.get("max_gen_toks", 256)), window // 2)  # the prompt keeps half of a small window
            ids = self.tok_encode(context)[-(window - wanted) :] or [self.prefix_token_id]
            stream = torch.tensor([stream_of(instance)], device=self.model.device)
            routing = self.point.routing()
            model: Any = self.model
            made = model.generate(
                torch.tensor([ids], device=self.model.device),
                max_new_tokens=wanted,
                do_sample=False,
                pad_token_id=self.eot_token_id,
                routing=Routing(
                    num_samples=routing.num_samples,
                    keep_ratio=routing.keep_ratio,
                    num_experts_per_tok=routing.num_experts_per_tok,
                    mode=routing.mode,
                    key=NoiseKey(seed=self.seed, stream=stream),
                ),
            )
            text = str(self.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))
            for stop in filter(None, stops):
                text = text.split(stop)[0]
            texts.append(text)
        return texts


def stream_of(instance: Instance) -> int:
    """An item's noise stream: its task and what it says, wherever in its file it stands and whatever is beside it."""
    content: Any = instance.doc or instance.doc_id
    return item_stream(instance.task_name or "", list(instance.args) if content is None else content)


def item_stream(task: str, content: Any) -> int:
    """The noise stream of an item of lm-eval's task `task`, or of ours of that name, by its document."""
    text = json.dumps([task.removesuffix(_LOCAL), content], sort_keys=True, default=repr)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


_LOCAL = "_local"


def local_config(task: LocalTask) -> dict[str, Any]:
    """A file's items as a task of lm-eval, with the prompts and metrics of its own one."""
    import datasets

    several = len(task.docs[0]["contexts"]) > 1
    metrics = ["acc", "acc_norm"] if task.column.per_char else ["acc"]
    return {
        "task": task.column.task + _LOCAL,
        "custom_dataset": lambda **kwargs: {"test": datasets.Dataset.from_list(task.docs)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": _gold if several else _context,
        "doc_to_target": _continuation if several else _gold,
        "doc_to_choice": _contexts if several else _choices,
        "target_delimiter": " ",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        "metadata": {"version": task.column.version},
    }


def _gold(doc: dict[str, Any]) -> int:
    return doc["gold"]


def _context(doc: dict[str, Any]) -> str:
    return doc["contexts"][0]


def _contexts(doc: dict[str, Any]) -> list[str]:
    return doc["contexts"]


def _continuation(doc: dict[str, Any]) -> str:
    return doc["continuations"][0].removeprefix(" ")


def _choices(doc: dict[str, Any]) -> list[str]:
    return doc["choices"]


@dataclass(frozen=True)
class LoadedTask:
    """A task, read once for all points and seeds.

    Attributes:
        name: lm-eval's.
        tasks: what lm-eval's task manager made of it.
        chosen: the items to be scored, by number; None: all.
    """

    name: str
    tasks: Any
    chosen: list[int] | None


def check_limit(limit: int | None) -> None:
    """Raise unless `limit` leaves items enough for a standard error."""
    if limit is not None and limit < 2:
        raise InfMoEError(f"a limit takes two items of each task or more, got {limit}")


def load_task(task: str | dict[str, Any], limit: int | None = None) -> LoadedTask:
    """Read a task's items.

    Args:
        task: lm-eval's name, or a task of ours (see `local_config`).
        limit: so many items, the same ones for every model and setting; None: all.

    Raises:
        InfMoEError: the task needs the Hub, and it can't be reached; or a limit below 2.
    """
    check_limit(limit)
    name = task if isinstance(task, str) else task["task"]
    with _quiet():
        try:
            loaded = _task_manager(own=isinstance(task, dict)).load([task])
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(task, dict):
                raise InfMoEError(f"task {name!r} can't be made from its local file ({reason})") from error
            raise InfMoEError(
                f"task {name!r} is read from the Hugging Face Hub, which could not be reached or does not have it "
                f"({reason}): give --tasks-dir for local files, or leave it out of --tasks"
            ) from error
        (docs,) = (one.eval_docs for one in loaded["tasks"].values())
        return LoadedTask(name, loaded, None if limit is None else choose(docs, limit))


def run_task(model: InfMoELM, task: LoadedTask) -> dict[str, Any]:
    """lm-eval's own result of one task, samples included."""
    with _quiet():
        # not `simple_evaluate`, which asks pip and git about the machine at every call
        result = lm_eval.evaluate(
            lm=model,
            task_dict=task.tasks,
            samples=None if task.chosen is None else {task.name: task.chosen},
            log_samples=True,
            bootstrap_iters=0,  # standard errors are ours, from the items
            verbosity="ERROR",
        )
    assert result is not None
    return result


def choose(docs: Iterable[Any], count: int) -> list[int]:
    """The numbers of `count` items, ascending, as lm-eval needs them: those of lowest hash, so a random part."""
    content = (json.dumps(doc, sort_keys=True, default=repr).encode() for doc in docs)
    hashes = [(hashlib.blake2b(text, digest_size=8, person=b"limit").digest(), i) for i, text in enumerate(content)]
    return sorted(i for _, i in sorted(hashes)[:count])


@cache
def _task_manager(*, own: bool) -> TaskManager:
    """lm-eval's index of tasks, read once; our own tasks need none, and reading its thousands of files takes long."""
    return TaskManager(include_defaults=not own)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs what it is about to do, and draws bars; the Hub's client logs every attempt that fails."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _count(name: str, value: Any, *, at_least: int) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = at_least - 1
    if number < at_least:
        raise InfMoEError(f"{name} must be an integer of at least {at_least}, got {value!r}")
    return number


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
