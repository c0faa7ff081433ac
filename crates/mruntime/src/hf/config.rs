//! config.json of a Qwen2 directory, as transformers 4 and 5 write it.

use std::path::Path;

use mrt_format::Qwen2Config;
use serde_json::{Map, Value};

use super::HfError;

/// The fields of one JSON object file, read with errors that name the file and the field.
pub(super) struct Fields<'a> {
    file: &'a Path,
    map: Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn parse(file: &'a Path, json: &[u8]) -> Result<Self, HfError> {
        match serde_json::from_slice(json) {
            Ok(Value::Object(map)) => Ok(Fields { file, map }),
            Ok(other) => Err(HfError::bad(file, format!("must be a JSON object, not {}", kind(&other)))),
            Err(e) => Err(HfError::bad(file, format!("is not JSON: {e}; fetch the file again"))),
        }
    }

    /// The field's value; an explicit `null` counts as absent, as it does in transformers.
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    pub(super) fn bad(&self, problem: impl Into<String>) -> HfError {
        HfError::bad(self.file, problem)
    }

    fn wrong(&self, name: &str, value: &Value, expected: &str) -> HfError {
        self.bad(format!("{name} is {}; it must be {expected}", shown(value)))
    }

    pub(super) fn u32(&self, name: &str) -> Result<Option<u32>, HfError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_u64().and_then(|n| u32::try_from(n).ok());
        number.map(Some).ok_or_else(|| self.wrong(name, value, "a whole number from 0 to 4294967295"))
    }

    pub(super) fn f64(&self, name: &str) -> Result<Option<f64>, HfError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.wrong(name, value, "a number"))
    }

    pub(super) fn bool(&self, name: &str) -> Result<Option<bool>, HfError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(name, value, "true or false"))
    }

    fn size(&self, name: &str) -> Result<u32, HfError> {
        self.u32(name)?.ok_or_else(|| self.bad(format!("{name} is missing; a Qwen2 config must state it")))
    }

    /// Refuses the field unless it is absent or one of `accepted`.
    fn only(&self, name: &str, accepted: &[&str]) -> Result<(), HfError> {
        match self.get(name) {
            Some(value) if !value.as_str().is_some_and(|s| accepted.contains(&s)) => {
                Err(self.wrong(name, value, &format!("{:?}: this converter knows Qwen2 only", accepted[0])))
            }
            _ => Ok(()),
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value as it stands in the file, cut to what fits into a line.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// Reads the sizes that the runtime needs and refuses what it would compute wrongly.
///
/// Absent fields take the value that transformers' `Qwen2Config` gives them where that value is a convention
/// (`rms_norm_eps` 1e-6, RoPE base 10000, untied embeddings); absent sizes are errors.
pub(super) fn parse(file: &Path, json: &[u8]) -> Result<Qwen2Config, HfError> {
    let fields = Fields::parse(file, json)?;
    if fields.get("model_type").is_none() {
        return Err(fields.bad("model_type is missing; it must be \"qwen2\""));
    }
    fields.only("model_type", &["qwen2"])?;
    if let Some(value) = fields.get("architectures") {
        let names = value.as_array().map(Vec::as_slice).unwrap_or_default();
        if names.len() != 1 || names[0] != "Qwen2ForCausalLM" {
            return Err(fields.wrong("architectures", value, "[\"Qwen2ForCausalLM\"]"));
        }
    }
    if let Some(value) = fields.get("quantization_config") {
        let problem =
            format!("quantization_config is {}; convert the model before quantisation", shown(value));
        return Err(fields.bad(problem));
    }
    fields.only("hidden_act", &["silu"])?;
    let num_layers = fields.size("num_hidden_layers")?;
    full_attention_only(&fields, num_layers)?;

    let hidden_size = fields.size("hidden_size")?;
    let num_heads = fields.size("num_attention_heads")?;
    // transformers: an explicit null means as many as there are query heads; its default of 32 for an absent
    // field fits only one size of model, so that we ask for it.
    let num_kv_heads = match fields.map.get("num_key_value_heads") {
        Some(Value::Null) => num_heads,
        _ => fields.size("num_key_value_heads")?,
    };
    let head_dim = match fields.u32("head_dim")? {
        Some(head_dim) => head_dim,
        None if num_heads > 0 && hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            return Err(fields.bad(format!(
                "hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, and there is no head_dim"
            )));
        }
    };
    let config = Qwen2Config {
        hidden_size,
        intermediate_size: fields.size("intermediate_size")?,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        vocab_size: fields.size("vocab_size")?,
        max_position_embeddings: fields.size("max_position_embeddings")?,
        rms_norm_eps: fields.f64("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta: rope_theta(&fields)?,
        tie_word_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(false),
    };
    config.validate().map_err(|mut e| {
        e.field = match e.field {
            "num_layers" => "num_hidden_layers",
            "num_heads" => "num_attention_heads",
            "num_kv_heads" => "num_key_value_heads",
            same => same,
        };
        fields.bad(e.to_string())
    })?;
    Ok(config)
}

fn full_attention_only(fields: &Fields, num_layers: u32) -> Result<(), HfError> {
    if fields.bool("use_sliding_window")? == Some(true) {
        return Err(fields.bad(
            "use_sliding_window is true; sliding-window attention is not supported, only models trained without it",
        ));
    }
    let Some(value) = fields.get("layer_types") else { return Ok(()) };
    let types = value.as_array().map(Vec::as_slice).unwrap_or_default();
    match types.iter().find(|t| *t != "full_attention") {
        Some(other) => {
            Err(fields.bad(format!("layer_types has {}; only \"full_attention\" is supported", shown(other))))
        }
        None if types.len() != num_layers as usize => Err(fields.wrong(
            "layer_types",
            value,
            &format!("a list of num_hidden_layers = {num_layers} names"),
        )),
        None => Ok(()),
    }
}

/// The RoPE base: `rope_theta` (transformers 4) or `rope_parameters.rope_theta` (transformers 5).
fn rope_theta(fields: &Fields) -> Result<f64, HfError> {
    let mut theta = fields.f64("rope_theta")?;
    whole_rotation(fields, fields, "")?;
    for object in ["rope_parameters", "rope_scaling"] {
        let Some(value) = fields.get(object) else { continue };
        let Value::Object(map) = value else { return Err(fields.wrong(object, value, "an object or null")) };
        let rope = Fields { file: fields.file, map: map.clone() };
        for (key, value) in map {
            match key.as_str() {
                "rope_type" | "type" if value == "default" => {}
                "rope_theta" | "partial_rotary_factor" => {}
                _ => {
                    return Err(fields.bad(format!(
                        "{object}.{} is {}; only RoPE of type \"default\" without scaling is supported",
                        key.escape_debug(),
                        shown(value)
                    )));
                }
            }
        }
        whole_rotation(fields, &rope, &format!("{object}."))?;
        if let Some(inner) = rope.f64("rope_theta")? {
            if theta.is_some_and(|outer| outer != inner) {
                return Err(fields.bad(format!(
                    "rope_theta is given twice, as {} and as {inner} in {object}; keep one",
                    theta.unwrap_or_default()
                )));
            }
            theta = Some(inner);
        }
    }
    Ok(theta.unwrap_or(10_000.0))
}

/// RoPE over a part of the head is not computed here.
fn whole_rotation(fields: &Fields, object: &Fields, prefix: &str) -> Result<(), HfError> {
    match object.f64("partial_rotary_factor")? {
        Some(factor) if factor != 1.0 => {
            Err(fields.bad(format!("{prefix}partial_rotary_factor is {factor}; only 1.0 is supported")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn qwen25() -> Value {
        json!({
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
            "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
            "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
            "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
            "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true,
            "use_sliding_window": false, "vocab_size": 151936
        })
    }

    fn read(value: &Value) -> Result<Qwen2Config, String> {
        parse(Path::new("config.json"), value.to_string().as_bytes()).map_err(|e| e.to_string())
    }

    /// The Qwen2.5-0.5B config with fields replaced; a replacement by "absent" removes the field.
    fn with(changes: Value) -> Result<Qwen2Config, String> {
        let mut config = qwen25();
        for (key, value) in changes.as_object().unwrap() {
            if value == "absent" {
                config.as_object_mut().unwrap().remove(key);
            } else {
                config[key] = value.clone();
            }
        }
        read(&config)
    }

    #[test]
    fn reads_a_config_of_transformers_4() {
        let expected = Qwen2Config {
            hidden_size: 896,
            intermediate_size: 4864,
            num_layers: 24,
            num_heads: 14,
            num_kv_heads: 2,
            head_dim: 64,
            vocab_size: 151936,
            max_position_embeddings: 32768,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
            tie_word_embeddings: true,
        };
        assert_eq!(read(&qwen25()), Ok(expected));
    }

    #[test]
    fn reads_a_config_of_transformers_5() {
        let changes = json!({
            "rope_theta": "absent", "torch_dtype": "absent", "dtype": "bfloat16", "sliding_window": null,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "layer_types": vec!["full_attention"; 24], "pad_token_id": null,
        });
        assert_eq!(with(changes), read(&qwen25()));
    }

    #[test]
    fn takes_what_transformers_takes() {
        let ok = |changes: Value| with(changes.clone()).unwrap_or_else(|e| panic!("{changes}: {e}"));
        assert!(!ok(json!({"tie_word_embeddings": "absent"})).tie_word_embeddings);
        assert_eq!(ok(json!({"rms_norm_eps": "absent"})).rms_norm_eps, 1e-6);
        assert_eq!(ok(json!({"rope_theta": "absent"})).rope_theta, 10_000.0);
        assert_eq!(ok(json!({"rope_theta": 500000})).rope_theta, 500_000.0);
        assert_eq!(ok(json!({"rope_parameters": {"rope_theta": 1e6}})).rope_theta, 1e6);
        assert_eq!(
            ok(json!({"rope_theta": "absent", "rope_scaling": {"type": "default", "rope_theta": 5e5}}))
                .rope_theta,
            5e5
        );
        assert_eq!(ok(json!({"rope_scaling": {}})).rope_theta, 1e6);
        assert_eq!(ok(json!({"num_key_value_heads": null})).num_kv_heads, 14);
        assert_eq!(ok(json!({"head_dim": 128})).head_dim, 128);
        assert_eq!(ok(json!({"head_dim": null})).head_dim, 64);
        assert_eq!(ok(json!({"hidden_size": 100, "num_attention_heads": 6, "head_dim": 32})).head_dim, 32);
        assert_eq!(ok(json!({"architectures": "absent", "hidden_act": "absent"})).hidden_size, 896);
        assert_eq!(ok(json!({"partial_rotary_factor": 1.0})).head_dim, 64);
    }

    #[test]
    fn refuses_with_one_line_that_names_field_and_value() {
        let table = [
            (json!({"model_type": "absent"}), "model_type is missing"),
            (json!({"model_type": "qwen3"}), "model_type is \"qwen3\""),
            (json!({"architectures": ["Qwen2ForSequenceClassification"]}), "architectures is [\"Qwen2ForSeq"),
            (json!({"architectures": "Qwen2ForCausalLM"}), "architectures is \"Qwen2ForCausalLM\""),
            (json!({"hidden_act": "gelu"}), "hidden_act is \"gelu\""),
            (
                json!({"quantization_config": {"quant_method": "gptq"}}),
                "quantization_config is {\"quant_method\"",
            ),
            (json!({"use_sliding_window": true}), "use_sliding_window is true"),
            (json!({"use_sliding_window": "no"}), "use_sliding_window is \"no\""),
            (json!({"layer_types": ["sliding_attention"]}), "layer_types has \"sliding_attention\""),
            (json!({"layer_types": ["full_attention"]}), "num_hidden_layers = 24"),
            (json!({"layer_types": 3}), "layer_types is 3"),
            (json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}), "rope_scaling."),
            (json!({"rope_scaling": "linear"}), "rope_scaling is \"linear\""),
            (json!({"rope_parameters": {"rope_type": "llama3"}}), "rope_parameters.rope_type is \"llama3\""),
            (
                json!({"rope_parameters": {"rope_type": "default", "factor": 2.0}}),
                "rope_parameters.factor is 2.0",
            ),
            (
                json!({"rope_parameters": {"rope_theta": 1e4}}),
                "rope_theta is given twice, as 1000000 and as 10000",
            ),
            (
                json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
                "rope_parameters.full_attention",
            ),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
            (
                json!({"rope_parameters": {"partial_rotary_factor": 0.25}}),
                "rope_parameters.partial_rotary_factor is 0.25",
            ),
            (json!({"rope_theta": "1e6"}), "rope_theta is \"1e6\""),
            (json!({"rope_theta": 0.0}), "rope_theta is 0"),
            (json!({"rope_theta": -1.0}), "rope_theta is -1"),
            (json!({"rms_norm_eps": -1e-6}), "rms_norm_eps is -0.000001"),
            (json!({"rms_norm_eps": [1]}), "rms_norm_eps is [1]"),
            (json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings is \"yes\""),
            (json!({"hidden_size": "absent"}), "hidden_size is missing"),
            (json!({"hidden_size": null}), "hidden_size is missing"),
            (json!({"hidden_size": "896"}), "hidden_size is \"896\""),
            (json!({"hidden_size": 896.0}), "hidden_size is 896.0"),
            (json!({"hidden_size": -896}), "hidden_size is -896"),
            (json!({"hidden_size": 4294967296u64}), "hidden_size is 4294967296"),
            (json!({"hidden_size": 900}), "hidden_size 900 is not a multiple of num_attention_heads 14"),
            (json!({"intermediate_size": "absent"}), "intermediate_size is missing"),
            (json!({"intermediate_size": 0}), "intermediate_size is 0"),
            (json!({"num_hidden_layers": "absent"}), "num_hidden_layers is missing"),
            (json!({"num_hidden_layers": 4000000000u32}), "num_hidden_layers is 4000000000"),
            (json!({"num_attention_heads": "absent"}), "num_attention_heads is missing"),
            (json!({"num_attention_heads": 0}), "num_attention_heads 0"),
            (json!({"num_key_value_heads": "absent"}), "num_key_value_heads is missing"),
            (json!({"num_key_value_heads": 0}), "num_key_value_heads is 0"),
            (json!({"num_key_value_heads": 4}), "num_key_value_heads is 4"),
            (json!({"head_dim": 63}), "head_dim is 63"),
            (json!({"head_dim": true}), "head_dim is true"),
            (json!({"vocab_size": "absent"}), "vocab_size is missing"),
            (json!({"vocab_size": 4294967295u32}), "vocab_size is 4294967295"),
            (json!({"max_position_embeddings": "absent"}), "max_position_embeddings is missing"),
            (json!({"max_position_embeddings": 0}), "max_position_embeddings is 0"),
        ];
        for (changes, expected) in table {
            let message = with(changes.clone()).expect_err(&changes.to_string());
            assert!(
                message.starts_with("config.json: ") && message.contains(expected),
                "{changes}: {message}"
            );
            assert!(!message.contains('\n'), "{changes}: {message}");
        }
    }

    #[test]
    fn refuses_what_is_no_json_object() {
        for text in ["", "[]", "{", "{\"hidden_size\": NaN}", "\u{1F600}", "{}"] {
            let message = parse(Path::new("config.json"), text.as_bytes()).unwrap_err().to_string();
            assert!(message.starts_with("config.json: ") && !message.contains('\n'), "{text}: {message}");
        }
        let deep = "[".repeat(100_000);
        assert!(
            parse(Path::new("config.json"), deep.as_bytes()).unwrap_err().to_string().contains("recursion")
        );
    }

    #[test]
    fn cuts_long_values() {
        let message = with(json!({"quantization_config": {"long": "x".repeat(5000)}})).unwrap_err();
        assert!(message.len() < 250, "{message}");
    }
}
