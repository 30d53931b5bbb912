//! The bytes of requests from their arrival until they are prepared. Long messages claim theirs before they
//! are read: there is a limit for each connection, and one for all together; the rest waits at the sender.
//! Short ones need no claim, so that nobody's long ones keep them out: the calls of a connection bound them.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::count::count;
use crate::limits::Limits;

/// A message up to this is short.
const SHORT_BYTES: usize = 64 << 10;

/// Semaphores count in these units, so that every configured limit fits.
const UNIT_BYTES: usize = 1 << 10;

/// The bytes of all connections.
#[derive(Clone, Debug)]
pub(super) struct IntakeOfAll {
    all: Arc<Semaphore>,
    all_units: u32,
    connection_units: u32,
}

/// The bytes of one connection.
#[derive(Clone, Debug)]
pub struct Intake {
    of_all: IntakeOfAll,
    own: Arc<Semaphore>,
}

/// The claim of one call, from the length of its message until it is prepared; shared by those who make and
/// release it.
#[derive(Clone, Debug, Default)]
pub struct Claim(Arc<Mutex<Vec<OwnedSemaphorePermit>>>);

impl IntakeOfAll {
    pub(super) fn new(limits: &Limits) -> Self {
        let all_units = units(limits.receive_bytes_max);
        let connection_units = units(limits.receive_bytes_per_connection_max);
        Self { all: Arc::new(Semaphore::new(all_units as usize)), all_units, connection_units }
    }

    pub(super) fn connection(&self) -> Intake {
        Intake { own: Arc::new(Semaphore::new(self.connection_units as usize)), of_all: self.clone() }
    }
}

impl Intake {
    /// Claims the bytes of a message that is about to be read; waits until they are free. A message above a
    /// limit takes all of it.
    pub async fn claim(self, bytes: usize, claim: Claim) {
        if bytes <= SHORT_BYTES {
            return;
        }
        let IntakeOfAll { all, all_units, connection_units } = self.of_all;
        for (permits, limit) in [(self.own, connection_units), (all, all_units)] {
            // Neither is ever closed.
            if let Ok(permit) = permits.acquire_many_owned(units(bytes).min(limit)).await {
                claim.permits().push(permit);
            }
        }
    }
}

impl Claim {
    /// Gives the bytes back.
    pub fn release(&self) {
        self.permits().clear();
    }

    fn permits(&self) -> std::sync::MutexGuard<'_, Vec<OwnedSemaphorePermit>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Saturates far above any limit.
fn units(bytes: usize) -> u32 {
    count(bytes.div_ceil(UNIT_BYTES))
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    fn intake() -> IntakeOfAll {
        let (receive_bytes_max, receive_bytes_per_connection_max) = (400 << 10, 200 << 10);
        IntakeOfAll::new(&Limits { receive_bytes_max, receive_bytes_per_connection_max, ..Limits::default() })
    }

    fn is_ready(claiming: std::pin::Pin<&mut impl Future<Output = ()>>) -> bool {
        claiming.poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn long_messages_wait_for_their_own_connection_first() {
        let intake = intake();
        let (one, two) = (intake.connection(), intake.connection());
        let held = Claim::default();
        assert!(is_ready(pin!(one.clone().claim(150 << 10, held.clone()))));
        let mut second = pin!(one.clone().claim(100 << 10, Claim::default()));
        assert!(!is_ready(second.as_mut()));
        assert!(is_ready(pin!(two.claim(200 << 10, Claim::default()))), "another connection");
        assert!(is_ready(pin!(one.claim(SHORT_BYTES, Claim::default()))), "a short one");
        held.release();
        assert!(is_ready(second.as_mut()));
    }

    #[test]
    fn all_connections_share_one_limit() {
        let intake = intake();
        let claims = [Claim::default(), Claim::default()];
        for claim in &claims {
            assert!(is_ready(pin!(intake.connection().claim(200 << 10, claim.clone()))));
        }
        let mut third = pin!(intake.connection().claim(100 << 10, Claim::default()));
        assert!(!is_ready(third.as_mut()));
        drop(claims);
        assert!(is_ready(third.as_mut()));
    }

    #[test]
    fn a_message_above_a_limit_takes_all_of_it() {
        let intake = intake();
        let claim = Claim::default();
        assert!(is_ready(pin!(intake.connection().claim(1 << 30, claim.clone()))));
        assert_eq!(intake.all.available_permits(), 0);
        claim.release();
        assert_eq!(intake.all.available_permits(), 400);
    }
}
