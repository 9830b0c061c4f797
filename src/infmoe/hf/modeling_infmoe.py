"""GPT-2 whose feed-forward layers are any of `infmoe.layers`.

B batch rows, T new tokens, D model width, V vocabulary.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from infmoe.errors import InfMoEError, unknown_name
from infmoe.hf.blocks import Dropout, InfMoEAttention, InfMoEBlock
from infmoe.hf.configuration_infmoe import InfMoEConfig, variant_options
from infmoe.hf.generation import InfMoEGenerationMixin
from infmoe.layers import ConditionalFFN, NoiseKey, PerLayer, Routing, RoutingStats
from infmoe.layers.linear import Linear
from infmoe.layers.routing import DIALS, FloatDial, IntDial, Mode

# The routing statistics of a training pass look at this many tokens, unless the routing says otherwise.
_TRAINING_STATS_TOKENS = 512


# What is set in another place, and where: a forward pass would hand it to the attention, which takes anything.
_ELSEWHERE = {
    **dict.fromkeys(("latency_budget_ms", "max_loss_increase", "profile"), "a budget is an argument of `generate`"),
    "backend": "give routing=Routing(backend=...)",
    **dict.fromkeys(
        ("gate_norm", "routed_scaling_factor", "rank_damping", "mask_scale"),
        "it belongs to the config, as from_pretrained takes it",
    ),
}


@dataclass
class InfMoEModelOutput(ModelOutput):
    """The backbone's output.

    Attributes:
        last_hidden_state: (B, T, D).
        past_key_values: the cache, if one is used.
        hidden_states, attentions: per layer, if asked for.
        aux_loss: 0-d float32, the layers' auxiliary losses added up.
        routing_stats: one `RoutingStats` per layer.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    routing_stats: tuple[RoutingStats, ...] | None = None


@dataclass
class InfMoECausalLMOutput(ModelOutput):
    """The language model's output.

    Attributes:
        loss: 0-d, cross-entropy in nats per token, if labels were given; in train mode plus `aux_loss`.
        logits: (B, T, V).
        past_key_values, hidden_states, attentions, aux_loss, routing_stats: see `InfMoEModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    routing_stats: tuple[RoutingStats, ...] | None = None


class InfMoEPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization."""

    config: InfMoEConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InfMoEBlock"]  # noqa: RUF012 - transformers' own form
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OutputRecorder(InfMoEBlock, index=0),
        "attentions": OutputRecorder(InfMoEAttention, index=1),
    }

    def __init__(self, config: InfMoEConfig, *args, **kwargs):
        config.check_options()
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """transformers' own; what the config freezes stays frozen, though loading makes every parameter anew."""
        loaded: Any = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # `output_loading_info` asks for a pair
        for module in model.modules():
            if isinstance(module, ConditionalFFN):
                module.freeze()
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, of a config that says what the model is.

        Raises:
            InfMoEError: an option that was changed in the config after the model was built.
        """
        backbone: Any = self.base_model
        backbone._refuse_changed_options()
        return super().save_pretrained(*args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: `_init_weights` goes through `transformers.initialization`, as in transformers' own models.

        For custom code transformers skips modules without parameters of their own, and with them the FFN
        layers, whose weights all lie in submodules.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ConditionalFFN):
            for tensor, mean, std in module.inits():
                if std:
                    init.normal_(tensor, mean=mean, std=std)
                else:
                    init.constant_(tensor, mean)
        elif isinstance(module, InfMoEAttention):
            # GPT-2: the residual path's outputs start smaller by 1 / sqrt(2 * layers)
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.c_proj.weight, mean=0.0, std=std)


class InfMoEModel(InfMoEPreTrainedModel):
    """The backbone, without the output layer."""

    def __init__(self, config: InfMoEConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([InfMoEBlock(config, i) for i in range(config.num_hidden_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self._built_with = {name: getattr(config, name) for name in ("ffn", *variant_options())}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value  # type: ignore[assignment]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        routing: Routing | None = None,
        num_samples: IntDial | None = None,
        keep_ratio: FloatDial | None = None,
        score_cut: float | PerLayer | None = None,
        score_mass: float | PerLayer | None = None,
        min_sigma_to_mu: float | PerLayer | None = None,
        num_experts_per_tok: IntDial | None = None,
        routing_mode: Mode | None = None,
        **kwargs,
    ) -> InfMoEModelOutput:
        """Run the blocks.

        Args:
            input_ids: int64, (B, T).
            attention_mask: 1 for real tokens, 0 for padding, (B, past + T).
            position_ids: int64, (B, T); None: counted over the tokens that `attention_mask` keeps, so that
                left padding changes no result.
            past_key_values, inputs_embeds, use_cache: as in transformers.
            routing: dials, mode and noise key.
            num_samples, keep_ratio, score_cut, score_mass, min_sigma_to_mu, num_experts_per_tok, routing_mode: the same
                dials by name, for `generate` and other callers that pass plain values; they take precedence over
                `routing`'s.
            **kwargs: passed to the attention.

        Returns:
            Hidden states, cache, auxiliary loss and routing statistics.

        Raises:
            InfMoEError: a dial that the variant does not have, an option that was changed in the config of a finished
                model, a sequence longer than the context.
            ValueError: both or neither of `input_ids` and `inputs_embeds`.
        """
        _refuse_misnamed_dials(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        B, T, _ = inputs_embeds.shape
        device = inputs_embeds.device
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if T > 1 or (isinstance(past_length, int) and not past_length):  # the tokens after a prompt pay nothing for it
            self._refuse_changed_options()
        if position_ids is None:
            position_ids = _positions(attention_mask, past_length, T, device)
        # A static cache counts in a tensor, which is not looked at here. Left padding takes no positions, so
        # the slow check comes second.
        num_tokens = T + (past_length if isinstance(past_length, int) else 0)
        context = self.config.max_position_embeddings
        if num_tokens > context and int(position_ids.max()) >= context:
            raise InfMoEError(f"{num_tokens} tokens do not fit the model's context of {context}: shorten the input")

        dials = {
            "num_samples": num_samples,
            "keep_ratio": keep_ratio,
            "score_cut": score_cut,
            "score_mass": score_mass,
            "min_sigma_to_mu": min_sigma_to_mu,
            "num_experts_per_tok": num_experts_per_tok,
            "mode": routing_mode,
        }
        routing = self._complete(routing or Routing(), dials, input_ids, position_ids, B, device)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = self.drop(inputs_embeds + self.wpe(position_ids).to(device))
        aux_loss = torch.zeros((), device=device)
        routing_stats = []
        cache = past_key_values if not (self.gradient_checkpointing and self.training) else None
        for block in self.h:
            hidden_states, block_aux_loss, stats = block(hidden_states, cache, causal_mask, routing, **kwargs)
            aux_loss = aux_loss + block_aux_loss.to(device)  # a device map may put blocks on several
            routing_stats.append(stats)
        return InfMoEModelOutput(
            last_hidden_state=self.ln_f(hidden_states),
            past_key_values=past_key_values if use_cache else None,
            aux_loss=aux_loss,
            routing_stats=tuple(routing_stats),
        )

    def _refuse_changed_options(self) -> None:
        """Raise if an option of the config is not what the layers were built with, and run at."""
        values = vars(self.config)  # a config looks every name up in a slow way of its own
        for name, built in self._built_with.items():
            if values[name] != built:
                raise InfMoEError(
                    f"config.{name} was set to {values[name]!r} after the model was built with {built!r}, and does "
                    "nothing: set it back, and give it to from_pretrained (a dial to the call too); models of "
                    "different options need a config each"
                )

    def _complete(
        self,
        routing: Routing,
        dials: dict,
        input_ids: Tensor | None,
        position_ids: Tensor,
        batch_size: int,
        device: torch.device,
    ) -> Routing:
        """Fill in what the blocks need: dials given by name, token ids, and the key with its positions.

        The key is drawn here, once and outside checkpointed blocks, so that recomputation repeats it.
        """
        given = {name: value for name, value in dials.items() if value is not None}
        if self.training and routing.max_stats_tokens is None:
            given["max_stats_tokens"] = _TRAINING_STATS_TOKENS
        routing = dataclasses.replace(routing, **given) if given else routing
        for name in DIALS:
            dial = getattr(routing, name)
            if isinstance(dial, PerLayer) and len(dial.values) != len(self.h):
                raise InfMoEError(f"{name} has {len(dial.values)} per-layer values for {len(self.h)} layers")
        if routing.token_ids is None and input_ids is not None:
            routing = dataclasses.replace(routing, token_ids=input_ids)
        seed = self._built_with["noise_seed"] or 0
        routing = routing.with_key(seed=seed, training=self.training, batch_size=batch_size, device=device)
        key: NoiseKey = routing.key  # type: ignore[assignment]
        return dataclasses.replace(routing, key=key.at(position_ids, batch_size))


class InfMoEForCausalLM(InfMoEPreTrainedModel, InfMoEGenerationMixin):
    """The language model: `generate(num_samples=K, keep_ratio=r)`, `from_pretrained(..., num_samples=K)`."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: InfMoEConfig):
        super().__init__(config)
        self.transformer = InfMoEModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        routing: Routing | None = None,
        num_samples: IntDial | None = None,
        keep_ratio: FloatDial | None = None,
        score_cut: float | PerLayer | None = None,
        score_mass: float | PerLayer | None = None,
        min_sigma_to_mu: float | PerLayer | None = None,
        num_experts_per_tok: IntDial | None = None,
        routing_mode: Mode | None = None,
        **kwargs,
    ) -> InfMoECausalLMOutput:
        """Logits, and the loss where labels are given (shifted inside; -100 is ignored).

        In train mode the auxiliary loss is part of it; in eval mode it is the cross-entropy alone, so that ways to
        route can be compared.

        Args:
            labels: int64, (B, T); give `input_ids` itself to train a language model.
            logits_to_keep: as in transformers.
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, routing,
                num_samples, keep_ratio, score_cut, score_mass, min_sigma_to_mu, num_experts_per_tok, routing_mode: see
                    `InfMoEModel.forward`.
            **kwargs: passed to the attention and the loss (`num_items_in_batch` among them).

        Returns:
            Logits, loss, and what the backbone gives; a tuple of those that are there where `return_dict=False`.

        Raises:
            InfMoEError, ValueError: see `InfMoEModel.forward`.
        """
        outputs: InfMoEModelOutput = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            routing=routing,
            num_samples=num_samples,
            keep_ratio=keep_ratio,
            score_cut=score_cut,
            score_mass=score_mass,
            min_sigma_to_mu=min_sigma_to_mu,
            num_experts_per_tok=num_experts_per_tok,
            routing_mode=routing_mode,
            **kwargs,
        )
        assert outputs.last_hidden_state is not None
        assert outputs.aux_loss is not None
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training:
                share = _aux_share(labels, kwargs.get("num_items_in_batch"), loss.device)
                loss = loss + share * outputs.aux_loss.to(loss.device)
        return InfMoECausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=outputs.aux_loss,
            routing_stats=outputs.routing_stats,
        )

    @classmethod
    def from_gpt2(cls, gpt2: GPT2LMHeadModel) -> "InfMoEForCausalLM":
        """The dense variant with the weights of a GPT-2; gives the same logits.

        Args:
            gpt2: transformers' model; it is left as it is.

        Returns:
            A model with copies of the weights, in train mode, in torch's default dtype.

        Raises:
            InfMoEError: a GPT-2 with options that the backbone does not have.
        """
        source = gpt2.config
        if source.scale_attn_by_inverse_layer_idx or not source.scale_attn_weights or source.add_cross_attention:
            raise InfMoEError("this GPT-2 scales or crosses its attention in a way that the backbone does not have")
        config = InfMoEConfig(
            ffn="dense",
            vocab_size=source.vocab_size,
            hidden_size=source.n_embd,
            num_hidden_layers=source.n_layer,
            num_attention_heads=source.n_head,
            intermediate_size=source.n_inner or 4 * source.n_embd,
            max_position_embeddings=source.n_positions,
            hidden_act=source.activation_function,
            layer_norm_epsilon=source.layer_norm_epsilon,
            initializer_range=source.initializer_range,
            attn_pdrop=source.attn_pdrop,
            resid_pdrop=source.resid_pdrop,
            embd_pdrop=source.embd_pdrop,
            tie_word_embeddings=source.tie_word_embeddings,
            bos_token_id=source.bos_token_id,
            eos_token_id=source.eos_token_id,
        )
        model = cls(config)
        # GPT-2's Conv1D keeps its weights as (in, out)
        transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        state = {
            name.replace("mlp.c_fc", "mlp.w1").replace("mlp.c_proj", "mlp.w2"): (
                tensor.T if name.endswith(transposed) else tensor
            )
            for name, tensor in gpt2.state_dict().items()
        }
        model.load_state_dict(state)
        return model


def _refuse_misnamed_dials(kwargs: dict) -> None:
    """Raise for a keyword that was meant as a dial: the attention and the loss would swallow it in silence."""
    dials = (*DIALS, "routing_mode")
    for key in kwargs:
        if key in _ELSEWHERE:
            raise InfMoEError(f"a forward pass takes no {key!r}: {_ELSEWHERE[key]}")
        if key == "mode":
            raise InfMoEError("unknown argument 'mode'; did you mean 'routing_mode'?")
        if difflib.get_close_matches(key, dials, n=1, cutoff=0.7):
            raise unknown_name("argument", key, dials)


def _positions(attention_mask: Tensor | None, past_length: int, num_tokens: int, device: torch.device) -> Tensor:
    """Each new token's place, int64, (1 or B, T): counted over real tokens where a 2-d mask is given."""
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -num_tokens:]
    return (torch.arange(num_tokens, device=device) + past_length)[None]


def _aux_share(labels: Tensor, num_items_in_batch: Tensor | int | None, device: torch.device) -> Tensor | float:
    """This call's share of the auxiliary loss, where the loss is divided over several micro-batches."""
    if num_items_in_batch is None:
        return 1.0
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(device)
    return (labels[:, 1:] != -100).sum().to(device) / num_items_in_batch
