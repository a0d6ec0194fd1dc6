//! Small notes beside the images, a line for each thing that is under way. No export's key reaches them.

use super::RbdStore;
use crate::name::ImageName;
use crate::{Pool, RbdError};
use std::sync::PoisonError;

/// The object, in each namespace, that says which disks are being replaced by a clone of which image: a line each.
const RESTORING: &str = "assay.restoring";

impl RbdStore {
    /// Writes down that a disk is being restored, or is no more.
    pub(super) fn note_restore(&self, pool: &Pool, disk: ImageName, image: Option<ImageName>) -> Result<(), RbdError> {
        self.change_note(pool, RESTORING, |lines| {
            lines.retain(|line| restore(line).is_none_or(|(other, _)| other != disk));
            lines.extend(image.map(|image| format!("{disk} {image}")));
        })
    }

    /// Changes the lines of a note.
    pub(super) fn change_note(
        &self,
        pool: &Pool,
        note: &str,
        change: impl FnOnce(&mut Vec<String>),
    ) -> Result<(), RbdError> {
        let _one_at_a_time = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        let before = lines(pool, note)?;
        let mut now = before.clone();
        change(&mut now);
        if now == before { Ok(()) } else { pool.write_note(note, &now.join("\n")) }
    }
}

/// The lines of a note.
pub(super) fn lines(pool: &Pool, note: &str) -> Result<Vec<String>, RbdError> {
    Ok(pool.read_note(note)?.unwrap_or_default().lines().map(str::to_owned).collect())
}

/// Disks that are being restored, and to which images.
pub(super) fn restores(pool: &Pool) -> Result<Vec<(ImageName, ImageName)>, RbdError> {
    Ok(lines(pool, RESTORING)?.iter().filter_map(|line| restore(line)).collect())
}

/// A line of [`RESTORING`]: a disk, and the image that it is restored to.
fn restore(line: &str) -> Option<(ImageName, ImageName)> {
    line.split_once(' ').and_then(|(disk, image)| ImageName::parse(disk).zip(ImageName::parse(image)))
}
