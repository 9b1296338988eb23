// Adafactor (Shazeer and Stern 2018) over a flat buffer of matrices, as transformers does it with relative_step and
// scale_parameter off. For a matrix of R rows and C columns (a vector is one row), with g = (grad_scale · clip) · grad:
//
//   row_i = β row_i + (1 − β) mean_j (g_ij² + eps),  col_j = β col_j + (1 − β) mean_i (g_ij² + eps)
//   u_ij = g_ij / √(row_i / mean row) / √col_j,  p = p · keep − lr / max(1, rms(u) / threshold) · u
//
// `step` holds lr, keep, grad_scale, clip and β = 1 − t^decay_rate (common/step.cuh). Where a gradient is not finite and
// step[STEP_SKIP] is 1, nothing changes.
//
// A gradient is read three times: for the means, for rms(u), which needs all of them, and for the update. One launch does it all in the
// order of a list, so that a matrix is read again while it is in the L2 cache: block after block takes the next item, a tile of a matrix
// in one of the three phases. The last block of a matrix in a phase adds up what its tiles left and lets the next phase begin; an
// item waits for such of lower numbers alone, which running blocks have taken, so that nothing waits for a block that has no place yet.
//
// A tile is 16,384 elements: 2^log_width columns (4 to 1024), a thread four columns of 16 rows. `matrices`: 12 words each (Matrix). `items`: matrix and
// phase << 30, tile. `scratch`: two factors a matrix, mean row and lr / max(1, rms / threshold), then sums of tiles. `sync`: zeros, which
// are left as zeros: items taken, items done, and for each matrix tiles done and "begin" of two phases.
//
// Block 256, grid: the number of items. Sums have a fixed order: the bits do not change from run to run.
//
// Bytes: 12 a parameter of memory (gradient read once, value read and written), 8 more of the cache.

#include "common/optimizer.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

constexpr u32 THREADS = 256;
// Rows that a thread has values of, and those of them that it loads at once: of memory, and of the cache or of two buffers.
constexpr u32 STEPS = 16, BATCH = 8, HALF = 4;
// Columns times rows side by side of a tile, and sums of its rows by warp where a row is longer than one.
constexpr u32 COLUMN_SUMS = 4 * THREADS, ROW_SUMS = STEPS * THREADS / 32;

struct Matrix {
    // First element in p and grad; sizes; where its rows and columns begin in row and col.
    u32 start, rows, cols, row_at, col_at, decayed;
    // Its tiles, and where they leave sums of rows, of columns and of their own in scratch.
    u32 log_width, tile_cols, tiles, rows_at, cols_at, tiles_at;
};

// A tile, and the four columns and sixteen rows of it that are this thread's.
struct Tile {
    u32 lanes, x, y, stride, tile_row, tile_col, row, col, left;
    bool whole;

    __device__ __forceinline__ Tile(const Matrix &m, u32 tile) {
        lanes = 1u << (m.log_width - 2);
        x = threadIdx.x % lanes;
        y = threadIdx.x / lanes;
        stride = THREADS / lanes;
        tile_col = tile % m.tile_cols;
        tile_row = tile / m.tile_cols;
        row = tile_row * STEPS * stride + y;
        col = (tile_col << m.log_width) + 4 * x;
        left = col < m.cols ? (m.cols - col < 4 ? m.cols - col : 4) : 0;
        whole = m.start % 4 == 0 && m.cols % 4 == 0;
    }

    // The row of step k.
    __device__ __forceinline__ u32 row_of(u32 k) const { return row + k * stride; }

    // Where the four values of row i are: below 2^32, as all of the buffer.
    __device__ __forceinline__ u32 place(const Matrix &m, u32 i) const { return m.start + i * m.cols + col; }

    __device__ __forceinline__ void load(const Matrix &m, const float *from, u32 i, float (&v)[4]) const {
        const float *at = from + place(m, i);
        if (whole && left == 4 && i < m.rows) {
            load_f32<4>(at, v);
            return;
        }
#pragma unroll
        for (u32 c = 0; c < 4; ++c) v[c] = i < m.rows && c < left ? at[c] : 0.0f;
    }

    // Four values of a vector by columns.
    __device__ __forceinline__ void load_cols(const float *from, float (&v)[4]) const {
#pragma unroll
        for (u32 c = 0; c < 4; ++c) v[c] = c < left ? from[col + c] : 1.0f;
    }
};

// Values that are not needed again soon leave the cache to those that are.
__device__ __forceinline__ void load_once(const float *p, float (&v)[4]) {
    asm volatile("ld.global.cs.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "l"(p));
}

__device__ __forceinline__ void store_once(float *p, const float (&v)[4]) {
    asm volatile("st.global.cs.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}

__device__ __forceinline__ float mixed(float mean, float sum, u32 n, float beta) {
    return beta * mean + (1.0f - beta) * (sum / float(n));
}

// Counts this block in; whether it is the last of `all`, which then sees what the others wrote.
__device__ __forceinline__ bool last_of(u32 *count, u32 all, u32 *word) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        *word = atomicAdd(count, 1u) == all - 1;
        __threadfence();
    }
    __syncthreads();
    return *word != 0;
}

// The sum of `count` values, the same in each thread.
__device__ __forceinline__ float sum_of(const float *values, u32 count, float *slots) {
    float sum = 0;
    for (u32 i = threadIdx.x; i < count; i += THREADS) sum += values[i];
    return block_sum(sum, slots);
}

// Sums of a tile's squares by row and by column. Where the tile has all of a row or of a column, its mean is updated at once, else the sums are left
// for the matrix's last tile; so is the sum of the tile's updated rows.
__device__ __forceinline__ void add_squares(const Matrix &m, const Tile &t, u32 tile, const float *g, float *row, float *col,
                                            float *scratch, float factor, float beta, float eps, float *shared, float *slots) {
    const u32 wide = t.lanes < 32 ? t.lanes : 32, parts = t.lanes / wide;
    const bool whole_rows = m.tile_cols == 1, whole_cols = m.tiles == m.tile_cols;
    float *row_sums = shared + COLUMN_SUMS, cols[4] = {0, 0, 0, 0}, total = 0;
    const auto leave_row = [&](u32 i, float sum) {
        if (i >= m.rows) return;
        if (!whole_rows) {
            scratch[m.rows_at + t.tile_col * m.rows + i] = sum;
            return;
        }
        const float mean = mixed(row[m.row_at + i], sum, m.cols, beta);
        row[m.row_at + i] = mean;
        total += mean;
    };
#pragma unroll
    for (u32 first = 0; first < STEPS; first += BATCH) {
        float v[BATCH][4];
#pragma unroll
        for (u32 k = 0; k < BATCH; ++k) t.load(m, g, t.row_of(first + k), v[k]);
#pragma unroll
        for (u32 k = 0; k < BATCH; ++k) {
            const u32 i = t.row_of(first + k);
            float sum = 0;
#pragma unroll
            for (u32 c = 0; c < 4; ++c) {
                const float x = factor * v[k][c], square = i < m.rows && c < t.left ? x * x + eps : 0.0f;
                cols[c] += square;
                sum += square;
            }
            sum = lanes_sum(sum, wide);
            if (t.x % wide != 0) continue;
            if (parts == 1)
                leave_row(i, sum);
            else
                row_sums[((first + k) * t.stride + t.y) * parts + t.x / wide] = sum;
        }
    }
    const u32 width = 1u << m.log_width;
#pragma unroll
    for (u32 c = 0; c < 4; ++c) shared[t.y * width + 4 * t.x + c] = cols[c];
    __syncthreads();
    if (parts > 1 && threadIdx.x < STEPS * t.stride) {
        float sum = 0;
        for (u32 part = 0; part < parts; ++part) sum += row_sums[threadIdx.x * parts + part];
        leave_row(t.tile_row * STEPS * t.stride + threadIdx.x, sum);
    }
    for (u32 j = threadIdx.x; j < width; j += THREADS) {
        const u32 at = t.tile_col * width + j;
        if (at >= m.cols) break;
        float sum = 0;
        for (u32 y = 0; y < t.stride; ++y) sum += shared[y * width + j];
        if (whole_cols)
            col[m.col_at + at] = mixed(col[m.col_at + at], sum, m.rows, beta);
        else
            scratch[m.cols_at + t.tile_row * m.cols + at] = sum;
    }
    total = block_sum(total, slots);
    if (threadIdx.x == 0) scratch[m.tiles_at + tile] = total;
}

// What the tiles of a matrix left, added up; gives the mean of its rows.
__device__ __forceinline__ float add_tiles(const Matrix &m, float *row, float *col, const float *scratch, float beta, float *slots) {
    const u32 tile_rows = m.tiles / m.tile_cols;
    if (tile_rows > 1) {
        for (u32 j = threadIdx.x; j < m.cols; j += THREADS) {
            float sum = 0;
#pragma unroll 8
            for (u32 t = 0; t < tile_rows; ++t) sum += scratch[m.cols_at + t * m.cols + j];
            col[m.col_at + j] = mixed(col[m.col_at + j], sum, m.rows, beta);
        }
    }
    if (m.tile_cols == 1) return sum_of(scratch + m.tiles_at, m.tiles, slots) / float(m.rows);
    float total = 0;
    for (u32 i = threadIdx.x; i < m.rows; i += THREADS) {
        float sum = 0;
#pragma unroll 8
        for (u32 t = 0; t < m.tile_cols; ++t) sum += scratch[m.rows_at + t * m.rows + i];
        const float mean = mixed(row[m.row_at + i], sum, m.cols, beta);
        row[m.row_at + i] = mean;
        total += mean;
    }
    return block_sum(total, slots) / float(m.rows);
}

// The tile's share of Σ u².
__device__ __forceinline__ float add_updates(const Matrix &m, const Tile &t, const float *g, const float *row, const float *col,
                                             float mean, float factor, float *slots) {
    float cols[4], total = 0;
    t.load_cols(col + m.col_at, cols);
#pragma unroll
    for (u32 c = 0; c < 4; ++c) cols[c] = 1.0f / cols[c];
#pragma unroll
    for (u32 first = 0; first < STEPS; first += HALF) {
        float v[HALF][4], rows[HALF];
#pragma unroll
        for (u32 k = 0; k < HALF; ++k) {
            const u32 i = t.row_of(first + k);
            t.load(m, g, i, v[k]);
            rows[k] = i < m.rows ? row[m.row_at + i] : 1.0f;
        }
#pragma unroll
        for (u32 k = 0; k < HALF; ++k) {
            float part = 0;
#pragma unroll
            for (u32 c = 0; c < 4; ++c) {
                const float x = factor * v[k][c];
                part += x * x * cols[c];
            }
            total += mean / rows[k] * part;
        }
    }
    return block_sum(total, slots);
}

__device__ __forceinline__ void update(const Matrix &m, const Tile &t, float *p, const float *g, const float *row, const float *col,
                                       float mean, float scale, float keep) {
    float cols[4];
    t.load_cols(col + m.col_at, cols);
#pragma unroll
    for (u32 c = 0; c < 4; ++c) cols[c] = rsqrtf(cols[c]);
#pragma unroll
    for (u32 first = 0; first < STEPS; first += HALF) {
        float v[HALF][4], values[HALF][4], rows[HALF];
#pragma unroll
        for (u32 k = 0; k < HALF; ++k) {
            const u32 i = t.row_of(first + k);
            t.load(m, g, i, v[k]);
            rows[k] = i < m.rows ? row[m.row_at + i] : 1.0f;
            if (t.whole && t.left == 4 && i < m.rows)
                load_once(p + t.place(m, i), values[k]);
            else
                t.load(m, p, i, values[k]);
        }
#pragma unroll
        for (u32 k = 0; k < HALF; ++k) {
            const u32 i = t.row_of(first + k);
            if (i >= m.rows) break;
            const float size = scale * rsqrtf(rows[k] / mean);
            float *to = p + t.place(m, i);
#pragma unroll
            for (u32 c = 0; c < 4; ++c) values[k][c] = values[k][c] * keep - size * v[k][c] * cols[c];
            if (t.whole && t.left == 4) {
                store_once(to, values[k]);
                continue;
            }
#pragma unroll
            for (u32 c = 0; c < 4; ++c)
                if (c < t.left) to[c] = values[k][c];
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, 3)
    adafactor_step(float *p, float *row, float *col, float *scratch, u32 *sync, const float *g, const float *step,
                   const u32 *matrices, const u32 *items, u32 count, float eps, float threshold) {
    __shared__ float shared[COLUMN_SUMS + ROW_SUMS], slots[2][32];
    __shared__ u32 word;
    if (skipped(step)) return;
    if (threadIdx.x == 0) word = atomicAdd(sync, 1u);
    __syncthreads();
    const u32 item = items[2 * word], tile = items[2 * word + 1], n = item & 0x3fffffff, phase = item >> 30;
    const Matrix m = reinterpret_cast<const Matrix *>(matrices)[n];
    const Tile t(m, tile);
    u32 *state = sync + 2 + 4 * n;
    float *factors = scratch + 2 * n;
    const float factor = gradient_factor(step);
    if (phase > 0 && threadIdx.x == 0) {
        while (load_acquire(state + 2 * phase - 1) == 0) __nanosleep(40);
        __threadfence();
    }
    __syncthreads();
    if (phase == 0) {
        const float beta = step[STEP_BETA2];
        add_squares(m, t, tile, g, row, col, scratch, factor, beta, eps, shared, slots[0]);
        if (last_of(state, m.tiles, &word)) {
            const float mean = add_tiles(m, row, col, scratch, beta, slots[1]);
            if (threadIdx.x == 0) factors[0] = mean;
            __syncthreads();
            if (threadIdx.x == 0) {
                __threadfence();
                store_release(state + 1, 1);
            }
        }
    } else if (phase == 1) {
        const float sum = add_updates(m, t, g, row, col, factors[0], factor, slots[0]);
        if (threadIdx.x == 0) scratch[m.tiles_at + tile] = sum;
        if (last_of(state + 2, m.tiles, &word)) {
            const float all = sum_of(scratch + m.tiles_at, m.tiles, slots[1]);
            const float rms = sqrtf(all / (float(m.rows) * float(m.cols)));
            if (threadIdx.x == 0) {
                factors[1] = step[STEP_LR] / fmaxf(1.0f, rms / threshold);
                __threadfence();
                store_release(state + 3, 1);
            }
        }
    } else {
        update(m, t, p, g, row, col, factors[0], factors[1] * factor, m.decayed ? step[STEP_KEEP] : 1.0f);
    }
    // The last of all leaves zeros for the next step.
    if (last_of(sync + 1, gridDim.x, &word))
        for (u32 i = threadIdx.x; i < 2 + 4 * count; i += THREADS) sync[i] = 0;
}
