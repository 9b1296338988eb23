//! The mean that double quantisation subtracts, summed in the order in which the reference sums it.
//!
//! The offset is stored, and every nested absmax depends on it, so byte-exact files need the same float sum. The reference
//! is PyTorch's CUDA `mean` of a contiguous float32 vector: the threads of one thread block each keep four partial sums over
//! strided elements, and a tree joins them. Beyond [`ONE_BLOCK`] elements PyTorch spreads the sum over as many
//! thread blocks as the GPU at hand has room for, so its last bits depend on the GPU; there the sum is taken in f64.

/// Lengths up to this are summed by one thread block of the reference.
const ONE_BLOCK: usize = 512 * 255;
/// The most threads of a block of the reference.
const MAX_THREADS: usize = 512;
/// From this length on the reference reads four neighbours at a time.
const VECTOR_FROM: usize = 128;
/// Partial sums of a thread.
const LANES: usize = 4;
/// Threads of a warp.
const WARP: usize = 32;

/// The mean of `x` (0 for none), bit-equal to the reference's up to [`ONE_BLOCK`] elements, within 1 unit in the last place of the exact mean beyond.
pub(crate) fn mean(x: &[f32]) -> f32 {
    if x.is_empty() {
        return 0.0;
    }
    if x.len() > ONE_BLOCK {
        return (x.iter().map(|&v| f64::from(v)).sum::<f64>() / x.len() as f64) as f32;
    }
    let vector = x.len() >= VECTOR_FROM;
    let items = if vector { x.len() / LANES } else { x.len() };
    let threads = MAX_THREADS.min(1 << items.ilog2());
    let mut sums: Vec<f32> = (0..threads).map(|t| thread_sum(x, t, threads, vector)).collect();
    tree(&mut sums) * (1.0 / x.len() as f32)
}

/// What thread `t` of `threads` sums.
fn thread_sum(x: &[f32], t: usize, threads: usize, vector: bool) -> f32 {
    let mut lanes = [0.0f32; LANES];
    if vector {
        let (groups, tail) = x.as_chunks::<LANES>();
        for group in groups.iter().skip(t).step_by(threads) {
            for (lane, v) in lanes.iter_mut().zip(group) {
                *lane += v;
            }
        }
        if let Some(v) = tail.get(t) {
            lanes[0] += v;
        }
    } else {
        for (i, v) in x.iter().skip(t).step_by(threads).enumerate() {
            lanes[i % LANES] += v;
        }
    }
    lanes[0] + lanes[1] + lanes[2] + lanes[3]
}

/// Halves the threads down to a warp, then joins neighbours at distance 1, 2, 4, 8, 16.
fn tree(sums: &mut [f32]) -> f32 {
    let mut len = sums.len();
    while len > WARP {
        len /= 2;
        for i in 0..len {
            sums[i] += sums[i + len];
        }
    }
    let mut distance = 1;
    while distance < len {
        for i in (0..len - distance).step_by(2 * distance) {
            sums[i] += sums[i + distance];
        }
        distance *= 2;
    }
    sums[0]
}
