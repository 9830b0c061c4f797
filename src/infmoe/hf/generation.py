"""Generation under the dials: given by name, for each row, or chosen by a budget."""

import logging
from pathlib import Path
from typing import Any

from transformers import DynamicCache, GenerationMixin, StoppingCriteriaList

from infmoe.errors import InfMoEError
from infmoe.hf.budget import Choice, Profile, pick
from infmoe.hf.clock import TokenClock
from infmoe.layers.routing import DIALS, Routing

_LOG = logging.getLogger("infmoe")
_NEW_TOKENS = 20  # transformers' own default
# Ways to generate whose steps are not of one token a row, or hold more than the model's own work
_NOT_TIMED = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "custom_generate")
_NOT_TIMED_BUT_AT_1 = ("guidance_scale", "num_beams")
# Ways to generate in which transformers runs the model once more, with none of the call's arguments; when they are off
_LOSES_DIALS: dict[str, tuple[Any, ...]] = {"guidance_scale": (None, 1), "token_healing": (None, False)}


class InfMoEGenerationMixin(GenerationMixin):
    """transformers' generation, with this model's dials.

    Attributes:
        picked: what the last `generate` chose by its budget; None where it had none.
    """

    picked: Choice | None = None
    _said = ""  # the last choice that was logged

    def generate(
        self,
        *args: Any,
        latency_budget_ms: float | None = None,
        max_loss_increase: float | None = None,
        profile: Profile | Path | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, with the dials by name, or chosen by a budget.

        Args:
            *args, **kwargs: as in transformers, and this model's dials or `routing`.
            latency_budget_ms: run the setting of lowest loss whose tokens take at most this, in 95 of 100 cases; each
                token from the second on, since the first one's time is the prompt's.
            max_loss_increase: run the quickest setting that loses at most so many nats over the checkpoint's own dials.
            profile: what `infmoe frontier` measured (a `Profile`, its file or folder); None: beside the checkpoint.

        The choice and its reason stay in `self.picked`, and are logged when they change (logger "infmoe", at a level
        that shows); so is a latency budget that clearly fewer than 95 of 100 tokens met.

        Returns:
            As in transformers: token ids, int64, prompt and continuation, one row a sequence; or, if the call asks for
            `return_dict_in_generate`, an object that holds them in `sequences`.

        Raises:
            InfMoEError: a budget that can't be met, a profile of other weights or another machine, a budget
                beside dials, dials beside an assistant model, guidance or token healing, dials in a generation
                config, or an early exit, which the model does not have.
        """
        budget = {"latency_budget_ms": latency_budget_ms, "max_loss_increase": max_loss_increase}
        self.picked = choice = None
        self._refuse_dials_in_a_generation_config(args, kwargs)
        if self._setting_of("assistant_early_exit", args, kwargs) is not None:
            raise InfMoEError("this model has no early exit: leave assistant_early_exit out")
        budgets = [name for name, value in budget.items() if value is not None]
        self._refuse_what_loses_dials(args, kwargs, budgets)
        if kwargs.get("assistant_model") is not None:
            self._refuse_dials_beside_an_assistant(kwargs, budgeted=max_loss_increase is not None)
        if budgets:
            choice = self._choose(args, kwargs, profile, budget)
            dials = choice.point.dials()
            kwargs |= {"routing_mode" if name == "mode" else name: v for name, v in dials.items() if v is not None}
        elif profile is not None:
            raise InfMoEError("a profile alone chooses nothing: give latency_budget_ms or max_loss_increase")
        if self._setting_of("cache_implementation", args, kwargs) == "paged" and any(
            kwargs.get(name) is not None for name in (*DIALS, "routing_mode", "routing")
        ):
            raise InfMoEError("paged generation passes no dials on: leave them out, or cache_implementation='paged'")
        if choice is not None and latency_budget_ms is not None:
            return self._generate_timed(choice, latency_budget_ms, *args, **kwargs)
        self.picked = choice
        out = super().generate(*args, **kwargs)  # type: ignore[misc]
        self.picked = choice  # whatever a callback generated meanwhile
        return out

    def _choose(
        self, args: tuple, kwargs: dict[str, Any], profile: Profile | Path | str | None, budget: dict[str, float | None]
    ) -> Choice:
        """What the budget picks for a call of `generate`, logged when it changes."""
        timed = budget["latency_budget_ms"] is not None
        self._refuse_dials_beside_a_budget(kwargs, timed=timed)
        rows = self._rows_of(args, kwargs, timed=timed)
        choice = pick(self, profile, rows=rows, positions=self._positions_of(args, kwargs), **budget)
        if choice.reason != self._said:
            _LOG.warning("picked %s", choice.reason)
            self._said = choice.reason
        return choice

    def _generate_timed(self, choice: Choice, budget_ms: float, *args: Any, **kwargs: Any) -> Any:
        """`generate`, noting whether the tokens met the budget, and saying so where too few did."""
        self.picked = choice
        clock = TokenClock()
        place = 3  # among generate's positional arguments
        given = kwargs.pop("stopping_criteria", None) or (args[place] if len(args) > place else None) or ()
        criteria = StoppingCriteriaList([*given, clock])
        if len(args) > place:
            args = (*args[:place], criteria, *args[place + 1 :])
        else:
            kwargs["stopping_criteria"] = criteria
        out = super().generate(*args, **kwargs)  # type: ignore[misc]
        self.picked = choice.timed(clock.milliseconds(), budget_ms)
        if (line := self.picked.missed(budget_ms)) is not None:
            _LOG.warning(line)
        return out

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching, which runs the model at its own dials: it passes none on.

        Raises:
            InfMoEError: a dial, a budget or a profile.
        """
        budget = ("latency_budget_ms", "max_loss_increase", "profile")
        given = _given_dials(kwargs) + [name for name in budget if kwargs.get(name) is not None]
        if given:
            raise InfMoEError(
                f"continuous batching passes no dials on: leave {', '.join(given)} out, and open the model at them, "
                "from_pretrained(DIR, keep_ratio=...)"
            )
        return super().generate_batch(*args, **kwargs)

    def init_continuous_batching(self, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' manager of continuous batching.

        Raises:
            InfMoEError: dials in a generation config.
        """
        self._refuse_dials_in_a_generation_config((None, generation_config), {})
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def _setting_of(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a call of `generate` runs with: its own, its generation config's, the model's; None: nobody says."""
        places = (kwargs.get(name), *(getattr(config, name, None) for config in self._configs_of(args, kwargs)))
        return next((value for value in places if value is not None), None)

    def _configs_of(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The call's generation config, if any, and the model's."""
        return kwargs.get("generation_config", args[1] if len(args) > 1 else None), self.generation_config

    def _refuse_dials_in_a_generation_config(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """There they do nothing, and keep those of the call from the model."""
        for config in self._configs_of(args, kwargs):
            for name in (*DIALS, "routing_mode", "routing"):
                if hasattr(config, name):
                    raise InfMoEError(f"a generation config has no {name!r}: delete it there, and give it to generate")

    def _rows_of(self, args: tuple, kwargs: dict[str, Any], *, timed: bool) -> int:
        """Sequences that a call of `generate` runs at once.

        Raises:
            InfMoEError: for a latency, a way to generate that no profile times.
        """
        if timed:
            self.refuse_untimed(args, kwargs)
        inputs = self._inputs_of(args, kwargs)
        batch_size = 1 if inputs is None else len(inputs)
        repeats = [self._setting_of(name, args, kwargs) or 1 for name in ("num_beams", "num_return_sequences")]
        return batch_size * max(repeats)

    def refuse_untimed(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise for what no profile times, in a call of `generate` or in the model's generation config.

        Raises:
            InfMoEError: such an argument, or a compiled model.
        """
        for name in (*_NOT_TIMED, *_NOT_TIMED_BUT_AT_1):
            value = self._setting_of(name, args, kwargs)
            if value is not None and not (value == 1 and name in _NOT_TIMED_BUT_AT_1):
                raise InfMoEError(f"a latency budget is for plain generation, a token a step: leave {name} out")
        given = kwargs.get("past_key_values")
        if self._setting_of("cache_implementation", args, kwargs) not in (None, "dynamic", "paged") or (
            given is not None and type(given) is not DynamicCache
        ):
            name = "cache_implementation" if given is None else "past_key_values"
            raise InfMoEError(f"a latency budget is for the usual cache: leave {name} out")
        if "forward" in vars(self) or any(getattr(m, "_compiled_call_impl", None) for m in self.modules()):  # type: ignore[attr-defined]
            raise InfMoEError("a latency budget is for a model that is not compiled: open it once more for that")
        if self._setting_of("use_cache", args, kwargs) is False:
            raise InfMoEError("a latency budget is for cached generation: leave use_cache=False out")

    def _positions_of(self, args: tuple, kwargs: dict[str, Any]) -> int:
        """Tokens of the prompt and of what a call of `generate` may add to it."""
        inputs = self._inputs_of(args, kwargs)
        prompt = 1 if inputs is None else inputs.shape[1]
        new = self._setting_of("max_new_tokens", args, kwargs)
        longest = self._setting_of("max_length", args, kwargs) if new is None else None
        return longest or prompt + (new or _NEW_TOKENS)

    @staticmethod
    def _inputs_of(args: tuple, kwargs: dict[str, Any]) -> Any:
        """The prompts of a call of `generate`: ids (B, T), embeddings (B, T, D), or None."""
        given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
        return next((value for value in given if value is not None), None)

    @staticmethod
    def _refuse_dials_beside_a_budget(kwargs: dict[str, Any], *, timed: bool) -> None:
        routing = kwargs.get("routing")
        if timed and routing is not None and routing.backend is not None:
            raise InfMoEError(
                "a latency is of the backend that the profile was measured with: leave routing.backend out"
            )
        given = _given_dials(kwargs)
        if given:
            raise InfMoEError(f"a budget chooses the dials itself: leave {', '.join(given)} out")

    @staticmethod
    def _refuse_dials_beside_an_assistant(kwargs: dict[str, Any], *, budgeted: bool) -> None:
        given = _given_dials(kwargs) + ["max_loss_increase"] * budgeted
        if given:
            raise InfMoEError(
                f"assisted generation would run the assistant at the same dials: leave {', '.join(given)} out, and "
                "open each model at its own, from_pretrained(DIR, keep_ratio=...)"
            )

    def _refuse_what_loses_dials(self, args: tuple, kwargs: dict[str, Any], budgets: list[str]) -> None:
        """Raise where some of a call's passes would run at the model's own dials, and not at the call's."""
        given = (_given_dials(kwargs) or ["routing"] * (kwargs.get("routing") is not None)) + budgets
        for name, off in _LOSES_DIALS.items():
            if given and self._setting_of(name, args, kwargs) not in off:
                raise InfMoEError(
                    f"{name} runs the model once more at its own dials: leave {name} out, or leave {', '.join(given)} "
                    "out and open the model at the dials, from_pretrained(DIR, keep_ratio=...)"
                )

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs):  # type: ignore[override]
        """Repeat the per-row dials with the rows (beam search, several sequences per prompt)."""
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, **kwargs
        )
        if expand_size > 1:
            expanded = Routing(**{name: model_kwargs.get(name) for name in DIALS}).expand_rows(expand_size)
            for name in DIALS:
                if model_kwargs.get(name) is not None:
                    model_kwargs[name] = getattr(expanded, name)
            if model_kwargs.get("routing") is not None:
                model_kwargs["routing"] = model_kwargs["routing"].expand_rows(expand_size)
        return input_ids, model_kwargs


def _given_dials(kwargs: dict[str, Any]) -> list[str]:
    """The dials that a call of `generate` sets, by name or in its routing."""
    routing = kwargs.get("routing")
    given = [name for name in (*DIALS, "routing_mode") if kwargs.get(name) is not None]
    return given + [name for name in (*DIALS, "mode") if routing is not None and getattr(routing, name) is not None]
