"""CUDA C++ of the logits kernel: see `workers.kernels.logits` for what it computes and why it looks like this.

The matrix instruction is written by Python, since it is a list of 64 registers.
"""

from __future__ import annotations


def _matrix_instruction(columns: int) -> str:
    """`multiply(acc, a, b, is_sum)`: acc [64, columns] (+)= a [64, 32] @ b [columns, 32]^T in e4m3, both from shared memory."""
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(acc[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void multiply(float (&acc)[{count}], u64 a, u64 b, int is_sum) {{
    asm volatile(
        "{{ .reg .pred p; setp.ne.b32 p, %{count + 2}, 0; "
        "wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3 {{{registers}}}, %{count}, %{count + 1}, p, 1, 1; }}"
        : {outputs} : "l"(a), "l"(b), "r"(is_sum));
}}
__device__ __forceinline__ void keep_order(float (&acc)[{count}]) {{
    asm volatile("" : {outputs} :: "memory");
}}
"""


_HEAD = r"""
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
struct alignas(64) TensorMap { unsigned char opaque[128]; };

constexpr int DIM = 128, COLUMNS = 256, QUERIES = COLUMNS / HEADS;
constexpr int GROUPS = 2, KEYS = 64 * GROUPS;                       // of a tile: 64 for each warpgroup that multiplies
constexpr int THREADS = 128 * (GROUPS + 1);
constexpr int Q_BYTES = COLUMNS * DIM, K_BYTES = KEYS * DIM;

struct Item { int block, first_tile, num_tiles, unused; };          // block < 0: no more

struct Shared {
    unsigned char q[Q_STAGES][Q_BYTES];                             // both swizzled, so aligned to 1024
    unsigned char k[K_STAGES][K_BYTES];
    float gates[Q_STAGES][COLUMNS];
    Item item[Q_STAGES];
    u64 q_full[Q_STAGES], q_empty[Q_STAGES], k_full[K_STAGES], k_empty[K_STAGES];
    int warp_sums[THREADS / 32];
    int begin_block, begin_tile;
};

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void init(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(address(barrier)) : "memory");
}
__device__ __forceinline__ void arrive_expecting(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(u64* barrier, u32 phase) {
    u32 is_done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(is_done) : "r"(address(barrier)), "r"(phase) : "memory");
    } while (!is_done);
}
__device__ __forceinline__ void load_rows(void* to, const TensorMap* from, int row, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 :: "r"(address(to)), "l"((u64)from), "r"(address(barrier)), "r"(0), "r"(row) : "memory");
}
__device__ __forceinline__ void load_bytes(void* to, const void* from, int bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(address(to)), "l"((u64)from), "r"(bytes), "r"(address(barrier)) : "memory");
}
// Of a matrix operand: rows of 128 bytes with the 128-byte swizzle, 1024 bytes from one group of eight rows to the next.
__device__ __forceinline__ u64 operand(const void* p) {
    return (u64)((address(p) >> 4) & 0x3fff) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
__device__ __forceinline__ void open_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void finish() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory"); }
"""

_BODY = r"""
// Tiles of keys that the queries of a block see: their sequences' starts to the last visible key.
__device__ __forceinline__ void visible_tiles(const int* ks, const int* ke, int block, int num_rows, int num_keys, int& first, int& count) {
    int low = num_keys, high = 0;
#pragma unroll
    for (int i = 0; i < QUERIES; ++i) {
        const int row = block * QUERIES + i;
        if (row < num_rows) {
            const int start = max(__ldg(ks + row), 0), end = min(__ldg(ke + row), num_keys);
            if (start < end) { low = min(low, start); high = max(high, end); }
        }
    }
    first = low / KEYS;
    count = high > 0 ? (high + KEYS - 1) / KEYS - first : 0;
}

// acc [64 keys, COLS] = k @ q^T over the 128 dims.
template <int COUNT> __device__ __forceinline__ void multiply_tile(float (&acc)[COUNT], u64 k, u64 q) {
    open_registers();
#pragma unroll
    for (int i = 0; i < DIM / 32; ++i) multiply(acc, k + i * 2, q + i * 2, i > 0);
    commit();
}

// A thread holds two keys' rows of the accumulator, and of each the columns 8 j + 2 (lane % 4) + {0, 1}: heads of NQ queries, one after the
// other. The heads are summed in the thread, then over four threads, each of which keeps a quarter of the sums: key of bit 1 of the lane,
// queries of bit 0.
template <int NQ, int COUNT> __device__ __forceinline__ void sum_heads(
    const float (&acc)[COUNT], const float* gates, int lane, float (&out)[NQ / 2]) {
    constexpr int PER_QUERY = HEADS / 8;
    float sums[2 * NQ];
#pragma unroll
    for (int q = 0; q < NQ; ++q)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum = 0.f;
#pragma unroll
            for (int j = 0; j < PER_QUERY; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float dot = fmaxf(acc[(q * PER_QUERY + j) * 4 + r * 2 + e], 0.f);
                    const float gate = gates[(q * PER_QUERY + j) * 2 + e];
                    sum = j + e == 0 ? gate * dot : fmaf(gate, dot, sum);
                }
            sums[r * NQ + q] = sum;
        }
    const bool second_key = lane & 2, second_half = lane & 1;
#pragma unroll
    for (int q = 0; q < NQ; ++q) {
        const float mine = second_key ? sums[NQ + q] : sums[q], other = second_key ? sums[q] : sums[NQ + q];
        sums[q] = mine + __shfl_xor_sync(~0u, other, 2);
    }
#pragma unroll
    for (int q = 0; q < NQ / 2; ++q) {
        const float mine = second_half ? sums[NQ / 2 + q] : sums[q], other = second_half ? sums[q] : sums[NQ / 2 + q];
        out[q] = mine + __shfl_xor_sync(~0u, other, 1);
    }
}

template <int NQ> __device__ __forceinline__ void store(
    const float (&sums)[NQ / 2], float k_scale, float* out, i64 stride, int first_row, int num_rows, bool is_key, int lane) {
#pragma unroll
    for (int q = 0; q < NQ / 2; ++q) {
        const int row = first_row + (lane & 1) * (NQ / 2) + q;
        if (is_key && row < num_rows) out[row * stride] = sums[q] * k_scale;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) mqa_logits(
    const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const float* __restrict__ gates_in,
    const float* __restrict__ k_scales, const int* __restrict__ ks, const int* __restrict__ ke, float* __restrict__ out, i64 stride,
    int num_rows, int num_keys) {
    extern __shared__ unsigned char raw[];
    Shared& shared = *(Shared*)(((u64)raw + 1023) & ~(u64)1023);
    const int thread = threadIdx.x, lane = thread % 32, group = __shfl_sync(~0u, thread / 128, 0);
    const int num_blocks = (num_rows + QUERIES - 1) / QUERIES;

    if (thread == 0) {
        for (int i = 0; i < Q_STAGES; ++i) { init(&shared.q_full[i], 1); init(&shared.q_empty[i], 4 * GROUPS); }
        for (int i = 0; i < K_STAGES; ++i) { init(&shared.k_full[i], 1); init(&shared.k_empty[i], 4 * GROUPS); }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    // This block's share of all tiles: an equal run of them, found by a sum over the blocks of queries.
    const int per_thread = (num_blocks + THREADS - 1) / THREADS;
    const int my_first = min(thread * per_thread, num_blocks), my_last = min(my_first + per_thread, num_blocks);
    int mine = 0, first, count;
    for (int b = my_first; b < my_last; ++b) { visible_tiles(ks, ke, b, num_rows, num_keys, first, count); mine += count; }
    int before = mine;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) { const int x = __shfl_up_sync(~0u, before, d); if (lane >= d) before += x; }
    if (lane == 31) shared.warp_sums[thread / 32] = before;
    before -= mine;
    __syncthreads();
    int total = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) { if (w == thread / 32) before += total; total += shared.warp_sums[w]; }
    const int begin = (int)((i64)total * blockIdx.x / gridDim.x), end = (int)((i64)total * (blockIdx.x + 1) / gridDim.x);
    if (before <= begin && begin < before + mine) {
        int b = my_first;
        for (;; ++b) {
            visible_tiles(ks, ke, b, num_rows, num_keys, first, count);
            if (begin < before + count) break;
            before += count;
        }
        shared.begin_block = b;
        shared.begin_tile = begin - before;
    }
    __syncthreads();

    if (group == GROUPS) {  // the warpgroup that loads: one thread of it does
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (thread == 128 * GROUPS && begin < end) {
            int left = end - begin, block = shared.begin_block, skip = shared.begin_tile, q_stage = 0, k_stage = 0;
            u32 q_phase = 1, k_phase = 1;
            while (true) {
                Item item = {-1, 0, 0, 0};
                if (left > 0) {
                    visible_tiles(ks, ke, block, num_rows, num_keys, first, count);
                    item = {block, first + skip, min(count - skip, left), 0};
                    ++block;
                    skip = 0;
                    if (item.num_tiles == 0) continue;
                    left -= item.num_tiles;
                }
                wait(&shared.q_empty[q_stage], q_phase);
                shared.item[q_stage] = item;
                if (item.block < 0) { arrive(&shared.q_full[q_stage]); break; }
                const int row = item.block * QUERIES, gate_bytes = min(QUERIES, num_rows - row) * HEADS * 4;
                arrive_expecting(&shared.q_full[q_stage], Q_BYTES + gate_bytes);
                load_rows(shared.q[q_stage], &q_map, row * HEADS, &shared.q_full[q_stage]);
                load_bytes(shared.gates[q_stage], gates_in + (i64)row * HEADS, gate_bytes, &shared.q_full[q_stage]);
                if (++q_stage == Q_STAGES) { q_stage = 0; q_phase ^= 1; }
                for (int i = 0; i < item.num_tiles; ++i) {
                    wait(&shared.k_empty[k_stage], k_phase);
                    arrive_expecting(&shared.k_full[k_stage], K_BYTES);
                    load_rows(shared.k[k_stage], &k_map, (item.first_tile + i) * KEYS, &shared.k_full[k_stage]);
                    if (++k_stage == K_STAGES) { k_stage = 0; k_phase ^= 1; }
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        // The key of this thread's sums, within a tile, and the first of its columns.
        const int my_key = group * 64 + (thread % 128) / 32 * 16 + lane / 4 + (lane & 2 ? 8 : 0), my_column = (lane % 4) * 2;
        int q_stage = 0, k_stage = 0;
        u32 q_phase = 0, k_phase = 0;
        while (begin < end) {
            wait(&shared.q_full[q_stage], q_phase);
            Item item = shared.item[q_stage];
            item.block = __shfl_sync(~0u, item.block, 0);  // says that a warp goes one way
            item.num_tiles = __shfl_sync(~0u, item.num_tiles, 0);
            if (item.block < 0) break;
            float gates[COLUMNS / 4];
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; ++j) {
                const float2 pair = *(const float2*)&shared.gates[q_stage][j * 8 + my_column];
                gates[2 * j] = pair.x;
                gates[2 * j + 1] = pair.y;
            }
            const u64 q_operand = operand(shared.q[q_stage]);
            const int row = item.block * QUERIES;
            int key = item.first_tile * KEYS + my_key;
            float left[COLUMNS / 4], right[COLUMNS / 4], sums[QUERIES / 4];
            const u64 right_operand = q_operand + (COLUMNS / 2 * DIM >> 4);
            auto finish_half = [&](const float(&acc)[COLUMNS / 4], int half, int to) {
                const bool is_key = to < num_keys;
                const float k_scale = is_key ? __ldg(k_scales + to) : 0.f;
                sum_heads<QUERIES / 2>(acc, gates + half * (COLUMNS / 8), lane, sums);
                store<QUERIES / 2>(sums, k_scale, out + to, stride, row + half * (QUERIES / 2), num_rows, is_key, lane);
            };
            for (int i = 0; i < item.num_tiles; ++i, key += KEYS) {
                wait(&shared.k_full[k_stage], k_phase);
                const u64 k_operand = operand(shared.k[k_stage] + group * 64 * DIM);
                multiply_tile(left, k_operand, q_operand);
                multiply_tile(right, k_operand, right_operand);
                finish<1>();
                keep_order(left);
                finish_half(left, 0, key);
                finish<0>();
                keep_order(right);
                if (lane == 0) arrive(&shared.k_empty[k_stage]);
                if (++k_stage == K_STAGES) { k_stage = 0; k_phase ^= 1; }
                finish_half(right, 1, key);
            }
            if (lane == 0) arrive(&shared.q_empty[q_stage]);
            if (++q_stage == Q_STAGES) { q_stage = 0; q_phase ^= 1; }
        }
    }
}
"""


def source() -> str:
    """The whole text; its macros are HEADS, Q_STAGES and K_STAGES."""
    return _HEAD + _matrix_instruction(128) + _BODY
