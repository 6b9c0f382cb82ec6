"""Shipped configs against the published models and recipes."""

from __future__ import annotations

import itertools
import math
from importlib.resources import files

import pytest

from counterflow import configs
from counterflow.configs.config import Config
from counterflow.configs.load import load_config
from counterflow.configs.sections import BatchConfig
from counterflow.configs.source import shipped
from counterflow.model.counts import count_parameters
from counterflow.parallel.layout import Layout


@pytest.fixture(scope="module")
def v3() -> Config:
    return load_config("deepseek-v3-671b")


@pytest.fixture(scope="module")
def lite() -> Config:
    return load_config("deepseek-v3-16b")


def tokens_after(batch: BatchConfig, steps: int) -> int:
    """Tokens of the first `steps` steps, counted one by one."""
    tokens = 0
    for _ in range(steps):
        tokens += batch.sequences_at(tokens) * batch.sequence_length
    return tokens


def test_the_four_promised_configs_are_shipped() -> None:
    assert {"smoke", "tiny", "deepseek-v3-16b", "deepseek-v3-671b"} <= set(shipped())


@pytest.mark.parametrize("name", shipped())
def test_shipped_configs_say_where_they_come_from_and_do_not_name_the_run(name: str) -> None:
    text = (files(configs) / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert load_config(name).run.name == name


def test_v3_architecture_is_the_published_one(v3: Config) -> None:
    # arXiv 2412.19437 §4.2; the published checkpoint has 671B parameters, 37B of them active, without its MTP module.
    model = v3.model
    assert (model.num_hidden_layers, model.first_k_dense_replace, model.hidden_size, model.vocab_size) == (
        61,
        3,
        7168,
        129280,
    )
    assert (model.intermediate_size, model.moe_intermediate_size) == (18432, 2048)
    assert (model.num_attention_heads, model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim) == (
        128,
        128,
        64,
        128,
    )
    assert (model.kv_lora_rank, model.q_lora_rank) == (512, 1536)
    assert (model.n_routed_experts, model.n_shared_experts, model.num_experts_per_tok) == (256, 1, 8)
    assert (model.n_group, model.topk_group, model.norm_topk_prob, model.routed_scaling_factor) == (8, 4, True, 2.5)
    assert (model.num_nextn_predict_layers, model.initializer_range, model.rms_norm_eps) == (1, 0.006, 1e-6)
    assert model.rope_scaling is None
    assert count_parameters(model).total == pytest.approx(671.03e9, abs=0.01e9)


def test_v3_recipe_ends_at_14_8_trillion_tokens_in_every_schedule(v3: Config) -> None:
    assert v3.train.tokens == 14.8e12
    for schedule in (v3.optim.lr, v3.balance.bias_update_speed, v3.train.mtp_weight):
        assert schedule.total_tokens == pytest.approx(14.8e12, rel=1e-12)


@pytest.mark.parametrize(
    ("tokens", "lr"),
    [
        (0, 0.0), (14.05e9, 1.1e-4), (28.1e9, 2.2e-4), (5e12, 2.2e-4), (10e12 - 1, 2.2e-4), (12.15e12, 1.21e-4),
        (14.3e12 + 1, 2.2e-5), (14.632e12, 2.2e-5), (14.634e12, 7.3e-6), (14.8e12, 7.3e-6),
    ],
)  # fmt: skip
def test_v3_learning_rate_at_the_published_points(v3: Config, tokens: float, lr: float) -> None:
    assert v3.optim.lr.at(tokens) == pytest.approx(lr, rel=1e-6)


def test_v3_warm_up_is_two_thousand_steps_of_the_growing_batch(v3: Config) -> None:
    warm_up = v3.optim.lr.phases[0].tokens
    # dt/dn = 4096 (3072 + 12288 t / 469e9), solved; steps in multiples of 128 sequences lag it by half a multiple.
    assert warm_up == pytest.approx(469e9 * 3072 / 12288 * math.expm1(12288 * 4096 * 2000 / 469e9), rel=2e-3)
    assert tokens_after(v3.batch, 2000) == pytest.approx(warm_up, rel=0.025)


def test_v3_router_and_mtp_phases(v3: Config) -> None:
    speed, weight = v3.balance.bias_update_speed, v3.train.mtp_weight
    assert (speed.at(14.3e12 - 1), speed.at(14.3e12 + 1)) == (0.001, 0.0)
    assert (weight.at(10e12 - 1), weight.at(10e12 + 1)) == (0.3, 0.1)
    assert v3.balance.expert_loss == 1e-4


def test_v3_optimizer(v3: Config) -> None:
    optim = v3.optim
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_norm, optim.moments) == (
        0.9,
        0.95,
        0.1,
        1.0,
        "bf16",
    )


def test_v3_batch_grows_in_shares_that_all_data_parallel_ranks_can_take(v3: Config) -> None:
    batch, dp = v3.batch, v3.parallel.dp
    assert isinstance(dp, int)
    sizes = [batch.sequences_at(tokens * 1e9) for tokens in range(0, 480, 3)]
    assert (sizes[0], batch.sequences_at(468e9) < 15360, sizes[-1]) == (3072, True, 15360)
    assert sizes == sorted(sizes)
    assert all(size % (dp * batch.micro_sequences) == 0 for size in sizes)
    assert batch.sequence_length == 4096


def test_v3_layout_is_2048_gpus(v3: Config) -> None:
    parallel = v3.parallel
    assert isinstance(parallel.dp, int)
    assert isinstance(parallel.gpus_per_node, int)
    assert (parallel.pp, parallel.ep, parallel.dp, parallel.gpus_per_node) == (16, 64, 128, 8)
    layout = Layout(parallel.pp * parallel.dp, parallel.pp, parallel.ep, parallel.gpus_per_node)
    assert (layout.world_size, layout.edp) == (2048, 2)


def test_16b_has_the_size_of_v2_lite(lite: Config) -> None:
    # arXiv 2405.04434 appendix B: 15.7B parameters, 2.4B of them active per token, without embedding and head.
    model = lite.model
    assert count_parameters(model).total == pytest.approx(15.7e9, abs=0.05e9)
    assert (model.num_hidden_layers, model.hidden_size, model.num_attention_heads, model.q_lora_rank) == (
        27,
        2048,
        16,
        None,
    )
    assert (model.n_routed_experts, model.n_shared_experts, model.num_experts_per_tok) == (64, 2, 6)


def test_16b_keeps_the_features_of_v3(lite: Config, v3: Config) -> None:
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_nextn_predict_layers"):
        assert getattr(lite.model, name) == getattr(v3.model, name)
    assert lite.optim.model_copy(update={"lr": v3.optim.lr}) == v3.optim
    assert lite.memory.recompute == v3.memory.recompute


def test_16b_recipe_fits_its_length(lite: Config) -> None:
    assert lite.train.tokens == 5.7e12
    for schedule in (lite.optim.lr, lite.balance.bias_update_speed, lite.train.mtp_weight):
        assert schedule.total_tokens == pytest.approx(5.7e12, rel=1e-12)
    assert tokens_after(lite.batch, 2000) == pytest.approx(lite.optim.lr.phases[0].tokens, rel=1e-3)
    steps = [lite.optim.lr.at(share * 5.7e12) for share in (0.79, 0.81, 0.91)]
    factors = [after / before for before, after in itertools.pairwise(steps)]
    assert factors == pytest.approx([0.316, 0.316], rel=1e-3)


@pytest.mark.parametrize("name", ["smoke", "tiny"])
def test_small_configs_have_every_part_of_v3(name: str) -> None:
    config = load_config(name)
    model = config.model
    assert 0 < model.first_k_dense_replace < model.num_hidden_layers
    assert 0 < model.topk_group < model.n_group < model.n_routed_experts
    assert model.q_lora_rank is not None
    assert model.n_shared_experts > 0
    assert model.num_nextn_predict_layers > 0
    assert model.vocab_size >= 257  # bytes, and the end of a document
    assert config.data.source == "builtin"
    assert config.train.steps is not None


def test_smoke_learning_rate_covers_the_run() -> None:
    config = load_config("smoke")
    assert config.train.steps is not None
    assert config.optim.lr.total_tokens == tokens_after(config.batch, config.train.steps)


def test_smoke_divides_among_four_processes() -> None:
    config = load_config("smoke", ["parallel.dp=4"])
    assert config.parallel.ep == 2
    assert config.batch.global_sequences % (4 * config.batch.micro_sequences) == 0
