"""The `model` section: the architecture, in the words of Hugging Face's DeepseekV3Config."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ..settings import Clash, Section, SectionFaults, key


class RopeScaling(Section):
    """YaRN context extension of the decoupled rotary key (V3 §4.3)."""

    type: Literal["yarn"] = key("yarn", "kind of scaling")
    factor: float = key(40.0, "length of the context over the original one", ge=1)
    original_max_position_embeddings: int = key(4096, "context of the first training phase", unit="tokens", ge=1)
    beta_fast: float = key(32.0, "rotations above which a frequency is unchanged")
    beta_slow: float = key(1.0, "rotations below which a frequency is fully interpolated")
    mscale: float = key(1.0, "attention temperature coefficient of the rotation")
    mscale_all_dim: float = key(1.0, "attention temperature coefficient of the softmax scale; 0 turns it off")


class ModelConfig(Section):
    """Architecture of a DeepSeek-V3-class decoder. `from: config.json` reads a Hugging Face file first."""

    vocab_size: int = key(129280, "rows of the embedding and of the output head", ge=2)
    hidden_size: int = key(7168, "width of the residual stream", ge=1)
    intermediate_size: int = key(18432, "inner width of the dense feed-forward layers", ge=1)
    moe_intermediate_size: int = key(2048, "inner width of one expert", ge=1)
    num_hidden_layers: int = key(61, "decoder blocks, MTP modules not counted", ge=1)
    first_k_dense_replace: int = key(3, "number of first blocks that are dense instead of MoE", ge=0)
    num_attention_heads: int = key(128, "attention heads", ge=1)
    q_lora_rank: int | None = key(1536, "width of the compressed query latent; null projects queries directly", ge=1)
    kv_lora_rank: int = key(512, "width of the compressed key-value latent", ge=1)
    qk_nope_head_dim: int = key(128, "width of a head's query and key that is not rotated", ge=1)
    qk_rope_head_dim: int = key(64, "width of a head's query and key that is rotated; even", ge=2, multiple_of=2)
    v_head_dim: int = key(128, "value width per head", ge=1)
    n_routed_experts: int = key(256, "routed experts per layer", ge=1)
    n_shared_experts: int = key(1, "shared experts per layer, computed as one expert of their joint width", ge=0)
    num_experts_per_tok: int = key(8, "routed experts a token is sent to (top-k)", ge=1)
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = key(
        "noaux_tc",
        "router: noaux_tc is V3's (biased, node-limited), group_limited_greedy V2's (device-limited), greedy top-k",
    )
    scoring_func: Literal["sigmoid", "softmax"] = key(
        "sigmoid", "affinity of a token to an expert: sigmoid of the logit (V3), or softmax over all experts (V2)"
    )
    n_group: int = key(
        8, "expert groups, each a node's (V3) or device's (V2); greedy only measures balance by them", ge=1
    )
    topk_group: int = key(4, "groups a token may use; greedy does not limit them", ge=1)
    norm_topk_prob: bool = key(True, "normalise the selected scores to sum 1 (V3); V2 does not")
    routed_scaling_factor: float = key(2.5, "factor on the gate weights after normalisation", gt=0)
    num_nextn_predict_layers: int = key(1, "MTP modules (depth); 0 trains without multi-token prediction", ge=0)
    max_position_embeddings: int = key(4096, "longest sequence the rotary tables cover", unit="tokens", ge=1)
    rope_theta: float = key(10000.0, "base of the rotary frequencies", gt=0)
    rope_scaling: RopeScaling | None = key(None, "YaRN context extension; null for none")
    rms_norm_eps: float = key(1e-6, "epsilon of every RMSNorm", gt=0)
    initializer_range: float = key(0.006, "standard deviation of the initial weights (V3 §4.2: 0.006)", gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        clashes = []
        experts, groups, usable = self.n_routed_experts, self.n_group, self.topk_group
        if experts % groups:
            message = f"{experts} is not a multiple of n_group {groups}"
            clashes.append(Clash(("n_routed_experts", "n_group"), message))
        if usable > groups:
            clashes.append(Clash(("topk_group", "n_group"), f"{usable} is above n_group {groups}"))
        clashes += self._unreachable()
        if self.first_k_dense_replace > self.num_hidden_layers:
            message = f"{self.first_k_dense_replace} is above num_hidden_layers {self.num_hidden_layers}"
            clashes.append(Clash(("first_k_dense_replace", "num_hidden_layers"), message))
        if clashes:
            raise SectionFaults(clashes)
        return self

    def _unreachable(self) -> list[Clash]:
        """Clash of a top-k above the number of experts that a token may use, with values that would work."""
        top_k, experts, groups = self.num_experts_per_tok, self.n_routed_experts, self.n_group
        if self.topk_method == "greedy":
            message = f"{top_k} is above n_routed_experts {experts}"
            return [Clash(("num_experts_per_tok", "n_routed_experts"), message)] if top_k > experts else []
        reachable = experts // groups * min(self.topk_group, groups)
        if top_k <= reachable:
            return []
        keys = ("num_experts_per_tok", "topk_group", "n_group", "n_routed_experts")
        works = [f"nearest: {reachable}"] if reachable else []
        needed = -(-top_k // max(1, experts // groups))
        works += [f"or topk_group {needed}"] if needed <= groups and experts // groups else []
        limits = f"{self.topk_group} of {groups} groups of {experts} experts"
        hint = f" ({', '.join(works)})" if works else ""
        return [Clash(keys, f"{top_k} is above the {reachable} experts in {limits}{hint}")]

    @property
    def has_router_bias(self) -> bool:
        """Whether routers are balanced by a bias on their scores, which is V3's method alone."""
        return self.topk_method == "noaux_tc"

    @property
    def limits_groups(self) -> bool:
        """Whether a token may use fewer groups than there are."""
        return self.topk_method != "greedy" and self.topk_group < self.n_group

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the plain part and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with a router: mixture-of-experts blocks, those of MTP modules included."""
        return self.num_hidden_layers - self.first_k_dense_replace + self.num_nextn_predict_layers

    def is_moe(self, layer: int) -> bool:
        """Whether block `layer` is a mixture of experts; MTP blocks (from num_hidden_layers on) always are."""
        return layer >= self.first_k_dense_replace
