//! Parsers of values, with the range in the error.

use std::collections::BTreeMap;

use nibble_optim::ScheduleOptions;

use super::OffloadWeights;

/// A whole number of at least 1.
pub(super) fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a whole number of at least 1".to_owned())
}

/// Tokens of a text of which one can be learned: the first is only read.
pub(super) fn length(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 1).ok_or_else(|| "expected a whole number of at least 2".to_owned())
}

/// A number above 0.
pub(super) fn above_zero(text: &str) -> Result<f64, String> {
    number(text, |x| x > 0.0, "expected a number above 0")
}

/// A number of at least 0.
pub(super) fn not_negative(text: &str) -> Result<f64, String> {
    number(text, |x| x >= 0.0, "expected a number of at least 0")
}

/// A share of a whole.
pub(super) fn fraction(text: &str) -> Result<f64, String> {
    number(text, |x| (0.0..=1.0).contains(&x), "expected a number from 0 to 1")
}

/// A probability of keeping something out: all of it would leave nothing.
pub(super) fn dropout(text: &str) -> Result<f64, String> {
    number(text, |x| (0.0..1.0).contains(&x), "expected a number from 0 to below 1")
}

/// A probability mass that some token has.
pub(super) fn top_p(text: &str) -> Result<f32, String> {
    number(text, |x| x > 0.0 && x <= 1.0, "expected a number above 0, at most 1").map(|x| x as f32)
}

/// A number of at least 0, in single precision.
pub(super) fn temperature(text: &str) -> Result<f32, String> {
    not_negative(text).map(|x| x as f32)
}

/// A number above 0, in single precision.
pub(super) fn penalty(text: &str) -> Result<f32, String> {
    above_zero(text).map(|x| x as f32)
}

/// A block size of the 4-bit formats.
pub(super) fn block_size(text: &str) -> Result<usize, String> {
    let fits = |&size: &usize| nibble_nf4::QuantConfig { block_size: size, ..Default::default() }.check().is_ok();
    text.parse().ok().filter(fits).ok_or_else(|| "expected a power of two from 32 to 4096".to_owned())
}

/// `{"num_cycles": 2}` and the like.
pub(super) fn schedule_options(text: &str) -> Result<ScheduleOptions, String> {
    let mut options = ScheduleOptions::default();
    let given: BTreeMap<String, f64> =
        serde_json::from_str(text).map_err(|error| format!("expected an object of numbers: {error}"))?;
    for (name, value) in given {
        let option = match &name[..] {
            "num_cycles" => &mut options.num_cycles,
            "power" => &mut options.power,
            "lr_end" => &mut options.lr_end,
            "timescale" => &mut options.timescale,
            "min_lr" => &mut options.min_lr,
            "min_lr_rate" => &mut options.min_lr_rate,
            _ => return Err(format!("expected num_cycles, power, lr_end, timescale, min_lr or min_lr_rate, found `{name}`")),
        };
        *option = Some(value);
    }
    Ok(options)
}

fn number(text: &str, fits: impl Fn(f64) -> bool, expected: &str) -> Result<f64, String> {
    text.parse().ok().filter(|&x: &f64| x.is_finite() && fits(x)).ok_or_else(|| expected.to_owned())
}

/// A number of blocks, `none` or `auto`.
pub(crate) fn offload_weights(text: &str) -> Result<OffloadWeights, String> {
    match text {
        "auto" => Ok(OffloadWeights::Auto),
        "none" => Ok(OffloadWeights::Blocks(0)),
        number => number
            .parse()
            .map(OffloadWeights::Blocks)
            .map_err(|_| format!("expected auto, none or a number of blocks, found `{text}`")),
    }
}

/// Bytes with a unit: `24GiB`, `500 MB`, `1.5g` (binary unless the unit is MB, GB or KB).
pub(crate) fn bytes(text: &str) -> Result<usize, String> {
    let expected = || format!("expected a size such as 8GiB or 500MB, found `{text}`");
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| expected())?;
    let scale = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024f64.powi(2),
        "g" | "gib" => 1024f64.powi(3),
        _ => return Err(expected()),
    };
    let bytes = number * scale;
    if (1.0..1e18).contains(&bytes) { Ok(bytes as usize) } else { Err(expected()) }
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn sizes_are_binary_unless_they_say_otherwise() {
        assert_eq!(bytes("8GiB"), Ok(8 << 30));
        assert_eq!(bytes("1.5 g"), Ok(3 << 29));
        assert_eq!(bytes("500MB"), Ok(500_000_000));
        for bad in ["", "GiB", "-1GB", "8 parsecs", "0", "1e30GB"] {
            assert!(bytes(bad).unwrap_err().contains("expected a size"), "{bad}");
        }
    }
}
