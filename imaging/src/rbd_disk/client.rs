//! The worker's side: a clone's own objects behind channels. A caller takes a channel, asks, waits, and puts it back.

use super::channel::{ANSWER_BYTES, Answer, MOST_DATA, MOST_ZEROES, Range, Request, receive_all, send_all};
use assay_rbd::{CloneObjects, OwnObjects, RbdError};
use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A clone, through its companion.
pub(crate) struct Channels {
    /// What messages call the clone.
    name: String,
    byte_len: u64,
    idle: Mutex<Vec<OwnedFd>>,
    put_back: Condvar,
    gone: Gone,
}

/// Called when the companion is gone, or talks nonsense: nothing more can be read or written then. It does not return, so
/// nobody hears that what was under way has failed, and an initiator asks again where it is connected next.
pub(crate) type Gone = fn(&str, &io::Error) -> !;

impl Channels {
    /// Over connected sockets, of which there is at least one.
    pub(crate) fn new(name: String, byte_len: u64, sockets: Vec<OwnedFd>, gone: Gone) -> Self {
        Self { name, byte_len, idle: Mutex::new(sockets), put_back: Condvar::new(), gone }
    }

    /// Which objects are the clone's own.
    pub(crate) fn own_objects(&self, object_bytes: u64) -> Result<OwnObjects, RbdError> {
        let own = OwnObjects::new(self.byte_len, object_bytes);
        let mut map = vec![0; MOST_DATA.min(usize::try_from(own.map_len()).unwrap_or(usize::MAX))];
        let mut at = 0;
        while at < own.map_len() {
            let length = MOST_DATA.min(usize::try_from(own.map_len() - at).unwrap_or(usize::MAX));
            self.ask("listing the objects of", Request::Own(range(at, length)), &[], &mut map[..length])?;
            own.take_map(at, &map[..length]);
            at += length as u64;
        }
        Ok(own)
    }

    /// Asks, and fills `into` with what is answered.
    fn ask(&self, doing: &'static str, request: Request, data: &[&[u8]], into: &mut [u8]) -> Result<(), RbdError> {
        let channel = self.take();
        match exchange(&channel, request, data, into) {
            Ok(answer) => {
                self.idle().push(channel);
                self.put_back.notify_one();
                match answer {
                    Answer::Done => Ok(()),
                    Answer::Failed(errno) => {
                        let source = io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(i32::MAX));
                        Err(RbdError::Ceph { doing, object: self.name.clone(), source })
                    }
                }
            }
            Err(error) => (self.gone)(&self.name, &error),
        }
    }

    fn take(&self) -> OwnedFd {
        let mut idle = self.idle();
        loop {
            if let Some(channel) = idle.pop() {
                return channel;
            }
            idle = self.put_back.wait(idle).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CloneObjects for Channels {
    fn path(&self) -> &str {
        &self.name
    }

    fn byte_len(&self) -> u64 {
        self.byte_len
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), RbdError> {
        let mut at = offset;
        for part in buffer.chunks_mut(MOST_DATA) {
            self.ask("reading", Request::Read(range(at, part.len())), &[], part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn write_pieces_at(&self, offset: u64, pieces: &[&[u8]]) -> Result<(), RbdError> {
        let mut at = offset;
        for part in cut(pieces, MOST_DATA) {
            let length = part.iter().map(|piece| piece.len()).sum();
            self.ask("writing", Request::Write(range(at, length)), &part, &mut [])?;
            at += length as u64;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), RbdError> {
        let (mut at, end) = (offset, offset.saturating_add(length));
        while at < end {
            // At multiples, which are where objects begin: what is wholly zeroed gives its space back.
            let most = u64::from(MOST_ZEROES) - at % u64::from(MOST_ZEROES);
            let part = most.min(end - at);
            let length = usize::try_from(part).unwrap_or(usize::MAX);
            self.ask("zeroing", Request::Zero(range(at, length)), &[], &mut [])?;
            at += part;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), RbdError> {
        self.ask("flushing", Request::Flush, &[], &mut [])
    }
}

impl fmt::Debug for Channels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channels").field("name", &self.name).field("byte_len", &self.byte_len).finish_non_exhaustive()
    }
}

fn range(offset: u64, length: usize) -> Range {
    Range { offset, length: u32::try_from(length).unwrap_or(u32::MAX) }
}

/// The request, what is behind it, and its answer.
fn exchange(channel: &OwnedFd, request: Request, data: &[&[u8]], into: &mut [u8]) -> io::Result<Answer> {
    let header = request.encode();
    let mut pieces = Vec::with_capacity(1 + data.len());
    pieces.push(&header[..]);
    pieces.extend(data);
    send_all(channel, &pieces)?;
    let mut header = [0; ANSWER_BYTES];
    let heard = receive_all(channel, &mut header)?;
    if !heard {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    let answer = Answer::decode(&header, request).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
    if answer == Answer::Done && !receive_all(channel, into)? {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok(answer)
}

/// Cuts pieces into parts of at most `most` octets, none of them empty.
fn cut<'a>(pieces: &[&'a [u8]], most: usize) -> Vec<Vec<&'a [u8]>> {
    let mut parts: Vec<Vec<&[u8]>> = Vec::new();
    let mut room = 0;
    for piece in pieces {
        let mut rest = *piece;
        while !rest.is_empty() {
            if room == 0 {
                parts.push(Vec::new());
                room = most;
            }
            let (now, later) = rest.split_at(room.min(rest.len()));
            if let Some(part) = parts.last_mut() {
                part.push(now);
            }
            room -= now.len();
            rest = later;
        }
    }
    parts
}
