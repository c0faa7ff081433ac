//! Conversations as the text that a model was trained on, by its Jinja template, as transformers does it.

use std::io;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, State, Value, context};
use mrt_format::{CHAT_TEMPLATE, TOKEN_NAMES};
use mruntime::Model;

use crate::namespace::{namespace, with_assignments_as_calls};
use crate::tojson::tojson;
use crate::{SpecialTokenNames, TextError, find_chat_template};

const NAME: &str = "chat_template";
/// Steps of work, or 64 bytes of data each, that one rendering may take: enough for ten thousand messages with Qwen2.5's
/// template. There is a limit because a template is part of a downloaded file.
const FUEL: u64 = 4_000_000;
/// Longest source of a template, in bytes: four times the longest in use.
const MAX_SOURCE_BYTES: usize = 64 << 10;
/// Stack for compiling and rendering, which recurse as deep as expressions and values are nested. Within the limits of
/// source and fuel that is far deeper than a thread's usual stack holds. Unused stack costs nothing.
const STACK_BYTES: usize = 256 << 20;
/// Time that compiling or rendering may take; ten thousand messages take some tenths of a second. Comparing
/// lists that hold one list many times over, or joining them to text, costs no fuel and may take for ever.
const MAX_TIME: Duration = Duration::from_secs(5);
/// Longest text that a template may write, in bytes: more than the largest context holds.
const MAX_TEXT_BYTES: usize = 16 << 20;

/// Longest message of an error; the rest is left out.
const MAX_MESSAGE_CHARS: usize = 500;

/// A model's chat template, ready to render.
///
/// What transformers gives to templates is there: `trim_blocks` and `lstrip_blocks`, `raise_exception`, `strftime_now`,
/// its `tojson`, `break` and `continue`, `{% generation %}`, the methods of Python's strings and dicts. Rendering has
/// limits of time, memory and length, so a hostile template ends with an error.
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
}

impl ChatTemplate {
    /// Compiles a template's source. `names` become its variables `bos_token`, `eos_token` and so on.
    ///
    /// # Errors
    ///
    /// [`TextError::Template`] with the line if the source is not valid Jinja.
    pub fn new(source: &str, names: &SpecialTokenNames) -> Result<ChatTemplate, TextError> {
        if source.len() > MAX_SOURCE_BYTES {
            let message = format!("it has {} bytes, more than {MAX_SOURCE_BYTES}", source.len());
            return Err(TextError::Template { line: None, message });
        }
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        environment.set_syntax(syntax.trim_blocks(true).lstrip_blocks(true).build().map_err(template_error)?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(python_method);
        minijinja_contrib::add_to_environment(&mut environment);
        environment.add_filter("tojson", tojson);
        environment.add_test("iterable", |value: Value| !value.is_none() && value.try_iter().is_ok());
        environment.add_function("namespace", namespace);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        for (variable, token) in names.iter() {
            environment.add_global(variable.to_owned(), token);
        }
        if !names.additional.is_empty() {
            environment.add_global("additional_special_tokens", Value::from(names.additional.clone()));
        }
        let source = with_assignments_as_calls(&without_generation_blocks(source));
        let environment = on_large_stack(|| {
            environment.add_template_owned(NAME, source).map_err(template_error)?;
            Ok(environment)
        })?;
        Ok(ChatTemplate { environment: Arc::new(environment) })
    }

    /// Compiles the chat template of a model file; `None` if it has none.
    ///
    /// # Errors
    ///
    /// When a section is damaged, and as [`new`](Self::new).
    pub fn from_model(model: &Model) -> Result<Option<ChatTemplate>, TextError> {
        let source = find_chat_template(model.section(CHAT_TEMPLATE)?.as_deref(), None)?;
        let names = model.section(TOKEN_NAMES)?;
        let names =
            names.map(|content| SpecialTokenNames::from_section(&content)).transpose()?.unwrap_or_default();
        source.map(|source| ChatTemplate::new(&source, &names)).transpose()
    }

    /// Renders a conversation.
    ///
    /// `messages` are objects with `role` and `content` (and whatever else the template knows, such as `tool_calls`),
    /// `tools` are the JSON schemas of functions, `add_generation_prompt` asks for the beginning of an answer.
    ///
    /// # Errors
    ///
    /// [`TextError::Template`] with the line if the template refuses the messages (`raise_exception`), fails, or takes
    /// too long; or if the text is longer than 16 MiB.
    pub fn render(
        &self,
        messages: &[serde_json::Value],
        tools: Option<&[serde_json::Value]>,
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let environment = Arc::clone(&self.environment);
        let context = context! {
            messages => Value::from(Serde(messages)),
            tools => Value::from(Serde(tools)),
            documents => Value::from(()),
            add_generation_prompt,
        };
        on_large_stack(move || {
            let template = environment.get_template(NAME).map_err(template_error)?;
            let mut text = LimitedText(Vec::new());
            template.render_captured_to(context, &mut text).map_err(template_error)?;
            Ok(String::from_utf8_lossy(&text.0).into_owned())
        })
    }
}

/// Runs in a thread with [`STACK_BYTES`] of stack, and waits for it no longer than [`MAX_TIME`].
fn on_large_stack<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TextError> + Send + 'static,
) -> Result<T, TextError> {
    let failed = |message: String| TextError::Template { line: None, message };
    let (sender, receiver) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
    let thread = thread
        .spawn(move || sender.send(work()))
        .map_err(|e| failed(format!("cannot start a thread: {e}")))?;
    match receiver.recv_timeout(MAX_TIME) {
        Ok(result) => {
            let _ = thread.join();
            result
        }
        // A thread that is late is left to itself: nothing can stop it but the end of the process.
        Err(mpsc::RecvTimeoutError::Timeout) => {
            Err(failed(format!("it takes longer than {} seconds", MAX_TIME.as_secs())))
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(failed("the template engine panicked".to_owned())),
    }
}

/// Methods of Python's strings, lists and dicts. Those that can make a short text long are paid for beforehand.
fn python_method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let text = value.as_str().unwrap_or_default();
    let arg_len = |i: usize| args.get(i).and_then(Value::len).unwrap_or_default();
    let numbers = || text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let bytes = match name {
        "replace" => (text.len() / arg_len(0).max(1) + 1).saturating_mul(arg_len(1)),
        "join" => text.len().saturating_mul(arg_len(0)),
        "format" => numbers().map(|n| n.parse().unwrap_or(usize::MAX)).fold(0, usize::saturating_add),
        _ => 0,
    };
    state.consume_fuel(bytes as u64 / 64)?;
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// transformers marks the assistant's words by `{% generation %}` blocks, to train on. Here they only open a scope.
fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        rest = tag;
        let name = tag.trim_start_matches(['-', '+']).trim_start();
        let Some(end) = ["endgeneration", "generation"].into_iter().find(|&word| {
            name.strip_prefix(word)
                .is_some_and(|after| after.trim_start().trim_start_matches(['-', '+']).starts_with("%}"))
        }) else {
            continue;
        };
        out.push_str(&tag[..tag.len() - name.len()]);
        out.push_str(if end == "generation" { "with" } else { "endwith" });
        rest = &name[end.len()..];
    }
    out + rest
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// Tells a template's own refusal from the engine's errors.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// The local time, formatted as by Python's `strftime`.
fn strftime_now(format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, &jiff::Zoned::now())
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
}

fn template_error(error: Error) -> TextError {
    let raised = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<Raised>());
    let message = match (error.kind(), raised, error.detail()) {
        (_, Some(raised), _) => raised.0.clone(),
        (ErrorKind::OutOfFuel, ..) => "it takes too many steps or too much memory".to_owned(),
        // Only LimitedText fails to write.
        (ErrorKind::WriteFailure, ..) => format!("its text is longer than {} MiB", MAX_TEXT_BYTES >> 20),
        (kind, _, Some(detail)) => format!("{kind}: {detail}"),
        (kind, _, None) => kind.to_string(),
    };
    // The words may be the template's own.
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let message = message.chars().filter(|c| !c.is_control()).take(MAX_MESSAGE_CHARS).collect();
    TextError::Template { line: error.line(), message }
}

/// Takes text up to [`MAX_TEXT_BYTES`].
struct LimitedText(Vec<u8>);

impl io::Write for LimitedText {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MAX_TEXT_BYTES - self.0.len() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str) -> Result<String, String> {
        let messages = [json!({"role": "user", "content": "hi"})];
        ChatTemplate::new(source, &SpecialTokenNames::default())
            .and_then(|template| template.render(&messages, None, false))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn errors_name_the_line() {
        assert_eq!(
            render(
                "a\n{% if messages[0].role != 'system' %}\n{{ raise_exception('no\nsystem') }}{% endif %}"
            )
            .unwrap_err(),
            "chat template, line 3: no system"
        );
        assert_eq!(
            render("{{ raise_exception('no\\u001b[2J' ~ 'o' * 1000) }}").unwrap_err(),
            format!("chat template, line 1: no[2J{}", "o".repeat(495))
        );
        assert!(render("a\n\n{% if %}").unwrap_err().starts_with("chat template, line 3: syntax error: "));
        assert_eq!(
            render("\n{{ messages[0].content.frobnicate() }}").unwrap_err(),
            "chat template, line 2: unknown method: string has no method named frobnicate"
        );
    }

    #[test]
    fn hostile_templates_end_with_an_error() {
        const STEPS: &str = "it takes too many steps or too much memory";
        // Lists that hold the one before twice: the last has 2^60 elements to print or to compare.
        let doubled = |name: &str| {
            let step = format!("{{% set {name} = [{name}, {name}] %}}");
            format!("{{% set {name} = ['x'] %}}{}", step.repeat(60))
        };
        let nested = |body: &str| {
            let range = "in range(100000) %}";
            format!(
                "{{% set ns = namespace(s='ab') %}}{{% for i {range}{{% for j {range}{body}{{% endfor %}}{{% endfor %}}"
            )
        };
        for (source, message) in [
            (nested(""), STEPS),
            (nested("{% set ns.s = ns.s + ns.s %}"), STEPS),
            (nested(&"x".repeat(1000)), "its text is longer than 16 MiB"),
            ("{{ 'a' * 1000000000 }}".to_owned(), STEPS),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".to_owned(), "recursion limit exceeded"),
            (format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000)), "maximum recursion"),
            ("{{ 'abc'.replace('', 'x' * 100000).replace('x', 'y' * 100000) }}".to_owned(), STEPS),
            ("{{ ('x' * 100000).join(range(100000)) }}".to_owned(), STEPS),
            ("{{ '{:1000000000}'.format(1) }}".to_owned(), STEPS),
            (" ".repeat(MAX_SOURCE_BYTES + 1), "65537 bytes"),
            ("{% include 'x' %}".to_owned(), "unknown statement include"),
            (doubled("a") + "{{ a | tojson }}", STEPS),
            (doubled("a") + "{{ a }}", "its text is longer than 16 MiB"),
            (doubled("a") + &doubled("b") + "{{ a == b }}", "it takes longer than 5 seconds"),
        ] {
            let error = render(&source).unwrap_err();
            assert!(error.contains(message), "{error}: {}", &source[source.len().saturating_sub(60)..]);
        }
        let cycle = "{% set ns = namespace(a=1) %}{% set ns.b = [ns, {'c': ns}] %}";
        assert_eq!(render(&format!("{cycle}{{{{ ns }}}}")).unwrap(), "<namespace>");
        assert_eq!(
            render(&format!("{cycle}{{{{ ns.b ~ '' }}}}")).unwrap(),
            "[<namespace>, {'c': <namespace>}]"
        );
        assert_eq!(render(&format!("{cycle}{{{{ ns == namespace(b=ns.b) }}}}")).unwrap(), "False");
        assert!(render(&format!("{cycle}{{{{ ns.b | tojson }}}}")).unwrap_err().contains("is not JSON"));
        let deep = "{% set ns = namespace(s=[], t=[]) %}{% for i in range(99999) %}{% set ns.s = [ns.s] %}{% set ns.t = \
                    [ns.t] %}{% endfor %}";
        assert!(render(&format!("{deep}{{{{ ns.s == ns.t }}}}")).is_ok());
        let _ = render(&format!("{deep}{{{{ ns.s }}}}"));
        // As deep as a source of legal length can nest: no stack overflow.
        assert_eq!(render(&format!("{{{{ {}1 }}}}", "-".repeat(60_000))).unwrap(), "1");
    }

    #[test]
    fn the_limits_leave_room_for_long_conversations() {
        let message = |role: &str| json!({"role": role, "content": "word ".repeat(20)});
        let messages = vec![[message("user"), message("assistant")]; 5_000].concat();
        let source = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}\
            {% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}";
        let template = ChatTemplate::new(source, &SpecialTokenNames::default()).unwrap();
        let text = template.render(&messages, None, true).unwrap();
        assert_eq!(text.matches("<|im_end|>").count(), 10_000);
    }
}
