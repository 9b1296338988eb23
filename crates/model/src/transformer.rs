//! The model: embedding, blocks, last norm, head.

use nibble_autograd::{Leaf, Offload, ParamStore, ParamStoreBuilder, Tape, Var, ops};
use nibble_lora::{AdapterConfig, AdapterFile, Init, Linear};
use nibble_tensor::{
    Arena, DType, HostPool, HostWeight, Rng, Tensor,
    ops::{
        Documents,
        lm_head_loss::{self, Labels},
    },
};

use crate::{
    Checkpointing, Error, Result,
    block::{Block, Keys, Shared},
    checkpointing::Keep,
    config::ModelConfig,
};

/// A stream of packed documents on a device.
#[derive(Clone, Debug)]
pub struct Stream {
    /// U32 `[T]`.
    pub tokens: Tensor,
    /// Where the documents begin.
    pub documents: Documents,
    /// The highest token id and where it first is: checked here because a GPU's ids cannot be read without waiting.
    highest: (u32, usize),
}

impl Stream {
    /// From token ids and the documents' offsets `[0, ..., T]`.
    ///
    /// # Errors
    /// When the offsets do not end with the number of tokens.
    pub fn new(arena: &Arena, tokens: &[u32], cu_seqlens: &[u32]) -> Result<Self> {
        Self::from_documents(arena, tokens, Documents::new(arena, cu_seqlens)?)
    }

    /// Other documents in the same memory: as many of them, of as many tokens together.
    ///
    /// # Errors
    /// When they do not fit, or a step still reads these.
    pub fn update(&mut self, tokens: &[u32], cu_seqlens: &[u32]) -> Result<()> {
        self.tokens.write(tokens)?;
        self.documents.update(cu_seqlens)?;
        self.highest = highest(tokens);
        Ok(())
    }

    /// The same stream for one step: what layers share in it is made once, in that step.
    #[must_use]
    pub fn for_step(&self) -> Self {
        Self { documents: self.documents.for_step(), ..self.clone() }
    }

    pub(crate) fn from_documents(arena: &Arena, ids: &[u32], documents: Documents) -> Result<Self> {
        let tokens = Tensor::from_slice(arena, ids, [documents.tokens()])?;
        Ok(Self { tokens, documents, highest: highest(ids) })
    }

    /// Checks the ids and positions against a model's tables.
    pub(crate) fn expect_within(&self, vocab_size: usize, positions: usize) -> Result<()> {
        let (id, position) = self.highest;
        if id as usize >= vocab_size {
            let id = id.into();
            return Err(nibble_tensor::Error::TokenOutOfRange { op: "embedding", position, id, vocab_size }.into());
        }
        if self.documents.last_position() >= positions {
            return Err(Error::TooLong { tokens: self.documents.last_position() + 1, positions });
        }
        Ok(())
    }
}

/// The highest id, and where it first is.
fn highest(ids: &[u32]) -> (u32, usize) {
    ids.iter().copied().zip(0..).max_by_key(|&(id, at)| (id, std::cmp::Reverse(at))).unwrap_or_default()
}

/// How a loss is computed.
#[derive(Clone, Copy, Debug)]
pub struct LossOptions {
    /// What is kept for the backward pass.
    pub checkpointing: Checkpointing,
    /// Stream of the dropout masks; nothing in evaluation.
    pub dropout: Option<Rng>,
}

/// A decoder-only transformer with a frozen base and, once attached, adapters.
#[derive(Clone, Debug)]
pub struct Transformer {
    pub(crate) config: ModelConfig,
    pub(crate) arena: Arena,
    /// Where activations wait that are not kept on the device.
    pub(crate) host: HostPool,
    /// Bytes below which an activation does not go there.
    pub(crate) smallest_on_host: usize,
    pub(crate) dtype: DType,
    pub(crate) embed_tokens: Leaf,
    pub(crate) blocks: Vec<Block>,
    pub(crate) shared: Shared,
    pub(crate) norm: Leaf,
    /// `None`: the embedding's matrix.
    pub(crate) lm_head: Option<Leaf>,
}

impl Transformer {
    /// What the model is.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The host memory that activations wait in, with `offload`.
    #[must_use]
    pub fn host(&self) -> &HostPool {
        &self.host
    }

    /// Sends activations of at least `bytes` bytes to the host, with `offload`; on a GPU it is 1 MiB unless this is called.
    pub fn set_smallest_on_host(&mut self, bytes: usize) {
        self.smallest_on_host = bytes;
    }

    /// The memory that activations are taken from.
    #[must_use]
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// The type of activations.
    #[must_use]
    pub fn compute_dtype(&self) -> DType {
        self.dtype
    }

    /// Positions that rope's table holds: the longest document.
    #[must_use]
    pub fn max_positions(&self) -> usize {
        self.shared.rope.positions()
    }

    /// The linears of all blocks, in the order of the forward pass.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(Block::linears)
    }

    /// Cross entropy of `labels` (already shifted: the target of each position, -100 for none) on a stream, recorded for a
    /// backward pass.
    ///
    /// # Errors
    /// A token or label beyond the vocabulary, a document longer than rope's table, out of memory.
    pub fn loss<'m>(&'m self, tape: &mut Tape<'m>, stream: &Stream, labels: &Labels, options: LossOptions) -> Result<ops::Loss> {
        let h = self.hidden(tape, stream, options.checkpointing, options.dropout)?;
        let config = lm_head_loss::Config { softcap: self.config.features.final_logit_softcap };
        Ok(ops::lm_head_loss(tape, h, self.head(), labels, config)?)
    }

    /// The logits of every position, F32 [T, V].
    ///
    /// # Errors
    /// As [`Transformer::loss`].
    pub fn logits(&self, params: &ParamStore, stream: &Stream) -> Result<Tensor> {
        let mut tape = Tape::inference(params);
        let h = self.hidden(&mut tape, stream, Checkpointing::None, None)?;
        self.head_logits(params, h.tensor())
    }

    /// The head on rows of the last norm's output.
    pub(crate) fn head_logits(&self, params: &ParamStore, h: &Tensor) -> Result<Tensor> {
        Ok(lm_head_loss::logits(h, &params.operand(self.head(), h.dtype())?, self.config.features.final_logit_softcap)?)
    }

    pub(crate) fn head(&self) -> &Leaf {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// Output of the last norm, [T, C].
    fn hidden<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        stream: &Stream,
        checkpointing: Checkpointing,
        dropout: Option<Rng>,
    ) -> Result<Var> {
        stream.expect_within(self.config.vocab_size, self.max_positions())?;
        let mix = checkpointing.mix(self.blocks.len());
        let tokens = stream.documents.tokens();
        let window = self.offload_window(mix, tokens);
        let offload = mix.uses_host().then(|| Offload::new(&self.host, &self.arena, window, self.smallest_on_host));
        let mut x = self.embed(tape, &stream.tokens)?;
        let mut a = None;
        for (i, block) in self.blocks.iter().enumerate() {
            let rng = dropout.map(|rng| rng.stream(i as u64));
            let plan = mix.of_block(i, self.blocks.len());
            tape.set_offload(offload.clone().filter(|_| plan.on_host));
            tape.set_recomputing(matches!(plan.keep, Keep::Products | Keep::Attention));
            // A block whose weights leave after it has run cannot lend them to a backward pass.
            let keep = if block.host_bases().next().is_some() { Keep::Input } else { plan.keep };
            let [next, added] = match keep {
                Keep::Everything | Keep::Products => {
                    block.forward(tape, &self.shared, x, a, Keys::Stream(&stream.documents), rng)?
                }
                Keep::Attention => {
                    let [x, a] = block.attention_part(tape, &self.shared, x, a, Keys::Stream(&stream.documents), rng)?;
                    let x = ops::residual(tape, x, a)?;
                    self.checkpointed_mlp(tape, block, x, rng)?
                }
                Keep::Input => {
                    let x = match a {
                        Some(a) => ops::residual(tape, x, a)?,
                        None => x,
                    };
                    self.checkpointed(tape, i, &stream.documents, x, rng)?
                }
            };
            (x, a) = (next, Some(added));
        }
        tape.set_offload(None);
        self.last_norm(tape, x, a)
    }

    /// A block of which only the residual stream before it is kept.
    fn checkpointed<'m>(
        &'m self,
        tape: &mut Tape<'m>,
        index: usize,
        documents: &Documents,
        x: Var,
        rng: Option<Rng>,
    ) -> Result<[Var; 2]> {
        let block = &self.blocks[index];
        let (shared, documents, trains) = (&self.shared, documents.clone(), block.trains());
        let run = move |tape: &mut Tape<'m>, [x]: [Var; 1]| {
            self.bring_weights(index, tape.is_replaying())?;
            // What is not kept of the block need not be kept while it runs again either.
            tape.set_recomputing(true);
            block.forward(tape, shared, x, None, Keys::Stream(&documents), rng)
        };
        Ok(tape.checkpoint([x], trains, run)?)
    }

    /// An MLP of which only the residual stream before it is kept.
    fn checkpointed_mlp<'m>(&'m self, tape: &mut Tape<'m>, block: &'m Block, x: Var, rng: Option<Rng>) -> Result<[Var; 2]> {
        let run = move |tape: &mut Tape<'m>, [x]: [Var; 1]| {
            tape.set_recomputing(true);
            block.mlp_part(tape, &self.shared, x, None, rng)
        };
        Ok(tape.checkpoint([x], block.trains(), run)?)
    }

    /// Weights from the host for block `index`, which runs, and for the next that has some there; those of others go.
    pub(crate) fn bring_weights(&self, index: usize, backward: bool) -> nibble_tensor::Result<()> {
        let waits = |i: &usize| self.blocks[*i].host_bases().next().is_some();
        let next = if backward { (0..index).rev().find(waits) } else { (index + 1..self.blocks.len()).find(waits) };
        let others = self.blocks.iter().enumerate().filter(|(i, _)| *i != index && Some(*i) != next);
        others.flat_map(|(_, block)| block.host_bases()).try_for_each(HostWeight::forget)?;
        let wanted = [Some(index), next].into_iter().flatten();
        wanted.flat_map(|i| self.blocks[i].host_bases()).try_for_each(HostWeight::recall)
    }

    /// Lets go of weights that came from the host: so that each step begins alike.
    ///
    /// # Errors
    /// What the device reports.
    pub fn release_weights(&self) -> Result<()> {
        Ok(self.blocks.iter().flat_map(Block::host_bases).try_for_each(HostWeight::forget)?)
    }

    pub(crate) fn embed(&self, tape: &mut Tape<'_>, tokens: &Tensor) -> Result<Var> {
        let scale = self.config.features.embed_scale.unwrap_or(1.0);
        Ok(ops::embedding(tape, &self.embed_tokens, tokens, scale, self.dtype)?)
    }

    pub(crate) fn last_norm(&self, tape: &mut Tape<'_>, x: Var, a: Option<Var>) -> Result<Var> {
        Ok(match a {
            Some(a) => ops::final_rms_norm(tape, x, a, &self.norm, self.shared.norm)?,
            None => ops::rms_norm(tape, x, &self.norm, self.shared.norm)?,
        })
    }

    /// Attaches adapters as `config` says, and trains `modules_to_save` whole. A model takes one adapter.
    ///
    /// # Errors
    /// As [`nibble_lora::attach`]; [`Error::ModuleToSave`] for a module that cannot be trained whole.
    pub fn attach(&mut self, config: &AdapterConfig, init: Init<'_>) -> Result<ParamStore> {
        let mut builder = ParamStoreBuilder::default();
        let mut linears: Vec<&mut Linear> = self.blocks.iter_mut().flat_map(Block::linears_mut).collect();
        nibble_lora::attach(config, &mut linears, init, &mut builder)?;
        for module in config.modules_to_save.iter().flatten() {
            self.train_module(module, init, &mut builder)?;
        }
        let mut params = builder.build(&self.arena)?;
        params.prepare(self.dtype)?;
        if let Init::File(file) = init {
            file.expect_all_used(&params)?;
        }
        Ok(params)
    }

    fn train_module(&mut self, module: &str, init: Init<'_>, builder: &mut ParamStoreBuilder) -> Result<()> {
        let path = match module.rsplit('.').next() {
            Some("lm_head") => "lm_head",
            Some("embed_tokens") => "model.embed_tokens",
            _ => return Err(Error::ModuleToSave { module: module.to_owned() }),
        };
        let frozen = if path == "lm_head" { self.head().clone() } else { self.embed_tokens.clone() };
        let Leaf::Frozen(frozen) = frozen else { return Ok(()) };
        let name = format!("{}{path}.weight", nibble_lora::PREFIX);
        let values = match init {
            Init::Random(_) | Init::Zeros => frozen.to_f32_vec()?,
            Init::File(file) => saved_module(file, &name, &frozen)?,
        };
        let param = Leaf::Param(builder.add(name, frozen.shape(), values));
        if path == "lm_head" {
            self.lm_head = Some(param);
        } else {
            // As PEFT does it: the head of a tied model stays what the embedding was.
            self.lm_head.get_or_insert(Leaf::Frozen(frozen));
            self.embed_tokens = param;
        }
        Ok(())
    }

    /// Trains every weight (of a model that was loaded without quantisation), under its name in the checkpoint.
    ///
    /// # Errors
    /// Out of memory.
    pub fn train_all(&mut self) -> Result<ParamStore> {
        let mut builder = ParamStoreBuilder::default();
        let leaf = |name: String, leaf: &mut Leaf, builder: &mut ParamStoreBuilder| -> Result<()> {
            if let Leaf::Frozen(tensor) = leaf {
                *leaf = Leaf::Param(builder.add(name, tensor.shape(), tensor.to_f32_vec()?));
            }
            Ok(())
        };
        leaf("model.embed_tokens.weight".into(), &mut self.embed_tokens, &mut builder)?;
        for (i, block) in self.blocks.iter_mut().enumerate() {
            let name = |part: &str| format!("model.layers.{i}.{part}.weight");
            leaf(name("input_layernorm"), &mut block.input_norm, &mut builder)?;
            leaf(name("post_attention_layernorm"), &mut block.post_attention_norm, &mut builder)?;
            if let Some([q, k]) = &mut block.head_norms {
                leaf(name("self_attn.q_norm"), q, &mut builder)?;
                leaf(name("self_attn.k_norm"), k, &mut builder)?;
            }
            for linear in block.linears_mut() {
                linear.train_base(&mut builder)?;
            }
        }
        leaf("model.norm.weight".into(), &mut self.norm, &mut builder)?;
        if let Some(head) = &mut self.lm_head {
            leaf("lm_head.weight".into(), head, &mut builder)?;
        }
        let mut params = builder.build(&self.arena)?;
        params.prepare(self.dtype)?;
        Ok(params)
    }

    /// Bytes of the frozen base: (linears, embedding and head and norms).
    #[must_use]
    pub fn base_bytes(&self) -> (usize, usize) {
        let linears = self.linears().map(Linear::base_bytes).sum();
        let leaf = |leaf: &Leaf| match leaf {
            Leaf::Frozen(tensor) => tensor.numel() * tensor.dtype().size(),
            Leaf::Param(_) => 0,
        };
        let blocks: usize = self.blocks.iter().map(|b| leaf(&b.input_norm) + leaf(&b.post_attention_norm)).sum();
        (linears, leaf(&self.embed_tokens) + self.lm_head.as_ref().map_or(0, leaf) + leaf(&self.norm) + blocks)
    }

    /// Number of values of the base, trained or not.
    #[must_use]
    pub fn num_parameters(&self) -> usize {
        self.config.tensors().iter().map(|spec| spec.shape.iter().product::<usize>()).sum()
    }
}

fn saved_module(file: &AdapterFile, name: &str, frozen: &Tensor) -> Result<Vec<f32>> {
    let expected = frozen.shape();
    let mismatch = match file.get(name) {
        Some((shape, values)) if shape == expected.dims() => return Ok(values.to_vec()),
        Some((found, _)) => nibble_lora::Mismatch::Shape { name: name.to_owned(), expected, found: found.to_vec() },
        None => nibble_lora::Mismatch::Missing { name: name.to_owned(), expected },
    };
    Err(nibble_lora::Error::Mismatches { path: file.path().to_path_buf(), mismatches: vec![mismatch] }.into())
}
