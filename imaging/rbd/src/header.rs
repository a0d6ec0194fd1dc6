//! An image's header, read and written by the methods that Ceph's OSDs have for it: those of the object class `rbd`, which
//! librbd asks too. A round trip for each fact, where to open an image takes a dozen, and as many more for each image below.
//!
//! Numbers are little-endian, texts and octets come behind their length, structures behind two octets of versions and a
//! length, behind which a reader goes on whatever newer fields there are.

use crate::ffi::{Errno, c};
use crate::name::{ImageName, ImageObjectId};
use crate::{ImageLink, Pool, RbdError};
use std::ffi::{CStr, CString};

/// The number that stands for an image itself where a snapshot's is asked for.
const HEAD: u64 = u64::MAX - 1;

/// The header of an image, or what it says of one of its snapshots.
pub(crate) struct Header {
    pool: Pool,
    id: ImageObjectId,
    snapshot: u64,
}

/// A parent as a header names it.
#[derive(Debug, PartialEq, Eq)]
struct ParentSpec {
    pool: i64,
    namespace: String,
    id: String,
    snapshot: u64,
}

impl Pool {
    /// The header of the image with that id, or of one of its snapshots. Whether it is there is seen when it is asked.
    pub(crate) fn header(&self, id: ImageObjectId, snapshot: Option<u64>) -> Header {
        Header { pool: self.clone(), id, snapshot: snapshot.unwrap_or(HEAD) }
    }

    /// The header of the image of that name.
    ///
    /// # Errors
    /// There is none, or Ceph refuses.
    pub(crate) fn header_of(&self, name: ImageName) -> Result<Header, RbdError> {
        let object = self.path(name);
        let answer = self.handle().call(&c(&format!("rbd_id.{name}")), c"get_id", &[]);
        let answer = answer.map_err(RbdError::ceph("reading the id of", &object))?;
        let id = Reader(&answer).text().and_then(|id| ImageObjectId::new(&id).ok());
        Ok(self.header(id.ok_or_else(|| unreadable(object, "id"))?, None))
    }

    /// Gives an image another name, in librbd's steps, which opens the image and all below it for that. Nobody has it open:
    /// they would not hear of it.
    ///
    /// # Errors
    /// There is one of that name, there is none of the old, or Ceph refuses.
    pub fn rename_image(&self, from: ImageName, to: ImageName) -> Result<(), RbdError> {
        let id = self.header_of(from)?.id;
        let failed = || RbdError::ceph("renaming", format!("{} to {to}", self.path(from)));
        let (old, new) = (c(&format!("rbd_id.{from}")), c(&format!("rbd_id.{to}")));
        if self.handle().has_object(&new).map_err(failed())? {
            return Err(RbdError::Exists { object: self.path(to) });
        }
        let id = text(id.as_str());
        self.handle().write_object(&new, &id).map_err(failed())?;
        // From here on it has the new name, and what is left of the old one leads nowhere that counts.
        let input = [text(&from.to_string()), text(&to.to_string()), id].concat();
        self.handle().call(c"rbd_directory", c"dir_rename_image", &input).map_err(failed())?;
        self.handle().remove_object(&old).map_err(failed())
    }

    /// The name of an image by its id, and whether it is in the trash; an empty one if it is in neither directory.
    fn name_of(&self, id: &str) -> Result<(String, bool), RbdError> {
        let looking = || RbdError::ceph("reading the name of", self.path(id));
        let input = text(id);
        match self.handle().call(c"rbd_directory", c"dir_get_name", &input) {
            Ok(answer) => {
                let name = Reader(&answer).text().ok_or_else(|| unreadable(self.path(id), "name"))?;
                return Ok((name, false));
            }
            Err(Errno::NOT_FOUND) => {}
            Err(errno) => return Err(looking()(errno)),
        }
        match self.handle().call(c"rbd_trash", c"trash_get", &input) {
            Ok(answer) => Ok((trashed_name(&answer).ok_or_else(|| unreadable(self.path(id), "name"))?, true)),
            Err(Errno::NOT_FOUND) => Ok((String::new(), false)),
            Err(errno) => Err(looking()(errno)),
        }
    }
}

impl Header {
    /// Which image's.
    pub(crate) fn id(&self) -> &ImageObjectId {
        &self.id
    }

    /// `pool/namespace/id`, for messages.
    pub(crate) fn path(&self) -> String {
        self.pool.path(&self.id)
    }

    /// Size in octets.
    ///
    /// # Errors
    /// The image or its snapshot is not there, or Ceph refuses.
    pub(crate) fn byte_len(&self) -> Result<u64, RbdError> {
        let answer = self.ask("reading the size of", c"get_size", &self.snapshot.to_le_bytes())?;
        size(&answer).ok_or_else(|| unreadable(self.path(), "size"))
    }

    /// The parent, and the number of the parent's snapshot: see [`crate::Image::parent`].
    ///
    /// # Errors
    /// The image or its snapshot is not there, or Ceph refuses.
    pub(crate) fn parent(&self) -> Result<Option<(ImageLink, u64)>, RbdError> {
        let doing = "reading the parent of";
        // One that was flattened may still name the parent that older snapshots of it have.
        let overlap = self.ask(doing, c"parent_overlap_get", &self.snapshot.to_le_bytes())?;
        if !has_overlap(&overlap).ok_or_else(|| unreadable(self.path(), "parent"))? {
            return Ok(None);
        }
        let answer = self.ask(doing, c"parent_get", &[])?;
        let ParentSpec { pool, namespace, id, snapshot } =
            parent_spec(&answer).ok_or_else(|| unreadable(self.path(), "parent"))?;
        if pool < 0 {
            return Ok(None);
        }
        if pool != self.pool.handle().id() {
            // Not where we put any. Whoever asks compares.
            let link = ImageLink { pool: format!("#{pool}"), namespace, name: String::new(), id, in_trash: false };
            return Ok(Some((link, snapshot)));
        }
        let (name, in_trash) = self.pool.beside(&namespace)?.name_of(&id)?;
        let link = ImageLink { pool: self.pool.name().to_string(), namespace, name, id, in_trash };
        Ok(Some((link, snapshot)))
    }

    /// Whether an image is on the list of the snapshot's clones.
    ///
    /// # Errors
    /// Ceph refuses.
    pub(crate) fn has_child(&self, child: &ImageObjectId) -> Result<bool, RbdError> {
        let children = match self.pool.handle().call(&self.object(), c"children_list", &self.snapshot.to_le_bytes()) {
            Err(Errno::NOT_FOUND) => return Ok(false),
            answer => answer.map_err(RbdError::ceph("listing the clones of", self.path()))?,
        };
        let children = child_ids(&children).ok_or_else(|| unreadable(self.path(), "clones"))?;
        Ok(children.iter().any(|id| id == child.as_str()))
    }

    /// A fact that somebody wrote there.
    ///
    /// # Errors
    /// Ceph refuses.
    pub(crate) fn metadata(&self, key: &str) -> Result<Option<String>, RbdError> {
        match self.pool.handle().call(&self.object(), c"metadata_get", &text(key)) {
            Err(Errno::NOT_FOUND) => Ok(None),
            Err(errno) => Err(RbdError::ceph("reading the metadata of", self.path())(errno)),
            Ok(answer) => Reader(&answer).text().map(Some).ok_or_else(|| unreadable(self.path(), "metadata")),
        }
    }

    /// Writes a fact there. Whoever has the image open is not told.
    ///
    /// # Errors
    /// Ceph refuses.
    pub(crate) fn set_metadata(&self, key: &str, value: &str) -> Result<(), RbdError> {
        let one = 1_u32.to_le_bytes();
        let input = [&one[..], &text(key), &text(value)].concat();
        self.ask("writing the metadata of", c"metadata_set", &input).map(drop)
    }

    fn object(&self) -> CString {
        c(&format!("rbd_header.{}", self.id))
    }

    fn ask(&self, doing: &'static str, method: &CStr, input: &[u8]) -> Result<Vec<u8>, RbdError> {
        self.pool.handle().call(&self.object(), method, input).map_err(RbdError::ceph(doing, self.path()))
    }
}

fn unreadable(object: String, what: &str) -> RbdError {
    RbdError::Malformed { object, detail: format!("has a header that says its {what} in no way that we know") }
}

fn text(text: &str) -> Vec<u8> {
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    [&length.to_le_bytes(), text.as_bytes()].concat()
}

fn size(answer: &[u8]) -> Option<u64> {
    let mut reader = Reader(answer);
    let _object_order = reader.octet()?;
    reader.number()
}

fn has_overlap(answer: &[u8]) -> Option<bool> {
    let mut reader = Reader(answer);
    Some(reader.octet()? != 0 && reader.number()? != 0)
}

fn parent_spec(answer: &[u8]) -> Option<ParentSpec> {
    let mut spec = Reader(answer).structure()?;
    let pool = spec.number()?.cast_signed();
    Some(ParentSpec { pool, namespace: spec.text()?, id: spec.text()?, snapshot: spec.number()? })
}

fn child_ids(answer: &[u8]) -> Option<Vec<String>> {
    let mut reader = Reader(answer);
    let count = reader.short_number()?;
    let mut ids = Vec::new();
    for _ in 0..count {
        let mut child = reader.structure()?;
        let _pool = child.number()?;
        ids.push(child.text()?);
    }
    Some(ids)
}

fn trashed_name(answer: &[u8]) -> Option<String> {
    let mut spec = Reader(answer).structure()?;
    let _source = spec.octet()?;
    spec.text()
}

/// What is left of an answer. Nothing is taken that is not there.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn octet(&mut self) -> Option<u8> {
        self.take(1).map(|octets| octets[0])
    }

    fn short_number(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_le_bytes)
    }

    fn number(&mut self) -> Option<u64> {
        self.take(8)?.try_into().ok().map(u64::from_le_bytes)
    }

    fn octets(&mut self) -> Option<&'a [u8]> {
        let length = self.short_number()?;
        self.take(usize::try_from(length).ok()?)
    }

    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.octets()?.to_vec()).ok()
    }

    fn structure(&mut self) -> Option<Self> {
        let _versions = self.take(2)?;
        self.octets().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn structure(fields: &[&[u8]]) -> Vec<u8> {
        let fields = fields.concat();
        let length = u32::try_from(fields.len()).unwrap();
        [&[2, 1][..], &length.to_le_bytes(), &fields].concat()
    }

    #[test]
    fn a_parent_and_clones_are_read_as_ceph_writes_them() {
        let (pool, snapshot) = (7_u64.to_le_bytes(), 9_u64.to_le_bytes());
        // With a field that is not known yet.
        let spec = structure(&[&pool, &text("tenant"), &text("1047ab"), &snapshot, &[1, 2, 3]]);
        let expected = ParentSpec { pool: 7, namespace: "tenant".to_owned(), id: "1047ab".to_owned(), snapshot: 9 };
        assert_eq!(parent_spec(&spec), Some(expected));
        let child = |id| structure(&[&pool, &text(id), &text("tenant")]);
        let children = [&2_u32.to_le_bytes()[..], &child("10"), &child("11")].concat();
        assert_eq!(child_ids(&children), Some(vec!["10".to_owned(), "11".to_owned()]));
        assert_eq!(trashed_name(&structure(&[&[0], &text("gone"), &pool])), Some("gone".to_owned()));
        assert_eq!(has_overlap(&[&[1][..], &pool].concat()), Some(true));
        assert_eq!((has_overlap(&[0]), has_overlap(&[1, 0, 0, 0, 0, 0, 0, 0, 0])), (Some(false), Some(false)));
    }

    proptest! {
        #[test]
        fn no_answer_is_read_beyond_its_end(answer in prop::collection::vec(any::<u8>(), 0..200)) {
            let _any = (size(&answer), has_overlap(&answer), parent_spec(&answer), trashed_name(&answer));
            if let Some(ids) = child_ids(&answer) {
                prop_assert!(ids.len() * 18 <= answer.len());
            }
        }
    }
}
