//! How an image is filled from its source, whole or not at all; and how an import that was broken off goes on, if its source
//! knows how far that was.

use super::{BASE, RbdStore, StoredImage, clear, fixed};
use crate::name::{ImageName, ImageObjectId, Namespace};
use crate::{DEFAULT_OBJECT_ORDER, Image, Pool, RbdError};
use std::io;
use std::ops::ControlFlow;

/// Metadata of an image: [`Source::description`].
pub(super) const DESCRIPTION: &str = "assay.description";
/// Metadata of an image that is being imported, and can be gone on with: [`BEGUN`]. Not so any more once it is whole.
const IMPORTING: &str = "assay.importing";
const BEGUN: &str = "begun";
/// Octets read and written at a time by an import: an object.
const CHUNK_BYTES: u64 = 1 << DEFAULT_OBJECT_ORDER;
/// Zeros in pieces of this size are not written.
const PIECE_BYTES: usize = 64 * 1024;

/// What an image is made from.
pub trait Source {
    /// Size of the disk.
    fn byte_len(&self) -> u64;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// The source cannot be read.
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// What to write down about the image, once all of it was read: its digest and the like.
    ///
    /// # Errors
    /// It cannot be said.
    fn description(&mut self) -> io::Result<Option<String>>;

    /// Whether an import of this that is broken off can be gone on with.
    fn can_go_on(&self) -> bool {
        false
    }

    /// How much of an image, by its id, this knows to be there: see [`Source::written`]. It is read all the same, and not
    /// written again. None: the image is begun anew.
    ///
    /// # Errors
    /// What is known cannot be read.
    fn known(&mut self, _image: &ImageObjectId) -> io::Result<Option<u64>> {
        Ok(None)
    }

    /// What was read up to `offset` is in the image with this id now. Worth writing down at the `last` such call before an
    /// end, whatever end that is, and now and then.
    ///
    /// # Errors
    /// It cannot be written down.
    fn written(&mut self, _image: &ImageObjectId, _offset: u64, _last: bool) -> io::Result<()> {
        Ok(())
    }
}

impl RbdStore {
    /// Makes an image. One that is there whole already is answered as it is; one whose import was broken off is gone on with,
    /// if the source can.
    ///
    /// # Errors
    /// The source cannot be read, `progress` said so, or Ceph refuses. What there is is left if the source can go on, until
    /// [`RbdStore::forget_imports`]; otherwise nothing is, unless Ceph refuses that too.
    pub fn import(
        &self,
        image: ImageName,
        namespace: &Namespace,
        source: &mut dyn Source,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<StoredImage, RbdError> {
        match self.image(image) {
            Err(error) if error.is_not_found() => {}
            found => return found,
        }
        let pool = self.make_place(namespace)?;
        if let Some(other) = self.unfinished().remove(&image).filter(|place| place.namespace() != pool.namespace()) {
            // Its project is another one now.
            other.trash_image(image)?;
        }
        self.fence(&pool, image)?;
        let (open, there) = begin(&pool, image, source)?;
        let made = copy(&open, there, source, progress);
        drop(open);
        if let Err(error) = made {
            if source.can_go_on() {
                self.unfinished().insert(image, pool);
            } else if let Err(left) = pool.remove_image(image) {
                tracing::warn!(event = "image.left", image = %image, error = %left, "a broken import is removed at the next start");
            }
            return Err(error);
        }
        self.places().insert(image, pool);
        self.image(image)
    }

    /// Removes what imports that were broken off have left, but of `keep`.
    ///
    /// # Errors
    /// Ceph refuses.
    pub fn forget_imports(&self, keep: &[ImageName]) -> Result<(), RbdError> {
        let unfinished: Vec<(ImageName, Pool)> =
            self.unfinished().iter().map(|(image, pool)| (*image, pool.clone())).collect();
        for (image, pool) in unfinished.into_iter().filter(|(image, _)| !keep.contains(image)) {
            pool.trash_image(image)?;
            self.unfinished().remove(&image);
        }
        Ok(())
    }
}

/// What is done when it is written down how much of an import is there.
const NOTING: &str = "writing down how far has come the import of";

/// An image to be filled, and how much of it an earlier import of the same source wrote.
fn begin(pool: &Pool, image: ImageName, source: &mut dyn Source) -> Result<(Image, u64), RbdError> {
    if source.can_go_on() {
        match go_on(pool, image, source) {
            Ok(Some(begun)) => return Ok(begun),
            Err(error) if !error.is_not_found() => return Err(error),
            Ok(None) | Err(_) => {}
        }
    }
    clear(pool, image)?;
    pool.create_image(image, source.byte_len(), DEFAULT_OBJECT_ORDER)?;
    let open = pool.open_image(image)?;
    if source.can_go_on() {
        open.set_metadata(IMPORTING, BEGUN)?;
    }
    Ok((open, 0))
}

/// The same of an image that was begun, as far as the source knows it.
fn go_on(pool: &Pool, image: ImageName, source: &mut dyn Source) -> Result<Option<(Image, u64)>, RbdError> {
    let open = pool.open_image(image)?;
    // Its name may lead to what has another one.
    if !is_begun(&open)? || open.byte_len() != source.byte_len() || !pool.has_image(image)? {
        return Ok(None);
    }
    let object = open.path().to_owned();
    let failed = |source| RbdError::File { doing: "reading how far has come the import of", object, source };
    let known = source.known(&open.id()?).map_err(failed)?;
    Ok(known.map(|there| (open, there.min(source.byte_len()))))
}

/// Whether this is what an import that can be gone on with has begun. (A disk has its image's metadata, too.)
pub(super) fn is_begun(image: &Image) -> Result<bool, RbdError> {
    Ok(image.metadata(IMPORTING)?.as_deref() == Some(BEGUN))
}

/// Makes an image whole, of which the first octets are `there`.
fn copy(
    image: &Image,
    there: u64,
    source: &mut dyn Source,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<(), RbdError> {
    let (id, all, mut written) = (image.id()?, image.byte_len(), there);
    let failed = |doing| move |source| RbdError::File { doing, object: image.path().to_owned(), source };
    let filled = fill(image, &id, &mut written, source, progress);
    if written > there {
        let noted = source.written(&id, written, true).map_err(failed(NOTING));
        // The first error is the one that counts.
        filled.and(noted)?;
    } else {
        filled?;
    }
    if let Some(description) = source.description().map_err(failed("describing"))? {
        image.set_metadata(DESCRIPTION, &description)?;
    }
    image.flush()?;
    if progress(all, all).is_break() {
        return Err(broken_off(image));
    }
    if source.can_go_on() {
        image.set_metadata(IMPORTING, "")?;
    }
    image.create_snapshot(&fixed(BASE)?)
}

/// Writes an image's octets, but for the first `written`, which are there.
fn fill(
    image: &Image,
    id: &ImageObjectId,
    written: &mut u64,
    source: &mut dyn Source,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<(), RbdError> {
    let failed = |doing| move |source| RbdError::File { doing, object: image.path().to_owned(), source };
    let (all, there, mut offset) = (image.byte_len(), *written, 0);
    let mut buffer = vec![0; usize::try_from(CHUNK_BYTES.min(all)).unwrap_or(usize::MAX)];
    while offset < all {
        if progress(offset, all).is_break() {
            return Err(broken_off(image));
        }
        // What is there and what is not are not mixed.
        let end = if offset < there { there } else { all };
        let length = usize::try_from(end - offset).unwrap_or(usize::MAX).min(buffer.len());
        let chunk = &mut buffer[..length];
        source.read(offset, chunk).map_err(failed("reading the source of"))?;
        if offset >= there {
            for (at, data) in pieces_with_data(chunk) {
                image.write_at(offset + at as u64, data)?;
            }
            *written = offset + length as u64;
            source.written(id, *written, false).map_err(failed(NOTING))?;
        }
        offset += length as u64;
    }
    Ok(())
}

fn broken_off(image: &Image) -> RbdError {
    RbdError::BrokenOff { doing: "importing", object: image.path().to_owned() }
}

/// The longest runs of pieces that are not all zeros, and where they start.
fn pieces_with_data(chunk: &[u8]) -> Vec<(usize, &[u8])> {
    let mut runs: Vec<(usize, &[u8])> = Vec::new();
    for (index, piece) in chunk.chunks(PIECE_BYTES).enumerate().filter(|(_, piece)| piece.iter().any(|o| *o != 0)) {
        let start = index * PIECE_BYTES;
        match runs.last_mut() {
            Some((first, run)) if *first + run.len() == start => *run = &chunk[*first..start + piece.len()],
            _ => runs.push((start, piece)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_left_out_and_neighbours_go_together() {
        let mut chunk = vec![0; 5 * PIECE_BYTES + 10];
        chunk[PIECE_BYTES] = 1;
        chunk[3 * PIECE_BYTES - 1] = 1;
        chunk[5 * PIECE_BYTES + 9] = 1;
        let runs: Vec<_> = pieces_with_data(&chunk).into_iter().map(|(at, data)| (at, data.len())).collect();
        assert_eq!(runs, [(PIECE_BYTES, 2 * PIECE_BYTES), (5 * PIECE_BYTES, 10)]);
        assert!(pieces_with_data(&[0; 100]).is_empty());
    }
}
