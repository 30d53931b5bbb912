//! Whose bytes are next, and who never waits.

use std::pin::{Pin, pin};
use std::task::{Context, Waker};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

type Claiming = Pin<Box<dyn Future<Output = ()>>>;

/// A pool of 24 MiB for large messages and one of 8 MiB, of which a connection gets an eighth.
fn intake() -> IntakeOfAll {
    let (receive_bytes_max, receive_bytes_per_connection_max) = (32 * MIB, 4 * MIB);
    IntakeOfAll::new(&Limits { receive_bytes_max, receive_bytes_per_connection_max, ..Limits::default() })
}

fn is_ready(claiming: Pin<&mut (impl Future<Output = ()> + ?Sized)>) -> bool {
    claiming.poll(&mut Context::from_waker(Waker::noop())).is_ready()
}

/// Claims bytes for a connection; returns the claim, and what is left to wait for.
fn claim(intake: &IntakeOfAll, connection: u64, bytes: usize) -> (Claim, Option<Claiming>) {
    let claim = Claim::default();
    let connection = intake.connection(ConnectionId(connection));
    let mut claiming: Claiming = Box::pin(connection.claim(bytes, claim.clone()));
    let is_ready = is_ready(claiming.as_mut());
    (claim, (!is_ready).then_some(claiming))
}

/// Claims bytes that are there at once.
fn held(intake: &IntakeOfAll, connection: u64, bytes: usize) -> Claim {
    let (claim, waiting) = claim(intake, connection, bytes);
    assert!(waiting.is_none(), "{bytes} bytes of connection {connection} wait");
    claim
}

#[test]
fn large_messages_wait_for_their_own_connection_first() {
    let intake = intake();
    let first = held(&intake, 1, 2 * MIB);
    let (_second_claim, second) = claim(&intake, 1, 2 * MIB);
    let _other = held(&intake, 2, 2 * MIB);
    first.release();
    assert!(is_ready(second.unwrap().as_mut()));
}

#[test]
fn large_announcements_keep_no_smaller_message_out() {
    let intake = intake();
    let announced: Vec<_> = (0..40).map(|at| claim(&intake, at % 20, 16 * MIB)).collect();
    assert_eq!(announced.iter().filter(|(_, waiting)| waiting.is_none()).count(), 8);
    let _chat = held(&intake, 90, 80 * KIB);
    let _middle = held(&intake, 91, MIB);
    let _of_an_attacker = held(&intake, 0, MIB);
    let (_, large) = claim(&intake, 92, 2 * MIB);
    assert!(large.is_some());
}

#[test]
fn half_sent_messages_of_any_size_keep_no_chat_of_another_connection_out() {
    let intake = intake();
    let sizes = [2 * KIB, 64 * KIB, 100 * KIB, 700 * KIB, MIB, 9 * MIB];
    let announced = (0..12_000).zip(sizes.iter().cycle());
    let _announced: Vec<_> = announced.map(|(at, bytes)| claim(&intake, at % 55, *bytes)).collect();
    for connection in 100..300 {
        drop((held(&intake, connection, 100 * KIB), held(&intake, connection, 20 * KIB)));
    }
}

#[test]
fn short_messages_are_bounded_by_connection_and_in_all() {
    let intake = intake();
    let claims: Vec<_> = (0..256).map(|_| claim(&intake, 1, SHORT_BYTES)).collect();
    let granted = |claims: &[(Claim, Option<Claiming>)]| {
        claims.iter().filter(|(_, waiting)| waiting.is_none()).count() * SHORT_BYTES
    };
    assert_eq!(granted(&claims), OWN_BYTES + MIB, "its own bytes, and its part of the pool");
    let others: Vec<_> = (0..4096).map(|at| claim(&intake, 2 + at % 100, SHORT_BYTES)).collect();
    assert_eq!(granted(&claims) + granted(&others), 101 * OWN_BYTES + 8 * MIB);
    let _tiny: Vec<_> = (0..1000).map(|_| held(&intake, 1, TINY_BYTES)).collect();
}

#[test]
fn bytes_go_to_the_connection_that_was_served_least() {
    let intake = intake();
    let greedy: Vec<_> = (0..8).map(|connection| held(&intake, connection, 3 * MIB)).collect();
    let (_again_claim, again) = claim(&intake, 0, 3 * MIB);
    let (_newcomer_claim, newcomer) = claim(&intake, 9, 3 * MIB);
    let (mut again, mut newcomer) = (again.unwrap(), newcomer.unwrap());
    greedy[0].release();
    assert!(is_ready(newcomer.as_mut()) && !is_ready(again.as_mut()));
    greedy[1].release();
    assert!(is_ready(again.as_mut()));
}

#[test]
fn what_is_next_is_not_starved_by_smaller_ones_that_would_fit() {
    let intake = intake();
    let others: Vec<_> = (1..9).map(|connection| held(&intake, connection, 2900 * KIB)).collect();
    let (_next_claim, next) = claim(&intake, 20, 3 * MIB);
    let (_behind_claim, behind) = claim(&intake, 21, 1100 * KIB);
    let (mut next, mut behind) = (next.unwrap(), behind.unwrap());
    assert!(!is_ready(behind.as_mut()), "there are 1376 KiB");
    others[0].release();
    assert!(is_ready(next.as_mut()) && is_ready(behind.as_mut()));
}

#[test]
fn own_bytes_that_are_free_again_go_to_those_who_wait_for_the_pool() {
    let intake = intake();
    let mine = [held(&intake, 1, SHORT_BYTES), held(&intake, 1, SHORT_BYTES)];
    let _all: Vec<_> = (2..10).map(|at| [held(&intake, at, 120 * KIB), held(&intake, at, MIB)]).collect();
    let (_middle_claim, middle) = claim(&intake, 1, MIB);
    let (_third_claim, third) = claim(&intake, 1, SHORT_BYTES);
    let (mut middle, mut third) = (middle.unwrap(), third.unwrap());
    mine[0].release();
    assert!(is_ready(third.as_mut()) && !is_ready(middle.as_mut()));
}

#[test]
fn a_long_chat_of_the_connections_own_bytes_does_not_wait_behind_a_longer_message() {
    let intake = intake();
    let _all: Vec<_> = (2..10).map(|at| [held(&intake, at, 120 * KIB), held(&intake, at, MIB)]).collect();
    let (_middle_claim, middle) = claim(&intake, 1, 700 * KIB);
    assert!(middle.is_some());
    let _chat = held(&intake, 1, 100 * KIB);
}

#[test]
fn a_message_above_a_limit_takes_all_of_it() {
    let intake = intake();
    let all = held(&intake, 1, 1 << 30);
    assert_eq!(intake.state().large.free, 21 * MIB);
    let (_second_claim, second) = claim(&intake, 1, 2 * MIB);
    assert!(second.is_some());
    all.release();
    drop(second);
    assert_eq!(intake.state().large.free, 24 * MIB);
}

#[test]
fn who_leaves_takes_no_bytes_along() {
    let intake = intake();
    let held: Vec<_> = (1..9).map(|connection| held(&intake, connection, 3 * MIB)).collect();
    let waiting: Vec<_> = (1..9).map(|connection| claim(&intake, 10 + connection, 3 * MIB)).collect();
    drop(held);
    // They were given bytes, and have not heard of it.
    assert_eq!(intake.state().large.free, 0);
    drop(waiting);
    let state = intake.state();
    assert_eq!((state.large.free, state.large.used.len(), state.line.len()), (24 * MIB, 0, 0));
}

/// What a caller does: claims bytes for a connection, or is done with the oldest or the newest claim.
#[derive(Clone, Copy, Debug)]
enum Act {
    Claim(u64, usize),
    EndOldest,
    EndNewest,
}

fn act() -> impl Strategy<Value = Act> {
    let sizes = [500, 2 * KIB, SHORT_BYTES, 90 * KIB, 400 * KIB, MIB, 2 * MIB, 5 * MIB, 20 * MIB];
    prop_oneof![
        3 => (0_u64..12, prop::sample::select(sizes.to_vec())).prop_map(|(of, bytes)| Act::Claim(of, bytes)),
        1 => Just(Act::EndOldest),
        1 => Just(Act::EndNewest),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn bytes_add_up_limits_hold_and_nobody_is_forgotten(acts in vec(act(), 1..200)) {
        let intake = intake();
        let mut calls = Vec::new();
        for act in acts {
            match act {
                Act::Claim(connection, bytes) => calls.push(claim(&intake, connection, bytes)),
                Act::EndOldest if !calls.is_empty() => drop(calls.remove(0)),
                Act::EndNewest => drop(calls.pop()),
                Act::EndOldest => {}
            }
            let state = intake.state();
            for (pool, all) in [(&state.kept, 8 * MIB), (&state.large, 24 * MIB)] {
                prop_assert_eq!(pool.free + pool.used.values().sum::<usize>(), all);
            }
            for pool in [&state.own, &state.kept, &state.large] {
                prop_assert!(pool.used.values().all(|used| (1..=pool.of_connection_max).contains(used)));
            }
        }
        // As each call that has its bytes ends, the next gets them.
        while !calls.is_empty() {
            let before = calls.len();
            calls.retain_mut(|(_, waiting)| waiting.as_mut().is_some_and(|waiting| !is_ready(pin!(waiting))));
            prop_assert!(calls.len() < before, "{} wait for nothing", before);
        }
        let state = intake.state();
        prop_assert_eq!((state.kept.free, state.large.free, state.own.used.len()), (8 * MIB, 24 * MIB, 0));
    }
}

#[test]
fn what_waits_for_a_download_keeps_no_message_out_and_has_limits() {
    let intake = intake();
    let limit = |refused: Result<(), Error>| match refused {
        Err(Error::WaitingBytes { limit, value, .. }) => (limit, value),
        other => panic!("{other:?}"),
    };
    let first = held(&intake, 1, 3 * MIB);
    let (second, waiting) = claim(&intake, 1, 3 * MIB);
    let mut waiting = waiting.expect("the connection has its share");
    first.set_aside().unwrap();
    assert!(is_ready(waiting.as_mut()));
    assert_eq!(limit(second.set_aside()), ("receive_bytes_per_connection_max", 4 << 20));
    let aside = |connection| {
        let claim = held(&intake, connection, 3 * MIB);
        claim.set_aside().map(|()| claim)
    };
    let _others: Vec<_> = (2..11).map(|connection| aside(connection).unwrap()).collect();
    assert_eq!(limit(aside(11).map(drop)), ("receive_bytes_max", 32 << 20));
    // Who is prepared or leaves makes room, and who claimed nothing has nothing to set aside.
    first.release();
    aside(11).unwrap();
    Claim::default().set_aside().unwrap();
}
