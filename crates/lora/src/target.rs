//! Which modules a config selects, by PEFT's rules.

use fancy_regex::Regex;

use crate::{AdapterConfig, Error, Result, TargetModules};

/// A config's selections with their patterns compiled.
#[derive(Debug)]
pub(crate) struct Targets<'a> {
    config: &'a AdapterConfig,
    include: Selection,
    exclude: Option<Selection>,
    layers: Vec<Regex>,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
}

#[derive(Debug)]
enum Selection {
    AllLinear,
    Pattern(Regex),
    Names(Vec<String>),
}

fn compile(field: &'static str, pattern: &str, wrapped: &str) -> Result<Regex> {
    Regex::new(wrapped).map_err(|source| Error::Pattern { field, pattern: pattern.to_owned(), source: Box::new(source) })
}

fn matches(regex: &Regex, path: &str) -> bool {
    // A pattern that runs into the engine's backtracking limit selects nothing.
    regex.is_match(path).unwrap_or(false)
}

impl Selection {
    fn new(field: &'static str, modules: &TargetModules) -> Result<Self> {
        Ok(match modules {
            TargetModules::Pattern(name) if name == TargetModules::ALL_LINEAR => Self::AllLinear,
            TargetModules::Pattern(pattern) => Self::Pattern(compile(field, pattern, &format!(r"\A(?:{pattern})\z"))?),
            // Some files hold ["all-linear"].
            TargetModules::Names(names) if names.iter().any(|name| name == TargetModules::ALL_LINEAR) => Self::AllLinear,
            TargetModules::Names(names) => Self::Names(names.clone()),
        })
    }

    fn selects(&self, path: &str) -> bool {
        match self {
            Self::AllLinear => path != "lm_head",
            Self::Pattern(regex) => matches(regex, path),
            Self::Names(names) => names
                .iter()
                .any(|name| path.strip_suffix(name.as_str()).is_some_and(|head| head.is_empty() || head.ends_with('.'))),
        }
    }
}

impl<'a> Targets<'a> {
    pub(crate) fn new(config: &'a AdapterConfig) -> Result<Self> {
        let default = TargetModules::Names(vec!["q_proj".to_owned(), "v_proj".to_owned()]);
        let include = Selection::new("target_modules", config.target_modules.as_ref().unwrap_or(&default))?;
        let exclude = config.exclude_modules.as_ref().map(|modules| Selection::new("exclude_modules", modules)).transpose()?;
        let layers = match &config.layers_pattern {
            None => vec![compile("layers_pattern", "", r"\A.*\.[^.]*\.(\d+)\.")?],
            Some(names) => names
                .as_slice()
                .iter()
                .map(|name| compile("layers_pattern", name, &format!(r"\A.*\.{name}\.(\d+)\.")))
                .collect::<Result<_>>()?,
        };
        let ends_with = |field, key: &str| compile(field, key, &format!(r"\A(.*\.)?({key})\z"));
        let ranks =
            config.rank_pattern.iter().map(|(key, &r)| Ok((ends_with("rank_pattern", key)?, r))).collect::<Result<_>>()?;
        let alphas =
            config.alpha_pattern.iter().map(|(key, &a)| Ok((ends_with("alpha_pattern", key)?, a))).collect::<Result<_>>()?;
        Ok(Self { config, include, exclude, layers, ranks, alphas })
    }

    /// Whether the linear at `path` gets an adapter.
    pub(crate) fn selects(&self, path: &str) -> bool {
        self.include.selects(path)
            && !self.exclude.as_ref().is_some_and(|exclude| exclude.selects(path))
            && self
                .config
                .layers_to_transform
                .as_ref()
                .is_none_or(|wanted| self.layer(path).is_some_and(|n| wanted.as_slice().contains(&n)))
    }

    fn layer(&self, path: &str) -> Option<usize> {
        self.layers.iter().find_map(|regex| regex.captures(path).ok()??.get(1)?.as_str().parse().ok())
    }

    /// Rank of the linear at `path`.
    pub(crate) fn rank(&self, path: &str) -> usize {
        self.ranks.iter().find(|(regex, _)| matches(regex, path)).map_or(self.config.r, |(_, r)| *r)
    }

    /// Alpha of the linear at `path`.
    pub(crate) fn alpha(&self, path: &str) -> f64 {
        self.alphas.iter().find(|(regex, _)| matches(regex, path)).map_or(self.config.lora_alpha, |(_, alpha)| *alpha)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::OneOrMany;

    fn check(config: &AdapterConfig, selected: &[&str], left: &[&str]) {
        let targets = Targets::new(config).unwrap();
        for path in selected {
            assert!(targets.selects(path), "{path} should be selected by {config:?}");
        }
        for path in left {
            assert!(!targets.selects(path), "{path} should be left by {config:?}");
        }
    }

    const Q0: &str = "model.layers.0.self_attn.q_proj";
    const V1: &str = "model.layers.1.self_attn.v_proj";
    const DOWN2: &str = "model.layers.2.mlp.down_proj";

    #[test]
    fn names_match_whole_parts_at_the_end() {
        let names = |names: &[&str]| AdapterConfig {
            target_modules: Some(TargetModules::Names(names.iter().map(|&n| n.to_owned()).collect())),
            ..AdapterConfig::default()
        };
        check(&names(&["q_proj", "mlp.down_proj"]), &[Q0, DOWN2], &[V1, "model.layers.0.self_attn.xq_proj"]);
        check(&AdapterConfig::default(), &[Q0, V1], &[DOWN2]);
    }

    #[test]
    fn a_string_is_a_regex_for_the_whole_path_and_all_linear_leaves_the_head() {
        let pattern =
            |p: &str| AdapterConfig { target_modules: Some(TargetModules::Pattern(p.to_owned())), ..AdapterConfig::default() };
        check(&pattern(r".*\.[01]\.self_attn\..*"), &[Q0, V1], &[DOWN2]);
        check(&pattern("q_proj"), &[], &[Q0]);
        check(&pattern("all-linear"), &[Q0, V1, DOWN2], &["lm_head"]);
        assert!(matches!(Targets::new(&pattern("(")), Err(Error::Pattern { field: "target_modules", .. })));
    }

    #[test]
    fn exclusions_and_layers_narrow_the_selection() {
        let config = AdapterConfig {
            target_modules: Some(TargetModules::Pattern("all-linear".to_owned())),
            exclude_modules: Some(TargetModules::Names(vec!["v_proj".to_owned()])),
            layers_to_transform: Some(OneOrMany::Many(vec![0, 1])),
            ..AdapterConfig::default()
        };
        check(&config, &[Q0], &[V1, DOWN2]);
    }

    #[test]
    fn the_first_pattern_that_ends_the_path_gives_rank_and_alpha() {
        let config = AdapterConfig {
            rank_pattern: [("q_proj".to_owned(), 2), (r"layers\.[12]\.mlp\.down_proj".to_owned(), 32)].into(),
            alpha_pattern: [("q_proj".to_owned(), 4.0)].into(),
            ..AdapterConfig::default()
        };
        let targets = Targets::new(&config).unwrap();
        assert_eq!([Q0, V1, DOWN2].map(|path| targets.rank(path)), [2, 8, 32]);
        assert_eq!([Q0, V1].map(|path| targets.alpha(path)), [4.0, 8.0]);
    }
}
