//! The tags of a template's source, for what has to be written in another way for minijinja.

/// White space control, within a tag's signs.
const CONTROL: [char; 2] = ['-', '+'];

/// Rewrites tags: `rewrite` gets what stands between `{%` and `%}`, without white space control, and gives what shall
/// stand there, or `None` if it stays. Expressions, comments and raw blocks stay as they are.
pub(crate) fn rewrite_tags(source: &str, mut rewrite: impl FnMut(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (text, tag) = rest.split_at(at);
        out.push_str(text);
        let length = match tag.as_bytes().get(1) {
            Some(b'%') => code_length(tag, b'%'),
            Some(b'{') => code_length(tag, b'}'),
            Some(b'#') => tag[2..].find("#}").map(|end| end + 4),
            _ => Some(1),
        };
        // What does not end is for minijinja to refuse.
        let Some(length) = length else { return out + tag };
        let (tag, behind) = tag.split_at(length);
        rest = behind;
        let Some(code) = tag.strip_prefix("{%").and_then(|tag| tag.strip_suffix("%}")) else {
            out.push_str(tag);
            continue;
        };
        let from_code = code.strip_prefix(CONTROL).unwrap_or(code);
        let inner = from_code.strip_suffix(CONTROL).unwrap_or(from_code);
        let new = rewrite(inner);
        let (before, behind) = (&code[..code.len() - from_code.len()], &from_code[inner.len()..]);
        out.extend(["{%", before, new.as_deref().unwrap_or(inner), behind, "%}"]);
        if inner.trim() == "raw" {
            let (raw, behind) = rest.split_at(raw_length(rest));
            out.push_str(raw);
            rest = behind;
        }
    }
    out + rest
}

/// Length of the tag or expression that `text` begins with, which ends with `close` and `}`; `None` if it does not. The
/// same characters within a string or in brackets do not end it.
fn code_length(text: &str, close: u8) -> Option<usize> {
    let bytes = text.as_bytes();
    let (mut at, mut depth) = (2, 0);
    loop {
        match *bytes.get(at)? {
            quote @ (b'"' | b'\'') => {
                at += 1;
                while *bytes.get(at)? != quote {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
            }
            byte if byte == close && depth == 0 && bytes[at + 1..].starts_with(b"}") => return Some(at + 2),
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            _ => {}
        }
        at += 1;
    }
}

/// Length of what is before `{% endraw %}`.
fn raw_length(text: &str) -> usize {
    let without_control = |text: &str| text.strip_prefix(CONTROL).unwrap_or(text).trim_start().len();
    let is_end = |&(at, _): &(usize, &str)| {
        let tag = &text[at + 2..];
        let name = &tag[tag.len() - without_control(tag)..];
        let Some(end) = name.strip_prefix("endraw").map(str::trim_start) else { return false };
        end.strip_prefix(CONTROL).unwrap_or(end).starts_with("%}")
    };
    text.match_indices("{%").find(is_end).map_or(text.len(), |(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_alone_are_rewritten() {
        let rewritten = |source: &str| rewrite_tags(source, |tag| Some(tag.to_uppercase()));
        for (source, expected) in [
            ("a{%- if b +%}{c}{%d%}{", "a{%- IF B +%}{c}{%D%}{"),
            ("{% a '%}' \"\\\"%}\" %}b", "{% A '%}' \"\\\"%}\" %}b"),
            ("{{ '{% a %}' }}{% b %}", "{{ '{% a %}' }}{% B %}"),
            ("{{ {'a': {}} }}{% b %}{{ 'c", "{{ {'a': {}} }}{% B %}{{ 'c"),
            ("{#}{% a %}#}{% b %}{# {% c %}", "{#}{% a %}#}{% B %}{# {% c %}"),
            ("{%- raw -%}{% don't %}{%- endraw -%}{% b %}", "{%- RAW -%}{% don't %}{%- ENDRAW -%}{% B %}"),
            ("{% raw %}{% a %}{% endraw", "{% RAW %}{% a %}{% endraw"),
            ("{% a", "{% a"),
        ] {
            assert_eq!(rewritten(source), expected);
        }
    }
}
