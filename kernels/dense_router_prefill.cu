// SPDX-License-Identifier: Apache-2.0
// From hidden states to experts in one launch, for many tokens; sm_90 alone.
//
// A cluster of CLUSTER_PARTS * CLUSTER_TILES blocks computes the logits of a tile of tokens for its tiles of experts:
// see gate/gemm_wgmma.cuh. Each block of the cluster routes TOKENS tokens of the tile. If the cluster does not have all
// experts, logits go to global memory, as the partial sums of one split; there is a counter for these tokens, and the last
// of the TILES blocks that have logits of them routes. Sums have the order of dense_router_decode.cu with INVARIANT, and
// are the same to the bit. x and the gate are read by their tensor maps alone.
#include "device/last_block.cuh"
#include "device/num_valid.cuh"
#include "gate/gemm_wgmma.cuh"
#include "gate/route_sums.cuh"

using namespace wgmma_gemm;

constexpr bool ALL_TILES = CLUSTER_TILES == TILES;  // of experts, in a cluster
static_assert(SUMS_BYTES + 4 * SCORE_FLOATS <= SHARED_BYTES, "scores follow the sums in place of stages");
static_assert(STAGES == 0 || (SPLITS == 1 && ROUTED == TOKENS), "the cluster adds the sums of all parts");

extern "C" __global__ void __cluster_dims__(CLUSTER_PARTS* CLUSTER_TILES, 1, 1) __launch_bounds__(32 * WARPS, 1)
    dense_router_prefill(const x_t* __restrict__ x, const gate_t* __restrict__ weight, const float* __restrict__ bias,
                         const int* __restrict__ bias_index, const float* __restrict__ logit_bias,
                         const float* __restrict__ expert_scale, const given_t* __restrict__ given_experts,
                         const replica_t* __restrict__ replicas, const replica_count_t* __restrict__ replica_counts,
                         const int* __restrict__ num_valid, weight_t* __restrict__ weights,
                         index_t* __restrict__ indices, logit_out_t* __restrict__ logits_out, unsigned* counters,
                         float* partials, int num_valid_value, const __grid_constant__ TensorMap x_map,
                         const __grid_constant__ TensorMap weight_map, const given_token_t* __restrict__ token_ids,
                         long long replica_offset, long long num_tokens, const MethodNumbers numbers,
                         long long x_stride, long long weight_stride, long long weights_stride,
                         long long indices_stride, long long given_stride, long long logits_out_stride) {
#ifdef __CUDACC__
    extern __shared__ __align__(1024) char unaligned[];
    char* shared = unaligned + (-__cvta_generic_to_shared(unaligned) & 1023);
#else
    __shared__ __align__(1024) char shared[SHARED_BYTES + 1024];
#endif
    if (DENSE) {
        weights_stride = indices_stride = OUTPUTS;
    }
    const int rank = blockIdx.x % BLOCKS, cluster = blockIdx.x / BLOCKS;
    constexpr int CLUSTERS_OF_TILE = TILES / CLUSTER_TILES;
    const int tile = cluster % CLUSTERS_OF_TILE + rank / CLUSTER_PARTS, first_expert = tile * EXPERTS_PER_BLOCK;
    const int first_of_tile = cluster / CLUSTERS_OF_TILE * TILE_TOKENS;
    const int of_tile = min(static_cast<int>(num_tokens) - first_of_tile, TILE_TOKENS);
    const int first_routed = rank * TOKENS;
    int count = min(of_tile - first_routed, TOKENS);  // may be negative
    const int first_token = first_of_tile + first_routed;

    const int fetched_valid = fetch_valid(num_valid, num_valid_value);
    fetch_biases(bias, NUM_BIASES > 0 ? bias_index + first_token : nullptr, count);
    __shared__ Mbarrier barriers[BARRIERS];
    run(x_map, weight_map, first_expert, first_of_tile, rank % CLUSTER_PARTS * PAIRS, shared, barriers);
    if (BLOCKS > 1) {
        cluster_barrier();
    } else {
        __syncthreads();
    }
    constexpr int WORDS = EXPERTS_PER_BLOCK / 4;
    float* logits = partials + static_cast<int64_t>(first_token) * COLUMNS;
    if (!ALL_TILES) {
        for (int i = threadIdx.x; i < count * WORDS; i += THREADS) {
            const int token = i / WORDS, expert = i % WORDS * 4;
            *reinterpret_cast<float4*>(logits + token * COLUMNS + first_expert + expert) =
                read_logits(shared, rank, first_routed + token, expert);
        }
    }
    copy_async_wait<0>();  // for biases
    const int valid = static_cast<int>(clamp_valid(fetched_valid, num_tokens));
    const auto keep_logit = [&](int token, int expert, float logit) {
        token += first_token;
        store_float(logits_out + token * logits_out_stride + expert, token < valid ? logit : 0.0f);
    };
    const auto given_id_of = [&](int token) {
        return given_id(given_experts, given_stride, token_ids, first_token + token, threadIdx.x % 32, token < count);
    };
    const Replicas its_replicas = {replicas, replica_counts, replica_offset};
    const Results results = {weights, indices, weights_stride, indices_stride, expert_scale, numbers, its_replicas};
    float* scores = reinterpret_cast<float*>(shared + SUMS_BYTES);
    const int warp = threadIdx.x / 32;
    int id = given_id_of(warp);  // in flight while scores are gathered
    if (ALL_TILES) {
        const auto of_cluster = [&](int token, int expert) {
            const float4 sums = read_logits(shared, rank, first_routed + token, expert);
            return Floats<4>{{sums.x, sums.y, sums.z, sums.w}};
        };
        score_tokens<4, 4>(of_cluster, count, logit_bias, numbers, scores, keep_logit);
    } else {
        const int group = cluster / CLUSTERS_OF_TILE * BLOCKS + rank;
        count = count > 0 && is_last_block(&counters[group], TILES) ? count : 0;
        gather_scores(logits, 0, count, logit_bias, numbers, scores, keep_logit);
    }
    __syncthreads();
    if (BLOCKS > 1) cluster_arrive_relaxed();  // this block reads nothing more of the others
    for (int t = warp; t < count; t += WARPS) {
        const int token = first_token + t, index = NUM_BIASES > 0 ? shared_bias_index[t] : 0;
        const BiasRow its_bias =
            BIASES_IN_SHARED ? bias_row(shared_bias, index, BIAS_ROW) : bias_row(bias, index, BIAS_STRIDE);
        if (t > warp) id = given_id_of(t);
        route(&scores[t * 32 * PER_LANE], its_bias, id, token, token < valid, results, [](int64_t, int, index_t) {});
    }
    if (BLOCKS > 1) cluster_wait();  // until no other block reads the sums of this one
}
