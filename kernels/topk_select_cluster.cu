// SPDX-License-Identifier: Apache-2.0
// The k largest scores of a few long rows, exact: a cluster of blocks for each row; sm_90 and later.
//
// The blocks share the scores of the row (cluster_share.cuh), which stay in registers. Each block finds the highest key
// that the best scores of enough of its threads reach: as many threads as its share of k. At least k scores of the row
// reach the lowest of these keys, the threshold; and few more do, since most winners are in different threads. Each
// block lists its scores that reach it, and sends the list to all blocks. Then each knows all candidates, counts them in
// bins of the order, and takes some places of the results: it puts the candidates of the bins that begin there in
// order, by comparing those of each bin. The order "any" is that by value, too.
//
// The order by column, and crowded bins, need the last winner: it is found by counting in ever smaller ranges. Then the
// winners are sorted (list_sort.cuh), or in any order written by block, thread and score of the thread: positions come
// from prefix sums, so that order is the same on every run, too.
// If a list is too long, because of ties or because many winners are in one thread, the cluster raises the threshold by
// counting scores in parts of the range of keys, or, among ties, of lines of the row.
#include "device/mailbox.cuh"
#include "device/prefetch.cuh"
#include "long_rows/candidates.cuh"
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
SPECIALISED int CAPACITY = 1024;  // of the list of a block
SPECIALISED int SORTED = 1024;    // capacity of the sort
SPECIALISED Order ORDER = ANY;

typedef Scalar<DTYPE>::type score_t;
typedef ClusterShare<DTYPE, CLUSTER, BLOCK, HELD> Share;
typedef Passes<DTYPE> Pass;
typedef unsigned long long Entry;  // rank_key, with the high bits of the column in the low half of a 16-bit key
typedef Candidates<CLUSTER, BLOCK, CAPACITY> Lists;
typedef RankList<Entry, BLOCK, SORTED> Winners;
typedef ListSort<Entry, BLOCK, SORTED> Sort;

constexpr int WARPS = BLOCK / 32;
constexpr int FEW = 64;     // entries that are compared with each other to find the last winner
constexpr int CROWD = 256;  // the most entries of a bin that are compared with each other
constexpr bool FROM_REGISTERS = BLOCK * BLOCKS <= 512;  // while there are enough for a thread
constexpr unsigned KEY_MASK = DTYPE == 0 ? ~0u : 0xffff0000u;
constexpr int SHARED_BYTES = 8 * (Lists::SIZE + SORTED + CROWD) + (ORDER == ANY ? 0 : Sort::BYTES);

static_assert(CLUSTER <= 32, "a lane for each block");
static_assert(CLUSTER * BLOCK * HELD * Share::VECTOR <= 512 * BINS, "a list has room for the ties of a bin of lines");
static_assert(BLOCK * HELD * Share::VECTOR + 2 * Share::VECTOR < 1 << 16, "counts of a block have 16 bits");

struct ClusterMemory {
    __align__(16) int bins[BINS];  // 0 but while scores or entries are counted
    BinPlaces places;
    int sums[2][WARPS];
    int above;
    int num_few;
    int num_winners;
    int before;  // winners of the blocks before
    Entry few[FEW];
    Entry last;
    // Sent by the blocks of the cluster:
    SentBins<CLUSTER> sent[2];  // in turn: other blocks may still read one while this block fills the next
    Mailbox keys_mail, numbers_mail, lists_mail;
    __align__(16) uint4 keys[CLUSTER];  // words of BlockKeys
    int listed[CLUSTER];                // scores that reach the threshold
    int counts_above[CLUSTER];          // and those above it
};

__device__ __forceinline__ unsigned upper(Entry entry) { return static_cast<unsigned>(entry >> 32); }

// Call function(rank) by a thread for each block of the cluster.
template <typename Function>
__device__ __forceinline__ void for_each_block(Function function) {
    if (threadIdx.x < CLUSTER) function(static_cast<int>(threadIdx.x));
}

// Return the `wanted`-th best of `number` entries, at most FEW.
__device__ __forceinline__ Entry last_of_few(ClusterMemory& memory, int number, int wanted) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < number; i += WARPS) {
        const Entry mine = memory.few[i];
        int better = 0;
#pragma unroll
        for (int j = 0; j < FEW; j += 32) {
            better += __popc(__ballot_sync(FULL_WARP, lane + j < number && memory.few[lane + j] > mine));
        }
        if (lane == 0 && better == wanted - 1) memory.last = mine;
    }
    __syncthreads();
    return memory.last;
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
    const int rank = static_cast<int>(cluster_rank()), lane = threadIdx.x % 32;
    const Lists lists = {reinterpret_cast<Entry*>(shared), memory.listed};
    Entry* list = lists.list(rank);                                   // of this block
    Entry* winners = reinterpret_cast<Entry*>(shared) + Lists::SIZE;  // those of this block's places, or all
    const int64_t row = blockIdx.x / CLUSTER;
    const RowRange range = row_range(lengths, starts, row, num_columns);
    const score_t* source = scores + row * scores_stride + range.start;
    const int wanted = min(k, range.length);

    Share share(source, range.length, rank);
    share.load();
    if (threadIdx.x == 0) {
        memory.keys_mail.prepare(), memory.numbers_mail.prepare(), memory.lists_mail.prepare();
        memory.keys_mail.expect(sizeof(memory.keys));
        memory.numbers_mail.expect(sizeof(memory.listed));
    }
    cluster_arrive_relaxed();  // all blocks have to run before the first access to another one
    const auto single_key = [&] {
        return share.single >= 0 ? bits_key<DTYPE>(score_bits(source[share.single])) : NO_KEY;
    };
    const int first_page = 32 * (rank * BLOCK + static_cast<int>(threadIdx.x));  // in a line of the map
    // More threads lack registers.
    if (BLOCK <= 512 && index_map != nullptr && first_page * static_cast<int64_t>(page_size) < range.length) {
        prefetch_line(index_map + row * map_stride + first_page);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < BINS; i += BLOCK) memory.bins[i] = 0;
    if (threadIdx.x == 0) {
        memory.above = memory.num_few = memory.num_winners = memory.before = memory.places.crowded = 0;
    }

    const unsigned best = max(share.best(), single_key());
    const BlockKeys own_keys = keys_of_block<BLOCK>(memory.bins, best, (wanted + CLUSTER - 1) / CLUSTER);
    cluster_wait();
    for_each_block([&](int to) { memory.keys_mail.send(to, &memory.keys[rank], own_keys.words()); });
    memory.keys_mail.wait(0);
    const uint4 keys_there = memory.keys[lane % CLUSTER];
    const unsigned lowest = warp_min(keys_there.x), highest = warp_max(keys_there.y) | ~KEY_MASK;
    const bool tied = __any_sync(FULL_WARP, keys_there.z != 0 && keys_there.x == lowest);
    const auto next_key = [](unsigned key) {  // of a score
        return DTYPE != 0 && key > NAN_KEY ? (key + 0xffffu) & 0xffff0000u : key;
    };
    unsigned threshold = next_key(lowest);
    Extent part = {threshold, highest};  // where the last winner is looked for
    int rest = wanted;                   // and its number from there on
    bool ties = false;                   // whether the threshold is the key of the last winner; then
    int end = 0;                         // ties are listed before this column
    const int column_shift = max(16 - __clz(range.length), 0);
    const auto spread = [&](unsigned key, int column) {  // ties of 16 bits over the keys that they do not have
        return DTYPE == 0 ? key : key | (0xffffu - static_cast<unsigned>(column >> column_shift));
    };
    int turn = 0;  // which bins are sent
    const auto send_bins = [&] { memory.sent[turn].send(rank, take_bins(memory.bins)); };
    const auto choose = [&](const KeyCounter& count, int rest) {  // after a cluster barrier
        const Bin bin = choose_part<BLOCK>(count, rest, memory.sent[turn].sum());
        turn ^= 1;
        return bin;
    };

    int listed;     // scores on the list
    int mails = 0;  // lists that were sent
    bool fits = false;
    const unsigned single = single_key();  // read again, since registers are scarce before
    bool has_single = single >= threshold && single != NO_KEY;
    unsigned found = share.passing(Pass(threshold, false)), higher = 0;
    // List the scores found, if there is room, and send the list to all blocks. `held`: from registers; otherwise the
    // columns come first, and then all scores are read again at once.
    const auto send_list = [&](bool held) {
        int place = block_prefix_once<BLOCK>(__popc(found) + has_single, listed, memory.sums[0]);
        if (listed <= CAPACITY) {
            if (has_single) list[place++] = list_entry(held ? score_bits(source[share.single]) : 0, share.single);
            if (held) {
                share.list(found, list + place);
            } else {
#pragma unroll 1
                for (unsigned left = found; left != 0; left &= left - 1) list[place++] = share.column(__ffs(left) - 1);
            }
            __syncthreads();
#pragma unroll 1
            for (int i = threadIdx.x; i < listed; i += BLOCK) {
                const int column = static_cast<int>(list[i]);
                const unsigned bits = held ? upper(list[i]) : score_bits(source[column]);
                const Entry entry = rank_key(spread(bits_key<DTYPE>(bits), column), column);
#pragma unroll
                for (int to = 0; to < CLUSTER; ++to) memory.lists_mail.send(to, list + i, entry);
            }
        }
        for_each_block([&](int to) { memory.numbers_mail.send(to, &memory.listed[rank], listed); });
        memory.numbers_mail.wait(mails);
        const int listed_there = lane < CLUSTER ? memory.listed[lane] : 0;
        const int sent = static_cast<int>(warp_sum(listed_there <= CAPACITY ? listed_there : 0));
        fits = static_cast<int>(warp_max(listed_there)) <= CAPACITY;
        if (threadIdx.x == 0) {
            memory.numbers_mail.expect(sizeof(memory.listed));
            memory.lists_mail.expect(sent * static_cast<int>(sizeof(Entry)));
        }
        memory.lists_mail.wait(mails++);
    };
    const int places_of_block = (wanted + CLUSTER - 1) / CLUSTER;
#pragma unroll 1
    for (int i = threadIdx.x; i < places_of_block + CROWD; i += BLOCK) winners[i] = 0;
    if (UNLIKELY(tied)) {
        if (FROM_REGISTERS) higher = share.passing(Pass(threshold, true));
    } else {
        send_list(FROM_REGISTERS);
    }
    bool knows_higher = tied && FROM_REGISTERS;
#pragma unroll 1
    while (UNLIKELY(!fits)) {
        // Count the scores above the threshold, and ties by line.
        const Pass above(threshold, true);
        if (!knows_higher) higher = share.passing_again(above);
        knows_higher = false;
        unsigned equal = found & ~higher;
        const bool single_above = has_single && single > threshold;
        const int num_higher = static_cast<int>(warp_sum(__popc(higher) + single_above));
        if (lane == 0) atomicAdd(&memory.above, num_higher);
        const KeyCounter count_line({~share.line_of(range.length - 1), ~0u}, memory.bins);
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
        send_bins();
        for_each_block([&](int to) { cluster_map(memory.counts_above, to)[rank] = memory.above; });
        cluster_barrier();
        const int above_there = lane < CLUSTER ? memory.counts_above[lane] : 0;
        const int num_above = static_cast<int>(warp_sum(above_there));
        if (threadIdx.x == 0) memory.above = 0;
        if (num_above < wanted) {  // the threshold is the key of the last winner
            const unsigned last_line = ~choose(count_line, wanted - num_above).keys.low;
            ties = true;
            end = share.first_column(last_line + 1);
#pragma unroll 1
            for (int u = 0; u < HELD; ++u) {
                if (share.line(u) > last_line) equal &= ~Share::bits_of_vector(u);
            }
            found = higher | equal;
            has_single = single_above || (has_single && share.line_of(share.single) <= last_line);
        } else if (static_cast<int>(warp_max(above_there)) <= CAPACITY) {
            turn ^= 1;
            threshold = part.low = above.key;
            found = higher;
            has_single = single_above;
        } else {
            turn ^= 1;
            const KeyCounter count_key(part, memory.bins);
#pragma unroll 1
            for (unsigned left = higher; left != 0; left &= left - 1) {
                count_key(bits_key<DTYPE>(score_bits(source[share.column(__ffs(left) - 1)])));
            }
            if (single_above) count_key(single);
            __syncthreads();
            send_bins();
            cluster_barrier();
            const Bin bin = choose(count_key, rest);
            rest -= bin.above;
            threshold = next_key(bin.keys.low);
            part = {threshold, bin.keys.high | ~KEY_MASK};
            found = share.passing_again(Pass(threshold, false));
            has_single = has_single && single >= threshold;
        }
        send_list(false);
    }

    // Count all entries in bins of the order by value.
    const BinOrder<KEY_MASK> order(threshold, highest, ties, end);
    lists.for_each([&](Entry entry, int) { atomicAdd(&memory.bins[order.bin(entry)], 1); });
    __syncthreads();
    memory.places.find<BLOCK>(take_bins(memory.bins), wanted, CROWD, memory.sums[1]);

    const auto write = [&](int i, Entry entry) {
        const int64_t row = block_anew() / CLUSTER;
        const score_t* source = scores + row * scores_stride + range.start;
        const unsigned key = upper(entry) & KEY_MASK;
        const int column = entry == 0 ? -1 : static_cast<int>(column_of(entry));
        if (values != nullptr) store_value<DTYPE>(values + row * values_stride + i, source, key, column);
        indices[row * indices_stride + i] = mapped_index(index_map, row * map_stride, column, page_size);
    };
#pragma unroll 1
    for (int i = wanted + rank * BLOCK + static_cast<int>(threadIdx.x); i < k; i += CLUSTER * BLOCK) write(i, 0);
    const int first_place = rank * places_of_block;
    if (ORDER != BY_COLUMN && !UNLIKELY(memory.places.crowded != 0)) {
        // Each block takes the bins that begin at its places.
        const int places_here = min(places_of_block, wanted - first_place);
        lists.for_each([&](Entry entry, int) {
            const int bin = order.bin(entry), first = memory.places.first(bin) - first_place;
            if (first >= 0 && first < places_here) {
                winners[atomicAdd(&memory.places.next[bin], 1) - first_place] = entry;
            }
        });
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < places_of_block + CROWD; i += BLOCK) {
            const Entry mine = winners[i];
            if (mine == 0) continue;
            const int bin = order.bin(mine), stop = memory.places.first(bin - 1);
            int place = memory.places.first(bin);
#pragma unroll 4
            for (int j = place; j < stop; ++j) place += winners[j - first_place] > mine;
            if (place < wanted) write(place, mine);
        }
        return;
    }

    // Find the last winner.
    const unsigned lowest_key = threshold;
    Entry last = 0;
    if (static_cast<int>(warp_sum(lane < CLUSTER ? memory.listed[lane] : 0)) > wanted) {
        part = {threshold, highest};
        rest = wanted;
        bool by_column = false;  // among entries with the key `threshold`
        const auto position = [&](Entry entry) {
            return !by_column ? upper(entry) : upper(entry) == threshold ? static_cast<unsigned>(entry) : 0u;
        };
#pragma unroll 1
        for (;;) {
            const KeyCounter count(part, memory.bins);
            lists.for_each([&](Entry entry, int) { count(position(entry)); });
            __syncthreads();
            const Bin bin = choose_part<BLOCK>(count, rest, take_bins(memory.bins));
            rest -= bin.above;
            part = bin.keys;
            if (bin.inside <= FEW) break;
            if (by_column) continue;
            Extent keys = {~0u, NO_KEY};
            lists.for_each([&](Entry entry, int) {
                const unsigned key = upper(entry);
                if (key >= part.low && key <= part.high) keys = {min(keys.low, key), max(keys.high, key)};
            });
            part = block_extent<BLOCK>(keys);
            if (part.low == part.high) {
                by_column = true;
                threshold = part.low;
                part = {~static_cast<unsigned>(range.length - 1), ~0u};
            }
        }
        lists.for_each([&](Entry entry, int) {
            const unsigned at = position(entry);
            if (at >= part.low && at <= part.high) memory.few[atomicAdd(&memory.num_few, 1)] = entry;
        });
        __syncthreads();
        last = last_of_few(memory, memory.num_few, rest);
    }

    if (ORDER == ANY) {
        int better = 0;
        lists.for_each([&](Entry entry, int from) { better += from < rank && entry >= last; });
        better = static_cast<int>(warp_sum(better));
        if (lane == 0) atomicAdd(&memory.before, better);
        __syncthreads();
        int before = memory.before;
#pragma unroll 1
        for (int from = 0, sums = 0; from < listed; from += BLOCK, sums ^= 1) {
            const int i = from + static_cast<int>(threadIdx.x);
            const bool wins = i < listed && list[i] >= last;
            int all;
            const int place = before + block_prefix_once<BLOCK>(wins, all, memory.sums[sums]);
            before += all;
            if (wins) write(place, list[i]);
        }
    } else {
        lists.for_each([&](Entry entry, int) {
            if (entry >= last) winners[atomicAdd(&memory.num_winners, 1)] = entry;
        });
        __syncthreads();
        const bool by_value = ORDER == BY_VALUE;
        const Entry low_word = 0xffffffffu;
        const Entry lowest = by_value ? max(rank_key(lowest_key, ~0u), last) : rank_key(0, range.length - 1);
        const Sort sort(reinterpret_cast<unsigned char*>(winners + SORTED + CROWD), wanted, wanted, 0,
                        by_value ? ~static_cast<Entry>(0) : low_word, lowest,
                        by_value ? rank_key(highest, 0) : low_word);
        sort.sort(Winners{winners, nullptr}, by_value, first_place, places_of_block, write);
    }
}
