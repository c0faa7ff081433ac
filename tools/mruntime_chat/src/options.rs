//! The command line.

use std::path::{Path, PathBuf};

use clap::Parser;
use mr_cli::{FileError, ModelSource, NumericsArg};
use mruntime::{Digest, GenerationDefaults, Isa, Qwen2Config, Sampler, SamplingOptions};

/// Longer contexts are the user's choice: the KV cache takes memory for each position.
const DEFAULT_CONTEXT: u32 = 4096;

/// Chat with a model in a terminal
///
/// With -p or -f, one answer; otherwise a conversation. What is piped in is a conversation, too: each line is a message,
/// /reset begins a new conversation, and every answer ends with a newline. Sampling options that are not given are
/// those that the model's makers chose. Speeds are shown on stderr at the end.
#[derive(Parser)]
#[command(version)]
pub struct Cli {
    #[command(flatten)]
    pub model: ModelSource,
    /// Check every byte of FILE.mrt before use
    #[arg(long, conflicts_with = "model_dir")]
    pub verify: bool,
    /// Refuse FILE.mrt unless this is its root digest, as its publisher states it
    #[arg(long, value_name = "DIGEST", conflicts_with = "model_dir")]
    pub expect_root: Option<Digest>,
    /// Answer this and exit
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Answer the text of this file, without its last newline, and exit; - for standard input
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// Instructions to the model that go before the conversation
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Continue texts as they are: no chat template, no memory of what went before
    #[arg(long, conflicts_with = "system")]
    pub raw: bool,
    /// Always take the most probable token, whatever the model's defaults are
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p", "seed"])]
    greedy: bool,
    /// Divide logits by this; 0 takes the most probable token after the repetition penalty
    #[arg(long, visible_alias = "temp", value_name = "T", allow_negative_numbers = true, value_parser = temperature)]
    temperature: Option<f32>,
    /// Choose among the K most probable tokens; 0 for all
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Choose among the most probable tokens that have probability P together
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = top_p)]
    top_p: Option<f32>,
    /// Choose among tokens at least P times as probable as the most probable one
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = min_p)]
    min_p: Option<f32>,
    /// Make tokens that have occurred less probable (above 1) or more (below); 1 for neither
    #[arg(long, value_name = "R", allow_negative_numbers = true, value_parser = repetition_penalty)]
    repetition_penalty: Option<f32>,
    /// Make the same choices again [default: by chance; shown at the end]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Tokens of an answer, at most [default: what the context has room for]
    #[arg(short = 'n', long, value_name = "N", value_parser = mr_cli::parse_count)]
    pub max_new_tokens: Option<usize>,
    /// Tokens of the whole conversation, at most [default: what the model was trained for, at most 4096]
    #[arg(short, long, value_name = "N", value_parser = mr_cli::parse_count)]
    ctx: Option<usize>,
    /// Threads of decoding, and of prefill if nothing else is said [default: all fast physical cores]
    #[arg(short, long, value_name = "N", value_parser = mr_cli::parse_threads)]
    pub threads: Option<usize>,
    /// Threads of prefill: the reading of messages, which gains from every core; decoding may not
    #[arg(long, value_name = "N", value_parser = mr_cli::parse_threads)]
    pub threads_batch: Option<usize>,
    #[command(flatten)]
    pub numerics: NumericsArg,
}

impl Cli {
    /// What is to be answered, if it is one text.
    pub fn prompt(&self) -> Result<Option<String>, FileError> {
        let Some(path) = &self.file else { return Ok(self.prompt.clone()) };
        let text = match path == Path::new("-") {
            true => std::io::read_to_string(std::io::stdin()),
            false => std::fs::read_to_string(path),
        };
        let text = text.map_err(|e| FileError::new(path, e))?;
        Ok(Some(text.strip_suffix('\n').unwrap_or(&text).to_owned()))
    }

    /// Positions of the context.
    pub fn context(&self, cfg: &Qwen2Config) -> usize {
        self.ctx.unwrap_or(cfg.max_position_embeddings.min(DEFAULT_CONTEXT) as usize)
    }

    /// The model's defaults with what the command line says instead.
    pub fn sampling(&self, defaults: &GenerationDefaults) -> SamplingOptions {
        let seed = self.seed.unwrap_or_else(seed_by_chance);
        let mut options = SamplingOptions::from_defaults(defaults, seed);
        if self.greedy {
            options = SamplingOptions { seed, ..SamplingOptions::GREEDY };
        } else if self.top_k.is_some() || self.top_p.is_some() || self.min_p.is_some() {
            // Who says what to choose among wants to choose, also where the model's default is greedy.
            options.temperature = defaults.temperature;
        }
        options.temperature = self.temperature.unwrap_or(options.temperature);
        options.top_k = self.top_k.unwrap_or(options.top_k);
        options.top_p = self.top_p.unwrap_or(options.top_p);
        options.min_p = self.min_p.unwrap_or(options.min_p);
        options.repetition_penalty = self.repetition_penalty.unwrap_or(options.repetition_penalty);
        options
    }
}

fn seed_by_chance() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    // Short enough to be typed again.
    RandomState::new().hash_one(()) >> 32
}

/// A number that the sampler accepts where `set` puts it.
fn option(text: &str, set: impl Fn(&mut SamplingOptions, f32)) -> Result<f32, String> {
    let value = text.parse().map_err(|_| "not a number".to_owned())?;
    let mut options = SamplingOptions::GREEDY;
    set(&mut options, value);
    match Sampler::new(options, 0, Isa::PORTABLE) {
        Ok(_) => Ok(value),
        Err(error) => Err(error.to_string()),
    }
}

fn temperature(text: &str) -> Result<f32, String> {
    option(text, |options, value| options.temperature = value)
}

fn top_p(text: &str) -> Result<f32, String> {
    option(text, |options, value| options.top_p = value)
}

fn min_p(text: &str) -> Result<f32, String> {
    option(text, |options, value| options.min_p = value)
}

fn repetition_penalty(text: &str) -> Result<f32, String> {
    option(text, |options, value| options.repetition_penalty = value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(args: &[&str], do_sample: bool) -> SamplingOptions {
        let args = ["mruntime_chat", "-m", "x"].iter().chain(args);
        let defaults = GenerationDefaults {
            do_sample,
            temperature: 0.7,
            top_k: 20,
            repetition_penalty: 1.1,
            ..GenerationDefaults::default()
        };
        Cli::try_parse_from(args).unwrap().sampling(&defaults)
    }

    #[test]
    fn flags_override_the_defaults_of_the_model() {
        let by_default = sampling(&["--seed", "1"], true);
        assert_eq!((by_default.temperature, by_default.top_k, by_default.seed), (0.7, 20, 1));
        let flags =
            ["--temperature", "2", "--top-k", "5", "--top-p", "0.5", "--min-p", "0.25", "--seed", "1"];
        let expected = SamplingOptions {
            temperature: 2.0,
            top_k: 5,
            top_p: 0.5,
            min_p: 0.25,
            repetition_penalty: 1.1,
            seed: 1,
        };
        assert_eq!(sampling(&flags, true), expected);
        assert_eq!(sampling(&flags, false), expected);
    }

    #[test]
    fn greedy_leaves_nothing_of_the_defaults() {
        let greedy = sampling(&["--greedy"], true);
        assert_eq!(SamplingOptions { seed: 0, ..greedy }, SamplingOptions::GREEDY);
        assert_eq!(sampling(&["--greedy", "--repetition-penalty", "1.5"], true).repetition_penalty, 1.5);
    }

    #[test]
    fn a_model_that_is_greedy_by_default_keeps_its_penalty() {
        for options in [sampling(&[], false), sampling(&["--temperature", "0"], true)] {
            assert_eq!((options.temperature, options.repetition_penalty), (0.0, 1.1));
        }
        // Any of the filters asks for sampling.
        for filter in ["--top-k", "--top-p", "--min-p"] {
            assert_eq!(sampling(&[filter, "1"], false).temperature, 0.7);
        }
    }
}
