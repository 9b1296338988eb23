//! Tensors on their way to a GPU: a thread reads ahead into page-locked buffers while the device copies and quantises what came
//! before. What it reads is as it is stored; what has to be decoded first takes the plain way.

use std::{
    sync::mpsc::{Receiver, Sender, TryRecvError, channel},
    thread::Scope,
};

use nibble_tensor::cuda::Pinned;

use crate::{Result, config::ModelConfig, files::Checkpoint};

/// Buffers, and the bytes of each: enough that reading, copying and quantising go on at once.
pub(crate) const BUFFERS: usize = 4;
pub(crate) const BUFFER_BYTES: usize = 32 << 20;

/// Memory that is read into, and copied from beside it.
pub(crate) trait Buffer: Send + Sized {
    /// Waits until what was copied from it is copied.
    fn wait(&self) -> Result<()>;
    fn bytes_mut(&mut self) -> &mut [u8];
}

impl Buffer for Pinned {
    fn wait(&self) -> Result<()> {
        Ok(Self::wait(self)?)
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        Self::bytes_mut(self)
    }
}

/// A part of a tensor that has been read.
struct Piece<B> {
    buffer: B,
    /// First byte within the tensor, and how many.
    at: usize,
    len: usize,
    last: bool,
}

/// The tensors that a thread reads, in the order in which they are asked for.
pub(crate) struct Prefetch<B> {
    names: Vec<String>,
    next: usize,
    pieces: Receiver<Result<Piece<B>>>,
    free: Sender<B>,
}

impl<B: Buffer> Prefetch<B> {
    /// Begins to read what a model of `config` needs. The thread ends with what it reads, or when this value is dropped.
    pub(crate) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        checkpoint: &'scope Checkpoint,
        config: &ModelConfig,
        make: impl Fn() -> Result<B> + Send + 'scope,
    ) -> Self
    where
        B: 'scope,
    {
        let specs = config.tensors().into_iter();
        let names: Vec<String> = specs.map(|spec| spec.name).filter(|name| checkpoint.is_plain(name)).collect();
        let ((filled, pieces), (free, back)) = (channel(), channel());
        let order = names.clone();
        scope.spawn(move || {
            let mut pool = Pool { made: 0, make, back };
            let ended = order.iter().try_for_each(|name| read(checkpoint, name, &mut pool, &filled));
            if let Err(Ended::Failed(error)) = ended {
                let _ = filled.send(Err(error));
            }
        });
        Self { names, next: 0, pieces, free }
    }

    /// Calls `each` with (first byte, bytes, buffer) of the parts of a tensor; false if it is not the one that was read.
    pub(crate) fn tensor(&mut self, name: &str, mut each: impl FnMut(usize, usize, &mut B) -> Result<()>) -> Result<bool> {
        if self.names.get(self.next).is_none_or(|next| next != name) {
            return Ok(false);
        }
        self.next += 1;
        // The thread says why before it ends; a panic is passed on where the scope ends.
        while let Ok(piece) = self.pieces.recv() {
            let Piece { mut buffer, at, len, last } = piece?;
            each(at, len, &mut buffer)?;
            // Nobody takes it where everything has been read.
            let _ = self.free.send(buffer);
            if last {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The buffers of the thread, made when the first ones are needed.
struct Pool<B, F> {
    made: usize,
    make: F,
    back: Receiver<B>,
}

/// Why a thread reads no further.
enum Ended {
    /// Nobody asks any more.
    Alone,
    Failed(crate::Error),
}

impl<B: Buffer, F: Fn() -> Result<B>> Pool<B, F> {
    fn take(&mut self) -> std::result::Result<B, Ended> {
        let buffer = match self.back.try_recv() {
            Ok(buffer) => buffer,
            Err(TryRecvError::Disconnected) => return Err(Ended::Alone),
            Err(TryRecvError::Empty) if self.made < BUFFERS => {
                self.made += 1;
                (self.make)().map_err(Ended::Failed)?
            }
            Err(TryRecvError::Empty) => self.back.recv().map_err(|_| Ended::Alone)?,
        };
        buffer.wait().map_err(Ended::Failed)?;
        Ok(buffer)
    }
}

/// Reads a tensor, part by part.
fn read<B: Buffer>(
    checkpoint: &Checkpoint,
    name: &str,
    pool: &mut Pool<B, impl Fn() -> Result<B>>,
    filled: &Sender<Result<Piece<B>>>,
) -> std::result::Result<(), Ended> {
    let bytes = checkpoint.info(name).map_err(Ended::Failed)?.bytes;
    let mut at = 0;
    loop {
        let mut buffer = pool.take()?;
        let len = (bytes - at).min(buffer.bytes_mut().len());
        checkpoint.read_stored(name, at, &mut buffer.bytes_mut()[..len]).map_err(Ended::Failed)?;
        let last = at + len == bytes;
        filled.send(Ok(Piece { buffer, at, len, last })).map_err(|_| Ended::Alone)?;
        at += len;
        if last {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, thread};

    use super::*;

    struct Small(Vec<u8>);

    impl Buffer for Small {
        fn wait(&self) -> Result<()> {
            Ok(())
        }

        fn bytes_mut(&mut self) -> &mut [u8] {
            &mut self.0
        }
    }

    fn tiny() -> Checkpoint {
        Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/models/llama31")).unwrap()
    }

    #[test]
    fn the_parts_of_every_tensor_come_in_order_whatever_the_buffers() {
        let checkpoint = tiny();
        let config = checkpoint.config().unwrap();
        for size in [1000, 4096, 1 << 20] {
            thread::scope(|scope| {
                let mut ahead = Prefetch::start(scope, &checkpoint, &config, || Ok(Small(vec![0; size])));
                for spec in config.tensors() {
                    let mut found = Vec::new();
                    let read = ahead.tensor(&spec.name, |at, len, buffer| {
                        assert_eq!(at, found.len());
                        found.extend_from_slice(&buffer.0[..len]);
                        Ok(())
                    });
                    assert!(read.unwrap());
                    assert_eq!(found, checkpoint.bytes(&spec.name).unwrap(), "{}", spec.name);
                }
            });
        }
    }

    #[test]
    fn another_tensor_than_the_next_is_left_to_the_caller_and_the_thread_ends() {
        let checkpoint = tiny();
        let config = checkpoint.config().unwrap();
        thread::scope(|scope| {
            let mut ahead = Prefetch::start(scope, &checkpoint, &config, || Ok(Small(vec![0; 64])));
            assert!(!ahead.tensor("model.norm.weight", |_, _, _| Ok(())).unwrap());
        });
    }

    #[test]
    fn a_buffer_that_cannot_be_made_is_the_error() {
        let checkpoint = tiny();
        let config = checkpoint.config().unwrap();
        thread::scope(|scope| {
            let fail = || Err::<Small, _>(crate::Error::EmptyPrompt);
            let mut ahead = Prefetch::start(scope, &checkpoint, &config, fail);
            let error = ahead.tensor("model.embed_tokens.weight", |_, _, _| Ok(())).unwrap_err();
            assert!(matches!(error, crate::Error::EmptyPrompt), "{error}");
        });
    }
}
