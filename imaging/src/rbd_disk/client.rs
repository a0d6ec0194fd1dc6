//! The worker's side: a clone's own objects behind channels. A caller takes a channel, asks, waits, and puts it back.

use super::channel::{
    ANSWER_BYTES, Answer, MAPPED_BYTES, MOST_DATA, MOST_ZEROES, Mapped, Range, Request, receive_all, send_all,
};
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

    fn is_mapped(&self, offset: u64, length: u64) -> Result<(bool, u64), RbdError> {
        let asked = Range { offset, length: u32::try_from(length).unwrap_or(MOST_ZEROES).min(MOST_ZEROES) };
        let mut answer = [0; MAPPED_BYTES];
        self.ask("looking for data in", Request::Mapped(asked), &[], &mut answer)?;
        match Mapped::decode(&answer, asked) {
            Ok(Mapped { mapped, length }) => Ok((mapped, length.into())),
            Err(error) => (self.gone)(&self.name, &io::Error::new(ErrorKind::InvalidData, error)),
        }
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

#[cfg(test)]
mod tests {
    use super::super::channel::CHANNELS;
    use super::super::server::Serving;
    use super::*;
    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::sync::Arc;

    const BYTE_LEN: usize = 3 << 20;

    /// A clone that is all its own.
    #[derive(Debug)]
    struct Memory(Mutex<Vec<u8>>);

    impl Memory {
        fn with(&self, offset: u64, length: u64, act: impl FnOnce(&mut [u8])) -> Result<(), RbdError> {
            let mut content = self.0.lock().unwrap();
            let byte_len = content.len() as u64;
            let refused = RbdError::OutOfRange { object: "clone".to_owned(), offset, length, byte_len };
            let end = offset.checked_add(length).filter(|end| *end <= byte_len).ok_or(refused)?;
            act(&mut content[usize::try_from(offset).unwrap()..usize::try_from(end).unwrap()]);
            Ok(())
        }
    }

    impl CloneObjects for Memory {
        fn path(&self) -> &str {
            "clone"
        }

        fn byte_len(&self) -> u64 {
            BYTE_LEN as u64
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), RbdError> {
            self.with(offset, buffer.len() as u64, |content| buffer.copy_from_slice(content))
        }

        fn write_pieces_at(&self, offset: u64, pieces: &[&[u8]]) -> Result<(), RbdError> {
            let data = pieces.concat();
            self.with(offset, data.len() as u64, |content| content.copy_from_slice(&data))
        }

        fn write_zeroes(&self, offset: u64, length: u64) -> Result<(), RbdError> {
            self.with(offset, length, |content| content.fill(0))
        }

        fn flush(&self) -> Result<(), RbdError> {
            let source = io::Error::from_raw_os_error(28);
            Err(RbdError::Ceph { doing: "flushing", object: "clone".to_owned(), source })
        }

        /// Every second object of a hundred octets.
        fn is_mapped(&self, offset: u64, length: u64) -> Result<(bool, u64), RbdError> {
            let mapped = (offset / 100).is_multiple_of(2);
            self.with(offset, length, |_| ()).map(|()| (mapped, length.min(100 - offset % 100)))
        }
    }

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap()
    }

    fn gone(name: &str, error: &io::Error) -> ! {
        panic!("{name} is gone: {error}");
    }

    fn disk() -> (Channels, Arc<Serving>) {
        let (ours, theirs) = (0..CHANNELS).map(|_| pair()).unzip();
        let own = OwnObjects::new(BYTE_LEN as u64, 100);
        own.take_map(0, &[1]);
        own.take_map(31_457 / 8, &[2]);
        let serving = Serving::start(Memory(Mutex::new(vec![0xaa; BYTE_LEN])), own, theirs).unwrap();
        (Channels::new("clone".to_owned(), BYTE_LEN as u64, ours, gone), serving)
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write(usize, Vec<usize>, u8),
        Zero(usize, usize),
        Read(usize, usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let length = || prop_oneof![0_usize..600, 0..BYTE_LEN];
        let step = prop_oneof![
            (0..BYTE_LEN, prop::collection::vec(length(), 0..5), any::<u8>())
                .prop_map(|(at, pieces, octet)| Step::Write(at, pieces, octet)),
            (0..BYTE_LEN, length()).prop_map(|(at, length)| Step::Zero(at, length)),
            (0..BYTE_LEN, length()).prop_map(|(at, length)| Step::Read(at, length)),
        ];
        prop::collection::vec(step, 1..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        #[test]
        fn a_disk_behind_channels_is_a_disk(steps in steps()) {
            let (disk, _serving) = disk();
            let mut model = vec![0xaa; BYTE_LEN];
            for step in steps {
                match step {
                    Step::Write(at, lengths, octet) => {
                        let pieces: Vec<Vec<u8>> =
                            lengths.iter().zip(octet..=255).map(|(length, octet)| vec![octet; *length]).collect();
                        let whole = pieces.concat();
                        let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
                        let written = disk.write_pieces_at(at as u64, &pieces);
                        if at + whole.len() <= BYTE_LEN {
                            written.unwrap();
                            model[at..at + whole.len()].copy_from_slice(&whole);
                        } else {
                            // Parts of it may have been written: not what a caller who checked its range sees.
                            prop_assert_eq!(written.unwrap_err().errno(), Some(22));
                            disk.read_at(0, &mut model).unwrap();
                        }
                    }
                    Step::Zero(at, length) if at + length <= BYTE_LEN => {
                        disk.write_zeroes(at as u64, length as u64).unwrap();
                        model[at..at + length].fill(0);
                    }
                    Step::Zero(at, length) => {
                        prop_assert_eq!(disk.write_zeroes(at as u64, length as u64).unwrap_err().errno(), Some(22));
                    }
                    Step::Read(at, length) => {
                        let mut buffer = vec![0; length.min(BYTE_LEN - at)];
                        disk.read_at(at as u64, &mut buffer).unwrap();
                        prop_assert!(buffer == model[at..at + buffer.len()]);
                    }
                }
            }
        }
    }

    #[test]
    fn the_map_of_objects_arrives_and_errors_keep_their_number() {
        let (disk, _serving) = disk();
        let own = disk.own_objects(100).unwrap();
        assert_eq!((own.own_count(), own.map(0, 1)[0], own.map(31_457 / 8, 1)[0]), (2, 1, 2));
        assert_eq!(disk.is_mapped(250, 10).unwrap(), (true, 10));
        assert_eq!(disk.is_mapped(310, BYTE_LEN as u64 - 310).unwrap(), (false, 90));
        assert_eq!(disk.is_mapped(BYTE_LEN as u64 - 1, 2).unwrap_err().errno(), Some(22));
        let full = disk.flush().unwrap_err();
        assert_eq!(full.errno(), Some(28));
        assert!(full.to_string().contains("clone"), "{full}");
    }

    #[test]
    fn as_many_may_ask_at_once_as_like() {
        let (disk, _serving) = disk();
        std::thread::scope(|scope| {
            for number in 0..4 * CHANNELS {
                let disk = &disk;
                scope.spawn(move || {
                    let (at, octet) = ((number * 4096) as u64, [u8::try_from(number).unwrap(); 4096]);
                    let mut buffer = [0; 4096];
                    for _ in 0..20 {
                        disk.write_pieces_at(at, &[&octet]).unwrap();
                        disk.read_at(at, &mut buffer).unwrap();
                        assert_eq!(buffer, octet);
                    }
                });
            }
        });
    }

    #[test]
    fn what_is_no_request_ends_every_channel_and_an_end_is_seen() {
        let (disk, serving) = disk();
        let channel = disk.take();
        send_all(&channel, &[&[0xff; 16]]).unwrap();
        serving.wait(None);
        let died = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| disk.flush())).unwrap_err();
        assert!(died.downcast_ref::<String>().unwrap().contains("clone is gone"));
        // An answer that is none, too.
        let (ours, theirs) = pair();
        send_all(&theirs, &[&[0, 0, 0, 0, 1, 0, 0, 0]]).unwrap();
        let error = exchange(&ours, Request::Flush, &[], &mut []).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        // One that speaks of more than was asked about.
        let more = Mapped { mapped: false, length: 513 };
        send_all(&theirs, &[&[0, 0, 0, 0, 8, 0, 0, 0], &more.encode()]).unwrap();
        let disk = Channels::new("clone".to_owned(), 1 << 20, vec![ours], gone);
        let died = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| disk.is_mapped(0, 512))).unwrap_err();
        assert!(died.downcast_ref::<String>().unwrap().contains("clone is gone"));
    }
}
