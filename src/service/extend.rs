//! A turn without an answer: an input is added to a session and its KV computed, so that the next turn
//! prefills only what it adds. It is prepared, queued and committed as a generation of no tokens.

use super::Service;
use super::cache::CacheOptions;
use super::caller::Caller;
use super::chat::GENERATION_PROMPT;
use super::event::{Event, Usage};
use super::fields::session_name;
use super::format::OutputOptions;
use super::prepare::Aim;
use super::request::{GenerateRequest, Input, Target};
use super::sampling::{SamplingOptions, StoppingOptions};
use crate::engine::{KeepAlive, Priority};
use crate::error::Error;
use crate::session::SessionView;

/// An input to add to a session.
#[derive(Debug)]
pub struct ExtendRequest {
    /// The session.
    pub name: String,
    /// What it gets.
    pub input: Input,
    /// The session's token count as the caller last saw it.
    pub expected_token_count: Option<u32>,
    /// Order among waiting requests.
    pub priority: Priority,
    /// How long the model stays after it; None leaves that as it is.
    pub keep_alive: Option<KeepAlive>,
}

/// A session that was extended.
#[derive(Debug)]
pub struct Extended {
    /// The session afterwards.
    pub view: SessionView,
    /// Token counts.
    pub usage: Usage,
}

impl Service {
    /// Adds an input to a session; returns once its KV is computed.
    ///
    /// # Errors
    /// The request is refused, its session was deleted meanwhile, or the engine is dead.
    pub async fn extend_session(&self, caller: &Caller, request: ExtendRequest) -> Result<Extended, Error> {
        let ExtendRequest { name, mut input, expected_token_count, priority, keep_alive } = request;
        let name = session_name("name", &name)?;
        if let Input::Chat(chat) = &mut input
            && chat.add_generation_prompt.replace(false) == Some(true)
        {
            let why = "must be false: the turn that answers begins its answer";
            return Err(Error::field(GENERATION_PROMPT, why));
        }
        input.check_in_session()?;
        input.check("prompt", &self.limits)?;
        let key = caller.session(name.clone());
        let request = GenerateRequest {
            model: String::new(),
            input,
            session: name.to_string(),
            expected_token_count,
            sampling: SamplingOptions::default(),
            stopping: StoppingOptions::default(),
            output: OutputOptions::default(),
            priority,
            keep_alive,
            history: None,
            cache: CacheOptions::default(),
            response_format: None,
            n: None,
            best_of: None,
        };
        let target = Target::Session { name, model: None };
        let mut generation = Box::pin(self.begin(caller, request, target, Aim::Context)).await?;
        let mut usage = Usage::default();
        while let Some(event) = generation.next().await? {
            if let Event::Finished(finished) = event {
                usage = finished.usage;
            }
        }
        generation.commit().await?;
        let view = self.sessions.read(&key, |session| Ok(session.view()))?;
        Ok(Extended { view, usage })
    }
}
