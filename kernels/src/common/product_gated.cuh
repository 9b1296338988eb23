// Products of product.cuh with the gated unit (glu.cu) in their ends, on values rounded as those that are written.
#pragma once

#include "common/activation.cuh"
#include "common/product.cuh"

// Ends of the product with the weights of gate and up, PAIRED: both and act(gate) up are written. A thread's eighths are gate and
// up of one column; boxes have 64 tokens x 32 columns.
template <typename T, u32 ACTIVATION>
struct Gated : Rounded<T> {
    static constexpr u32 PHASES = 1, BOX = 64 * 32 * 2;
    const TensorMap &gate, &up, &y;

    __device__ __forceinline__ Gated(const TensorMap &gate, const TensorMap &up, const TensorMap &y) : gate(gate), up(up), y(y) {}

    static __device__ __forceinline__ u32 unit(u32 gate, u32 up) {
        return pack2<T>(low_of<T>(up) * activate<ACTIVATION>(low_of<T>(gate)).value,
                        high_of<T>(up) * activate<ACTIVATION>(high_of<T>(gate)).value);
    }

    __device__ __forceinline__ void phase(const Buffers &buffers, u32, u32) {
        const u32 warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, box = buffers.out();
        if (leads_group()) bulk_wait_read();
        group_sync();
#pragma unroll
        for (u32 b = 0; b < 2; b++) {
            const u32 token = b * 32 + lane, place = token * 64 + (warp ^ token / 2 % 4) * 16;
            const u32 *x = this->pair + b * 8;
            store_matrices_transposed(box + place, x[0], x[2], x[4], x[6]);
            store_matrices_transposed(box + BOX + place, x[1], x[3], x[5], x[7]);
            store_matrices_transposed(box + 2 * BOX + place, unit(x[0], x[1]), unit(x[2], x[3]), unit(x[4], x[5]), unit(x[6], x[7]));
        }
        fence_async();
        group_sync();
        if (leads_group()) {
            const u32 column = this->n / 2 + threadIdx.x / 128 * 32;
            tma_store(gate, box, column, 0, this->m);
            tma_store(up, box + BOX, column, 0, this->m);
            tma_store(y, box + 2 * BOX, column, 0, this->m);
            bulk_commit();
        }
    }
};

// Ends of the product that makes dy, the gradient of act(gate) up: gate and up come in boxes of 64 tokens x 64 columns, the
// gradients of both go, and act(gate) up again where `again`. The gradients may be written over gate and up.
template <typename T, u32 ACTIVATION>
struct GatedGradients : Rounded<T> {
    static constexpr u32 PHASES = 4;
    const TensorMap &dgate, &dup, &y, &gate, &up;
    u32 again, parity = 0;

    __device__ __forceinline__ GatedGradients(const TensorMap &dgate, const TensorMap &dup, const TensorMap &y, const TensorMap &gate,
                                              const TensorMap &up, u32 again)
        : dgate(dgate), dup(dup), y(y), gate(gate), up(up), again(again) {}

    // A chunk's boxes are asked for, arrive meanwhile, are worked on, and have left for y to follow them.
    __device__ __forceinline__ void phase(const Buffers &buffers, u32 which, u32) {
        if (which == 0 && leads_group()) ask(buffers);
        if (which == 2) work(buffers);
        if (which == 3 && again) leave_again(buffers.out());
    }

    __device__ __forceinline__ u32 column() const { return this->n + threadIdx.x / 128 * 64; }

    __device__ __forceinline__ void ask(const Buffers &buffers) const {
        bulk_wait_read();
        mbarrier_expect(buffers.extra(), 2 * OUT_BYTES);
        tma_load(buffers.out(), gate, buffers.extra(), column(), 0, this->m);
        tma_load(buffers.out() + OUT_BYTES, up, buffers.extra(), column(), 0, this->m);
    }

    // Two values: dy becomes act(gate) up, gate and up their gradients.
    static __device__ __forceinline__ void differentiate(u32 &dy, u32 &gate, u32 &up) {
        const Act low = activate<ACTIVATION>(low_of<T>(gate)), high = activate<ACTIVATION>(high_of<T>(gate));
        const float d0 = low_of<T>(dy), d1 = high_of<T>(dy), u0 = low_of<T>(up), u1 = high_of<T>(up);
        dy = pack2<T>(u0 * low.value, u1 * high.value);
        gate = pack2<T>(d0 * u0 * low.slope, d1 * u1 * high.slope);
        up = pack2<T>(d0 * low.value, d1 * high.value);
    }

    __device__ __forceinline__ void work(const Buffers &buffers) {
        mbarrier_wait(buffers.extra(), parity);
        parity ^= 1;
#pragma unroll
        for (u32 g = 0; g < 4; g++) {
            const u32 place = buffers.out() + place_in_box(g);
            u32 gates[4], ups[4], *dy = this->pair + g * 4;
            load_matrices_transposed(gates, place);
            load_matrices_transposed(ups, place + OUT_BYTES);
#pragma unroll
            for (u32 i = 0; i < 4; i++) differentiate(dy[i], gates[i], ups[i]);
            store_matrices_transposed(place, gates[0], gates[1], gates[2], gates[3]);
            store_matrices_transposed(place + OUT_BYTES, ups[0], ups[1], ups[2], ups[3]);
        }
        fence_async();
        group_sync();
        if (leads_group()) {
            tma_store(dgate, buffers.out(), column(), 0, this->m);
            tma_store(dup, buffers.out() + OUT_BYTES, column(), 0, this->m);
            bulk_commit();
        }
    }

    __device__ __forceinline__ void leave_again(u32 box) const {
        if (leads_group()) bulk_wait_read();
        group_sync();
        this->put(box);
        group_sync();
        if (leads_group()) {
            tma_store(y, box, column(), 0, this->m);
            bulk_commit();
        }
    }
};
