//! The thread that gives back the space of what was removed: deleting a disk's objects takes longer than anybody should
//! wait for.

use assay_rbd::store::RbdStore;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

/// The thread, as long as its store is open.
#[derive(Debug)]
pub(super) struct Sweeper {
    orders: Sender<()>,
    readers: Arc<AtomicUsize>,
}

impl Sweeper {
    /// Starts it; it begins with what an earlier process left.
    pub(super) fn start(store: Arc<RbdStore>) -> io::Result<Self> {
        let (orders, ordered) = channel();
        let readers = Arc::new(AtomicUsize::new(0));
        let sweeper = Self { orders, readers: Arc::clone(&readers) };
        std::thread::Builder::new().name("rbd-sweeper".to_owned()).spawn(move || sweep(&store, &ordered, &readers))?;
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

fn sweep(store: &RbdStore, ordered: &Receiver<()>, readers: &AtomicUsize) {
    while ordered.recv().is_ok() {
        // Many orders are one.
        while ordered.try_recv().is_ok() {}
        let swept = store.removed().and_then(|removed| {
            // Listed before that is asked: what somebody reads was removed, if at all, after they began, and is not listed
            // unless they count.
            if readers.load(Ordering::Acquire) == 0 { removed.purge() } else { Ok(0) }
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
