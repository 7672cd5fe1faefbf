"""What PEFT's own suite asks of an implementation, by number, and the tests that prove it here.

Paths are below `tests/`. "later" names the feature that brings a behaviour.

    1 adapter attributes exist: peft/test_model.py::test_1_names_and_attributes_fall_through
    2 adapter names are respected: peft/test_model.py::test_2_and_3_any_name_is_respected
    3 names that contain each other: peft/test_model.py::test_2_and_3_any_name_is_respected
      test_handle.py::test_names_within_names_do_not_meet
    4 duplicate names: peft/test_model.py::test_4_a_name_that_is_taken_is_refused_and_nothing_changes
    5 injection equals the wrapped model: peft/test_model.py::test_5_injection_equals_the_wrapped_model
    6 similarly named siblings: peft/test_targeting.py::test_6_and_44_the_same_modules_and_ranks_as_pefts
    7 round trip, all files: peft/test_saving.py::test_7_files_go_both_ways_with_the_same_bits_and_logits
      peft/test_saving.py::test_7_what_the_user_wrote_is_what_the_file_says
      peft/test_saving.py::test_7_the_directory_holds_card_and_adapter_alone
    8 saving selected adapters: peft/test_saving.py::test_8_others_than_default_go_into_directories_of_their_names
    9 loading with a config: peft/test_saving.py::test_9_a_configuration_given_for_loading_counts
    10 several adapters loaded: peft/test_saving.py::test_8_others_than_default_go_into_directories_of_their_names
      peft/test_saving.py::test_37_and_d18_loading_changes_no_other_adapters_gradients
    11 loading with little memory: peft/test_saving.py::test_11_loading_with_little_memory_is_loading
    12 safetensors, no pickles: peft/test_saving.py::test_12_pickles_are_neither_read_nor_written
    13 old files: parity/test_old_files.py::test_an_old_file_gives_the_outputs_recorded_then_and_so_does_our_copy
    14 embeddings only where needed: peft/test_new_tokens.py::test_only_the_new_rows_are_saved_and_room_is_made_again
      peft/test_saving.py::test_14_embeddings_are_not_copied_and_a_copy_must_be_this_bases
    15 gathered state dicts: peft/test_saving.py::test_15_a_gathered_state_dict_is_what_is_saved
    16 the base's state dict: peft/test_saving.py::test_16_the_bases_state_dict_goes_out_and_in
      peft/test_saving.py::test_16_an_adapters_state_dict_has_pefts_names_and_the_models_memory
    17 merged = unmerged = unloaded: peft/test_merging.py::test_17_merged_equals_unmerged_equals_unloaded_equals_pefts
      peft/test_parts.py::test_40_and_41_the_same_as_peft_in_memory_and_in_files
    18 16 bits on the CPU: peft/test_merging.py::test_18_and_d8_a_16_bit_base_comes_back_bit_for_bit_after_many_cycles
    19 NaN: peft/test_merging.py::test_19_a_merge_that_is_not_finite_raises_and_changes_nothing
    20 one, several, all, back: peft/test_merging.py::test_20_merge_one_several_all_and_switch_back
    21 merging again: peft/test_merging.py::test_21_merging_again_does_nothing
    22 unload: peft/test_model.py::test_22_and_d20_unload_gives_the_exact_original
      peft/test_parts.py::test_22_and_16_these_come_off_and_go_through_state_dicts_as_well
    23 one after the other: peft/test_merging.py::test_23_one_after_the_other_equals_all_at_once_bit_for_bit
    24 mixed batches: peft/test_rows.py::test_24_each_row_equals_its_adapter_alone
      peft/test_rows.py::test_24_the_same_as_peft
    25 beams, other layers: peft/test_rows.py::test_25_generation_with_and_without_beams
      peft/test_rows.py::test_25_an_encoder_sees_each_row_once_and_the_decoder_one_for_each_beam
      peft/test_rows.py::test_25_rows_of_embeddings_and_convolutions_and_of_targets_that_do_not_overlap
    26 contradictions: peft/test_rows.py::test_26_d5_and_d7_contradictions_raise_and_leave_the_model_as_it_was
      peft/test_rows.py::test_26_what_peft_refuses_in_training_works_here
      peft/test_rows.py::test_26_rows_of_attention_are_refused_as_by_peft_and_nothing_is_left
      peft/test_methods.py::test_26_rows_of_dora_adapters_are_each_their_adapters_alone
    27 cheaper than a loop:
      parity/test_costs.py::test_d6_peft804_a_mixed_batch_costs_no_more_operations_than_its_segments
    28 generation: peft/test_model.py::test_28_generate_with_keywords_and_positions
      peft/test_model.py::test_28_and_29_generation_in_half_precision_and_a_finite_forward_under_autocast
    29 16 bits and autocast: peft/test_model.py::test_29_a_16_bit_base_gets_fp32_adapters_unless_told_otherwise
      peft/test_model.py::test_28_and_29_generation_in_half_precision_and_a_finite_forward_under_autocast
      methods/test_lora.py::test_autocast
    30 only the adapter learns: peft/test_model.py::test_30_only_the_adapter_learns
    31 blocks: peft/test_training.py::test_31_layers_to_transform_trains_only_those
    32 checkpointing: peft/test_training.py::test_32_and_d27_the_same_gradients_with_recomputed_activations
    33 few bits: peft/test_model.py::test_33_a_base_is_prepared_for_training_in_few_bits
      later: quantised bases
    34 LoRA+: peft/test_training.py::test_34_lora_plus_has_pefts_groups
      peft/test_methods.py::test_34_lora_fa_trains_b_with_pefts_gradient
      peft/test_methods.py::test_34_lora_fas_step_sees_the_gradient_of_the_cores_method_and_leaves_grad_alone
      peft/test_methods.py::test_34_lora_fa_keeps_no_input_and_refuses_what_it_is_not_for
    35 disabling: peft/test_states.py::test_35_disabled_gives_the_base_nested_and_after_an_exception
      peft/test_states.py::test_35_disabled_gives_the_base_while_merged_and_d8_changes_nothing
      peft/test_states.py::test_35_what_is_chosen_inside_a_disabled_block_acts_after_it
      peft/test_states.py::test_35_switching_off_stays_until_it_is_switched_on
      peft/migrating_config.py::m13_biases
    36 deleting: peft/test_states.py::test_36_delete_active_inactive_unknown_and_merged
      peft/test_states.py::test_36_the_last_one_can_go_and_another_come
    37 requires_grad: peft/test_states.py::test_37_trainable_follows_the_choice_and_nothing_else
      peft/test_saving.py::test_37_and_d18_loading_changes_no_other_adapters_gradients
    38 status: peft/test_states.py::test_38_the_state_of_every_layer_equals_pefts
      peft/test_states.py::test_38_the_state_of_the_model_equals_pefts
      peft/test_parts.py::test_38_status_names_them_as_peft_does
    39 scales: peft/test_states.py::test_39_scaling_is_set_multiplied_and_put_back
    40 modules_to_save: peft/test_parts.py::test_40_and_41_the_same_as_peft_in_memory_and_in_files
      peft/test_parts.py::test_40_switching_between_adapters_with_whole_modules
      methods/test_replaced.py::test_weights_and_company_that_a_copy_cannot_have_are_refused
    41 trained tokens: peft/test_parts.py::test_40_and_41_the_same_as_peft_in_memory_and_in_files
      methods/test_rows.py::test_adapters_add_up_merged_and_unmerged
      methods/test_rows.py::test_tied_head_follows_and_the_tie_survives_a_merge
    42 tied weights: peft/test_new_tokens.py::test_tied_weights_move_together
      test_tying.py::test_pefts_files_give_the_same_logits_and_gradients
      test_tying.py::test_without_the_option_only_the_named_one_is_trained
    43 weighted combinations: peft/test_states.py::test_several_adapters_act_as_their_sum_like_pefts
      later: composition
    44 patterns: peft/test_targeting.py::test_6_and_44_the_same_modules_and_ranks_as_pefts
      peft/test_targeting.py::test_44_without_targets_the_same_modules_as_pefts_table
    45 starts: peft/test_parts.py::test_45_a_random_start_changes_the_model_and_others_do_not
      peft/test_parts.py::test_45_a_seed_gives_the_same_start_again
      parity/test_lora_forward.py::test_initial_distribution_is_pefts
      peft/test_methods.py::test_45_a_start_from_the_weight_goes_into_files_and_on
      peft/test_methods.py::test_45_a_start_from_the_weight_is_pefts_and_learns_as_pefts
      peft/test_methods.py::test_45_eva_finds_the_directions_that_pefts_finds
      peft/test_methods.py::test_45_eva_deals_ranks_and_files_keep_them
      peft/test_methods.py::test_45_evas_masks_count_as_pefts
      later: LoftQ with quantised bases; LoRA-GA by PEFT's call
    46 hot-swap without recompiling: later: serving
    47 conversion by rank or energy: later: composition
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
GUIDE = (TESTS.parent / "docs" / "migrating-from-peft.md").read_text(encoding="utf-8")


def listed() -> dict[int, str]:
    """Number → what stands behind it, up to the next number."""
    parts = re.split(r"^    (?=\d+ )", str(__doc__), flags=re.MULTILINE)[1:]
    return {int(part.partition(" ")[0]): part for part in parts}


def named(text: str) -> list[tuple[str, str]]:
    return re.findall(r"([\w/]+\.py)::(\w+)", text)


def functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_number_has_tests_or_says_what_brings_it() -> None:
    assert list(listed()) == list(range(1, 48))
    for number, text in listed().items():
        assert named(text) or "later: " in text, number


@pytest.mark.parametrize("number", range(1, 48))
def test_what_is_named_exists(number: int) -> None:
    for file, name in named(listed()[number]):
        assert name in functions(TESTS / file), f"{file}::{name}"


def test_every_defect_that_the_guide_calls_gone_has_a_test_of_its_number() -> None:
    gone = re.findall(r"^- (D\d+): ", GUIDE, re.MULTILINE)
    there = {
        number.upper()
        for file in TESTS.rglob("test_*.py")
        for name in functions(file)
        for number in re.findall(r"_(d\d+)(?=_)", name)
    }
    assert gone == sorted(gone, key=lambda one: int(one[1:]))
    assert len(gone) > 15
    assert set(gone) <= there
