// SPDX-License-Identifier: Apache-2.0
// The k largest scores of a few long rows, exact, in any order: a cluster of blocks for each row; sm_90 and later.
//
// The blocks share the scores of the row (cluster_share.cuh), which stay in registers. Each block finds the highest key
// that the best scores of enough of its threads reach: as many threads as its share of k. At least k scores of the row
// reach the lowest of these keys, the threshold; and few more do, since most winners are in different threads. Each
// block lists its scores that reach it. The blocks count the keys of their lists in equal parts of their range, add up the counts
// over the cluster (narrow.cuh) and send the few entries around the last winner to each other. Then each block knows
// the last winner, and how many winners the blocks before it have, and writes its own. If they are to be sorted, it sends
// them to all blocks instead, and each writes a part of the order (list_sort.cuh).
//
// Positions come from prefix sums, so the order is the same on every run: by block, thread and score of the thread.
//
// If a list is too long, because of ties or because many winners are in one thread, the cluster raises the threshold by
// counting scores in parts of the range of keys, or, among ties, of lines of the row.
#include "device/prefetch.cuh"
#include "long_rows/cluster_share.cuh"
#include "long_rows/list_sort.cuh"
#include "long_rows/narrow.cuh"
#include "long_rows/result.cuh"

enum Order { ANY, BY_COLUMN, BY_VALUE };

SPECIALISED int DTYPE = 0;
SPECIALISED int CLUSTER = 8;  // blocks of a row
SPECIALISED int BLOCK = 512;
SPECIALISED int BLOCKS = 1;       // on a multiprocessor
SPECIALISED int HELD = 4;         // vectors that a thread holds
SPECIALISED int CAPACITY = 2048;  // of the list of a block
SPECIALISED int SORTED = 1024;    // capacity of the sort
SPECIALISED Order ORDER = ANY;

typedef Scalar<DTYPE>::type score_t;
typedef ClusterShare<DTYPE, CLUSTER, BLOCK, HELD> Share;
typedef Passes<DTYPE> Pass;
typedef unsigned long long Entry;  // rank_key, with the high bits of the column in the low half of a 16-bit key
typedef RankList<Entry, BLOCK, SORTED> Winners;
typedef ListSort<Entry, BLOCK, SORTED> Sort;

constexpr int WARPS = BLOCK / 32;
constexpr int FEW = 64;  // entries that are compared with each other
constexpr unsigned KEY_MASK = DTYPE == 0 ? ~0u : 0xffff0000u;
constexpr int SHARED_BYTES = 8 * CAPACITY + (ORDER == ANY ? 0 : 8 * SORTED + Sort::BYTES);

static_assert(CLUSTER <= 32, "a lane for each block");
static_assert(CLUSTER * BLOCK * HELD * Share::VECTOR <= 512 * BINS, "a list has room for the ties of a bin of lines");

struct ClusterMemory {
    __align__(16) int bins[2][BINS];  // in turn: other blocks may still read one while this block fills the next
    int sums[WARPS];
    int above;
    int num_few;
    Entry few[FEW];
    int few_block[FEW];
    int few_winners[CLUSTER];
    Entry last;
    // What the blocks of the cluster send:
    Extent keys[CLUSTER];         // threshold and highest key
    int listed[CLUSTER];          // scores that reach the threshold
    int counts_above[CLUSTER];    // and those above it
    int2 around[CLUSTER];         // entries above the last part of the range, and in it
    Entry entries[CLUSTER][FEW];  // those in it
};

__device__ __forceinline__ unsigned upper(Entry entry) { return static_cast<unsigned>(entry >> 32); }

// Call function(rank) by a thread for each block of the cluster.
template <typename Function>
__device__ __forceinline__ void for_each_block(Function function) {
    if (threadIdx.x < CLUSTER) function(static_cast<int>(threadIdx.x));
}

// Return a key that the best keys of at least `wanted` threads reach, NAN_KEY if there are not so many, and the highest.
__device__ __forceinline__ Extent threshold_of_block(ClusterMemory& memory, unsigned best, int wanted) {
    const bool counts = best > NAN_KEY;
    Extent range = block_extent<BLOCK>({counts ? best : ~0u, best});
    const unsigned highest = range.high;
    if (range.low > range.high) return {NAN_KEY, highest};
#pragma unroll 1
    for (int rest = wanted;;) {
        const KeyCounter count(range, memory.bins[0]);
        if (counts) count(best);
        __syncthreads();
        const Bin bin = choose_part<BLOCK, 1>(count, rest, memory.bins[0]);
        if (bin.inside == 0) return {NAN_KEY, highest};
        if (bin.inside <= wanted / 8 + 16 || bin.keys.low == bin.keys.high) return {bin.keys.low, highest};
        rest -= bin.above;
        const bool inside = best >= bin.keys.low && best <= bin.keys.high;
        range = block_extent<BLOCK>({inside ? best : ~0u, inside ? best : NO_KEY});
    }
}

// Send the entries in a part of the range, at most FEW in the cluster, and their number and that of the entries above
// it, to all blocks.
template <typename Place>
__device__ __forceinline__ void send_around(ClusterMemory& memory, const Entry* list, int listed, int rank,
                                            Place place) {
    int above = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < listed; i += BLOCK) {
        const Entry entry = list[i];
        const int where = place(entry);  // 1: above, 0: inside
        above += where > 0;
        if (where == 0) {
            const int slot = atomicAdd(&memory.num_few, 1);  // in any order
#pragma unroll
            for (int to = 0; to < CLUSTER; ++to) cluster_map(memory.entries[rank], to)[slot] = entry;
        }
    }
    above = static_cast<int>(warp_sum(above));
    if (threadIdx.x % 32 == 0) atomicAdd(&memory.above, above);
    __syncthreads();
    for_each_block([&](int to) { cluster_map(memory.around, to)[rank] = {memory.above, memory.num_few}; });
}

// Find the `wanted`-th best of the entries that all blocks have sent, and how many of those up to it each block has.
__device__ __forceinline__ void find_last(ClusterMemory& memory, int wanted) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int own = lane < CLUSTER ? memory.around[lane].y : 0;
    const int end = warp_prefix(own), number = __shfl_sync(FULL_WARP, end, CLUSTER - 1);
#pragma unroll 1
    for (int from = warp; from < CLUSTER; from += WARPS) {
        const int size = __shfl_sync(FULL_WARP, own, from), begin = __shfl_sync(FULL_WARP, end, from) - size;
        for (int i = lane; i < size; i += 32) {
            memory.few[begin + i] = memory.entries[from][i];
            memory.few_block[begin + i] = from;
        }
        if (lane == 0) memory.few_winners[from] = 0;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = warp; i < number; i += WARPS) {
        const Entry mine = memory.few[i];
        const bool low = lane < number && memory.few[lane] > mine;
        const bool high = lane + 32 < number && memory.few[lane + 32] > mine;
        const int better = __popc(__ballot_sync(FULL_WARP, low)) + __popc(__ballot_sync(FULL_WARP, high));
        if (lane == 0 && better < wanted) {
            atomicAdd(&memory.few_winners[memory.few_block[i]], 1);
            if (better == wanted - 1) memory.last = mine;
        }
    }
    __syncthreads();
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(BLOCK, BLOCKS)
    topk_select_cluster(const score_t* __restrict__ scores, const int* __restrict__ lengths,
                        const int* __restrict__ starts, const int* __restrict__ index_map, score_t* __restrict__ values,
                        int* __restrict__ indices, int num_columns, int k, int page_size, long long scores_stride,
                        long long values_stride, long long indices_stride, long long map_stride) {
#ifdef __CUDACC__
    extern __shared__ __align__(16) unsigned char shared[];
#else
    __shared__ __align__(16) unsigned char shared[SHARED_BYTES];
#endif
    __shared__ ClusterMemory memory;
    Entry* list = reinterpret_cast<Entry*>(shared);
    Entry* winners = list + CAPACITY;  // of the row, if they are to be sorted
    const int rank = static_cast<int>(cluster_rank()), lane = threadIdx.x % 32;
    const int64_t row = blockIdx.x / CLUSTER;
    const RowRange range = row_range(lengths, starts, row, num_columns);
    const score_t* source = scores + row * scores_stride + range.start;
    const int wanted = min(k, range.length);

    cluster_arrive();  // all blocks have to run before the first access to another one
    Share share(source, range.length, rank);
    share.load();
    const unsigned single = share.single >= 0 ? bits_key<DTYPE>(score_bits(source[share.single])) : NO_KEY;
    const int first_page = 32 * (rank * BLOCK + static_cast<int>(threadIdx.x));  // in a line of the map
    if (index_map != nullptr && first_page * static_cast<int64_t>(page_size) < range.length) {
        prefetch_line(index_map + row * map_stride + first_page);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < BINS; i += BLOCK) memory.bins[0][i] = memory.bins[1][i] = 0;
    if (threadIdx.x == 0) memory.above = memory.num_few = 0;

    const unsigned best = max(share.best(), single);
    const Extent own_keys = threshold_of_block(memory, best, (wanted + CLUSTER - 1) / CLUSTER);
    cluster_wait();
    for_each_block([&](int to) { cluster_map(memory.keys, to)[rank] = own_keys; });
    cluster_barrier();
    const auto next_key = [](unsigned key) {  // of a score
        return DTYPE != 0 && key > NAN_KEY ? (key + 0xffffu) & 0xffff0000u : key;
    };
    unsigned threshold = next_key(warp_min(memory.keys[lane % CLUSTER].low));
    // Where the last winner is looked for, and its number from there on: by key, or by column among the ties with the
    // threshold.
    Extent part = {threshold, warp_max(memory.keys[lane % CLUSTER].high) | ~KEY_MASK};
    bool by_column = false;
    int rest = wanted;
    const int column_shift = max(16 - __clz(range.length), 0);
    const auto spread = [&](unsigned key, int column) {  // ties of 16 bits over the keys that they do not have
        return DTYPE == 0 ? key : key | (0xffffu - static_cast<unsigned>(column >> column_shift));
    };
    const auto position = [&](Entry entry) {
        if (!by_column) return upper(entry);
        return (upper(entry) & KEY_MASK) == (threshold & KEY_MASK) ? static_cast<unsigned>(entry) : 0u;
    };
    int turn = 0;      // which bins are counted in
    int listed, size;  // entries of this block, and of all
    unsigned found = share.passing(Pass(threshold, false));
    bool has_single = single >= threshold && single != NO_KEY;
#pragma unroll 1
    for (;;) {
        int place = block_prefix_once<BLOCK>(__popc(found) + has_single, listed, memory.sums);
        if (!UNLIKELY(listed > CAPACITY)) {
            if (has_single) list[place++] = share.single;
#pragma unroll 1
            for (unsigned left = found; left != 0; left &= left - 1) list[place++] = share.column(__ffs(left) - 1);
            __syncthreads();
            // Read the scores again, all at once.
            const KeyCounter count(part, memory.bins[turn]);
#pragma unroll 2
            for (int i = threadIdx.x; i < listed; i += BLOCK) {
                const int column = static_cast<int>(list[i]);
                const Entry entry = rank_key(spread(bits_key<DTYPE>(score_bits(source[column])), column), column);
                list[i] = entry;
                count(position(entry));
            }
        }
        for_each_block([&](int to) { cluster_map(memory.listed, to)[rank] = listed; });
        cluster_barrier();
        const int listed_there = lane < CLUSTER ? memory.listed[lane] : 0;
        size = static_cast<int>(warp_sum(listed_there));
        if (!UNLIKELY(warp_max(listed_there) > CAPACITY)) break;

        // Count the scores above the threshold, and ties by line.
        const auto clear = [&] {
#pragma unroll 1
            for (int i = threadIdx.x; i < BINS; i += BLOCK) memory.bins[turn][i] = 0;
            __syncthreads();
        };
        clear();
        const Pass above(threshold, true);
        const unsigned higher = share.passing_again(above);
        unsigned equal = found & ~higher;
        const bool single_above = has_single && single > threshold;
        const int num_higher = static_cast<int>(warp_sum(__popc(higher) + single_above));
        if (lane == 0) atomicAdd(&memory.above, num_higher);
        const KeyCounter count_line({~share.line_of(range.length - 1), ~0u}, memory.bins[turn]);
        if (__any_sync(FULL_WARP, equal != 0)) {
#pragma unroll 1
            for (int u = 0; u < HELD; ++u) {
                int in_line = __popc(equal & Share::bits_of_vector(u));
#pragma unroll
                for (int distance = 1; distance < Share::LINE; distance *= 2) {
                    in_line += __shfl_xor_sync(FULL_WARP, in_line, distance);
                }
                if (lane % Share::LINE == 0 && in_line > 0) count_line(~share.line(u), in_line);
            }
        }
        if (has_single && !single_above) count_line(~share.line_of(share.single));
        __syncthreads();
        for_each_block([&](int to) { cluster_map(memory.counts_above, to)[rank] = memory.above; });
        cluster_barrier();
        const int above_there = lane < CLUSTER ? memory.counts_above[lane] : 0;
        const int num_above = static_cast<int>(warp_sum(above_there));
        if (threadIdx.x == 0) memory.above = 0;
        if (num_above < wanted) {  // the threshold is the key of the last winner
            const Bin bin = choose_part<BLOCK, CLUSTER>(count_line, wanted - num_above, memory.bins[turn ^ 1]);
            turn ^= 1;
            by_column = true;
            rest = wanted - num_above - bin.above;
            const unsigned last_line = ~bin.keys.low;
            part = {~static_cast<unsigned>(share.first_column(last_line + 1) - 1),
                    ~static_cast<unsigned>(share.first_column(~bin.keys.high))};
#pragma unroll 1
            for (int u = 0; u < HELD; ++u) {
                if (share.line(u) > last_line) equal &= ~Share::bits_of_vector(u);
            }
            found = higher | equal;
            has_single = single_above || (has_single && share.line_of(share.single) <= last_line);
            continue;
        }
        clear();
        if (static_cast<int>(warp_max(above_there)) <= CAPACITY) {
            threshold = part.low = above.key;
            found = higher;
            has_single = single_above;
            continue;
        }
        const KeyCounter count_key(part, memory.bins[turn]);
#pragma unroll 1
        for (unsigned left = higher; left != 0; left &= left - 1) {
            count_key(bits_key<DTYPE>(score_bits(source[share.column(__ffs(left) - 1)])));
        }
        if (single_above) count_key(single);
        cluster_barrier();
        const Bin bin = choose_part<BLOCK, CLUSTER>(count_key, rest, memory.bins[turn ^ 1]);
        turn ^= 1;
        rest -= bin.above;
        threshold = next_key(bin.keys.low);
        part = {threshold, bin.keys.high | ~KEY_MASK};
        found = share.passing_again(Pass(threshold, false));
        has_single = has_single && single >= threshold;
    }

    // Find the last winner.
    int before = 0;  // winners of the blocks before
    Entry last = 0;
    if (size > wanted) {
#pragma unroll 1
        for (;;) {
            const Bin bin =
                choose_part<BLOCK, CLUSTER>(KeyCounter(part, memory.bins[turn]), rest, memory.bins[turn ^ 1]);
            turn ^= 1;
            rest -= bin.above;
            part = bin.keys;
            if (bin.inside <= FEW) break;
            if (DTYPE == 0 && !by_column && part.low == part.high) {  // 16 bits are spread
                by_column = true;
                threshold = part.low;
                part = {~static_cast<unsigned>(range.length - 1), ~0u};
            }
            const KeyCounter count(part, memory.bins[turn]);
#pragma unroll 1
            for (int i = threadIdx.x; i < listed; i += BLOCK) count(position(list[i]));
            cluster_barrier();
        }
        const auto entry_at = [&](unsigned at, unsigned column) {
            return by_column ? rank_key(spread(threshold, ~at), ~at) : rank_key(at, column);
        };
        const Entry low = entry_at(part.low, ~0u), high = entry_at(part.high, 0u);
        send_around(memory, list, listed, rank, [&](Entry entry) { return entry > high ? 1 : entry < low ? -1 : 0; });
        cluster_barrier();
        find_last(memory, rest);
        last = memory.last;
        const int winners_there = lane < rank ? memory.around[lane].x + memory.few_winners[lane] : 0;
        before = static_cast<int>(warp_sum(winners_there));
    } else {
        before = static_cast<int>(warp_sum(lane < rank ? memory.listed[lane] : 0));
    }

    const auto write = [&](int i, Entry entry) {
        const unsigned key = upper(entry) & KEY_MASK;
        const int column = entry == 0 ? -1 : static_cast<int>(column_of(entry));
        if (values != nullptr) store_value<DTYPE>(values + row * values_stride + i, source, key, column);
        indices[row * indices_stride + i] = mapped_index(index_map, row * map_stride, column, page_size);
    };
#pragma unroll 1
    for (int from = 0; from < listed; from += BLOCK) {
        const int i = from + static_cast<int>(threadIdx.x);
        const Entry entry = i < listed ? list[i] : 0;
        const bool wins = i < listed && entry >= last;
        int all;
        const int place = before + block_prefix<BLOCK>(wins, all);
        before += all;
        if (!wins) continue;
        if (ORDER == ANY) {
            write(place, entry);
        } else {
#pragma unroll
            for (int to = 0; to < CLUSTER; ++to) cluster_map(winners, to)[place] = entry;
        }
    }
#pragma unroll 1
    for (int i = wanted + rank * BLOCK + static_cast<int>(threadIdx.x); i < k; i += CLUSTER * BLOCK) write(i, 0);
    if constexpr (ORDER != ANY) {
        cluster_barrier();
        const Entry low_word = 0xffffffffu;
        const bool by_value = ORDER == BY_VALUE;
        const Entry lowest = by_value ? rank_key(threshold, ~0u) : rank_key(0, range.length - 1);
        const unsigned highest = warp_max(memory.keys[lane % CLUSTER].high) | ~KEY_MASK;
        const Entry best_of_all = by_value ? rank_key(highest, 0) : low_word;
        const Sort sort(reinterpret_cast<unsigned char*>(winners + SORTED), wanted, wanted, 0,
                        by_value ? ~static_cast<Entry>(0) : low_word, max(lowest, by_value ? last : 0), best_of_all);
        const int share_of_block = (wanted + CLUSTER - 1) / CLUSTER;
        sort.sort(Winners{winners, nullptr}, by_value, rank * share_of_block, share_of_block, write);
    }
}
