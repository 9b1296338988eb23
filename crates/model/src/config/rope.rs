//! Rotary position embedding: base, scaling, and the inverse frequencies they give.

use std::f64::consts::PI;

use serde_json::{Map, Value};

use super::family::Family;
use super::fields::Fields;

/// Rotary position embedding in the half-split layout: dims i and i + d/2 of a head turn together.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// The base θ.
    pub theta: f64,
    /// d, the first dims of a head, which turn; the others stay.
    pub rotary_dim: usize,
    /// How frequencies were changed for longer texts.
    pub scaling: RopeScaling,
}

/// How the frequencies are changed for longer texts than the model was first trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by a factor, high ones kept, a linear blend between.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// The length of the first training, in tokens.
        original_max_position_embeddings: usize,
    },
}

impl Rope {
    /// The d/2 inverse frequencies θ^(−2i/d), scaled; the angle at position p is p · f, both in f32.
    ///
    /// Computed with the f32 roundings of transformers' `modeling_rope_utils`, so that angles at far positions agree:
    /// the power alone is taken in f64 and rounded once, which is within one unit in the last place of any
    /// f32 power function.
    #[must_use]
    pub fn inv_freq(&self) -> Vec<f32> {
        let base = f64::from(self.theta as f32);
        let plain = |i: usize| {
            let exponent = (2 * i) as f32 / self.rotary_dim as f32;
            1.0 / base.powf(f64::from(exponent)) as f32
        };
        (0..self.rotary_dim / 2).map(|i| self.scaling.apply(plain(i))).collect()
    }
}

impl RopeScaling {
    /// One frequency, scaled, in f32.
    fn apply(&self, frequency: f32) -> f32 {
        match *self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor as f32,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let length = original_max_position_embeddings as f64;
                let wavelength = (2.0 * PI) as f32 / frequency;
                if wavelength > (length / low_freq_factor) as f32 {
                    return frequency / factor as f32;
                }
                if wavelength < (length / high_freq_factor) as f32 {
                    return frequency;
                }
                let span = (high_freq_factor - low_freq_factor) as f32;
                let smooth = (length as f32 / wavelength - low_freq_factor as f32) / span;
                (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
            }
        }
    }
}

/// The rotary embedding of full layers, and of windowed ones where it differs.
pub(super) fn read(family: Family, fields: &mut Fields<'_>, head_dim: usize) -> (Rope, Option<Rope>) {
    if let Some(parameters) = fields.object("rope_parameters") {
        return from_v5(family, fields, parameters, head_dim);
    }
    let theta = fields.opt_positive("rope_theta").unwrap_or(default_theta(family));
    let partial = fields.opt_positive("partial_rotary_factor");
    let scaling = match fields.object("rope_scaling") {
        Some(map) => nested(fields, map, "rope_scaling", scaling),
        None => RopeScaling::None,
    };
    let rotary_dim = rotary_dim(fields, head_dim, partial);
    let rope = Rope { theta, rotary_dim, scaling };
    let local = (family == Family::Gemma3).then(|| Rope {
        theta: fields.opt_positive("rope_local_base_freq").unwrap_or(10_000.0),
        rotary_dim,
        scaling: RopeScaling::None,
    });
    (rope, local)
}

fn default_theta(family: Family) -> f64 {
    if family == Family::Gemma3 { 1_000_000.0 } else { 10_000.0 }
}

fn from_v5(family: Family, fields: &mut Fields<'_>, parameters: &Map<String, Value>, head_dim: usize) -> (Rope, Option<Rope>) {
    if let (Some(Value::Object(full)), Some(Value::Object(local))) =
        (parameters.get("full_attention"), parameters.get("sliding_attention"))
    {
        let full = one_v5(family, fields, full, "rope_parameters.full_attention", head_dim);
        let local = one_v5(family, fields, local, "rope_parameters.sliding_attention", head_dim);
        let local = (local != full).then_some(local);
        return (full, local);
    }
    (one_v5(family, fields, parameters, "rope_parameters", head_dim), None)
}

fn one_v5(family: Family, fields: &mut Fields<'_>, map: &Map<String, Value>, prefix: &'static str, head_dim: usize) -> Rope {
    let (theta, partial, scaling) = nested(fields, map, prefix, |inner| {
        let theta = inner.opt_positive("rope_theta");
        let partial = inner.opt_positive("partial_rotary_factor");
        (theta, partial, scaling(inner))
    });
    // Some tools write `rope_parameters` and leave the base in its old place.
    let theta = theta.or_else(|| fields.opt_positive("rope_theta"));
    let partial = partial.or_else(|| fields.opt_positive("partial_rotary_factor"));
    let rotary_dim = rotary_dim(fields, head_dim, partial);
    Rope { theta: theta.unwrap_or(default_theta(family)), rotary_dim, scaling }
}

fn nested<T>(
    fields: &mut Fields<'_>,
    map: &Map<String, Value>,
    prefix: &'static str,
    read: impl FnOnce(&mut Fields<'_>) -> T,
) -> T {
    let mut inner = Fields::nested(map, prefix);
    let value = read(&mut inner);
    fields.absorb(inner);
    value
}

/// `rope_type`, or `type` as older files spell it.
fn scaling(fields: &mut Fields<'_>) -> RopeScaling {
    let field = if fields.get("rope_type").is_some() { "rope_type" } else { "type" };
    match fields.text(field) {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: fields.positive("factor") },
        Some("llama3") => RopeScaling::Llama3 {
            factor: fields.positive("factor"),
            low_freq_factor: fields.positive("low_freq_factor"),
            high_freq_factor: fields.positive("high_freq_factor"),
            original_max_position_embeddings: fields.size("original_max_position_embeddings"),
        },
        Some(other) => {
            fields.wrong(field, "default, linear or llama3", &Value::from(other));
            RopeScaling::None
        }
    }
}

fn rotary_dim(fields: &mut Fields<'_>, head_dim: usize, partial: Option<f64>) -> usize {
    let dim = (head_dim as f64 * partial.unwrap_or(1.0)) as usize;
    if dim > head_dim {
        fields.wrong("partial_rotary_factor", "at most 1", &Value::from(partial));
    } else if !dim.is_multiple_of(2) {
        fields.wrong("head_dim", "an even number of rotary dims", &Value::from(dim));
    }
    dim
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(theta: f64, rotary_dim: usize, scaling: RopeScaling) -> Rope {
        Rope { theta, rotary_dim, scaling }
    }

    /// The formula of the Llama 3.1 release in f64, on the exact frequencies.
    fn llama3_f64(theta: f64, d: usize, factor: f64, low: f64, high: f64, length: f64) -> Vec<f64> {
        (0..d / 2)
            .map(|i| {
                let f = theta.powf(-2.0 * i as f64 / d as f64);
                let wavelength = 2.0 * PI / f;
                let smooth = ((length / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - smooth) * f / factor + smooth * f
            })
            .collect()
    }

    #[test]
    fn frequencies_are_powers_of_the_base() {
        for (theta, d) in [(10_000.0, 64), (100_000.0, 64), (1e6, 128), (500_000.0, 2)] {
            let got = rope(theta, d, RopeScaling::None).inv_freq();
            assert_eq!(got.len(), d / 2);
            assert_eq!(got[0], 1.0);
            for (i, &f) in got.iter().enumerate() {
                // The exponent is rounded to f32 as torch does: a relative change of ln θ · 2⁻²⁴, plus two roundings.
                let want = theta.powf(-2.0 * i as f64 / d as f64);
                let bound = (theta.ln() + 2.0) * 2f64.powi(-24);
                assert!((f64::from(f) / want - 1.0).abs() <= bound, "{i}: {f} {want}");
            }
        }
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let plain = rope(10_000.0, 32, RopeScaling::None).inv_freq();
        let scaled = rope(10_000.0, 32, RopeScaling::Linear { factor: 4.0 }).inv_freq();
        assert!(plain.iter().zip(&scaled).all(|(p, s)| p / 4.0 == *s));
    }

    #[test]
    fn llama3_scaling_keeps_blends_and_divides() {
        let (factor, low, high, length) = (8.0, 1.0, 4.0, 8192);
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: length,
        };
        let got = rope(500_000.0, 128, scaling).inv_freq();
        let plain = rope(500_000.0, 128, RopeScaling::None).inv_freq();
        let want = llama3_f64(500_000.0, 128, factor, low, high, length as f64);
        let mut kinds = [0; 3];
        for ((&g, &p), &w) in got.iter().zip(&plain).zip(&want) {
            assert!((f64::from(g) / w - 1.0).abs() < 3e-6, "{g} {w}");
            kinds[if g == p { 0 } else { 1 + usize::from(g == p / 8.0) }] += 1;
        }
        assert_eq!(kinds, [29, 6, 29]);
    }
}
