//! Each family against the reference stack: logits, loss, the gradient of every parameter, greedy tokens.

use nibble_autograd::{ParamStore, Tape};
use nibble_model::{Checkpointing, GenerateOptions, LoadOptions, LossOptions, Session, Stream, Transformer, files::Checkpoint};
use nibble_tensor::{DType, ops::lm_head_loss::Labels};
use nibble_tests::{Tensors, Unpadded, golden, relative_error};

/// Relative, in the norm of each tensor.
const TOLERANCE: f64 = 1e-5;

const FAMILIES: [&str; 5] = ["llama", "llama31", "mistral", "qwen2", "qwen3"];

fn load(path: &std::path::Path) -> Transformer {
    let options = LoadOptions { quant: None, compute_dtype: DType::F32, max_positions: 256, blocks_on_host: 0 };
    Transformer::load(&Checkpoint::open(path).unwrap(), &nibble_tests::arena(), &options, &mut |_, _| {}).unwrap()
}

fn each_family(check: impl Fn(&str, Transformer, &Tensors)) {
    for family in FAMILIES {
        if let Some(dir) = golden(&format!("models/{family}")) {
            check(family, load(&dir), &Tensors::read(&dir.join("golden.safetensors")));
        }
    }
}

fn close(family: &str, what: &str, found: &[f32], expected: &[f32]) {
    let error = relative_error(found, expected);
    assert!(error <= TOLERANCE, "{family}: {what} is off by {error:.2e}");
}

#[test]
fn logits_equal_the_reference() {
    each_family(|family, model, reference| {
        let batch = Unpadded::new(reference, "");
        let stream = Stream::new(model.arena(), &batch.tokens, &batch.cu_seqlens).unwrap();
        let logits = model.logits(&ParamStore::empty(model.arena()).unwrap(), &stream).unwrap();
        let vocab = model.config().vocab_size;
        let expected: Vec<f32> =
            batch.places.iter().flat_map(|at| &reference.floats("logits")[at * vocab..(at + 1) * vocab]).copied().collect();
        close(family, "logits", &logits.to_f32_vec().unwrap(), &expected);
    });
}

#[test]
fn loss_and_every_gradient_equal_the_reference() {
    each_family(|family, mut model, reference| {
        let params = model.train_all().unwrap();
        for checkpointing in [Checkpointing::None, Checkpointing::Full] {
            let batch = Unpadded::new(reference, "");
            let stream = Stream::new(model.arena(), &batch.tokens, &batch.cu_seqlens).unwrap();
            let labels = Labels::new(model.arena(), &batch.labels, 1.0 / batch.label_count() as f32).unwrap();
            let options = LossOptions { checkpointing, dropout: None };
            let mut grads = params.zero_grads().unwrap();
            let mut tape = Tape::new(&params);
            let loss = model.loss(&mut tape, &stream, &labels, options).unwrap();
            close(family, "loss", &[loss.value().unwrap() as f32], reference.floats("loss"));
            loss.backward(tape, &mut grads).unwrap();
            let expected = reference.names().filter(|name| name.starts_with("grad.")).count();
            assert_eq!(params.params().len(), expected, "{family}: parameters");
            for param in params.params() {
                let found = grads.get(param).unwrap();
                close(family, &param.name, &found.to_f32_vec().unwrap(), reference.floats(&format!("grad.{}", param.name)));
            }
        }
    });
}

#[test]
fn greedy_tokens_equal_the_reference() {
    each_family(|family, model, reference| {
        let prompt: Vec<u32> = reference.ints("input_ids")[..9].iter().map(|&id| id as u32).collect();
        let params = ParamStore::empty(model.arena()).unwrap();
        let mut session = Session::new(&model, &params, 32).unwrap();
        let options = GenerateOptions { max_new_tokens: 12, ..GenerateOptions::default() };
        let new = session.generate(&prompt, &options, |_| true).unwrap();
        let expected: Vec<u32> = reference.ints("greedy")[9..].iter().map(|&id| id as u32).collect();
        assert_eq!(new, expected, "{family}");
    });
}
