//! Which of a model's files have its chat templates, and which of those count.

use serde_json::Value;

use super::{TextError, TextFiles};

/// The name of a model's only template, or of its main one where it has several.
pub(super) const DEFAULT: &str = "default";
/// The template for conversations with tools, where a model has a separate one.
pub(super) const TOOL_USE: &str = "tool_use";

/// A template's name and its text.
pub(super) type Source = (String, String);

/// Returns a model's templates and the name of the file that has them.
pub(super) fn sources(files: &TextFiles) -> Result<(&'static str, Vec<Source>), TextError> {
    if let Some(why) = &files.template_fault {
        return Err(TextError::Invalid { file: "the chat template", why: why.clone() });
    }
    if let Some(source) = &files.chat_template {
        let default = (DEFAULT.to_owned(), source.clone());
        let tool_use = files.tool_use_template.clone().map(|source| (TOOL_USE.to_owned(), source));
        return Ok(("chat_template.jinja", std::iter::once(default).chain(tool_use).collect()));
    }
    let configs = [
        ("tokenizer_config.json", &files.tokenizer_config),
        ("chat_template.json", &files.chat_template_json),
    ];
    for (file, config) in configs {
        let named = match config.as_ref().and_then(|config| config.get("chat_template")) {
            None | Some(Value::Null) => continue,
            Some(Value::String(source)) => vec![(DEFAULT.to_owned(), source.clone())],
            Some(Value::Array(list)) => list.iter().filter_map(named).collect(),
            Some(Value::Object(map)) => {
                let texts = map.iter().filter_map(|(name, text)| Some((name, text.as_str()?)));
                texts.map(|(name, text)| (name.clone(), text.to_owned())).collect()
            }
            Some(Value::Bool(_) | Value::Number(_)) => {
                let why = "chat_template is neither a text nor a list".to_owned();
                return Err(TextError::Invalid { file, why });
            }
        };
        return Ok((file, named));
    }
    Err(TextError::NoTemplate)
}

fn named(entry: &Value) -> Option<Source> {
    Some((entry.get("name")?.as_str()?.to_owned(), entry.get("template")?.as_str()?.to_owned()))
}

/// Returns the main template, which may be the only one of another name, and the one for tools if there is
/// one.
pub(super) fn chosen(file: &'static str, mut sources: Vec<Source>) -> Result<Vec<Source>, TextError> {
    if let [(name, _)] = sources.as_mut_slice() {
        DEFAULT.clone_into(name);
    }
    let names = || sources.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
    let invalid = |why: String| Err(TextError::Invalid { file, why });
    match sources.iter().find(|(name, _)| name == DEFAULT) {
        None => return invalid(format!("no chat template is named default, only: {}", names())),
        Some((_, source)) if source.trim().is_empty() => {
            return invalid("the chat template is empty".to_owned());
        }
        Some(_) => {}
    }
    sources.retain(|(name, _)| name == DEFAULT || name == TOOL_USE);
    Ok(sources)
}
