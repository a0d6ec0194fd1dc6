//! Threads for I/O that waits for the disk, so that connections go on meanwhile: reads that the page cache cannot
//! answer, flushes, and what is rare.

use super::unit::Unit;
use assay_iscsi::{IoRequest, IoResult, IoTag};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

/// Reads from the disk at once; a disk sorts what it has.
const THREADS: usize = 8;
/// Enough for the deepest call here, debug builds included.
pub(super) const STACK_BYTES: usize = 256 * 1024;

/// The threads' queue.
#[derive(Default)]
pub(super) struct Helpers {
    queue: Arc<Queue>,
}

#[derive(Default)]
struct Queue {
    jobs: Mutex<VecDeque<Job>>,
    more: Condvar,
}

struct Job {
    request: IoRequest,
    begun: Instant,
    done: Arc<Done>,
}

/// Where a connection finds what was done for it.
pub(super) struct Done {
    results: Mutex<Vec<(IoTag, IoResult)>>,
    /// Readable when there are some.
    pub(super) ready: OwnedFd,
}

impl Helpers {
    /// Starts the threads, which live as long as the process.
    pub(super) fn start(&self, unit: &Arc<Unit>) -> io::Result<()> {
        for _ in 0..THREADS {
            let (queue, unit) = (Arc::clone(&self.queue), Arc::clone(unit));
            std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || queue.work(&unit))?;
        }
        Ok(())
    }

    pub(super) fn hand(&self, request: IoRequest, begun: Instant, done: &Arc<Done>) {
        let mut jobs = self.queue.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.push_back(Job { request, begun, done: Arc::clone(done) });
        drop(jobs);
        self.queue.more.notify_one();
    }
}

impl Queue {
    fn work(&self, unit: &Unit) {
        loop {
            let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
            let mut jobs = self.more.wait_while(jobs, |jobs| jobs.is_empty()).unwrap_or_else(PoisonError::into_inner);
            let Some(Job { request, begun, done }) = jobs.pop_front() else { continue };
            drop(jobs);
            let result = unit.perform(request.io, request.in_place, begun);
            done.add(request.tag, result);
        }
    }
}

impl Done {
    pub(super) fn new() -> rustix::io::Result<Arc<Self>> {
        let ready = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self { results: Mutex::default(), ready }))
    }

    fn add(&self, tag: IoTag, result: IoResult) {
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        results.push((tag, result));
        // One for all that wait is enough: whoever takes them takes them all.
        if results.len() == 1 {
            let _only_full_if_readable = rustix::io::write(&self.ready, &1_u64.to_ne_bytes());
        }
    }

    pub(super) fn take(&self) -> Vec<(IoTag, IoResult)> {
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        if !results.is_empty() {
            let _empty_if_just_taken = rustix::io::read(&self.ready, &mut [0; 8]);
        }
        std::mem::take(&mut *results)
    }
}
