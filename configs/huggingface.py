"""Architecture from a Hugging Face config.json of a DeepSeek-V3-class model (`model: {from: …}`).

DeepSeek-V2 and V2-Lite are the same network with another router, and are read too. So are files of transformers 4
(`rope_theta`, `rope_scaling`) and of transformers 5 (`rope_parameters`). Every key of the file is either taken, or
irrelevant to pretraining, or checked against the one value that this model supports. A key in none of these lists is a
fault, because it may change the network.

`initializer_range` is not taken: the published files have 0.02, but V3 was trained with 0.006 (V3 §4.2). Keys of the
recipe (`aux_loss_alpha`, …) are not taken either: the recipe is in `balance` and `train`.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from ..model.config import ModelConfig, RopeScaling
from .located_yaml import Fault, Located, Location, Scalar, parse_yaml

_NOT_TAKEN = {"initializer_range"}
_ROPE = {"rope_theta", "rope_scaling"}
_TAKEN = set(ModelConfig.model_fields) - _NOT_TAKEN - _ROPE
_RENAMED = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}
_MUST_BE: dict[str, Scalar] = {
    "attention_bias": False,
    "attention_dropout": 0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "tie_word_embeddings": False,
    "mlp_bias": False,
}
_KINDS = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}
# Defaults of transformers' DeepseekV2Config that differ from those of DeepseekV3Config, which are ours.
_V2_DEFAULTS: dict[str, Scalar] = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 32,
    "first_k_dense_replace": 0,
    "num_attention_heads": 32,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 2048,
}
_DOES_NOT_MATTER = _NOT_TAKEN | {
    *("_name_or_path", "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "problem_type", "id2label", "label2id", "return_dict"),
    *("is_encoder_decoder", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("chunk_size_feed_forward", "ep_size", "pretraining_tp", "quantization_config", "seq_aux", "aux_loss_alpha"),
}
_YARN = set(RopeScaling.model_fields) - {"type"}


def read_architecture(path: Path, shown: str, named_at: Location, faults: list[Fault]) -> dict[str, Located]:
    """Return all keys of the `model` section that the file at `path` determines.

    A key that the file leaves out has transformers' default for the file's `model_type`; the defaults of
    DeepseekV3Config are also ours. `shown` is the file's name in messages, `named_at` the location that named the file.
    Keys that cannot be taken over are added to `faults`.
    """
    if path.is_dir():
        path, shown = path / "config.json", f"{shown.rstrip('/')}/config.json"
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except OSError as error:
        faults.append(Fault(named_at, "model.from", f"cannot read {shown}: {error.strerror}"))
        return {}
    except ValueError as error:  # of JSON or of UTF-8
        faults.append(Fault(named_at, "model.from", f"{shown} is not JSON: {error}"))
        return {}
    # JSON is YAML except for tabs, and JSON strings contain none. Read as YAML, faults have line numbers.
    tree = parse_yaml(text.replace("\t", " "), Location(shown, 1, named_at.level), faults)
    if tree is None or not isinstance(tree.value, dict):
        faults.append(Fault(named_at, "model.from", f"{shown} holds no JSON object"))
        return {}
    return _Architecture(tree, faults).read()


class _Architecture:
    """Reader of one config.json."""

    def __init__(self, tree: Located, faults: list[Fault]) -> None:
        self.entries, self.location, self.faults = tree.mapping, tree.location, faults
        self.defaults: dict[str, Scalar | None] = {
            name: field.default for name, field in ModelConfig.model_fields.items() if name not in _NOT_TAKEN
        }

    def read(self) -> dict[str, Located]:
        kind = self._kind()
        if kind is None:
            return {}
        if kind == "deepseek_v2":
            self.defaults |= _V2_DEFAULTS
            self._check_v2()
        taken: dict[str, Located] = {}
        for name, entry in self.entries.items():
            target = _RENAMED.get(name, name)
            if name in _MUST_BE:
                self._must_be(name, _MUST_BE[name])
            elif target in _TAKEN:
                taken[target] = entry
            elif name not in _DOES_NOT_MATTER | _ROPE | {"rope_parameters"} | self._derived().keys():
                self._unknown(name, entry)
        for name, expected in self._derived().items():
            if expected is not None:
                self._must_be(name, expected)
        absences = {"n_shared_experts": 0} | ({"n_group": 1, "topk_group": 1} if kind == "deepseek_v2" else {})
        for name, absent in absences.items():
            if name in taken and taken[name].value is None:
                taken[name] = Located(absent, taken[name].location, str(absent))
        taken |= self._rope()
        return {name: taken.get(name) or Located(default, self.location) for name, default in self.defaults.items()}

    def _kind(self) -> str | None:
        """Return the `model_type` of a supported model; None, and a fault, for another model's file."""
        kind, networks = self.entries.get("model_type"), self.entries.get("architectures")
        names = [item.value for item in networks.value] if networks and isinstance(networks.value, list) else []
        for known, network in _KINDS.items():
            if (kind and kind.value == known) or network in names:
                return known
        location = kind.location if kind else self.location
        found = f"{kind.value!r}" if kind else "none"
        wanted = " or ".join(map(repr, _KINDS))
        self._fault(location, "model_type", f"expects {wanted}, found {found}: this is the config of another model")
        return None

    def _check_v2(self) -> None:
        """Add faults for keys that V2's files leave open, or that the two implementations of V2 read differently."""
        if "num_experts_per_tok" not in self.entries:
            self._fault(self.location, "num_experts_per_tok", "is missing, and DeepseekV2Config has no default for it")
        normalised = self.entries.get("norm_topk_prob")
        if normalised is not None and normalised.value:
            message = (
                "is true, which transformers ignores and DeepSeek's code takes for routed_scaling_factor's absence"
            )
            self._fault(
                normalised.location, "norm_topk_prob", f"{message}; set false, and model.norm_topk_prob beside from"
            )

    def _derived(self) -> dict[str, int | None]:
        """Values of keys that follow from other keys; None where a value is not known."""

        def number(name: str) -> int | None:
            entry = self.entries.get(name)
            value = self.defaults[name] if entry is None else entry.value
            return value if isinstance(value, int) else None

        plain, rotated = number("qk_nope_head_dim"), number("qk_rope_head_dim")
        both = None if plain is None or rotated is None else plain + rotated
        return {"num_key_value_heads": number("num_attention_heads"), "head_dim": rotated, "qk_head_dim": both}

    def _must_be(self, name: str, expected: Scalar) -> None:
        entry = self.entries.get(name)
        if entry is None or entry.value is None or entry.value == expected:
            return
        wanted = str(expected).lower() if isinstance(expected, bool) else repr(expected)
        self._fault(entry.location, name, f"is {entry.text or repr(entry.value)}; this model only supports {wanted}")

    def _rope(self) -> dict[str, Located]:
        """Return rope_theta and rope_scaling, from either generation of files."""
        entries = self.entries
        given = entries.get("rope_parameters")
        if given is None or given.value is None:
            given = entries.get("rope_scaling")
        inner = given.mapping if given else {}
        rope: dict[str, Located] = {}
        theta = inner.get("rope_theta") or entries.get("rope_theta")
        if theta is not None:
            rope["rope_theta"] = theta
        if given is None or given.value is None:
            return rope
        kind = inner.get("rope_type") or inner.get("type")
        if not isinstance(given.value, dict) or kind is None:
            self._fault(given.location, "rope_scaling", "expects an object with a `type` (or `rope_type`)")
        elif kind.value == "yarn":
            rope["rope_scaling"] = Located(self._yarn(given.location, inner), given.location)
        elif kind.value != "default":
            self._fault(kind.location, "rope_scaling.type", f"is {kind.value!r}; this model only supports 'yarn'")
        return rope

    def _yarn(self, location: Location, inner: dict[str, Located]) -> dict[str, Located]:
        """Return YaRN's keys; a key left out gets the value that transformers uses without the key."""
        for name, entry in inner.items():
            if name == "attention_factor" and entry.value is not None:
                self._fault(
                    entry.location, "rope_scaling.attention_factor", "is not supported: use mscale, mscale_all_dim"
                )
            elif name == "truncate" and entry.value is not True:
                self._fault(entry.location, "rope_scaling.truncate", f"is {entry.text}; this model only supports true")
            elif name not in _YARN | {"type", "rope_type", "rope_theta", "attention_factor", "truncate"}:
                self._unknown(name, entry, "rope_scaling.", _YARN)
        mscale, all_dim = (inner[name].value if name in inner else None for name in ("mscale", "mscale_all_dim"))
        if (all_dim and not mscale) or (mscale not in (None, 1) and not all_dim):
            message = (
                "give both mscale and mscale_all_dim: alone, transformers and DeepSeek's code read them differently"
            )
            self._fault(location, "rope_scaling", message)
        if "factor" not in inner:
            self._fault(location, "rope_scaling", "needs a `factor`")
        yarn = {name: entry for name, entry in inner.items() if name in _YARN}
        if "original_max_position_embeddings" not in yarn and "max_position_embeddings" in self.entries:
            yarn["original_max_position_embeddings"] = self.entries["max_position_embeddings"]
        for name, absent in (("mscale", 1.0), ("mscale_all_dim", 0.0)):
            yarn.setdefault(name, Located(absent, location))
        return yarn

    def _unknown(self, name: str, entry: Located, above: str = "", known: set[str] | None = None) -> None:
        near = difflib.get_close_matches(name, known or _TAKEN | set(_MUST_BE) | _ROPE | {"rope_parameters"}, n=1)
        hint = f"did you mean {near[0]}?" if near else "it may change the network; remove it if it does not"
        self._fault(entry.location, above + name, f"unknown key ({hint})")

    def _fault(self, location: Location, name: str, message: str) -> None:
        self.faults.append(Fault(location, name, message))
