//! The choices of a generation: how many there are, their events as one stream, and which of them are best.

use std::future::poll_fn;
use std::task::Poll;

use tokio::sync::mpsc;

use super::event::OutputDelta;
use super::fields::within;
use super::request::{GenerateRequest, Target};
use crate::count::count;
use crate::engine::{EVENTS_BUFFERED_MAX, GenerateEvent, Generated};
use crate::error::Error;
use crate::limits::Limits;

/// How many choices are drawn after a prompt, and how many of them are returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChoiceCounts {
    pub(super) returned: u32,
    pub(super) drawn: u32,
}

impl ChoiceCounts {
    pub(super) const ONE: Self = Self { returned: 1, drawn: 1 };

    /// Checks what a request asks for.
    pub(super) fn of(request: &GenerateRequest, target: &Target, limits: &Limits) -> Result<Self, Error> {
        let within = |path: &str, number: u32, low: u32| match within(path, number, low, limits.choices_max) {
            Err(Error::InvalidField { field, why }) => {
                Err(Error::field(field, format!("choices_max: {why}")))
            }
            checked => checked,
        };
        let returned = within("n", request.n.unwrap_or(1), 1)?;
        let drawn = within("best_of", request.best_of.unwrap_or(returned), returned)?;
        if drawn > 1 && matches!(target, Target::Session { .. }) {
            let path = if returned > 1 { "n" } else { "best_of" };
            let why = "must be 1 in a session, which goes on from one answer; fork it to have several";
            return Err(Error::field(path, why));
        }
        Ok(Self { returned, drawn })
    }

    /// Returns whether the best are returned of more, so that nothing can be returned before all have ended.
    pub(super) fn chooses(self) -> bool {
        self.returned < self.drawn
    }
}

/// The events of all choices.
pub(super) struct Streams {
    /// By choice; None for one that has ended.
    receivers: Vec<Option<mpsc::Receiver<GenerateEvent>>>,
    /// Whose turn it is: a choice that has much to say does not hold the others up.
    next: usize,
}

impl Streams {
    /// Returns the senders of a number of choices, and what they send as one stream.
    pub(super) fn new(choices: u32) -> (Vec<mpsc::Sender<GenerateEvent>>, Self) {
        let (senders, receivers) = (0..choices).map(|_| mpsc::channel(EVENTS_BUFFERED_MAX)).unzip();
        let receivers: Vec<_> = receivers;
        (senders, Self { receivers: receivers.into_iter().map(Some).collect(), next: 0 })
    }

    /// Returns the next event and its choice. None comes after the end of a choice.
    ///
    /// # Errors
    /// The engine is dead: it always sends an end.
    pub(super) async fn event(&mut self) -> Result<(usize, GenerateEvent), Error> {
        let Self { receivers, next } = self;
        let all = receivers.len();
        poll_fn(|cx| {
            for choice in (*next..all).chain(0..*next) {
                let Some(receiver) = &mut receivers[choice] else { continue };
                match receiver.poll_recv(cx) {
                    Poll::Pending => {}
                    Poll::Ready(None) => return Poll::Ready(Err(Error::EngineDead)),
                    Poll::Ready(Some(event)) => {
                        if matches!(event, GenerateEvent::Ended(_)) {
                            receivers[choice] = None;
                        }
                        *next = (choice + 1) % all;
                        return Poll::Ready(Ok((choice, event)));
                    }
                }
            }
            Poll::Pending
        })
        .await
    }
}

/// What has come of a choice.
#[derive(Default)]
pub(super) struct Choice {
    /// Its output, where it is not known yet whether it is returned.
    pub(super) held: OutputDelta,
    /// Sum of the log-probabilities of its tokens.
    pub(super) logprob: f64,
    pub(super) ended: Option<Generated>,
}

impl Choice {
    /// Returns the mean log-probability of its tokens.
    #[allow(clippy::cast_possible_truncation, reason = "as exact as what it is a mean of")]
    pub(super) fn mean_logprob(&self) -> f32 {
        let tokens = self.ended.as_ref().map_or(0, |generated| generated.tokens.len());
        (self.logprob / f64::from(count(tokens.max(1)))) as f32
    }
}

/// Returns the best choices, by mean log-probability; of equal ones the first.
pub(super) fn best(choices: &[Choice], number: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..choices.len()).collect();
    order.sort_by(|&one, &other| choices[other].mean_logprob().total_cmp(&choices[one].mean_logprob()));
    order.truncate(number as usize);
    order
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::engine::{Delta, Finish};

    fn ended(tokens: usize, logprob: f64) -> Choice {
        let time = Duration::ZERO;
        let generated = Generated {
            reasoning_tokens: 0,
            finish: Finish::Length,
            tokens: vec![1; tokens],
            time_to_first_token: time,
            decode_time: time,
            total_time: time,
        };
        Choice { held: OutputDelta::default(), logprob, ended: Some(generated) }
    }

    #[test]
    fn the_best_have_the_highest_mean_however_long_they_are() {
        let choices = [ended(10, -10.0), ended(1, -2.0), ended(4, -2.0), ended(2, -1.0)];
        assert_eq!(best(&choices, 4), [2, 3, 0, 1], "of equal ones the first");
        assert_eq!(best(&choices, 1), [2]);
    }

    #[tokio::test]
    async fn choices_take_turns_and_an_end_without_an_event_is_the_engines() {
        let (senders, mut streams) = Streams::new(2);
        let delta = || GenerateEvent::Delta(Delta::default());
        for _ in 0..2 {
            senders[0].try_send(delta()).unwrap();
        }
        senders[1].try_send(delta()).unwrap();
        let mut order = Vec::new();
        for _ in 0..3 {
            order.push(streams.event().await.unwrap().0);
        }
        assert_eq!(order, [0, 1, 0]);
        senders[1].try_send(GenerateEvent::Ended(Err(Error::Deadline))).unwrap();
        assert_eq!(streams.event().await.unwrap().0, 1);
        drop(senders);
        assert!(matches!(streams.event().await, Err(Error::EngineDead)));
    }
}
