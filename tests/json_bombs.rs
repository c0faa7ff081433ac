//! JSON that is made to hurt its reader: nested without end, numbers of any size, a flood of keys. Every place that
//! reads JSON of a model meets each of them, on a small stack, and answers with one short line.

#![forbid(unsafe_code)]

use std::fmt::Display;

use mruntime::hf::Qwen2Dir;
use mruntime_tests::fuzz::{DIR_FILES, valid_config_json, valid_safetensors};
use mruntime_text::{SpecialTokenNames, Tokenizer, find_chat_template, prepack_tokenizer};

const MANY: usize = 1 << 20;

/// (what it is, its text); each is an object, or would be one if it were whole.
fn bombs() -> Vec<(&'static str, String)> {
    let keys = |value: &dyn Fn(usize) -> String| {
        let entries: Vec<_> = (0..MANY / 8).map(|i| format!("\"k{i}\":{}", value(i))).collect();
        format!("{{{}}}", entries.join(","))
    };
    let field = |name: &str, value: &str| format!("{{\"{name}\":{value}}}");
    vec![
        ("arrays in arrays, not closed", field("x", &"[".repeat(MANY)).replace('}', "")),
        ("arrays in arrays", field("hidden_size", &("[".repeat(MANY) + &"]".repeat(MANY)))),
        ("objects in objects, not closed", "{\"model\":".repeat(MANY / 8)),
        ("objects in objects", "{\"weight_map\":".repeat(MANY / 8) + "1" + &"}".repeat(MANY / 8)),
        ("a large exponent", field("hidden_size", "1e999999999")),
        ("a number of many digits", field("hidden_size", &"9".repeat(MANY))),
        ("a fraction of many digits", field("rms_norm_eps", &format!("0.{}", "3".repeat(MANY)))),
        ("a flood of keys", keys(&|i| i.to_string())),
        ("a flood of objects", keys(&|_| "{}".to_owned())),
        (
            "one key many times",
            field("model_type", &"1,\"model_type\":".repeat(MANY / 16)).replace(":}", ":1}"),
        ),
        ("a long list", field("architectures", &format!("[{}1]", "1,".repeat(MANY)))),
        ("a long text", field("model_type", &format!("\"{}\"", "a".repeat(8 * MANY)))),
        ("a text of escapes", field("model_type", &format!("\"{}\"", "\\u0000\\n".repeat(MANY)))),
        ("half a surrogate", field("model_type", "\"\\ud800\"")),
    ]
}

/// Runs with the stack of a small thread, 256 KiB.
fn on_a_small_stack(work: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().stack_size(256 << 10).spawn(work).unwrap().join().unwrap();
}

fn check_line(error: impl Display, what: &str) {
    let line = error.to_string();
    assert!(line.lines().count() == 1 && line.len() < 1000, "{what}: {} bytes: {line:.200}", line.len());
}

fn refused<T, E: Display>(result: Result<T, E>, what: &str) {
    check_line(result.err().unwrap_or_else(|| panic!("{what}: is accepted")), what);
}

#[test]
fn model_directories() {
    on_a_small_stack(|| {
        let index = r#"{"weight_map": {"model.norm.weight": "model-1.safetensors"}}"#;
        for (what, bomb) in bombs() {
            for changed in DIR_FILES {
                let dir = tempfile::tempdir().unwrap();
                let write =
                    |name: &str, content: &[u8]| std::fs::write(dir.path().join(name), content).unwrap();
                write("config.json", &valid_config_json());
                if changed == "model.safetensors.index.json" {
                    write(changed, index.as_bytes());
                } else {
                    write("model.safetensors", &valid_safetensors());
                }
                let bytes = match changed {
                    "model.safetensors" => [&(bomb.len() as u64).to_le_bytes(), bomb.as_bytes()].concat(),
                    _ => bomb.clone().into_bytes(),
                };
                write(changed, &bytes);
                let what = format!("{changed}: {what}");
                match Qwen2Dir::open(dir.path()).map(drop) {
                    // It has no field that is known.
                    Ok(()) => assert_eq!(changed, "generation_config.json", "{what}"),
                    Err(error) => {
                        assert!(error.to_string().contains(changed), "{what}: {error}");
                        check_line(error, &what);
                    }
                }
            }
        }
    });
}

#[test]
fn tokenizers_and_templates() {
    on_a_small_stack(|| {
        for (what, bomb) in bombs() {
            let json = bomb.as_bytes();
            refused(Tokenizer::from_json(json), what);
            refused(prepack_tokenizer(json), what);
            let template = format!("{{\"chat_template\":{bomb}}}");
            refused(find_chat_template(None, Some(template.as_bytes())), what);
            // Names that are not asked for may hold anything.
            if let Err(error) = SpecialTokenNames::from_tokenizer_config(json) {
                check_line(error, what);
            }
        }
    });
}
