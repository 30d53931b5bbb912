//! Streams one answer: `cargo run -p mlxd-client --example stream -- MODEL "A question"`.

use std::io::Write as _;

use mlxd_client::v1::{GenerateRequest, stream_generate_response::Event};
use mlxd_client::{Client, ErrorReason};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(model), Some(question)) = (arguments.next(), arguments.next()) else {
        return Err("usage: stream MODEL QUESTION".into());
    };

    let client = Client::connect_default().await?;
    let request = GenerateRequest { model, ..GenerateRequest::chat(question) };
    let mut stream = match client.stream_generate(request).await {
        Err(error) if error.reason() == ErrorReason::ModelNotFound => {
            return Err(format!("{error}; `mlxd ps --all` lists the models").into());
        }
        stream => stream?,
    };

    #[allow(clippy::disallowed_methods, reason = "failures to write are returned")]
    let mut out = std::io::stdout();
    while let Some(event) = stream.next_event().await? {
        match event {
            Event::Delta(delta) => {
                out.write_all(delta.text.as_bytes())?;
                out.flush()?;
            }
            Event::Finished(finished) => {
                let usage = finished.usage.unwrap_or_default();
                let reason = finished.finish_reason();
                writeln!(out, "\n[{reason:?}, {} tokens]", usage.completion_tokens)?;
            }
            Event::Started(_) | Event::Progress(_) | Event::ChoiceFinished(_) => {}
        }
    }
    Ok(())
}
