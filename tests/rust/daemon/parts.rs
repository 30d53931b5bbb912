//! Answers with reasoning and calls that are cut back, rendered again, or continued.

use mlxd::hub::{FormChoice, FormSettings};
use mlxd::output::Format;
use mlxd_client::v1::{
    ChatInput, GenerateRequest, HistoryOutcome, Message, StoppingOptions, ToolDefinition, ToolFormat,
    TruncateSessionRequest, truncate_session_request::To,
};

use crate::daemon::harness::{Daemon, create};
use crate::daemon::tools::{
    CALL, REASONED, TEMPLATE, TOOLS, add, ask, context, in_session, parts, say, start, with_tools,
};

/// Has the model say something in a new session. Returns the number of the session's tokens before that.
async fn said(daemon: &Daemon, name: &str, request: GenerateRequest) -> usize {
    create(&daemon.client, name, TOOLS).await;
    daemon.client.generate(GenerateRequest { session: name.into(), ..request }).await.unwrap();
    daemon.engine.last_context().len()
}

/// Cuts a session back to this many tokens, and returns its answer.
async fn cut(daemon: &Daemon, name: &str, token_count: usize) -> Message {
    let to = Some(To::TokenCount(u32::try_from(token_count).unwrap()));
    let cut = TruncateSessionRequest { name: name.into(), to, ..Default::default() };
    daemon.client.truncate_session(cut).await.unwrap();
    daemon.client.session_messages(name).await.unwrap().pop().unwrap()
}

fn plain(said: &str) -> GenerateRequest {
    ask(ChatInput { messages: vec![say(said)], ..Default::default() })
}

#[tokio::test]
async fn an_answer_that_is_cut_back_keeps_what_remains_of_its_parts() {
    let daemon = start().await;
    let before = said(&daemon, "s", ask(with_tools(vec![say(&[REASONED, CALL].concat())]))).await;
    for (left, text, calls) in [
        (REASONED.len() + CALL.len(), "Let me see.", 1),
        (REASONED.len() + 20, "Let me see.", 0),
        (REASONED.len() + 14, "Let me see.", 0),
        (REASONED.len() + 3, "Let me see.", 0),
        (8 + 3, "", 0),
    ] {
        let answer = cut(&daemon, "s", before + left).await;
        let reasoning = if text.is_empty() { "I a" } else { "I ask." };
        assert_eq!((&*answer.reasoning, &*answer.text(), answer.tool_calls.len()), (reasoning, text, calls));
    }
}

#[tokio::test]
async fn an_answer_is_cut_in_the_form_that_it_was_written_in() {
    let daemon = start().await;
    // Marks around nothing.
    let marks = "<think>\n\n</think>\n\n";
    let before = said(&daemon, "empty", plain(&[marks, "hi"].concat())).await;
    let answer = cut(&daemon, "empty", before + marks.len() + 1).await;
    assert_eq!((&*answer.reasoning, &*answer.text()), ("", "h"));
    // A call that was cut off already.
    let stopping = Some(StoppingOptions { max_tokens: Some(20), ..Default::default() });
    let request = GenerateRequest { stopping, ..ask(with_tools(vec![say(CALL)])) };
    let before = said(&daemon, "call", request).await;
    let answer = cut(&daemon, "call", before + 15).await;
    assert_eq!((&*answer.text(), answer.tool_calls.len()), ("", 0));
    // It is as it was after a restart too.
    let daemon = daemon.restart().await;
    assert_eq!(cut(&daemon, "call", before + 13).await.text(), "");
    // Channels without reasoning.
    add(&daemon, TOOLS, &["{# <|channel|> <|message|> #}", TEMPLATE].concat());
    let final_channel = "<|channel|>final<|message|>";
    let before = said(&daemon, "final", plain(&[final_channel, "hello there"].concat())).await;
    assert_eq!(cut(&daemon, "final", before + final_channel.len() + 5).await.text(), "hello");
    daemon.client.generate(in_session("final", with_tools(vec![Message::user("and?")]))).await.unwrap();
}

#[tokio::test]
async fn calls_of_another_form_than_the_models_stay_calls() {
    let daemon = start().await;
    let prompted = "{% for m in messages %}<|start|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}\
        {% if add_generation_prompt %}<|start|>assistant:{% endif %}";
    add(&daemon, TOOLS, prompted);
    let chat = ChatInput {
        tool_format: ToolFormat::Prompted.into(),
        ..with_tools(vec![say(&[CALL, "\n", CALL].concat())])
    };
    let before = said(&daemon, "s", ask(chat)).await;
    let held = daemon.client.session_messages("s").await.unwrap().pop().unwrap();
    let answer = cut(&daemon, "s", before + CALL.len() + 30).await;
    assert_eq!((&*answer.text(), &answer.tool_calls[..]), ("", &held.tool_calls[..1]));
}

/// Starts a daemon whose model calls tools in this form.
async fn calling(format: Format) -> Daemon {
    let daemon = Daemon::with(|config| {
        let settings = FormSettings { tools: Some(FormChoice::Is(format)), ..FormSettings::default() };
        config.forms.insert(TOOLS.into(), settings);
    })
    .await;
    add(&daemon, TOOLS, TEMPLATE);
    daemon
}

#[tokio::test]
async fn calls_that_only_their_names_tell_from_text_stay_calls() {
    let daemon = calling(Format::Llama3Json).await;
    let call = r#"{"name": "weather", "parameters": {"city": "Paris"}}"#;
    let before = said(&daemon, "s", ask(with_tools(vec![say(&[call, "; ", call].concat())]))).await;
    assert_eq!(daemon.client.session_messages("s").await.unwrap()[1].tool_calls.len(), 2);
    for (left, calls) in [(call.len() + 30, 1), (30, 0), (25, 0)] {
        let answer = cut(&daemon, "s", before + left).await;
        assert_eq!((&*answer.text(), answer.tool_calls.len()), ("", calls), "{left}");
    }
    let text = r#"{"name": "Anna", "age": 3}"#;
    let before = said(&daemon, "text", ask(with_tools(vec![say(text)]))).await;
    assert_eq!(cut(&daemon, "text", before + 12).await.text(), text[..12]);
}

#[tokio::test]
async fn arguments_that_tools_gave_their_types_keep_them() {
    let daemon = calling(Format::Qwen3Coder).await;
    let call =
        "<tool_call>\n<function=weather>\n<parameter=days>\n5\n</parameter>\n</function>\n</tool_call>";
    let parameters_json = r#"{"type": "object", "properties": {"days": {"type": "integer"}}}"#.into();
    let tools = vec![ToolDefinition { name: "weather".into(), parameters_json, ..Default::default() }];
    let chat = ChatInput { tools, ..with_tools(vec![say(&[call, "\n", call].concat())]) };
    let before = said(&daemon, "s", ask(chat)).await;
    let answer = cut(&daemon, "s", before + call.len() + 20).await;
    assert_eq!(answer.tool_calls.len(), 1);
    assert_eq!(answer.tool_calls[0].arguments_json, r#"{"days":5}"#);
}

#[tokio::test]
async fn a_template_that_takes_no_text_beside_reasoning_and_calls_gets_one_text() {
    let daemon = start().await;
    let refuses = "{%- if m.tool_calls and m.content and m.thinking %}{{ raise_exception('both') }}{% endif %}\n{%- if m.reasoning_content";
    add(&daemon, TOOLS, &TEMPLATE.replacen("\n{%- if m.reasoning_content", &["\n", refuses].concat(), 1));
    create(&daemon.client, "s", TOOLS).await;
    let said = say(&[REASONED, CALL].concat());
    let first = daemon.client.generate(in_session("s", with_tools(vec![said.clone()]))).await.unwrap();
    assert_eq!((&*first.reasoning, &*first.text), ("I ask.", "Let me see."));
    let result = || Message::tool(&*first.tool_calls[0].id, "rain");
    let second = daemon.client.generate(in_session("s", with_tools(vec![result()]))).await.unwrap();
    assert_eq!(second.history(), HistoryOutcome::Rerendered);
    let written = "<think>\nI ask.\n\nLet me see.\n</think>\n\n<tool_call>";
    assert!(context(&daemon).contains(written), "{}", context(&daemon));
    let held = daemon.client.session_messages("s").await.unwrap();
    assert_eq!((&*held[1].reasoning, &*held[1].text()), ("I ask.", "Let me see."));
    let stateless = with_tools(vec![said, first.to_message(), result()]);
    daemon.client.generate(ask(stateless)).await.unwrap();
    assert!(context(&daemon).contains(written));
}

#[tokio::test]
async fn an_answer_goes_on_within_its_part() {
    let daemon = start().await;
    let continued = async |words: &str, output: &str| {
        let messages = vec![say(output), Message::assistant(words)];
        let chat = ChatInput { continue_final_message: true, ..with_tools(messages) };
        let answer = daemon.client.generate(ask(chat)).await.unwrap();
        let (reasoning, text, calls) = parts(&answer);
        (reasoning.to_owned(), text.to_owned(), calls.len())
    };
    let is = |reasoning: &str, text: &str, calls| (reasoning.to_owned(), text.to_owned(), calls);
    let thought = continued("<think>\nOne.", "\n\nTwo.\n</think>\n\nSo").await;
    assert_eq!(thought, is("\n\nTwo.", "So", 0));
    assert_eq!(continued("It ends with ", "</think>, then").await, is("", "</think>, then", 0));
    assert_eq!(continued("Well, ", CALL).await, is("", "", 1));
}
