//! Who may wait when many do. A client can invent names, so it is counted by its connection too; and a full
//! queue does not shut out those who have little in it: a newcomer takes the places of the last requests of
//! whoever has most, by principal first, then by connection, then by client.

use std::collections::{BTreeMap, BTreeSet};

use super::Priority;
use super::owner::{CIRCLES, Circle, Owner};
use crate::clock::Moment;

/// A request that waits.
#[derive(Clone, Copy, Debug)]
pub struct Waiter<'a> {
    /// Whose it is.
    pub owner: &'a Owner,
    /// Its priority.
    pub priority: Priority,
    /// Time since when it waits.
    pub since: Moment,
    /// Whether its caller has had something of it; then it keeps its place.
    pub has_begun: bool,
    /// Number of its choices: each has a place.
    pub choices: u32,
}

/// What becomes of a newcomer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// It waits, in the place of these: none while there is room.
    Waits(BTreeSet<usize>),
    /// Too many wait in all.
    Full,
    /// Too many of its client or its connection wait.
    FullForClient,
}

/// Decides on a newcomer with a number of choices beside those who wait. One with more choices than a limit
/// needs all of its places.
#[must_use]
pub fn enter(
    (newcomer, choices): (&Owner, u32),
    waiting: &[Waiter<'_>],
    count_max: u32,
    of_client_max: u32,
) -> Entry {
    let choices = choices.min(of_client_max).min(count_max);
    let count = |of: &dyn Fn(&Owner) -> bool| places(waiting.iter().filter(|waiter| of(waiter.owner)));
    let of_client = count(&|owner| owner.client == newcomer.client);
    let of_connection = count(&|owner| owner.connection == newcomer.connection);
    if of_client.max(of_connection) + choices > of_client_max {
        return Entry::FullForClient;
    }
    let mut left: Vec<usize> = (0..waiting.len()).collect();
    let mut goes = BTreeSet::new();
    while places(left.iter().map(|place| &waiting[*place])) + choices > count_max {
        let Some(last) = replaced((newcomer, choices), left.clone(), waiting) else { return Entry::Full };
        left.retain(|place| *place != last);
        goes.insert(last);
    }
    Entry::Waits(goes)
}

/// Returns the number of places that some requests have.
fn places<'a>(waiting: impl Iterator<Item = &'a Waiter<'a>>) -> u32 {
    waiting.map(|waiter| waiter.choices).sum()
}

/// Returns the request of a group, that of a full queue, whose place a newcomer may take.
fn replaced(
    (newcomer, choices): (&Owner, u32),
    mut group: Vec<usize>,
    waiting: &[Waiter<'_>],
) -> Option<usize> {
    for depth in 0..CIRCLES {
        let own = newcomer.circle(depth);
        let mine = group.iter().map(|place| &waiting[*place]);
        let mine = places(mine.filter(|waiter| waiter.owner.circle(depth) == own));
        let (_, most) = largest(&group, waiting, depth)?;
        // Otherwise the two would only have changed places.
        if most > mine + choices {
            return last_of_largest(group, waiting, depth);
        }
        group.retain(|place| waiting[*place].owner.circle(depth) == own);
    }
    None
}

/// Returns the last request of the largest circle in the largest circle, and so on.
fn last_of_largest(mut group: Vec<usize>, waiting: &[Waiter<'_>], depth: usize) -> Option<usize> {
    for depth in depth..CIRCLES {
        let (largest, _) = largest(&group, waiting, depth)?;
        group.retain(|place| waiting[*place].owner.circle(depth) == largest);
    }
    let may_go = group.into_iter().filter(|place| !waiting[*place].has_begun);
    may_go.max_by_key(|place| (waiting[*place].priority, waiting[*place].since, *place))
}

/// Returns the circle of a group that has most places, and their number, among those with a request that has
/// not begun.
fn largest(group: &[usize], waiting: &[Waiter<'_>], depth: usize) -> Option<(Circle, u32)> {
    let mut counts = BTreeMap::new();
    for waiter in group.iter().map(|place| &waiting[*place]) {
        let (count, may_go) = counts.entry(waiter.owner.circle(depth)).or_insert((0, false));
        *count += waiter.choices;
        *may_go |= !waiter.has_begun;
    }
    let open = counts.into_iter().filter(|(_, (_, may_go))| *may_go);
    open.map(|(circle, (count, _))| (circle, count)).max_by_key(|(_, count)| *count)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ids::ConnectionId;

    /// A queue of four.
    struct Door {
        owners: Vec<Owner>,
        begun: Vec<usize>,
        of_client_max: u32,
        /// Choices of those that have more than one, by place.
        choices: Vec<(usize, u32)>,
    }

    fn owner((principal, connection, client): (&str, u64, &str)) -> Owner {
        let connection = ConnectionId(connection);
        Owner { principal: principal.into(), connection, client: client.into() }
    }

    /// Returns what becomes of one for which these go.
    fn replaces<const N: usize>(goes: [usize; N]) -> Entry {
        Entry::Waits(BTreeSet::from(goes))
    }

    impl Door {
        fn new(waiting: &[(&str, u64, &str)]) -> Self {
            let owners = waiting.iter().copied().map(owner).collect();
            Self { owners, begun: vec![], of_client_max: 9, choices: vec![] }
        }

        fn enter(&self, newcomer: (&str, u64, &str)) -> Entry {
            self.enter_with(newcomer, 1)
        }

        fn enter_with(&self, newcomer: (&str, u64, &str), choices: u32) -> Entry {
            let waiting: Vec<Waiter<'_>> = self
                .owners
                .iter()
                .enumerate()
                .map(|(place, owner)| Waiter {
                    owner,
                    priority: Priority::Normal,
                    since: Moment::at(Duration::from_secs(place as u64)),
                    has_begun: self.begun.contains(&place),
                    choices: self.choices.iter().find(|(of, _)| *of == place).map_or(1, |(_, n)| *n),
                })
                .collect();
            enter((&owner(newcomer), choices), &waiting, 4, self.of_client_max)
        }
    }

    #[test]
    fn invented_names_count_for_their_connection() {
        let mut door = Door::new(&[("u", 1, "a"), ("u", 1, "b")]);
        door.of_client_max = 2;
        assert_eq!(door.enter(("u", 1, "c")), Entry::FullForClient);
        assert_eq!(door.enter(("u", 2, "a")), replaces([]));
        door = Door::new(&[("u", 1, "a"), ("u", 2, "a")]);
        door.of_client_max = 2;
        assert_eq!(door.enter(("u", 3, "a")), Entry::FullForClient, "a name counts over all connections");
    }

    #[test]
    fn each_choice_has_a_place() {
        let mut door = Door::new(&[("u", 1, "a"), ("u", 2, "b")]);
        assert_eq!(door.enter_with(("u", 3, "c"), 2), replaces([]));
        assert_eq!(door.enter_with(("u", 3, "c"), 3), Entry::Full);
        door.choices = vec![(0, 3)];
        assert_eq!(door.enter(("u", 3, "c")), replaces([0]), "one that has three places");
        assert_eq!(door.enter_with(("u", 3, "c"), 3), Entry::Full, "they would have changed places");
        door.of_client_max = 3;
        assert_eq!(door.enter(("u", 1, "a")), Entry::FullForClient);
        let empty = Door::new(&[]);
        assert_eq!(empty.enter_with(("u", 1, "a"), 16), replaces([]), "more than there are places");
        let other = Door::new(&[("u", 2, "b")]);
        assert_eq!(other.enter_with(("u", 1, "a"), 16), Entry::Full);
        let mut singles = Door::new(&[("u", 1, "a"), ("u", 2, "b"), ("u", 1, "c"), ("u", 1, "d")]);
        assert_eq!(singles.enter_with(("u", 3, "e"), 2), Entry::Full, "the second would change places");
        singles = Door::new(&[("u", 1, "a"), ("u", 1, "b"), ("u", 1, "c"), ("u", 1, "d")]);
        assert_eq!(singles.enter_with(("u", 3, "e"), 2), replaces([2, 3]));
    }

    #[test]
    fn a_newcomer_takes_the_place_of_the_last_of_the_largest() {
        let door = Door::new(&[("u", 1, "a"), ("u", 1, "b"), ("u", 1, "c"), ("u", 2, "d")]);
        assert_eq!(door.enter(("u", 3, "e")), replaces([2]));
        let door = Door::new(&[("u", 1, "a"), ("u", 1, "b"), ("u", 2, "d"), ("u", 3, "e")]);
        assert_eq!(door.enter(("u", 2, "d")), Entry::Full, "they would have changed places");
        let door = Door::new(&[("u", 1, "a"), ("u", 1, "a"), ("u", 1, "a"), ("u", 1, "b")]);
        assert_eq!(door.enter(("u", 1, "c")), replaces([2]), "within a connection too");
        assert_eq!(door.enter(("u", 1, "a")), Entry::Full);
    }

    #[test]
    fn principals_share_before_connections_do() {
        let door = Door::new(&[("u", 1, "a"), ("u", 2, "b"), ("u", 3, "c"), ("v", 4, "d")]);
        assert_eq!(door.enter(("w", 5, "e")), replaces([2]));
        let door = Door::new(&[("u", 1, "a"), ("u", 2, "b"), ("v", 4, "d"), ("v", 4, "d")]);
        assert_eq!(door.enter(("w", 5, "e")), replaces([3]));
        assert_eq!(door.enter(("u", 5, "e")), Entry::Full);
    }

    #[test]
    fn a_request_that_has_begun_keeps_its_place() {
        let mut door = Door::new(&[("u", 1, "a"), ("u", 1, "a"), ("u", 1, "a"), ("u", 1, "a")]);
        door.begun = vec![2, 3];
        assert_eq!(door.enter(("u", 2, "b")), replaces([1]));
        door.begun = vec![0, 1, 2, 3];
        assert_eq!(door.enter(("u", 2, "b")), Entry::Full);
    }

    #[test]
    fn where_all_of_the_largest_have_begun_one_of_another_that_is_large_goes() {
        let mut door = Door::new(&[("u", 1, "a"), ("u", 1, "a"), ("u", 2, "b"), ("u", 2, "b")]);
        for (begun, goes) in [([0, 1], 3), ([2, 3], 1)] {
            door.begun = begun.to_vec();
            assert_eq!(door.enter(("u", 3, "c")), replaces([goes]));
        }
        let mut door = Door::new(&[("u", 1, "a"), ("u", 1, "a"), ("u", 1, "a"), ("u", 2, "b")]);
        door.begun = vec![0, 1, 2];
        assert_eq!(door.enter(("u", 3, "c")), Entry::Full, "they would have changed places");
    }
}
