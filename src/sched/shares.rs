//! What each client has of a model, running sequences and service received, and who is preempted for whom.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use crate::ids::ClientId;

/// Service of one generated token, where a prefilled one counts 1: a prefilled token costs half of it on a
/// CPU and a fifth on a GPU.
const DECODE_SERVICE: u64 = 4;

/// The shares of the clients that have requests.
#[derive(Clone, Debug, Default)]
pub struct Shares {
    clients: BTreeMap<ClientId, Share>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Share {
    /// Number of its requests that wait or run.
    present: u32,
    running: u32,
    served: u64,
}

impl Shares {
    /// Notes that a request of the client arrives. A client that had none begins level with the least served,
    /// so that absence saves nothing up.
    pub fn arrive(&mut self, client: &ClientId) {
        let least = self.clients.values().map(|share| share.served).min().unwrap_or(0);
        let share = self.clients.entry(client.clone()).or_insert(Share { served: least, ..Share::default() });
        share.present += 1;
    }

    /// Notes that a request of the client is gone; the client goes with its last one.
    pub fn leave(&mut self, client: &ClientId) {
        let Some(share) = self.clients.get_mut(client) else { return };
        share.present -= 1;
        if share.present == 0 {
            self.clients.remove(client);
        }
    }

    /// Notes that one of its requests begins to run.
    pub fn start(&mut self, client: &ClientId) {
        self.change(client, |share| share.running += 1);
    }

    /// Notes that one of them no longer runs.
    pub fn stop(&mut self, client: &ClientId) {
        self.change(client, |share| share.running -= 1);
    }

    /// Notes that a step computed `prefilled` tokens of its prompts and drew `drawn` new ones.
    pub fn serve(&mut self, client: &ClientId, prefilled: u32, drawn: u32) {
        let service = u64::from(prefilled) + u64::from(drawn) * DECODE_SERVICE;
        self.change(client, |share| share.served += service);
    }

    /// Returns running sequences and service: who has less is next.
    #[must_use]
    pub fn rank(&self, client: &ClientId) -> (u32, u64) {
        self.clients.get(client).map_or((0, 0), |share| (share.running, share.served))
    }

    /// Returns whether no client has a request.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.clients.is_empty()
    }

    fn change(&mut self, client: &ClientId, change: impl FnOnce(&mut Share)) {
        if let Some(share) = self.clients.get_mut(client) {
            change(share);
        }
    }
}

/// A request that waits for a place.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Whose it is.
    pub client: &'a ClientId,
    /// Its priority class.
    pub class: u32,
}

/// A sequence that could be preempted.
#[derive(Clone, Copy, Debug)]
pub struct Running<'a> {
    /// Its number; later ones are higher.
    pub sequence: u64,
    /// Whose it is.
    pub client: &'a ClientId,
    /// Its priority class.
    pub class: u32,
}

/// Returns the sequence to preempt for a waiting request, if any: one of a lower class, or of the same class
/// and of a client that has at least two more places, so that the two do not preempt each other again and
/// again. The youngest goes: it has the least to be copied.
#[must_use]
pub fn victim<'a>(
    shares: &Shares,
    candidate: Candidate<'_>,
    running: impl Iterator<Item = Running<'a>>,
) -> Option<u64> {
    let (own, _) = shares.rank(candidate.client);
    running
        .filter(|run| {
            let (theirs, _) = shares.rank(run.client);
            run.class > candidate.class || (run.class == candidate.class && theirs >= own + 2)
        })
        .max_by_key(|run| (run.class, shares.rank(run.client), Reverse(run.client), run.sequence))
        .map(|run| run.sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(name: &str) -> ClientId {
        ClientId::from(name)
    }

    fn shares(running: &[(&str, u32)]) -> Shares {
        let mut shares = Shares::default();
        for (name, count) in running {
            shares.arrive(&client(name));
            (0..*count).for_each(|_| shares.start(&client(name)));
        }
        shares
    }

    fn choose(shares: &Shares, candidate: (&str, u32), running: &[(&str, u32)]) -> Option<u64> {
        let clients: Vec<ClientId> = running.iter().map(|(name, _)| client(name)).collect();
        let runs = running.iter().zip(&clients).zip(0..);
        let runs = runs.map(|((&(_, class), client), sequence)| Running { sequence, client, class });
        let asking = client(candidate.0);
        victim(shares, Candidate { client: &asking, class: candidate.1 }, runs)
    }

    #[test]
    fn a_client_without_a_place_gets_one_of_those_who_have_most() {
        let shares = shares(&[("a", 0), ("b", 3), ("c", 2)]);
        let running = [("b", 1), ("b", 1), ("c", 1), ("b", 1), ("c", 1)];
        assert_eq!(choose(&shares, ("a", 1), &running), Some(3));
        assert_eq!(choose(&shares, ("c", 1), &running), None, "one more is not a reason");
    }

    #[test]
    fn a_lower_class_makes_room_and_a_higher_one_does_not() {
        let shares = shares(&[("a", 1), ("b", 1)]);
        assert_eq!(choose(&shares, ("a", 0), &[("a", 0), ("b", 2)]), Some(1));
        assert_eq!(choose(&shares, ("a", 2), &[("a", 0), ("b", 1)]), None);
    }

    #[test]
    fn absence_saves_nothing_up() {
        let mut shares = shares(&[("a", 1)]);
        shares.serve(&client("a"), 100, 10);
        shares.arrive(&client("b"));
        assert_eq!(shares.rank(&client("b")), (0, 140));
        shares.leave(&client("a"));
        shares.leave(&client("b"));
        assert!(shares.is_empty());
    }
}
