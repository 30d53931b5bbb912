//! How long a model stays in memory after its last use, and who says so. The words are Ollama's: a duration,
//! 0 to unload after use, anything negative to stay forever.
//!
//! A pin wins over everything. Then the last call that named a `keep_alive` wins, within the configured
//! limit; then the model's own configuration; then the default. A call that names none changes nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::clock::Moment;
use crate::ids::ModelName;

/// Time that a model stays at least if nobody has used it since it was loaded: whoever asked for the load
/// must come to use it.
const UNUSED_MIN: Duration = Duration::from_secs(60);

/// How long a model stays in memory after its last use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum KeepAlive {
    /// This long; zero unloads it at once.
    For(Duration),
    /// Forever.
    #[default]
    Forever,
}

/// What a call says about a model's stay; None leaves it as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stay {
    /// How long it stays after its last use.
    pub keep_alive: Option<KeepAlive>,
    /// Whether it is pinned.
    pub pin: Option<bool>,
}

/// The configuration of one model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModelSettings {
    /// How long it stays after its last use; None is the default of all.
    pub keep_alive: Option<KeepAlive>,
    /// Whether it is pinned: neither evicted nor unloaded with time.
    pub pin: bool,
}

/// The configuration of the policy. It may change while the daemon runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResidencySettings {
    /// Byte budget for weights and KV caches; None lets the device say, at each load.
    pub memory_budget_bytes: Option<u64>,
    /// How long a model stays after its last use, if nobody says otherwise.
    pub keep_alive: KeepAlive,
    /// The longest stay that a call may ask for.
    pub keep_alive_max: KeepAlive,
    /// Settings by model.
    pub models: BTreeMap<ModelName, ModelSettings>,
}

/// The stay of one resident model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lifetime {
    /// What calls have said so far.
    asked: Stay,
    /// Time of its last use.
    used: Moment,
    /// Whether it was used since it was loaded.
    was_used: bool,
}

impl KeepAlive {
    /// Returns the end of a stay whose model was used last at `used`; None is never.
    #[must_use]
    pub fn after(self, used: Moment) -> Option<Moment> {
        match self {
            Self::For(time) => Some(used.after(time)),
            Self::Forever => None,
        }
    }
}

impl Stay {
    /// Changes it by what a later call says.
    pub fn renew(&mut self, later: Self) {
        self.keep_alive = later.keep_alive.or(self.keep_alive);
        self.pin = later.pin.or(self.pin);
    }
}

impl Lifetime {
    /// Returns the stay of a model that is loaded now.
    #[must_use]
    pub fn new(asked: Stay, now: Moment) -> Self {
        Self { asked, used: now, was_used: false }
    }

    /// Notes a use, or that one goes on.
    pub fn touch(&mut self, now: Moment) {
        (self.used, self.was_used) = (now, true);
    }

    /// Changes it by what a call says.
    pub fn ask(&mut self, stay: Stay) {
        self.asked.renew(stay);
    }

    /// Returns the time of its last use.
    #[must_use]
    pub fn used(&self) -> Moment {
        self.used
    }

    /// Returns whether it is pinned.
    #[must_use]
    pub fn is_pinned(&self, model: &ModelName, settings: &ResidencySettings) -> bool {
        self.asked.pin.unwrap_or(settings.models.get(model).is_some_and(|own| own.pin))
    }

    /// Returns how long it stays after its last use.
    #[must_use]
    pub fn keep_alive(&self, model: &ModelName, settings: &ResidencySettings) -> KeepAlive {
        let own = settings.models.get(model).and_then(|own| own.keep_alive);
        let asked = self.asked.keep_alive.map(|asked| asked.min(settings.keep_alive_max));
        asked.or(own).unwrap_or(settings.keep_alive)
    }

    /// Returns when it ends if the model is not used before; None is never.
    #[must_use]
    pub fn expires(&self, model: &ModelName, settings: &ResidencySettings) -> Option<Moment> {
        if self.is_pinned(model, settings) {
            return None;
        }
        let expires = self.keep_alive(model, settings).after(self.used)?;
        Some(if self.was_used { expires } else { expires.max(self.used.after(UNUSED_MIN)) })
    }
}

/// Units of a duration, in nanoseconds; those that end like another stand before it.
const UNITS: [(&str, f64); 7] =
    [("ns", 1.0), ("us", 1e3), ("µs", 1e3), ("ms", 1e6), ("s", 1e9), ("m", 6e10), ("h", 3.6e12)];

/// Longest stay that is not forever, in nanoseconds: beyond, the clock ends.
const NANOS_MAX: f64 = 9.2e18;

/// A text that is not a stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "must be a duration such as 30s, 5m or 1h30m, a number of seconds, 0 (unload after use), or -1 (forever)"
)]
pub struct NotAKeepAlive;

impl FromStr for KeepAlive {
    type Err = NotAKeepAlive;

    /// Reads what Ollama reads: a number of seconds, or a duration as Go writes it.
    fn from_str(text: &str) -> Result<Self, NotAKeepAlive> {
        let text = text.trim();
        let (is_negative, unsigned) = match text.strip_prefix(['-', '+']) {
            Some(rest) => (text.starts_with('-'), rest),
            None => (false, text),
        };
        let nanos = nanoseconds(unsigned).ok_or(NotAKeepAlive)?;
        if is_negative && nanos > 0.0 || nanos > NANOS_MAX {
            return Ok(Self::Forever);
        }
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within 0 and NANOS_MAX")]
        Ok(Self::For(Duration::from_nanos(nanos as u64)))
    }
}

fn nanoseconds(text: &str) -> Option<f64> {
    if let Some(seconds) = number(text) {
        return Some(seconds * 1e9);
    }
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let unit_at = rest.find(|digit: char| !digit.is_ascii_digit() && digit != '.')?;
        let value = number(&rest[..unit_at])?;
        let (unit, nanos) = UNITS.iter().find(|(unit, _)| {
            let after = rest[unit_at..].strip_prefix(unit);
            after.is_some_and(|after| {
                after.is_empty() || after.starts_with(|c: char| c.is_ascii_digit() || c == '.')
            })
        })?;
        total += value * nanos;
        rest = &rest[unit_at + unit.len()..];
    }
    (!text.is_empty()).then_some(total)
}

fn number(text: &str) -> Option<f64> {
    let is_number = text.chars().all(|digit| digit.is_ascii_digit() || digit == '.');
    if is_number { text.parse().ok() } else { None }
}

impl fmt::Display for KeepAlive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::For(time) => write!(f, "{}s", time.as_secs_f64()),
            Self::Forever => f.write_str("-1"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> KeepAlive {
        text.parse().unwrap()
    }

    #[test]
    fn the_words_are_ollamas() {
        let seconds = |seconds| KeepAlive::For(Duration::from_secs(seconds));
        let read_as = [
            ("5m", 300),
            ("30s", 30),
            ("300", 300),
            ("0", 0),
            ("0s", 0),
            ("1h30m", 5400),
            ("1.5h", 5400),
            ("24h", 86_400),
            (" 10m ", 600),
            ("1m500ms", 60),
        ];
        for (text, expected) in read_as {
            let KeepAlive::For(time) = read(text) else { panic!("{text}") };
            assert_eq!(KeepAlive::For(Duration::from_secs(time.as_secs())), seconds(expected), "{text}");
        }
        assert_eq!(read("250ms"), KeepAlive::For(Duration::from_millis(250)));
        for forever in ["-1", "-5m", "-1s", "-0.5", "99999999999999h"] {
            assert_eq!(read(forever), KeepAlive::Forever, "{forever}");
        }
        for wrong in ["", "soon", "5 m", "m", "5x", "1h-5m", "--1", "1..5s", ".", "5mm", "nan", "inf", "1e5"]
        {
            assert_eq!(wrong.parse::<KeepAlive>(), Err(NotAKeepAlive), "{wrong}");
        }
    }

    #[test]
    fn a_pin_wins_then_the_last_call_then_the_model_then_the_default() {
        let minutes = |minutes: u64| KeepAlive::For(Duration::from_secs(60 * minutes));
        let model: ModelName = "m".into();
        let mut settings = ResidencySettings {
            keep_alive: minutes(1),
            keep_alive_max: minutes(30),
            ..ResidencySettings::default()
        };
        let mut lifetime = Lifetime::new(Stay::default(), Moment::default());
        assert_eq!(lifetime.keep_alive(&model, &settings), minutes(1));
        settings.models.insert(model.clone(), ModelSettings { keep_alive: Some(minutes(90)), pin: false });
        assert_eq!(lifetime.keep_alive(&model, &settings), minutes(90), "the owner's word has no limit");
        let ask = |keep_alive| Stay { keep_alive: Some(keep_alive), pin: None };
        lifetime.ask(ask(minutes(10)));
        lifetime.ask(Stay::default());
        assert_eq!(lifetime.keep_alive(&model, &settings), minutes(10), "who says nothing changes nothing");
        lifetime.ask(ask(KeepAlive::Forever));
        assert_eq!(lifetime.keep_alive(&model, &settings), minutes(30));
        assert!(lifetime.expires(&model, &settings).is_some());
        lifetime.ask(Stay { keep_alive: None, pin: Some(true) });
        assert_eq!(lifetime.expires(&model, &settings), None);
        lifetime.ask(Stay { keep_alive: Some(minutes(0)), pin: None });
        assert_eq!(lifetime.expires(&model, &settings), None, "a pin stays until it is taken away");
    }

    #[test]
    fn a_model_nobody_came_to_use_stays_a_minute() {
        let (model, settings): (ModelName, _) = ("m".into(), ResidencySettings::default());
        let at = |seconds| Moment::at(Duration::from_secs(seconds));
        let at_once = Stay { keep_alive: Some(KeepAlive::For(Duration::ZERO)), pin: None };
        let mut lifetime = Lifetime::new(at_once, at(5));
        assert_eq!(lifetime.expires(&model, &settings), Some(at(65)));
        lifetime.touch(at(7));
        assert_eq!(lifetime.expires(&model, &settings), Some(at(7)));
    }
}
