//! Shell patterns of one host label, as docker config keys use them: `*`, `?`, `[a-c]`, `[^x]`, `\c`.

/// Whether the whole text matches. A malformed pattern matches nothing.
pub(super) fn matches(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    matches_from(&pattern, &text)
}

fn matches_from(pattern: &[char], text: &[char]) -> bool {
    let Some((first, rest)) = pattern.split_first() else { return text.is_empty() };
    match first {
        '*' => (0..=text.len()).any(|skip| matches_from(rest, &text[skip..])),
        '?' => text.split_first().is_some_and(|(_, text)| matches_from(rest, text)),
        '[' => match (class(rest), text.split_first()) {
            (Some((class, rest)), Some((c, text))) => class.contains(*c) && matches_from(rest, text),
            _ => false,
        },
        '\\' => match (rest.split_first(), text.split_first()) {
            (Some((literal, rest)), Some((c, text))) => literal == c && matches_from(rest, text),
            _ => false,
        },
        literal => text.split_first().is_some_and(|(c, text)| literal == c && matches_from(rest, text)),
    }
}

struct Class {
    negated: bool,
    ranges: Vec<(char, char)>,
}

impl Class {
    fn contains(&self, c: char) -> bool {
        self.ranges.iter().any(|(low, high)| (*low..=*high).contains(&c)) != self.negated
    }
}

/// What stands after `[`, and what follows the `]`.
fn class(mut rest: &[char]) -> Option<(Class, &[char])> {
    let negated = rest.first() == Some(&'^');
    if negated {
        rest = &rest[1..];
    }
    let mut ranges = Vec::new();
    loop {
        match rest {
            [']', after @ ..] if !ranges.is_empty() => return Some((Class { negated, ranges }, after)),
            [low, '-', high, after @ ..] if *high != ']' => {
                ranges.push((*low, *high));
                rest = after;
            }
            [one, after @ ..] if *one != ']' => {
                ranges.push((*one, *one));
                rest = after;
            }
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i05_patterns() {
        for (pattern, text, want) in [
            ("*", "", true),
            ("*", "abc", true),
            ("a*c", "abbc", true),
            ("a*c", "abb", false),
            ("a?", "ab", true),
            ("a?", "a", false),
            ("r[a-c]g", "rbg", true),
            ("r[^a-c]g", "rbg", false),
            ("r[xy]", "ry", true),
            ("r[", "r[", false),
            ("\\*", "*", true),
            ("\\*", "a", false),
        ] {
            assert_eq!(matches(pattern, text), want, "{pattern} {text}");
        }
    }
}
