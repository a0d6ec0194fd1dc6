//! An initiator that writes without pause, and what of that an image holds.

use super::*;
use crate::rig::site::until;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

/// QEMU's initiator, which writes block after block, each flushed before the next.
pub(crate) struct Writer {
    acknowledged: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<Duration>,
}

impl Writer {
    /// From the beginning of a disk of zeros, `blocks` at most, of `block` octets each.
    pub(crate) async fn start(portal: SocketAddr, order: &ExportOrder, block: usize, blocks: usize) -> Self {
        let mut held = Held::open(portal, order).await;
        let (acknowledged, stop) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let (counted, stopped) = (Arc::clone(&acknowledged), Arc::clone(&stop));
        let task = tokio::spawn(async move {
            let mut longest = Duration::ZERO;
            for number in 0..blocks {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                let begun = Instant::now();
                let said = held.ask(&format!("write -P {} {} {block}", fill(number), number * block)).await;
                assert!(said.contains(&format!("wrote {block}/{block}")), "write {number}: {said}");
                longest = longest.max(begun.elapsed());
                counted.fetch_add(1, Ordering::SeqCst);
            }
            longest
        });
        Self { acknowledged, stop, task }
    }

    pub(crate) fn acknowledged(&self) -> usize {
        self.acknowledged.load(Ordering::SeqCst)
    }

    pub(crate) async fn goes_on(&self) {
        let before = self.acknowledged();
        until(async || {
            assert!(!self.task.is_finished(), "it has ended");
            self.acknowledged() > before + 3
        })
        .await;
    }

    /// How many blocks it wrote, and how long the slowest took.
    pub(crate) async fn stop(self) -> (usize, Duration) {
        self.stop.store(true, Ordering::SeqCst);
        let longest = self.task.await.unwrap();
        (self.acknowledged.load(Ordering::SeqCst), longest)
    }
}

/// How many blocks a writer has written in `content`: all of them at its beginning, each with its own number, in order.
pub(crate) fn written(content: &[u8], block: usize) -> usize {
    let count = content.chunks(block).take_while(|octets| octets[0] != 0).count();
    for (number, octets) in content.chunks(block).enumerate() {
        let expected = if number < count { fill(number) } else { 0 };
        assert!(octets == vec![expected; octets.len()], "block {number} of {count}");
    }
    count
}

fn fill(number: usize) -> u8 {
    (number % 255) as u8 + 1
}
