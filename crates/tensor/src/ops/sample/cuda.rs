//! Sampling on a GPU: `sample.cu`.

use super::{Config, Texts};
use crate::{
    DType, Result, Tensor,
    cuda::{Arg, CudaDevice, Grid},
};

/// Logits of a block.
const EACH: usize = 4096;

pub(super) fn next(device: CudaDevice, logits: &Tensor, texts: &mut Texts, config: &Config) -> Result<()> {
    let (count, vocab) = (texts.count(), texts.vocab);
    let mut highest = Tensor::empty(logits.arena(), DType::F32, [count])?;
    let zeros = device.zeros("sample", 12 * count)?;
    let greedy = config.temperature <= 0.0;
    let grid = Grid { blocks: [vocab.div_ceil(EACH) as u32, count as u32, 1], threads: [256, 1], shared: 0 };
    let sizes = [Arg::size(vocab), Arg::size(vocab.div_ceil(32)), Arg::size(texts.capacity)];
    let text = [
        Arg::write(&mut texts.tokens)?,
        Arg::write(&mut texts.lens)?,
        Arg::write(&mut texts.counts)?,
        Arg::write(&mut texts.seen)?,
    ];
    let best = [Arg::Pointer(zeros), Arg::Pointer(zeros + 8 * count as u64), Arg::read(logits)?];
    let rules = [Arg::F32(config.repetition_penalty), Arg::U32(greedy.into())];
    device.launch("sample_best", grid, &[&text[..], &[Arg::write(&mut highest)?], &best, &sizes, &rules].concat())?;
    if greedy {
        return Ok(());
    }
    let mut weights = Tensor::empty(logits.arena(), DType::U32, [count, vocab])?;
    let args = [
        Arg::write(&mut weights)?,
        Arg::read(logits)?,
        Arg::read(&highest)?,
        text[3],
        sizes[0],
        sizes[1],
        Arg::F32(config.repetition_penalty),
        Arg::F32(config.temperature),
    ];
    device.launch("sample_weights", grid, &args)?;
    let rules = [Arg::size(config.top_k), Arg::F32(config.top_p), Arg::U64(config.rng.key())];
    let args = [&text[..], &[Arg::read(&weights)?], &sizes, &rules].concat();
    device.launch("sample_draw", Grid::new(count, 1024), &args)
}
