//! Several products over the same rows in one pass, some of which read the results of others.
//!
//! A linear layer with an adapter is `h = x Aᵀ` and `y = [x | h] [W | s B]ᵀ`; layers that share an input share `x`. Here all
//! right operands are packed first, together; then each task takes some rows through all products: it packs each block of
//! each input once, and runs the tiles of every product that reads it. Threads meet twice a call, however many products.

use super::blocked::{SERIAL_WORK, task_count};
use super::kernels::Kernel;
use super::pack::{Packer, Piece};
use super::scratch::{self, Role};
use super::tiles::{Panels, Tiles, add};
use super::{Operand, Output, Precision, Segment, Source, aliases, gemm};
use rayon::prelude::*;
use std::ops::Range;

/// Most words of packed right operands (24 MiB); beyond, products are done one by one.
const MOST_WORDS: usize = 6 << 20;
/// Words that one task packs, about.
const PACK_WORDS: usize = 1 << 16;
/// Columns that tasks of packing begin at: 4-bit blocks of a row are decoded whole.
const PACK_COLUMNS: usize = 64;
/// Most rows of a task (with 400 steps, 300 KiB: of a second-level cache of 512 KiB).
const ROWS: usize = 192;
/// Rows under which sharing the packed operands does not pay.
const FEW_ROWS: usize = 48;

/// A left operand, which several products may read.
#[derive(Clone, Copy)]
pub(crate) enum Input<'a> {
    /// A row-major matrix of `k` columns.
    Stored { source: Source<'a>, k: usize },
    /// The result of an earlier product, one that reads stored inputs alone. Such products come first.
    Result(usize),
}

/// `scale * input b`, with `b` of as many rows as the input has columns. The scale is taken into `b`.
pub(crate) struct Term<'a> {
    pub(crate) input: usize,
    pub(crate) b: Operand<'a>,
    pub(crate) scale: f32,
}

/// `c = Σ terms + bias`, `c` of `n` columns. Terms are in order of their inputs.
pub(crate) struct Product<'a> {
    pub(crate) c: Output<'a>,
    pub(crate) n: usize,
    pub(crate) terms: Vec<Term<'a>>,
    pub(crate) bias: Option<&'a [f32]>,
}

/// All products, each of `m` rows. Inputs that are results come behind the stored ones.
pub(crate) fn gemm_rows(m: usize, inputs: &[Input], products: Vec<Product>, precision: Precision) {
    let first = products.len();
    gemm_rows_with(Kernel::best(precision), m, inputs, products, first, precision);
}

/// The `first` of them alone, which read stored inputs alone: each sum in the order that it has among all.
pub(crate) fn gemm_rows_first(m: usize, inputs: &[Input], products: Vec<Product>, first: usize, precision: Precision) {
    gemm_rows_with(Kernel::best(precision), m, inputs, products, first, precision);
}

/// [`gemm_rows`] on a given instruction set, where the products are done together.
fn gemm_rows_with(kernel: Kernel, m: usize, inputs: &[Input], mut products: Vec<Product>, first: usize, precision: Precision) {
    let widths: Vec<usize> = products.iter().map(|product| product.n).collect();
    let early = inputs.iter().map(|input| if let Input::Result(j) = input { j + 1 } else { 0 }).max().unwrap_or(0);
    let mut plan = Plan::new(kernel, inputs, &products, &widths);
    let whole = products.iter().zip(&plan.uses).all(|(product, uses)| product.n > 0 && !uses.is_empty());
    let together = m >= FEW_ROWS && plan.words <= MOST_WORDS && whole;
    let all = products.len();
    products.truncate(first);
    if !together {
        one_by_one(m, inputs, &mut products, early.min(first), &widths, precision);
        return;
    }
    let stored = inputs.iter().take_while(|input| matches!(input, Input::Stored { .. })).count();
    let (inputs, early) = if first < all { (&inputs[..stored], 0) } else { (inputs, early) };
    if first < all {
        plan = Plan::new(kernel, inputs, &products, &widths);
    }
    let threads = if m * plan.words > SERIAL_WORK { rayon::current_num_threads() } else { 1 };
    scratch::with(Role::B, plan.words, |b| {
        pack_right(&plan, &products, precision, b);
        let bounds = row_bounds(m, plan.kernel.mr(), threads);
        let shared = Shared { plan: &plan, inputs, early, precision, m, b };
        let (tasks, facts) = row_tasks(products, &bounds);
        let run = |(i, mut task): (usize, Vec<Output>)| shared.run(bounds[i]..bounds[i + 1], &facts, &mut task);
        if threads > 1 {
            tasks.into_par_iter().with_max_len(1).enumerate().for_each(run);
        } else {
            tasks.into_iter().enumerate().for_each(run);
        }
    });
}

/// Each product on its own, those that others read first.
fn one_by_one(m: usize, inputs: &[Input], products: &mut [Product], early: usize, widths: &[usize], precision: Precision) {
    let (first, rest) = products.split_at_mut(early);
    for product in first.iter_mut() {
        run_alone(m, inputs, product, &[], widths, precision);
    }
    let first: Vec<Source> = first.iter().zip(widths).map(|(product, &n)| product.c.source(n)).collect();
    for product in rest {
        run_alone(m, inputs, product, &first, widths, precision);
    }
}

fn run_alone(m: usize, inputs: &[Input], product: &mut Product, results: &[Source], widths: &[usize], precision: Precision) {
    let operand = |term: &Term| match inputs[term.input] {
        Input::Stored { source, k } => (Operand::new(source), k),
        Input::Result(j) => (Operand::new(results[j]), widths[j]),
    };
    let segments: Vec<_> = product
        .terms
        .iter()
        .map(|term| {
            let (a, k) = operand(term);
            Segment { a, b: term.b, k, scale: term.scale }
        })
        .collect();
    gemm(product.c.reborrow(), false, m, product.n, &segments, product.bias, precision);
}

/// A stretch of an input in a block: elements `k`, `steps` words from the block's word `first` on.
struct Stretch {
    input: usize,
    k: Range<usize>,
    first: usize,
    steps: usize,
}

/// Where a product's right operand for one stretch lies.
struct Use {
    block: usize,
    stretch: usize,
    term: usize,
    /// First word of its panels in the packed buffer, and their number of words.
    at: usize,
    words: usize,
}

/// How the inputs are cut, and where the right operands are packed. A function of the shapes alone.
struct Plan {
    kernel: Kernel,
    blocks: Vec<Vec<Stretch>>,
    /// For each product, in order of the reduction.
    uses: Vec<Vec<Use>>,
    /// Words of all packed right operands.
    words: usize,
}

impl Plan {
    fn new(kernel: Kernel, inputs: &[Input], products: &[Product], widths: &[usize]) -> Self {
        let mut plan = Self { kernel, blocks: Vec::new(), uses: Vec::new(), words: 0 };
        for (i, input) in inputs.iter().enumerate() {
            match *input {
                Input::Stored { k, .. } => plan.cut(i, k),
                Input::Result(j) => plan.cut(i, widths[j]),
            }
        }
        plan.uses = products.iter().map(|product| plan.place(product)).collect();
        plan
    }

    /// Cuts an input into equal stretches, of whole 4-bit blocks where it can be. A short one joins the last block, though that becomes a quarter longer: of such
    /// blocks each product reads a part.
    fn cut(&mut self, input: usize, k: usize) {
        let (pair, most) = (self.kernel.pair(), self.kernel.max_steps());
        let words = k.div_ceil(pair);
        let part = words.div_ceil(words.div_ceil(most).max(1)).next_multiple_of(64);
        for start in (0..words).step_by(part.max(1)) {
            let steps = usize::min(part, words - start);
            let held = self.blocks.last().map_or(2 * most, |block| Self::steps(block));
            let joins = held + steps <= most + most / 4;
            if !joins {
                self.blocks.push(Vec::new());
            }
            let k = start * pair..usize::min((start + steps) * pair, k);
            if let Some(block) = self.blocks.last_mut() {
                block.push(Stretch { input, k, first: if joins { held } else { 0 }, steps });
            }
        }
    }

    /// Gives a product's right operands their places.
    fn place(&mut self, product: &Product) -> Vec<Use> {
        let columns = product.n.next_multiple_of(self.kernel.nr());
        let mut uses = Vec::new();
        for (block, stretches) in self.blocks.iter().enumerate() {
            for (i, stretch) in stretches.iter().enumerate() {
                for (term, _) in product.terms.iter().enumerate().filter(|(_, term)| term.input == stretch.input) {
                    let words = columns * stretch.steps;
                    uses.push(Use { block, stretch: i, term, at: self.words, words });
                    self.words += words;
                }
            }
        }
        uses
    }

    /// Words of a block.
    fn steps(block: &[Stretch]) -> usize {
        block.iter().map(|stretch| stretch.steps).sum()
    }
}

/// Packs all right operands, in the order in which the plan placed them.
fn pack_right(plan: &Plan, products: &[Product], precision: Precision, b: &mut [f32]) {
    let nr = plan.kernel.nr();
    let mut rest = b;
    let mut tasks = Vec::new();
    for (product, uses) in products.iter().zip(&plan.uses) {
        for at in uses {
            let panels = rest.split_off_mut(..at.words).unwrap_or_default();
            let stretch = &plan.blocks[at.block][at.stretch];
            let columns = usize::max(1, PACK_WORDS / stretch.steps).next_multiple_of(PACK_COLUMNS.next_multiple_of(nr));
            for (i, panels) in panels.chunks_mut(columns * stretch.steps).enumerate() {
                tasks.push((product.n, &product.terms[at.term], stretch, i * columns, panels));
            }
        }
    }
    let pack = |(n, term, stretch, column, panels): (usize, &Term, &Stretch, usize, &mut [f32])| {
        let packer = Packer::of_operand(plan.kernel, precision, true, n);
        let piece = Piece { operand: term.b, scale: term.scale, k: stretch.k.clone(), first: 0, steps: stretch.steps };
        packer.pack_piece(&piece, column, stretch.steps, panels);
    };
    if plan.words > PACK_WORDS {
        tasks.into_par_iter().with_max_len(1).for_each(pack);
    } else {
        tasks.into_iter().for_each(pack);
    }
}

/// What a task must know of a product beside its rows of the result.
#[derive(Clone, Copy)]
struct Facts<'a> {
    n: usize,
    bias: Option<&'a [f32]>,
}

/// Where tasks begin, and the end: whole tiles, as even as can be; what is left of the last tile goes to the last task.
fn row_bounds(m: usize, unit: usize, threads: usize) -> Vec<usize> {
    let units = usize::max(1, m / unit);
    let tasks = task_count(m, ROWS, threads).min(units);
    (0..tasks).map(|i| units * i / tasks * unit).chain([m]).collect()
}

/// The products' rows by task.
fn row_tasks<'a>(products: Vec<Product<'a>>, bounds: &[usize]) -> (Vec<Vec<Output<'a>>>, Vec<Facts<'a>>) {
    let mut tasks: Vec<Vec<Output>> = bounds[1..].iter().map(|_| Vec::with_capacity(products.len())).collect();
    let mut facts = Vec::with_capacity(products.len());
    for product in products {
        facts.push(Facts { n: product.n, bias: product.bias });
        let mut rest = product.c;
        for (task, bounds) in tasks.iter_mut().zip(bounds.windows(2)) {
            let (piece, after) = rest.split_at((bounds[1] - bounds[0]) * product.n);
            task.push(piece);
            rest = after;
        }
    }
    (tasks, facts)
}

/// What all tasks read.
struct Shared<'a> {
    plan: &'a Plan,
    inputs: &'a [Input<'a>],
    /// Products whose results are inputs.
    early: usize,
    precision: Precision,
    m: usize,
    b: &'a [f32],
}

impl Shared<'_> {
    /// Takes some rows through all products.
    fn run(&self, rows: Range<usize>, facts: &[Facts], c: &mut [Output]) {
        let staged: Vec<Option<usize>> = c.iter().zip(facts).enumerate().map(|(j, (c, facts))| self.stage(j, c, facts)).collect();
        let words = staged.iter().flatten().sum::<usize>() * rows.len();
        let padded = rows.len().next_multiple_of(self.plan.kernel.mr());
        let steps = self.plan.blocks.iter().map(|block| Plan::steps(block)).max().unwrap_or(0);
        scratch::with(Role::Stage, words, |stage| {
            let mut rest = stage;
            let mut stages: Vec<&mut [f32]> =
                staged.iter().map(|ld| rest.split_off_mut(..ld.unwrap_or(0) * rows.len()).unwrap_or_default()).collect();
            scratch::with(Role::A, padded * steps, |a| {
                let mut task = Task { shared: self, rows, facts, c, staged: &staged, stages: &mut stages };
                task.run(a);
            });
        });
    }

    /// The distance between rows of the staged sums of a product, if they cannot be formed in the result itself.
    fn stage(&self, j: usize, c: &Output, facts: &Facts) -> Option<usize> {
        let uses = &self.plan.uses[j];
        let several_blocks = uses.first().map(|at| at.block) != uses.last().map(|at| at.block);
        let direct = match c {
            Output::F32(_) => !(aliases(facts.n) && several_blocks),
            Output::Bf16(_) => !several_blocks,
            Output::F16(_) => false,
        };
        (!direct).then(|| if aliases(facts.n) { facts.n + 16 } else { facts.n })
    }
}

/// Some rows on their way through the products.
struct Task<'t, 'c, 's> {
    shared: &'t Shared<'t>,
    rows: Range<usize>,
    facts: &'t [Facts<'t>],
    c: &'t mut [Output<'c>],
    staged: &'t [Option<usize>],
    stages: &'t mut [&'s mut [f32]],
}

impl Task<'_, '_, '_> {
    fn run(&mut self, a: &mut [f32]) {
        let (plan, early) = (self.shared.plan, self.shared.early);
        let mut early_done = false;
        for (i, block) in plan.blocks.iter().enumerate() {
            self.pack(block, a, false);
            for j in 0..early {
                self.tiles(j, i, a);
            }
            if block.iter().any(|stretch| matches!(self.shared.inputs[stretch.input], Input::Result(_))) {
                if !std::mem::replace(&mut early_done, true) {
                    (0..early).for_each(|j| self.finish(j));
                }
                self.pack(block, a, true);
            }
            for j in early..self.c.len() {
                self.tiles(j, i, a);
            }
        }
        let first = if early_done { early } else { 0 };
        (first..self.c.len()).for_each(|j| self.finish(j));
    }

    /// Packs the block's stretches of stored inputs, or those of results.
    fn pack(&self, block: &[Stretch], a: &mut [f32], results: bool) {
        let Shared { plan, inputs, precision, m, .. } = *self.shared;
        let padded = self.rows.len().next_multiple_of(plan.kernel.mr());
        for stretch in block {
            let (source, lanes, lane) = match inputs[stretch.input] {
                Input::Stored { source, .. } if !results => (source, m, self.rows.start),
                Input::Result(j) if results => (self.c[j].source(self.facts[j].n), self.rows.len(), 0),
                _ => continue,
            };
            let packer = Packer::of_operand(plan.kernel, precision, false, lanes);
            let operand = Operand::new(source);
            let piece = Piece { operand, scale: 1.0, k: stretch.k.clone(), first: 0, steps: stretch.steps };
            packer.pack_piece(&piece, lane, stretch.steps, &mut a[padded * stretch.first..][..padded * stretch.steps]);
        }
    }

    /// One product's tiles over one block.
    fn tiles(&mut self, j: usize, block: usize, a: &[f32]) {
        let plan = self.shared.plan;
        let uses = &plan.uses[j];
        let padded = self.rows.len().next_multiple_of(plan.kernel.mr());
        let panels: Vec<Panels> = uses
            .iter()
            .filter(|at| at.block == block)
            .map(|at| {
                let stretch = &plan.blocks[block][at.stretch];
                Panels { steps: stretch.steps, a: &a[padded * stretch.first..], b: &self.shared.b[at.at..][..at.words] }
            })
            .collect();
        if panels.is_empty() {
            return;
        }
        let Facts { n, bias } = self.facts[j];
        let add = uses[0].block < block;
        let tiles = |ldc| Tiles { kernel: plan.kernel, panels: &panels, rows: self.rows.len(), columns: n, ldc, add };
        match (self.staged[j], &mut self.c[j]) {
            (None, Output::Bf16(c)) => tiles(n).run_narrow(c, bias),
            (staged, c) => {
                let (sums, ldc) = sums(c, self.stages[j], staged, n);
                tiles(ldc).run(sums);
            }
        }
    }

    /// Adds the bias, and moves staged sums to the result.
    fn finish(&mut self, j: usize) {
        if let (None, Output::Bf16(_)) = (self.staged[j], &self.c[j]) {
            return; // done with the tiles
        }
        let Facts { n, bias } = self.facts[j];
        let (sums, ldc) = sums(&mut self.c[j], self.stages[j], self.staged[j], n);
        if let Some(bias) = bias {
            for row in sums.chunks_mut(ldc) {
                add(&mut row[..n], bias);
            }
        }
        if self.staged[j].is_some() {
            for (row, sums) in self.stages[j].chunks(ldc).enumerate() {
                self.c[j].store(row * n, &sums[..n], self.shared.plan.kernel);
            }
        }
    }
}

/// Where a product's sums are formed, and the distance between its rows.
fn sums<'s>(c: &'s mut Output, stage: &'s mut [f32], staged: Option<usize>, n: usize) -> (&'s mut [f32], usize) {
    match (staged, c) {
        (None, Output::F32(c)) => (c, n),
        (ld, _) => (stage, ld.unwrap_or(n)),
    }
}

#[cfg(test)]
mod tests;
