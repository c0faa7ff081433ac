//! Jinja's `namespace`, whose attributes templates assign to: `{% set ns.found = true %}`.
//!
//! minijinja's own can hold itself, and printing or comparing it then recurses without end. This one keeps its values
//! to itself: they are had by name only, so that nothing that walks through values comes back to where it was.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use minijinja::value::{DynObject, Kwargs, Object, ObjectRepr, Rest};
use minijinja::{Error, ErrorKind, State, Value};

/// The method that an assignment becomes; no name of Jinja's or Python's.
const ASSIGN: &str = "__assign__";

#[derive(Default)]
struct Namespace(Mutex<BTreeMap<String, Value>>);

impl Namespace {
    fn set(&self, name: String, value: Value) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name, value);
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<namespace>")
    }
}

impl Object for Namespace {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key.as_str()?).cloned()
    }

    fn call_method(
        self: &Arc<Self>,
        _state: &mut State<'_, '_>,
        method: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        match (method, args) {
            (ASSIGN, [name, value]) => {
                self.set(name.to_string(), value.clone());
                Ok(Value::UNDEFINED)
            }
            _ => Err(Error::new(ErrorKind::UnknownMethod, format!("namespace has no method named {method}"))),
        }
    }

    /// A namespace equals itself alone, as in Python.
    fn custom_cmp(self: &Arc<Self>, other: &DynObject) -> Option<Ordering> {
        let other = other.downcast_ref::<Self>()?;
        Some(std::ptr::from_ref(&**self).cmp(&std::ptr::from_ref(other)))
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<namespace>")
    }
}

/// `namespace(dict, name=value, ...)`.
pub(crate) fn namespace(dicts: Rest<Value>, values: Kwargs) -> Result<Value, Error> {
    let namespace = Namespace::default();
    for dict in dicts.iter() {
        for key in dict.try_iter()?.checked() {
            let key = key?;
            namespace.set(key.to_string(), dict.get_item(&key)?);
        }
    }
    for name in values.args() {
        namespace.set(name.to_owned(), values.get(name)?);
    }
    Ok(Value::from_object(namespace))
}

/// Writes assignments to attributes as calls: `{% set a.b = c %}` becomes `{% do a.__assign__("b", (c)) %}`.
///
/// What is not recognised stays as it is, and fails when it is run, for minijinja assigns to its own namespaces only.
pub(crate) fn with_assignments_as_calls(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        rest = tag;
        if let Some((sign, object, name, value, end)) = parse_assignment(tag) {
            // Errors name lines, so none gets lost.
            let lines = tag[..tag.len() - end.len() - value.len()].matches('\n').count();
            let lines = "\n".repeat(lines);
            out.push_str(&format!("{sign} do {lines}{object}.{ASSIGN}(\"{name}\", ({value})) "));
            rest = end;
        }
    }
    out + rest
}

/// The parts of a tag that assigns to an attribute, after its `{%`: white space control, object, attribute, value, and
/// what follows the value.
fn parse_assignment(tag: &str) -> Option<(&str, &str, &str, &str, &str)> {
    let inner = tag.trim_start_matches(['-', '+']);
    let sign = &tag[..tag.len() - inner.len()];
    let target = inner.trim_start().strip_prefix("set")?;
    let (target, value) = target.split_once('=')?;
    let (object, name) = target.strip_prefix(char::is_whitespace)?.trim().rsplit_once('.')?;
    let is_name = |text: &str| text.chars().all(|c| c.is_alphanumeric() || c == '_') && !text.is_empty();
    let (object, name) = (object.trim_end(), name.trim_start());
    if !is_name(name) || !object.split('.').all(|part| is_name(part.trim())) || value.starts_with('=') {
        return None;
    }
    let end = end_of_tag(value)?;
    let (value, end) = value.split_at(end);
    Some((sign, object, name, value, end))
}

/// Where a tag's `%}` is, with its white space control; not within strings.
fn end_of_tag(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            quote @ (b'"' | b'\'') => {
                at += 1;
                while *bytes.get(at)? != quote {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
            }
            b'-' | b'+' if bytes[at + 1..].starts_with(b"%}") => return Some(at),
            b'%' if bytes[at + 1..].starts_with(b"}") => return Some(at),
            _ => {}
        }
        at += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assignments_become_calls() {
        for (source, expected) in [
            ("{% set ns.a = 1 %}x", "{% do ns.__assign__(\"a\", ( 1 )) %}x"),
            ("{%- set  ns . a=b|f(c) -%}", "{%- do ns.__assign__(\"a\", (b|f(c) )) -%}"),
            (
                "{%+ set a.b.c = '%}' + \"\\\"%}\" +%}",
                "{%+ do a.b.__assign__(\"c\", ( '%}' + \"\\\"%}\" )) +%}",
            ),
            ("{% set\nns.a =\n1, 2\n%}", "{% do \nns.__assign__(\"a\", (\n1, 2\n)) %}"),
        ] {
            assert_eq!(with_assignments_as_calls(source), expected);
        }
        for other in [
            "{% set a = b.c %}",
            "{% set a, b.c = d %}",
            "{% set a.b %}x{% endset %}",
            "{% if a.b == 1 %}",
            "{% settle a.b = 1 %}",
            "{% set a['b'] = 1 %}",
            "{% set a.b = 'x",
            "{{ set a.b = 1 }}",
            "{%",
        ] {
            assert_eq!(with_assignments_as_calls(other), other);
        }
    }
}
