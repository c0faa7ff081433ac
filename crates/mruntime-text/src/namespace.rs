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

/// Writes assignments to attributes as calls, tag by tag: `{% set a.b = c %}` becomes
/// `{% set __assigned_0 = c %}{% do a.__assign__("b", __assigned_0) %}`.
///
/// What is not recognised stays as it is, and fails when it is run, for minijinja assigns to its own namespaces only.
#[derive(Default)]
pub(crate) struct Assignments {
    /// For each open `{% set ... %}` that takes what follows up to `{% endset %}`: its calls.
    open: Vec<String>,
}

impl Assignments {
    /// What stands in the place of a tag's inside; `None` if it stays.
    pub(crate) fn rewrite(&mut self, tag: &str) -> Option<String> {
        if tag.trim() == "endset" {
            return Some(format!("{tag}{}", self.open.pop()?));
        }
        let set = tag.trim_start().strip_prefix("set")?;
        if !set.starts_with(char::is_whitespace) {
            return None;
        }
        // A filter makes it a block, too.
        let (targets, value) = set.split_at(set.find(['=', '|']).unwrap_or(set.len()));
        let is_block = !value.starts_with('=');
        let (mut variables, mut calls) = (Vec::new(), String::new());
        for (i, target) in targets.split(',').enumerate() {
            if let Some((object, name)) = attribute(target) {
                let variable = format!("__assigned_{i}");
                calls += &format!("%}}{{% do {object}.{ASSIGN}(\"{name}\", {variable}) ");
                variables.push(variable);
            } else {
                variables.push(target.trim().to_owned());
            }
        }
        if is_block {
            self.open.push(calls.clone());
        }
        if calls.is_empty() {
            return None;
        }
        // Errors name lines, so none gets lost.
        let lines = "\n".repeat(tag[..tag.len() - value.len()].matches('\n').count());
        let set = format!(" set {lines}{} {value}", variables.join(", "));
        Some(if is_block { set } else { set + &calls })
    }
}

/// The object and the name of `object.name`.
fn attribute(target: &str) -> Option<(&str, &str)> {
    let (object, name) = target.trim().rsplit_once('.')?;
    let is_name = |text: &str| text.chars().all(|c| c.is_alphanumeric() || c == '_') && !text.is_empty();
    let (object, name) = (object.trim_end(), name.trim_start());
    (is_name(name) && object.split('.').all(|part| is_name(part.trim()))).then_some((object, name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tags::rewrite_tags;

    fn rewritten(source: &str) -> String {
        let mut assignments = Assignments::default();
        rewrite_tags(source, |tag| assignments.rewrite(tag))
    }

    #[test]
    fn assignments_become_calls() {
        for (source, expected) in [
            ("{% set ns.a = 1 %}x", "{% set __assigned_0 = 1 %}{% do ns.__assign__(\"a\", __assigned_0) %}x"),
            (
                "{%- set  ns . a=b|f(c) -%}",
                "{%- set __assigned_0 =b|f(c) %}{% do ns.__assign__(\"a\", __assigned_0) -%}",
            ),
            (
                "{%+ set a.b.c = '%}' + \"\\\"%}\" +%}",
                "{%+ set __assigned_0 = '%}' + \"\\\"%}\" %}{% do a.b.__assign__(\"c\", __assigned_0) +%}",
            ),
            (
                "{% set\nns.a =\n1, 2\n%}",
                "{% set \n__assigned_0 =\n1, 2\n%}{% do ns.__assign__(\"a\", __assigned_0) %}",
            ),
            (
                "{% set a, b.c = d %}",
                "{% set a, __assigned_1 = d %}{% do b.__assign__(\"c\", __assigned_1) %}",
            ),
            (
                "{% set a.b | f(c=1) -%}x{% set d %}y{% endset %}{%- endset -%}",
                "{% set __assigned_0 | f(c=1) -%}x{% set d %}y{% endset %}{%- endset %}{% do a.__assign__(\"b\", __assigned_0) -%}",
            ),
        ] {
            assert_eq!(rewritten(source), expected);
        }
        for other in [
            "{% set a = b.c %}",
            "{% set a %}x{% endset %}",
            "{% endset %}",
            "{% if a.b == 1 %}",
            "{% settle a.b = 1 %}",
            "{% set a['b'] = 1 %}",
            "{% set (a.b, c) = 1 %}",
            "{% set a.b = 'x",
            "{{ set a.b = 1 }}",
            "{%",
        ] {
            assert_eq!(rewritten(other), other);
        }
    }
}
