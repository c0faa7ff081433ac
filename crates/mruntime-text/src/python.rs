//! What templates use of Python: arguments by name, methods of strings, lists and dicts, its clock.

use jiff::Zoned;
use jiff::fmt::strtime::{BrokenDownTime, Config, PosixCustom};
use minijinja::value::{Kwargs, Rest, from_args};
use minijinja::{Error, ErrorKind, State, Value};

/// Arguments in the order of their names, by which they may be given, too.
pub(crate) fn arguments<const N: usize>(
    given: &[Value],
    named: &Kwargs,
    names: [&str; N],
) -> Result<[Option<Value>; N], Error> {
    if given.len() > N {
        return Err(ErrorKind::TooManyArguments.into());
    }
    let mut values = [const { None }; N];
    for (i, name) in names.into_iter().enumerate() {
        values[i] = match given.get(i) {
            Some(value) => Some(value.clone()),
            None if named.has(name) => Some(named.get(name)?),
            None => None,
        };
    }
    named.assert_all_used()?;
    Ok(values)
}

/// Methods of Python's strings, lists and dicts. Those that can make a short text long are paid for beforehand.
pub(crate) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
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
    let args = match name {
        "split" => &by_place(args, ["sep", "maxsplit"])?,
        "splitlines" => &by_place(args, ["keepends"])?,
        _ => args,
    };
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// All arguments by their places; none stands for those that are not given.
fn by_place<const N: usize>(args: &[Value], names: [&str; N]) -> Result<Vec<Value>, Error> {
    let (given, named): (Rest<Value>, Kwargs) = from_args(args)?;
    let values = arguments(&given, &named, names)?;
    Ok(values.into_iter().map(|value| value.unwrap_or(Value::from(()))).collect())
}

/// `value | default(default_value='', boolean=False)`.
pub(crate) fn default(value: &Value, given: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let [other, boolean] = arguments(&given, &named, ["default_value", "boolean"])?;
    let lacks = value.is_undefined() || boolean.is_some_and(|on| on.is_true()) && !value.is_true();
    Ok(if lacks { other.unwrap_or_else(|| Value::from("")) } else { value.clone() })
}

/// `value is sequence`: whatever has a length, as strings and dicts do.
pub(crate) fn is_sequence(value: &Value) -> bool {
    value.is_undefined() || value.len().is_some()
}

/// The local time, formatted as by Python's `strftime`.
pub(crate) fn strftime_now(format: &str) -> Result<String, Error> {
    strftime(format, &Zoned::now())
}

/// Python's local times have microseconds and know no time zone.
const DIRECTIVES: [(&str, &str); 4] = [("f", "%6f"), ("z", ""), ("Z", ""), ("%", "%%")];

fn strftime(format: &str, time: &Zoned) -> Result<String, Error> {
    let mut known = String::new();
    let mut rest = format;
    while let Some((text, behind)) = rest.split_once('%') {
        let directive = DIRECTIVES.into_iter().find(|(name, _)| behind.starts_with(name));
        let (name, directive) = directive.unwrap_or(("", "%"));
        known.extend([text, directive]);
        rest = &behind[name.len()..];
    }
    known.push_str(rest);
    let config = Config::new().custom(PosixCustom::new());
    BrokenDownTime::from(time)
        .to_string_with_config(&config, &known)
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Python makes of it.
    #[test]
    fn times_are_written_as_python_writes_them() {
        let time = jiff::civil::date(2026, 1, 5).at(15, 4, 6, 89_000).in_tz("Asia/Tokyo").unwrap();
        for (format, expected) in [
            ("%c", "Mon Jan  5 15:04:06 2026"),
            ("%x %X", "01/05/26 15:04:06"),
            ("%f%%f%z%Z|", "000089%f|"),
            ("%d %b %Y, %-d, %e, %I:%M %p, %j", "05 Jan 2026, 5,  5, 03:04 PM, 005"),
        ] {
            assert_eq!(strftime(format, &time).unwrap(), expected);
        }
    }
}
