//! Real tokenizers and templates against transformers: tests/python/support/text_parity.py writes the cases
//! and says how to run this; without cases nothing runs.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::path::Path;
use std::time::{Duration, SystemTime};

use mlxd::hub::read_text_files;
use mlxd::text::{ChatTemplate, Conversation, TextError, TextFiles, Tokenizer};
use serde_json::Value;

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// Says what differs, and counts it.
struct Differences(Vec<String>);

impl Differences {
    fn check<T: PartialEq + std::fmt::Debug + ?Sized>(&mut self, what: &str, ours: &T, theirs: &T) {
        if ours != theirs {
            self.0.push(format!("{what}\n  ours   {ours:?}\n  theirs {theirs:?}"));
        }
    }
}

fn compare_tokenizer(case: &Value, tokenizer: &Tokenizer, differences: &mut Differences) {
    let name = case["folder"].as_str().unwrap();
    differences.check(&format!("{name} bos"), &tokenizer.bos_token(), &case["bos"].as_str());
    differences.check(
        &format!("{name} eos"),
        &tokenizer.eos_token_id().map(u64::from),
        &case["eos_id"].as_u64(),
    );
    differences.check(
        &format!("{name} size"),
        &u64::from(tokenizer.vocabulary_size()),
        &case["size"].as_u64().unwrap(),
    );
    for encode in list(&case["encode"]) {
        let text = encode["text"].as_str().unwrap();
        let what = format!("{name} encode {text:?}");
        differences.check(&what, &tokenizer.encode(text, false).unwrap(), &ids(&encode["plain"]));
        differences.check(&what, &tokenizer.encode(text, true).unwrap(), &ids(&encode["special"]));
    }
    for decode in list(&case["decode"]) {
        let ids = ids(&decode["ids"]);
        let what = format!("{name} decode {ids:?}");
        differences.check(&what, tokenizer.decode(&ids).unwrap().as_str(), decode["text"].as_str().unwrap());
    }
}

fn compare_renders(
    case: &Value,
    template: &ChatTemplate,
    now: SystemTime,
    differences: &mut Differences,
) -> usize {
    let name = case.get("template").unwrap_or(&case["folder"]);
    for render in list(&case["render"]) {
        let conversation = Conversation {
            messages: list(&render["messages"]),
            tools: list(&render["tools"]),
            arguments: render["arguments"].as_object().unwrap(),
            add_generation_prompt: render["add_generation_prompt"].as_bool().unwrap(),
            now,
            control_tokens: false,
        };
        let what = format!("{name} {} {} {}", render["messages"], render["tools"], render["arguments"]);
        let ours = template.render(&conversation, usize::MAX);
        // What a template would leave out is refused here, or becomes a system message.
        let is_developer = list(&render["messages"]).iter().any(|message| message["role"] == "developer");
        if is_developer
            || matches!(
                ours,
                Err(TextError::Role { .. } | TextError::Tools { .. } | TextError::Argument { .. })
            )
        {
            continue;
        }
        let ours = ours.map(|ours| ours.plain().into_owned()).map_err(|error| error.to_string());
        let theirs = match render["text"].as_str() {
            Some(text) => Ok(text.to_owned()),
            None => Err(render["error"].to_string()),
        };
        // Where Python's operations fail on a value, ours may let it pass (a loop over none is empty); what a
        // template itself refuses is refused.
        let refused = theirs.as_ref().is_err_and(|error| error.contains("TemplateError"));
        if theirs.is_ok() || (refused && ours.is_ok()) {
            differences.check(&what, &ours, &theirs);
        }
    }
    list(&case["render"]).len()
}

fn template(case: &Value, files: &TextFiles, tokenizer: &Tokenizer) -> Result<ChatTemplate, TextError> {
    let Some(source) = case.get("template") else { return ChatTemplate::new(files, tokenizer) };
    let source = std::fs::read_to_string(source.as_str().unwrap()).unwrap();
    ChatTemplate::new(&TextFiles { chat_template: Some(source), ..TextFiles::default() }, tokenizer)
}

#[test]
#[ignore = "needs cases of real models, see tests/python/support/text_parity.py"]
fn text_is_the_same_as_transformers() {
    let file = std::env::var("MLXD_TEXT_CASES").expect("MLXD_TEXT_CASES names the file of cases");
    let cases: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(cases["now"].as_u64().unwrap());
    let mut differences = Differences(Vec::new());
    for case in list(&cases["cases"]) {
        let folder = Path::new(case["folder"].as_str().unwrap());
        let files = read_text_files(folder).unwrap();
        let tokenizer = Tokenizer::new(&files).unwrap();
        if case.get("template").is_none() {
            compare_tokenizer(case, &tokenizer, &mut differences);
        }
        let before = differences.0.len();
        let rendered = match template(case, &files, &tokenizer) {
            Ok(template) => compare_renders(case, &template, now, &mut differences),
            Err(TextError::NoTemplate) => 0,
            Err(error) => {
                differences.0.push(format!("{error}"));
                0
            }
        };
        let name = case.get("template").unwrap_or(&case["folder"]);
        println!("{name}: {rendered} renders, {} differ", differences.0.len() - before);
    }
    assert!(differences.0.is_empty(), "{} differences\n{}", differences.0.len(), differences.0.join("\n"));
}
