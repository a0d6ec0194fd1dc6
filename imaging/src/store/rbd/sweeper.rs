//! The thread that gives back the space of what was removed: deleting a disk's objects takes longer than anybody should
//! wait for. It ends with its store, after the image that it is at: a process that ended in the middle of a call to librbd
//! would be aborted by it.

use assay_rbd::store::RbdStore;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// The thread, as long as its store is open.
#[derive(Debug)]
pub(super) struct Sweeper {
    orders: Sender<()>,
    readers: Arc<AtomicUsize>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sweeper {
    /// Starts it; it begins with what an earlier process left.
    pub(super) fn start(store: Arc<RbdStore>) -> io::Result<Self> {
        let (orders, ordered) = channel();
        let (readers, ending) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let theirs = (Arc::clone(&readers), Arc::clone(&ending));
        let thread = std::thread::Builder::new()
            .name("rbd-sweeper".to_owned())
            .spawn(move || sweep(&store, &ordered, &theirs.0, &theirs.1))?;
        let sweeper = Self { orders, readers, ending, thread: Some(thread) };
        sweeper.wake();
        Ok(sweeper)
    }

    /// Something was removed.
    pub(super) fn wake(&self) {
        // A thread that has ended has said why.
        let _ = self.orders.send(());
    }

    /// Keeps what is being read from being swept, although it may be removed meanwhile.
    pub(super) fn reader(&self) -> Reader {
        self.readers.fetch_add(1, Ordering::AcqRel);
        Reader { orders: self.orders.clone(), readers: Arc::clone(&self.readers) }
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        // Readers may outlive the store, and with them the way to give orders.
        self.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(event = "store.sweeper_died", "the thread that gives back space has panicked");
        }
    }
}

/// Somebody who reads from Ceph.
#[derive(Debug)]
pub(super) struct Reader {
    orders: Sender<()>,
    readers: Arc<AtomicUsize>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        if self.readers.fetch_sub(1, Ordering::AcqRel) == 1 {
            let _ = self.orders.send(());
        }
    }
}

fn sweep(store: &RbdStore, ordered: &Receiver<()>, readers: &AtomicUsize, ending: &AtomicBool) {
    let go_on = || !ending.load(Ordering::Acquire);
    // Asked first: the order that came with the end may have been taken for one of many.
    while go_on() && ordered.recv().is_ok() {
        // Many orders are one.
        while ordered.try_recv().is_ok() {}
        let swept = store.removed().and_then(|removed| {
            // Listed before that is asked: what somebody reads was removed, if at all, after they began, and is not listed
            // unless they count.
            if readers.load(Ordering::Acquire) == 0 { removed.purge_while(go_on) } else { Ok(0) }
        });
        match swept {
            Ok(0) => {}
            Ok(images) => tracing::info!(event = "store.swept", images, "gave back the space of what was removed"),
            Err(error) => {
                let cause = assay_service::error::chain(&error);
                tracing::warn!(event = "store.not_swept", cause, "giving back the space of what was removed");
            }
        }
    }
}
