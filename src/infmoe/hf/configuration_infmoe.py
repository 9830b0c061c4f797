"""Configuration of the GPT-2 backbone with a chosen feed-forward variant."""

import dataclasses
import typing
from typing import Any, ClassVar, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig

from infmoe.errors import InfMoEError, unknown_name
from infmoe.layers import ffn_class

# What transformers itself may pass to a config beside its fields.
_HF_KEYS = frozenset(
    (
        *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path"),
        *("_output_attentions", "attn_implementation", "auto_map", "experts_implementation", "model_type"),
        *("name_or_path", "num_labels", "output_attentions", "per_layer_config", "quantization_config"),
        "torch_dtype",
    )
)
# A dial's value in training: what the config said when it was made, whatever the dial is set to afterwards.
_TRAINED = {"trained_keep_ratio": "keep_ratio", "trained_experts_per_tok": "num_experts_per_tok"}
# What says nothing of the model itself.
_OF_GENERATION = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id")
_COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
# What may differ from layer to layer.
_BY_LAYER = ("num_samples", "keep_ratio", "num_experts_per_tok", *_TRAINED)
# What a field takes, in words; of several types the first.
_KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}

C = TypeVar("C", bound=type)
Ints = int | list[int] | tuple[int, ...] | None
Numbers = float | int | list[float | int] | tuple[float | int, ...] | None


def _in_words(cls: C) -> C:
    """A strict dataclass whose errors say what a field takes, in place of a list of types."""
    kinds = {name: _kind(annotation) for name, annotation in cls.__annotations__.items()}
    checked: Any = cls.__setattr__

    def set_in_words(self: Any, name: str, value: Any) -> None:
        try:
            checked(self, name, value)
        except StrictDataclassFieldValidationError:
            if name not in kinds:  # what every transformers config has
                raise
            reason = TypeError(f"{name} takes {kinds[name]}, got {value!r}")
            raise StrictDataclassFieldValidationError(field=name, cause=reason) from reason

    cls.__setattr__ = set_in_words  # type: ignore[assignment]
    return cls


def _kind(annotation: Any) -> str:
    types = typing.get_args(annotation) or (annotation,)
    kind = next((words for one, words in _KINDS.items() if one in types), "")
    return f"{kind}, or a list of them" if any(typing.get_origin(one) for one in types) else kind


@_in_words
@strict
class InfMoEConfig(PreTrainedConfig):
    """GPT-2 with the feed-forward variant `ffn`; defaults are GPT-2 small's shape.

    Options that belong to a variant default to None and are filled in with that variant's own default (see
    the layer classes in `infmoe.layers`, whose keywords they are). An option that the chosen variant does not
    have is refused, and so is an unknown key.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, max_position_embeddings: backbone.
        intermediate_size: FFN neurons per layer, all experts together, in parameters of a plain FFN.
        hidden_act: "gelu", "gelu_new" (GPT-2's), "relu", "silu", "swiglu", "geglu".
        ffn: "dense", "switch", "moe", "infinity".
        num_samples, keep_ratio, num_experts_per_tok: one number for all layers, or a list with one for each.
        trained_keep_ratio, trained_experts_per_tok: what the dial was when the config was made, and stays whatever the
            dial is set to afterwards, in `from_pretrained` or by hand; a config for another training is made anew.
        layer_norm_epsilon, initializer_range, attn_pdrop, resid_pdrop, embd_pdrop: as in GPT-2; no dropout by
            default (the paper names none).
    """

    model_type: ClassVar[str] = "infmoe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "aux_loss", "routing_stats"]

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 1024
    hidden_act: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    attn_pdrop: float | int = 0.0
    resid_pdrop: float | int = 0.0
    embd_pdrop: float | int = 0.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    ffn: str = "infinity"
    # infinity
    z_dim: int | None = None
    num_samples: Ints = None
    keep_ratio: Numbers = None
    trained_keep_ratio: Numbers = None
    routing_mode: str | None = None
    router_hidden_size: int | None = None
    sigma_activation: str | None = None
    initial_sigma: float | int | None = None
    min_sigma: float | int | None = None
    max_sigma: float | int | None = None
    block_size: int | None = None
    selection: str | None = None
    mask_scale: str | None = None
    wz_bias: bool | None = None
    train_wz: bool | None = None
    wz_lr_factor: float | int | None = None
    wz_weight_decay: float | int | None = None
    score_dtype: str | None = None
    noise_seed: int | None = None
    # switch and moe
    num_experts: int | None = None
    num_experts_per_tok: Ints = None
    trained_experts_per_tok: Ints = None
    balance_loss_weight: float | int | None = None
    z_loss_weight: float | int | None = None
    capacity_factor: float | int | None = None
    expert_router: str | None = None
    gate_norm: str | None = None
    routed_scaling_factor: float | int | None = None
    rank_damping: float | int | None = None
    ideal_experts_per_tok: int | None = None
    coactivation_prob: float | int | None = None
    hierarchical_loss_weight: float | int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for key in kwargs:
            if key == "top_k":
                raise InfMoEError("unknown config key 'top_k'; did you mean 'num_experts_per_tok'?")
            if key not in _HF_KEYS:
                raise unknown_name("config key", key, type(self).__dataclass_fields__)
        self.check_options()
        for name, default in ffn_class(self.ffn).option_defaults().items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        for name, dial in _TRAINED.items():
            if getattr(self, name) is None:
                setattr(self, name, getattr(self, dial))
        super().__post_init__(**kwargs)

    @property
    def has_sigma(self) -> bool:
        """Whether the layers have a router with noise, so that its samples are a dial."""
        return self.ffn == "infinity" and self.sigma_activation != "none"

    def draws(self, mode: str | None = None) -> bool:
        """Whether the layers draw samples in a routing mode; None: the model's own."""
        return self.has_sigma and (mode or self.routing_mode) != "mu"

    def check_options(self) -> None:
        """Raise if an option is set that the chosen variant does not have; lists of layers become tuples.

        The model calls it again: `from_pretrained(..., num_samples=4)` sets attributes on a finished config.
        """
        own = ffn_class(self.ffn).option_defaults()
        for name in variant_options():
            if name not in own and getattr(self, name) is not None:
                raise InfMoEError(f"ffn='{self.ffn}' has no option {name!r}: leave it out")
        for name in _BY_LAYER:
            values = getattr(self, name)
            if isinstance(values, list | tuple):
                if len(values) != self.num_hidden_layers:
                    raise InfMoEError(
                        f"{name} has {len(values)} values for {self.num_hidden_layers} layers: give one number, or one "
                        "for each layer"
                    )
                setattr(self, name, tuple(values))
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise InfMoEError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise InfMoEError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise InfMoEError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )


def variant_options() -> tuple[str, ...]:
    """Config fields that belong to some variants only."""
    fields = list(InfMoEConfig.__dataclass_fields__)
    return tuple(fields[fields.index("ffn") + 1 :])


def model_fields(config: InfMoEConfig) -> dict[str, Any]:
    """What of a config describes the model, by name; what steers generation, and transformers' own, is left out."""
    names = [field.name for field in dataclasses.fields(InfMoEConfig) if field.name in InfMoEConfig.__annotations__]
    return {name: getattr(config, name) for name in names if name not in _OF_GENERATION}
