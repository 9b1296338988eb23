//! Texts written with cached keys and values: alone, in batches, and in parts.

use nibble_autograd::ParamStore;
use nibble_model::{GenerateOptions, LoadOptions, Session, Transformer, config::ModelConfig, generate_batch};
use nibble_tensor::DType;

const CAPACITY: usize = 64;

/// A made-up model with grouped heads, head norms and biases off.
fn model() -> (Transformer, ParamStore) {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 131, "rope_theta": 10000.0,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": false, "hidden_act": "silu",
    });
    let config = ModelConfig::from_json(&config.to_string(), "made-up").unwrap();
    let options = LoadOptions { quant: None, compute_dtype: DType::F32, max_positions: CAPACITY, blocks_on_host: 0 };
    let model = Transformer::random(config, &nibble_tests::arena(), &options, 1).unwrap();
    let params = ParamStore::empty(model.arena()).unwrap();
    (model, params)
}

fn prompts() -> Vec<Vec<u32>> {
    [1, 9, 4, 17, 2].iter().enumerate().map(|(i, &len)| (0..len).map(|j| (i as u32 * 31 + j * 7) % 131).collect()).collect()
}

fn greedy(max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_new_tokens, ..GenerateOptions::default() }
}

fn sampled() -> GenerateOptions {
    GenerateOptions { temperature: 0.8, top_k: 40, top_p: 0.9, repetition_penalty: 1.2, seed: 3, ..greedy(14) }
}

fn alone(model: &Transformer, params: &ParamStore, prompt: &[u32], options: &GenerateOptions) -> Vec<u32> {
    Session::new(model, params, CAPACITY).unwrap().generate(prompt, options, |_| true).unwrap()
}

#[test]
fn prompts_in_a_batch_are_answered_as_alone() {
    let (model, params) = model();
    for options in [greedy(14), sampled()] {
        let free: Vec<Vec<u32>> = prompts().iter().map(|prompt| alone(&model, &params, prompt, &options)).collect();
        // Tokens that some of the answers have, at different places: those answers end there.
        let options = GenerateOptions { stop: vec![free[1][3], free[2][6], free[3][9]], ..options };
        let expected: Vec<Vec<u32>> = prompts().iter().map(|prompt| alone(&model, &params, prompt, &options)).collect();
        assert!(expected[1].len() <= 4 && expected[2].len() <= 7 && expected[3].len() <= 10);
        let mut heard = vec![Vec::new(); prompts().len()];
        let found = generate_batch(&model, &params, &prompts(), CAPACITY, &options, |i, token| {
            heard[i].push(token);
            true
        })
        .unwrap();
        assert_eq!(found, expected);
        assert_eq!(heard, expected);
    }
}

#[test]
fn a_text_ends_where_its_listener_says_and_where_its_slot_does() {
    let (model, params) = model();
    let found = generate_batch(&model, &params, &prompts(), CAPACITY, &greedy(14), |i, _| i != 3).unwrap();
    assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [14, 14, 14, 1, 14]);
    // The last token of a full slot can be chosen, not read.
    let full = generate_batch(&model, &params, &prompts()[1..2], 12, &greedy(14), |_, _| true).unwrap();
    assert_eq!(full[0].len(), 4);
    assert_eq!(full[0], alone(&model, &params, &prompts()[1], &greedy(4)));
}

#[test]
fn steps_choose_what_the_logits_of_a_whole_reading_say() {
    let (model, params) = model();
    let mut text = prompts()[1].clone();
    let new = alone(&model, &params, &text, &greedy(10));
    for token in new {
        let logits = Session::new(&model, &params, CAPACITY).unwrap().read(&text).unwrap();
        let best = (0..logits.len()).rev().max_by(|&i, &j| logits[i].total_cmp(&logits[j])).unwrap();
        assert_eq!(token, best as u32);
        text.push(token);
    }
}

#[test]
fn a_session_goes_on_where_it_ended() {
    let (model, params) = model();
    let whole = alone(&model, &params, &prompts()[3], &greedy(12));
    let mut session = Session::new(&model, &params, CAPACITY).unwrap();
    let first = session.generate(&prompts()[3], &greedy(5), |_| true).unwrap();
    let second = session.generate(&first[4..], &greedy(7), |_| true).unwrap();
    assert_eq!([first, second].concat(), whole);
}

#[test]
fn the_seed_decides() {
    let (model, params) = model();
    let write = |seed| alone(&model, &params, &prompts()[0], &GenerateOptions { seed, ..sampled() });
    assert_eq!(write(3), write(3));
    assert_ne!(write(3), write(4));
}
