//! Conversations whose last message is continued: cut where that message's content ends.

use serde_json::{Map, Value, json};

use mlxd::text::{Conversation, TextError, absent_word};

use crate::text_template::{jinja, said};

/// Returns what a template writes up to the end of the last message.
fn continued(template: &str, messages: &[Value]) -> Result<String, TextError> {
    let arguments = Map::new();
    let conversation = Conversation {
        messages,
        tools: &[],
        arguments: &arguments,
        add_generation_prompt: false,
        now: std::time::SystemTime::UNIX_EPOCH,
        control_tokens: false,
    };
    jinja(template).render_continued(&conversation, 1000).map(|rendered| rendered.plain().into_owned())
}

fn dialogue(last: &str) -> Vec<Value> {
    vec![said("user", "Say it."), said("assistant", last)]
}

const PLAIN: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</end>\n{% endfor %}\
{% if add_generation_prompt %}<assistant>{% endif %}";
const TRIMMING: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</end>{% endfor %}";

#[test]
fn the_text_ends_where_the_message_does() {
    let written = |last: &str| continued(PLAIN, &dialogue(last)).unwrap();
    assert_eq!(written("Well"), "<user>Say it.</end>\n<assistant>Well");
    for last in ["Well, ", "a\n\n", "\u{e9}\u{301} ", "1.", "  "] {
        assert!(written(last).ends_with(&format!("<assistant>{last}")), "{last:?}");
    }
    assert!(written("").ends_with("<assistant>"), "nothing was said yet");
}

#[test]
fn what_a_template_trims_elsewhere_is_kept_at_the_end() {
    let written = |last: &str| continued(TRIMMING, &dialogue(last)).unwrap();
    assert_eq!(written(" Well, "), "<user>Say it.</end><assistant>Well, ");
    assert_eq!(written("a\n"), "<user>Say it.</end><assistant>a\n");
}

#[test]
fn a_text_that_occurs_twice_is_cut_at_the_last_message() {
    let messages =
        [said("user", "Well"), said("assistant", "Well"), said("user", "Well"), said("assistant", "Well")];
    let written = continued(PLAIN, &messages).unwrap();
    assert_eq!(written.matches("Well").count(), 4);
    assert!(written.ends_with("<assistant>Well"));
    // The template writes it again after the message.
    let repeating = format!("{PLAIN}{{{{ messages[0].content }}}}");
    assert_eq!(continued(&repeating, &messages).unwrap(), written);
}

#[test]
fn what_looks_like_the_word_of_the_cut_is_only_text() {
    let word = absent_word("");
    let written = continued(PLAIN, &[said("user", &word), said("assistant", &format!("{word} and {word}w"))]);
    assert!(written.unwrap().ends_with(&format!("<assistant>{word} and {word}w")));
}

#[test]
fn reasoning_that_a_template_writes_in_its_own_way_may_come_before() {
    let thinking = "{% for m in messages %}<{{ m.role }}>{% set content = m.content %}\
{% if '</think>' in content %}<think>\n{{ content.split('</think>')[0].split('<think>')[-1] | trim }}\n</think>\n\n\
{{ content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ content }}{% endif %}</end>{% endfor %}";
    let written = continued(thinking, &dialogue("<think>so</think>\nWell ")).unwrap();
    assert!(written.ends_with("<assistant><think>\nso\n</think>\n\nWell "), "{written:?}");
}

#[test]
fn a_template_that_changes_the_end_of_the_message_is_refused() {
    for template in [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if not loop.last %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m.content | replace('W', 'w') | replace('ell', 'all') }}{% endfor %}",
    ] {
        let refused = continued(template, &dialogue("Well"));
        assert!(matches!(refused, Err(TextError::NotContinued)), "{template}: {refused:?}");
    }
}

#[test]
fn the_whole_message_is_checked_not_its_last_line() {
    let upper = "{% for m in messages %}{{ m.content | upper }}{% endfor %}";
    let first_line = "{% for m in messages %}{{ m.content.replace('Well', 'Ill') }}{% endfor %}";
    for (template, last) in [(upper, "Well\n"), (first_line, "Well,\nthen"), (first_line, "Well\n\n")] {
        let refused = continued(template, &dialogue(last));
        assert!(matches!(refused, Err(TextError::NotContinued)), "{template} {last:?}: {refused:?}");
    }
}

#[test]
fn reasoning_that_has_not_ended_has_to_be_written_as_it_is() {
    // It writes an empty block of reasoning before what has none that is closed.
    let thinking = "{% for m in messages %}<{{ m.role }}>{% if '</think>' in m.content %}{{ m.content }}\
{% else %}<think>\n\n</think>\n\n{{ m.content | replace('<think>', '') }}{% endif %}</end>{% endfor %}";
    let refused = continued(thinking, &dialogue("<think>\nfirst I"));
    assert!(matches!(refused, Err(TextError::NotContinued)), "{refused:?}");
    let dropping =
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}</end>{% endfor %}";
    assert!(continued(dropping, &dialogue("<think>so</think>Well")).unwrap().ends_with("<assistant>Well"));
    let refused = continued(dropping, &dialogue("<think>so</think>"));
    assert!(matches!(refused, Err(TextError::NotContinued)), "{refused:?}");
}

#[test]
fn other_refusals_stay_what_they_are() {
    let refused = continued(
        "{{ raise_exception('no') if messages | length == 2 }}{{ messages[0].content }}",
        &dialogue("a"),
    );
    assert!(matches!(refused, Err(TextError::Render(why)) if why.contains("no")));
    let long = continued(PLAIN, &dialogue(&"x".repeat(2000)));
    assert!(matches!(long, Err(TextError::TooLong { .. })));
    let calls = json!([{ "role": "system", "content": "s" }, { "role": "assistant", "content": "a" }]);
    let users = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}";
    let refused = continued(users, calls.as_array().unwrap());
    assert!(matches!(refused, Err(TextError::Role { index: 0, .. })), "{refused:?}");
}
