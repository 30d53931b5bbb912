//! Reasoning and tool calls apart from the text: in answers and streams, in sessions, and in what templates
//! are given.

use std::fs;

use mlxd::hub::{FormChoice, FormSettings};
use mlxd::output::Reasoning;
use mlxd_client::v1::{
    CapabilitiesRequest, ChatInput, CountTokensRequest, ErrorReason, Feature, FinishReason,
    ForkSessionRequest, GenerateRequest, GenerateResponse, History, HistoryOutcome, ImportStart, Message,
    ReasoningOptions, Role, StoppingOptions, ToolCall, ToolChoice, ToolChoiceMode, ToolDefinition,
    ToolFormat, count_tokens_request, generate_request::Input, stream_generate_response::Event,
};
use serde_json::{Value, json};

use crate::daemon::fake::{SAID, SAY};
use crate::daemon::folder;
use crate::daemon::harness::{Daemon, MODEL, create, prompt, refused};

pub const TOOLS: &str = "tools";

/// A template that writes tools, calls and reasoning as Qwen3's does.
pub const TEMPLATE: &str = "{%- if tools %}<|start|>system:{{ tools|tojson }}\
Call: <tool_call>\\n{\"name\": …, \"arguments\": …}\\n</tool_call><|end|>{% endif %}
{%- for m in messages %}<|start|>{{ m.role }}:
{%- if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}
{%- for c in m.tool_calls or [] %}<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": {{ c.function.arguments|tojson }}}\n</tool_call>
{%- endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant:{% if enable_thinking %}<think>\n{% endif %}{% endif %}";

pub const REASONED: &str = "<think>\nI ask.\n</think>\n\nLet me see.";
pub const CALL: &str =
    "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>";

/// Adds a model with this template and room for more than a few words.
pub fn add(daemon: &Daemon, name: &str, template: &str) {
    let folder = daemon.folder.path().join("models").join(name);
    folder::write(&folder);
    let config = folder.join("config.json");
    let mut facts: Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    facts["max_position_embeddings"] = 8000.into();
    fs::write(config, facts.to_string()).unwrap();
    let config = json!({ "chat_template": template, "eos_token": "<|end|>" });
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
}

pub async fn start() -> Daemon {
    let daemon = Daemon::start().await;
    add(&daemon, TOOLS, TEMPLATE);
    daemon
}

pub fn weather() -> ToolDefinition {
    let parameters_json = r#"{"type": "object", "properties": {"city": {"type": "string"}}}"#.into();
    ToolDefinition { name: "weather".into(), parameters_json, ..Default::default() }
}

/// A user's message that has the model answer with `said`.
pub fn say(said: &str) -> Message {
    Message::user(format!("{SAY}{said}{SAID}"))
}

pub fn ask(chat: ChatInput) -> GenerateRequest {
    GenerateRequest { model: TOOLS.into(), input: Some(Input::Chat(chat)), ..Default::default() }
}

pub fn with_tools(messages: Vec<Message>) -> ChatInput {
    ChatInput { messages, tools: vec![weather()], ..Default::default() }
}

pub fn in_session(name: &str, chat: ChatInput) -> GenerateRequest {
    GenerateRequest { session: name.into(), ..ask(chat) }
}

pub fn context(daemon: &Daemon) -> String {
    let text = daemon.engine.last_context().into_iter();
    let bytes = text.flat_map(|id| match id {
        folder::START => b"<|start|>".to_vec(),
        folder::END => b"<|end|>".to_vec(),
        byte => vec![u8::try_from(byte).unwrap()],
    });
    String::from_utf8(bytes.collect()).unwrap()
}

pub fn parts(answer: &GenerateResponse) -> (&str, &str, Vec<(&str, &str)>) {
    let calls = answer.tool_calls.iter().map(|call| (&*call.name, &*call.arguments_json));
    (&answer.reasoning, &answer.text, calls.collect())
}

#[tokio::test]
async fn both_generate_calls_part_reasoning_text_and_tool_calls() {
    let daemon = start().await;
    let request = || ask(with_tools(vec![say(&[REASONED, CALL].concat())]));
    let whole = daemon.client.generate(request()).await.unwrap();
    let call = ("weather", r#"{"city": "Paris"}"#);
    assert_eq!(parts(&whole), ("I ask.", "Let me see.", vec![call]));
    assert_eq!(whole.finish_reason(), FinishReason::ToolCalls);
    assert!(!whole.tool_calls[0].id.is_empty());
    let usage = whole.usage.unwrap();
    assert!((10..REASONED.len()).contains(&(usage.reasoning_tokens as usize)), "{usage:?}");
    assert_eq!(usage.completion_tokens as usize, REASONED.len() + CALL.len() + 1);

    let stream = daemon.client.stream_generate(request()).await.unwrap();
    let streamed = stream.collect_response().await.unwrap();
    assert_eq!((parts(&streamed), streamed.finish_reason()), (parts(&whole), whole.finish_reason()));
    assert_eq!(streamed.usage, whole.usage);
    assert_ne!(streamed.tool_calls[0].id, whole.tool_calls[0].id);

    let mut stream = daemon.client.stream_generate(request()).await.unwrap();
    let (mut names, mut done) = (0, 0);
    while let Some(event) = stream.next_event().await.unwrap() {
        let Event::Delta(delta) = event else { continue };
        assert!(!delta.text.contains('<') && !delta.reasoning.contains('<'), "no markup: {delta:?}");
        for part in delta.tool_calls {
            assert_eq!((part.index, part.id.is_empty()), (0, part.name.is_empty()));
            names += usize::from(!part.name.is_empty());
            done += usize::from(part.done);
        }
    }
    assert_eq!((names, done), (1, 1));
}

#[tokio::test]
async fn only_what_a_request_asks_for_is_read() {
    let daemon = start().await;
    let said = [REASONED, CALL].concat();
    // Raw text stays as it is.
    let raw = GenerateRequest { model: TOOLS.into(), ..prompt(&format!("{SAY}{said}{SAID}")) };
    assert_eq!(parts(&daemon.client.generate(raw).await.unwrap()), ("", &*said, vec![]));
    // Without tools, or with none to call, a call is text.
    let text = ["Let me see.", CALL].concat();
    let none = || Some(ToolChoice::mode(ToolChoiceMode::None));
    let without = ChatInput { tools: Vec::new(), ..with_tools(vec![say(&said)]) };
    let forbidden = ChatInput { tool_choice: none(), ..with_tools(vec![say(&said)]) };
    for chat in [without, forbidden] {
        let answer = daemon.client.generate(ask(chat)).await.unwrap();
        assert_eq!(parts(&answer), ("I ask.", &*text, vec![]));
        assert_eq!(answer.finish_reason(), FinishReason::Stop);
        assert!(!context(&daemon).contains("properties"), "the tools are not shown");
    }
    let no_tools = ChatInput { tools: Vec::new(), tool_choice: none(), ..with_tools(vec![say("a")]) };
    assert_eq!(refused(&daemon, ask(no_tools)).await, "chat.tool_choice");
    let alone =
        ChatInput { parallel_tool_calls: Some(false), messages: vec![say("a")], ..Default::default() };
    assert_eq!(refused(&daemon, ask(alone)).await, "chat.parallel_tool_calls");
    let unsaid = ChatInput { tool_choice: Some(ToolChoice::default()), ..with_tools(vec![say("a")]) };
    assert_eq!(refused(&daemon, ask(unsaid)).await, "chat.tool_choice");
}

#[tokio::test]
async fn a_call_that_is_cut_off_is_none() {
    let daemon = start().await;
    let said = [CALL, CALL].concat();
    for max_tokens in [CALL.len() / 2, CALL.len() + 30, CALL.len() * 2 - 20] {
        let stopping =
            StoppingOptions { max_tokens: Some(u32::try_from(max_tokens).unwrap()), ..Default::default() };
        let request =
            || GenerateRequest { stopping: Some(stopping.clone()), ..ask(with_tools(vec![say(&said)])) };
        let whole = daemon.client.generate(request()).await.unwrap();
        let streamed =
            daemon.client.stream_generate(request()).await.unwrap().collect_response().await.unwrap();
        for answer in [&whole, &streamed] {
            assert_eq!((&*answer.text, answer.tool_calls.len()), ("", max_tokens / CALL.len()));
            assert_eq!(answer.finish_reason(), FinishReason::Length);
        }
    }
}

#[tokio::test]
async fn a_session_keeps_calls_and_reasoning_and_goes_on_from_its_tokens() {
    let daemon = start().await;
    create(&daemon.client, "s", TOOLS).await;
    let said = [REASONED, CALL].concat();
    let first = daemon.client.generate(in_session("s", with_tools(vec![say(&said)]))).await.unwrap();
    let before = context(&daemon);
    let held = daemon.client.session_messages("s").await.unwrap();
    let answer = first.to_message();
    assert_eq!((&held[1].reasoning, &held[1].content), (&answer.reasoning, &answer.content));
    assert_eq!(held[1].tool_calls[0].id, answer.tool_calls[0].id);
    assert_eq!(held[1].tool_calls[0].arguments_json, r#"{"city":"Paris"}"#);
    // The template writes the answer again, so that the tokens stay.
    let result = Message::tool(&*first.tool_calls[0].id, "rain");
    let second = daemon.client.generate(in_session("s", with_tools(vec![result]))).await.unwrap();
    assert_eq!(second.history(), HistoryOutcome::Continued);
    let written = [&*before, &*said, "<|end|><|start|>tool:rain<|end|><|start|>assistant:"].concat();
    assert_eq!(context(&daemon), written);

    // It survives a restart, a fork and a journey.
    let daemon = daemon.restart().await;
    let after = daemon.client.session_messages("s").await.unwrap();
    assert_eq!((&after[1], after.len()), (&held[1], 4));
    let fork = ForkSessionRequest { name: "s".into(), new_name: "f".into(), ..Default::default() };
    daemon.client.fork_session(fork).await.unwrap();
    let export = mlxd_client::v1::ExportSessionRequest { name: "s".into(), ..Default::default() };
    let file = daemon.client.export_session(export).await.unwrap().collect_file().await.unwrap();
    let start = ImportStart { name: "i".into(), ..Default::default() };
    daemon.client.import_session_file(start, [file]).await.unwrap();
    for name in ["s", "f", "i"] {
        assert_eq!(daemon.client.session_messages(name).await.unwrap(), after, "{name}");
        let chat = with_tools(vec![Message::user("and?")]);
        let third = daemon.client.generate(in_session(name, chat)).await.unwrap();
        assert_eq!(third.history(), HistoryOutcome::Continued, "{name}");
    }
}

#[tokio::test]
async fn an_answer_that_calls_tools_is_appended_to_however_the_template_writes_it() {
    let daemon = start().await;
    // Other spaces; no text beside calls; no reasoning in the past.
    let calls = "{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>{{ c.function|tojson }}</tool_call>{% endfor %}";
    let other = format!(
        "{{{{ tools|tojson if tools }}}}{{% for m in messages %}}<|start|>{{{{ m.role }}}}:{calls}{{% else %}}\
         {{{{ m.content }}}}{{% endif %}}<|end|>{{% endfor %}}{{% if add_generation_prompt %}}<|start|>assistant:{{% endif %}}"
    );
    add(&daemon, TOOLS, &other);
    for history in [History::Append, History::Auto] {
        let name = history.as_str_name();
        create(&daemon.client, name, TOOLS).await;
        let turn = |chat| GenerateRequest { history: history.into(), ..in_session(name, chat) };
        let said = ["Let me see.\n", CALL].concat();
        let first = daemon.client.generate(turn(with_tools(vec![say(&said)]))).await.unwrap();
        let before = context(&daemon);
        let result = Message::tool(&*first.tool_calls[0].id, "rain");
        let second = daemon.client.generate(turn(with_tools(vec![result]))).await.unwrap();
        let next = "<|end|><|start|>tool:rain<|end|><|start|>assistant:";
        if history == History::Append {
            assert_eq!(second.history(), HistoryOutcome::Appended);
            assert_eq!(context(&daemon), [&*before, &*said, next].concat());
        } else {
            assert_eq!(second.history(), HistoryOutcome::Rerendered);
            assert!(context(&daemon).ends_with(next));
        }
    }
}

#[tokio::test]
async fn reasoning_is_turned_on_by_the_templates_own_switch() {
    let daemon = start().await;
    let on = |enabled| ReasoningOptions { enabled: Some(enabled), ..Default::default() };
    let asked = |reasoning, said: &str| GenerateRequest {
        reasoning: Some(reasoning),
        ..ask(ChatInput { messages: vec![say(said)], ..Default::default() })
    };
    // The template begins the reasoning, and the output goes on with it.
    let answer = daemon.client.generate(asked(on(true), "hm\n</think>\n\nyes")).await.unwrap();
    assert!(context(&daemon).ends_with("assistant:<think>\n"));
    assert_eq!(parts(&answer), ("hm", "yes", vec![]));
    let answer = daemon.client.generate(asked(on(false), "yes")).await.unwrap();
    assert!(context(&daemon).ends_with("assistant:"));
    assert_eq!(parts(&answer), ("", "yes", vec![]));

    let chat = ChatInput { messages: vec![Message::user("a")], ..Default::default() };
    let count = |reasoning| CountTokensRequest {
        model: TOOLS.into(),
        input: Some(count_tokens_request::Input::Chat(chat.clone())),
        reasoning,
        ..Default::default()
    };
    let without = daemon.client.count_tokens(count(None)).await.unwrap().token_count;
    let with = daemon.client.count_tokens(count(Some(on(true)))).await.unwrap().token_count;
    assert_eq!(with, without + 8);

    let twice = prost_types::Value { kind: Some(prost_types::value::Kind::BoolValue(true)) };
    let template_arguments =
        Some(prost_types::Struct { fields: [("enable_thinking".to_owned(), twice)].into() });
    let twice = ChatInput { template_arguments, messages: vec![say("a")], ..Default::default() };
    let twice = GenerateRequest { reasoning: Some(on(true)), ..ask(twice) };
    assert_eq!(refused(&daemon, twice).await, "reasoning.enabled");
    let budget = ReasoningOptions { budget_tokens: Some(1), ..Default::default() };
    daemon.client.generate(asked(budget.clone(), "a")).await.unwrap();
    let formless = GenerateRequest { model: MODEL.into(), ..asked(budget, "a") };
    assert_eq!(refused(&daemon, formless).await, "reasoning.budget_tokens");
    let effort = ReasoningOptions { effort: "low".into(), ..Default::default() };
    assert_eq!(refused(&daemon, asked(effort, "a")).await, "reasoning.effort");
    let unswitched = GenerateRequest { model: MODEL.into(), ..asked(on(true), "a") };
    assert_eq!(refused(&daemon, unswitched).await, "reasoning.enabled");
    let raw = GenerateRequest { reasoning: Some(on(true)), ..prompt("a") };
    assert_eq!(refused(&daemon, raw).await, "reasoning");
}

#[tokio::test]
async fn past_reasoning_is_given_to_templates_as_they_take_it() {
    let daemon = start().await;
    let thought = Message { reasoning: "why".into(), ..Message::assistant("so") };
    let chat = |messages| ChatInput { messages, ..Default::default() };
    let past = || vec![Message::user("a"), thought.clone(), Message::user("b")];
    daemon.client.generate(ask(chat(past()))).await.unwrap();
    assert!(context(&daemon).contains("assistant:<think>\nwhy\n</think>\n\nso<|end|>"));
    // A template that reads no reasoning gets it in the text, where the model wrote it.
    let unread = "{% for m in messages %}<|start|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}\
        {% if add_generation_prompt %}<|start|>assistant:<think>\n{% endif %}";
    add(&daemon, TOOLS, unread);
    daemon.client.generate(ask(chat(past()))).await.unwrap();
    assert!(context(&daemon).contains("assistant:<think>\nwhy\n</think>\n\nso<|end|>"));
    // One of a model that does not reason has no place for it.
    let plain = GenerateRequest { model: MODEL.into(), ..ask(chat(past())) };
    assert_eq!(refused(&daemon, plain).await, "chat.messages[1].reasoning");
    let user = Message { reasoning: "why".into(), ..Message::user("a") };
    assert_eq!(refused(&daemon, ask(chat(vec![user]))).await, "chat.messages[0].reasoning");
}

#[tokio::test]
async fn capabilities_name_the_forms_of_a_model() {
    let daemon = start().await;
    let models = vec![TOOLS.into(), MODEL.into()];
    let described = daemon.client.capabilities(CapabilitiesRequest { models }).await.unwrap().models;
    let [tools, plain] = &described[..] else { panic!("{described:?}") };
    assert_eq!((&*tools.tool_format, &*tools.reasoning_format), ("hermes", "think"));
    assert_eq!((&*tools.reasoning_switch, tools.reasoning_effort), ("enable_thinking", false));
    assert_eq!((&*plain.tool_format, &*plain.reasoning_format, &*plain.reasoning_switch), ("", "", ""));
    for feature in [Feature::Reasoning, Feature::ToolCalls] {
        assert!(tools.features().any(|has| has == feature) && !plain.features().any(|has| has == feature));
    }
}

#[tokio::test]
async fn calls_that_a_client_sends_are_written_by_the_template() {
    let daemon = start().await;
    let arguments_json = r#"{"city": "Rome"}"#.into();
    let call = ToolCall { id: "1".into(), name: "weather".into(), arguments_json };
    let called = Message { tool_calls: vec![call], ..Message::assistant("") };
    let messages = vec![Message::user("a"), called, Message::tool("1", "sun")];
    daemon.client.generate(ask(with_tools(messages))).await.unwrap();
    let expected = r#"{"name": "weather", "arguments": {"city": "Rome"}}"#;
    assert!(context(&daemon).contains(expected), "{}", context(&daemon));
}

#[tokio::test]
async fn a_configuration_may_name_other_forms() {
    let daemon = Daemon::with(|config| {
        let seed = FormChoice::Is(Reasoning::Seed);
        let settings = FormSettings { tools: Some(FormChoice::Off), reasoning: Some(seed) };
        config.forms.insert(TOOLS.into(), settings);
    })
    .await;
    add(&daemon, TOOLS, TEMPLATE);
    let models = vec![TOOLS.into()];
    let described =
        daemon.client.capabilities(CapabilitiesRequest { models }).await.unwrap().models.remove(0);
    assert_eq!((&*described.tool_format, &*described.reasoning_format), ("", "seed"));
    // What only a known form of calls allows is refused.
    let one = ChatInput { parallel_tool_calls: Some(false), ..with_tools(vec![say(CALL)]) };
    assert_eq!(refused(&daemon, ask(one.clone())).await, "chat.parallel_tool_calls");
    let prompted = ChatInput { tool_format: ToolFormat::Prompted.into(), ..one };
    assert_eq!(daemon.client.generate(ask(prompted)).await.unwrap().tool_calls.len(), 1);
    let said = format!("<seed:think>hm</seed:think>{CALL}");
    let answer = daemon.client.generate(ask(with_tools(vec![say(&said)]))).await.unwrap();
    assert_eq!(parts(&answer), ("hm", CALL, vec![]));
}

#[tokio::test]
async fn an_error_names_the_message_as_its_caller_sent_it() {
    let daemon = start().await;
    let template = "{% for m in messages %}{% if m.role != 'system' or loop.first %}<|start|>{{ m.role }}:{{ m.content }}<|end|>\
        {% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant:{% endif %}";
    add(&daemon, TOOLS, template);
    create(&daemon.client, "s", TOOLS).await;
    let prompted = |messages| ChatInput { tool_format: ToolFormat::Prompted.into(), ..with_tools(messages) };
    let asked = in_session("s", prompted(vec![say(&[CALL, CALL].concat())]));
    let calls = daemon.client.generate(asked).await.unwrap().tool_calls;
    // A text describes the tools before the first message, and all results make one.
    let results: Vec<_> = calls.iter().map(|call| Message::tool(&*call.id, "rain")).collect();
    let late = Message { role: Role::System.into(), ..Message::user("Be brief.") };
    let turn = in_session("s", prompted([results, vec![late]].concat()));
    assert_eq!(refused(&daemon, turn).await, "chat.messages[2].role");
}

#[tokio::test]
async fn any_chat_model_can_be_told_of_tools_in_a_text() {
    let daemon = start().await;
    let template = "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no') }}{% endif %}\
        <|start|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant:{% endif %}";
    add(&daemon, TOOLS, template);
    assert_eq!(refused(&daemon, ask(with_tools(vec![say("a")]))).await, "chat.tools");
    let prompted = |messages| ChatInput { tool_format: ToolFormat::Prompted.into(), ..with_tools(messages) };
    for history in [History::Auto, History::Append] {
        let name = history.as_str_name();
        create(&daemon.client, name, TOOLS).await;
        let turn = |chat| GenerateRequest { history: history.into(), ..in_session(name, chat) };
        let first = daemon.client.generate(turn(prompted(vec![say(CALL)]))).await.unwrap();
        assert_eq!(parts(&first).2, [("weather", r#"{"city": "Paris"}"#)]);
        assert_eq!(first.finish_reason(), FinishReason::ToolCalls);
        let before = context(&daemon);
        assert!(before.starts_with("<|start|>system:") && before.contains(r#""name":"weather""#), "{before}");
        let result = Message::tool(&*first.tool_calls[0].id, "rain");
        let second = daemon.client.generate(turn(prompted(vec![result]))).await.unwrap();
        assert_ne!(second.history(), HistoryOutcome::Rerendered);
        let next = "<|end|><|start|>user:<tool_response>\nrain\n</tool_response><|end|><|start|>assistant:";
        assert!(context(&daemon).starts_with(&before) && context(&daemon).ends_with(next));
        let roles: Vec<_> =
            daemon.client.session_messages(name).await.unwrap().iter().map(Message::role).collect();
        assert_eq!(roles, [Role::User, Role::Assistant, Role::Tool, Role::Assistant], "what a client sees");
        // Other tools are not lost.
        let tools = vec![ToolDefinition { name: "other".into(), ..Default::default() }];
        let other = turn(ChatInput { tools, ..prompted(vec![say("a")]) });
        let outcome = daemon.client.generate(other).await;
        if history == History::Append {
            assert_eq!(outcome.unwrap_err().reason(), ErrorReason::CannotAppend);
        } else {
            assert_eq!(outcome.unwrap().history(), HistoryOutcome::Rerendered);
        }
    }
}
