//! The form of an answer, as arguments.

use std::path::PathBuf;

use clap::Args;
use mlxd_client::v1::ResponseFormat;

use super::failure::{Result, read_text};

#[derive(Args, Debug)]
#[group(multiple = false)]
#[command(next_help_heading = "Form of the answer")]
pub(crate) struct FormatArgs {
    /// Answer with JSON that obeys the JSON schema in a file
    #[arg(long, value_name = "FILE")]
    schema: Option<PathBuf>,
    /// Answer with a JSON object
    #[arg(long)]
    json_object: bool,
    /// Answer with text that a regular expression matches as a whole
    #[arg(long, value_name = "REGEX")]
    regex: Option<String>,
    /// Answer with text of the Lark grammar in a file
    #[arg(long, value_name = "FILE")]
    grammar: Option<PathBuf>,
    /// Answer with one of these texts; given once for each
    #[arg(long, value_name = "TEXT")]
    choice: Vec<String>,
}

impl FormatArgs {
    /// Reads what the arguments name.
    pub(crate) fn read(&self) -> Result<Option<ResponseFormat>> {
        let Self { schema, json_object, regex, grammar, choice } = self;
        if let Some(file) = schema {
            return Ok(Some(ResponseFormat::json_schema(read_text(file)?)));
        }
        if let Some(file) = grammar {
            return Ok(Some(ResponseFormat::grammar(read_text(file)?)));
        }
        if let Some(regex) = regex {
            return Ok(Some(ResponseFormat::regex(regex)));
        }
        if !choice.is_empty() {
            return Ok(Some(ResponseFormat::choice(choice)));
        }
        Ok(json_object.then(ResponseFormat::json_object))
    }
}
