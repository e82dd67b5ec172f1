//! Rust source without its comments and literals, so that a rule finds code and not prose.

/// The source with comments, strings and characters replaced by blanks; lines stay where they are.
pub(crate) fn code(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let end = skip(bytes, at);
        if end > at {
            out.extend(bytes[at..end].iter().map(|b| if *b == b'\n' { b'\n' } else { b' ' }));
            at = end;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Where the comment or literal that begins at `at` ends; `at` if none does.
fn skip(bytes: &[u8], at: usize) -> usize {
    let rest = &bytes[at..];
    let is_after_word = at > 0 && is_word(bytes[at - 1]);
    match rest {
        [b'/', b'/', ..] => at + rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len()),
        [b'/', b'*', ..] => at + block_comment(rest),
        [b'"', ..] => at + string(rest),
        [b'r', b'"' | b'#', ..] if !is_after_word => at + raw_string(rest),
        [b'b', b'r', b'"' | b'#', ..] if !is_after_word => at + 1 + raw_string(&rest[1..]),
        // A character, unless it is a lifetime: those have no closing quote where one must stand.
        [b'\'', b'\\', _, tail @ ..] => at + 3 + until_quote(tail),
        [b'\'', _, b'\'', ..] => at + 3,
        _ => at,
    }
}

fn until_quote(bytes: &[u8]) -> usize {
    bytes.iter().position(|b| *b == b'\'').map_or(bytes.len(), |end| end + 1)
}

fn block_comment(bytes: &[u8]) -> usize {
    let (mut at, mut depth) = (0, 0);
    while at < bytes.len() {
        match &bytes[at..] {
            [b'/', b'*', ..] => (at, depth) = (at + 2, depth + 1),
            [b'*', b'/', ..] => (at, depth) = (at + 2, depth - 1),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn string(bytes: &[u8]) -> usize {
    let mut at = 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// Length of a raw string; 0 if it is none (`r#type`).
fn raw_string(bytes: &[u8]) -> usize {
    let hashes = bytes[1..].iter().take_while(|b| **b == b'#').count();
    if bytes.get(1 + hashes) != Some(&b'"') {
        return 0;
    }
    let close = [b"\"".as_slice(), &vec![b'#'; hashes]].concat();
    let body = 2 + hashes;
    let end = bytes[body..].windows(close.len()).position(|window| window == close);
    end.map_or(bytes.len(), |end| body + end + close.len())
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Lines (from 1) on which `pattern` stands in `code` as whole words.
pub(crate) fn lines_with(code: &str, pattern: &str) -> Vec<usize> {
    let ends_in_word = pattern.bytes().next_back().is_some_and(is_word);
    let stands_alone = |line: &str, at: usize| {
        let before = line[..at].bytes().next_back().is_some_and(is_word);
        let after = line[at + pattern.len()..].bytes().next().is_some_and(is_word);
        !(before || ends_in_word && after)
    };
    let hits = code
        .lines()
        .enumerate()
        .filter(|(_, line)| line.match_indices(pattern).any(|(at, _)| stands_alone(line, at)));
    hits.map(|(index, _)| index + 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked_and_code_stays() {
        let text =
            "a // x\n/* x /* x */ x */ b \"x \\\" x\" c 'x' d '\\'' e r#\"x \" x\"# f 'x: g\n";
        let code = code(text);
        assert!(code.lines().count() == 2);
        let words: Vec<_> = code.split_whitespace().collect();
        assert_eq!(words, ["a", "b", "c", "d", "e", "f", "'x:", "g"]);
    }

    #[test]
    fn raw_identifiers_and_byte_strings_do_not_confuse() {
        let code = code("r#type br\"x\" b\"x\" a\nfor r in x {}");
        assert!(code.contains("r#type") && code.contains("for r in x {}"), "{code}");
        assert_eq!(lines_with(&code, "x"), [2]);
    }

    #[test]
    fn only_whole_words_are_found() {
        let text = "my_sled::a\nsled::b\nlet sled = 1;\nsleds::c\nsled::d";
        assert_eq!(lines_with(text, "sled::"), [2, 5]);
        assert_eq!(lines_with(text, "sled"), [2, 3, 5]);
    }
}
