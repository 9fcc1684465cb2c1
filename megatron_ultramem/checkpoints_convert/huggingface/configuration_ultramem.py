"""Configuration of UltraMem models for `transformers`."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

FORMAT_VERSION = 1
_COMMON = ("num_heads", "key_dim", "top_m", "coarse_k", "value_dim", "shuffle", "replaces_ffn", "pools", "layers")
_TUCKER = ("tucker_rank", "num_cores", "query_per_rank")
# What `memory` must have, by kind of memory layer.
KINDS = {
    "ultramem_v2": (*_COMMON, *_TUCKER, "pre_value_dim", "activation"),
    "ultramem": (*_COMMON, *_TUCKER, "value_expansion"),
    "memory_plus": (*_COMMON, "query_norm"),
    "pkm": (*_COMMON, "query_norm"),
    "peer": (*_COMMON, "query_norm"),
}
# Fields that are one of a few words.
CHOICES = {
    "qk_norm": ("none", "head", "all_heads"),
    "router_score": ("softmax", "sigmoid"),
    "router_dtype": ("params", "fp32", "fp64"),
    "memory_kernels": ("auto", "reference", "fused"),
}


@strict
class UltraMemConfig(PreTrainedConfig):
    """A transformer whose blocks may have a memory layer beside, or instead of, their FFN.

    Fields that other models of `transformers` have mean what they mean there. The others:

    format_version: of these fields; a checkpoint of a newer one is refused.
    vocab_size: rows of the embedding, padding included; logits are over all of them.
    tokenizer_vocab_size: ids that the tokenizer has (None: all). `generate` never chooses one beyond them.
    qk_norm: what one RMSNorm of queries, or keys, spans before the rotary embedding: "head", "all_heads"; or "none".
    hidden_dropout: on the embedding and on what each branch adds to the residual stream.
    mlp_layer_types: "dense" or "sparse" (mixture of experts), one per layer; empty: dense everywhere.
    router_score, norm_topk_prob: weights of the chosen experts: "softmax" over their logits, or (norm_topk_prob false)
        over all experts' logits; "sigmoid": of theirs, divided by their sum.
    router_dtype: of the router's logits: "fp32", "fp64", or "params", that of the model.
    router_expert_bias: a bias on the scores that choose, but not on the weights (router_score "sigmoid").
    routed_scaling_factor: the weights are multiplied by it.
    n_group, topk_group: experts form n_group groups, topk_group of which a token uses; None: no groups.
    shared_expert_intermediate_size: inner width of an expert that every token goes through; 0: none.
    shared_expert_gate: whether that expert's output is weighted by a sigmoid of the token.
    memory: the memory layers; empty: none:
        kind: ultramem_v2, ultramem, memory_plus, pkm or peer; and the sizes that `KINDS` names for it;
        replaces_ffn: whether a block with memory has no FFN;
        pools: [{"rows", "padded_rows"}, ...], value tables that layers share; rows beyond `rows` are never read;
        layers: [{"layer", "pool", "keys_per_side", "row_offset"}, ...] in ascending order. Of a layer's virtual rows,
            row v is row (v + row_offset) mod rows of its pool. With "join", the output is added in that later block.
    memory_kernels: "reference" (PyTorch), "fused" (the package ultramem_kernels), or "auto": fused for tensors on a GPU
        if the package is installed.
    trainer_settings: of the run that trained the model, for the way back; not used by the model.
    """

    model_type = "ultramem"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_local_experts": "num_experts"}

    format_version: int = FORMAT_VERSION
    vocab_size: int = 50304
    tokenizer_vocab_size: int | None = None
    hidden_size: int = 768
    intermediate_size: int = 2496
    num_hidden_layers: int = 20
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    qk_norm: str = "head"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    mlp_layer_types: list[str] = field(default_factory=list)
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    router_score: str = "softmax"
    norm_topk_prob: bool = True
    router_dtype: str = "fp32"
    router_expert_bias: bool = False
    routed_scaling_factor: float | int = 1.0
    n_group: int | None = None
    topk_group: int | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    memory_kernels: str = "auto"
    trainer_settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if not self.mlp_layer_types:
            self.mlp_layer_types = ["dense"] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        if self._experts_implementation is None and (self.moe_intermediate_size % 8 or self.hidden_size % 8):
            self._experts_implementation = "eager"  # torch's grouped product needs rows of a multiple of 16 bytes
        # Not in one of transformers' validators: they wrap an error in two others.
        self._check()

    def _check(self) -> None:
        """Raises ValueError naming the field, its value and what is legal."""
        if not 1 <= self.format_version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version = {self.format_version}: this code reads versions up to {FORMAT_VERSION}; "
                "use the model files of the release that wrote the checkpoint"
            )
        for name, legal in CHOICES.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} = {getattr(self, name)!r}; legal: {', '.join(legal)}")
        if "sparse" in self.mlp_layer_types and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} with num_experts = {self.num_experts}; "
                "legal: 1 to num_experts"
            )
        if self.memory:
            _check_memory(self.memory, self.num_hidden_layers)

    def memory_layer(self, layer: int) -> dict[str, Any] | None:
        """The entry of memory["layers"] for a layer, or None."""
        return next((entry for entry in self.memory.get("layers", ()) if entry["layer"] == layer), None)


def _check_memory(memory: dict[str, Any], num_hidden_layers: int) -> None:
    kind = memory.get("kind")
    if kind not in KINDS:
        raise ValueError(f"memory.kind = {kind!r}; legal: {', '.join(KINDS)}")
    if missing := [name for name in KINDS[kind] if name not in memory]:
        raise ValueError(f"memory lacks {', '.join(missing)}, which kind {kind} needs")
    for entry in memory["layers"]:
        last = entry.get("join", entry["layer"])
        if not 0 <= entry["layer"] <= last < num_hidden_layers or not 0 <= entry["pool"] < len(memory["pools"]):
            raise ValueError(
                f"memory.layers has {entry}; legal: layers below num_hidden_layers = {num_hidden_layers} that join "
                f"themselves or a later one, and pools below {len(memory['pools'])}"
            )


__all__ = ["UltraMemConfig"]
