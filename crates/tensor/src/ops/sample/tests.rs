use super::{cpu::power, *};

const VOCAB: usize = 5;

fn config() -> Config {
    Config { temperature: 1.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0, rng: Rng::new(3) }
}

/// The first tokens of as many texts with the same logits, text i as if i tokens had been chosen before.
fn tokens(logits: [f32; VOCAB], prompt: &[u32], config: &Config, count: usize) -> Vec<u32> {
    let arena = Arena::new(Device::Cpu);
    let list: Vec<Text<'_>> = (0..count).map(|chosen| Text { before: 0, tokens: prompt, chosen, slot: 0 }).collect();
    let mut texts = Texts::new(&arena, &list, VOCAB, 64).unwrap();
    let logits = Tensor::from_slice(&arena, &logits.repeat(count), [count, VOCAB]).unwrap();
    next(&logits, &mut texts, config).unwrap();
    texts.tokens.to_vec::<u32>().unwrap()
}

#[test]
fn temperature_zero_takes_the_first_of_the_likeliest() {
    let greedy = Config { temperature: 0.0, ..config() };
    assert_eq!(tokens([0.0, 3.0, f32::NAN, 3.0, 1.0], &[0], &greedy, 1), [1]);
}

#[test]
fn powers_of_two_are_right_to_24_bits() {
    assert_eq!((power(0.0), power(-1.0), power(-31.0), power(-33.0), power(f32::NAN)), (1 << 31, 1 << 30, 1, 0, 0));
    for i in 0..2000 {
        let t = -f32::from(i as u16) / 100.0;
        let exact = (31.0 + f64::from(t)).exp2();
        assert!((f64::from(power(t)) - exact).abs() <= exact * 3e-7 + 1.0, "{t}");
    }
}

#[test]
fn top_k_and_top_p_cut_the_tail() {
    let logits = [1.0, 3.0, 2.0, 0.0, -1.0];
    let two = tokens(logits, &[0], &Config { top_k: 2, ..config() }, 200);
    assert!(two.contains(&1) && two.contains(&2) && two.iter().all(|token| [1, 2].contains(token)));
    // The likeliest alone has 0.64.
    assert!(tokens(logits, &[0], &Config { top_p: 0.6, ..config() }, 200).iter().all(|&token| token == 1));
    assert!(tokens(logits, &[0], &Config { top_p: 0.7, ..config() }, 200).contains(&2));
    // Of equal ones the lowest.
    assert!(tokens([1.0; VOCAB], &[0], &Config { top_k: 1, ..config() }, 50).iter().all(|&token| token == 0));
}

#[test]
fn draws_follow_the_probabilities() {
    let count = 4000;
    let drawn = tokens([0.0, 3f32.ln(), f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY], &[0], &config(), count);
    let ones = drawn.iter().filter(|&&token| token == 1).count() as f64 / count as f64;
    // Five standard deviations.
    assert!((ones - 0.75).abs() < 0.035, "{ones}");
    let warm = Config { temperature: 2.0, ..config() };
    let drawn = tokens([0.0, 3f32.ln(), f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY], &[0], &warm, count);
    let ones = drawn.iter().filter(|&&token| token == 1).count() as f64 / count as f64;
    assert!((ones - 0.634).abs() < 0.04, "{ones}");
}

#[test]
fn a_penalty_lowers_what_was_seen_on_either_side_of_zero() {
    let greedy = Config { temperature: 0.0, repetition_penalty: 2.0, ..config() };
    assert_eq!(tokens([2.0, -1.5, 1.5, 0.0, -1.0], &[0], &greedy, 1), [2]);
    assert_eq!(tokens([-3.0, -1.0, -1.9, -1.8, -9.0], &[1, 1], &greedy, 1), [3]);
}

#[test]
fn a_text_goes_on_with_its_token_and_stays_within_its_slot() {
    let arena = Arena::new(Device::Cpu);
    let list = [Text { before: 0, tokens: &[4, 2], chosen: 0, slot: 1 }];
    let mut texts = Texts::new(&arena, &list, VOCAB, 3).unwrap();
    let logits = Tensor::from_slice(&arena, &[0.0f32, 1.0, 2.0, 1.5, 0.0], [1, VOCAB]).unwrap();
    let penalty = Config { temperature: 0.0, repetition_penalty: 4.0, ..config() };
    next(&logits, &mut texts, &penalty).unwrap();
    assert_eq!((texts.tokens.to_vec::<u32>().unwrap(), texts.lens.to_vec::<u32>().unwrap()), (vec![3], vec![3]));
    next(&logits, &mut texts, &penalty).unwrap();
    assert_eq!((texts.tokens.to_vec::<u32>().unwrap(), texts.lens.to_vec::<u32>().unwrap()), (vec![1], vec![3]));
}

#[test]
fn texts_are_checked() {
    let arena = Arena::new(Device::Cpu);
    for tokens in [&[][..], &[5], &[0, 0, 0, 0]] {
        assert!(Texts::new(&arena, &[Text { before: 0, tokens, chosen: 0, slot: 0 }], VOCAB, 3).is_err(), "{tokens:?}");
    }
}
