//! A few rows against row-major weights: `y = x W^T`, each row of `W` decoded once, a dot product for each row of `x`.
//!
//! Reading and decoding `W` is the limit, so tasks are over its rows.

use super::pack::{read_run, round};
use super::scratch::{self, Role};
use super::{Output, Precision, Problem, Segment, Source, each_chunk};

/// Most rows of `x`.
const MAX_ROWS: usize = 4;
/// Elements decoded at a time: they stay in the first-level cache.
const RUN: usize = 2048;
/// Multiply-adds under which waking another thread costs more than it saves.
const SERIAL_WORK: usize = 1 << 15;
/// Rows of `W` that a task takes at least.
const TASK_ROWS: usize = 16;

/// Whether the problem is one for this path. Depends on the shape alone.
pub(super) fn fits(problem: &Problem) -> bool {
    problem.m <= MAX_ROWS && problem.n >= problem.m && problem.segments.iter().all(|s| s.b.transposed)
}

/// The product; the scale is multiplied into `x`, the smaller operand.
pub(super) fn gemv(problem: &Problem, mut c: Output) {
    let (m, n, kernel) = (problem.m, problem.n, problem.kernel);
    let k: usize = problem.segments.iter().map(|s| s.k).sum();
    let parallel = problem.work() > SERIAL_WORK;
    scratch::with(Role::Stage, n * m, |y| {
        scratch::with(Role::A, m * k, |x| {
            read_left(problem, x);
            let x = &*x;
            let threads = if parallel { rayon::current_num_threads() } else { 1 };
            let rows = n.div_ceil(4 * threads).max(TASK_ROWS);
            each_chunk(y, rows * m, parallel, |i, y| {
                scratch::with(Role::Run, RUN, |run| {
                    for (r, y) in y.chunks_mut(m).enumerate() {
                        weight_row(problem, x, i * rows + r, y, run);
                    }
                });
            });
        });
        scratch::with(Role::B, n, |sums| {
            let y = &*y;
            for i in 0..m {
                if problem.accumulate {
                    c.load(i * n, sums, kernel);
                } else {
                    sums.fill(0.0);
                }
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum += y[j * m + i];
                    *sum += problem.bias.map_or(0.0, |bias| bias[j]);
                }
                c.store(i * n, sums, kernel);
            }
        });
    });
}

/// Reads, scales and rounds the left operands: for each segment `m` rows of its `k`, one after another.
fn read_left(problem: &Problem, mut x: &mut [f32]) {
    for segment in problem.segments {
        let (part, rest) = x.split_at_mut(problem.m * segment.k);
        for i in 0..problem.m {
            if segment.a.transposed {
                for l in 0..segment.k {
                    let at = i * segment.k + l;
                    read_run(&segment.a.source, l, i, &mut part[at..=at], problem.kernel);
                }
            } else {
                let row = &mut part[i * segment.k..][..segment.k];
                read_run(&segment.a.source, i, 0, row, problem.kernel);
            }
        }
        for x in part.iter_mut() {
            *x *= segment.scale;
        }
        round(part, problem.precision, problem.kernel);
        x = rest;
    }
}

/// `y[i] = sum over segments of x[i] . W[row]`.
fn weight_row(problem: &Problem, mut x: &[f32], row: usize, y: &mut [f32], run: &mut [f32]) {
    y.fill(0.0);
    for segment in problem.segments {
        let (part, rest) = x.split_at(problem.m * segment.k);
        for start in (0..segment.k).step_by(RUN) {
            let len = RUN.min(segment.k - start);
            let weights = weights(problem, segment, row, start, &mut run[..len]);
            for (y, x) in y.iter_mut().zip(part.chunks(segment.k)) {
                *y += problem.kernel.dot(&x[start..][..len], weights);
            }
        }
        x = rest;
    }
}

/// A run of a row of `W`, rounded: the stored elements themselves where nothing has to be done to them.
fn weights<'a>(problem: &Problem, segment: &Segment<'a>, row: usize, start: usize, run: &'a mut [f32]) -> &'a [f32] {
    match (segment.b.source, problem.precision) {
        (Source::F32 { data, ld }, Precision::F32) => &data[row * ld + start..][..run.len()],
        (source @ Source::Bf16 { .. }, Precision::Bf16) | (source @ Source::F16 { .. }, Precision::F16) => {
            read_run(&source, row, start, run, problem.kernel);
            run
        }
        (source, precision) => {
            read_run(&source, row, start, run, problem.kernel);
            round(run, precision, problem.kernel);
            run
        }
    }
}
