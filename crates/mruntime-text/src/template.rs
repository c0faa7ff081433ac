//! Conversations as the text that a model was trained on, by its Jinja template, as transformers does it.

use std::io;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use mrt_format::{CHAT_TEMPLATE, TOKEN_NAMES};
use mruntime::Model;

use crate::namespace::{Assignments, namespace};
use crate::tags::rewrite_tags;
use crate::tojson::tojson;
use crate::{SpecialTokenNames, TextError, find_chat_template, python};

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
pub(crate) const MAX_MESSAGE_CHARS: usize = 500;

/// A model's chat template, ready to render.
///
/// What transformers gives to templates is there: `trim_blocks` and `lstrip_blocks`, `raise_exception`, `strftime_now`,
/// its `tojson`, `break` and `continue`, `{% generation %}`. Left out are the methods of Python's strings, lists and dicts
/// that `minijinja_contrib::pycompat` does not have (`rsplit`, for example), and what of Jinja minijinja does not have; a
/// template that uses them ends with an error. Very small and very large floats, unprintable characters and whole
/// dictionaries may be printed otherwise than by Python. Rendering has limits of time, memory and length, so a hostile
/// template ends with an error, too.
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
        environment.set_unknown_method_callback(python::method);
        minijinja_contrib::add_to_environment(&mut environment);
        environment.add_filter("tojson", tojson);
        environment.add_filter("default", python::default);
        environment.add_filter("d", python::default);
        environment.add_test("sequence", python::is_sequence);
        environment.add_test("iterable", |value: Value| !value.is_none() && value.try_iter().is_ok());
        environment.add_function("namespace", namespace);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", python::strftime_now);
        for (variable, token) in names.iter() {
            environment.add_global(variable.to_owned(), token);
        }
        if !names.additional.is_empty() {
            environment.add_global("additional_special_tokens", Value::from(names.additional.clone()));
        }
        // As Jinja does it.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let mut assignments = Assignments::default();
        let source =
            rewrite_tags(&source, |tag| without_generation(tag).or_else(|| assignments.rewrite(tag)));
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

/// transformers marks the assistant's words by `{% generation %}` blocks, to train on. Here they only open a scope.
fn without_generation(tag: &str) -> Option<String> {
    match tag.trim() {
        name @ ("generation" | "endgeneration") => {
            Some(tag.replacen(name, &name.replacen("generation", "with", 1), 1))
        }
        _ => None,
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// Tells a template's own refusal from the engine's errors.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

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

    /// What transformers 5.24 with jinja2 3.1.6 makes of them.
    #[test]
    fn templates_become_what_transformers_makes_of_them() {
        let ns = "{% set ns = namespace(a=1) %}";
        for (source, expected) in [
            // All ends of lines are \n.
            ("a\r\nb\rc\n{% if true %}\r\nd{% endif %}\r\n", "a\nb\nc\nd"),
            ("{{ 'a\r\nb' }}", "a\nb"),
            (
                "{{ 'a' is sequence }}{{ {} is sequence }}{{ [] is sequence }}{{ x is sequence }}",
                "TrueTrueTrueTrue",
            ),
            ("{{ 1 is sequence }}{{ none is sequence }}{{ true is sequence }}", "FalseFalseFalse"),
            (
                "{{ range(3) is sequence }}{{ namespace() is sequence }}{{ (1, 2) is sequence }}",
                "TrueFalseTrue",
            ),
            ("{{ '' | default('d', boolean=true) }}{{ x | default(default_value='d') }}", "dd"),
            (
                "{{ '' | default('d', true) }}{{ x | d('e', boolean=false) }}{{ none | default('d') }}",
                "deNone",
            ),
            ("{{ x | default(none) }}{{ 0 | default(boolean=true) }}|{{ x | default }}|", "None||"),
            ("{{ 'a b c'.split(' ', maxsplit=1) }}", "['a', 'b c']"),
            ("{{ 'a b c'.split(maxsplit=1) }}", "['a', 'b c']"),
            ("{{ 'a b c'.split(sep=' ') }}{{ 'a b c'.split(' ', 1) }}", "['a', 'b', 'c']['a', 'b c']"),
            ("{{ 'a\nb'.splitlines(keepends=true) | length }}{{ 'a\nb'.splitlines(true)[0] }}|", "2a\n|"),
            ("{{ [1] | tojson(false, 2) }}", "[\n  1\n]"),
            ("{{ {'b': 1, 'a': 'é'} | tojson(true, none, [',', ':'], true) }}", r#"{"a":"\u00e9","b":1}"#),
            ("{{ 'é' | tojson(true, indent=1) }}{{ 'é' | tojson }}", r#""\u00e9""é""#),
            ("{% set ns.a %}x{{ 1 }}{% endset %}[{{ ns.a }}]", "[x1]"),
            ("{% set ns.a | upper %}x{% set b %}y{% endset %}{{ b }}{% endset %}[{{ ns.a }}]", "[XY]"),
            ("{% set ns.a %}x{% set ns.b %}y{% endset %}{% endset %}[{{ ns.a }}{{ ns.b }}]", "[xy]"),
            ("a {%- set ns.a -%} x {%- endset -%} [{{ ns.a }}]", "a[x]"),
            ("{% set ns.a, ns.b = 1, 2 %}[{{ ns.a }}{{ ns.b }}]", "[12]"),
            ("{% set ns.a, b = [3, 4] %}[{{ ns.a }}{{ b }}]", "[34]"),
            ("{% set ns.a = {'b': 1} %}[{{ ns.a.b }}]", "[1]"),
            ("{% raw %}{% set ns.a = 1 %}{% don't %}{% endraw %}", "{% set ns.a = 1 %}{% don't %}"),
            (
                "{{ '{% set ns.a = 2 %}{% generation %}' }}{{ {'a': {'b': '}}'}} }}{{ ns.a }}",
                "{% set ns.a = 2 %}{% generation %}{'a': {'b': '}}'}}1",
            ),
            ("{# {% set ns.a = 2 %} {% raw %} ' #}{% set ns.a = 3 %}{{ ns.a }}", "3"),
            (
                "{% generation %}a{% endgeneration %}{% raw %}{% generation %}{% endraw %}",
                "a{% generation %}",
            ),
        ] {
            assert_eq!(render(&format!("{ns}{source}")).as_deref(), Ok(expected), "{source}");
        }
        for (source, message) in [
            ("{{ 'a' | default('b', default_value='c') }}", "default_value"),
            ("{{ 'a'.split(' ', sep=' ') }}", "sep"),
            ("{{ 'a' | tojson(true, ensure_ascii=true) }}", "ensure_ascii"),
            ("{{ 'a' | tojson(1, 2, none, 4, 5) }}", "too many arguments"),
        ] {
            let error = render(source).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
        // A tag that assigns is still on its line.
        assert!(render("{% set ns\n.a = 1 %}\n{% if %}").unwrap_err().starts_with("chat template, line 3: "));
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
