"""CUDA C++ of the top-k kernel: see `workers.kernels.topk` for what it computes.

A row belongs to a team of TEAM threads, TEAMS of which share a block; teams do not wait for each other.
An entry is a score and its index as one 64-bit number: the larger the better, and all entries of a row differ.
"""

SOURCE = r"""
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int BINS = 2048, CAPACITY = 2048, WARPS = TEAM / 32, BINS_EACH = BINS / TEAM, ENTRIES_EACH = CAPACITY / TEAM;
constexpr int LEVELS = 6, CROWD = 64;
// Digits of an entry, from the highest on: three of the score, three of the index.
__device__ constexpr int SHIFT[LEVELS] = {53, 42, 32, 21, 10, 0}, WIDTH[LEVELS] = {11, 11, 10, 11, 11, 10};

struct Team {
    u64 selected[CAPACITY], candidates[CAPACITY];
    u32 bins[BINS];                      // zero between uses
    u32 warp_sums[WARPS], low[WARPS], high[WARPS];
    u32 counts;                          // candidates << 16 | selected
    u32 bin, need, in_bin;               // what `find_bin` found
    u32 is_crowded;
};

__device__ __forceinline__ void meet(int team) { asm volatile("bar.sync %0, %1;" :: "r"(team + 1), "n"(TEAM) : "memory"); }

// Larger scores have larger keys; both zeros have one.
__device__ __forceinline__ u32 key_of(float score) {
    const u32 bits = __float_as_uint(score + 0.f);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float score_of(u32 key) { return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }
__device__ __forceinline__ u64 entry_of(u32 key, int index) { return (u64)key << 32 | (u32)~index; }

// f(scores, index, count) for every element, up to four in a row at a time; whole warps call it together. Loads of 16 bytes, LOADS of them under way
// in every thread.
template <class F> __device__ __forceinline__ void for_each(const float* row, int length, int thread, F f) {
    const int head = min((int)(-(i64)((u64)row >> 2)) & 3, length), middle = (length - head) / 4, tail = head + 4 * middle;
    if (thread < 32) {  // up to three at either end, which no aligned load covers
        const int index = thread < head ? thread : tail + thread - head;
        const float score[4] = {index < length ? row[index] : 0.f, 0.f, 0.f, 0.f};
        f(score, index, index < length ? 1 : 0);
    }
    const float4* const quads = (const float4*)(row + head);
    for (int base = 0; base < middle; base += LOADS * TEAM) {
        float4 quad[LOADS];
#pragma unroll
        for (int s = 0; s < LOADS; ++s) if (base + s * TEAM + thread < middle) quad[s] = quads[base + s * TEAM + thread];
#pragma unroll
        for (int s = 0; s < LOADS; ++s) {
            const int i = base + s * TEAM + thread;
            const float score[4] = {quad[s].x, quad[s].y, quad[s].z, quad[s].w};
            f(score, head + 4 * i, i < middle ? 4 : 0);
        }
    }
}

// Where each thread's items go, in a list of which `counts` holds the length: one addition a warp. `mine` may count for two lists at once.
__device__ __forceinline__ u32 reserve(u32* counts, u32 mine, int lane) {
    u32 up_to = mine;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) { const u32 x = __shfl_up_sync(~0u, up_to, d); if (lane >= d) up_to += x; }
    u32 start = 0;
    if (lane == 31 && up_to) start = atomicAdd(counts, up_to);
    return __shfl_sync(~0u, start, 31) + up_to - mine;
}

// Sum over the threads before this one; `total` over all.
__device__ __forceinline__ u32 sum_before(Team& t, int team, int thread, u32 mine, u32& total) {
    const int lane = thread % 32;
    u32 up_to = mine;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) { const u32 x = __shfl_up_sync(~0u, up_to, d); if (lane >= d) up_to += x; }
    if (lane == 31) t.warp_sums[thread / 32] = up_to;
    meet(team);
    u32 before = up_to - mine;
    total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) { if (w == thread / 32) before += total; total += t.warp_sums[w]; }
    return before;
}

// The bin, from the highest on, that the `need`-th best falls into; how many of it are needed, and how many there are. Clears the bins.
__device__ __forceinline__ void find_bin(Team& t, int team, int thread, u32 need) {
    meet(team);
    u32 mine[BINS_EACH], sum = 0, total;
    const int top = BINS - 1 - thread * BINS_EACH;
#pragma unroll
    for (int i = 0; i < BINS_EACH; ++i) { mine[i] = t.bins[top - i]; t.bins[top - i] = 0; sum += mine[i]; }
    u32 before = sum_before(t, team, thread, sum, total);
    if (before < need && need <= before + sum) {
        bool is_open = true;
#pragma unroll
        for (int i = 0; i < BINS_EACH; ++i) {
            if (is_open && need <= before + mine[i]) {
                t.bin = top - i;
                t.need = need - before;
                t.in_bin = mine[i];
                is_open = false;
            }
            before += mine[i];
        }
    }
    meet(team);
}

// The best `topk` of a longer row, in no order, into t.selected.
__device__ __forceinline__ void select(Team& t, int team, int thread, const float* row, int length, u32 topk) {
    const int lane = thread % 32;
    if (thread == 0) t.counts = 0;
    for_each(row, length, thread, [&](const float (&score)[4], int, int count) {
#pragma unroll
        for (int i = 0; i < 4; ++i) if (i < count) atomicAdd(&t.bins[key_of(score[i]) >> 21], 1u);
    });
    find_bin(t, team, thread, topk);
    int level = 0;
    u64 prefix = t.bin;
    u32 need = t.need, in_bin = t.in_bin;
    // Ties, or nearly: the bin does not fit into shared memory, so the row is read once more for the next digit.
    while (in_bin > need && in_bin > CAPACITY) {
        const int above = SHIFT[level], shift = SHIFT[++level], mask = (1 << WIDTH[level]) - 1;
        for_each(row, length, thread, [&](const float (&score)[4], int index, int count) {
            for (int i = 0; i < 4; ++i) {
                const u64 entry = entry_of(key_of(score[i]), index + i);
                if (i < count && entry >> above == prefix) atomicAdd(&t.bins[(u32)(entry >> shift) & mask], 1u);
            }
        });
        find_bin(t, team, thread, need);
        prefix = prefix << WIDTH[level] | t.bin;
        need = t.need;
        in_bin = t.in_bin;
    }
    const bool takes_all = in_bin == need;
    // Entries from `least` on are selected, entries below it but from `maybe` on are candidates.
    const u64 maybe = prefix << SHIFT[level], least = takes_all ? maybe : prefix + 1 << SHIFT[level];
    const bool never = !takes_all && least == 0;  // the topmost bin is the one
    for_each(row, length, thread, [&](const float (&score)[4], int index, int count) {
        u32 marks = 0, mine = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i < count) {
                const u64 entry = entry_of(key_of(score[i]), index + i);
                const bool is_selected = entry >= least && !never, is_candidate = entry >= maybe && !is_selected;
                marks |= (is_selected ? 1u : is_candidate ? 16u : 0u) << i;
                mine += is_selected ? 1u : is_candidate ? 1u << 16 : 0u;
            }
        }
        if (!__any_sync(~0u, mine)) return;
        u32 place = reserve(&t.counts, mine, lane);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u64 entry = entry_of(key_of(score[i]), index + i);
            if (marks >> i & 1) { t.selected[place & 0xffff] = entry; place += 1; }
            if (marks >> i & 16) { t.candidates[place >> 16] = entry; place += 1 << 16; }
        }
    });
    meet(team);
    if (takes_all) return;
    const int num_candidates = t.counts >> 16;
    while (in_bin > need) {
        const int above = SHIFT[level], shift = SHIFT[++level], mask = (1 << WIDTH[level]) - 1;
        for (int i = thread; i < num_candidates; i += TEAM) {
            const u64 entry = t.candidates[i];
            if (entry >> above == prefix) atomicAdd(&t.bins[(u32)(entry >> shift) & mask], 1u);
        }
        find_bin(t, team, thread, need);
        prefix = prefix << WIDTH[level] | t.bin;
        need = t.need;
        in_bin = t.in_bin;
    }
    const u64 cut = prefix << SHIFT[level];
    for (int base = 0; base < num_candidates; base += TEAM) {
        const int i = base + thread;
        const u64 entry = i < num_candidates ? t.candidates[i] : 0;
        const bool is_selected = i < num_candidates && entry >= cut;
        const u32 place = reserve(&t.counts, is_selected, lane);
        if (is_selected) t.selected[place & 0xffff] = entry;
    }
    meet(team);
}

// Sorts a few entries, best first, whatever they are: log^2 passes. For rows in which many scores are equal or nearly so.
__device__ __forceinline__ void sort_slowly(u64* entries, int count, int team, int thread) {
    int size = 1;
    while (size < count) size *= 2;
    for (int i = count + thread; i < size; i += TEAM) entries[i] = 0;
    meet(team);
    for (int run = 2; run <= size; run *= 2)
        for (int step = run / 2; step > 0; step /= 2) {
            for (int pair = thread; pair < size / 2; pair += TEAM) {
                const int i = 2 * pair - (pair & (step - 1)), j = i + step;
                const u64 a = entries[i], b = entries[j];
                if ((a < b) == !(i & run)) { entries[i] = b; entries[j] = a; }
            }
            meet(team);
        }
}

// Puts the selected entries in order, best first: into as many bins, equal in score, as there are entries, then by counting within a bin.
// Returns where the result is.
__device__ __forceinline__ u64* order(Team& t, int team, int thread, int count) {
    u32 low = ~0u, high = 0;
    for (int i = thread; i < count; i += TEAM) {
        const u32 key = (u32)(t.selected[i] >> 32);
        low = min(low, key);
        high = max(high, key);
    }
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    if (thread % 32 == 0) { t.low[thread / 32] = low; t.high[thread / 32] = high; }
    if (thread == 0) t.is_crowded = 0;
    meet(team);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) { low = min(low, t.low[w]); high = max(high, t.high[w]); }
    const float best = score_of(high), range = best - score_of(low);
    float scale = (BINS - 1) / range;
    if (!(range < 3e38f) || !(scale < 3e38f)) scale = 0.f;
    u32 bin_and_place[ENTRIES_EACH];
#pragma unroll
    for (int e = 0; e < ENTRIES_EACH; ++e) {
        const int i = thread + e * TEAM;
        if (i < count) {
            const u32 bin = min((u32)((best - score_of((u32)(t.selected[i] >> 32))) * scale), BINS - 1u);
            bin_and_place[e] = bin << 16 | atomicAdd(&t.bins[bin], 1u);
        }
    }
    meet(team);
    u32 mine[BINS_EACH], sum = 0, total, most = 0;
#pragma unroll
    for (int i = 0; i < BINS_EACH; ++i) { mine[i] = t.bins[thread * BINS_EACH + i]; sum += mine[i]; most = max(most, mine[i]); }
    if (most > CROWD) t.is_crowded = 1;
    u32 start = sum_before(t, team, thread, sum, total);
#pragma unroll
    for (int i = 0; i < BINS_EACH; ++i) { t.bins[thread * BINS_EACH + i] = start << 16 | start + mine[i]; start += mine[i]; }
    meet(team);
    if (t.is_crowded) {
        for (int i = thread; i < BINS; i += TEAM) t.bins[i] = 0;
        sort_slowly(t.selected, count, team, thread);
        return t.selected;
    }
#pragma unroll
    for (int e = 0; e < ENTRIES_EACH; ++e) {
        const int i = thread + e * TEAM;
        if (i < count) t.candidates[(t.bins[bin_and_place[e] >> 16] >> 16) + (bin_and_place[e] & 0xffff)] = t.selected[i];
    }
    meet(team);
#pragma unroll
    for (int e = 0; e < ENTRIES_EACH; ++e) {
        const int i = thread + e * TEAM;
        if (i < count) {
            const u64 entry = t.selected[i];
            const u32 range = t.bins[bin_and_place[e] >> 16];
            u32 place = range >> 16;
            for (u32 j = range >> 16; j < (range & 0xffff); ++j) place += t.candidates[j] > entry;
            bin_and_place[e] = place;
        }
    }
    meet(team);
#pragma unroll
    for (int e = 0; e < ENTRIES_EACH; ++e) {
        const int i = thread + e * TEAM;
        if (i < count) t.candidates[bin_and_place[e]] = t.selected[i];
    }
    for (int i = thread; i < BINS; i += TEAM) t.bins[i] = 0;
    meet(team);
    return t.candidates;
}

extern "C" __global__ void __launch_bounds__(TEAM * TEAMS, 1) topk_positions(
    const float* __restrict__ logits, i64 stride, const int* __restrict__ ks, const int* __restrict__ ke, int* __restrict__ out,
    int num_rows, int num_keys, int topk, int is_ordered) {
    extern __shared__ unsigned char raw[];
    const int team = threadIdx.x / TEAM, thread = threadIdx.x % TEAM;
    Team& t = ((Team*)raw)[team];
    for (int i = thread; i < BINS; i += TEAM) t.bins[i] = 0;
    meet(team);
    for (int row = team * gridDim.x + blockIdx.x; row < num_rows; row += gridDim.x * TEAMS) {
        const int first = max(__ldg(ks + row), 0), length = max(min(__ldg(ke + row), num_keys) - first, 0);
        const float* const scores = logits + row * stride + first;
        if (length <= topk) {
            for (int i = thread; i < length; i += TEAM) t.selected[i] = entry_of(key_of(scores[i]), i);
            meet(team);
        } else {
            select(t, team, thread, scores, length, topk);
        }
        const int count = min(length, topk);
        const u64* result = is_ordered ? order(t, team, thread, count) : t.selected;
        int* const to = out + (i64)row * topk;
        for (int i = thread; i < topk; i += TEAM) to[i] = i < count ? (int)~(u32)result[i] : -1;
        meet(team);
    }
}
"""
