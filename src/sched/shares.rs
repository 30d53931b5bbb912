//! What each circle of owners has of a model, running sequences and service received, and who is preempted
//! for whom. Who is next is decided circle by circle: a connection gains nothing from the number of its
//! clients.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use super::owner::{CIRCLES, Circle, Owner};

/// Service of one generated token, where a prefilled one counts 1: a prefilled token costs half of it on a
/// CPU and a fifth on a GPU.
const DECODE_SERVICE: u64 = 4;

/// The shares of those that have requests.
#[derive(Clone, Debug, Default)]
pub struct Shares {
    circles: BTreeMap<Circle, Share>,
    /// Turns and arrivals until now.
    turns: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Share {
    /// Number of its requests that wait or run.
    present: u32,
    running: u32,
    served: u64,
    /// Its last turn to prefill, or its arrival.
    turn: u64,
}

/// Running sequences, service and last turn by circle, the widest first: who has less is next. No two circles
/// have the same turn, so those within different ones are not compared.
pub type Rank = [(u32, u64, u64); CIRCLES];

impl Shares {
    /// Notes that a request of the owner arrives. A circle that had none begins level with the least served
    /// beside it, so that absence saves nothing up.
    pub fn arrive(&mut self, owner: &Owner) {
        self.turns += 1;
        let turn = self.turns;
        for circle in owner.circles() {
            if let Some(share) = self.circles.get_mut(&circle) {
                share.present += 1;
                continue;
            }
            let around = circle.around();
            let beside = self.circles.iter().filter(|(other, _)| other.around() == around);
            let served = beside.map(|(_, share)| share.served).min().unwrap_or(0);
            self.circles.insert(circle, Share { present: 1, running: 0, served, turn });
        }
    }

    /// Notes that a request of the owner is gone; a circle goes with its last one.
    pub fn leave(&mut self, owner: &Owner) {
        self.change(owner, |share| share.present -= 1);
        for circle in owner.circles() {
            if self.circles.get(&circle).is_some_and(|share| share.present == 0) {
                self.circles.remove(&circle);
            }
        }
    }

    /// Notes that one of its requests begins to run.
    pub fn start(&mut self, owner: &Owner) {
        self.change(owner, |share| share.running += 1);
    }

    /// Notes that one of them no longer runs.
    pub fn stop(&mut self, owner: &Owner) {
        self.change(owner, |share| share.running -= 1);
    }

    /// Notes that a step computed `prefilled` tokens of its prompts and drew `drawn` new ones.
    pub fn serve(&mut self, owner: &Owner, prefilled: u32, drawn: u32) {
        let service = u64::from(prefilled) + u64::from(drawn) * DECODE_SERVICE;
        self.change(owner, |share| share.served += service);
    }

    /// Notes that it was first to prefill in a step.
    pub(super) fn turn(&mut self, owner: &Owner) {
        self.turns += 1;
        let turn = self.turns;
        self.change(owner, |share| share.turn = turn);
    }

    /// Returns who is next, if compared with another's.
    #[must_use]
    pub fn rank(&self, owner: &Owner) -> Rank {
        self.of(owner).map(|share| (share.running, share.served, share.turn))
    }

    /// Returns the last turns by circle, the widest first: whose is the longest ago is next.
    pub(super) fn last_turns(&self, owner: &Owner) -> [u64; CIRCLES] {
        self.of(owner).map(|share| share.turn)
    }

    /// Returns whether nobody has a request.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.circles.is_empty()
    }

    /// Returns how many run of one and of another, in the widest circle that is not around both; None if they
    /// are the same.
    fn running(&self, one: &Owner, other: &Owner) -> Option<(u32, u32)> {
        let [ours, theirs] = [one, other].map(Owner::circles);
        let apart = ours.iter().zip(&theirs).find(|(ours, theirs)| ours != theirs);
        let running = |circle| self.circles.get(circle).map_or(0, |share| share.running);
        apart.map(|(ours, theirs)| (running(ours), running(theirs)))
    }

    fn of(&self, owner: &Owner) -> [Share; CIRCLES] {
        owner.circles().map(|circle| self.circles.get(&circle).copied().unwrap_or_default())
    }

    fn change(&mut self, owner: &Owner, change: impl Fn(&mut Share)) {
        for circle in owner.circles() {
            self.circles.get_mut(&circle).into_iter().for_each(&change);
        }
    }
}

/// A request that waits for a place.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Whose it is.
    pub owner: &'a Owner,
    /// Its priority class.
    pub class: u32,
    /// The class that its caller asked for.
    pub priority: u32,
}

/// A sequence that could be preempted.
#[derive(Clone, Copy, Debug)]
pub struct Running<'a> {
    /// Its number; later ones are higher.
    pub sequence: u64,
    /// Whose it is.
    pub owner: &'a Owner,
    /// Its priority class.
    pub class: u32,
    /// The class that its caller asked for.
    pub priority: u32,
}

/// Returns the sequence to preempt for a waiting request, if any: one of a lower class, or of the same class
/// and of somebody who has at least two more places, so that the two do not preempt each other again and
/// again. A request that is of a higher class only because it has waited takes no place of somebody who has
/// fewer: its owner's others are what it waits for. The youngest goes: it has the least to be copied.
#[must_use]
pub fn victim<'a>(
    shares: &Shares,
    candidate: Candidate<'_>,
    running: impl Iterator<Item = Running<'a>>,
) -> Option<u64> {
    running
        .filter(|run| {
            let (theirs, own) = shares.running(run.owner, candidate.owner).unwrap_or_default();
            match run.class.cmp(&candidate.class) {
                Ordering::Greater => run.priority > candidate.priority || theirs >= own,
                Ordering::Equal => theirs >= own + 2,
                Ordering::Less => false,
            }
        })
        .max_by_key(|run| (run.class, shares.rank(run.owner), run.sequence))
        .map(|run| run.sequence)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sched::owner::owner;

    fn shares(running: &[(&str, u32)]) -> Shares {
        let mut shares = Shares::default();
        for (name, count) in running {
            shares.arrive(&owner(name));
            (0..*count).for_each(|_| shares.start(&owner(name)));
        }
        shares
    }

    fn choose(shares: &Shares, candidate: (&str, u32), running: &[(&str, u32)]) -> Option<u64> {
        let owners: Vec<Owner> = running.iter().map(|(name, _)| owner(name)).collect();
        let runs = running.iter().zip(&owners).zip(0..);
        let runs =
            runs.map(|((&(_, class), owner), sequence)| Running { sequence, owner, class, priority: class });
        let asking = owner(candidate.0);
        victim(shares, Candidate { owner: &asking, class: candidate.1, priority: candidate.1 }, runs)
    }

    #[test]
    fn a_client_without_a_place_gets_one_of_those_who_have_most() {
        let shares = shares(&[("a", 0), ("b", 3), ("c", 2)]);
        let running = [("b", 1), ("b", 1), ("c", 1), ("b", 1), ("c", 1)];
        assert_eq!(choose(&shares, ("a", 1), &running), Some(3));
        assert_eq!(choose(&shares, ("c", 1), &running), None, "one more is not a reason");
    }

    #[test]
    fn names_of_one_connection_buy_no_places_of_another() {
        let names = ["flood/1", "flood/2", "flood/3", "flood/4"];
        let shares = shares(&[(names[0], 1), (names[1], 1), (names[2], 1), ("honest", 1), (names[3], 0)]);
        let running = [(names[0], 1), ("honest", 1), (names[1], 1), (names[2], 1)];
        assert_eq!(choose(&shares, (names[3], 1), &running), None);
        assert_eq!(choose(&shares, ("honest", 1), &running), Some(3), "the connection has two more");
        assert!(shares.rank(&owner("honest")) < shares.rank(&owner(names[3])), "who runs nothing is a name");
    }

    #[test]
    fn clients_of_a_connection_share_what_it_has() {
        let shares = shares(&[("proxy/a", 2), ("proxy/b", 0), ("other", 3)]);
        let running = [("proxy/a", 1), ("other", 1), ("proxy/a", 1), ("other", 1), ("other", 1)];
        assert_eq!(choose(&shares, ("proxy/b", 1), &running), Some(2));
        assert!(shares.rank(&owner("proxy/b")) < shares.rank(&owner("proxy/a")));
    }

    #[test]
    fn a_lower_class_makes_room_and_a_higher_one_does_not() {
        let shares = shares(&[("a", 1), ("b", 1)]);
        assert_eq!(choose(&shares, ("a", 0), &[("a", 0), ("b", 2)]), Some(1));
        assert_eq!(choose(&shares, ("a", 2), &[("a", 0), ("b", 1)]), None);
    }

    #[test]
    fn who_has_waited_takes_no_place_of_somebody_who_has_fewer() {
        let shares = shares(&[("flood", 3), ("honest", 2), ("other", 4)]);
        let [flood, honest, other] = ["flood", "honest", "other"].map(owner);
        let run = |sequence, owner| Running { sequence, owner, class: 1, priority: 1 };
        let risen = |owner, priority| Candidate { owner, class: 0, priority };
        let chosen = |candidate, runs: &[Running<'_>]| victim(&shares, candidate, runs.iter().copied());
        assert_eq!(chosen(risen(&flood, 1), &[run(1, &honest)]), None, "it has had its share");
        assert_eq!(chosen(risen(&flood, 0), &[run(1, &honest)]), Some(1), "it was asked for as interactive");
        assert_eq!(chosen(risen(&flood, 1), &[run(1, &honest), run(2, &other)]), Some(2));
        assert_eq!(chosen(risen(&honest, 2), &[run(1, &flood)]), Some(1));
    }

    #[test]
    fn absence_saves_nothing_up() {
        let mut shares = shares(&[("a/x", 1)]);
        shares.serve(&owner("a/x"), 100, 10);
        let served = |shares: &Shares, name| shares.rank(&owner(name)).map(|(_, served, _)| served);
        shares.arrive(&owner("b"));
        assert_eq!(served(&shares, "b"), [140, 140, 0]);
        shares.arrive(&owner("a/y"));
        assert_eq!(served(&shares, "a/y"), [140, 140, 140]);
        ["a/x", "b", "a/y"].iter().for_each(|name| shares.leave(&owner(name)));
        assert!(shares.is_empty());
    }

    #[test]
    fn where_two_have_the_same_the_one_that_waits_longer_is_next() {
        let mut shares = shares(&[("b", 0), ("a", 0)]);
        assert!(shares.rank(&owner("b")) < shares.rank(&owner("a")));
        shares.turn(&owner("b"));
        assert!(shares.rank(&owner("a")) < shares.rank(&owner("b")));
    }
}
