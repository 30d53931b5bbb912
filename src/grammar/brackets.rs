//! How deep brackets stand within each other.

/// Returns how deep the brackets of a JSON text stand within each other.
pub(super) fn depth(text: &str) -> usize {
    let (mut outside, mut chars) = (String::new(), text.chars());
    while let Some(c) = chars.next() {
        match c {
            '"' => skip(&mut chars, '"'),
            '[' | ']' | '{' | '}' => outside.push(c),
            _ => {}
        }
    }
    deepest(outside.chars())
}

/// Goes to an unescaped `end`.
fn skip(chars: &mut impl Iterator<Item = char>, end: char) {
    while let Some(c) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            c if c == end => return,
            _ => {}
        }
    }
}

/// Returns how deep brackets stand within each other.
pub(super) fn deepest(chars: impl Iterator<Item = char>) -> usize {
    let (mut depth, mut deepest) = (0usize, 0);
    for c in chars {
        match c {
            '(' | '[' | '{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}
