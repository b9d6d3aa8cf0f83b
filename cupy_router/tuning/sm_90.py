# SPDX-License-Identifier: Apache-2.0
"""Hopper: H100, H200. What was tried and how it compared is in benchmarks/README.md."""

from __future__ import annotations

from cupy_router.tuning.schema import (
    Backward,
    Chunks,
    Decode,
    DecodeFma,
    DecodeTile,
    FusedLayout,
    Gemm,
    GivenExperts,
    HashLayer,
    HashProducts,
    HashRouter,
    Layout,
    LongRows,
    LongRowsCluster,
    MoveRows,
    Rows,
    Table,
)

TABLE = Table(
    architecture="sm_90",
    gpu="NVIDIA H100 SXM",
    multiprocessors=132,
    rows=Rows(
        measured_by="python -m benchmarks.bench_activation_topk && python -m benchmarks.bench_topk_select",
        few_rows=2048,
        very_few_rows=256,
        adjacent_columns_very_few=224,
        adjacent_columns_few=128,
        adjacent_columns_16_bits=96,
        adjacent_columns_many=32,
        lanes_by_results=((8, 8), (15, 16)),
        max_columns_per_lane=48,
        max_group_columns_per_lane=24,
        # Few rows spread over the multiprocessors warp by warp. Many share blocks, which take longer to start than
        # a warp runs.
        adjacent_blocks=((128, 32), (16384, 64)),
        interleaved_blocks=((128, 32), (2048, 128), (16384, 64)),
        largest_block=256,
        spills_from=(10, 0),
    ),
    backward=Backward(measured_by="python -m benchmarks.bench_activation_topk_backward", min_lanes=8),
    # One group of tokens, so that the gate is read once; one block for each multiprocessor, with more warps the more
    # each of them would have to do.
    decode=Decode(
        measured_by="python -m benchmarks.sweep_dense_router",
        max_tokens=64,
        tiles=(
            DecodeTile(
                max_tokens=16,
                experts_per_block=16,
                few_steps=32,
                shapes_few_steps=((16, 8), (16, 16), (16, 4)),
                shapes_many_steps=((16, 16), (16, 8), (16, 4)),
            ),
            # Two warps that read the same tokens have more loads in flight, which pays where there is much to wait for.
            DecodeTile(
                max_tokens=64,
                experts_per_block=32,
                few_steps=16,
                shapes_few_steps=((32, 4), (16, 8)),
                shapes_many_steps=((16, 8), (32, 4)),
            ),
        ),
        max_parts=24,
        min_part_columns=64,
        min_shared_tokens=4,
        invariant_shapes=((32, 16, 16, 1), (32, 32, 16, 1), (64, 16, 16, 2), (64, 32, 32, 2)),
        invariant_loads_in_flight=54,
        invariant_groups=((512, 16, 64, 16), (2048, 32, 64, 16), (2**31, 64, 64, 16)),
        # The less a cluster does, the sooner it ends; those that start when others have ended take twice as long.
        clusters=(
            (64, 64, 1, 8),
            (64, 128, 1, 8),
            (64, 128, 1, 4),
            (72, 192, 1, 4),
            (72, 64, 1, 1),
            (64, 128, 1, 1),
            (128, 128, 1, 1),
            (128, 192, 1, 1),
        ),
        cluster_of_few=(32, 64, 1, 8),
        min_tokens_in_cluster=17,
        clusters_at_once=(132, 66, 39, 30, 15, 15, 15, 15),
        fused=((3 << 20, 448),),
        max_partial_bytes=32 * 2**20,
        # A warp multiplies two experts over its whole part of hidden.
        fma=DecodeFma(
            max_tokens=4, experts_per_block=16, experts_per_warp=2, warps=8, max_parts=16, min_part_columns=256
        ),
    ),
    long_rows=LongRows(
        measured_by="python -m benchmarks.bench_topk_select",
        max_pieces=32,
        min_piece_bytes=16 * 1024,
        min_saved_bytes=96 * 1024,  # with less, the last-block reduction takes longer than it saves
        few_winners=512,
        split_block_few=512,
        split_block_many=768,
        shapes=((1024, 1),),
        # Measured on an H200. More and smaller blocks read while others select, but sort their lists more slowly.
        short_row_bytes=32 * 1024,
        held_row_bytes=(32 * 1024, 16 * 1024),
        held_block=128,
        held_most_blocks=8,
        held_most_groups=0.6,
        many_rows=((256, 4), (512, 2)),
        many_short_rows=((128, 8), (256, 4), (512, 2)),
        many_rows_many_winners=((512, 2),),
        many_rows_max_winners=2048,
        sample_few_winners=2048,
        sample_many_winners=4096,
    ),
    long_rows_cluster=LongRowsCluster(
        measured_by="python -m benchmarks.sweep_topk_select",
        shapes=((4, 256), (2, 512), (4, 512), (2, 1024), (8, 512)),
        min_row_bytes=32 * 1024,
        shapes_one_row=((8, 256), (8, 512)),
        min_row_bytes_one_row=128 * 1024,
        max_winners=2048,
    ),
    hash_router=HashRouter(
        measured_by="python -m benchmarks.bench_hash_router",
        block=128,
        max_tokens_held=1024,
        max_logits_held=512,
        held_block=128,
    ),
    hash_products=HashProducts(
        measured_by="python -m benchmarks.bench_dense_router",
        max_warps=8,
        sharing_warps=16,
        loads_in_flight=8,
    ),
    # The dot products read from L2, and cuBLAS takes 6 us for even the smallest product. Both ways take the same time
    # at 8 (E 384, H 7168) to 13 (E 256, H 4096).
    hash_layer=HashLayer(measured_by="python -m benchmarks.bench_dense_router", max_gates_read=8),
    # Measured on an H200. Both ways take the same time at 22 (E 384, H 7168) to 28 million elements (E 256, H 4096).
    # Backward the needed ones win up to 512 tokens, and from 1024 on GEMMs on tensor cores.
    given_experts=GivenExperts(
        measured_by="python -m benchmarks.bench_given_experts",
        max_gates_read=16,
        max_elements_read=20 * 2**20,
        max_gates_read_backward=16,
    ),
    layout=Layout(
        measured_by="python -m benchmarks.bench_expert_layout",
        few_pairs=16,
        few_threads=64,
        block_pairs=1024,
        block_threads=((128, 128), (1024, 256)),
        largest_block=512,
        padding_rows=2048,
        cluster_share_pairs=2048,
        share_threads=256,
        # A block reads the counts of all shares, so fewer and larger shares until ranking them takes longer.
        grid=((64, 512, 256), (64, 1024, 256), (64, 2048, 256), (132, 2048, 256), (132, 4096, 512)),
        steps=((4096, 512), (2048, 256)),
    ),
    move_rows=MoveRows(
        measured_by="python -m benchmarks.bench_permute",
        teams=(128, 160, 192, 224, 256),
        permute_unroll=2,
        unpermute_unroll=1,
        dots_unroll=2,
        max_slots=8,
        spread_tokens=128,
        spread_slots=1,
        permute_read_once=1,
        unpermute_read_once=2,
        shared_order=512,
        much_padding=16,
        padding_rows=16,
    ),
    # Eight warps that route share a multiprocessor without much loss, sixteen do not. Blocks of a cluster pass experts
    # on faster than blocks that count arrivals, which in turn are faster than a second launch.
    fused_layout=FusedLayout(
        measured_by="python -m benchmarks.bench_fused_layout",
        max_tokens=128,
        threads=256,
        max_block_warps=8,
        max_block_padding_rows=2048,
        max_cluster_warps=64,
        last_block_warps=4,
        max_padding_rows=4096,
        max_pairs_looked_at=16,
        table_blocks=(128, 512),
        min_shared_tokens=16,
    ),
    chunks=Chunks(measured_by="python -m benchmarks.bench_dense_router", bytes=64 << 20),
    gemm=Gemm(
        measured_by="python -m benchmarks.bench_dense_router",
        workspace_bytes=32 << 20,  # what NVIDIA recommends for Hopper
        max_pack_blocks=4096,
    ),
)
