//! What transformers renders of small templates, and we. The records are written by
//! tests/python/support/template_fragments.py.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::fs;

use mlxd::text::{ChatTemplate, TextFiles, Tokenizer};
use serde_json::{Map, Value};

use crate::text_template::{Input, folder, render_with, tokenizer};

/// Fragments that we render otherwise, and those that we refuse, with their reasons.
#[derive(Default)]
struct Differences {
    rendered: Vec<String>,
    refused: Vec<String>,
    count: usize,
}

impl Differences {
    fn of(record: &Value) -> Self {
        let folder = folder(&[]);
        let tokenizer = tokenizer(folder.path());
        let mut differences = Self::default();
        for fragment in record["fragments"].as_array().unwrap() {
            let source = fragment["source"].as_str().unwrap();
            let Some(theirs) = fragment["text"].as_str() else { continue };
            differences.count += 1;
            let ours = rendered(record, source, &tokenizer);
            let list = match &ours {
                Ok(ours) if ours == theirs => continue,
                Ok(_) => &mut differences.rendered,
                Err(_) => &mut differences.refused,
            };
            list.push(format!("{source}\n  ours   {ours:?}\n  theirs {theirs:?}"));
        }
        differences
    }
}

fn rendered(record: &Value, source: &str, tokenizer: &Tokenizer) -> Result<String, String> {
    // A message that a template does not write is refused: all are written before.
    let whole = format!("{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}|\n{source}");
    let files = TextFiles { chat_template: Some(whole), ..TextFiles::default() };
    let template = ChatTemplate::new(&files, tokenizer).map_err(|error| error.to_string())?;
    let messages = record["messages"].as_array().unwrap();
    // An argument that a template does not read is refused.
    let variables =
        record["variables"].as_object().unwrap().iter().filter(|(name, _)| source.contains(*name));
    let mut arguments: Map<String, Value> =
        variables.map(|(name, value)| (name.clone(), value.clone())).collect();
    let text = loop {
        let input = Input { messages: messages.clone(), arguments: arguments.clone(), ..Input::default() };
        let text = render_with(&template, &input);
        let unread = text.as_ref().err().and_then(|error| error.rsplit_once("has no variable "));
        let Some((unread, _)) = unread.and_then(|(_, why)| why.split_once(';')) else { break text };
        arguments.remove(unread);
    };
    let trims = ["{%-", "{{-", "{#-"].iter().any(|tag| source.trim_start().starts_with(tag));
    let text = text?.split_once('|').unwrap().1.to_owned();
    Ok(if trims { text } else { text[1..].to_owned() })
}

#[test]
fn fragments_are_rendered_as_transformers_does() {
    let record = serde_json::from_str(include_str!("template_fragments.json")).unwrap();
    let Differences { mut rendered, refused, .. } = Differences::of(&record);
    rendered.extend(refused);
    assert!(rendered.is_empty(), "{} differ:\n{}", rendered.len(), rendered.join("\n"));
}

#[test]
fn drawn_templates_are_rendered_as_transformers_does_or_refused() {
    let other = std::env::var_os("MLXD_TEMPLATE_RECORD").map(|path| fs::read_to_string(path).unwrap());
    let record = other.as_deref().unwrap_or(include_str!("template_grammar.json"));
    let Differences { rendered, refused, count } = Differences::of(&serde_json::from_str(record).unwrap());
    assert!(rendered.is_empty(), "{} of {count} differ:\n{}", rendered.len(), rendered.join("\n"));
    assert!(refused.len() * 40 <= count, "{} of {count} refused:\n{}", refused.len(), refused.join("\n"));
}
