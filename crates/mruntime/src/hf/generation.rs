//! Sampling defaults and stop tokens, as transformers would take them from the directory.

use std::path::Path;

use mrt_format::{FormatError, GenerationDefaults, MAX_STOP_TOKENS, Qwen2Config};
use serde_json::Value;

use super::HfError;
use super::config::Fields;

/// Reads generation_config.json; token ids that it does not give come from config.json, absent sampling options
/// are those of transformers' `generate` (greedy; temperature 1, top-k 50, top-p 1, no min-p, penalty 1).
pub(super) fn parse(
    dir: &Path,
    config_json: &[u8],
    generation_json: Option<&[u8]>,
    cfg: &Qwen2Config,
) -> Result<GenerationDefaults, HfError> {
    let (config_path, generation_path) = (dir.join("config.json"), dir.join("generation_config.json"));
    let config = Fields::parse(&config_path, config_json)?;
    let generation = Fields::parse(&generation_path, generation_json.unwrap_or(b"{}"))?;

    let token_ids = |name| match token_ids(&generation, name, cfg)? {
        Some(ids) => Ok(Some(ids)),
        None => token_ids(&config, name, cfg),
    };
    let bos = match token_ids("bos_token_id")?.as_deref() {
        Some([id]) => Some(*id),
        // Only the first token of a text could be one of several, and no Qwen2 model has that.
        Some(_) => return Err(generation.bad("bos_token_id must be one token id")),
        None => None,
    };
    let number =
        |name, default| Ok::<_, HfError>(generation.f64(name)?.map_or(default, |value| value as f32));
    let defaults = GenerationDefaults {
        do_sample: generation.bool("do_sample")?.unwrap_or(false),
        temperature: number("temperature", 1.0)?,
        top_p: number("top_p", 1.0)?,
        min_p: number("min_p", 0.0)?,
        repetition_penalty: number("repetition_penalty", 1.0)?,
        top_k: generation.u32("top_k")?.unwrap_or(50),
        bos_token: bos,
        stop_tokens: token_ids("eos_token_id")?.unwrap_or_default(),
    };
    // The format's own check of the ranges.
    match defaults.to_bytes(cfg) {
        Ok(_) => Ok(defaults),
        Err(FormatError::BadGeneration { field, value, expected }) => {
            Err(generation.bad(format!("{field} is {value}; it must be {expected}")))
        }
        Err(other) => Err(generation.bad(other.to_string())),
    }
}

/// A token id or a list of them, each within the vocabulary.
fn token_ids(fields: &Fields, name: &str, cfg: &Qwen2Config) -> Result<Option<Vec<u32>>, HfError> {
    let Some(value) = fields.get(name) else { return Ok(None) };
    let id = |value: &Value| {
        let id = value.as_u64().filter(|&id| id < u64::from(cfg.vocab_size));
        id.map(|id| id as u32).ok_or_else(|| {
            fields.bad(format!(
                "{name} has {value}; token ids are whole numbers below vocab_size {}",
                cfg.vocab_size
            ))
        })
    };
    match value {
        Value::Array(values) if values.len() > MAX_STOP_TOKENS => {
            Err(fields
                .bad(format!("{name} lists {} ids; at most {MAX_STOP_TOKENS} are possible", values.len())))
        }
        Value::Array(values) => values.iter().map(id).collect::<Result<_, _>>().map(Some),
        value => Ok(Some(vec![id(value)?])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const CFG: Qwen2Config = Qwen2Config {
        hidden_size: 8,
        intermediate_size: 6,
        num_layers: 1,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 4,
        vocab_size: 100,
        max_position_embeddings: 16,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        tie_word_embeddings: true,
    };

    fn read(config: Value, generation: Option<Value>) -> Result<GenerationDefaults, String> {
        let generation = generation.map(|json| json.to_string());
        let generation = generation.as_ref().map(|json| json.as_bytes());
        parse(Path::new("DIR"), config.to_string().as_bytes(), generation, &CFG).map_err(|e| e.to_string())
    }

    #[test]
    fn absent_fields_are_those_of_transformers() {
        let defaults = GenerationDefaults { top_k: 50, ..GenerationDefaults::default() };
        assert_eq!(read(json!({}), None), Ok(defaults.clone()));
        assert_eq!(read(json!({}), Some(json!({"top_k": null, "pad_token_id": 3}))), Ok(defaults));
    }

    #[test]
    fn token_ids_come_from_either_file() {
        let ids =
            |config, generation| read(config, generation).map(|d| (d.bos_token, d.stop_tokens)).unwrap();
        let config = json!({"bos_token_id": 1, "eos_token_id": 2});
        assert_eq!(ids(config.clone(), None), (Some(1), vec![2]));
        assert_eq!(ids(config.clone(), Some(json!({"eos_token_id": [7, 8]}))), (Some(1), vec![7, 8]));
        assert_eq!(
            ids(config.clone(), Some(json!({"eos_token_id": 0, "bos_token_id": 9}))),
            (Some(9), vec![0])
        );
        assert_eq!(ids(json!({"eos_token_id": [4, 5]}), Some(json!({}))), (None, vec![4, 5]));
    }

    #[test]
    fn options_are_read() {
        let all = json!({
            "do_sample": true, "temperature": 0.5, "top_k": 20, "top_p": 0.75, "min_p": 0.25,
            "repetition_penalty": 1.5, "bos_token_id": 1, "eos_token_id": [2, 3], "transformers_version": "4.37.0"
        });
        let expected = GenerationDefaults {
            do_sample: true,
            temperature: 0.5,
            top_p: 0.75,
            min_p: 0.25,
            repetition_penalty: 1.5,
            top_k: 20,
            bos_token: Some(1),
            stop_tokens: vec![2, 3],
        };
        assert_eq!(read(json!({"eos_token_id": 9}), Some(all)), Ok(expected));
    }

    #[test]
    fn refuses_with_file_field_and_value() {
        let table = [
            (json!({"temperature": -1}), "temperature is -1; it must be from 0 to 100"),
            (json!({"temperature": 1e39}), "temperature is inf"),
            (json!({"temperature": "hot"}), "temperature is \"hot\"; it must be a number"),
            (json!({"top_p": 2}), "top_p is 2; it must be above 0, at most 1"),
            (json!({"min_p": 1.5}), "min_p is 1.5"),
            (json!({"repetition_penalty": 0}), "repetition_penalty is 0"),
            (json!({"top_k": -1}), "top_k is -1"),
            (json!({"do_sample": 1}), "do_sample is 1"),
            (
                json!({"eos_token_id": 100}),
                "eos_token_id has 100; token ids are whole numbers below vocab_size 100",
            ),
            (json!({"eos_token_id": [3, -1]}), "eos_token_id has -1"),
            (json!({"eos_token_id": "</s>"}), "eos_token_id has \"</s>\""),
            (json!({"eos_token_id": vec![1; 17]}), "eos_token_id lists 17 ids; at most 16"),
            (json!({"bos_token_id": [1, 2]}), "bos_token_id must be one token id"),
        ];
        for (generation, expected) in table {
            let message = read(json!({}), Some(generation.clone())).expect_err(expected);
            let expected = format!("DIR/generation_config.json: {expected}");
            assert!(message.starts_with(&expected), "{generation}: {message}");
        }
        let message = read(json!({"eos_token_id": 1.5}), None).unwrap_err();
        assert!(message.starts_with("DIR/config.json: eos_token_id has 1.5"), "{message}");
    }
}
