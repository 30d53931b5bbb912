//! Which tokens of a session stay, and that nothing of a turn is lost.

use std::sync::{Arc, LazyLock};

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::text::TextFiles;

const WORD: u32 = 1;
const ANSWERED: u32 = 3;
const RETURNED: u32 = 4;

/// A template of Qwen3.5's shape, with a place for a switch.
const THINKING: &str = "
{%- set ns = namespace(last=-1) %}
{%- if tools %}{{- '<|im_start|>system\\n' + tools|tojson + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
  {%- set content = message.content|trim %}
  {%- if message.role == 'assistant' %}
    {%- set thought = '' %}
    {%- if '</think>' in content %}
      {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if SWITCH loop.index0 > ns.last %}
      {{- '<|im_start|>assistant\\n<think>\\n' + thought|trim + '\\n</think>\\n\\n' + content }}
    {%- else %}
      {{- '<|im_start|>assistant\\n' + content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
  {%- else %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n<think>\\n' }}
  {%- if enable_thinking is defined and not enable_thinking %}{{- '\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}";

fn thinking(switch: &str) -> String {
    THINKING.replace("SWITCH", switch)
}

fn preserving() -> String {
    thinking("preserve_thinking is defined and preserve_thinking or")
}

fn assets(template: &str) -> ModelAssets {
    let added = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    };
    let tokenizer = json!({
        "version": "1.0", "decoder": { "type": "Fuse" },
        "added_tokens": [added(2, "<|im_start|>"), added(ANSWERED, "<|im_end|>"), added(RETURNED, "<|return|>")],
        "model": { "type": "WordLevel", "vocab": { "?": 0, "word": WORD }, "unk_token": "?" },
    });
    let files = TextFiles {
        tokenizer: Some(tokenizer.to_string().into_bytes()),
        chat_template: Some(template.to_owned()),
        ..TextFiles::default()
    };
    let tokenizer = Tokenizer::new(&files).unwrap();
    let chat_template = ChatTemplate::new(&files, &tokenizer);
    assert!(chat_template.is_ok(), "{chat_template:?}");
    ModelAssets {
        tokenizer,
        chat_template,
        eos_token_ids: vec![ANSWERED, RETURNED],
        ..ModelAssets::fake("m")
    }
}

/// A session, as far as its next turn sees it.
struct Held {
    messages: Vec<Value>,
    start: TurnStart,
}

fn said(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

fn user(content: &str) -> Vec<Value> {
    vec![said("user", content)]
}

/// What a turn adds besides its messages.
#[derive(Default)]
struct Given {
    tools: Vec<Value>,
    arguments: Map<String, Value>,
}

impl Held {
    fn new(history: History) -> Self {
        let (messages, model) = (Vec::new(), "m".into());
        let start = TurnStart {
            model,
            messages: Vec::new(),
            text: None,
            tokens: [].into(),
            is_whole: true,
            history,
            cache_salt: "".into(),
            pinned: false,
            tokenizer: None,
            known: "".into(),
            answer: None,
        };
        Self { messages, start }
    }

    fn next(&self, assets: &ModelAssets, new: &[Value], given: &Given) -> Result<Written, Error> {
        self.write(assets, new, given, true)
    }

    fn write(
        &self,
        assets: &ModelAssets,
        new: &[Value],
        given: &Given,
        add_generation_prompt: bool,
    ) -> Result<Written, Error> {
        let dialogue = Dialogue {
            conversation: Conversation::plain([&self.messages, new].concat()),
            held: self.messages.len(),
            tools: given.tools.clone(),
            arguments: given.arguments.clone(),
            ending: if add_generation_prompt { Ending::AnswerBegun } else { Ending::Whole },
            control_tokens: false,
            now: SystemTime::UNIX_EPOCH,
            bytes_max: 1 << 20,
        };
        dialogue.write(assets, Some(&self.start))
    }

    /// Runs a turn to its end. Tokens do not matter here, only the last one and how many there are.
    fn turn(
        &mut self,
        assets: &ModelAssets,
        new: &[Value],
        given: &Given,
        (answer, end): (&str, u32),
    ) -> Written {
        let written = self.next(assets, new, given).unwrap();
        let ending = if end == WORD { String::new() } else { text_of(&assets.tokenizer, end) };
        let tokens = [&self.start.tokens[..written.kept], &[WORD, WORD, end]].concat();
        let text: Option<Arc<str>> =
            written.text.as_ref().map(|text| [text, answer, &ending].concat().into());
        let known = text.clone().unwrap_or_else(|| Arc::clone(&self.start.known));
        self.messages.extend([new, &[said("assistant", answer)]].concat());
        let (message, text_bytes) = (self.messages.len() - 1, text.as_ref().map(|text| text.len()));
        let answer = Some(AnswerEnd { message, tokens: tokens.len(), text_bytes });
        self.start = TurnStart { tokens: tokens.into(), text, known, answer, ..self.start.clone() };
        written
    }

    /// Adds messages without an answer, of two tokens.
    fn extend(&mut self, assets: &ModelAssets, new: &[Value]) -> Written {
        let written = self.write(assets, new, &Given::default(), false).unwrap();
        let tokens = [&self.start.tokens[..written.kept], &[WORD, ANSWERED]].concat();
        let text: Option<Arc<str>> = written.text.as_deref().map(Into::into);
        let known = text.clone().unwrap_or_else(|| Arc::clone(&self.start.known));
        self.messages.extend(new.iter().cloned());
        self.start = TurnStart { tokens: tokens.into(), text, known, ..self.start.clone() };
        written
    }
}

fn outcomes(history: History, template: &str, given: &Given) -> Vec<Option<HistoryOutcome>> {
    let (assets, mut held) = (assets(template), Held::new(history));
    let answers = ["a thought\n</think>\n\none", "another\n</think>\n\ntwo", "more\n</think>\n\nthree"];
    let turns = answers.map(|answer| held.turn(&assets, &user("and?"), given, (answer, ANSWERED)));
    turns.map(|written| written.outcome).into()
}

#[test]
fn auto_keeps_the_tokens_only_where_the_makers_have_a_switch_for_it() {
    use HistoryOutcome::{Appended, Rerendered};
    let none = Given::default();
    assert_eq!(outcomes(History::Auto, &preserving(), &none), [None, Some(Appended), Some(Appended)]);
    assert_eq!(outcomes(History::Auto, &thinking(""), &none), [None, Some(Rerendered), Some(Rerendered)]);
    let inverse = thinking("clear_thinking is defined and not clear_thinking or");
    assert_eq!(outcomes(History::Auto, &inverse, &none), [None, Some(Appended), Some(Appended)]);
    let arguments = Map::from_iter([("preserve_thinking".to_owned(), false.into())]);
    let decided = Given { arguments, ..Given::default() };
    assert_eq!(outcomes(History::Auto, &preserving(), &decided), [None, Some(Rerendered), Some(Rerendered)]);
    assert_eq!(outcomes(History::Rerender, &preserving(), &none), [None, Some(Rerendered), Some(Rerendered)]);
}

#[test]
fn a_past_that_is_written_again_is_continued_whatever_the_history() {
    use HistoryOutcome::Continued;
    let plain =
        "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}<|im_start|>";
    for history in [History::Auto, History::Append, History::Rerender] {
        assert_eq!(outcomes(history, plain, &Given::default()), [None, Some(Continued), Some(Continued)]);
    }
}

#[test]
fn append_renders_only_what_follows_the_last_answer() {
    let (assets, mut held) = (assets(&thinking("")), Held::new(History::Append));
    let answer = "a thought\n</think>\n\none";
    let first = held.turn(&assets, &user("x"), &Given::default(), (answer, ANSWERED));
    assert_eq!((first.kept, first.outcome), (0, None));
    let before = held.start.clone();
    let second = held.turn(&assets, &user("y"), &Given::default(), (answer, ANSWERED));
    assert_eq!((second.kept, second.outcome), (before.tokens.len(), Some(HistoryOutcome::Appended)));
    assert_eq!(second.rest.text, "\n<|im_start|>user\ny<|im_end|>\n<|im_start|>assistant\n<think>\n");
    assert_eq!(second.text.unwrap(), [&*before.text.unwrap(), &second.rest.text].concat());
}

#[test]
fn an_answer_that_was_cut_off_gets_the_templates_end() {
    let (assets, mut held) = (assets(&thinking("")), Held::new(History::Append));
    held.turn(&assets, &user("x"), &Given::default(), ("a thought that", WORD));
    let next = held.next(&assets, &user("y"), &Given::default()).unwrap();
    assert_eq!(next.kept, 3);
    assert!(next.rest.text.starts_with("<|im_end|>\n<|im_start|>user\ny"), "{}", next.rest.text);
}

#[test]
fn the_template_decides_which_token_ends_a_past_answer() {
    let (assets, mut held) = (assets(&thinking("")), Held::new(History::Append));
    held.turn(&assets, &user("x"), &Given::default(), ("one", RETURNED));
    let next = held.next(&assets, &user("y"), &Given::default()).unwrap();
    assert_eq!(next.kept, 2, "the last token is dropped");
    assert!(next.rest.text.starts_with("<|im_end|>\n<|im_start|>user\ny"), "{}", next.rest.text);
    assert!(next.text.unwrap().contains("<think>\none<|im_end|>\n<|im_start|>user"));
}

#[test]
fn a_turn_appends_to_what_was_added_after_an_answer() {
    let assets = assets(&thinking(""));
    for end in [ANSWERED, WORD, RETURNED] {
        let mut held = Held::new(History::Append);
        held.turn(&assets, &user("x"), &Given::default(), ("a thought\n</think>\n\none", end));
        for added in ["y", "z"] {
            let extended = held.extend(&assets, &user(added));
            assert_eq!(extended.outcome, Some(HistoryOutcome::Appended));
            if end == RETURNED && added == "y" {
                // As its session does: the token that ended the answer is another one now.
                let answer = held.start.answer.as_mut().unwrap();
                answer.tokens -= 1;
                answer.text_bytes = answer.text_bytes.map(|bytes| bytes - "<|return|>".len());
            }
        }
        let before = held.start.clone();
        let next = held.next(&assets, &user("more"), &Given::default()).unwrap();
        assert_eq!((next.kept, next.outcome), (before.tokens.len(), Some(HistoryOutcome::Appended)));
        assert_eq!(next.rest.text, "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n<think>\n");
        assert_eq!(next.text.unwrap(), [&*before.text.unwrap(), &next.rest.text].concat());
    }
}

#[test]
fn what_was_added_after_an_answer_is_written_again_where_its_text_is_not_known() {
    let (assets, mut held) = (assets(&thinking("")), Held::new(History::Append));
    held.turn(&assets, &user("x"), &Given::default(), ("one", WORD));
    (held.start.text, held.start.answer.as_mut().unwrap().text_bytes) = (None, None);
    held.extend(&assets, &user("y"));
    let next = held.next(&assets, &user("z"), &Given::default()).unwrap();
    assert_eq!((next.kept, &next.text, next.outcome), (3, &None, Some(HistoryOutcome::Appended)));
    assert!(next.rest.text.starts_with("<|im_end|>\n<|im_start|>user\ny<|im_end|>\n<|im_start|>user\nz"));
    // Nor is it where the template writes it otherwise, as without the header of an answer that was cut off.
    let mut held = Held::new(History::Append);
    held.turn(&assets, &user("x"), &Given::default(), ("one", ANSWERED));
    held.turn(&assets, &user("y"), &Given::default(), ("two", ANSWERED));
    let cut = held.start.clone();
    let header = cut.text.as_deref().unwrap().strip_suffix("two<|im_end|>").unwrap();
    let first = AnswerEnd { message: 1, tokens: 3, text_bytes: Some(header.find("one").unwrap() + 13) };
    held.start = TurnStart { text: Some(header.into()), answer: Some(first), ..cut };
    held.messages.pop();
    let again = held.next(&assets, &[], &Given::default()).unwrap();
    assert_eq!(
        (again.kept, &*again.rest.text),
        (held.start.tokens.len(), ""),
        "the answer is asked for again"
    );
    let other = held.next(&assets, &user("z"), &Given::default()).unwrap();
    assert_eq!(other.kept, 3);
    assert!(other.rest.text.starts_with("\n<|im_start|>user\ny<|im_end|>\n<|im_start|>user\nz"));
}

#[test]
fn only_what_was_generated_has_to_stay_as_it_is() {
    let assets = assets(&thinking(""));
    let given = [said("user", "y"), said("assistant", "given")];
    // The template leaves the place for reasoning out of a given answer once it is of the past.
    for (added, stays) in [([&given[..], &user("and")].concat(), true), (given.to_vec(), false)] {
        let mut held = Held::new(History::Append);
        held.turn(&assets, &user("x"), &Given::default(), ("a thought\n</think>\n\none", ANSWERED));
        held.extend(&assets, &added);
        let next = held.next(&assets, &user("z"), &Given::default()).unwrap();
        let kept = if stays { held.start.tokens.len() } else { 3 };
        assert_eq!((next.kept, next.outcome), (kept, Some(HistoryOutcome::Appended)));
        let text = next.text.unwrap();
        assert!(text.contains("a thought") && text.matches("given<|im_end|>").count() == 1, "{text}");
    }
}

#[test]
fn a_conversation_without_an_answer_may_be_written_anew() {
    let (assets, mut held) = (assets(&thinking("")), Held::new(History::Append));
    held.extend(&assets, &user("x"));
    let tools = vec![json!({ "type": "function", "function": { "name": "f" } })];
    let next = held.next(&assets, &user("y"), &Given { tools, ..Given::default() }).unwrap();
    assert_eq!((next.kept, next.outcome), (0, Some(HistoryOutcome::Rerendered)));
    assert_eq!(held.next(&assets, &user("y"), &Given::default()).unwrap().kept, 2, "it goes on as it is");
}

fn refusal_of(outcome: Result<Written, Error>) -> &'static str {
    match outcome {
        Err(Error::CannotAppend(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn tools_that_the_session_does_not_hold_are_not_lost() {
    let assets = assets(&thinking(""));
    let tool = |name: &str| json!({ "type": "function", "function": { "name": name } });
    let given = |name| Given { tools: vec![tool(name)], ..Given::default() };
    let mut held = Held::new(History::Append);
    held.turn(&assets, &user("x"), &Given::default(), ("one", ANSWERED));
    let refused = refusal_of(held.next(&assets, &user("y"), &given("f")));
    assert!(refused.contains("tools"), "{refused}");
    held.start.history = History::Auto;
    let written = held.next(&assets, &user("y"), &given("f")).unwrap();
    assert_eq!(written.outcome, Some(HistoryOutcome::Rerendered));

    let mut held = Held::new(History::Append);
    held.turn(&assets, &user("x"), &given("f"), ("one", ANSWERED));
    for given in [given("f"), Given::default()] {
        let written = held.next(&assets, &user("y"), &given).unwrap();
        assert_eq!(written.outcome, Some(HistoryOutcome::Appended), "they are there, and stay there");
    }
    refusal_of(held.next(&assets, &user("y"), &given("g")));
}

#[test]
fn an_argument_that_changes_only_what_follows_is_taken() {
    let (assets, mut held) = (assets(&thinking("")), Held::new(History::Append));
    held.turn(&assets, &user("x"), &Given::default(), ("one", ANSWERED));
    let arguments = Map::from_iter([("enable_thinking".to_owned(), false.into())]);
    let next = held.next(&assets, &user("y"), &Given { arguments, ..Given::default() }).unwrap();
    assert!(next.rest.text.ends_with("<think>\n\n</think>\n\n"), "{}", next.rest.text);
}

#[test]
fn a_system_message_that_the_template_writes_first_is_not_lost() {
    let hoisting = "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
        {%- for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>
        {%- if add_generation_prompt %}<think>{% endif %}";
    let (assets, mut held) = (assets(hoisting), Held::new(History::Append));
    held.turn(&assets, &user("x"), &Given::default(), ("one", ANSWERED));
    let new = vec![said("system", "be brief"), said("user", "y")];
    let refused = refusal_of(held.next(&assets, &new, &Given::default()));
    assert!(refused.contains("system message"), "{refused}");
    assert!(held.next(&assets, &user("y"), &Given::default()).is_ok());
}

#[test]
fn tokens_whose_text_is_not_known_are_kept_and_stay_unknown() {
    let (assets, mut held) = (assets(&thinking("")), Held::new(History::Append));
    held.turn(&assets, &user("x"), &Given::default(), ("one", WORD));
    held.start.text = None;
    let next = held.next(&assets, &user("y"), &Given::default()).unwrap();
    assert_eq!((next.kept, &next.text, next.outcome), (3, &None, Some(HistoryOutcome::Appended)));
    let tools = vec![json!({ "type": "function", "function": { "name": "f" } })];
    refusal_of(held.next(&assets, &user("y"), &Given { tools, ..Given::default() }));
    held.start.history = History::Auto;
    let next = held.next(&assets, &user("y"), &Given::default()).unwrap();
    assert_eq!(next.outcome, Some(HistoryOutcome::Rerendered));
}

#[test]
fn tools_that_stand_in_the_known_part_of_a_text_are_held() {
    let assets = assets(&thinking(""));
    let tool = |name: &str| json!({ "type": "function", "function": { "name": name } });
    let given = |name| Given { tools: vec![tool(name)], ..Given::default() };
    let mut held = Held::new(History::Append);
    held.turn(&assets, &user("x"), &given("f"), ("one", WORD));
    held.start.text = None;
    let written = held.next(&assets, &user("y"), &given("f")).unwrap();
    assert_eq!(written.outcome, Some(HistoryOutcome::Appended));
    refusal_of(held.next(&assets, &user("y"), &given("g")));
}

#[test]
fn a_control_token_that_ends_no_answer_is_kept() {
    let mut assets = assets(&thinking(""));
    assets.eos_token_ids = vec![ANSWERED];
    let mut held = Held::new(History::Append);
    held.turn(&assets, &user("x"), &Given::default(), ("one", RETURNED));
    let next = held.next(&assets, &user("y"), &Given::default()).unwrap();
    assert_eq!(next.kept, 3);
    assert!(next.text.unwrap().contains("one<|return|><|im_end|>"));
}

#[test]
fn tokens_that_lack_a_part_of_the_conversation_are_not_appended_to() {
    let (assets, mut held) = (assets(&thinking("")), Held::new(History::Append));
    held.turn(&assets, &user("x"), &Given::default(), ("one", ANSWERED));
    held.start.is_whole = false;
    assert!(refusal_of(held.next(&assets, &user("y"), &Given::default())).contains("whole"));
}

#[test]
fn a_template_that_writes_the_last_answer_twice_or_not_at_all_is_not_appended_to() {
    for content in ["m.content + m.content", "'-'"] {
        let template = format!(
            "{{% for m in messages %}}<|im_start|>{{{{ {content} if m.role == 'assistant' else m.content }}}}{{% endfor %}}"
        );
        let (assets, mut held) = (assets(&template), Held::new(History::Append));
        held.turn(&assets, &user("x"), &Given::default(), ("one", ANSWERED));
        assert!(refusal_of(held.next(&assets, &user("y"), &Given::default())).contains("as it is"));
    }
}

#[test]
fn the_last_difference_ends_where_the_rest_is_equal() {
    assert_eq!(difference_end("abc", "abc"), 0);
    assert_eq!(difference_end("aXbYc", "abc"), 4);
    assert_eq!(difference_end("abc", "aXbYc"), 2);
    assert_eq!(difference_end("xyxy", "xy"), 4, "a second copy is a difference");
}

proptest! {
    #[test]
    fn the_word_for_the_last_answer_is_in_no_text(text in "(qjxzv|w|a| ){0,40}") {
        prop_assert!(!text.contains(&absent_word(&text)));
    }

    /// Whatever people and models write, appended turns leave the text of the past as it was and hold every
    /// new message.
    #[test]
    fn appended_turns_only_ever_add(
        turns in prop::collection::vec(
            ("[a-z<>/ \n]{1,9}", "(qjxzvw|</think>|<think>|\n| |b|<\\|im_end\\|>){0,6}", 0..3usize),
            1..6,
        )
    ) {
        static ASSETS: LazyLock<ModelAssets> = LazyLock::new(|| assets(&thinking("")));
        let mut held = Held::new(History::Append);
        for (index, (question, answer, end)) in turns.into_iter().enumerate() {
            let before = held.start.clone();
            let asked = format!("{index}{question}.");
            let end = [WORD, ANSWERED, RETURNED][end];
            let written = held.turn(&ASSETS, &user(&asked), &Given::default(), (&answer, end));
            if index == 0 {
                continue;
            }
            let text = written.text.unwrap();
            let old = before.text.unwrap();
            let kept = old.strip_suffix("<|return|>").unwrap_or(&old);
            prop_assert!(text.starts_with(kept));
            prop_assert!(written.kept + 1 >= before.tokens.len());
            prop_assert_eq!(text[kept.len()..].matches(&asked).count(), 1);
            prop_assert!(text.ends_with("<|im_start|>assistant\n<think>\n"));
        }
    }
}
