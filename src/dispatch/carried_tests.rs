use std::cell::Cell;

use tokio::task::{LocalSet, spawn_local};
use tokio::time::{advance, sleep};

use super::*;

/// Enters `many` flows, a second apart.
async fn entered(carried: &Rc<Carried>, many: usize) -> Vec<Seat> {
    let mut seats = Vec::new();
    for _ in 0..many {
        seats.push(carried.enter());
        advance(Duration::from_secs(1)).await;
    }
    seats
}

fn leaving(seats: &[Seat]) -> Vec<usize> {
    (0..seats.len()).filter(|n| seats[*n].pulse.leaving.get()).collect()
}

fn ask(carried: &Carried) -> Search {
    carried.flows.borrow_mut().ask(Instant::now())
}

#[tokio::test(start_paused = true)]
async fn a_sixteenth_of_the_idle_flows_is_asked_and_these_are_the_ones_idle_longest() {
    let carried = Rc::<Carried>::default();
    let seats = entered(&carried, 36).await;
    // Data moves in the oldest; four more are not idle for long enough.
    seats[0].pulse.beat();
    assert_eq!(ask(&carried), Search::Asked(1), "of 31");
    assert_eq!(leaving(&seats), [1]);
    assert_eq!(ask(&carried), Search::Leaving, "nobody else while one is about to go");
    advance(IDLE).await;
    let mut seats = seats;
    drop(seats.remove(1));
    assert_eq!(ask(&carried), Search::Asked(2), "of 35");
    assert_eq!(leaving(&seats), [1, 2], "the second and the third that were left");
}

#[tokio::test(start_paused = true)]
async fn flows_in_which_data_moves_are_never_asked() {
    let carried = Rc::<Carried>::default();
    assert_eq!(ask(&carried), Search::Nobody);
    let seats = entered(&carried, 20).await;
    seats.iter().for_each(|seat| seat.pulse.beat());
    let due = Instant::now() + IDLE;
    assert_eq!(ask(&carried), Search::NotBefore(due));
    advance(IDLE / 2).await;
    seats.iter().for_each(|seat| seat.pulse.beat());
    assert_eq!(ask(&carried), Search::NotBefore(due), "without another look");
    advance(IDLE / 2).await;
    assert_eq!(ask(&carried), Search::NotBefore(due + IDLE / 2));
    assert!(leaving(&seats).is_empty());
}

#[tokio::test(start_paused = true)]
async fn room_is_there_once_the_descriptors_of_those_that_gave_way_are_free() {
    let carried = Rc::<Carried>::default();
    let test = async {
        let closed = Rc::<Cell<bool>>::default();
        let (seat, noted) = (carried.enter(), Rc::clone(&closed));
        spawn_local(async move {
            seat.asked().await;
            sleep(Duration::from_millis(100)).await;
            noted.set(true);
            drop(seat);
        });
        let (deadline, asked) = (Instant::now() + 2 * IDLE, Cell::new(0));
        let told = |many| asked.set(asked.get() + many);
        assert!(carried.make_room(deadline, told).await, "it waits until the flow is idle");
        assert_eq!((asked.get(), closed.get()), (0, false));
        assert!(carried.make_room(deadline, told).await);
        assert_eq!((asked.get(), closed.get()), (1, true));
        assert!(!carried.make_room(deadline, told).await, "nobody is left");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test(start_paused = true)]
async fn a_flow_in_which_data_moves_after_it_was_asked_stays() {
    let carried = Rc::<Carried>::default();
    let seat = carried.enter();
    advance(IDLE).await;
    assert_eq!(ask(&carried), Search::Asked(1));
    seat.pulse.beat();
    let due = Instant::now() + IDLE;
    let outcome = timeout(IDLE / 2, seat.asked()).await;
    assert!(outcome.is_err(), "it is not told to go");
    assert_eq!(ask(&carried), Search::NotBefore(due), "it is one of the others again");
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_ever_for_a_flow_that_does_not_go() {
    let carried = Rc::<Carried>::default();
    let _seat = carried.enter();
    advance(IDLE).await;
    let (begun, deadline) = (Instant::now(), Instant::now() + IDLE);
    while carried.make_room(deadline, |_| {}).await {}
    assert!(begun.elapsed() <= IDLE + LEAVING, "{:?}", begun.elapsed());
}
