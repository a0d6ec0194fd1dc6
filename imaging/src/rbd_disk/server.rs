//! The companion's side of a channel: reads a request, has the clone carry it out, answers. One thread each.

use super::channel::{
    Answer, MAPPED_BYTES, MOST_DATA, MalformedMessage, Mapped, REQUEST_BYTES, Range, Request, receive_all, send_all,
};
use assay_rbd::{CloneObjects, OwnObjects, RbdError};
use assay_service::error::chain;
use rustix::io::Errno;
use rustix::net::Shutdown;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// librbd's calls begin on our threads.
const STACK_BYTES: usize = 512 * 1024;

/// Why a channel is served no more.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChannelError {
    /// The socket.
    #[error("hearing from the worker")]
    Socket(#[from] io::Error),
    /// The worker is none of ours any more.
    #[error("the worker asks for what is no request")]
    Malformed(#[from] MalformedMessage),
    /// The key was revoked.
    #[error("nothing more is carried out for this client")]
    Blocklisted(#[source] RbdError),
}

/// Threads that serve channels.
pub(super) struct Serving {
    channels: Vec<Arc<OwnedFd>>,
    /// How many of them still run.
    left: Mutex<usize>,
    ended: Condvar,
}

impl Serving {
    /// Starts a thread for each channel.
    pub(super) fn start<C: CloneObjects + 'static>(
        clone: C,
        own: OwnObjects,
        channels: Vec<OwnedFd>,
    ) -> io::Result<Arc<Self>> {
        let channels: Vec<_> = channels.into_iter().map(Arc::new).collect();
        let left = Mutex::new(channels.len());
        let serving = Arc::new(Self { channels, left, ended: Condvar::new() });
        let disk = Arc::new((clone, own));
        for channel in &serving.channels {
            let (serving, disk, channel) = (Arc::clone(&serving), Arc::clone(&disk), Arc::clone(channel));
            std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
                let (clone, own) = &*disk;
                if let Err(error) = serve(&channel, clone, own) {
                    tracing::warn!(event = "channel.ended", cause = chain(&error), "a channel is served no more");
                    // What holds for one holds for all.
                    serving.close();
                }
                // The last of them closes the clone: nobody who is gone shall be found to have it open.
                drop(disk);
                *serving.left() -= 1;
                serving.ended.notify_all();
            })?;
        }
        Ok(serving)
    }

    /// Takes no further request; what is under way goes on.
    pub(super) fn close(&self) {
        for channel in &self.channels {
            let _closed_already = rustix::net::shutdown(channel, Shutdown::Both);
        }
    }

    /// Waits until nothing is under way and nothing more will be, for so long at most.
    pub(super) fn wait(&self, patience: Option<Duration>) {
        let deadline = patience.map(|patience| Instant::now() + patience);
        let mut left = self.left();
        while *left > 0 {
            let Some(deadline) = deadline else {
                left = self.ended.wait(left).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return;
            }
            left = self.ended.wait_timeout(left, remaining).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn left(&self) -> MutexGuard<'_, usize> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves a channel until its other end is closed.
fn serve(channel: &OwnedFd, clone: &impl CloneObjects, own: &OwnObjects) -> Result<(), ChannelError> {
    // As much as any request may be for, whatever it says.
    let mut buffer = vec![0; MOST_DATA];
    let mut header = [0; REQUEST_BYTES];
    while receive_all(channel, &mut header)? {
        let request = Request::decode(&header)?;
        if !receive_all(channel, &mut buffer[..request.data()])? {
            return Ok(());
        }
        let (answer, data) = match carry_out(request, &mut buffer, clone, own) {
            Ok(()) => (Answer::Done, &buffer[..request.answer_data()]),
            Err(error) if error.is_blocklisted() => return Err(ChannelError::Blocklisted(error)),
            Err(error) => {
                tracing::error!(event = "clone.failed", cause = chain(&error), "I/O on a clone failed");
                (Answer::Failed(errno(&error)), &buffer[..0])
            }
        };
        send_all(channel, &[&answer.encode(request), data])?;
    }
    Ok(())
}

fn carry_out(request: Request, buffer: &mut [u8], clone: &impl CloneObjects, own: &OwnObjects) -> Result<(), RbdError> {
    match request {
        Request::Read(range) => clone.read_at(range.offset, &mut buffer[..range.len()]),
        Request::Write(range) => clone.write_pieces_at(range.offset, &[&buffer[..range.len()]]),
        Request::Zero(Range { offset, length }) => clone.write_zeroes(offset, length.into()),
        Request::Flush => clone.flush(),
        Request::Own(range) => {
            buffer[..range.len()].copy_from_slice(&own.map(range.offset, range.len()));
            Ok(())
        }
        Request::Mapped(Range { offset, length }) => {
            let (mapped, octets) = clone.is_mapped(offset, length.into())?;
            let mapped = Mapped { mapped, length: u32::try_from(octets).map_or(length, |octets| octets.min(length)) };
            buffer[..MAPPED_BYTES].copy_from_slice(&mapped.encode());
            Ok(())
        }
    }
}

/// What the worker is told.
fn errno(error: &RbdError) -> u32 {
    let errno = match error {
        RbdError::OutOfRange { .. } => Errno::INVAL.raw_os_error(),
        other => other.errno().filter(|errno| *errno > 0).unwrap_or(Errno::IO.raw_os_error()),
    };
    u32::try_from(errno).unwrap_or(u32::MAX)
}
