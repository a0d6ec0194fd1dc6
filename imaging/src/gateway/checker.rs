//! Checks golden images' blocks for this gateway's workers: what a hundred nodes boot from is hashed once, not a hundred
//! times. The questions are [`crate::store::checker`]'s; who asks may be its node's by now, and gets one block after
//! another looked at like everybody else, never told more than which of an image's blocks are right.
//!
//! What was found right is believed for [`AGE`] at most by who has not read it yet; then it is looked at again.

use super::process::packets;
use crate::lock::lock;
use crate::store::StoreError;
use crate::store::checker::{Board, CheckerFiles, QUESTION_BYTES, Question, pair};
use crate::store::golden::{GoldenFiles, GoldenImage};
use crate::store::merkle::Hash;
use rustix::fs::fstat;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tokio::net::UnixDatagram;
use tokio::runtime::Handle;
use tokio::time::sleep;

/// How long a block that was found right is believed to be it by workers that have not read it yet.
const AGE: Duration = Duration::from_mins(1);

/// The golden images that workers read now.
#[derive(Debug)]
pub(super) struct Checkers {
    runtime: Handle,
    images: Mutex<HashMap<Identity, Weak<Checked>>>,
}

/// Files are what they are, not what they are called: an image that was materialised anew is another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Identity {
    device: u64,
    disk: u64,
    tree: u64,
    root: Hash,
}

/// An image, and what was found right.
#[derive(Debug)]
struct Checked {
    image: GoldenImage,
    board: Board,
    /// Held by who looks at blocks, one after another: who comes next finds most of its own looked at.
    looking: tokio::sync::Mutex<()>,
}

impl Checkers {
    /// Tasks that answer run where this is called.
    pub(super) fn new() -> Self {
        Self { runtime: Handle::current(), images: Mutex::default() }
    }

    /// Gives whoever will read these files a way to have blocks checked, until it has closed its end.
    pub(super) fn serve(&self, files: &mut GoldenFiles) -> Result<(), StoreError> {
        files.expect_initiators();
        let checked = self.image(files)?;
        let failed = |source| StoreError::io("preparing to check", &files.name, source);
        let (ours, socket) = pair().map_err(failed)?;
        let board = checked.board.to_read().map_err(failed)?;
        let _runtime = self.runtime.enter();
        let ours = packets(ours).map_err(failed)?;
        files.checker = Some(CheckerFiles { socket, board });
        self.runtime.spawn(async move {
            if let Err(error) = checked.answer(&ours).await {
                tracing::debug!(event = "image.not_checked", %error, "a worker hears no more of its golden image");
            }
        });
        Ok(())
    }

    fn image(&self, files: &GoldenFiles) -> Result<Arc<Checked>, StoreError> {
        let GoldenFiles { name, byte_len, root, disk, tree, checker: _ } = files;
        let failed = |source| StoreError::io("preparing to check", name, source);
        let (at_disk, at_tree) =
            (fstat(disk).map_err(|errno| failed(errno.into()))?, fstat(tree).map_err(|errno| failed(errno.into()))?);
        let identity = Identity { device: at_disk.st_dev, disk: at_disk.st_ino, tree: at_tree.st_ino, root: *root };
        let mut images = lock(&self.images);
        if let Some(checked) = images.get(&identity).and_then(Weak::upgrade) {
            return Ok(checked);
        }
        let image = GoldenImage::from_files(GoldenFiles {
            name: name.clone(),
            byte_len: *byte_len,
            root: *root,
            disk: disk.try_clone().map_err(failed)?,
            tree: tree.try_clone().map_err(failed)?,
            checker: None,
        })?;
        let board = Board::new(image.groups()).map_err(failed)?;
        let checked = Arc::new(Checked { image, board, looking: tokio::sync::Mutex::default() });
        self.runtime.spawn(grow_old(Arc::downgrade(&checked)));
        images.retain(|_, checked| checked.strong_count() > 0);
        images.insert(identity, Arc::downgrade(&checked));
        Ok(checked)
    }
}

impl Checked {
    /// Answers one worker, until it has hung up or talks nonsense.
    async fn answer(self: Arc<Self>, socket: &UnixDatagram) -> io::Result<()> {
        // One octet more, to see that a packet is too long.
        let mut packet = [0; QUESTION_BYTES + 1];
        loop {
            let octets = socket.recv(&mut packet).await?;
            let Some(question) = Question::decode(&packet[..octets]) else { return Ok(()) };
            let right = self.look(question).await;
            socket.send(&right.to_le_bytes()).await?;
        }
    }

    async fn look(self: &Arc<Self>, Question { group, wanted }: Question) -> u64 {
        let group = usize::try_from(group).unwrap_or(usize::MAX);
        let Some(right) = self.image.right(group) else { return 0 };
        // The disk need not wait for others' blocks to be hashed.
        self.image.fetch_group(group, wanted & !right);
        let _alone = self.looking.lock().await;
        let right = self.image.right(group).unwrap_or(0);
        if wanted & !right == 0 {
            return right;
        }
        let this = Arc::clone(self);
        tokio::task::spawn_blocking(move || this.check(group, wanted)).await.unwrap_or(0)
    }

    /// By who holds [`Checked::looking`].
    fn check(&self, group: usize, wanted: u64) -> u64 {
        let right = self.image.check_group(group, wanted);
        self.put_up(group, right);
        right
    }

    /// By who holds [`Checked::looking`].
    fn put_up(&self, group: usize, right: u64) {
        if let Err(error) = self.board.put(group, right) {
            tracing::warn!(event = "image.not_put_up", %error, "saying which blocks of a golden image are right");
        }
    }

    async fn forget(&self) {
        let _alone = self.looking.lock().await;
        self.image.forget();
        (0..self.image.groups()).for_each(|group| self.put_up(group, 0));
    }
}

/// Forgets what was found right, again and again, as long as somebody reads the image.
async fn grow_old(checked: Weak<Checked>) {
    loop {
        sleep(AGE).await;
        let Some(checked) = checked.upgrade() else { return };
        checked.forget().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::device::{BlockDevice as _, DeviceError};
    use crate::store::import::Source;
    use crate::store::overlay::DiskFiles;
    use crate::store::{ImageStore as _, LocalStore};
    use assay_wire::id::{DiskId, ImageKey};
    use assay_wire::imaging::ImageFormat;
    use rustix::net::{RecvFlags, SendFlags, recv, send};
    use std::ops::ControlFlow;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::FileExt as _;
    use std::path::PathBuf;

    const BLOCK: usize = 64 * 1024;
    /// More than a group of blocks, and the last not whole.
    const OCTETS: usize = 70 * BLOCK + 512;

    /// A store with one image and a disk of it.
    struct Host {
        folder: tempfile::TempDir,
        image: ImageKey,
        disk: DiskId,
        checkers: Checkers,
    }

    impl Host {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let source = folder.path().join("source.raw");
            std::fs::write(&source, content()).unwrap();
            let store = LocalStore::open(&folder.path().join("store")).unwrap();
            let source = Source::open(&source, ImageFormat::Raw, &[folder.path().to_owned()]).unwrap();
            let (image, disk, project) = (ImageKey::random(), DiskId::random(), "p1".parse().unwrap());
            store.import(image, &project, &source, &mut |_, _| ControlFlow::Continue(())).unwrap();
            store.create_disk(disk, &project, image).unwrap();
            Self { folder, image, disk, checkers: Checkers::new() }
        }

        fn files(&self) -> GoldenFiles {
            let mut golden = DiskFiles::open(&self.folder.path().join("store"), self.disk).unwrap().golden;
            self.checkers.serve(&mut golden).unwrap();
            golden
        }

        fn disk_file(&self) -> PathBuf {
            self.folder.path().join("store/images").join(self.image.to_string()).join("disk.raw")
        }

        /// Spoils an octet of a block.
        fn rot(&self, block: usize) {
            let disk = std::fs::OpenOptions::new().write(true).open(self.disk_file()).unwrap();
            disk.write_all_at(&[!content()[block * BLOCK]], (block * BLOCK) as u64).unwrap();
        }

        /// What is known of an image that somebody reads.
        fn checked(&self) -> Arc<Checked> {
            lock(&self.checkers.images).values().find_map(Weak::upgrade).unwrap()
        }
    }

    fn content() -> Vec<u8> {
        (0..OCTETS).map(|at| u8::try_from(at / 7 % 251).unwrap()).collect()
    }

    async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        tokio::task::spawn_blocking(work).await.unwrap()
    }

    /// Asks as a worker does, but for whatever it likes.
    async fn ask(socket: &OwnedFd, packet: &[u8]) -> Option<u64> {
        let (socket, packet) = (socket.try_clone().unwrap(), packet.to_vec());
        blocking(move || {
            send(&socket, &packet, SendFlags::NOSIGNAL).ok()?;
            let mut answer = [0; 8];
            let octets = recv(&socket, &mut answer, RecvFlags::empty()).ok()?.0;
            (octets == 8).then(|| u64::from_le_bytes(answer))
        })
        .await
    }

    fn question(group: u64, wanted: u64) -> Vec<u8> {
        [group.to_le_bytes(), wanted.to_le_bytes()].concat()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_one_reader_had_checked_another_need_not() {
        let host = Host::new();
        let (one, other) =
            (GoldenImage::from_files(host.files()).unwrap(), GoldenImage::from_files(host.files()).unwrap());
        let one = blocking(move || {
            let mut read = vec![0; 5 * BLOCK];
            one.read_at(62 * BLOCK as u64 + 100, &mut read).unwrap();
            assert!(read == content()[62 * BLOCK + 100..67 * BLOCK + 100]);
            one
        })
        .await;
        let checked = host.checked();
        assert_eq!(
            (checked.image.right(0), checked.image.right(1)),
            (Some(0b11 << 62), Some(0b1111)),
            "no more than that"
        );
        assert_eq!(one.right(0), Some(0b11 << 62));
        // The reader that comes later hashes nothing and waits for nobody: it reads what has changed since, which it could
        // not otherwise.
        host.rot(63);
        let mut octet = [0];
        assert!(other.try_read_at(63 * BLOCK as u64, &mut octet).unwrap());
        assert_eq!(octet, [!content()[63 * BLOCK]]);
        assert_eq!(other.right(0), Some(0b11 << 62), "it knows of all of the group");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_was_checked_for_a_reader_can_be_sent_from_where_it_is() {
        let host = Host::new();
        host.rot(3);
        let reader = GoldenImage::from_files(host.files()).unwrap();
        blocking(move || {
            let (start, length) = (66 * BLOCK as u64 - 1, 4 * BLOCK as u64);
            assert!(reader.place_at(start, length).is_none());
            assert!(reader.fetch(start, length).unwrap());
            assert!(
                reader.place_at(start, length).is_some_and(|place| (place.offset, place.length) == (start, length))
            );
            assert!(!reader.fetch(0, length).unwrap(), "reading says what is wrong with it");
            assert!(reader.place_at(0, length).is_none());
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_block_that_rots_is_vouched_for_to_nobody_and_one_found_right_not_for_ever() {
        let host = Host::new();
        host.rot(9);
        let reader = GoldenImage::from_files(host.files()).unwrap();
        let reader = blocking(move || {
            let error = reader.read_at(8 * BLOCK as u64, &mut vec![0; 3 * BLOCK]).unwrap_err();
            assert!(matches!(error, DeviceError::Corrupt { offset } if offset == 9 * BLOCK as u64), "{error:?}");
            reader.read_at(10 * BLOCK as u64, &mut [0; 512]).unwrap();
            reader
        })
        .await;
        let checked = host.checked();
        assert_eq!(checked.image.right(0), Some(1 << 8 | 1 << 10));
        host.rot(8);
        checked.forget().await;
        assert_eq!(checked.image.right(0), Some(0));
        let later = GoldenImage::from_files(host.files()).unwrap();
        blocking(move || later.read_at(8 * BLOCK as u64, &mut [0; 512]).unwrap_err()).await;
        drop(reader);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_found_right_is_forgotten_in_time() {
        let host = Host::new();
        let files = host.files();
        let checked = host.checked();
        assert_eq!(checked.look(Question { group: 0, wanted: 5 }).await, 5);
        let board = || {
            let mut word = [0; 8];
            files.checker.as_ref().unwrap().board.read_exact_at(&mut word, 0).unwrap();
            u64::from_le_bytes(word)
        };
        tokio::time::advance(AGE / 2).await;
        assert_eq!((board(), checked.image.right(0)), (5, Some(5)));
        sleep(AGE).await;
        assert_eq!((board(), checked.image.right(0)), (0, Some(0)));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_reader_gets_no_answer_to_nonsense_and_hurts_nobody() {
        let host = Host::new();
        let socket = host.files().checker.unwrap().socket;
        assert_eq!(ask(&socket, &question(0, 1)).await, Some(1));
        assert_eq!(ask(&socket, &question(1, u64::MAX)).await, Some(0x7f), "seven blocks are in the second group");
        for group in [2, 1 << 32, u64::MAX / 64, u64::MAX] {
            assert_eq!(ask(&socket, &question(group, u64::MAX)).await, Some(0));
        }
        for nonsense in [&[7; 3][..], &[7; 17], &[7; 70_000]] {
            let socket = host.files().checker.unwrap().socket;
            assert_eq!(ask(&socket, nonsense).await, None);
            assert_eq!(ask(&socket, &question(0, 1)).await, None, "it has been hung up on");
        }
        assert_eq!(ask(&socket, &question(0, 2)).await, Some(3), "others are answered");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_known_of_an_image_goes_with_its_last_reader_and_its_file() {
        let host = Host::new();
        let socket = host.files().checker.unwrap().socket;
        assert_eq!(ask(&socket, &question(0, 1)).await, Some(1));
        let file = host.disk_file();
        let anew = file.with_file_name("anew");
        std::fs::copy(&file, &anew).unwrap();
        std::fs::rename(&anew, &file).unwrap();
        let other = host.files().checker.unwrap().socket;
        assert_eq!(ask(&other, &question(0, 0)).await, Some(0), "another file with the same name");
        let known = Arc::downgrade(&host.checked());
        drop((socket, other));
        let gone = async {
            while known.strong_count() > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_mins(1), gone).await.unwrap();
    }
}
