//! The blocked product: panels of `b` shared by tasks over rows, or panels of `a` shared by tasks over columns.

use super::pack::Packer;
use super::scratch::{self, Role};
use super::tiles::{Panels, Tiles, add};
use super::{Output, Problem, aliases, each_chunk};
use std::ops::Range;

/// Most columns of `b` packed at once (with 320 steps, 2.5 MiB: it stays in a last-level cache that others use too).
const COLUMNS: usize = 2048;
/// Most words of staged sums: more rows mean fewer columns at once.
const STAGE: usize = 1 << 22;
/// Most rows of a task (with 320 steps, 240 KiB: half of a second-level cache of 512 KiB).
const TASK_ROWS: usize = 192;
/// Most columns of a task, where tasks are over columns.
const TASK_COLUMNS: usize = 256;
/// Tasks of a thread: one that was late takes fewer.
const TASKS: usize = 4;
/// Multiply-adds under which waking another thread costs more than it saves.
pub(super) const SERIAL_WORK: usize = 1 << 16;
/// Most words of a whole packed `a`.
const SHARED_A: usize = 1 << 24;

/// The product on the current thread pool.
pub(super) fn gemm(problem: &Problem, mut c: Output) {
    let parallel = problem.work() > SERIAL_WORK;
    let threads = if parallel { rayon::current_num_threads() } else { 1 };
    let plan = Plan::new(problem);
    let slivers = problem.m.div_ceil(problem.kernel.mr());
    let few_rows = slivers < 4 * threads && problem.n > problem.kernel.nr();
    if threads > 1 && few_rows && problem.m * plan.steps <= SHARED_A {
        over_columns(problem, &plan, &mut c, threads);
        return;
    }
    let direct = !aliases(problem.n) || plan.steps == plan.block;
    let most = usize::clamp(STAGE / problem.m, TASK_COLUMNS, COLUMNS);
    let staged = !direct || !matches!(c, Output::F32(_));
    for columns in parts(problem.n, if staged { most } else { COLUMNS }, problem.kernel.nr()) {
        match &mut c {
            Output::F32(c) if direct => over_rows(problem, &plan, c, problem.n, columns.start, columns, threads),
            _ => over_rows_staged(problem, &plan, &mut c, columns, threads),
        }
    }
}

/// Some columns of the product by way of contiguous sums: for outputs of 16 bits, and of rows that share cache sets.
fn over_rows_staged(problem: &Problem, plan: &Plan, c: &mut Output, columns: Range<usize>, threads: usize) {
    let (kernel, m, n) = (problem.kernel, problem.m, problem.n);
    let ld = columns.len() + if aliases(columns.len()) { 16 } else { 0 };
    scratch::with(Role::Stage, m * ld, |stage| {
        if problem.accumulate {
            let c = &*c;
            each_chunk(stage, ld, threads > 1, |i, row| {
                c.load(i * n + columns.start, &mut row[..columns.len()], kernel);
            });
        }
        over_rows(problem, plan, stage, ld, 0, columns.clone(), threads);
        c.for_each_row(n, threads > 1, |i, mut row| {
            row.store(columns.start, &stage[i * ld..][..columns.len()], kernel);
        });
    });
}

/// How the reduction is cut: words in all, and words of a block. Depends on the `K`s alone.
struct Plan {
    steps: usize,
    block: usize,
}

impl Plan {
    fn new(problem: &Problem) -> Self {
        let pair = problem.kernel.pair();
        let steps = problem.segments.iter().map(|s| s.k.div_ceil(pair)).sum();
        let blocks = usize::max(1, usize::div_ceil(steps, problem.kernel.max_steps()));
        let block = usize::max(1, steps.div_ceil(blocks)).next_multiple_of(8);
        Self { steps, block }
    }

    /// The blocks in order: at least one, which is empty where there is nothing to sum.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        let count = usize::max(1, self.steps.div_ceil(self.block));
        (0..count).map(|i| i * self.block..usize::min((i + 1) * self.block, self.steps))
    }
}

/// Cuts `0..len` into equal parts of at most `most`, each but the last a multiple of `unit`.
fn parts(len: usize, most: usize, unit: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    let part = len.div_ceil(len.div_ceil(most)).next_multiple_of(unit);
    (0..len).step_by(part).map(move |start| start..usize::min(start + part, len))
}

/// Some columns of the product into `c`, where they start at `column`: tasks over rows share the packed `b`.
fn over_rows(problem: &Problem, plan: &Plan, c: &mut [f32], ldc: usize, column: usize, columns: Range<usize>, threads: usize) {
    let right = Packer::right(problem);
    let task_rows = task_size(problem.m, TASK_ROWS, problem.kernel.mr(), threads);
    let task_columns = task_size(columns.len(), TASK_COLUMNS, problem.kernel.nr(), threads);
    let parallel = threads > 1;
    scratch::with(Role::B, right.len(columns.len(), plan.block), |b| {
        for block in plan.blocks() {
            let (first, last) = (block.start == 0, block.end == plan.steps);
            let b = &mut b[..right.len(columns.len(), block.len())];
            if !block.is_empty() {
                each_chunk(b, task_columns * block.len(), parallel, |i, panels| {
                    right.pack(columns.start + i * task_columns, block.clone(), panels);
                });
            }
            let b = &*b;
            each_chunk(c, task_rows * ldc, parallel, |i, c| {
                let rows = i * task_rows..usize::min((i + 1) * task_rows, problem.m);
                let add_to = problem.accumulate || !first;
                row_task(problem, rows.clone(), block.clone(), (b, columns.len()), &mut c[column..], ldc, add_to);
                if let (true, Some(bias)) = (last, problem.bias) {
                    for row in c[column..].chunks_mut(ldc).take(rows.len()) {
                        add(&mut row[..columns.len()], &bias[columns.clone()]);
                    }
                }
            });
        }
    });
}

/// One task of [`over_rows`]: packs its rows of `a`. `b` are panels of so many columns.
fn row_task(
    problem: &Problem,
    rows: Range<usize>,
    block: Range<usize>,
    (b, columns): (&[f32], usize),
    c: &mut [f32],
    ldc: usize,
    add: bool,
) {
    let left = Packer::left(problem);
    scratch::with(Role::A, left.len(rows.len(), block.len()), |a| {
        if !block.is_empty() {
            left.pack(rows.start, block.clone(), a);
        }
        let panels = [Panels { steps: block.len(), a, b }];
        Tiles { kernel: problem.kernel, panels: &panels, rows: rows.len(), columns, ldc, add }.run(c);
    });
}

/// The whole product of a few rows: tasks over columns share the packed `a` and sum into pieces of their own.
fn over_columns(problem: &Problem, plan: &Plan, c: &mut Output, threads: usize) {
    let (kernel, m, n) = (problem.kernel, problem.m, problem.n);
    let (left, right) = (Packer::left(problem), Packer::right(problem));
    let ld = task_size(n, TASK_COLUMNS, kernel.nr(), threads);
    let rows = m.next_multiple_of(kernel.mr());
    let sum = |a: &[f32], i: usize, piece: &mut [f32], c: &Output| {
        let columns = i * ld..usize::min((i + 1) * ld, n);
        if problem.accumulate {
            for (r, row) in piece.chunks_mut(ld).enumerate() {
                c.load(r * n + columns.start, &mut row[..columns.len()], kernel);
            }
        }
        scratch::with(Role::B, right.len(columns.len(), plan.block), |b| {
            for block in plan.blocks() {
                let b = &mut b[..right.len(columns.len(), block.len())];
                if !block.is_empty() {
                    right.pack(columns.start, block.clone(), b);
                }
                let panels = [Panels { steps: block.len(), a: &a[rows * block.start..], b }];
                let add = problem.accumulate || block.start > 0;
                Tiles { kernel, panels: &panels, rows: m, columns: columns.len(), ldc: ld, add }.run(piece);
            }
        });
        if let Some(bias) = problem.bias {
            for row in piece.chunks_mut(ld) {
                add(&mut row[..columns.len()], &bias[columns.clone()]);
            }
        }
    };
    scratch::with(Role::Stage, m * n.next_multiple_of(ld), |stage| {
        scratch::with(Role::A, rows * plan.steps, |a| {
            each_chunk(a, rows * plan.block, true, |i, panels| {
                let start = i * plan.block;
                left.pack(0, start..usize::min(start + plan.block, plan.steps), panels);
            });
            let (a, c) = (&*a, &*c);
            each_chunk(stage, m * ld, true, |i, piece| sum(a, i, piece, c));
        });
        let stage = &*stage;
        c.for_each_row(n, m * n > SERIAL_WORK, |r, mut row| {
            for (i, piece) in stage.chunks(m * ld).enumerate() {
                let columns = i * ld..usize::min((i + 1) * ld, n);
                let values = &piece[r * ld..][..columns.len()];
                row.store(columns.start, values, kernel);
            }
        });
    });
}

/// Rows or columns of a task: several tasks for each thread if there are enough, of equal size, whole tiles.
pub(super) fn task_size(len: usize, most: usize, unit: usize, threads: usize) -> usize {
    let size =
        if threads == 1 { usize::max(1, most / unit) } else { len.div_ceil(unit).div_ceil(task_count(len, most, threads)) };
    size * unit
}

/// Tasks of at most `most` rows or columns: several for each thread.
pub(super) fn task_count(len: usize, most: usize, threads: usize) -> usize {
    let tasks = len.div_ceil(most);
    if threads == 1 { tasks } else { tasks.next_multiple_of(threads).max(TASKS * threads) }
}
