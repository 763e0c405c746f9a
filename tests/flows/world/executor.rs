//! Tasks that run only when they were woken: a wake-up that the stack forgets stalls the test, as it would the program.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::task::{Context, Wake, Waker};

type Boxed = Pin<Box<dyn Future<Output = ()>>>;

#[derive(Default)]
pub(super) struct Executor {
    tasks: RefCell<Vec<Task>>,
    spawned: RefCell<Vec<Task>>,
}

struct Task {
    future: Boxed,
    woken: Arc<Woken>,
    done: Rc<Cell<bool>>,
}

struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, SeqCst);
    }
}

impl Executor {
    pub(super) fn spawn(&self, future: Boxed) {
        self.spawn_first(future);
    }

    /// Spawns; the cell tells when it is done.
    pub(super) fn spawn_first(&self, future: Boxed) -> Rc<Cell<bool>> {
        let done = Rc::new(Cell::new(false));
        let task = Task { future, woken: Arc::new(Woken(AtomicBool::new(true))), done: Rc::clone(&done) };
        self.spawned.borrow_mut().push(task);
        done
    }

    /// Polls each woken task once. True: there was one.
    pub(super) fn run(&self) -> bool {
        let mut tasks = std::mem::take(&mut *self.tasks.borrow_mut());
        tasks.append(&mut self.spawned.borrow_mut());
        let mut ran = false;
        tasks.retain_mut(|task| {
            if !task.woken.0.swap(false, SeqCst) {
                return true;
            }
            ran = true;
            let waker = Waker::from(Arc::clone(&task.woken));
            let done = task.future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
            task.done.set(done);
            !done
        });
        *self.tasks.borrow_mut() = tasks;
        ran
    }

    /// Whether a task waits to be polled.
    pub(super) fn is_awake(&self) -> bool {
        !self.spawned.borrow().is_empty() || self.tasks.borrow().iter().any(|task| task.woken.0.load(SeqCst))
    }

    /// Drops all tasks, and with them what they hold of the world.
    pub(super) fn clear(&self) {
        let tasks = std::mem::take(&mut *self.tasks.borrow_mut());
        let spawned = std::mem::take(&mut *self.spawned.borrow_mut());
        drop((tasks, spawned));
    }
}
