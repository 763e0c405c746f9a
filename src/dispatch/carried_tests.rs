use std::cell::Cell;
use std::rc::Rc;

use tokio::task::{LocalSet, spawn_local};
use tokio::time::{advance, sleep};

use super::choice::SLOW;
use super::*;

const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

/// Enters `many` flows, a second apart.
async fn entered(carried: &Arc<Carried>, many: usize) -> Vec<Seat> {
    let mut seats = Vec::new();
    for _ in 0..many {
        seats.push(carried.enter(CLIENT));
        advance(Duration::from_secs(1)).await;
    }
    seats
}

fn leaving(seats: &[Seat]) -> Vec<usize> {
    (0..seats.len()).filter(|n| seats[*n].place.pulse.leaving.load(Relaxed)).collect()
}

fn ask(carried: &Carried) -> Search {
    carried.flows.lock().ask(CLIENT, Instant::now())
}

fn asked(flows: u64) -> Search {
    Search::Asked(Asked { flows, dials: 0 })
}

#[tokio::test(start_paused = true)]
async fn a_sixteenth_of_the_idle_flows_is_asked_and_these_are_the_ones_idle_longest() {
    let carried = Arc::<Carried>::default();
    let seats = entered(&carried, 36).await;
    // Data moves in the oldest; four more are not idle for long enough.
    seats[0].place.pulse.beat();
    assert_eq!(ask(&carried), asked(1), "of 31");
    assert_eq!(leaving(&seats), [1]);
    assert_eq!(ask(&carried), Search::Leaving, "nobody else while one is about to go");
    advance(IDLE).await;
    let mut seats = seats;
    drop(seats.remove(1));
    assert_eq!(ask(&carried), asked(2), "of 35");
    assert_eq!(leaving(&seats), [1, 2], "the second and the third that were left");
}

#[tokio::test(start_paused = true)]
async fn flows_in_which_data_moves_are_never_asked() {
    let carried = Arc::<Carried>::default();
    assert_eq!(ask(&carried), Search::Nobody);
    let seats = entered(&carried, 20).await;
    seats.iter().for_each(|seat| seat.place.pulse.beat());
    let begun = Instant::now();
    assert_eq!(ask(&carried), Search::NotBefore(begun + STALE));
    assert_eq!(ask(&carried), Search::NotBefore(begun + AGAIN), "without another look");
    for _ in 0..20 {
        advance(STALE * 4 / 5).await;
        seats.iter().for_each(|seat| seat.place.pulse.beat());
        assert_eq!(ask(&carried), Search::NotBefore(Instant::now() + STALE));
    }
    assert!(leaving(&seats).is_empty());
}

#[tokio::test(start_paused = true)]
async fn room_is_there_once_the_descriptors_of_those_that_gave_way_are_free() {
    let carried = Arc::<Carried>::default();
    let test = async {
        let closed = Rc::<Cell<bool>>::default();
        let (seat, noted) = (carried.enter(CLIENT), Rc::clone(&closed));
        spawn_local(async move {
            seat.asked().await;
            sleep(Duration::from_millis(100)).await;
            noted.set(true);
            drop(seat);
        });
        let (deadline, asked) = (Instant::now() + 2 * IDLE, Cell::new(0));
        let told = |gone: Asked| asked.set(asked.get() + gone.flows);
        let begun = Instant::now();
        while begun.elapsed() < STALE {
            assert!(carried.make_room(CLIENT, deadline, told).await, "it waits until the flow may go");
            assert_eq!((asked.get(), closed.get()), (0, false));
        }
        while asked.get() == 0 {
            assert!(carried.make_room(CLIENT, deadline, told).await);
        }
        assert!(begun.elapsed() < IDLE + LEAVING, "{:?}", begun.elapsed());
        assert_eq!((asked.get(), closed.get()), (1, true));
        assert!(!carried.make_room(CLIENT, deadline, told).await, "nobody is left");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test(start_paused = true)]
async fn the_only_client_waits_for_its_own_dials_until_they_are_slow_and_no_longer() {
    let carried = Arc::<Carried>::default();
    let dials: Vec<_> = (0..32).map(|_| carried.dial(CLIENT)).collect();
    advance(STALE).await;
    let dialled = carried.dial(std::net::Ipv4Addr::new(192, 0, 2, 2).into());
    assert!(matches!(ask(&carried), Search::NotBefore(_)));
    advance(SLOW).await;
    assert_eq!(ask(&carried), Search::Asked(Asked { flows: 0, dials: 2 }));
    assert!(!dialled.place.pulse.leaving.load(Relaxed));
    drop((dials, dialled));
    assert_eq!(carried.flows.lock().leaving, 0, "a dial that ends by itself has left, too");
}

#[tokio::test(start_paused = true)]
async fn a_flow_in_which_data_moves_after_it_was_asked_stays() {
    let carried = Arc::<Carried>::default();
    let seat = carried.enter(CLIENT);
    advance(IDLE).await;
    assert_eq!(ask(&carried), asked(1));
    seat.place.pulse.beat();
    let due = Instant::now() + STALE;
    let outcome = timeout(STALE / 2, seat.asked()).await;
    assert!(outcome.is_err(), "it is not told to go");
    assert_eq!(ask(&carried), Search::NotBefore(due), "it is one of the others again");
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_ever_for_a_flow_that_does_not_go() {
    let carried = Arc::<Carried>::default();
    let _seat = carried.enter(CLIENT);
    advance(IDLE).await;
    let (begun, deadline) = (Instant::now(), Instant::now() + IDLE);
    while carried.make_room(CLIENT, deadline, |_| {}).await {}
    assert!(begun.elapsed() <= IDLE + LEAVING, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_flow_whose_client_still_takes_what_was_written_is_not_idle() {
    let carried = Arc::<Carried>::default();
    let seats = entered(&carried, 2).await;
    advance(IDLE).await;
    let now = Instant::now().into_std();
    seats[0].heartbeat().beat(now);
    assert_eq!(ask(&carried), asked(1));
    assert_eq!(leaving(&seats), [1]);
}

#[test]
fn a_worker_without_idle_flows_finds_room_among_those_of_another() {
    let carried = Arc::<Carried>::default();
    let runtime =
        || tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    let (ready, entered) = std::sync::mpsc::channel();
    let theirs = Arc::clone(&carried);
    let other = std::thread::spawn(move || {
        runtime().block_on(async {
            let idle = theirs.enter(CLIENT);
            advance(2 * IDLE).await;
            ready.send(()).expect("the test waits");
            idle.asked().await;
        });
    });
    entered.recv().expect("a flow is there");
    runtime().block_on(async {
        advance(2 * IDLE).await;
        let ours = carried.enter(CLIENT);
        assert_eq!(ask(&carried), asked(1), "the other worker's");
        assert!(!ours.place.pulse.leaving.load(Relaxed), "a flow of ours in which data has just moved stays");
    });
    other.join().expect("it was told to go");
    assert_eq!(carried.flows.lock().leaving, 0, "and its end was noted");
}
