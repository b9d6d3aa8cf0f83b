# SPDX-License-Identifier: Apache-2.0
"""What works in which framework, with the tests that show it: `python -m tests.framework_matrix --write`.

The table of docs/frameworks.md and the list of docs/framework_tests.md are made of this. tests/test_framework_matrix.py
checks that the tests exist.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[1] / "docs"
COLUMNS = ("PyTorch", "JAX", "CuPy", "NumPy", "other DLPack")


class Cell(NamedTuple):
    """Text of a cell, and its tests as file::name, relative to tests/ and without `test_` and `.py`."""

    said: str
    tests: tuple[str, ...] = ()


def yes(*tests: str) -> Cell:
    return Cell("yes", tests)


def no(reason: str, *tests: str) -> Cell:
    return Cell(reason, tests)


CPU, GPU, STREAMS = "arrays::activation_topk_with_every_framework", "gpu/frameworks", "gpu/stream_table::the_table"
NOT_THERE = Cell("-")  # the framework has no such thing

# Feature -> cells in the order of COLUMNS.
MATRIX: dict[str, tuple[Cell, ...]] = {
    "results of the caller's type, without a copy": (
        yes(CPU, f"{GPU}::results_are_right_and_of_the_callers_type", "gpu/memory::no_copy_is_made"),
        yes(CPU, f"{GPU}::results_are_right_and_of_the_callers_type", "gpu/memory::no_copy_is_made"),
        yes(f"{GPU}::results_are_right_and_of_the_callers_type", "gpu/memory::no_copy_is_made"),
        yes(CPU, "arrays::results_outlive_the_inputs_and_share_no_memory"),
        Cell("the closest type", ("dlpack_frameworks::results_have_the_closest_type",
                                  f"{GPU}::arrays_with_only_dlpack")),
    ),
    "float32, float16, bfloat16": (
        yes("arrays::topk_select_with_every_framework", f"{GPU}::results_are_right_and_of_the_callers_type"),
        yes("arrays::topk_select_with_every_framework", f"{GPU}::results_are_right_and_of_the_callers_type"),
        yes(f"{GPU}::results_are_right_and_of_the_callers_type"),
        Cell("yes, by ml_dtypes", ("arrays::topk_select_with_every_framework",)),
        yes("dlpack_frameworks::floats_of_every_dtype"),
    ),
    "rows that lie apart, without a copy": (
        yes("arrays::torch_layouts", f"{GPU}::views_of_torch_tensors"),
        no("arrays are dense"),
        yes("activation_topk::layout"),
        yes("arrays::any_row_stride_and_alignment"),
        yes("arrays::an_ndarray_subclass_and_a_dlpack_only_array"),
    ),
    "`out=`": (
        yes("arrays::out_with_every_framework_that_can_be_written", f"{GPU}::out_is_filled_and_returned"),
        no("no: immutable", "arrays::jax_out_is_refused", f"{GPU}::jax_out_is_refused_and_unchanged"),
        yes(f"{GPU}::out_is_filled_and_returned"),
        yes("arrays::out_with_every_framework_that_can_be_written"),
        yes("dlpack_frameworks::out_is_filled_in_place"),
    ),
    "`out=` known to autograd, and in graphs": (
        yes("torch_out::versions_are_raised", "torch_out::tensors_that_require_grad_are_refused_as_by_pytorch",
            "torch_out_compiled::out_is_filled_in_one_graph", "torch_opcheck::opcheck_of_out",
            "gpu/torch_out_gpu::versions_are_raised", "gpu/torch_out_gpu::out_is_filled_in_one_graph"),
        NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE,
    ),
    "arrays of several frameworks in one call": (
        yes("arrays::results_belong_to_the_framework_of_the_first_array",
            f"{GPU}::frameworks_may_be_mixed_on_one_device"),
        yes("arrays::results_belong_to_the_framework_of_the_first_array",
            f"{GPU}::frameworks_may_be_mixed_on_one_device"),
        yes(f"{GPU}::frameworks_may_be_mixed_on_one_device"),
        yes("arrays::results_belong_to_the_framework_of_the_first_array"),
        yes("dlpack_frameworks::mixed_with_arrays_of_other_frameworks"),
    ),
    "the framework's current stream": (
        yes(STREAMS, "gpu/streams::after_a_slow_producer"),
        Cell("ordered by DLPack", ("gpu/stream_table::jax_orders_both_ways",
                                   "gpu/streams::jax_after_a_slow_producer_with_inputs_freed_at_once")),
        yes(STREAMS, "gpu/streams::after_a_slow_producer"),
        NOT_THERE,
        Cell("CuPy's", ("gpu/stream_table::dlpack_orders_other_frameworks",)),
    ),
    "`stream=`": (
        yes(STREAMS, "gpu/streams::on_a_given_stream"),
        Cell("eager calls", ("gpu/stream_table::jax_orders_both_ways",)),
        yes(STREAMS, "gpu/streams::on_a_given_stream"),
        NOT_THERE,
        yes("gpu/stream_table::dlpack_orders_other_frameworks"),
    ),
    "`stream=` in compiled code": (
        Cell("breaks the graph", ("torch_out_compiled::a_stream_breaks_the_graph",
                                  "gpu/torch_out_gpu::a_stream_breaks_the_graph")),
        no("no", "jax_jit::errors_are_raised_while_tracing"),
        NOT_THERE, NOT_THERE, NOT_THERE,
    ),
    "the host never waits": (
        yes(STREAMS, "gpu/autograd_gpu::the_host_does_not_wait",
            "gpu/torch_gpu::a_compiled_call_on_a_side_stream_does_not_wait"),
        yes("gpu/jax_jit_gpu::the_host_does_not_wait", "gpu/jax_gradients_gpu::gradients_after_a_slow_producer"),
        yes(STREAMS, "gpu/cupy_gpu::every_allocator"),
        NOT_THERE,
        yes("gpu/stream_table::dlpack_orders_other_frameworks"),
    ),
    "memory of the framework's own allocator": (
        yes("gpu/memory::a_warm_call_from_torch_allocates_its_results_only"),
        Cell("CuPy's; XLA's under jit", ("gpu/memory::a_warm_call_from_jax_allocates_its_results_only",
                                         "gpu/jax_jit_gpu::donated_arguments_and_inputs_that_are_kept")),
        yes("gpu/memory::a_warm_call_from_cupy_allocates_its_results_only", "gpu/cupy_gpu::every_allocator"),
        NOT_THERE,
        Cell("CuPy's", (f"{GPU}::arrays_with_only_dlpack",)),
    ),
    "CUDA graphs": (
        yes("gpu/graphs::replay_on_changed_inputs", "gpu/torch_gpu::a_captured_call_is_one_kernel",
            "gpu/autograd_gpu::a_captured_step_is_replayed_on_other_values",
            "gpu/torch_gpu::reduce_overhead_replays_a_graph",
            "gpu/layout_torch_gpu::a_captured_step_is_replayed_on_other_values"),
        Cell("XLA's command buffers", ("jax_native::single_kernel_calls_need_no_handler",
                                       "gpu/jax_jit_gpu::with_and_without_command_buffers",
                                       "gpu/jax_gradients_gpu::with_and_without_command_buffers")),
        yes("gpu/graphs::replay_on_changed_inputs", "gpu/cupy_gpu::a_graph_with_every_allocator"),
        NOT_THERE,
        no("not promised"),
    ),
    "compiled: `torch.compile(fullgraph=True)`, `jax.jit`": (
        yes("torch_ops::a_call_compiles_into_one_graph", "torch_ops::generated_code_has_the_ops_and_no_copy",
            "gpu/torch_gpu::compiled_for_any_number_of_tokens",
            "gpu/torch_gpu::generated_code_has_the_ops_and_no_copy",
            "gpu/torch_gpu::inductors_cache_distinguishes_methods",
            "torch_traced_methods::a_method_made_in_traced_code",
            "torch_layout_graphs::a_layer_is_one_graph_for_any_number_of_tokens",
            "torch_layout_graphs::a_capacity_made_of_sizes",
            "gpu/layout_torch_gpu::a_compiled_layer_for_any_number_of_tokens"),
        yes("jax_jit::a_traced_call_gives_what_an_eager_call_gives",
            "gpu/jax_jit_gpu::a_traced_call_gives_what_an_eager_call_gives"),
        NOT_THERE, NOT_THERE, NOT_THERE,
    ),
    "exported: `torch.export`, `jax.export`": (
        yes("torch_ops::a_model_exports", "torch_ops::an_exported_model_runs_in_another_process",
            "torch_gate_transforms::an_exported_gate_has_its_arrays_and_any_batch",
            "torch_layout_graphs::an_exported_layer_runs_for_any_number_of_tokens_in_another_process",
            "torch_layout_graphs::a_program_that_takes_a_layout"),
        yes("jax_export::programs_of_all_calls_run_in_another_process",
            "jax_transforms::an_exported_program_runs_in_another_process",
            "jax_native::exported_programs_use_the_stable_target", "jax_transforms::an_exported_gradient",
            "jax_export::layouts_of_any_number_of_tokens"),
        NOT_THERE, NOT_THERE, NOT_THERE,
    ),
    "passes PyTorch's `opcheck`": (
        yes("torch_opcheck::opcheck", "gpu/torch_gpu::opcheck"),
        NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE,
    ),
    "logits of routers, with their gradients": (
        yes("torch_logits::eager_results_are_those_of_the_host",
            "torch_logits::gradients_of_weights_and_logits_add_up", "torch_logits::compiled_routers"),
        yes("jax_logits::traced_results_are_those_of_the_host", "jax_logits::gradients_of_weights_and_logits_add_up",
            "jax_logits::sharded_rows"),
        Cell("without gradients", ("return_logits::logits_are_the_products_without_scale_and_cap",)),
        Cell("without gradients", ("return_logits::logits_are_the_products_without_scale_and_cap",)),
        Cell("without gradients", ("dlpack_frameworks::results_have_the_closest_type",)),
    ),
    "given experts, with their gradients": (
        yes("torch_given::weights_and_gradients_are_those_of_a_plain_router", "torch_given::compiled",
            "gpu/given_gpu::weights_and_gradients_are_those_of_a_plain_router"),
        yes("jax_given::weights_and_gradients_are_those_of_a_plain_router", "jax_given::mapped",
            "gpu/given_gpu::traced_results_are_those_of_eager_calls"),
        Cell("without gradients", ("given_experts::every_token_has_the_weights_of_its_experts",)),
        Cell("without gradients", ("given_experts::every_token_has_the_weights_of_its_experts",)),
        NOT_THERE,
    ),
    "several biases, of which each token has one": (
        yes("torch_several_biases::eager_results_are_those_of_the_host", "torch_several_biases::compiled_calls",
            "torch_several_biases::gradients_are_those_of_plain_pytorch"),
        yes("jax_several_biases::gradients_are_those_of_plain_jax",
            "jax_jit::a_traced_call_gives_what_an_eager_call_gives"),
        yes("several_biases::every_token_has_its_own_bias"),
        yes("several_biases::every_token_has_its_own_bias"),
        NOT_THERE,
    ),
    "gradients of weights": (
        yes("torch_autograd::gradients_are_those_of_plain_pytorch",
            "torch_compiled_gradients::compiled_calls_have_the_same_gradients",
            "torch_func::gradients_are_those_of_autograd",
            "gpu/autograd_gpu::gradients_are_those_of_plain_pytorch"),
        yes("jax_gradients::gradients_are_those_of_plain_jax", "jax_gradients::gradients_are_central_differences",
            "jax_gradients::under_other_transformations",
            "gpu/jax_gradients_gpu::gradients_are_those_of_plain_jax"),
        Cell("by hand", ("examples::an_example_reproduces_the_recorded_run",
                                      "activation_topk_backward::every_step")),
        Cell("by hand", ("examples::an_example_reproduces_the_recorded_run",
                                      "activation_topk_backward::every_step")),
        NOT_THERE,
    ),
    "second derivatives, forward mode": (
        no("no", "torch_autograd::a_second_derivative_is_refused", "torch_func::second_derivatives_are_refused",
           "torch_func::forward_mode_is_refused", "torch_func::forward_mode_tangents_are_refused"),
        no("no", "jax_gradients::a_second_derivative_is_refused",
           "jax_gradients::forward_mode_is_refused_by_jax"),
        NOT_THERE, NOT_THERE, NOT_THERE,
    ),
    "`vmap`": (
        yes("torch_func::vmap_equals_a_loop_of_calls", "torch_func::per_example_gradients",
            "torch_layout::vmap_over_layouts_is_a_loop"),
        yes("jax_transforms::vmap_equals_a_loop_of_calls", "jax_transforms::vmap_over_tokens_is_one_call",
            "gpu/jax_jit_gpu::vmap_equals_a_loop_of_calls", "jax_gradients::vmap_over_gates_and_over_tokens"),
        NOT_THERE, NOT_THERE, NOT_THERE,
    ),
    "without gradients: `inference_mode`, `stop_gradient`": (
        yes("torch_autograd::no_graph_is_recorded_without_grad_mode",
            "gpu/torch_gpu::inference_mode_and_tensors_that_require_grad"),
        yes("jax_gradients::stopped_gradients_are_zero"),
        NOT_THERE, NOT_THERE, NOT_THERE,
    ),
    "mixed precision: `autocast`": (
        yes("torch_autograd::autocast_does_not_round_gradients",
            "gpu/autograd_gpu::autocast_does_not_round_gradients", "torch_layout::autocast_changes_nothing",
            "gpu/layout_torch_gpu::autocast_changes_nothing"),
        NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE,
    ),
    "a device that is not current": (
        yes("gpu/torch_gpu::a_device_that_is_not_current", "gpu/two_devices::a_busy_stream_of_the_second",
            "gpu/two_devices::a_graph_of_the_second", "gpu/two_devices::gradients_on_the_second"),
        yes("jax_mesh::eager_calls_of_arrays_on_any_device", "gpu/jax_jit_gpu::two_devices",
            "gpu/two_devices::one_program_on_either"),
        yes(f"{GPU}::a_second_device_is_used_without_being_current", "gpu/cupy_gpu::under_another_current_device",
            "gpu/two_devices::a_busy_stream_of_the_second"),
        NOT_THERE, NOT_THERE,
    ),
    "one call over several devices: `shard_map`": (
        NOT_THERE,
        yes("jax_transforms::shard_map_routes_tokens_on_their_own_device",
            "jax_mesh::explicit_mesh_axes_keep_rows_on_their_devices",
            "jax_gradients::gradients_inside_and_outside_of_shard_map", "gpu/jax_gradients_gpu::two_devices",
            "gpu/two_devices::shard_map_over_both"),
        NOT_THERE, NOT_THERE, NOT_THERE,
    ),
    "`num_valid` in an array": (
        yes("torch_autograd::padding_has_no_gradient", f"{GPU}::num_valid_in_an_array_of_the_framework",
            "gpu/graphs::replay_with_another_num_valid"),
        yes("jax_jit::num_valid_is_clamped_and_no_constant", "jax_gradients::padding_has_no_gradient",
            f"{GPU}::num_valid_in_an_array_of_the_framework"),
        yes(f"{GPU}::num_valid_in_an_array_of_the_framework", "gpu/graphs::replay_with_another_num_valid"),
        yes("activation_topk::num_valid_in_an_array_is_clamped"),
        yes("dlpack_frameworks::num_valid_in_an_array"),
    ),
    "eight threads": (
        yes("gpu/threads::eight_threads", "gpu/two_devices::eight_threads_on_both"),
        yes("gpu/threads::eight_threads", "gpu/two_devices::eight_threads_on_both", "gpu/jax_jit_gpu::eight_threads",
            "jax_jit::many_threads"),
        yes("gpu/threads::eight_threads", "gpu/two_devices::eight_threads_on_both",
            "gpu/threads::threads_keep_their_current_streams_apart"),
        no("untested"),
        no("untested"),
    ),
    "expert layouts, `permute`, `unpermute`": (
        yes("torch_layout::there_and_back_through_experts", "torch_layout::no_tokens_no_capacity_and_no_experts"),
        yes("jax_layout::a_traced_layout_is_that_of_the_host", "jax_rows::a_traced_call_is_that_of_the_host",
            "jax_rows::experts_by_ragged_dot_are_dense_experts", "gpu/layout_jax_gpu::a_layout_is_that_of_the_host",
            "gpu/layout_jax_gpu::rows_are_those_of_the_host"),
        yes("expert_layout::sizes", "permute::every_hidden_size", "unpermute::every_hidden_size"),
        yes("expert_layout::sizes", "permute::every_hidden_size", "unpermute::every_hidden_size"),
        yes("permute::any_other_framework_moves_any_dtype"),
    ),
    "experts on several ranks": (
        Cell("`ExpertParallel`", ("expert_parallel::ranks_do_what_one_process_does",
                                  "expert_parallel::one_rank_communicates_nothing")),
        Cell("`expert_parallel`", ("jax_expert_parallel::devices_do_what_one_does",
                                   "jax_expert_parallel::what_devices_have_and_move")),
        NOT_THERE, NOT_THERE, NOT_THERE,
    ),
    "gradients of `permute` and `unpermute`": (
        yes("torch_layout::gradients_are_those_of_gather_and_sum",
            "torch_layout::only_what_is_needed_is_computed_and_saved", "torch_layout::a_second_derivative_is_refused",
            "torch_layout::torch_func_gives_autograds_gradients", "torch_layout_graphs::the_compiled_gradients",
            "gpu/layout_torch_gpu::gradients_are_those_of_gather_and_sum"),
        yes("jax_rows::gradients_are_those_of_gathers_and_sums", "jax_rows::only_what_is_asked_for_is_computed",
            "jax_rows::what_has_no_gradient", "jax_rows::vmap_and_grad_in_both_orders",
            "jax_rows::a_scan_over_layers_with_recomputation",
            "gpu/layout_jax_gpu::gradients_are_those_of_gathers_and_sums"),
        NOT_THERE, NOT_THERE, NOT_THERE,
    ),
    "`load=`": (
        yes("torch_layout_load::load_raises_its_version", "torch_layout_load::recomputation_adds_nothing",
            "torch_layout_load::graphs_count_each_pair_once", "gpu/layout_torch_gpu::recomputation_adds_nothing"),
        no("no: immutable", "jax_layout::written_arrays_are_refused_with_the_remedy"),
        yes("expert_layout::load_is_added_to"),
        yes("expert_layout::load_is_added_to"),
        no("untested"),
    ),
    "a Router as a part of models": (
        Cell("`Gate`, `replace_routers`", ("torch_gate_arrays::a_gate_uses_the_arrays_that_it_has_now",
                                           "torch_gate_transforms::a_training_step_is_that_of_plain_pytorch",
                                           "torch_gate_transforms::fully_shard",
                                           "gpu/gate_gpu::on_a_gpu",
                                           "replace_routers::family", "torch_training::gradients_of_a_family",
                                           "torch_ops::a_model_that_holds_routers_compiles_into_one_graph")),
        Cell("a pytree", ("jax_transforms::a_router_is_a_pytree_of_its_arrays",
                          "jax_gradients::a_router_learns_as_a_pytree")),
        yes("gpu/dense_router_gpu::a_router_from_a_file_serves_every_framework"),
        yes("router::results_have_the_framework_of_x"),
        NOT_THERE,
    ),
    "experts of transformers": (
        Cell("`replace_routers(experts=True)`", ("experts_backend::forms", "experts_backend::a_step_of_a_model",
                                                 "experts_backend::experts_that_are_elsewhere",
                                                 "gpu/experts_backend_gpu::forms",
                                                 "gpu/experts_backend_gpu::generate",
                                                 "gpu/experts_backend_gpu::compiled")),
        NOT_THERE, NOT_THERE, NOT_THERE, NOT_THERE,
    ),
}  # fmt: skip


def path_and_function(test: str) -> tuple[str, str]:
    """`gpu/graphs::replay` -> tests/gpu/test_graphs.py, test_replay."""
    stem, _, name = test.partition("::")
    folder, _, file = stem.rpartition("/")
    return "/".join(filter(None, ("tests", folder, f"test_{file}.py"))), f"test_{name}"


def matrix() -> str:
    """Return the table in Markdown: what works."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "| --- |" + " :---: |" * len(COLUMNS)]
    lines += [f"| {feature} | {' | '.join(cell.said for cell in cells)} |" for feature, cells in MATRIX.items()]
    return "\n".join(lines)


def tests() -> str:
    """Return the list in Markdown: the tests of each feature, by column."""
    lines = []
    for feature, cells in MATRIX.items():
        lines += [f"**{feature}**", ""]
        columns: dict[tuple[str, ...], list[str]] = {}
        for column, cell in zip(COLUMNS, cells, strict=True):
            if cell.tests:
                columns.setdefault(cell.tests, []).append(column)
        for names_of_tests, names in columns.items():
            named = ", ".join("`{}::{}`".format(*path_and_function(test)) for test in names_of_tests)
            lines.append(f"- {', '.join(names)}: {named}")
        lines.append("")
    return "\n".join(lines).rstrip()


PARTS = {DOCS / "frameworks.md": ("matrix", matrix), DOCS / "framework_tests.md": ("tests", tests)}


def updated(document: Path) -> str:
    """Return a page with its current part."""
    mark, part = PARTS[document]
    head, begin, rest = document.read_text().partition(f"<!-- {mark} -->")
    _, end, tail = rest.partition(f"<!-- /{mark} -->")
    return f"{head}{begin}\n\n{part()}\n\n{end}{tail}"


if __name__ == "__main__":
    outdated = {document: text for document in PARTS if (text := updated(document)) != document.read_text()}
    if "--write" in sys.argv:
        for document, text in outdated.items():
            document.write_text(text)
    else:
        sys.exit(bool(outdated))
