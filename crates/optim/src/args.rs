//! Constants of an optimizer in words: Hugging Face's `optim_args`.

use crate::{AdafactorConfig, AdamWConfig, DecayOrder, Error, LionConfig, OptimizerConfig, Result, SgdConfig};

impl OptimizerConfig {
    /// With the constants that `text` gives: `key=value` with commas or spaces between, such as `beta1=0.9,beta2=0.95,eps=1e-6` or
    /// `betas=0.9,0.95 decay=before`. AdamW takes `betas`, `beta1`, `beta2`, `eps`, `weight_decay` and `decay` (`before` or `after`
    /// the update); Lion `betas`, `beta1`, `beta2`, `weight_decay`; SGD `momentum`, `nesterov`, `weight_decay`; Adafactor `eps`,
    /// `clip_threshold`, `decay_rate`, `weight_decay`.
    ///
    /// # Errors
    /// [`Error::UnknownArgument`] for a key that the optimizer does not take, [`Error::Argument`] for a value that is not one,
    /// [`Error::Option`] for a number out of range.
    pub fn with_args(mut self, text: &str) -> Result<Self> {
        for (key, value) in pairs(text)? {
            let value = Value { of: self.name(), key, text: &value };
            let known = match &mut self {
                Self::AdamW(config) | Self::AdamW8bit(config) => adamw(config, key, &value)?,
                Self::Lion(config) | Self::Lion8bit(config) => lion(config, key, &value)?,
                Self::Sgd(config) => sgd(config, key, &value)?,
                Self::Adafactor(config) => adafactor(config, key, &value)?,
            };
            if !known {
                let known = self.arguments();
                return Err(Error::UnknownArgument { optimizer: self.name(), argument: key.to_owned(), known });
            }
        }
        self.check()?;
        Ok(self)
    }

    const fn arguments(&self) -> &'static [&'static str] {
        match self {
            Self::AdamW(_) | Self::AdamW8bit(_) => &["betas", "beta1", "beta2", "eps", "weight_decay", "decay"],
            Self::Lion(_) | Self::Lion8bit(_) => &["betas", "beta1", "beta2", "weight_decay"],
            Self::Sgd(_) => &["momentum", "nesterov", "weight_decay"],
            Self::Adafactor(_) => &["eps", "clip_threshold", "decay_rate", "weight_decay"],
        }
    }
}

/// Keys with their values. What has no `=` belongs to the value before it.
fn pairs(text: &str) -> Result<Vec<(&str, String)>> {
    let mut pairs: Vec<(&str, String)> = Vec::new();
    for word in text.split([',', ' ', '\t', '\n']).filter(|word| !word.is_empty()) {
        match (word.split_once('='), pairs.last_mut()) {
            (Some((key, value)), _) => pairs.push((key, value.to_owned())),
            (None, Some((_, value))) => *value = format!("{value},{word}"),
            (None, None) => {
                return Err(Error::Argument {
                    of: "optim_args",
                    argument: word.to_owned(),
                    expected: "key=value",
                    found: word.into(),
                });
            }
        }
    }
    Ok(pairs)
}

/// A value that is being read.
struct Value<'a> {
    of: &'static str,
    key: &'a str,
    text: &'a str,
}

impl Value<'_> {
    fn wrong(&self, expected: &'static str) -> Error {
        Error::Argument { of: self.of, argument: self.key.to_owned(), expected, found: self.text.to_owned() }
    }

    fn number(&self) -> Result<f64> {
        self.text.parse().map_err(|_| self.wrong("a number"))
    }

    fn two(&self) -> Result<[f64; 2]> {
        let numbers: Vec<f64> =
            self.text.trim_matches(['(', ')', '[', ']']).split(',').filter_map(|word| word.parse().ok()).collect();
        match numbers[..] {
            [first, second] if self.text.split(',').count() == 2 => Ok([first, second]),
            _ => Err(self.wrong("two numbers")),
        }
    }

    fn yes(&self) -> Result<bool> {
        match &self.text.to_ascii_lowercase()[..] {
            "true" | "1" | "yes" => Ok(true),
            "false" | "0" | "no" => Ok(false),
            _ => Err(self.wrong("true or false")),
        }
    }
}

fn adamw(config: &mut AdamWConfig, key: &str, value: &Value<'_>) -> Result<bool> {
    match key {
        "betas" => [config.beta1, config.beta2] = value.two()?,
        "beta1" => config.beta1 = value.number()?,
        "beta2" => config.beta2 = value.number()?,
        "eps" => config.eps = value.number()?,
        "weight_decay" => config.weight_decay = value.number()?,
        "decay" => {
            config.decay = match value.text {
                "before" => DecayOrder::Before,
                "after" => DecayOrder::After,
                _ => return Err(value.wrong("`before` or `after`")),
            }
        }
        _ => return Ok(false),
    }
    Ok(true)
}

fn lion(config: &mut LionConfig, key: &str, value: &Value<'_>) -> Result<bool> {
    match key {
        "betas" => [config.beta1, config.beta2] = value.two()?,
        "beta1" => config.beta1 = value.number()?,
        "beta2" => config.beta2 = value.number()?,
        "weight_decay" => config.weight_decay = value.number()?,
        _ => return Ok(false),
    }
    Ok(true)
}

fn sgd(config: &mut SgdConfig, key: &str, value: &Value<'_>) -> Result<bool> {
    match key {
        "momentum" => config.momentum = value.number()?,
        "nesterov" => config.nesterov = value.yes()?,
        "weight_decay" => config.weight_decay = value.number()?,
        _ => return Ok(false),
    }
    Ok(true)
}

fn adafactor(config: &mut AdafactorConfig, key: &str, value: &Value<'_>) -> Result<bool> {
    match key {
        "eps" => config.eps = value.number()?,
        "clip_threshold" => config.clip_threshold = value.number()?,
        "decay_rate" => config.decay_rate = value.number()?,
        "weight_decay" => config.weight_decay = value.number()?,
        _ => return Ok(false),
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OptimizerName;

    fn with(name: &str, text: &str) -> Result<OptimizerConfig, String> {
        name.parse::<OptimizerName>().unwrap().config(0.1).with_args(text).map_err(|error| error.to_string())
    }

    #[test]
    fn both_spellings_give_the_same_constants() {
        let want = AdamWConfig { beta1: 0.8, beta2: 0.95, eps: 1e-6, weight_decay: 0.1, decay: DecayOrder::Before };
        for text in [
            "betas=0.8,0.95 eps=1e-6 decay=before",
            "beta1=0.8,beta2=0.95, eps=1e-6,decay=before",
            "eps=1e-6,betas=0.8,0.95,decay=before",
        ] {
            assert_eq!(with("adamw_8bit", text), Ok(OptimizerConfig::AdamW8bit(want)), "{text}");
        }
        let OptimizerConfig::Sgd(sgd) = with("sgd", "momentum=0.9,nesterov=True").unwrap() else { panic!("not SGD") };
        assert!(sgd.nesterov && sgd.momentum == 0.9 && sgd.weight_decay == 0.1);
        let OptimizerConfig::Lion8bit(lion) = with("lion_8bit", "beta2=0.98").unwrap() else { panic!("not Lion") };
        assert_eq!((lion.beta1, lion.beta2), (0.9, 0.98));
        assert_eq!(with("adamw_torch", " "), Ok("adamw_torch".parse::<OptimizerName>().unwrap().config(0.1)));
    }

    #[test]
    fn what_is_not_known_or_no_value_is_named() {
        let error = |name, text| with(name, text).unwrap_err();
        assert_eq!(
            error("lion_8bit", "beta1=0.9,eps=1"),
            "lion_8bit: takes no argument `eps`; it takes `betas`, `beta1`, `beta2`, `weight_decay`"
        );
        assert_eq!(error("adamw_torch", "eps=tiny"), "adamw: `eps` must be a number, found `tiny`");
        assert_eq!(error("adamw_torch", "betas=0.9"), "adamw: `betas` must be two numbers, found `0.9`");
        assert_eq!(error("adamw_torch", "betas=0.9,0.95,0.99"), "adamw: `betas` must be two numbers, found `0.9,0.95,0.99`");
        assert_eq!(error("adamw_torch", "decay=never"), "adamw: `decay` must be `before` or `after`, found `never`");
        assert_eq!(error("adamw_torch", "fast"), "optim_args: `fast` must be key=value, found `fast`");
        assert_eq!(error("adamw_torch", "beta2=1"), "adamw: `adam_beta2` must be at least 0 and below 1, found 1");
        assert_eq!(error("adafactor", "decay_rate=0.8"), "adafactor: `decay_rate` must be finite and below 0, found 0.8");
    }
}
