"""The model families that can be imported: how GGUF and mlx-lm name, shape and order each one's tensors.

A family is one architecture of GGUF and the class of mlx-lm that computes it. What config.json needs from the
header stands in ``gguf_config``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from opta_lmx.inference.worker.gguf_config import Dimensions

Names: TypeAlias = Mapping[str, str]

_TOP: Names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_NORMS: Names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_ATTENTION: Names = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_HEAD_NORMS: Names = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP: Names = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_DENSE: Names = {**_NORMS, **_ATTENTION, **_MLP}
_FOUR_NORMS: Names = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _experts(prefix: str) -> Names:
    """A router and the three projections of all experts, each stacked in one tensor."""
    return {
        "ffn_gate_inp": f"{prefix}.gate",
        "ffn_gate_exps": f"{prefix}.switch_mlp.gate_proj",
        "ffn_up_exps": f"{prefix}.switch_mlp.up_proj",
        "ffn_down_exps": f"{prefix}.switch_mlp.down_proj",
    }


@dataclass(frozen=True, slots=True)
class Family:
    """One class of mlx-lm.

    ``interleaved`` names the projections whose rows stand in pairs for rotary embedding, as llama.cpp wants them
    for some families; mlx-lm wants each head's first values before its second. ``biased`` groups the projections
    that have a bias all together or not at all, ``with_bias`` those that always have one. ``adds_one`` is for
    classes that add one to the weights of their norms, which GGUF stores with it. ``own_head_dim`` False: the class
    divides the hidden size by the heads. ``tied``: it has no output matrix of its own. ``wide``: activations pass
    the largest 16-bit float of ten bits, so its 16-bit form is bfloat16.
    """

    model_type: str
    block: Names
    top: Names = field(default_factory=lambda: _TOP)
    interleaved: frozenset[str] = frozenset()
    biased: tuple[frozenset[str], ...] = ()
    with_bias: frozenset[str] = frozenset()
    adds_one: bool = False
    own_head_dim: bool = True
    tied: bool = False
    wide: bool = False

    def names(self, layers: int) -> Iterator[tuple[str, str]]:
        """GGUF's and mlx-lm's name of every module."""
        yield from self.top.items()
        for layer in range(layers):
            for short, module in self.block.items():
                yield f"blk.{layer}.{short}", f"model.layers.{layer}.{module}"

    def may_have_bias(self, short: str) -> bool:
        """True if mlx-lm's class has a place for this module's bias."""
        return short in self.with_bias or any(short in group for group in self.biased)


_PAIRS = frozenset({"attn_q", "attn_k"})
_LLAMA = Family(
    model_type="llama",
    block=_DENSE,
    interleaved=_PAIRS,
    biased=(frozenset(_ATTENTION), frozenset(_MLP)),
)
_GEMMA2 = Family(
    model_type="gemma2",
    block={**_FOUR_NORMS, **_ATTENTION, **_MLP},
    adds_one=True,
    tied=True,
    wide=True,
)
FAMILIES: Mapping[str, Family] = {
    # Mistral's files are llama's, too; mlx-lm applies no sliding window to them, and neither does llama.cpp.
    "llama": _LLAMA,
    "smollm3": replace(_LLAMA, model_type="smollm3"),
    "granite": replace(_LLAMA, model_type="granite", own_head_dim=False),
    "qwen2": Family(
        model_type="qwen2",
        block=_DENSE,
        with_bias=frozenset({"attn_q", "attn_k", "attn_v"}),
        own_head_dim=False,
    ),
    "qwen3": Family(model_type="qwen3", block={**_DENSE, **_HEAD_NORMS}),
    "qwen3moe": Family(model_type="qwen3_moe", block={**_NORMS, **_ATTENTION, **_HEAD_NORMS, **_experts("mlp")}),
    "gemma": Family(model_type="gemma", block=_DENSE, adds_one=True, tied=True, wide=True),
    "gemma2": _GEMMA2,
    "gemma3": replace(
        _GEMMA2, model_type="gemma3_text", block={**_FOUR_NORMS, **_ATTENTION, **_HEAD_NORMS, **_MLP}, tied=False
    ),
    "phi3": Family(
        model_type="phi3",
        block={
            **_NORMS,
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        own_head_dim=False,
    ),
}

# GGUF calls these llama, too.
_MIXTRAL = Family(
    model_type="mixtral",
    block={**_NORMS, **_ATTENTION, **_experts("block_sparse_moe")},
    interleaved=_PAIRS,
    own_head_dim=False,
)


def family_of(architecture: str, experts: int) -> Family | None:
    """None for an architecture, or a number of experts in it, that there is no class for."""
    if architecture == "llama" and experts:
        return _MIXTRAL
    if bool(experts) != (architecture == "qwen3moe"):
        return None
    return FAMILIES.get(architecture)


def shape_of(short: str, family: Family, d: Dimensions) -> tuple[int, ...]:
    """The shape of a module's weight, rows first."""
    queries, keys = d.num_attention_heads * d.head_dim, d.num_key_value_heads * d.head_dim
    # phi3 has gate and up in one.
    wide = d.intermediate_size if "ffn_gate" in family.block else 2 * d.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (d.vocab_size, d.hidden_size),
        "output": (d.vocab_size, d.hidden_size),
        "attn_q": (queries, d.hidden_size),
        "attn_k": (keys, d.hidden_size),
        "attn_v": (keys, d.hidden_size),
        "attn_qkv": (queries + 2 * keys, d.hidden_size),
        "attn_output": (d.hidden_size, queries),
        "attn_q_norm": (d.head_dim,),
        "attn_k_norm": (d.head_dim,),
        "ffn_gate": (d.intermediate_size, d.hidden_size),
        "ffn_up": (wide, d.hidden_size),
        "ffn_down": (d.hidden_size, d.intermediate_size),
        "ffn_gate_inp": (d.experts, d.hidden_size),
        "ffn_gate_exps": (d.experts, d.expert_size, d.hidden_size),
        "ffn_up_exps": (d.experts, d.expert_size, d.hidden_size),
        "ffn_down_exps": (d.experts, d.hidden_size, d.expert_size),
    }
    return shapes.get(short, (d.hidden_size,))
