//! The `tojson` filter as transformers has it: Python's `json.dumps`, which is not what Jinja's own filter writes.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

use crate::python::arguments;

/// Deeper values are refused, long before the stack ends.
const MAX_DEPTH: usize = 200;

/// `value | tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(crate) fn tojson(
    state: &State,
    value: &Value,
    given: Rest<Value>,
    named: Kwargs,
) -> Result<String, Error> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ensure_ascii, indent, separators, sort_keys] = arguments(&given, &named, names)?;
    let indent = match indent {
        Some(v) if v.kind() == ValueKind::Number => Some(" ".repeat(usize::try_from(v)?.min(64))),
        Some(v) if v.kind() == ValueKind::String => {
            Some(v.as_str().unwrap_or_default().chars().take(64).collect())
        }
        _ => None,
    };
    let (item_separator, key_separator) =
        match from_args::<(Option<Vec<String>>,)>(separators.as_slice())?.0.as_deref() {
            Some([item, key]) => (item.clone(), key.clone()),
            Some(_) => return Err(invalid("tojson: separators must be a pair of strings".to_owned())),
            None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        };
    let mut writer = Writer {
        state,
        paid: 0,
        out: String::new(),
        ensure_ascii: ensure_ascii.is_some_and(|on| on.is_true()),
        sort_keys: sort_keys.is_some_and(|on| on.is_true()),
        indent,
        item_separator,
        key_separator,
    };
    writer.value(value, 0)?;
    writer.pay()?;
    Ok(writer.out)
}

struct Writer<'a, 'template, 'env> {
    state: &'a State<'template, 'env>,
    /// Bytes of `out` that fuel has been consumed for.
    paid: usize,
    out: String,
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
}

impl Writer<'_, '_, '_> {
    /// Consumes fuel for what was written. A value may hold another one many times over, so that even a small one can
    /// have a text without end.
    fn pay(&mut self) -> Result<(), Error> {
        self.state.consume_fuel((self.out.len() - self.paid) as u64)?;
        self.paid = self.out.len();
        Ok(())
    }

    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid(format!("tojson: the value is nested more than {MAX_DEPTH} deep")));
        }
        self.pay()?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.out.push('[');
                let mut first = true;
                for item in value.try_iter()?.checked() {
                    self.begin_item(&mut first, depth + 1);
                    self.value(&item?, depth + 1)?;
                }
                self.end_items(first, depth, ']');
            }
            ValueKind::Map => {
                let mut keys = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
                if self.sort_keys {
                    keys.sort();
                }
                self.out.push('{');
                let mut first = true;
                for key in keys {
                    self.begin_item(&mut first, depth + 1);
                    self.key(&key)?;
                    self.out.push_str(&self.key_separator);
                    self.value(&value.get_item(&key)?, depth + 1)?;
                }
                self.end_items(first, depth, '}');
            }
            kind => return Err(invalid(format!("tojson: a value of type {kind} is not JSON"))),
        }
        Ok(())
    }

    fn begin_item(&mut self, first: &mut bool, depth: usize) {
        if !std::mem::take(first) {
            self.out.push_str(&self.item_separator);
        }
        self.new_line(depth);
    }

    fn end_items(&mut self, empty: bool, depth: usize, bracket: char) {
        if !empty {
            self.new_line(depth);
        }
        self.out.push(bracket);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(key.as_str().unwrap_or_default()),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                self.out.push('"');
                self.value(key, 0)?;
                self.out.push('"');
            }
            kind => return Err(invalid(format!("tojson: a value of type {kind} is not a JSON key"))),
        }
        Ok(())
    }

    fn number(&mut self, value: &Value) {
        match f64::try_from(value.clone()) {
            Ok(float) if !value.is_integer() => self.out.push_str(&python_float(float)),
            _ => _ = write!(self.out, "{value}"),
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                _ if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                _ => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// Python's `repr` of a float: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
fn python_float(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() {
            "NaN"
        } else if x > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_owned();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(e) if x != 0.0 && !(-4..16).contains(&e) => {
            format!("{digits}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs())
        }
        _ => format!("{x:?}"),
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
