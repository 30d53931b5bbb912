//! Whose turn it is at the desk.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use super::*;

/// Returns the place if it is there at once.
fn now(waiting: std::pin::Pin<&mut impl Future<Output = Place>>) -> Option<Place> {
    match waiting.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(place) => Some(place),
        Poll::Pending => None,
    }
}

fn desk(places: u64) -> Arc<Desk> {
    Arc::new(Desk::new(Some(places)))
}

#[test]
fn the_connection_that_was_served_least_is_next() {
    let desk = desk(1);
    let mut greedy = now(pin!(desk.place(ConnectionId(1), 50_000)));
    let mut again = pin!(desk.place(ConnectionId(1), 50_000));
    let mut other = pin!(desk.place(ConnectionId(2), 50_000));
    assert!(greedy.is_some() && now(again.as_mut()).is_none() && now(other.as_mut()).is_none());
    greedy = None;
    let place = now(other.as_mut());
    assert!(place.is_some() && now(again.as_mut()).is_none(), "{greedy:?}");
    drop(place);
    assert!(now(again.as_mut()).is_some());
}

#[test]
fn a_connection_with_many_pieces_is_served_as_much_as_one_with_few() {
    let desk = desk(1);
    let held = now(pin!(desk.place(ConnectionId(9), 1)));
    let mut many: Vec<_> = (0..4).map(|_| Box::pin(desk.place(ConnectionId(1), 20_000))).collect();
    let mut few: Vec<_> = (0..2).map(|_| Box::pin(desk.place(ConnectionId(2), 20_000))).collect();
    many.iter_mut().chain(&mut few).for_each(|waiting| assert!(now(waiting.as_mut()).is_none()));
    drop(held);
    let mut order = Vec::new();
    while order.len() < 6 {
        for (connection, all) in [(1, &mut many), (2, &mut few)] {
            // A future must not be polled again once it is ready.
            let called = all.iter_mut().position(|waiting| now(waiting.as_mut()).is_some());
            if let Some(called) = called {
                drop(all.remove(called));
                order.push(connection);
            }
        }
    }
    assert_eq!(order, [1, 2, 1, 2, 1, 1]);
}

#[test]
fn long_pieces_leave_one_place() {
    let desk = desk(2);
    let long = now(pin!(desk.place(ConnectionId(1), LONG_BYTES + 1)));
    let mut second = pin!(desk.place(ConnectionId(2), LONG_BYTES + 1));
    assert!(long.is_some() && now(second.as_mut()).is_none());
    let short = now(pin!(desk.place(ConnectionId(3), 10)));
    assert!(short.is_some());
    drop(short);
    assert!(now(second.as_mut()).is_none());
    drop(long);
    assert!(now(second.as_mut()).is_some());
}

#[test]
fn who_leaves_takes_no_place_along() {
    let desk = desk(1);
    let place = now(pin!(desk.place(ConnectionId(1), 1)));
    let mut gone = Box::pin(desk.place(ConnectionId(2), 1));
    let mut called_too_late = Box::pin(desk.place(ConnectionId(3), 1));
    assert!(now(gone.as_mut()).is_none() && now(called_too_late.as_mut()).is_none());
    drop(gone);
    // Now the third is called, and leaves without having heard it.
    drop(place);
    drop(called_too_late);
    assert!(now(pin!(desk.place(ConnectionId(4), 1))).is_some());
    let state = desk.state();
    assert_eq!((state.free, state.line.len()), (1, 0));
}

#[test]
fn who_left_is_forgotten_while_all_places_are_taken() {
    let desk = desk(1);
    let _place = now(pin!(desk.place(ConnectionId(1), 1)));
    for _ in 0..10 {
        assert!(now(pin!(desk.place(ConnectionId(2), 1))).is_none());
    }
    // The last has left since.
    assert_eq!(desk.state().line.len(), 1);
}
