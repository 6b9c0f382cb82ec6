"""The README's claims and the tests that prove each, as the page docs/claims.md.

    make claims    # writes the page

`CLAIMS` lists every sentence of the README's two lists, exactly as it stands there, with patterns of test names.
`tests/house/test_claims.py` fails where the README has a claim without tests, where a pattern finds no test, and where
the page is not the one that `render` makes. A test that is renamed or added therefore shows up in the page.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

CLAIMS: dict[str, tuple[str, ...]] = {
    # It runs on a laptop.
    "Every feature has a CPU path, and no test needs a GPU": (
        "tests/house/*::no_test_waits_for_a_gpu",
        "tests/comm/*::both_generations_equal_flat_and_two_hop",
        "tests/fp8/*::both_tilings_are_quantizes",
        "tests/training/*::training_has_the_bits_of_emulation",
    ),
    # The layout never changes the result.
    "For one config and seed, every grid of pipeline, expert and data parallel processes gives the losses of a single "
    "process, up to the order in which floating-point numbers are added": (
        "tests/training/*::numbers_of_every_step_equal_the_single_processs",
        "tests/training/*::expert_counts_and_router_biases_equal_the_single_processs",
        "tests/training/*::validation_loss_equals_the_single_processs",
        "tests/training/*::replicas_are_bit_equal_after_20_steps",
        "tests/training/*::gradient_of_each_loss_alone_is_the_same_in_every_layout_and_split",
        "tests/training/*::two_hops_follow_the_single_process",
        "tests/training/*::every_router_trains_alike_in_every_layout",
        "tests/data/*::every_layout_ramp_and_resume_point_sees_the_same_stream",
    ),
    "Every pipeline schedule does too": (
        "tests/training/*::losses_and_gradient_norm_follow_the_single_process",
        "tests/training/*::gradients_of_every_parameter_in_the_first_step_are_the_single_processs",
        "tests/training/*::counts_and_biases_are_the_single_processs",
        "tests/training/*::copies_of_a_parameter_are_bit_equal_at_the_end",
        "tests/training/*::models_of_every_shape_train_alike_in_a_pipeline",
    ),
    "`counterflow verify` checks it on a small copy of your own configuration": (
        "tests/verify/*::a_sound_run_agrees",
        "tests/verify/*::a_planted_fault_is_named",
        "tests/verify/*::one_process_is_compared_with_plain_autograd",
        "tests/verify/*::the_topology_stays",
        "tests/verify/*::shipped_configs_shrink_and_leave_a_single_process_the_same_model",
        "tests/verify/*::the_command_line_from_end_to_end",
    ),
    # FP8 as DeepSeek-V3 trained.
    "Scales are fine-grained, as the paper's table has them": (
        "tests/fp8/*::v3s_formats_are_those_of_the_report",
        "tests/fp8/*::quantize_equals_integer_arithmetic_on_ten_million_numbers",
        "tests/fp8/*::partial_tiles_are_their_own_tiles",
    ),
    "All three products of every linear layer take FP8 operands": (
        "tests/fp8/*::three_products_are_those_of_operands_quantised_along_the_contraction",
        "tests/fp8/*::grouped_products_are_each_experts_own",
        "tests/fp8/*::embedding_head_router_norms_and_attention_are_not_quantised",
    ),
    "Activations are cached in eight bits, the output of attention in twelve": (
        "tests/fp8/*::the_input_is_kept_in_one_byte_and_its_scales",
        "tests/fp8/*::the_attentions_output_is_kept_in_twelve_bits",
        "tests/model/*::fp8_keeps_half_of_what_linear_layers_and_swiglu_keep_in_bf16",
    ),
    "A CPU computes the numbers of the recipe": (
        "tests/fp8/*::other_formats_equal_integer_arithmetic",
        "tests/fp8/*::promoted_equals_a_loop_over_blocks_bit_for_bit",
        "tests/fp8/*::backend_gives_the_bits_of_emulation",
    ),
    "After 1,000 steps of a model of 20 million parameters the loss differs from BF16's by 0.085 %": (
        "tests/audit/*::losses_stay_together_over_60_steps_and_fall_below_the_unigram_entropy",
        "tests/audit/*::each_run_is_the_one_that_train_makes",
    ),
    "An audit says where the error comes from": (
        "tests/audit/*::attribution_adds_up",
        "tests/audit/*::attribution_names_the_class_that_was_made_bad",
    ),
    # Slow links carry what V3 sends.
    "A token crosses once to each node that needs it, in FP8, and sums come back once": (
        "tests/comm/*::two_hops_equal_flat_for_200_random_routings",
        "tests/comm/*::partial_sums_are_rounded_where_they_are_sent",
        "tests/comm/*::a_message_holds_codes_and_scales_bit_for_bit",
        "tests/comm/*::experts_quantise_neither_tokens_nor_gradients_again",
    ),
    "Dispatch and combine send 0.23 and 0.44 of the bytes of a flat all-to-all in BF16, counted": (
        "tests/comm/*::v3s_shape_sends_a_quarter_of_flat_bf16_between_nodes",
        "tests/comm/*::the_meter_equals_the_tensors_that_were_sent",
    ),
    "Every step records what it sent": (
        "tests/training/*::a_step_counts_what_all_its_ranks_send",
        "tests/report/*::metrics_keep_traffic_and_steps_without_it",
    ),
    "`counterflow report` adds up these bytes": (
        "tests/report/*::report_prints_a_run_in_80_columns_and_as_json",
        "tests/report/*::a_table_has_a_row_for_each_purpose_and_their_sum",
    ),
    # One schedule, four uses.
    "A pipeline schedule is plain data: the same object is checked for deadlocks, simulated, executed and drawn": (
        "tests/parallel/schedule/*::every_schedule_can_run",
        "tests/parallel/schedule/*::faults_are_named_with_rank_and_position",
        "tests/parallel/schedule/*::a_deadlock_of_blocking_sends_alone_is_found",
        "tests/parallel/schedule/*::times_are_the_least_that_respect_order_data_and_channels",
        "tests/parallel/*::steps_take_no_less_than_simulated",
        "tests/report/*::the_page_holds_every_action_once_at_its_times",
    ),
    "DualPipe, DualPipeV, ZB1P, interleaved 1F1B, 1F1B and GPipe come with Counterflow": (
        "tests/parallel/schedule/*::order_*_deepseeks_public_code",
        "tests/parallel/schedule/*::dualpipev_is_torchs",
        "tests/parallel/schedule/*::zb1p_is_torchs",
        "tests/parallel/schedule/*::interleaved_is_torchs_where_ranks_divide_the_microbatches",
        "tests/parallel/schedule/*::1f1b_is_torchs",
        "tests/parallel/schedule/*::gpipe_is_torchs_but_for_the_order_of_backwards",
        "tests/parallel/schedule/*::worst_bubble_is_table_2",
    ),
    "A schedule of your own is one function": (
        "tests/examples/*::own_schedule*",
        "tests/parallel/schedule/*::a_users_schedule_is_checked_and_simulated_like_any",
        "tests/parallel/schedule/*::it_is_found_checked_simulated_and_drawn",
    ),
    # The code is made to be read.
    "A training step is one function, `Trainer.step`": ("tests/house/*::pointers_into_the_code_lead_somewhere",),
    "A test keeps every file short": ("tests/house/*::no_python_file_outgrows_one_idea",),
    "How it is built explains the design": (
        "tests/house/*::pointers_into_the_code_lead_somewhere",
        "tests/house/*::every_folder_is_described_once",
    ),
    # Architecture
    "latent attention, routed and shared experts, and multi-token prediction, equal to transformers'": (
        "tests/model/*::logits_loss_and_every_gradient_equal_transformers",
        "tests/model/*::mtp_equals_the_layers_that_transformers_drafts_with",
        "tests/model/*::671b_tensors_have_the_shapes_of_transformers",
        "tests/model/*::671b_parameters_equal_transformers_and_the_published_sizes",
        "tests/model/*::losses_counts_and_gradients_equal_the_reference",
    ),
    "YaRN": ("tests/model/*::rotary_factors_and_softmax_scale_equal_transformers",),
    "V3's and V2's routers and plain top-k": (
        "tests/model/*::selection_weights_and_counts_equal_the_equations",
        "tests/model/*::choice_and_gates_equal_the_equations",
        "tests/model/*::router_equals_transformers",
    ),
    "bias, balance losses or token dropping": (
        "tests/model/*::bias_moves_by_the_speed_against_the_load",
        "tests/model/*::balance_loss_and_its_gradient_alone_equal_the_equations",
        "tests/model/*::gradient_of_each_loss_alone_equals_the_formula_in_any_split",
        "tests/model/*::the_pairs_of_lowest_affinity_beyond_a_groups_budget_are_dropped",
        "tests/training/*::the_bias_alone_balances_and_without_it_nothing_does",
    ),
    # Parallelism
    "pipeline, expert and data parallelism in one grid": (
        "tests/parallel/*::ranks_and_coordinates_are_each_others_inverse_with_ep_fastest",
        "tests/parallel/*::groups_hold_the_ranks_of_the_layout",
        "tests/training/*::every_parameter_counts_once_in_the_norm_and_in_the_optimizers_state",
    ),
    "forwards and backwards overlapped in pairs": (
        "tests/parallel/*::cut_and_deferred_gradients_are_plain_autograds",
        "tests/parallel/*::deepseeks_order_of_a_layer_pair",
        "tests/training/*::orders_of_overlap_and_recompute_give_the_same_bits",
    ),
    "their all-to-all hidden behind computation": (
        "tests/parallel/*::v3_hides_communication_of_half_the_compute_and_nearly_all_of_as_much",
        "tests/comm/*::backward_overlaps_the_work_between_begin_and_wait",
    ),
    # Communication
    "token dispatch flat, in two hops over nodes, or by DeepEP": (
        "tests/comm/*::flat_equals_the_dense_layer_in_fp32",
        "tests/comm/*::two_hops_equal_the_dense_layer_on_eight_ranks",
        "tests/comm/*::both_generations_equal_flat_and_two_hop",
        "tests/comm/*::calls_are_checked_against_the_releases_that_are_named",
    ),
    "FP8 on the wire": (
        "tests/training/*::an_fp8_wire_changes_no_bit_of_fp8_training",
        "tests/comm/*::gradients_arrive_as_the_quantised_values_of_their_tokens",
    ),
    "a meter of all traffic": (
        "tests/comm/*::the_meter_equals_the_tensors_that_were_sent",
        "tests/comm/*::collectives_count_a_ring_by_its_links",
    ),
    # Experts by load
    "placed between ranks during a run": (
        "tests/training/*::a_run_whose_experts_move_has_the_bits_of_one_whose_experts_stay",
        "tests/parallel/experts/*::no_rank_is_busier_than_in_the_present_or_the_contiguous_placement",
    ),
    "replicated for inference": (
        "tests/parallel/experts/*::replicas_are_those_of_deepseeks_eplb",
        "tests/launcher/commands/*::logical_and_physical_maps_are_those_of_eplb",
        "tests/training/*::an_evaluation_with_replicas_has_the_same_loss_on_evener_ranks",
    ),
    # Optimizer
    "AdamW with BF16 moments and FP32 masters": (
        "tests/parallel/optimizer/*::fifty_steps_equal_torchs_adamw",
        "tests/parallel/optimizer/*::every_step_equals_the_fp64_reference_with_moments_rounded_to_bf16",
        "tests/parallel/optimizer/*::published_parameters_are_the_rounded_master_weights",
    ),
    "sharded as ZeRO-1": (
        "tests/parallel/optimizer/*::every_layout_has_the_state_of_one_process",
        "tests/parallel/optimizer/*::copies_cost_no_further_optimizer_state",
    ),
    "collectives hidden behind backward and forward": (
        "tests/parallel/optimizer/*::reductions_start_and_end_during_the_last_backward",
        "tests/parallel/optimizer/*::layers_can_be_used_before_the_last_gather_could_have_ended",
        "tests/training/*::overlapped_gathers_train_to_the_same_bits",
    ),
    "a moving average of the weights": (
        "tests/parallel/optimizer/*::the_average_is_the_weighted_mean_of_the_weights_after_each_step",
        "tests/parallel/optimizer/*::every_layout_has_the_average_of_one_process_bit_for_bit",
    ),
    # Precision
    "training in FP8, BF16 or FP32": (
        "tests/training/*::layouts_schedules_and_recompute_follow_the_single_process",
        "tests/training/*::bf16_replicas_are_bit_equal_and_losses_near_the_single_processs",
        "tests/training/*::a_step_has_the_gradient_of_the_formula",
    ),
    "fused Triton kernels, run by Triton's interpreter": (
        "tests/fp8/test_triton*::both_tilings_are_quantizes",
        "tests/fp8/test_triton*::swiglu_is_its_operations_then_quantize",
        "tests/kernels/test_routes*::a_tokens_sum_is_choices_sum",
        "tests/fp8/test_triton*::no_kernel_spills",
    ),
    "an adapter of Transformer Engine, held against a stand-in": (
        "tests/fp8/*::backend_gives_the_bits_of_emulation",
        "tests/fp8/*::every_call_binds_in_the_oldest_release_and_in_the_one_it_was_written_for",
        "tests/training/*::training_has_the_bits_of_emulation",
    ),
    # Memory
    "activation recompute, bit-equal, in overlapped pairs too": (
        "tests/model/*::losses_gradients_and_counts_are_bit_equal",
        "tests/model/*::two_blocks_phase_by_phase_in_turn_give_the_bits_of_one_after_the_other",
        "tests/model/*::v3_holds_less_than_none_and_full_less_than_v3",
    ),
    # Data
    "byte tokens from Python's own text or a folder of files": (
        "tests/data/*::running_python_offers_real_text",
        "tests/data/*::folder_is_read_recursively_in_sorted_order",
        "tests/data/*::decoding_undoes_encoding",
        "tests/data/*::an_epoch_covers_every_token_once",
    ),
    # Schedules in tokens
    "learning rate, batch and balance": (
        "tests/training/*::schedules_are_read_at_the_tokens_before_the_step",
        "tests/training/*::a_batch_ramp_takes_the_same_steps_in_every_layout",
        "tests/configs/*::v3_learning_rate_at_the_published_points",
        "tests/configs/*::v3_router_and_mtp_phases",
    ),
    # Checkpoints
    "any layout loads them": (
        "tests/checkpoint/*::every_layout_reads_every_others_bit_for_bit",
        "tests/training/*::in_another_layout_the_run_goes_on_within_rounding",
        "tests/training/*::a_checkpoint_of_any_pipeline_goes_on_in_any_other",
    ),
    "a run resumed in the same layout is bit-identical": (
        "tests/training/*::in_the_same_layout_every_bit_is_that_of_the_unbroken_run",
        "tests/training/*::killed_at_any_step*",
    ),
    # Configuration
    "all faults reported at once, each at its line": (
        "tests/configs/*::all_faults_of_all_files_are_reported_at_once",
        "tests/configs/*::sections_are_checked_against_each_other_at_the_line_of_the_key",
        "tests/training/*::everything_that_is_wrong_is_said_at_once",
    ),
    "Hugging Face's `config.json` read": (
        "tests/configs/*::file_of_transformers_4_gives_its_architecture",
        "tests/configs/*::files_written_by_transformers_are_read_back_with_their_values",
        "tests/configs/*::v2_files_give_their_network_and_router",
    ),
    # Dry runs
    "the step of any rank of a layout on shapes alone, with its memory, kernels and messages": (
        "tests/dryrun/*::peak_and_messages_are_those_of_a_real_step",
        "tests/dryrun/*::an_extended_step_equals_the_whole_one",
        "tests/dryrun/*::a_rank_of_two_nodes_reports_every_key",
        "tests/dryrun/*::ranks_launch_the_collectives_of_a_communicator_in_one_order",
    ),
    "a run that does not fit into its devices is refused": (
        "tests/launcher/*::all_ranks_refuse_what_a_dry_run_says_is_too_large_and_keep_it",
        "tests/launcher/*::the_largest_rank_with_its_allowances_decides",
    ),
    # Reports
    "simulated and measured timelines": (
        "tests/plan/*::simulating_with_the_measured_costs_gives_the_measured_step",
        "tests/training/*::a_run_prints_its_split_and_draws_its_third_step",
        "tests/report/*::compared_timelines_stand_under_each_other_in_order",
    ),
    "`metrics.jsonl` and TensorBoard": (
        "tests/report/*::each_step_is_one_json_object_with_the_documented_names",
        "tests/report/*::tensorboard_shows_every_measured_number_once_across_a_resume",
    ),
    "a non-finite number named by the rank and tensor where it began": (
        "tests/training/*::planted_number_is_named_with_rank_micro_batch_phase_and_tensor",
        "tests/training/*::only_the_rank_where_it_began_takes_the_blame",
        "tests/training/*::a_planted_nan_is_named_with_rank_micro_batch_and_tensor",
    ),
}

MEASURED = {
    "After 1,000 steps of a model of 20 million parameters the loss differs from BF16's by 0.085 %": (
        "The figure itself takes long: `make audit` measures it, and [FP8](fp8.md#audit) has the result. "
        "The tests run the same audit for 60 steps."
    ),
}
"""Claims with a figure that is too costly for a test, and what measures each."""


class Claim(NamedTuple):
    """One sentence of the README, with the bold words that begin its item."""

    title: str
    text: str


class Proof(NamedTuple):
    """A test function: its file from the root, its name without `test_`, its docstring."""

    path: str
    name: str
    docstring: str

    @property
    def sentence(self) -> str:
        """The name as words, which are the test's claim."""
        words = self.name.replace("_", " ").replace("processs", "process's")
        return words[0].upper() + words[1:]


def claims_of(readme: str) -> list[Claim]:
    """Every sentence or part of one, up to a full stop or a semicolon, of the list items that begin with bold words."""
    claims = []
    for title, item in re.findall(r"^- \*\*(.+?)\*\*:? (.*?)(?=^- |\n\n)", readme, re.MULTILINE | re.DOTALL):
        plain = " ".join(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", item).split())
        parts = re.split(r"[.;] |\.$", plain)
        claims += [Claim(title.rstrip("."), part.rstrip(".")) for part in parts if part]
    return claims


def all_tests(root: Path = ROOT) -> list[Proof]:
    """Every test of the repository, in the order of files and lines. Reads sources, imports nothing."""
    return [
        Proof(path.relative_to(root).as_posix(), node.name.removeprefix("test_"), ast.get_docstring(node) or "")
        for path in sorted((root / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def found_by(pattern: str, tests: list[Proof]) -> list[Proof]:
    """Tests that a pattern `FILE::NAME` names; both halves are as in a shell, and NAME leaves `test_` out."""
    path, _, name = pattern.partition("::")
    return [test for test in tests if fnmatchcase(test.path, path) and fnmatchcase(test.name, name)]


def render(readme: str, tests: list[Proof]) -> str:
    """Return the page: each claim with its tests, by file."""
    return "\n".join(_lines(readme, tests)) + "\n"


def _lines(readme: str, tests: list[Proof]) -> Iterator[str]:
    yield "# Claims"
    yield ""
    yield from textwrap.wrap(
        "Each claim of the [README](../README.md), and the tests that prove it. A test's name is its claim, so names "
        "are printed as sentences; where a test has a docstring, its first sentence follows. `make claims` writes this "
        "page from `tests/house/claims.py`. A test fails where a claim has no test, or where the page is out of date.",
        width=120,
        break_on_hyphens=False,
    )
    title = ""
    for claim in claims_of(readme):
        if claim.title != title:
            title = claim.title
            yield from ("", f"## {title}")
        yield from ("", f"**{claim.text}.**", "")
        if claim.text in MEASURED:
            yield from (MEASURED[claim.text], "")
        proofs = {test: None for pattern in CLAIMS.get(claim.text, ()) for test in found_by(pattern, tests)}
        for path in dict.fromkeys(test.path for test in proofs):
            yield f"- `{path}`"
            for test in proofs:
                if test.path == path:
                    yield f"    - {test.sentence}{_explained(test.docstring)}"


def _explained(docstring: str) -> str:
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return f": {re.split(r'(?<=[a-z)`])[.] ', paragraph)[0].rstrip('.')}" if paragraph else ""


if __name__ == "__main__":
    page = render((ROOT / "README.md").read_text("utf-8"), all_tests())
    (ROOT / "docs" / "claims.md").write_text(page, "utf-8")
