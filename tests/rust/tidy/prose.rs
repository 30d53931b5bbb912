//! The mechanical part of the English: how long a line of comment is, and phrases that a stranger has to
//! decode.

/// Columns of a comment's line, its indentation included.
const COLUMNS_MAX: usize = 110;

/// Phrases, in lower case, and what to write in their place.
const PHRASES: &[(&str, &str)] = &[
    ("so many", "name the count"),
    ("so much", "name the amount"),
    ("so long", "name the length or the time"),
    ("so likely", "name the probability"),
    ("had better", "should, or the number it is"),
    ("can be had", "available, reusable"),
    ("cannot be had", "unavailable"),
    ("give way", "preempt, evict"),
    ("gives way", "preempts, evicts"),
    ("superfluous", "redundant"),
    ("likeliest", "most likely"),
    ("made dense", "dequantized"),
    ("for ever", "forever, or until what"),
    ("is no", "is not a, unknown"),
    ("are no", "are not"),
];

/// Correct English that contains a phrase.
const EXCUSED: &[&str] = &[
    "there is no",
    "there are no",
    "is no longer",
    "are no longer",
    "is no more",
    "is no less",
    "is no larger",
];

/// What is wrong with one file's prose.
pub(super) fn faults(file: &str, text: &str) -> Vec<String> {
    let rust = file.ends_with(".rs");
    let mut wrong = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let trimmed = line.trim_start();
        let place = format!("{file}:{}", at + 1);
        let comment =
            rust && trimmed.starts_with("//") || file.ends_with(".proto") && trimmed.starts_with("//");
        let columns = line.chars().count();
        if comment && columns > COLUMNS_MAX && trimmed.contains(' ') {
            wrong.push(format!("{place}: a comment of {columns} columns; {COLUMNS_MAX} are enough"));
        }
        if rust && trimmed.starts_with("/// Of ") {
            wrong.push(format!("{place}: a doc that starts with \"Of\"; start with a verb or a noun"));
        }
        let mut words = line.to_lowercase();
        if trimmed.contains("fn ") {
            words = words.replace('_', " ");
        }
        for excuse in EXCUSED {
            words = words.replace(excuse, "");
        }
        let found = PHRASES.iter().filter(|(phrase, _)| has(&words, phrase));
        wrong.extend(found.map(|(phrase, better)| format!("{place}: \"{phrase}\"; write: {better}")));
    }
    wrong
}

/// Whether the words of a phrase stand in a line as whole words.
fn has(line: &str, phrase: &str) -> bool {
    let is_word = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    line.match_indices(phrase).any(|(at, _)| {
        !is_word(line[..at].chars().next_back()) && !is_word(line[at + phrase.len()..].chars().next())
    })
}
