//! How long a model stays, on the wire: a duration, negative forever.

use std::time::Duration;

use super::event::duration;
use crate::error::Error;
use crate::service::KeepAlive;

/// Reads a `keep_alive`. prost would repair a malformed one; it is refused.
pub(super) fn from_wire(sent: Option<prost_types::Duration>) -> Result<Option<KeepAlive>, Error> {
    let Some(sent) = sent else { return Ok(None) };
    let prost_types::Duration { seconds, nanos } = sent;
    let malformed = || Error::field("keep_alive", "is not a duration");
    if seconds < 0 && nanos <= 0 || seconds == 0 && nanos < 0 {
        return if nanos > -1_000_000_000 { Ok(Some(KeepAlive::Forever)) } else { Err(malformed()) };
    }
    let nanos = u32::try_from(nanos).ok().filter(|nanos| *nanos < 1_000_000_000).ok_or_else(malformed)?;
    let seconds = u64::try_from(seconds).map_err(|_| malformed())?;
    Ok(Some(KeepAlive::For(Duration::new(seconds, nanos))))
}

/// Writes a `keep_alive`.
pub(super) fn to_wire(keep_alive: KeepAlive) -> Option<prost_types::Duration> {
    match keep_alive {
        KeepAlive::For(time) => duration(time),
        KeepAlive::Forever => Some(prost_types::Duration { seconds: -1, nanos: 0 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negative_is_forever_and_malformed_ones_are_refused() {
        let read = |seconds, nanos| from_wire(Some(prost_types::Duration { seconds, nanos }));
        assert_eq!(from_wire(None), Ok(None));
        assert_eq!(read(90, 500_000_000), Ok(Some(KeepAlive::For(Duration::from_millis(90_500)))));
        assert_eq!(read(0, 0), Ok(Some(KeepAlive::For(Duration::ZERO))));
        for forever in [(-1, 0), (0, -1), (-5, -999_999_999)] {
            assert_eq!(read(forever.0, forever.1), Ok(Some(KeepAlive::Forever)));
        }
        for (seconds, nanos) in [(1, -1), (-1, 1), (0, 1_000_000_000), (-1, -1_000_000_000)] {
            assert!(read(seconds, nanos).is_err(), "{seconds} {nanos}");
        }
        assert_eq!(from_wire(to_wire(KeepAlive::Forever)), Ok(Some(KeepAlive::Forever)));
    }
}
